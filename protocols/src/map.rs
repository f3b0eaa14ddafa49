//! The map descriptor: how the paravisor shows its page states to the referee.
//!
//! The paravisor exports one [`MapDescriptor`] under the symbol [`SYMBOL`]. The emulated
//! machine reads it through physical memory and compares every page with its RMP
//! (Turnstile, docs/decisions/004). The paravisor never reads it back, so nothing it believes
//! depends on it.
//!
//! States are kept per region of 2 MiB: 16 words of 64 bits, two bits per page. Page `i` of a
//! region is in word `i / 32`, bits `2 * (i % 32)` and up.

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Name under which the paravisor's ELF exports its [`MapDescriptor`].
pub const SYMBOL: &str = "TURNSTILE_MAP_DESCRIPTOR";

/// Words of state per 2 MiB region.
pub const WORDS_PER_REGION: usize = 16;
/// Bytes of state per 2 MiB region.
pub const BYTES_PER_REGION: u64 = 128;
/// 4 KiB pages per region.
pub const PAGES_PER_REGION: u64 = 512;
/// Pages whose states share one word.
pub const PAGES_PER_WORD: u64 = 32;

/// The state of one page, as the two bits in the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageState {
    /// Not validated, or given back to the host.
    Unaccepted = 0b00,
    /// Validated and zeroed before the guest asked; nobody below VMPL0 may touch it.
    Ahead = 0b01,
    /// Validated, zeroed, granted to the guest.
    Accepted = 0b10,
    /// The paravisor's, or a page with a role (VMSA, calling area).
    Owned = 0b11,
}

impl PageState {
    /// Reads the two low bits; the others are ignored.
    #[must_use]
    pub const fn from_low_bits(bits: u64) -> Self {
        match bits & 0b11 {
            0b00 => Self::Unaccepted,
            0b01 => Self::Ahead,
            0b10 => Self::Accepted,
            _ => Self::Owned,
        }
    }

    /// The state of page `page` (its index inside the map range) in one word of states, the
    /// word being `page / 32` of the range.
    #[must_use]
    pub const fn in_word(word: u64, page: u64) -> Self {
        Self::from_low_bits(word >> (2 * (page % PAGES_PER_WORD)))
    }
}

/// One stretch of memory whose states are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MapRange {
    /// First byte, a multiple of 2 MiB (rounded down from where memory begins).
    pub gpa: u64,
    /// 4 KiB pages, a multiple of 512 (rounded up).
    pub pages: u64,
    /// Where the states are: 128 bytes per 2 MiB, GPA without C-bit.
    pub states_gpa: u64,
}

const _: () = assert!(size_of::<MapRange>() == 24);

/// One virtual processor of the guest.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct VcpuEntry {
    /// The guest's VMSA; 0 if there is none.
    pub vmsa_gpa: u64,
    /// The guest's calling area; 0 if there is none.
    pub ca_gpa: u64,
}

const _: () = assert!(size_of::<VcpuEntry>() == 16);

/// What the referee has to know; one page, page aligned.
#[derive(Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
pub struct MapDescriptor {
    /// [`MapDescriptor::MAGIC`] once the map is ready; until then the page says nothing.
    pub magic: [u8; 8],
    /// [`MapDescriptor::VERSION`].
    pub version: u32,
    /// How many of `ranges` are in use.
    pub range_count: u32,
    /// The stretches, ascending, without overlap.
    pub ranges: [MapRange; MapDescriptor::MAX_RANGES],
    /// Entries in the table of virtual processors.
    pub vcpu_count: u32,
    /// Privilege level of the guest, 1 to 3.
    pub guest_vmpl: u32,
    /// Table of [`VcpuEntry`], GPA without C-bit; 0 if there is none.
    pub vcpu_table_gpa: u64,
    /// Zero.
    pub reserved: [u8; 3680],
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<MapDescriptor>() == 4096);
    assert!(offset_of!(MapDescriptor, range_count) == 0x0C);
    assert!(offset_of!(MapDescriptor, ranges) == 0x10);
    assert!(offset_of!(MapDescriptor, vcpu_count) == 0x190);
    assert!(offset_of!(MapDescriptor, guest_vmpl) == 0x194);
    assert!(offset_of!(MapDescriptor, vcpu_table_gpa) == 0x198);
    assert!(offset_of!(MapDescriptor, reserved) == 0x1A0);
};

