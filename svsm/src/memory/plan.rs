//! Which memory gets a state, and where the paravisor's tables lie.
//!
//! ```text
//! 0          region                         carve-out        4 GiB - n    4 GiB
//! |--- RAM ---|---image, pool---|GHCBs|--- RAM ---|############| hole |firmware|--- RAM ---
//! ```
//!
//! Every page of memory and of the firmware's window has a state, except the pages at the end
//! of the region that hold GHCBs: those are shared with the host for ever and never validated,
//! so no request may name them. They are a hole between two ranges of the map.
//!
//! The carve-out holds what grows with the machine: the map, the tables of the guest window, the
//! locks, the vCPUs. It is made of whole 2 MiB pages at the top of the highest memory that has
//! room.

use accept::GivenBack;
use protocols::addr::{LARGE_PAGE_SIZE, PAGE_SIZE, PAGES_PER_LARGE_PAGE};
use protocols::map::{BYTES_PER_REGION, MapDescriptor};
use protocols::terminate::TurnstileReason;

use super::layout::PageRange;
use crate::host_map::HostMap;

/// Bytes shown by one page of second-level tables.
const GIB: u64 = 1 << 30;

// The referee reads the engine's own words: both crates must mean the same bits by them.
const _: () = {
    use accept::PageState as Kept;
    use protocols::map::PageState as Shown;
    assert!(Kept::Unaccepted as u64 == Shown::Unaccepted as u64);
    assert!(Kept::Ahead as u64 == Shown::Ahead as u64);
    assert!(Kept::Accepted as u64 == Shown::Accepted as u64);
    assert!(Kept::Owned as u64 == Shown::Owned as u64);
    assert!(cfg!(loom) || size_of::<accept::Region>() as u64 == BYTES_PER_REGION);
};

/// Where the carve-out may lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CarveOut {
    /// At the top of the highest memory that has room.
    Highest,
    /// At the top of the memory around the region: for a firmware that takes no map from us. The
    /// host ends that memory, as far as the firmware can see, at the region.
    WithRegion,
}

/// Where everything goes.
#[derive(Debug)]
pub struct Plan {
    ranges: [PageRange; MapDescriptor::MAX_RANGES],
    range_count: usize,
    /// The pages that will hold GHCBs, one per processor, at the end of the region.
    pub ghcbs: PageRange,
    /// The paravisor's memory at the top.
    pub carve_out: PageRange,
}

impl Plan {
    /// Makes the plan. `others` is how many bytes of the carve-out are needed for what does not
    /// depend on the size of memory.
    ///
    /// # Errors
    ///
    /// [`TurnstileReason::MAP_TOO_MANY`] if memory is in more pieces than the map has room for,
    /// [`TurnstileReason::FIRMWARE`] if the firmware's window overlaps memory,
    /// [`TurnstileReason::OUT_OF_MEMORY`] if no piece has room for the carve-out.
    pub fn make(
        host_map: &HostMap,
        region: PageRange,
        ghcbs: PageRange,
        firmware: PageRange,
        others: u64,
        place: CarveOut,
    ) -> Result<Self, TurnstileReason> {
        let mut plan = Self {
            ranges: [PageRange::EMPTY; MapDescriptor::MAX_RANGES],
            range_count: 0,
            ghcbs,
            carve_out: PageRange::EMPTY,
        };
        let mut firmware_left = Some(firmware);
        for memory in host_map.memory() {
            if memory.overlaps(firmware) {
                return Err(TurnstileReason::FIRMWARE);
            }
            if memory.start() > firmware.start()
                && let Some(firmware) = firmware_left.take()
            {
                plan.push(firmware)?;
            }
            let (below, above) = memory.without(ghcbs);
            plan.push(below)?;
            plan.push(above)?;
        }
        if let Some(firmware) = firmware_left {
            plan.push(firmware)?;
        }
        let bytes = others + plan.bytes_for_memory(host_map);
        plan.carve_out = host_map
            .memory()
            .rev()
            .filter(|memory| place == CarveOut::Highest || memory.contains(region))
            .filter_map(|memory| memory.large_pages_at_end(bytes))
            .find(|carve_out| !carve_out.overlaps(region))
            .ok_or(TurnstileReason::OUT_OF_MEMORY)?;
        Ok(plan)
    }

    fn push(&mut self, range: PageRange) -> Result<(), TurnstileReason> {
        if range.is_empty() {
            return Ok(());
        }
        let slot = self
            .ranges
            .get_mut(self.range_count)
            .ok_or(TurnstileReason::MAP_TOO_MANY)?;
        *slot = range;
        self.range_count += 1;
        Ok(())
    }

