//! The table of unaccepted memory as Linux reads it from EFI (`struct efi_unaccepted_memory`), made
//! from the map.
//!
//! A header, and one bit for each unit of 2 MiB from the lowest unaccepted one to the highest: of
//! whole units only. Of a unit that is accepted in part the bit is clear, so whoever makes a table for
//! a guest to start with accepts the rest of such units first ([`Engine::round_out`]).
//!
//! The table is handed over in pieces, so that nobody needs memory of its size.

use core::ops::Range;

use accept::{Backend, Engine, Extent};
use protocols::efi::UnacceptedTable;
use zerocopy::IntoBytes;

/// No piece crosses a multiple of this offset.
pub const PIECE: u64 = 64;

/// Bytes before the bits.
const HEADER: u64 = size_of::<UnacceptedTable>() as u64;
/// Bytes that one byte of bits tells of.
const BYTES_PER_BYTE: u64 = 8 * UnacceptedTable::UNIT_SIZE as u64;

const _: () = assert!(HEADER < PIECE);

/// Why there is no table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoTable<E> {
    /// It is larger than the place for it. Nothing was handed over.
    TooSmall {
        /// Bytes of the table.
        needed: u64,
    },
    /// A piece was not taken.
    NotTaken(E),
}

/// The largest table of so many bytes of memory.
#[must_use]
pub const fn largest(memory: u64) -> u64 {
    HEADER + memory.div_ceil(BYTES_PER_BYTE)
}

