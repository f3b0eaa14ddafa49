//! The state of one 2 MiB region, two bits per 4 KiB page, and sets of its pages.
//!
//! The format is shared with whoever reads the map from outside (the referee): page `i` of a
//! region is bits `2 * (i % 32)` and up of word `i / 32`, least significant first; the values are
//! those of [`PageState`]. A region that was never touched is all zero: Unaccepted.
//!
//! Invariants:
//! * Words are written only by [`RegionWords::record`], under the region's lock; they are read
//!   with or without it.
//! * A [`PageSet`] uses even bits only, so that sets and state words combine without shuffling.

use crate::block::{Block, PAGES_PER_REGION, PageSize};
use crate::sync::{AtomicU64, Ordering};

/// Pages whose states share one 64-bit word.
const PAGES_PER_WORD: usize = 32;
/// Words of one region: 128 bytes.
const WORDS: usize = PAGES_PER_REGION / PAGES_PER_WORD;
/// The low bit of every page in a word.
const EVEN: u64 = 0x5555_5555_5555_5555;

/// What the map says about a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum PageState {
    /// Not valid, or given back to the host. Nobody may touch it.
    Unaccepted = 0,
    /// Valid and zero, but not yet asked for by the guest. Only the paravisor may touch it.
    Ahead = 1,
    /// Valid and the guest's.
    Accepted = 2,
    /// The paravisor's, or used as a VMSA or calling area, or on its way back to the host.
    /// No request may touch it.
    Owned = 3,
}

impl PageState {
    /// The state in the low two bits of `bits`.
    const fn from_bits(bits: u64) -> Self {
        match bits & 3 {
            0 => Self::Unaccepted,
            1 => Self::Ahead,
            2 => Self::Accepted,
            _ => Self::Owned,
        }
    }

    /// The state repeated for every page of a word.
    const fn pattern(self) -> u64 {
        self as u64 * EVEN
    }
}

/// The states of one 2 MiB region, in a cache-line pair of its own, so that two vCPUs that accept
/// neighbouring regions never share a line.
///
/// The caller provides the memory. All bytes zero is a valid value and means that nothing is
/// accepted.
#[repr(C, align(128))]
pub struct Region {
    words: RegionWords,
}

const _: () = assert!(cfg!(loom) || size_of::<Region>() == 128 && align_of::<Region>() == 128);

impl Region {
    /// A region in which nothing is accepted.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            words: RegionWords([const { AtomicU64::new(0) }; WORDS]),
        }
    }

    /// The words, for the engine.
    pub(crate) const fn words(&self) -> &RegionWords {
        &self.words
    }
}

impl Default for Region {
    fn default() -> Self {
        Self::new()
    }
}

/// The 16 state words of a region.
#[repr(transparent)]
pub(crate) struct RegionWords([AtomicU64; WORDS]);

impl RegionWords {
    /// The state of the page at `index` (0 to 511). Touches one word.
    pub(crate) fn state(&self, index: usize) -> PageState {
        let index = index % PAGES_PER_REGION;
        let word = self.0[index / PAGES_PER_WORD].load(Ordering::Acquire);
        PageState::from_bits(word >> (2 * (index % PAGES_PER_WORD)))
    }

    /// The pages in each state. A consistent picture only while the region's lock is held.
    pub(crate) fn states(&self) -> StateSets {
        let mut sets = StateSets::default();
        for (index, word) in self.0.iter().enumerate() {
            let word = word.load(Ordering::Acquire);
            let (low, high) = (word & EVEN, word >> 1 & EVEN);
            sets.ahead.0[index] = low & !high;
            sets.accepted.0[index] = high & !low;
            sets.owned.0[index] = high & low;
        }
        sets
    }

    /// Whether the whole region holds an Accepted page and no Owned one. May read less than the
    /// whole: the first cache line answers "no" when it has no Accepted page.
    pub(crate) fn looks_accepted(&self) -> bool {
        let mut accepted = 0;
        for (index, word) in self.0.iter().enumerate() {
            if index == WORDS / 2 && accepted == 0 {
                return false;
            }
            let word = word.load(Ordering::Acquire);
            let (low, high) = (word & EVEN, word >> 1 & EVEN);
            if low & high != 0 {
                return false;
            }
            accepted |= high;
        }
        accepted != 0
    }

    /// Writes `state` for every page of `pages`. The caller holds the region's lock.
    pub(crate) fn record(&self, pages: &PageSet, state: PageState) {
        for (word, set) in self.0.iter().zip(pages.0) {
            if set != 0 {
                // Plain load and store: the lock keeps other writers away. Release, so that who
                // reads Accepted without the lock also sees the scrubbed page.
                let kept = word.load(Ordering::Relaxed) & !(set * 3);
                word.store(kept | state.pattern() & (set * 3), Ordering::Release);
            }
        }
    }
}

/// The pages of a region, by state; those in none of the sets are Unaccepted.
#[derive(Default)]
pub(crate) struct StateSets {
    pub(crate) ahead: PageSet,
    pub(crate) accepted: PageSet,
    pub(crate) owned: PageSet,
}

/// A set of pages of one region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PageSet([u64; WORDS]);

