//! The host's memory map, checked.
//!
//! The host writes the map into a parameter area; nothing in it can be trusted. [`HostMap`]
//! exists only after all of this held:
//!
//! - the list ends with an empty entry inside its area and has at most
//!   [`HostMap::MAX_ENTRIES`] entries before it;
//! - entries are sorted, do not overlap, do not wrap and end below the address limit;
//! - there is memory, and the paravisor's region lies inside one entry of memory.
//!
//! A wrong map can still be a lie about what memory exists. That costs the host the guest:
//! a page that is not there cannot be validated.

use protocols::addr::{Gpa, PAGE_SIZE};
use protocols::igvm_map::{EntryKind, MemoryMapEntry};
use protocols::terminate::TurnstileReason;

use crate::memory::layout::PageRange;

/// One stretch of the host's map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Its pages; never empty.
    pub pages: PageRange,
    /// What the host says is there; unknown kinds are possible.
    pub kind: EntryKind,
}

impl Stretch {
    /// Whether the host calls it ordinary memory.
    #[must_use]
    pub fn is_memory(&self) -> bool {
        self.kind == EntryKind::MEMORY
    }
}

/// A memory map that passed every check of this module.
#[derive(Debug)]
pub struct HostMap {
    stretches: [Stretch; Self::MAX_ENTRIES],
    count: usize,
}

impl HostMap {
    /// How many entries a map may have. Real hosts give fewer than ten.
    pub const MAX_ENTRIES: usize = 64;

    /// Checks the raw list. `limit` is the first address that no memory may reach (the C-bit),
    /// `own` the paravisor's region.
    ///
    /// # Errors
    ///
    /// The reason to terminate with; each is the host's fault.
    pub fn check(
        raw: impl IntoIterator<Item = MemoryMapEntry>,
        limit: Gpa,
        own: PageRange,
    ) -> Result<Self, TurnstileReason> {
        let nothing = Stretch {
            pages: PageRange::EMPTY,
            kind: EntryKind::MEMORY,
        };
        let mut map = Self {
            stretches: [nothing; Self::MAX_ENTRIES],
            count: 0,
        };
        let mut ended = false;
        for entry in raw {
            if entry.is_end() {
                ended = true;
                break;
            }
            let stretch = check_entry(&entry, map.stretches().last(), limit)?;
            let slot = map
                .stretches
                .get_mut(map.count)
                .ok_or(TurnstileReason::MAP_TOO_MANY)?;
            *slot = stretch;
            map.count += 1;
        }
        if !ended {
            return Err(TurnstileReason::MAP_TOO_MANY);
        }
        if map.memory().next().is_none() {
            return Err(TurnstileReason::MAP_EMPTY);
        }
        if !map.memory().any(|memory| memory.contains(own)) {
            return Err(TurnstileReason::MAP_OWN_MISSING);
        }
        Ok(map)
    }

    /// All entries, ascending.
    #[must_use]
    pub fn stretches(&self) -> &[Stretch] {
        self.stretches.get(..self.count).unwrap_or_default()
    }

    /// The entries that are memory, ascending.
    pub fn memory(&self) -> impl DoubleEndedIterator<Item = PageRange> + '_ {
        self.stretches()
            .iter()
            .filter(|stretch| stretch.is_memory())
            .map(|stretch| stretch.pages)
    }
}

