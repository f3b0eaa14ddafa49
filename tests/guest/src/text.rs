//! Text of bounded length, for findings: the guests have no heap.

use core::fmt;

/// Up to `N` bytes of text; what does not fit is cut off.
#[derive(Clone, Copy)]
pub struct Text<const N: usize> {
    bytes: [u8; N],
    length: usize,
}

impl<const N: usize> Text<N> {
    /// The text that `arguments` print.
    #[must_use]
    pub fn format(arguments: fmt::Arguments<'_>) -> Self {
        let mut text = Self {
            bytes: [0; N],
            length: 0,
        };
        // Cutting off is this type's contract, so the error carries no news.
        let _ = fmt::write(&mut text, arguments);
        text
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        let bytes = self.bytes.get(..self.length).unwrap_or_default();
        match core::str::from_utf8(bytes) {
            Ok(text) => text,
            // Cut off inside a character: all before it is whole.
            Err(cut) => core::str::from_utf8(bytes.get(..cut.valid_up_to()).unwrap_or_default())
                .unwrap_or_default(),
        }
    }
}

impl<const N: usize> fmt::Write for Text<N> {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        let room = self.bytes.get_mut(self.length..).unwrap_or_default();
        let fitting = part.len().min(room.len());
        if let (Some(to), Some(from)) = (room.get_mut(..fitting), part.as_bytes().get(..fitting)) {
            to.copy_from_slice(from);
        }
        self.length += fitting;
        if fitting < part.len() {
            Err(fmt::Error)
        } else {
            Ok(())
        }
    }
}

impl<const N: usize> fmt::Display for Text<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl<const N: usize> fmt::Debug for Text<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_that_fits_is_kept() {
        assert_eq!(
            Text::<8>::format(format_args!("{}-{}", 12, 34)).as_str(),
            "12-34"
        );
    }

    #[test]
    fn text_that_does_not_fit_is_cut_at_a_character() {
        assert_eq!(Text::<4>::format(format_args!("abcdef")).as_str(), "abcd");
        assert_eq!(Text::<4>::format(format_args!("abcé")).as_str(), "abc");
    }
}
