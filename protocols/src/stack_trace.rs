//! The line in which paravisor and machine tell where they broke: addresses of their own code
//! only, which `xtask` turns into names of functions.
//!
//! ```text
//! stack trace: at 0x8012345 from 0x8010a2f from 0x8010033
//! ```
//!
//! The innermost function comes first. `at` is the instruction that did not succeed; `from` is
//! an address that a call returns to, so the call itself is the instruction before it.

use core::fmt;

/// What the list begins with, wherever in a line that is.
pub const TITLE: &str = "stack trace:";
/// The most entries a list has.
pub const MAX_SITES: usize = 32;

/// One entry of the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// The instruction at this address did not succeed.
    At(u64),
    /// A call that would have returned to this address was going on.
    From(u64),
}

impl Site {
    /// An address that belongs to the instruction in question: good for a symbol table.
    #[must_use]
    pub const fn lookup_address(self) -> u64 {
        match self {
            Self::At(address) => address,
            // The call may be the last instruction of its function.
            Self::From(address) => address.wrapping_sub(1),
        }
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(address) => write!(f, "at {address:#x}"),
            Self::From(address) => write!(f, "from {address:#x}"),
        }
    }
}

/// The entries in `line`; none if it has no list. Ends at the first word that is no entry, and
/// after [`MAX_SITES`].
pub fn parse(line: &str) -> Option<impl Iterator<Item = Site> + '_> {
    let (_, list) = line.split_once(TITLE)?;
    let mut words = list.split_whitespace();
    Some(
        core::iter::from_fn(move || {
            let kind = words.next()?;
            let address = u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok()?;
            match kind {
                "at" => Some(Site::At(address)),
                "from" => Some(Site::From(address)),
                _ => None,
            }
        })
        .take(MAX_SITES),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::format;
    use std::vec::Vec;

    #[test]
    fn what_is_written_is_read() {
        let sites = [Site::At(0x801_2345), Site::From(u64::MAX), Site::From(1)];
        let list: Vec<_> = sites.iter().map(|site| format!("{site}")).collect();
        let line = format!("[svsm] {TITLE} {}\r", list.join(" "));
        assert_eq!(parse(&line).unwrap().collect::<Vec<_>>(), sites);
    }

    #[test]
    fn a_list_ends_where_it_is_not_understood() {
        let sites = |line| parse(line).map(|sites| sites.collect::<Vec<_>>());
        assert_eq!(sites("nothing of that kind"), None);
        assert_eq!(sites("stack trace: at 5"), Some(Vec::new()));
        assert_eq!(
            sites("stack trace: at 0x5 near 0x6 from 0x7"),
            Some([Site::At(5)].to_vec())
        );
        let long = format!("{TITLE}{}", " from 0x10".repeat(MAX_SITES + 9));
        assert_eq!(parse(&long).unwrap().count(), MAX_SITES);
    }

    #[test]
    fn a_call_is_the_instruction_before_its_return() {
        assert_eq!(Site::At(0x10).lookup_address(), 0x10);
        assert_eq!(Site::From(0x10).lookup_address(), 0xF);
    }
}
