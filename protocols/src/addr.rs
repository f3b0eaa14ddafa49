//! Guest-physical addresses, page sizes and privilege levels.
//!
//! A [`Gpa`] carries a number and nothing else: it says that the number is meant as a
//! guest-physical address without alias bits (no C-bit). It does not say that memory is there,
//! that it is accepted, or who may touch it.

use core::fmt;

/// log2 of the base page size.
pub const PAGE_SHIFT: u32 = 12;
/// Base page size in bytes.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// log2 of the large page size.
pub const LARGE_PAGE_SHIFT: u32 = 21;
/// Large page size in bytes.
pub const LARGE_PAGE_SIZE: u64 = 1 << LARGE_PAGE_SHIFT;
/// Base pages in one large page.
pub const PAGES_PER_LARGE_PAGE: u64 = LARGE_PAGE_SIZE / PAGE_SIZE;

/// A guest-physical address in bytes, without any alias bit.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Gpa(u64);

impl Gpa {
    /// Takes any number; nothing is checked.
    #[must_use]
    pub const fn new(address: u64) -> Self {
        Self(address)
    }

    /// The address of the first byte of a 4 KiB frame; the upper bits of a frame number that
    /// is too large are lost.
    #[must_use]
    pub const fn from_frame_truncating(frame: u64) -> Self {
        Self(frame << PAGE_SHIFT)
    }

    /// The address in bytes.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Number of the 4 KiB frame the address lies in.
    #[must_use]
    pub const fn frame(self) -> u64 {
        self.0 >> PAGE_SHIFT
    }

    /// Offset in bytes inside the 4 KiB page.
    #[must_use]
    pub const fn offset_in_page(self) -> u64 {
        self.0 & (PAGE_SIZE - 1)
    }

    /// Start of the page of the given size that holds the address.
    #[must_use]
    pub const fn align_down(self, size: PageSize) -> Self {
        Self(self.0 & !(size.bytes() - 1))
    }

    /// Whether the address is the start of a page of the given size.
    #[must_use]
    pub const fn is_aligned(self, size: PageSize) -> bool {
        self.0 & (size.bytes() - 1) == 0
    }

    /// The address `bytes` further up; none if that wraps.
    #[must_use]
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }
}

impl fmt::Debug for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gpa({:#x})", self.0)
    }
}

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::LowerHex for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

/// The two page sizes that the RMP knows (APM 15.36.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageSize {
    /// 4 KiB.
    Size4K,
    /// 2 MiB.
    Size2M,
}

impl PageSize {
    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Size4K => PAGE_SIZE,
            Self::Size2M => LARGE_PAGE_SIZE,
        }
    }

    /// The size in 4 KiB pages.
    #[must_use]
    pub const fn pages(self) -> u64 {
        self.bytes() / PAGE_SIZE
    }

    /// The number that instructions and wire formats use: 0 for 4 KiB, 1 for 2 MiB.
    #[must_use]
    pub const fn encoding(self) -> u8 {
        match self {
            Self::Size4K => 0,
            Self::Size2M => 1,
        }
    }

    /// Reads [`Self::encoding`]; other numbers are no page size.
    #[must_use]
    pub const fn from_encoding(value: u64) -> Option<Self> {
        match value {
            0 => Some(Self::Size4K),
            1 => Some(Self::Size2M),
            _ => None,
        }
    }
}

/// A virtual machine privilege level, 0 (most privileged) to 3 (APM 15.36.7).
///
/// It has no order on purpose: "greater" would mean less privileged. Ask
/// [`Vmpl::is_more_privileged_than`].
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Vmpl(u8);

impl Vmpl {
    /// The paravisor's level.
    pub const VMPL0: Self = Self(0);
    /// Level 1.
    pub const VMPL1: Self = Self(1);
    /// Level 2.
    pub const VMPL2: Self = Self(2);
    /// Level 3.
    pub const VMPL3: Self = Self(3);
    /// How many levels there are.
    pub const COUNT: usize = 4;
    /// All levels, most privileged first.
    pub const ALL: [Self; Self::COUNT] = [Self::VMPL0, Self::VMPL1, Self::VMPL2, Self::VMPL3];

    /// The level with this number, if it exists.
    #[must_use]
    pub const fn try_new(number: u64) -> Option<Self> {
        match number {
            0 => Some(Self::VMPL0),
            1 => Some(Self::VMPL1),
            2 => Some(Self::VMPL2),
            3 => Some(Self::VMPL3),
            _ => None,
        }
    }

    /// The level's number, 0 to 3.
    #[must_use]
    pub const fn number(self) -> u8 {
        self.0
    }

    /// The level's number as an array index, below [`Self::COUNT`].
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// Whether this level has strictly more privilege than the other.
    #[must_use]
    pub const fn is_more_privileged_than(self, other: Self) -> bool {
        self.0 < other.0
    }
}

impl fmt::Debug for Vmpl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VMPL{}", self.0)
    }
}

impl fmt::Display for Vmpl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VMPL{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_address_is_its_frame_and_its_offset(address: u64) {
            let gpa = Gpa::new(address);
            prop_assert_eq!(
                Gpa::from_frame_truncating(gpa.frame()).get() + gpa.offset_in_page(),
                address
            );
        }

        #[test]
        fn aligning_down_stays_within_one_page(address: u64) {
            for size in [PageSize::Size4K, PageSize::Size2M] {
                let down = Gpa::new(address).align_down(size);
                prop_assert!(down.is_aligned(size));
                prop_assert!(address - down.get() < size.bytes());
            }
        }
    }

    #[test]
    fn only_four_levels_exist() {
        assert_eq!(Vmpl::try_new(3), Some(Vmpl::VMPL3));
        assert_eq!(Vmpl::try_new(4), None);
        assert_eq!(Vmpl::try_new(0x100), None);
        assert!(Vmpl::VMPL0.is_more_privileged_than(Vmpl::VMPL1));
        assert!(!Vmpl::VMPL1.is_more_privileged_than(Vmpl::VMPL1));
    }

    #[test]
    fn adding_does_not_wrap() {
        assert_eq!(Gpa::new(u64::MAX).checked_add(1), None);
        assert_eq!(Gpa::new(1).checked_add(2), Some(Gpa::new(3)));
    }
}