impl PageSet {
    /// No page.
    pub(crate) const EMPTY: Self = Self([0; WORDS]);
    /// Every page of the region.
    pub(crate) const FULL: Self = Self([EVEN; WORDS]);

    /// The one page at `index` (0 to 511).
    pub(crate) fn single(index: usize) -> Self {
        let mut set = Self::EMPTY;
        set.insert(index);
        set
    }

    /// Adds the page at `index` (0 to 511).
    pub(crate) fn insert(&mut self, index: usize) {
        let index = index % PAGES_PER_REGION;
        self.0[index / PAGES_PER_WORD] |= 1 << (2 * (index % PAGES_PER_WORD));
    }

    /// The pages of `block`, within its region.
    pub(crate) fn of(block: Block) -> Self {
        match block.size() {
            PageSize::Size4K => Self::single(block.first().index_in_region()),
            PageSize::Size2M => Self::FULL,
        }
    }

    /// The pages with indices `from..to` (at most 512).
    pub(crate) fn span(from: usize, to: usize) -> Self {
        let mut set = Self::EMPTY;
        for index in from..to.min(PAGES_PER_REGION) {
            set.insert(index);
        }
        set
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    pub(crate) fn is_full(&self) -> bool {
        self.0.iter().all(|word| *word == EVEN)
    }

    /// The number of pages.
    pub(crate) fn len(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The pages in `self` or `other`.
    pub(crate) fn with(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a | b)
    }

    /// The pages in both.
    pub(crate) fn and(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a & b)
    }

    /// The pages of `self` that are not in `other`.
    pub(crate) fn without(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a & !b)
    }

    /// The indices of the pages, ascending.
    pub(crate) fn indices(&self) -> impl Iterator<Item = usize> + use<> {
        self.0
            .into_iter()
            .enumerate()
            .flat_map(|(word_index, word)| {
                let mut rest = word;
                core::iter::from_fn(move || {
                    let bit = rest.trailing_zeros() as usize;
                    // Clears the lowest set bit; an empty word ends the walk.
                    rest = rest.checked_sub(1)? & rest;
                    Some(word_index * PAGES_PER_WORD + bit / 2)
                })
            })
    }

    fn zip(&self, other: &Self, combine: impl Fn(u64, u64) -> u64) -> Self {
        let mut result = Self::EMPTY;
        for (out, (a, b)) in result.0.iter_mut().zip(self.0.iter().zip(other.0)) {
            *out = combine(*a, b);
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [PageState; 4] = [
        PageState::Unaccepted,
        PageState::Ahead,
        PageState::Accepted,
        PageState::Owned,
    ];

    #[test]
    fn every_page_keeps_its_own_state() {
        // Word edges are where mask code goes wrong: visit all pages with all states.
        let region = Region::new();
        let words = region.words();
        for index in 0..PAGES_PER_REGION {
            for state in STATES {
                words.record(&PageSet::single(index), state);
                assert_eq!(words.state(index), state);
                assert_eq!(
                    words.state((index + 1) % 512),
                    if index == 511 { STATES[3] } else { STATES[0] }
                );
            }
        }
        assert!(words.states().owned.is_full());
    }

    #[test]
    fn the_format_is_two_bits_per_page_from_the_low_end() {
        let region = Region::new();
        region
            .words()
            .record(&PageSet::single(33), PageState::Accepted);
        region
            .words()
            .record(&PageSet::single(32), PageState::Ahead);
        assert_eq!(region.words().0[1].load(Ordering::Relaxed), 0b10_01);
    }

    #[test]
    fn sets_split_by_state_are_disjoint_and_complete() {
        let region = Region::new();
        for index in 0..PAGES_PER_REGION {
            region
                .words()
                .record(&PageSet::single(index), STATES[index % 4]);
        }
        let sets = region.words().states();
        for (offset, set) in [(1, sets.ahead), (2, sets.accepted), (3, sets.owned)] {
            assert!(set.indices().eq((offset..512).step_by(4)));
            assert_eq!(set.len(), 128);
        }
    }

    #[test]
    fn sets_know_empty_full_and_difference() {
        assert!(PageSet::EMPTY.is_empty() && !PageSet::EMPTY.is_full());
        assert!(PageSet::FULL.is_full() && PageSet::FULL.len() == 512);
        assert!(PageSet::span(0, 512).is_full() && PageSet::span(7, 7).is_empty());
        let rest = PageSet::FULL
            .without(&PageSet::single(31))
            .without(&PageSet::single(32));
        assert_eq!(rest.len(), 510);
        assert!(rest.with(&PageSet::span(31, 33)).is_full());
        assert_eq!(
            rest.and(&PageSet::span(30, 34))
                .indices()
                .collect::<Vec<_>>(),
            [30, 33]
        );
    }

    #[test]
    fn a_region_looks_accepted_only_without_owned_pages() {
        let region = Region::new();
        assert!(!region.words().looks_accepted());
        region
            .words()
            .record(&PageSet::single(0), PageState::Accepted);
        assert!(region.words().looks_accepted());
        region
            .words()
            .record(&PageSet::single(511), PageState::Owned);
        assert!(!region.words().looks_accepted());
    }
}
