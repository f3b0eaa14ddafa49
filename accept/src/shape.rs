//! What a request asks for, by its shape.
//!
//! Nearly every request is for one page, or for a whole region of which nothing is anybody's yet.
//! For these two the flows need no set of 512 bits: they are generic over [`Pages`], and what they
//! ask of a set folds to a few instructions for [`OnePage`] and [`WholeRegion`]. Where a flow fails
//! it makes a [`PageSet`] of them and goes on as for any other.

use core::iter::once;
use core::ops::Range;

use crate::block::PAGES_PER_REGION;
use crate::pages::{PageSet, PageState, RegionWords};

/// Some pages of one region.
pub(crate) trait Pages {
    /// Whether it is all of them.
    fn is_full(&self) -> bool;
    /// The number of pages.
    fn len(&self) -> u16;
    /// The indices of the pages as runs without a gap, ascending.
    fn runs(&self) -> impl Iterator<Item = Range<usize>>;
    /// The same as a set.
    fn to_set(&self) -> PageSet;
    /// Writes `state` for every page. The caller holds the region's lock.
    fn record(&self, words: &RegionWords, state: PageState);
}

/// The page at this index.
pub(crate) struct OnePage(pub(crate) usize);

impl Pages for OnePage {
    #[inline]
    fn is_full(&self) -> bool {
        false
    }

    #[inline]
    fn len(&self) -> u16 {
        1
    }

    #[inline]
    fn runs(&self) -> impl Iterator<Item = Range<usize>> {
        once(self.0..self.0 + 1)
    }

    #[inline]
    fn to_set(&self) -> PageSet {
        PageSet::single(self.0)
    }

    #[inline]
    fn record(&self, words: &RegionWords, state: PageState) {
        words.record_one(self.0, state);
    }
}

/// All pages of a region.
pub(crate) struct WholeRegion;

impl Pages for WholeRegion {
    #[inline]
    fn is_full(&self) -> bool {
        true
    }

    #[inline]
    fn len(&self) -> u16 {
        PAGES_PER_REGION as u16
    }

    #[inline]
    fn runs(&self) -> impl Iterator<Item = Range<usize>> {
        once(0..PAGES_PER_REGION)
    }

    #[inline]
    fn to_set(&self) -> PageSet {
        PageSet::FULL
    }

    #[inline]
    fn record(&self, words: &RegionWords, state: PageState) {
        words.record_all(state);
    }
}

impl Pages for PageSet {
    fn is_full(&self) -> bool {
        self.is_full()
    }

    fn len(&self) -> u16 {
        self.len()
    }

    fn runs(&self) -> impl Iterator<Item = Range<usize>> {
        self.runs()
    }

    fn to_set(&self) -> PageSet {
        *self
    }

    fn record(&self, words: &RegionWords, state: PageState) {
        words.record(self, state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::Region;

    /// The shape says the same as the set of the same pages.
    fn agrees(shape: &impl Pages) {
        let set = shape.to_set();
        assert_eq!(shape.is_full(), set.is_full());
        assert_eq!(shape.len(), set.len());
        assert!(shape.runs().eq(set.runs()));
        let (one, other) = (Region::new(), Region::new());
        for region in [&one, &other] {
            region.words().record(&PageSet::FULL, PageState::Owned);
        }
        for state in [PageState::Ahead, PageState::Accepted, PageState::Unaccepted] {
            shape.record(one.words(), state);
            other.words().record(&set, state);
            for index in 0..PAGES_PER_REGION {
                let [found, expected] = [&one, &other].map(|r| r.words().state(index));
                assert_eq!(found, expected, "{index}");
            }
        }
    }

    #[test]
    fn shapes_are_the_sets_they_stand_for() {
        for index in [0, 31, 32, 100, 511] {
            agrees(&OnePage(index));
        }
        agrees(&WholeRegion);
        agrees(&PageSet::span(30, 70));
    }
}
