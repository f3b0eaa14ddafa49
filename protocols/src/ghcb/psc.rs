//! The page state change list (GHCB, SNP page state change, event 0x8000_0010).
//!
//! The list lies in the shared buffer of the GHCB. The host moves `current` on; the guest
//! repeats the request until it has passed `end`.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::PageOperation;
use super::page::SHARED_BUFFER_SIZE;
use crate::addr::{PAGES_PER_LARGE_PAGE, PageSize};

/// Entries that fit into the shared buffer.
pub const MAX_ENTRIES: usize = (SHARED_BUFFER_SIZE - size_of::<Header>()) / size_of::<Entry>();

/// Head of the list.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Header {
    /// Index of the next entry to process; written by the host.
    pub current: u16,
    /// Index of the last entry, inclusive.
    pub end: u16,
    /// Zero.
    pub reserved: u32,
}

/// One entry: `current_page` 11:0, frame 51:12, operation 55:52, size 56, reserved 63:57.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct Entry(pub u64);

/// The list as it fills the shared buffer.
#[derive(Clone, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct List {
    /// Head.
    pub header: Header,
    /// Entries; those from `current` to `end` are meant.
    pub entries: [Entry; MAX_ENTRIES],
}

/// Offset of the first entry in the shared buffer.
pub const FIRST_ENTRY_OFFSET: usize = core::mem::offset_of!(List, entries);

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<Header>() == 8);
    assert!(offset_of!(Header, current) == 0);
    assert!(offset_of!(Header, end) == 2);
    assert!(offset_of!(Header, reserved) == 4);
    assert!(size_of::<Entry>() == 8);
    assert!(MAX_ENTRIES == 253);
    assert!(size_of::<List>() == SHARED_BUFFER_SIZE);
    assert!(offset_of!(List, entries) == 8);
};

impl Entry {
    /// An entry nothing of which has been done. Of the frame number 40 bits are kept.
    #[must_use]
    pub const fn new(frame: u64, operation: PageOperation, size: PageSize) -> Self {
        Self(
            (frame & 0xFF_FFFF_FFFF) << 12
                | (operation.0 as u64 & 0xF) << 52
                | (size.encoding() as u64) << 56,
        )
    }

    /// Pages of the entry that are done, as claimed: up to 4095.
    #[must_use]
    pub const fn current_page(self) -> u64 {
        self.0 & 0xFFF
    }

    /// The entry with another count of pages done.
    #[must_use]
    pub const fn with_current_page(self, pages: u64) -> Self {
        Self(self.0 & !0xFFF | pages & 0xFFF)
    }

    /// First 4 KiB frame.
    #[must_use]
    pub const fn frame(self) -> u64 {
        self.0 >> 12 & 0xFF_FFFF_FFFF
    }

    /// What to do.
    #[must_use]
    pub const fn operation(self) -> PageOperation {
        PageOperation((self.0 >> 52 & 0xF) as u8)
    }

    /// Size of the page.
    #[must_use]
    pub const fn size(self) -> PageSize {
        if self.0 >> 56 & 1 == 0 {
            PageSize::Size4K
        } else {
            PageSize::Size2M
        }
    }

    /// Whether bits 63:57 are zero, the frame fits the size and no more pages are done than
    /// there are.
    #[must_use]
    pub const fn is_well_formed(self) -> bool {
        let aligned = match self.size() {
            PageSize::Size4K => true,
            PageSize::Size2M => self.frame().is_multiple_of(PAGES_PER_LARGE_PAGE),
        };
        self.0 >> 57 == 0 && aligned && self.current_page() <= self.size().pages()
    }
}

open_enum! {
    /// SW_EXITINFO2 after a page state change (GHCB, SNP page state change).
    pub struct Outcome(u64) {
        /// No error; look at `current` to see how far it went.
        OK = 0,
        /// The head of the list is invalid.
        INVALID_HEADER = 1 << 32 | 1,
        /// The entry at `current` is invalid.
        INVALID_ENTRY = 1 << 32 | 2,
        /// The host could not do it.
        HOST_ERROR = 0x100 << 32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_entry_has_the_documented_bits() {
        let entry = Entry::new(0x10_0200, PageOperation::PRIVATE, PageSize::Size2M);
        assert_eq!(entry.0, 0x0110_0001_0020_0000);
        assert!(entry.is_well_formed());
        assert!(entry.with_current_page(512).is_well_formed());
        assert!(!entry.with_current_page(513).is_well_formed());
        assert!(!Entry(entry.0 | 1 << 57).is_well_formed());
        assert!(!Entry(entry.0 | 1 << 12).is_well_formed());
    }

    proptest! {
        #[test]
        fn fields_do_not_touch_each_other(frame in 0u64..1 << 40, operation in 0u8..16, done in 0u64..4096) {
            for size in [PageSize::Size4K, PageSize::Size2M] {
                let entry =
                    Entry::new(frame, PageOperation(operation), size).with_current_page(done);
                prop_assert_eq!(entry.frame(), frame);
                prop_assert_eq!(entry.operation().0, operation);
                prop_assert_eq!(entry.size(), size);
                prop_assert_eq!(entry.current_page(), done);
            }
        }
    }
}
