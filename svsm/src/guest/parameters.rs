//! The memory map the firmware is shown: the host's, without the paravisor.
//!
//! OVMF reads up to eight entries from its IGVM parameter area and then believes nothing else
//! about memory (facts: guests §1.2). It takes the memory from address 0 up to the first gap as
//! its low memory and adds every other entry as it is, so leaving the paravisor's ranges out is
//! all that hides them from firmware and kernel. The hole for video memory and ROMs below 1 MiB
//! is no gap in that sense: OVMF knows of it and leaves it out by itself, and a host that names
//! it would make OVMF see 640 KiB of low memory.

use protocols::igvm_map::{EntryKind, MemoryMapEntry};
use protocols::ovmf::IgvmParameterArea;
use protocols::terminate::TurnstileReason;

use crate::host_map::{HostMap, Stretch};
use crate::memory::layout::PageRange;

/// Video memory and ROMs of a PC: 640 KiB to 1 MiB.
pub const LEGACY_HOLE: PageRange = match PageRange::try_from_frames(0xA0, 0x100) {
    Some(hole) => hole,
    None => panic!("the hole is a range"),
};

/// The entries for the firmware; unused ones are all zero.
///
/// `hidden` are ranges that are left out. Entries of the host's map that are neither memory nor
/// reserved are not passed on: the firmware knows no others.
///
/// # Errors
///
/// [`TurnstileReason::MAP_TOO_MANY`] if the firmware has no room for them.
pub fn guest_memory_map(
    host_map: &HostMap,
    hidden: [PageRange; 2],
) -> Result<[MemoryMapEntry; IgvmParameterArea::MAX_ENTRIES], TurnstileReason> {
    let mut entries = [entry(PageRange::EMPTY, EntryKind::MEMORY); IgvmParameterArea::MAX_ENTRIES];
    let mut slots = entries.iter_mut();
    let mut stretches = host_map.stretches().iter().copied().peekable();
    while let Some(mut stretch) = stretches.next() {
        if let Some(above) = stretches.peek()
            && let Some(joined) = joined_over_legacy_hole(stretch, *above)
        {
            stretch = joined;
            stretches.next();
        }
        let known = stretch.is_memory() || stretch.kind == EntryKind::PLATFORM_RESERVED;
        let pieces = if stretch.is_memory() {
            without_both(stretch.pages, hidden)
        } else {
            [stretch.pages, PageRange::EMPTY, PageRange::EMPTY]
        };
        for piece in pieces
            .into_iter()
            .filter(|piece| known && !piece.is_empty())
        {
            let slot = slots.next().ok_or(TurnstileReason::MAP_TOO_MANY)?;
            *slot = entry(piece, stretch.kind);
        }
    }
    Ok(entries)
}

/// Both stretches as one, if they are the memory around the hole below 1 MiB.
fn joined_over_legacy_hole(below: Stretch, above: Stretch) -> Option<Stretch> {
    let around = below.is_memory()
        && above.is_memory()
        && below.pages.start_frame() == 0
        && below.pages.end_frame() == LEGACY_HOLE.start_frame()
        && above.pages.start_frame() == LEGACY_HOLE.end_frame();
    let pages = PageRange::try_from_frames(0, above.pages.end_frame())?;
    around.then_some(Stretch { pages, ..below })
}

/// What two holes leave of a range, ascending; the holes do not overlap.
fn without_both(pages: PageRange, [one, other]: [PageRange; 2]) -> [PageRange; 3] {
    let (first, second) = if one.start_frame() <= other.start_frame() {
        (one, other)
    } else {
        (other, one)
    };
    let (below, rest) = pages.without(first);
    if rest.is_empty() {
        // The first hole is above, or reaches the end: the second may still cut what is below.
        let (below, above) = below.without(second);
        return [below, above, PageRange::EMPTY];
    }
    let (middle, above) = rest.without(second);
    [below, middle, above]
}

