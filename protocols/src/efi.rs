//! Unaccepted memory as UEFI and Linux describe it.
//!
//! Firmware marks memory that must be accepted first with its own memory type; Linux keeps
//! what is left of it in a configuration table with one bit per unit (UEFI 2.10, 7.2; Linux
//! `include/linux/efi.h`, `struct efi_unaccepted_memory`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::addr::LARGE_PAGE_SIZE;
use crate::guid::Guid;

/// Memory type of unaccepted memory (UEFI 2.10, 7.2, EfiUnacceptedMemoryType).
pub const EFI_UNACCEPTED_MEMORY: u32 = 15;

/// GUID of the configuration table (Linux, LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID).
pub const UNACCEPTED_TABLE_GUID: Guid = Guid::from_text("d5d1de3c-105c-44f9-9ea9-bcef98120031");

/// Head of the configuration table; the bitmap follows. A set bit is an unaccepted unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct UnacceptedTable {
    /// [`UnacceptedTable::VERSION`].
    pub version: u32,
    /// Bytes per bit.
    pub unit_size: u32,
    /// Address of the first unit.
    pub phys_base: u64,
    /// Bytes of the bitmap.
    pub size: u64,
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<UnacceptedTable>() == 24);
    assert!(offset_of!(UnacceptedTable, unit_size) == 4);
    assert!(offset_of!(UnacceptedTable, phys_base) == 8);
    assert!(offset_of!(UnacceptedTable, size) == 16);
};

impl UnacceptedTable {
    /// The only version.
    pub const VERSION: u32 = 1;
    /// The unit of x86: 2 MiB.
    pub const UNIT_SIZE: u32 = LARGE_PAGE_SIZE as u32;

    /// Number of units that the bitmap has bits for; none if that overflows.
    #[must_use]
    pub const fn units(&self) -> Option<u64> {
        self.size.checked_mul(8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_bitmap_covers_64_gib() {
        let table = UnacceptedTable {
            version: UnacceptedTable::VERSION,
            unit_size: UnacceptedTable::UNIT_SIZE,
            phys_base: 1 << 32,
            size: 4096,
        };
        assert_eq!(
            table.units().unwrap() * u64::from(table.unit_size),
            64 << 30
        );
        assert_eq!(
            UnacceptedTable {
                size: u64::MAX,
                ..table
            }
            .units(),
            None
        );
    }
}
