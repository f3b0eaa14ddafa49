//! The state of one 2 MiB region, two bits per 4 KiB page, and sets of its pages.
//!
//! The format is shared with whoever reads the map from outside (the referee): page `i` of a
//! region is bits `2 * (i % 32)` and up of word `i / 32`, least significant first; the values are
//! those of [`PageState`]. A region that was never touched is all zero: Unaccepted.
//!
//! Invariants:
//! * Words are written only by [`RegionWords::record`] and its two special cases, under the region's
//!   lock; they are read with or without it.
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
    #[inline]
    const fn from_bits(bits: u64) -> Self {
        match bits & 3 {
            0 => Self::Unaccepted,
            1 => Self::Ahead,
            2 => Self::Accepted,
            _ => Self::Owned,
        }
    }

    /// The state repeated for every page of a word.
    #[inline]
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
    #[inline]
    pub(crate) fn state(&self, index: usize) -> PageState {
        let index = index % PAGES_PER_REGION;
        let word = self.0[index / PAGES_PER_WORD].load(Ordering::Acquire);
        PageState::from_bits(word >> (2 * (index % PAGES_PER_WORD)))
    }

    /// The pages of `pages` by their states. A consistent picture only while the region's lock is
    /// held.
    pub(crate) fn states(&self, pages: &PageSet) -> StateSets {
        let mut sets = StateSets::default();
        for set in [&mut sets.ahead, &mut sets.accepted, &mut sets.owned] {
            set.touched = pages.touched;
        }
        for index in pages.touched.indices() {
            let word = self.0[index].load(Ordering::Acquire);
            let asked = pages.words[index];
            let (low, high) = (word & asked, word >> 1 & asked);
            sets.ahead.words[index] = low & !high;
            sets.accepted.words[index] = high & !low;
            sets.owned.words[index] = high & low;
        }
        sets
    }

    /// Whether the whole region is Unaccepted. For sure only while its lock is held.
    #[inline]
    pub(crate) fn is_unaccepted(&self) -> bool {
        let any = self
            .0
            .iter()
            .fold(0, |any, word| any | word.load(Ordering::Acquire));
        any == 0
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

    /// Writes `state` for the page at `index` (0 to 511), as [`RegionWords::record`].
    #[inline]
    pub(crate) fn record_one(&self, index: usize, state: PageState) {
        let index = index % PAGES_PER_REGION;
        let word = &self.0[index / PAGES_PER_WORD];
        let mask = 3 << (2 * (index % PAGES_PER_WORD));
        let kept = word.load(Ordering::Relaxed) & !mask;
        word.store(kept | state.pattern() & mask, Ordering::Release);
    }

    /// Writes `state` for every page, as [`RegionWords::record`].
    #[inline]
    pub(crate) fn record_all(&self, state: PageState) {
        for word in &self.0 {
            word.store(state.pattern(), Ordering::Release);
        }
    }

    /// Writes `state` for every page of `pages`. The caller holds the region's lock.
    pub(crate) fn record(&self, pages: &PageSet, state: PageState) {
        for index in pages.touched.indices() {
            let (word, set) = (&self.0[index], pages.words[index]);
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
///
/// It remembers between which words its pages lie, so that work on one page costs one word and not
/// sixteen. Words outside are zero.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PageSet {
    words: [u64; WORDS],
    touched: Touched,
}

/// Words `from..to` of a set; at most [`WORDS`].
#[derive(Clone, Copy, Debug, Default)]
struct Touched {
    from: u8,
    to: u8,
}

impl Touched {
    const ALL: Self = Self {
        from: 0,
        to: WORDS as u8,
    };

    fn indices(self) -> core::ops::Range<usize> {
        usize::from(self.from)..usize::from(self.to).min(WORDS)
    }

    /// The smallest that holds both.
    fn around(self, other: Self) -> Self {
        match (self.from < self.to, other.from < other.to) {
            (false, _) => other,
            (true, false) => self,
            (true, true) => Self {
                from: self.from.min(other.from),
                to: self.to.max(other.to),
            },
        }
    }
}

impl PartialEq for PageSet {
    fn eq(&self, other: &Self) -> bool {
        self.words == other.words
    }
}

impl Eq for PageSet {}

impl PageSet {
    /// No page.
    pub(crate) const EMPTY: Self = Self {
        words: [0; WORDS],
        touched: Touched { from: 0, to: 0 },
    };
    /// Every page of the region.
    pub(crate) const FULL: Self = Self {
        words: [EVEN; WORDS],
        touched: Touched::ALL,
    };

    /// The one page at `index` (0 to 511).
    pub(crate) fn single(index: usize) -> Self {
        let mut set = Self::EMPTY;
        set.insert(index);
        set
    }

    /// Adds the page at `index` (0 to 511).
    pub(crate) fn insert(&mut self, index: usize) {
        let index = index % PAGES_PER_REGION;
        let word = index / PAGES_PER_WORD;
        self.words[word] |= 1 << (2 * (index % PAGES_PER_WORD));
        self.touched = self.touched.around(Touched {
            from: word as u8,
            to: word as u8 + 1,
        });
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
        let to = to.min(PAGES_PER_REGION);
        if from >= to {
            return Self::EMPTY;
        }
        let (first, last) = (from / PAGES_PER_WORD, (to - 1) / PAGES_PER_WORD);
        let mut words = [0; WORDS];
        words[first..=last].fill(EVEN);
        words[first] &= u64::MAX << (2 * (from % PAGES_PER_WORD));
        words[last] &= u64::MAX >> (2 * (PAGES_PER_WORD - 1 - (to - 1) % PAGES_PER_WORD));
        Self {
            words,
            touched: Touched {
                from: first as u8,
                to: last as u8 + 1,
            },
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.words.iter().fold(0, |any, word| any | word) == 0
    }

    pub(crate) fn is_full(&self) -> bool {
        self.words.iter().fold(EVEN, |all, word| all & word) == EVEN
    }

    /// The number of pages.
    pub(crate) fn len(&self) -> u16 {
        if self.is_full() {
            // The usual case, where counting would cost more than all else.
            return PAGES_PER_REGION as u16;
        }
        self.touched
            .indices()
            .map(|index| self.words[index].count_ones() as u16)
            .sum()
    }

    /// How much memory they are.
    pub(crate) fn bytes(&self) -> u64 {
        u64::from(self.len()) * PageSize::Size4K.bytes()
    }

    /// The pages in `self` or `other`.
    pub(crate) fn with(&self, other: &Self) -> Self {
        let mut result = *self;
        result.touched = self.touched.around(other.touched);
        for index in other.touched.indices() {
            result.words[index] |= other.words[index];
        }
        result
    }

    /// The pages in both.
    pub(crate) fn and(&self, other: &Self) -> Self {
        let mut result = *self;
        for index in self.touched.indices() {
            result.words[index] &= other.words[index];
        }
        result
    }

    /// The pages of `self` that are not in `other`.
    pub(crate) fn without(&self, other: &Self) -> Self {
        let mut result = *self;
        for index in self.touched.indices() {
            result.words[index] &= !other.words[index];
        }
        result
    }

    /// The pages with smaller indices than `index` (0 to 511).
    pub(crate) fn below(&self, index: usize) -> Self {
        let mut result = *self;
        let (word, bit) = (index / PAGES_PER_WORD, 2 * (index % PAGES_PER_WORD));
        for at in self.touched.indices() {
            if at == word {
                result.words[at] &= (1 << bit) - 1;
            } else if at > word {
                result.words[at] = 0;
            }
        }
        result
    }

    /// The indices of the pages as runs without a gap, ascending.
    pub(crate) fn runs(&self) -> impl Iterator<Item = core::ops::Range<usize>> + use<> {
        let whole = self.is_full().then_some(0..PAGES_PER_REGION);
        let rest = if whole.is_some() { Self::EMPTY } else { *self };
        let mut indices = rest.indices().peekable();
        whole.into_iter().chain(core::iter::from_fn(move || {
            let first = indices.next()?;
            let mut end = first + 1;
            while indices.next_if_eq(&end).is_some() {
                end += 1;
            }
            Some(first..end)
        }))
    }

    /// The indices of the pages, ascending.
    pub(crate) fn indices(&self) -> impl Iterator<Item = usize> + use<> {
        let words = self.words;
        self.touched.indices().flat_map(move |word_index| {
            let mut rest = words[word_index];
            core::iter::from_fn(move || {
                let bit = rest.trailing_zeros() as usize;
                // Clears the lowest set bit; an empty word ends the walk.
                rest = rest.checked_sub(1)? & rest;
                Some(word_index * PAGES_PER_WORD + bit / 2)
            })
        })
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
        assert!(words.states(&PageSet::FULL).owned.is_full());
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
        let sets = region.words().states(&PageSet::FULL);
        for (offset, set) in [(1, sets.ahead), (2, sets.accepted), (3, sets.owned)] {
            assert!(set.indices().eq((offset..512).step_by(4)));
            assert_eq!(set.len(), 128);
        }
    }

    #[test]
    fn sets_know_empty_full_and_difference() {
        assert!(PageSet::EMPTY.is_empty() && !PageSet::EMPTY.is_full());
        assert!(PageSet::FULL.is_full() && PageSet::FULL.len() == 512);
        assert_ne!(PageSet::FULL, PageSet::FULL.below(511));
        assert!(!PageSet::FULL.is_empty() && !PageSet::single(511).is_empty());
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
    fn a_span_is_its_pages_one_by_one() {
        for from in 0..=PAGES_PER_REGION {
            let mut expected = PageSet::EMPTY;
            for to in from..=PAGES_PER_REGION {
                let span = PageSet::span(from, to);
                assert_eq!(span, expected, "{from}..{to}");
                assert_eq!(span.touched.indices(), expected.touched.indices());
                if to < PAGES_PER_REGION {
                    expected.insert(to);
                }
            }
        }
        assert_eq!(PageSet::span(3, 2), PageSet::EMPTY);
        assert_eq!(PageSet::span(512, 600), PageSet::EMPTY);
        assert_eq!(PageSet::span(500, 600), PageSet::span(500, 512));
    }

    #[test]
    fn a_block_is_its_page_or_all_of_its_region() {
        let frame = crate::block::Frame::containing(0x40_7000);
        assert_eq!(PageSet::of(Block::page(frame)), PageSet::single(7));
        assert_eq!(PageSet::of(Block::region_around(frame)), PageSet::FULL);
    }

    #[test]
    fn a_part_is_asked_for_and_told_alone() {
        let region = Region::new();
        region.words().record(&PageSet::FULL, PageState::Accepted);
        region
            .words()
            .record(&PageSet::single(100), PageState::Owned);
        let asked = PageSet::span(99, 102);
        let sets = region.words().states(&asked);
        assert!(sets.accepted.indices().eq([99, 101]));
        assert_eq!(sets.owned, PageSet::single(100));
        assert!(sets.ahead.is_empty());
        // Sets are equal when their pages are, wherever these were looked for.
        assert_eq!(PageSet::FULL.and(&PageSet::single(7)), PageSet::single(7));
        assert_eq!(PageSet::FULL.without(&PageSet::FULL), PageSet::EMPTY);
        assert_eq!(PageSet::EMPTY.with(&asked), asked);
        assert_eq!(asked.with(&PageSet::EMPTY), asked);
        for index in [0, 31, 32, 99, 100, 101, 102, 511] {
            let below = PageSet::span(0, index).and(&asked);
            assert_eq!(asked.below(index), below, "{index}");
        }
        let far = PageSet::single(0).with(&PageSet::single(511));
        assert!(far.indices().eq([0, 511]));
        assert_eq!(far.len(), 2);
    }

    #[test]
    fn runs_are_the_indices_without_gaps() {
        let runs = |set: &PageSet| {
            set.runs()
                .map(|run| (run.start, run.end))
                .collect::<Vec<_>>()
        };
        assert_eq!(runs(&PageSet::FULL), [(0, 512)]);
        assert_eq!(runs(&PageSet::EMPTY), []);
        assert_eq!(runs(&PageSet::single(511)), [(511, 512)]);
        let gaps = PageSet::span(3, 70).without(&PageSet::single(31));
        assert_eq!(runs(&gaps), [(3, 31), (32, 70)]);
        let rest = PageSet::FULL.without(&PageSet::single(0));
        assert_eq!(runs(&rest), [(1, 512)]);
        assert_eq!(runs(&PageSet::FULL.below(511)), [(0, 511)]);
    }

    #[test]
    fn one_page_in_any_other_state_is_seen() {
        let region = Region::new();
        let words = region.words();
        for index in [0, 31, 32, 510, 511] {
            for state in STATES {
                words.record(&PageSet::single(index), state);
                let expected = state == PageState::Unaccepted;
                assert_eq!(words.is_unaccepted(), expected, "{index} {state:?}");
            }
            words.record(&PageSet::FULL, PageState::Unaccepted);
        }
        for state in STATES {
            // All words alike.
            words.record(&PageSet::FULL, state);
            assert_eq!(words.is_unaccepted(), state == PageState::Unaccepted);
        }
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

        // The second cache line is read only if the first has an Accepted page.
        let region = Region::new();
        region
            .words()
            .record(&PageSet::single(511), PageState::Accepted);
        assert!(!region.words().looks_accepted());
    }
}
