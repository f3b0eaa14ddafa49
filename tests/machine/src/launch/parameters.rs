//! The parameter areas: what the host tells the guest, truthfully or not.
//!
//! Parameters are not measured, so a hostile host may write anything. All lies of the
//! settings `map-*` and `vp-count-*` are told here.

use alloc::vec::Vec;
use core::ops::Range;

use protocols::igvm_map::{EntryKind, MemoryMapEntry};
use zerocopy::IntoBytes;

use crate::layout::Layout;
use crate::settings::{Hostile, Settings};
use crate::types::PAGE_SIZE;

/// The guest's RAM as entries of the IGVM format, with the lies of `settings`. `own` is where
/// the image lies, `room` the bytes of the area.
pub fn memory_map(layout: &Layout, own: Range<u64>, room: usize, settings: &Settings) -> Vec<u8> {
    let mut entries: Vec<_> = layout
        .memory()
        .into_iter()
        .map(|range| {
            let (start, bytes) = (range.start, range.end - range.start);
            MemoryMapEntry::new(start / PAGE_SIZE, bytes / PAGE_SIZE, EntryKind::MEMORY)
        })
        .collect();
    for &lie in &settings.hostile {
        tell(lie, &mut entries, &own, room);
    }
    entries.as_bytes().to_vec()
}

/// The number of virtual processors, with the lies of `settings`.
pub fn vp_count(vcpus: u32, settings: &Settings) -> u32 {
    if settings.is_hostile(Hostile::VpCountZero) {
        0
    } else if settings.is_hostile(Hostile::VpCountHuge) {
        u32::MAX
    } else {
        vcpus
    }
}

/// Bends a truthful map. Maps without entries stay as they are.
fn tell(lie: Hostile, entries: &mut Vec<MemoryMapEntry>, own: &Range<u64>, room: usize) {
    let Some(&last) = entries.last() else { return };
    match lie {
        // The last range a second time: same start, other length.
        Hostile::MapOverlap => entries.push(MemoryMapEntry {
            page_count: last.page_count + 1,
            ..last
        }),
        Hostile::MapWrap => {
            if let Some(last) = entries.last_mut() {
                last.page_count = u64::MAX;
            }
        }
        // Backwards, the last page by itself: there may be one range alone.
        Hostile::MapUnsorted => {
            split_last_page(entries);
            entries.reverse();
        }
        Hostile::MapMany => fill_up(entries, room / size_of::<MemoryMapEntry>()),
        Hostile::MapOwnMissing => cut_out(entries, own),
        _ => {}
    }
}

/// Makes the last page of the last range an entry of its own, if that is not all of it.
fn split_last_page(entries: &mut Vec<MemoryMapEntry>) {
    if let Some(last) = entries.last_mut()
        && last.page_count > 1
    {
        last.page_count -= 1;
        let page = MemoryMapEntry {
            page_start: last.page_start + last.page_count,
            page_count: 1,
            ..*last
        };
        entries.push(page);
    }
}

/// Splits the last range page by page until there are `count` entries and no end marker.
fn fill_up(entries: &mut Vec<MemoryMapEntry>, count: usize) {
    while entries.len() < count {
        let Some(last) = entries.last_mut() else {
            return;
        };
        if last.page_count < 2 {
            return;
        }
        let rest = MemoryMapEntry {
            page_start: last.page_start + 1,
            page_count: last.page_count - 1,
            ..*last
        };
        last.page_count = 1;
        entries.push(rest);
    }
}

/// Takes the pages `own` out of every range.
fn cut_out(entries: &mut Vec<MemoryMapEntry>, own: &Range<u64>) {
    let (from, to) = (own.start / PAGE_SIZE, own.end.div_ceil(PAGE_SIZE));
    *entries = entries
        .iter()
        .flat_map(|entry| {
            let start = entry.page_start;
            let end = start + entry.page_count;
            [start..end.min(from), start.max(to)..end]
                .into_iter()
                .filter(|part| part.start < part.end)
                .map(|part| MemoryMapEntry {
                    page_start: part.start,
                    page_count: part.end - part.start,
                    ..*entry
                })
                .collect::<Vec<_>>()
        })
        .collect();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Gpa, Spa};
    use zerocopy::FromBytes;

    const OWN: Range<u64> = 0x800_0000..0x840_0000;
    const ROOM: usize = 16 << 10;

    /// (start, pages) of every entry.
    fn map(settings: &str) -> Vec<(u64, u64)> {
        let ram = [
            (0, 0xA_0000),
            (1 << 32, 0x8000_0000),
            (0x10_0000, 0x6FF0_0000),
        ];
        map_of(&ram, settings)
    }

    fn map_of(ram: &[(u64, u64)], settings: &str) -> Vec<(u64, u64)> {
        let settings = Settings::parse(settings).unwrap();
        let mut layout = Layout::new();
        for &(gpa, bytes) in ram {
            layout.add_ram(Gpa::new(gpa), bytes).unwrap();
        }
        layout
            .add_window(Gpa::new(0xFFC0_0000), 0x40_0000, Spa::new(0x7000_0000))
            .unwrap();
        let bytes = memory_map(&layout, OWN, ROOM, &settings);
        bytes
            .chunks(size_of::<MemoryMapEntry>())
            .map(|bytes| MemoryMapEntry::read_from_bytes(bytes).unwrap())
            .map(|entry| (entry.page_start, entry.page_count))
            .collect()
    }

    const TRUTH: [(u64, u64); 3] = [(0, 0xA0), (0x100, 0x6_FF00), (0x10_0000, 0x8_0000)];

    #[test]
    fn an_honest_host_tells_its_ranges() {
        assert_eq!(map(""), TRUTH);
        assert_eq!(vp_count(3, &Settings::default()), 3);
    }

    #[test]
    fn every_lie_is_the_one_its_name_says() {
        let overlap = map("hostile=map-overlap");
        assert_eq!(overlap[2].0, overlap[3].0);
        let (start, pages) = map("hostile=map-wrap")[2];
        assert!(start.checked_add(pages).is_none());
        assert!(!map("hostile=map-unsorted").is_sorted());
        // One range alone, as trust domains have it, cannot be in a wrong order as it is.
        let single = map_of(&[(0, 0x6000_0000)], "hostile=map-unsorted");
        assert_eq!(single, [(0x5_FFFF, 1), (0, 0x5_FFFF)]);
        let many = map("hostile=map-many");
        assert_eq!(many.len(), ROOM / size_of::<MemoryMapEntry>());
        let pages = |map: &[(u64, u64)]| map.iter().map(|entry| entry.1).sum::<u64>();
        assert_eq!(pages(&many), pages(&TRUTH));
        let missing = map("hostile=map-own-missing");
        assert_eq!(missing.len(), 4);
        assert_eq!(pages(&TRUTH) - pages(&missing), 0x400);
        assert!(
            missing
                .iter()
                .all(|&(start, pages)| start + pages <= 0x8000 || start >= 0x8400)
        );
        let count = |text| vp_count(3, &Settings::parse(text).unwrap());
        assert_eq!(count("hostile=vp-count-zero"), 0);
        assert_eq!(count("hostile=vp-count-huge"), u32::MAX);
    }
}