fn entry(pages: PageRange, kind: EntryKind) -> MemoryMapEntry {
    MemoryMapEntry::new(pages.start_frame(), pages.pages(), kind)
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocols::addr::Gpa;
    use std::vec::Vec;

    fn pages(start: u64, end: u64) -> PageRange {
        PageRange::try_from_frames(start, end).unwrap()
    }

    fn host_map(entries: &[(u64, u64, EntryKind)]) -> HostMap {
        let list = entries
            .iter()
            .map(|&(start, end, kind)| entry(pages(start, end), kind))
            .chain([entry(PageRange::EMPTY, EntryKind::MEMORY)]);
        HostMap::check(list, Gpa::new(1 << 46), pages(0x8000, 0x8400)).unwrap()
    }

    fn shown(map: &HostMap, hidden: [PageRange; 2]) -> Vec<(u64, u64)> {
        guest_memory_map(map, hidden)
            .unwrap()
            .iter()
            .take_while(|entry| entry.page_count != 0)
            .map(|entry| (entry.page_start, entry.page_start + entry.page_count))
            .collect()
    }

    #[test]
    fn region_and_carve_out_are_left_out() {
        let map = host_map(&[
            (0, 0x7_8000, EntryKind::MEMORY),
            (0x10_0000, 0x18_0000, EntryKind::MEMORY),
        ]);
        assert_eq!(
            shown(&map, [pages(0x8000, 0x8400), pages(0x17_fe00, 0x18_0000)]),
            [(0, 0x8000), (0x8400, 0x7_8000), (0x10_0000, 0x17_fe00)]
        );
        assert_eq!(
            shown(&map, [pages(0x8000, 0x8400), pages(0x7_7e00, 0x7_8000)]),
            [(0, 0x8000), (0x8400, 0x7_7e00), (0x10_0000, 0x18_0000)]
        );
        // The order of the holes does not matter.
        assert_eq!(
            shown(&map, [pages(0x7_7000, 0x7_7200), pages(0x8000, 0x8400)]),
            [
                (0, 0x8000),
                (0x8400, 0x7_7000),
                (0x7_7200, 0x7_8000),
                (0x10_0000, 0x18_0000)
            ]
        );
    }

    #[test]
    fn the_hole_below_1_mib_is_not_shown() {
        let map = host_map(&[
            (0, 0xA0, EntryKind::MEMORY),
            (0x100, 0x7_8000, EntryKind::MEMORY),
            (0x10_0000, 0x18_0000, EntryKind::MEMORY),
        ]);
        assert_eq!(
            shown(&map, [pages(0x8000, 0x8400), PageRange::EMPTY]),
            [(0, 0x8000), (0x8400, 0x7_8000), (0x10_0000, 0x18_0000)]
        );
        let map = host_map(&[
            (0, 0xA1, EntryKind::MEMORY),
            (0x100, 0x7_8000, EntryKind::MEMORY),
        ]);
        assert_eq!(
            shown(&map, [pages(0x8000, 0x8400), PageRange::EMPTY]),
            [(0, 0xA1), (0x100, 0x8000), (0x8400, 0x7_8000)]
        );
    }

    #[test]
    fn kinds_are_kept_and_strange_ones_dropped() {
        let map = host_map(&[
            (0, 0x9000, EntryKind::MEMORY),
            (0x9000, 0x9001, EntryKind::PLATFORM_RESERVED),
            (0x9001, 0x9002, EntryKind(77)),
        ]);
        let entries = guest_memory_map(&map, [pages(0x8000, 0x8400), PageRange::EMPTY]).unwrap();
        assert_eq!(entries[2].kind, EntryKind::PLATFORM_RESERVED);
        assert_eq!(entries[3].page_count, 0);
    }

    #[test]
    fn too_many_pieces_are_refused() {
        let list: Vec<_> = (0..8)
            .map(|i| (0x1_0000 * i, 0x1_0000 * i + 0x9000, EntryKind::MEMORY))
            .collect();
        let map = host_map(&list);
        let result = guest_memory_map(&map, [pages(0x8000, 0x8400), PageRange::EMPTY]);
        assert_eq!(result.err(), Some(TurnstileReason::MAP_TOO_MANY));
    }
}
