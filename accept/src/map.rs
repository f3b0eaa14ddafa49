//! Which memory has a state: ranges of guest physical memory and the regions that describe them.
//!
//! Invariants:
//! * Ranges are sorted, do not overlap and do not wrap.
//! * A range has exactly one [`Region`] for each 2 MiB that it touches; the first and the last may
//!   stick out of the range, and their pages outside it are never looked up.
//!
//! Two ranges may share a 2 MiB region of address space (RAM below and above a hole). Whether they
//! share its state words too is the caller's choice: their pages in it are different ones, and both
//! have one lock, because locks are chosen by address.

use crate::block::{Block, Frame, PAGES_PER_REGION};
use crate::given_back::{Flag, GivenBack};
use crate::pages::{Region, RegionWords};

/// A contiguous piece of guest memory and the states of its pages.
#[derive(Clone, Copy)]
pub struct Range<'m> {
    first: Frame,
    last: Frame,
    regions: &'m [Region],
    given_back: &'m [GivenBack],
}

/// Why [`Range::try_new`] refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadRange {
    /// No page at all.
    Empty,
    /// The range leaves the address space.
    Wraps,
    /// Not one region per 2 MiB.
    Regions {
        /// The number of regions that the range needs.
        needed: u64,
        /// The number that was given.
        given: usize,
    },
    /// Not one flag per region.
    Flags {
        /// The number of [`GivenBack`] that the range needs.
        needed: usize,
        /// The number that was given.
        given: usize,
    },
}

impl<'m> Range<'m> {
    /// A range of `pages` pages from `first`, whose states are kept in `regions`.
    ///
    /// # Errors
    /// [`BadRange`], when the range is empty, leaves the address space, or when the number of
    /// regions is not [`Range::regions_needed`].
    pub fn try_new(first: Frame, pages: u64, regions: &'m [Region]) -> Result<Self, BadRange> {
        let more = pages.checked_sub(1).ok_or(BadRange::Empty)?;
        let last = first.checked_add(more).ok_or(BadRange::Wraps)?;
        let needed = last.region_number() - first.region_number() + 1;
        if usize::try_from(needed) != Ok(regions.len()) {
            return Err(BadRange::Regions {
                needed,
                given: regions.len(),
            });
        }
        Ok(Self {
            first,
            last,
            regions,
            given_back: &[],
        })
    }

    /// The same range with a memory of what the guest gave back, which is what acceptance ahead of
    /// the guest needs: a range without it is accepted on request only.
    ///
    /// # Errors
    /// [`BadRange::Flags`] unless `flags` are [`GivenBack::needed`] for the range's regions.
    pub fn with_given_back(mut self, flags: &'m [GivenBack]) -> Result<Self, BadRange> {
        let needed = GivenBack::needed(self.regions.len());
        if flags.len() != needed {
            return Err(BadRange::Flags {
                needed,
                given: flags.len(),
            });
        }
        self.given_back = flags;
        Ok(self)
    }

    /// How many regions a range of `pages` pages from `first` needs, or `None` when there is no
    /// such range.
    #[must_use]
    pub fn regions_needed(first: Frame, pages: u64) -> Option<u64> {
        let last = first.checked_add(pages.checked_sub(1)?)?;
        Some(last.region_number() - first.region_number() + 1)
    }

    /// The first frame.
    #[must_use]
    pub const fn first(&self) -> Frame {
        self.first
    }

    /// The last frame.
    #[must_use]
    pub const fn last(&self) -> Frame {
        self.last
    }

    /// The number of pages.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.last.number() - self.first.number() + 1
    }

    /// The states, for whoever publishes them; the first region is the one around
    /// [`Range::first`].
    #[must_use]
    pub const fn regions(&self) -> &'m [Region] {
        self.regions
    }

    /// Whether all of `block` is in the range.
    #[inline]
    pub(crate) fn contains_block(&self, block: Block) -> bool {
        self.contains(block.first()) && self.contains(block.last())
    }

    /// Whether `frame` is in the range.
    #[inline]
    fn contains(&self, frame: Frame) -> bool {
        self.first <= frame && frame <= self.last
    }
}

/// What is kept of one region.
pub(crate) struct Place<'m> {
    pub(crate) words: &'m RegionWords,
    /// The range, and the region's place in it.
    pub(crate) range: &'m Range<'m>,
    index: usize,
}

impl<'m> Place<'m> {
    /// Whether the guest gave back a page of it; none where nobody wants to know. Found when it is
    /// wanted, for most requests do not.
    pub(crate) fn given_back(&self) -> Option<Flag<'m>> {
        GivenBack::flag(self.range.given_back, self.index)
    }
}