    /// The ranges that have states, ascending.
    #[must_use]
    pub fn ranges(&self) -> &[PageRange] {
        self.ranges.get(..self.range_count).unwrap_or_default()
    }

    /// The ranges in groups that share 2 MiB regions: RAM below and above a small hole. The states
    /// of a group are contiguous, so that it can be shown as one stretch.
    pub fn groups(&self) -> impl Iterator<Item = (PageRange, &[PageRange])> {
        let shares =
            |below: &PageRange, above: &PageRange| outward(*below).overlaps(outward(*above));
        self.ranges()
            .chunk_by(shares)
            .map(|group| (outward_all(group.iter().copied()), group))
    }

    /// Whether all pages have a state and are the guest's to use: not the paravisor's.
    #[must_use]
    pub fn is_guest_memory(&self, pages: PageRange, region: PageRange) -> bool {
        !pages.is_empty()
            && self.ranges().iter().any(|range| range.contains(pages))
            && !pages.overlaps(region)
            && !pages.overlaps(self.carve_out)
    }

    /// Bytes of states, of the memory of what was given back, and of page tables for the guest
    /// window.
    fn bytes_for_memory(&self, host_map: &HostMap) -> u64 {
        let states: u64 = self
            .ranges()
            .iter()
            .map(|range| regions_touched(*range))
            .sum();
        let flags: usize = self
            .ranges()
            .iter()
            .map(|range| GivenBack::needed(regions_touched(*range) as usize))
            .sum();
        let tables: u64 = self
            .ranges()
            .iter()
            .map(|range| touched(*range, GIB) + touched(*range, GIB << 9))
            .sum();
        // One more directory for the root entry, one table for each entry of the host's map
        // that begins in the middle of a table already counted.
        let spare = 2 + host_map.stretches().len() as u64;
        let flags = (flags * size_of::<GivenBack>()) as u64;
        states * BYTES_PER_REGION + flags + (tables + spare) * PAGE_SIZE
    }
}

/// How many 2 MiB regions a range touches: how many records its states need.
#[must_use]
pub fn regions_touched(range: PageRange) -> u64 {
    touched(range, LARGE_PAGE_SIZE)
}

/// How many naturally aligned units of `unit` bytes a range touches.
fn touched(range: PageRange, unit: u64) -> u64 {
    if range.is_empty() {
        return 0;
    }
    (range.end().get() - 1) / unit - range.start().get() / unit + 1
}

/// The range rounded outward to whole 2 MiB regions.
#[must_use]
pub fn outward(range: PageRange) -> PageRange {
    let region = PAGES_PER_LARGE_PAGE;
    let start = range.start_frame() / region * region;
    PageRange::try_from_frames(start, start + regions_touched(range) * region)
        .unwrap_or(PageRange::EMPTY)
}

/// From the start of the first to the end of the last of ascending ranges, rounded outward.
fn outward_all(mut ranges: impl DoubleEndedIterator<Item = PageRange> + Clone) -> PageRange {
    let (first, last) = (ranges.next(), ranges.next_back());
    let start = first.map_or(0, |range| outward(range).start_frame());
    let end = last.or(first).map_or(0, |range| outward(range).end_frame());
    PageRange::try_from_frames(start, end).unwrap_or(PageRange::EMPTY)
}