impl MapDescriptor {
    /// First bytes of a finished descriptor.
    pub const MAGIC: [u8; 8] = *b"TSMAP\0\0\x01";
    /// Version of the layout above.
    pub const VERSION: u32 = 1;
    /// Room for ranges.
    pub const MAX_RANGES: usize = 16;

    /// A descriptor that says nothing yet (no magic): how the paravisor's static begins.
    pub const EMPTY: Self = Self {
        magic: [0; 8],
        version: 0,
        range_count: 0,
        ranges: [MapRange {
            gpa: 0,
            pages: 0,
            states_gpa: 0,
        }; Self::MAX_RANGES],
        vcpu_count: 0,
        guest_vmpl: 0,
        vcpu_table_gpa: 0,
        reserved: [0; 3680],
    };

    /// A finished descriptor without ranges.
    #[must_use]
    pub fn new() -> Self {
        let mut descriptor = Self::new_zeroed();
        descriptor.magic = Self::MAGIC;
        descriptor.version = Self::VERSION;
        descriptor
    }

    /// Whether magic, version and range count are those of this layout.
    #[must_use]
    pub fn is_understood(&self) -> bool {
        self.magic == Self::MAGIC
            && self.version == Self::VERSION
            && self.range_count as usize <= Self::MAX_RANGES
    }

    /// The ranges in use; never more than there are.
    #[must_use]
    pub fn ranges(&self) -> &[MapRange] {
        let count = (self.range_count as usize).min(Self::MAX_RANGES);
        self.ranges.get(..count).unwrap_or_default()
    }

    /// Adds a range; false if there is no room.
    #[must_use]
    pub fn push_range(&mut self, range: MapRange) -> bool {
        match self.ranges.get_mut(self.range_count as usize) {
            Some(slot) => {
                *slot = range;
                self.range_count += 1;
                true
            }
            None => false,
        }
    }
}

impl Default for MapDescriptor {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_two_bits_counted_from_the_low_end() {
        let word = 0b11_10_01_00;
        let states = [0, 1, 2, 3].map(|page| PageState::in_word(word, page));
        assert_eq!(
            states,
            [
                PageState::Unaccepted,
                PageState::Ahead,
                PageState::Accepted,
                PageState::Owned
            ]
        );
        assert_eq!(PageState::in_word(0b10 << 62, 31), PageState::Accepted);
        assert_eq!(PageState::in_word(0b10 << 62, 511), PageState::Accepted);
        for bits in 0..4 {
            assert_eq!(PageState::from_low_bits(bits) as u64, bits);
        }
    }

    #[test]
    fn a_region_has_room_for_all_its_pages() {
        assert_eq!(WORDS_PER_REGION as u64 * PAGES_PER_WORD, PAGES_PER_REGION);
        assert_eq!(WORDS_PER_REGION as u64 * 8, BYTES_PER_REGION);
    }

    #[test]
    fn a_descriptor_survives_its_bytes() {
        let mut descriptor = MapDescriptor::new();
        let range = MapRange {
            gpa: 0x20_0000,
            pages: 512,
            states_gpa: 0x7000,
        };
        assert!(descriptor.push_range(range));
        let read = MapDescriptor::read_from_bytes(descriptor.as_bytes()).unwrap();
        assert!(read.is_understood());
        assert_eq!(read.ranges(), [range]);
        assert!(!MapDescriptor::EMPTY.is_understood());
    }

    #[test]
    fn a_wild_count_stays_inside() {
        let mut descriptor = MapDescriptor::new();
        descriptor.range_count = u32::MAX;
        assert!(!descriptor.is_understood());
        assert_eq!(descriptor.ranges().len(), MapDescriptor::MAX_RANGES);
        let range = MapRange {
            gpa: 0,
            pages: 0,
            states_gpa: 0,
        };
        assert!(!descriptor.push_range(range));
    }
}