/// All memory that has a state.
#[derive(Clone, Copy)]
pub struct Map<'m> {
    ranges: &'m [Range<'m>],
}

/// Why [`Map::try_new`] refused: the range with this index does not lie above the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadMap {
    /// Index of the offending range.
    pub index: usize,
}

impl<'m> Map<'m> {
    /// A map of `ranges`, which must be sorted and must not overlap.
    ///
    /// # Errors
    /// [`BadMap`] with the index of the first range out of order.
    pub fn try_new(ranges: &'m [Range<'m>]) -> Result<Self, BadMap> {
        for (index, pair) in ranges.windows(2).enumerate() {
            if let [below, above] = pair
                && above.first <= below.last
            {
                return Err(BadMap { index: index + 1 });
            }
        }
        Ok(Self { ranges })
    }

    /// The ranges, ascending.
    #[must_use]
    pub const fn ranges(&self) -> &'m [Range<'m>] {
        self.ranges
    }

    /// The state words around `block`, or `None` unless the whole block lies in one range.
    pub(crate) fn find(&self, block: Block) -> Option<&'m RegionWords> {
        self.place(block).map(|place| place.words)
    }

    /// All that is kept of the region around `block`, or `None` unless the whole block lies in one
    /// range.
    #[inline]
    pub(crate) fn place(&self, block: Block) -> Option<Place<'m>> {
        // A handful of ranges: walking them is cheaper than anything cleverer.
        let range = self
            .ranges
            .iter()
            .find(|range| range.contains(block.first()))?;
        if !range.contains_block(block) {
            return None;
        }
        let index = block.first().region_number() - range.first.region_number();
        let index = usize::try_from(index).ok()?;
        Some(Place {
            words: range.regions.get(index)?.words(),
            range,
            index,
        })
    }

    /// Splits `pages` pages from `first` at region boundaries and calls `visit` with the state
    /// words, the first frame, and the indices within the region, of each piece.
    ///
    /// Returns `false`, before any visit, unless all pages lie in one range.
    pub(crate) fn for_each_piece(
        &self,
        first: Frame,
        pages: u64,
        mut visit: impl FnMut(&'m RegionWords, Frame, core::ops::Range<usize>),
    ) -> bool {
        let Some(last) = pages
            .checked_sub(1)
            .and_then(|more| first.checked_add(more))
        else {
            return false;
        };
        let Some(range) = self
            .ranges
            .iter()
            .find(|r| r.contains(first) && r.contains(last))
        else {
            return false;
        };
        let skipped = first.region_number() - range.first.region_number();
        let touched = last.region_number() - first.region_number() + 1;
        let regions = range.regions.iter().zip(range.first.region_number()..);
        for (region, number) in regions.skip(skipped as usize).take(touched as usize) {
            let from = if number == first.region_number() {
                first.index_in_region()
            } else {
                0
            };
            let to = if number == last.region_number() {
                last.index_in_region() + 1
            } else {
                PAGES_PER_REGION
            };
            let Some(start) = Frame::try_new(number * PAGES_PER_REGION as u64) else {
                return false;
            };
            visit(region.words(), start.at_index(from), from..to);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::PageSize;

    fn frame(gpa: u64) -> Frame {
        Frame::starting_at(gpa).expect("aligned")
    }

    #[test]
    fn a_range_needs_one_region_per_2_mib_touched() {
        let regions = [const { Region::new() }; 3];
        assert_eq!(Range::regions_needed(frame(0x1f_f000), 2), Some(2));
        assert!(Range::try_new(frame(0x1f_f000), 2, &regions[..2]).is_ok());
        assert_eq!(
            Range::try_new(frame(0x1f_f000), 2, &regions).err(),
            Some(BadRange::Regions {
                needed: 2,
                given: 3
            })
        );
        assert_eq!(
            Range::try_new(frame(0), 0, &regions).err(),
            Some(BadRange::Empty)
        );
        assert_eq!(
            Range::try_new(Frame::containing(u64::MAX), 2, &regions).err(),
            Some(BadRange::Wraps)
        );
        assert_eq!(Range::regions_needed(frame(0x1000), u64::MAX), None);
        // Away from address 0 numbers and differences of regions are not the same.
        let range = Range::try_new(frame(0x5f_f000), 0x202, &regions).expect("good");
        assert_eq!(Range::regions_needed(range.first(), range.pages()), Some(3));
        assert_eq!(range.pages(), 0x202);
        assert_eq!(range.last(), frame(0x80_0000));
    }

    #[test]
    fn a_range_takes_one_flag_per_region() {
        let regions = [const { Region::new() }; 65];
        let flags = [const { GivenBack::new() }; 2];
        let range = Range::try_new(frame(0), 65 * 512, &regions).expect("good");
        assert!(range.with_given_back(&flags).is_ok());
        assert_eq!(
            range.with_given_back(&flags[..1]).err(),
            Some(BadRange::Flags {
                needed: 2,
                given: 1
            })
        );
    }

    #[test]
    fn ranges_must_be_sorted_and_apart() {
        let regions = [const { Region::new() }; 1];
        let low = Range::try_new(frame(0), 16, &regions).expect("good");
        let high = Range::try_new(frame(0x10_000), 16, &regions).expect("good");
        assert!(Map::try_new(&[low, high]).is_ok());
        assert_eq!(Map::try_new(&[high, low]).err(), Some(BadMap { index: 1 }));
        assert_eq!(Map::try_new(&[low, low]).err(), Some(BadMap { index: 1 }));
        assert!(Map::try_new(&[]).is_ok());
    }

    #[test]
    fn a_block_is_found_only_if_it_lies_within_one_range() {
        let (low, high) = ([const { Region::new() }; 1], [const { Region::new() }; 2]);
        // A hole from 640 KiB to 1 MiB, and an end in the middle of a region.
        let ranges = [
            Range::try_new(frame(0), 0xa0, &low).expect("good"),
            Range::try_new(frame(0x10_0000), 0x200, &high).expect("good"),
        ];
        let map = Map::try_new(&ranges).expect("good");
        let found = |gpa, size| {
            map.find(Block::try_new(frame(gpa), size).expect("aligned"))
                .map(core::ptr::from_ref)
        };
        assert_eq!(
            found(0x9_f000, PageSize::Size4K),
            Some(core::ptr::from_ref(low[0].words()))
        );
        assert_eq!(found(0xa_0000, PageSize::Size4K), None);
        assert_eq!(
            found(0x10_0000, PageSize::Size4K),
            Some(core::ptr::from_ref(high[0].words()))
        );
        assert_eq!(
            found(0x2f_f000, PageSize::Size4K),
            Some(core::ptr::from_ref(high[1].words()))
        );
        assert_eq!(found(0x30_0000, PageSize::Size4K), None);
        assert_eq!(found(0, PageSize::Size2M), None, "spans a hole");
        assert_eq!(
            found(0x20_0000, PageSize::Size2M),
            None,
            "sticks out at the end"
        );
        assert_eq!(found(0xffff_ffff_ffe0_0000, PageSize::Size2M), None);
    }

    #[test]
    fn regions_are_counted_from_where_the_range_begins() {
        let regions = [const { Region::new() }; 3];
        let ranges = [Range::try_new(frame(0x5f_f000), 0x202, &regions).expect("good")];
        let map = Map::try_new(&ranges).expect("good");
        for (index, gpa) in [0x5f_f000, 0x60_0000, 0x80_0000].into_iter().enumerate() {
            let found = map.find(Block::page(frame(gpa))).expect("inside");
            assert!(core::ptr::eq(found, regions[index].words()), "{gpa:#x}");
        }
        let mut pieces = Vec::new();
        assert!(
            map.for_each_piece(frame(0x7f_f000), 2, |words, f, i| pieces.push((
                core::ptr::from_ref(words),
                f.gpa(),
                i
            )))
        );
        let [_, middle, last] = regions.each_ref().map(|r| core::ptr::from_ref(r.words()));
        assert_eq!(
            pieces,
            [(middle, 0x7f_f000, 511..512), (last, 0x80_0000, 0..1)]
        );
    }

    #[test]
    fn pieces_cover_exactly_the_pages_asked_for() {
        let regions = [const { Region::new() }; 4];
        let ranges = [Range::try_new(frame(0x10_0000), 0x600, &regions).expect("good")];
        let map = Map::try_new(&ranges).expect("good");
        let mut pieces = Vec::new();
        assert!(map.for_each_piece(frame(0x1f_e000), 0x203, |_, f, i| pieces.push((f.gpa(), i))));
        assert_eq!(
            pieces,
            [
                (0x1f_e000, 510..512),
                (0x20_0000, 0..512),
                (0x40_0000, 0..1)
            ]
        );
        assert!(!map.for_each_piece(frame(0xf_f000), 2, |_, _, _| panic!("visited")));
        assert!(!map.for_each_piece(frame(0x10_0000), 0, |_, _, _| panic!("visited")));
        assert!(!map.for_each_piece(frame(0x10_0000), u64::MAX, |_, _, _| panic!("visited")));
    }
}