/// How many regions lie between the start of `outer`, which is rounded outward, and that of
/// `range` inside it.
#[must_use]
pub fn regions_before(outer: PageRange, range: PageRange) -> u64 {
    (outward(range).start_frame() - outer.start_frame()) / PAGES_PER_LARGE_PAGE
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocols::addr::Gpa;
    use protocols::igvm_map::{EntryKind, MemoryMapEntry};

    const MIB: u64 = 256; // in pages

    fn pages(start: u64, end: u64) -> PageRange {
        PageRange::try_from_frames(start, end).unwrap()
    }

    fn region() -> PageRange {
        pages(128 * MIB, 132 * MIB)
    }

    fn ghcbs() -> PageRange {
        pages(132 * MIB - 4, 132 * MIB)
    }

    fn firmware() -> PageRange {
        pages(4092 * MIB, 4096 * MIB)
    }

    fn host_map(entries: &[(u64, u64)]) -> HostMap {
        let entry = |(page_start, end)| {
            MemoryMapEntry::new(page_start, end - page_start, EntryKind::MEMORY)
        };
        let list = entries.iter().copied().chain([(0, 0)]).map(entry);
        HostMap::check(list, Gpa::new(1 << 46), region()).unwrap()
    }

    fn plan(entries: &[(u64, u64)]) -> Result<Plan, TurnstileReason> {
        plan_with(entries, CarveOut::Highest)
    }

    fn plan_with(entries: &[(u64, u64)], place: CarveOut) -> Result<Plan, TurnstileReason> {
        let map = host_map(entries);
        Plan::make(&map, region(), ghcbs(), firmware(), 100 << 10, place)
    }

    #[test]
    fn a_machine_with_high_memory_is_carved_at_its_top() {
        let plan = plan(&[(0, 1952 * MIB), (4096 * MIB, 6144 * MIB)]).unwrap();
        assert_eq!(
            plan.ranges(),
            [
                pages(0, 132 * MIB - 4),
                pages(132 * MIB, 1952 * MIB),
                firmware(),
                pages(4096 * MIB, 6144 * MIB)
            ]
        );
        assert_eq!(plan.carve_out, pages(6142 * MIB, 6144 * MIB));
    }

    #[test]
    fn with_a_firmware_that_takes_no_map_nothing_is_carved_above_4_gib() {
        let memory = [(0, 1952 * MIB), (4096 * MIB, 6144 * MIB)];
        let plan = plan_with(&memory, CarveOut::WithRegion).unwrap();
        assert_eq!(plan.carve_out.end_frame(), 1952 * MIB);
        assert!(!plan.carve_out.overlaps(region()));
    }

    #[test]
    fn a_small_machine_is_carved_at_the_top_of_low_memory() {
        let plan = plan(&[(0, 500 * MIB)]).unwrap();
        assert_eq!(plan.carve_out, pages(498 * MIB, 500 * MIB));
        assert_eq!(plan.ranges().last(), Some(&firmware()));
    }

    #[test]
    fn the_paravisors_memory_is_not_the_guests() {
        let plan = plan(&[(0, 500 * MIB)]).unwrap();
        assert!(plan.is_guest_memory(pages(0x800, 0x900), region()));
        assert!(!plan.is_guest_memory(pages(0x800, 0x800), region()));
        assert!(!plan.is_guest_memory(pages(128 * MIB - 1, 128 * MIB + 1), region()));
        assert!(!plan.is_guest_memory(pages(499 * MIB, 499 * MIB + 1), region()));
        assert!(!plan.is_guest_memory(pages(499 * MIB, 501 * MIB), region()));
        assert!(!plan.is_guest_memory(pages(600 * MIB, 601 * MIB), region()));
    }

    #[test]
    fn the_map_costs_at_most_64_kib_per_gib() {
        let map = host_map(&[(0, 1952 * MIB), (4096 * MIB, 4096 * MIB + (64 << 18))]);
        let plan = Plan::make(&map, region(), ghcbs(), firmware(), 0, CarveOut::Highest).unwrap();
        let states: u64 = plan
            .ranges()
            .iter()
            .map(|range| regions_touched(*range) * BYTES_PER_REGION)
            .sum();
        assert!(states <= 66 * (64 << 10));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert_eq!(
            plan(&[(0, 5000 * MIB)]).err(),
            Some(TurnstileReason::FIRMWARE)
        );
        assert_eq!(
            plan(&[(128 * MIB, 132 * MIB)]).err(),
            Some(TurnstileReason::OUT_OF_MEMORY)
        );
        let pieces: std::vec::Vec<_> = (0..16)
            .map(|i| ((100 + 50 * i) * MIB, (149 + 50 * i) * MIB))
            .collect();
        assert_eq!(plan(&pieces).err(), Some(TurnstileReason::MAP_TOO_MANY));
    }

    #[test]
    fn outward_rounding_covers_the_range() {
        assert_eq!(outward(pages(513, 514)), pages(512, 1024));
        assert_eq!(outward(pages(511, 513)), pages(0, 1024));
    }

    #[test]
    fn memory_around_a_small_hole_shares_a_region() {
        let plan = plan(&[(0, 0xA0), (0x100, 1952 * MIB), (4096 * MIB, 4200 * MIB)]).unwrap();
        let groups: std::vec::Vec<_> = plan.groups().collect();
        assert_eq!(groups[0].0, pages(0, 132 * MIB));
        assert_eq!(groups[0].1, [pages(0, 0xA0), pages(0x100, 132 * MIB - 4)]);
        assert_eq!(regions_before(groups[0].0, pages(0x100, 132 * MIB - 4)), 0);
        assert_eq!(groups[1].0, pages(132 * MIB, 1952 * MIB));
        assert_eq!(groups.len(), 4);
    }
}
