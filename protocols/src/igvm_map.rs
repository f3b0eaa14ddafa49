//! The memory map that the host fills into an IGVM parameter area (IGVM, section on
//! IGVM_VHS_MEMORY_MAP_ENTRY). It is untrusted: order, overlap and wrapping are for the reader
//! to check.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

open_enum! {
    /// What kind of memory an entry describes.
    pub struct EntryKind(u16) {
        /// RAM.
        MEMORY = 0,
        /// Not to be used.
        PLATFORM_RESERVED = 1,
        /// Persistent memory.
        PERSISTENT = 2,
        /// RAM that a paravisor may keep for itself.
        VTL2_PROTECTABLE = 3,
        /// Memory for a specific purpose.
        SPECIFIC_PURPOSE = 4,
        /// Memory that is not to be shown.
        HIDDEN = 5,
    }
}

/// One entry. The map ends at an entry with no pages or at the end of the area.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MemoryMapEntry {
    /// First 4 KiB frame.
    pub page_start: u64,
    /// 4 KiB pages; 0 ends the map.
    pub page_count: u64,
    /// What it is.
    pub kind: EntryKind,
    /// Flags; none are defined.
    pub flags: u16,
    /// Zero.
    pub reserved: u32,
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<MemoryMapEntry>() == 24);
    assert!(offset_of!(MemoryMapEntry, page_start) == 0);
    assert!(offset_of!(MemoryMapEntry, page_count) == 8);
    assert!(offset_of!(MemoryMapEntry, kind) == 16);
    assert!(offset_of!(MemoryMapEntry, flags) == 18);
    assert!(offset_of!(MemoryMapEntry, reserved) == 20);
};

impl MemoryMapEntry {
    /// The entry that ends a map.
    pub const END: Self = Self {
        page_start: 0,
        page_count: 0,
        kind: EntryKind::MEMORY,
        flags: 0,
        reserved: 0,
    };

    /// A stretch of `page_count` 4 KiB pages.
    #[must_use]
    pub const fn new(page_start: u64, page_count: u64, kind: EntryKind) -> Self {
        Self {
            page_start,
            page_count,
            kind,
            flags: 0,
            reserved: 0,
        }
    }

    /// Whether the entry ends the map.
    #[must_use]
    pub const fn is_end(&self) -> bool {
        self.page_count == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_has_the_documented_bytes() {
        let entry = MemoryMapEntry::new(0x10_0000, 0x200, EntryKind::PLATFORM_RESERVED);
        let bytes = entry.as_bytes();
        assert_eq!(bytes[..8], 0x10_0000u64.to_le_bytes());
        assert_eq!(bytes[8..16], 0x200u64.to_le_bytes());
        assert_eq!(bytes[16..], [1, 0, 0, 0, 0, 0, 0, 0]);
        assert!(!entry.is_end());
        assert!(MemoryMapEntry::END.is_end());
    }
}