/// Makes the table of `regions` (numbers of 2 MiB regions from address 0), where there is `room` for
/// so many bytes. Hands each piece and its offset to `put`, in ascending order, and returns the bytes
/// of the table. Where nothing is unaccepted there are no bits, and the address is 0.
///
/// While others are at work it is true of no one moment: what is given back below or above what was
/// unaccepted in the beginning is not told.
///
/// # Errors
/// [`NoTable`].
pub fn write_table<B: Backend, E>(
    engine: &Engine<'_, B>,
    regions: Range<u64>,
    room: u64,
    mut put: impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<u64, NoTable<E>> {
    let nowhere = Extent { base: 0, units: 0 };
    let extent = engine.unaccepted_extent(regions).unwrap_or(nowhere);
    let header = UnacceptedTable {
        version: UnacceptedTable::VERSION,
        unit_size: UnacceptedTable::UNIT_SIZE,
        phys_base: extent.base,
        size: extent.units.div_ceil(8),
    };
    let needed = HEADER + header.size;
    if needed > room {
        return Err(NoTable::TooSmall { needed });
    }
    put(0, header.as_bytes()).map_err(NoTable::NotTaken)?;
    let mut offset = HEADER;
    while offset < needed {
        let mut piece = [0; PIECE as usize];
        let done = offset - HEADER;
        let bytes = (PIECE - offset % PIECE).min(needed - offset);
        let part = Extent {
            base: extent.base + done * BYTES_PER_BYTE,
            units: (extent.units - done * 8).min(bytes * 8),
        };
        let (bits, _) = piece.split_at_mut(bytes as usize);
        engine.unaccepted_bits(part, bits);
        put(offset, bits).map_err(NoTable::NotTaken)?;
        offset += bytes;
    }
    Ok(needed)
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use accept::{
        Block, Frame, GivenBack, Map, OnNoChange, PageSize, Region, RegionLock, RegionLocks,
    };

    use super::*;
    use crate::testing::Willing;

    const LARGE: u64 = 2 << 20;

    /// Runs `test` with an engine on these pieces of memory: address and bytes.
    fn with_memory(memory: &[(u64, u64)], test: impl FnOnce(&Engine<'_, Willing>)) {
        let page = PageSize::Size4K.bytes();
        let at = |gpa| Frame::starting_at(gpa).expect("whole pages");
        let kept: Vec<_> = memory
            .iter()
            .map(|(gpa, bytes)| {
                let needed = accept::Range::regions_needed(at(*gpa), bytes / page).expect("some");
                let regions: Vec<Region> = (0..needed).map(|_| Region::new()).collect();
                let flags: Vec<GivenBack> = (0..GivenBack::needed(regions.len()))
                    .map(|_| GivenBack::new())
                    .collect();
                (regions, flags)
            })
            .collect();
        let ranges: Vec<_> = memory
            .iter()
            .zip(&kept)
            .map(|((gpa, bytes), (regions, flags))| {
                let range = accept::Range::try_new(at(*gpa), bytes / page, regions);
                let range = range.expect("a good range");
                range.with_given_back(flags).expect("good flags")
            })
            .collect();
        let locks = [const { RegionLock::new() }; RegionLocks::MINIMUM];
        test(&Engine::new(
            Willing,
            Map::try_new(&ranges).expect("a good map"),
            RegionLocks::try_new(&locks).expect("good locks"),
        ));
    }

    fn accept_region(engine: &Engine<'_, Willing>, gpa: u64) {
        let block = Block::region_around(Frame::containing(gpa));
        engine.accept(block, OnNoChange::Fail).expect("accepted");
    }

    /// The table of all memory, from pieces that follow each other.
    fn table(engine: &Engine<'_, Willing>, regions: Range<u64>) -> Vec<u8> {
        let mut table = Vec::new();
        let written = write_table(engine, regions, u64::MAX, |offset, piece| {
            let end = offset + piece.len() as u64;
            assert_eq!(offset, table.len() as u64, "no gap");
            assert!(!piece.is_empty() && offset / PIECE == (end - 1) / PIECE);
            table.extend_from_slice(piece);
            Ok::<(), ()>(())
        });
        assert_eq!(written, Ok(table.len() as u64));
        table
    }

    /// A table, byte by byte: version 1, unit 2 MiB, address, bytes of bits, bits.
    fn expected(base: u64, bits: &[u8]) -> Vec<u8> {
        let mut bytes = std::vec![1, 0, 0, 0, 0, 0, 0x20, 0];
        bytes.extend_from_slice(&base.to_le_bytes());
        bytes.extend_from_slice(&(bits.len() as u64).to_le_bytes());
        bytes.extend_from_slice(bits);
        bytes
    }

    #[test]
    fn the_first_bit_is_the_lowest_unaccepted_unit() {
        // 32 units from 4 GiB and 8 MiB on.
        let base = (4 << 30) + 4 * LARGE;
        with_memory(&[(base, 32 * LARGE)], |engine| {
            assert_eq!(table(engine, 0..u64::MAX), expected(base, &[0xff; 4]));
            for unit in [0, 1, 3, 20, 31] {
                accept_region(engine, base + unit * LARGE);
            }
            // Units 2 to 30: 29 of them, 3 bits too many.
            let bits = [0b1111_1101, 0b1111_1111, 0b1111_1011, 0b0001_1111];
            let all = expected(base + 2 * LARGE, &bits);
            assert_eq!(table(engine, 0..u64::MAX), all);
            assert_eq!(all.len(), 28);
            // Of some regions: what is unaccepted in them, and nothing behind.
            let first = base / LARGE;
            let some = table(engine, first + 3..first + 6);
            assert_eq!(some, expected(base + 4 * LARGE, &[0b11]));
        });
    }

    #[test]
    fn edges_that_are_no_whole_units_are_accepted_up_front() {
        // From the middle of unit 1 to the middle of unit 5, and a page of unit 3 is accepted.
        let memory = [(LARGE + 0x8_0000, 4 * LARGE)];
        with_memory(&memory, |engine| {
            let page = Block::page(Frame::containing(3 * LARGE + 0x5000));
            engine.accept(page, OnNoChange::Fail).expect("accepted");
            // The end of unit 1, the rest of unit 3, the beginning of unit 5.
            let changed = (LARGE - 0x8_0000) + (LARGE - 0x1000) + 0x8_0000;
            assert_eq!(engine.round_out(), Ok(changed / 0x1000));
            assert_eq!(
                table(engine, 0..u64::MAX),
                expected(2 * LARGE, &[0b101]),
                "units 2 and 4"
            );
            assert!(!engine.contains_unaccepted(LARGE + 0x8_0000, LARGE - 0x8_0001));
        });
    }

    #[test]
    fn holes_are_not_unaccepted() {
        let memory = [(0, 2 * LARGE), (70 * LARGE, LARGE)];
        with_memory(&memory, |engine| {
            let mut bits = [0; 9];
            (bits[0], bits[8]) = (0b11, 1 << 6);
            assert_eq!(table(engine, 0..u64::MAX), expected(0, &bits));
        });
    }

    #[test]
    fn where_all_is_accepted_there_are_no_bits() {
        with_memory(&[(LARGE, 2 * LARGE)], |engine| {
            accept_region(engine, LARGE);
            accept_region(engine, 2 * LARGE);
            assert_eq!(table(engine, 0..u64::MAX), expected(0, &[]));
            assert_eq!(table(engine, 7..7), expected(0, &[]));
        });
    }

    #[test]
    fn a_long_table_is_the_same_as_its_bits_in_one() {
        let units = 64 * 8 * 3 + 5;
        with_memory(&[(0, units * LARGE)], |engine| {
            for unit in (0..units).filter(|unit| unit % 7 == 3 || unit / 100 % 2 == 1) {
                accept_region(engine, unit * LARGE);
            }
            let extent = engine.unaccepted_extent(0..u64::MAX).expect("some");
            let mut bits = std::vec![0; extent.units.div_ceil(8) as usize];
            engine.unaccepted_bits(extent, &mut bits);
            let table = table(engine, 0..u64::MAX);
            assert_eq!(table, expected(extent.base, &bits));
            assert!(table.len() as u64 <= largest(units * LARGE));
        });
    }

    #[test]
    fn a_place_that_is_too_small_is_told_what_is_needed() {
        with_memory(&[(0, 9 * LARGE)], |engine| {
            let never = |_: u64, _: &[u8]| -> Result<(), ()> { panic!("written") };
            for room in [0, 23, 24, 25] {
                let refused = write_table(engine, 0..u64::MAX, room, never);
                assert_eq!(refused, Err(NoTable::TooSmall { needed: 26 }), "{room}");
            }
            let written = write_table(engine, 0..u64::MAX, 26, |_, _| Ok::<(), ()>(()));
            assert_eq!(written, Ok(26));
            let not_taken = write_table(engine, 0..u64::MAX, 26, |offset, _| Err(offset));
            assert_eq!(not_taken, Err(NoTable::NotTaken(0)));
        });
        assert_eq!(largest(64 << 30), 24 + 4096);
    }
}