/// Checks one entry against its predecessor and the address limit.
fn check_entry(
    entry: &MemoryMapEntry,
    previous: Option<&Stretch>,
    limit: Gpa,
) -> Result<Stretch, TurnstileReason> {
    let end = entry
        .page_start
        .checked_add(entry.page_count)
        .filter(|&end| end <= limit.get() / PAGE_SIZE)
        .ok_or(TurnstileReason::MAP_WRAP)?;
    if let Some(previous) = previous {
        if entry.page_start < previous.pages.start_frame() {
            return Err(TurnstileReason::MAP_UNSORTED);
        }
        if entry.page_start < previous.pages.end_frame() {
            return Err(TurnstileReason::MAP_OVERLAP);
        }
    }
    let pages =
        PageRange::try_from_frames(entry.page_start, end).ok_or(TurnstileReason::MAP_WRAP)?;
    Ok(Stretch {
        pages,
        kind: entry.kind,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Gpa = Gpa::new(1 << 46);

    fn own() -> PageRange {
        PageRange::try_from_frames(0x8000, 0x8400).unwrap()
    }

    fn entry(page_start: u64, page_count: u64) -> MemoryMapEntry {
        MemoryMapEntry::new(page_start, page_count, EntryKind::MEMORY)
    }

    fn check(entries: &[MemoryMapEntry]) -> Result<HostMap, TurnstileReason> {
        HostMap::check(entries.iter().copied().chain([entry(0, 0)]), LIMIT, own())
    }

    fn refusal(entries: &[MemoryMapEntry]) -> TurnstileReason {
        check(entries).unwrap_err()
    }

    #[test]
    fn an_ordinary_map_passes() {
        let mut reserved = entry(0xfee00, 1);
        reserved.kind = EntryKind::PLATFORM_RESERVED;
        let map = check(&[entry(0, 0x7c000), reserved, entry(0x10_0000, 0x8_0000)]).unwrap();
        assert_eq!(map.stretches().len(), 3);
        assert_eq!(map.memory().count(), 2);
        assert_eq!(map.memory().next_back().unwrap().end_frame(), 0x18_0000);
    }

    #[test]
    fn neighbours_may_touch() {
        assert!(check(&[entry(0, 0x8400), entry(0x8400, 1)]).is_ok());
    }

    #[test]
    fn every_lie_has_its_reason() {
        assert_eq!(refusal(&[]), TurnstileReason::MAP_EMPTY);
        assert_eq!(
            refusal(&[entry(0, 0x9000), entry(0x8fff, 1)]),
            TurnstileReason::MAP_OVERLAP
        );
        assert_eq!(
            refusal(&[entry(5, 0x9000), entry(4, 1)]),
            TurnstileReason::MAP_UNSORTED
        );
        assert_eq!(refusal(&[entry(1, u64::MAX)]), TurnstileReason::MAP_WRAP);
        assert_eq!(refusal(&[entry(u64::MAX, 1)]), TurnstileReason::MAP_WRAP);
        assert_eq!(
            refusal(&[entry(0, (1 << 34) + 1)]),
            TurnstileReason::MAP_WRAP
        );
    }

    #[test]
    fn the_region_has_to_be_memory_as_a_whole() {
        assert_eq!(
            refusal(&[entry(0, 0x8000)]),
            TurnstileReason::MAP_OWN_MISSING
        );
        assert_eq!(
            refusal(&[entry(0, 0x83ff)]),
            TurnstileReason::MAP_OWN_MISSING
        );
        assert_eq!(
            refusal(&[entry(0x8001, 0x9000)]),
            TurnstileReason::MAP_OWN_MISSING
        );
        let mut reserved = entry(0x8000, 0x400);
        reserved.kind = EntryKind::PLATFORM_RESERVED;
        assert_eq!(
            refusal(&[entry(0, 0x8000), reserved, entry(0x8400, 1)]),
            TurnstileReason::MAP_OWN_MISSING
        );
        // Half in one entry and half in the next is refused too: the region is one piece.
        assert_eq!(
            refusal(&[entry(0, 0x8200), entry(0x8200, 0x1000)]),
            TurnstileReason::MAP_OWN_MISSING
        );
    }

    #[test]
    fn a_list_without_an_end_is_refused() {
        let result = HostMap::check([entry(0, 0x9000)], LIMIT, own());
        assert_eq!(result.unwrap_err(), TurnstileReason::MAP_TOO_MANY);
        let many = (0..=HostMap::MAX_ENTRIES as u64).map(|i| entry(0x9000 * i, 0x9000));
        let result = HostMap::check(many.chain([entry(0, 0)]), LIMIT, own());
        assert_eq!(result.unwrap_err(), TurnstileReason::MAP_TOO_MANY);
    }
}
