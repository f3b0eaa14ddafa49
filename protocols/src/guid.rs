//! GUIDs as firmware stores them: the first three fields little endian, the rest as written.

use core::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A GUID in its stored form of 16 bytes.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(transparent)]
pub struct Guid([u8; 16]);

/// Where each stored byte stands in the text, counted in bytes.
const TEXT_ORDER: [usize; 16] = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];

impl Guid {
    /// Reads the usual text form, `xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx`.
    ///
    /// Meant for constants, where a mistake is an error of the build.
    ///
    /// # Panics
    ///
    /// If the text is anything else.
    #[must_use]
    pub const fn from_text(text: &str) -> Self {
        let text = text.as_bytes();
        assert!(text.len() == 36, "a GUID has 36 characters");
        let mut written = [0; 16];
        let mut at = 0;
        let mut index = 0;
        while index < 16 {
            if at == 8 || at == 13 || at == 18 || at == 23 {
                assert!(
                    text[at] == b'-',
                    "a GUID has its dashes at 8, 13, 18 and 23"
                );
                at += 1;
            }
            written[index] = hex_digit(text[at]) << 4 | hex_digit(text[at + 1]);
            at += 2;
            index += 1;
        }
        let mut stored = [0; 16];
        let mut index = 0;
        while index < 16 {
            stored[index] = written[TEXT_ORDER[index]];
            index += 1;
        }
        Self(stored)
    }

    /// The stored form.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; 16] {
        self.0
    }
}

const fn hex_digit(character: u8) -> u8 {
    match character {
        b'0'..=b'9' => character - b'0',
        b'a'..=b'f' => character - b'a' + 10,
        b'A'..=b'F' => character - b'A' + 10,
        _ => panic!("not a hexadecimal digit"),
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, stored_at) in TEXT_ORDER.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{:02x}", self.0[*stored_at])?;
        }
        Ok(())
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    const TEXT: &str = "96b582de-1fb2-45f7-baea-a366c55a082d";

    #[test]
    fn text_and_stored_form() {
        let guid = Guid::from_text(TEXT);
        assert_eq!(guid.to_bytes()[..6], [0xDE, 0x82, 0xB5, 0x96, 0xB2, 0x1F]);
        assert_eq!(guid.to_bytes()[8..10], [0xBA, 0xEA]);
        assert_eq!(guid.to_string(), TEXT);
    }

    #[test]
    #[should_panic(expected = "dashes")]
    fn a_malformed_text_is_refused() {
        let _ = Guid::from_text("96b582de01fb2-45f7-baea-a366c55a082d");
    }
}
