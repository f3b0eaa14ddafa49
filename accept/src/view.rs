//! What others may see of the map: which memory is still unaccepted, and how much is what.
//!
//! To the guest, memory that was made ready ahead is unaccepted like the rest: it has not asked for
//! it. So Ahead counts as unaccepted wherever the view is the guest's.
//!
//! The bits are those of the EFI unaccepted-memory table of Linux: one per unit of 2 MiB, least
//! significant first, set when the unit is unaccepted. A unit is all or nothing: of a unit that is
//! only partly accepted the guest would either accept pages twice or touch unaccepted ones. Such
//! units (the edges of what is not a multiple of 2 MiB) are accepted up front, by
//! [`Engine::round_out`].

use crate::backend::Backend;
use crate::block::{Block, Frame, PAGES_PER_REGION, PageSize};
use crate::engine::{Engine, Error, OnNoChange};
use crate::pages::{PageSet, StateSets};

/// The units from the lowest unaccepted one to the highest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Guest physical address of the first unit: a multiple of 2 MiB.
    pub base: u64,
    /// The number of units of 2 MiB.
    pub units: u64,
}

/// How much memory is in which state, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Not valid, or given back.
    pub unaccepted: u64,
    /// Ready, but not asked for yet.
    pub ahead: u64,
    /// The guest's.
    pub accepted: u64,
    /// The paravisor's, or lent to it.
    pub owned: u64,
}

/// The part of a region that belongs to one range, and its states.
struct Piece {
    first: Frame,
    pages: PageSet,
    states: StateSets,
}

impl Piece {
    /// The pages that the guest would have to ask for.
    fn unaccepted(&self) -> PageSet {
        self.pages
            .without(&self.states.accepted)
            .without(&self.states.owned)
    }

    /// Whether the piece is a whole unit of which the guest may say that it is unaccepted.
    fn is_unaccepted_unit(&self) -> bool {
        self.unaccepted().is_full()
    }
}

impl<B: Backend> Engine<'_, B> {
    /// Accepts the rest of every unit that is unaccepted in part, so that the bits of
    /// [`Engine::unaccepted_bits`] tell the whole truth. For the time before the guest starts. Returns how
    /// many pages of 4 KiB changed hands.
    ///
    /// # Errors
    /// Those of [`Engine::accept`]. What was accepted until then stays accepted.
    pub fn round_out(&self) -> Result<u64, Error> {
        let mut changed_pages = 0;
        for piece in self.pieces() {
            let rest = piece.unaccepted();
            if rest.is_full() {
                continue;
            }
            for index in rest.indices() {
                let page = Block::page(piece.first.at_index(index));
                let done = self.accept(page, OnNoChange::Ignore)?;
                changed_pages += u64::from(done.changed_pages);
            }
        }
        Ok(changed_pages)
    }

    /// From the lowest to the highest unaccepted unit of `regions` (numbers of 2 MiB regions from
    /// address 0); none when everything there is accepted.
    #[must_use]
    pub fn unaccepted_extent(&self, regions: core::ops::Range<u64>) -> Option<Extent> {
        let mut units = self
            .pieces_of(regions)
            .filter(Piece::is_unaccepted_unit)
            .map(|piece| piece.first.region_number());
        let lowest = units.next()?;
        let highest = units.last().unwrap_or(lowest);
        Some(Extent {
            base: lowest * PageSize::Size2M.bytes(),
            units: highest - lowest + 1,
        })
    }

    /// Writes the bits of the units of `extent`: a set bit is an unaccepted unit. Bits without
    /// memory, and those that `bits` has too many, are clear; units beyond `bits` are left out.
    pub fn unaccepted_bits(&self, extent: Extent, bits: &mut [u8]) {
        bits.fill(0);
        let base = extent.base / PageSize::Size2M.bytes();
        let units = base..base.saturating_add(extent.units);
        for piece in self.pieces_of(units).filter(Piece::is_unaccepted_unit) {
            let unit = piece.first.region_number() - base;
            if let Ok(unit) = usize::try_from(unit)
                && let Some(byte) = bits.get_mut(unit / 8)
            {
                *byte |= 1 << (unit % 8);
            }
        }
    }

    /// Whether the guest may not yet touch some byte of `bytes` bytes from `gpa`.
    ///
    /// A range that ends with a unit counts the next unit too: the guest's kernel may read a few
    /// bytes beyond what it uses (Linux, load_unaligned_zeropad), and such a read must not fault.
    /// Memory that has no state is not unaccepted.
    #[must_use]
    pub fn contains_unaccepted(&self, gpa: u64, bytes: u64) -> bool {
        let unit = PageSize::Size2M.bytes();
        let mut end = gpa.saturating_add(bytes);
        if end.is_multiple_of(unit) {
            end = end.saturating_add(unit);
        }
        let (first, end) = (Frame::containing(gpa).number(), end.div_ceil(1 << 12));
        let pages = PAGES_PER_REGION as u64;
        let mut pieces = self.pieces_of(first / pages..end.div_ceil(pages));
        pieces.any(|piece| {
            let start = piece.first.region_start().number();
            let index = |frame: u64| {
                let index = frame.saturating_sub(start).min(PAGES_PER_REGION as u64);
                usize::try_from(index).unwrap_or(PAGES_PER_REGION)
            };
            let asked = PageSet::span(index(first), index(end));
            !piece.unaccepted().and(&asked).is_empty()
        })
    }

    /// How much of the memory in `regions` (numbers of 2 MiB regions from address 0) is in which
    /// state. While others are at work the figures are those of different moments.
    #[must_use]
    pub fn census(&self, regions: core::ops::Range<u64>) -> Census {
        let mut census = Census::default();
        let bytes = |pages: &PageSet| pages.bytes();
        for piece in self.pieces_of(regions) {
            let states = &piece.states;
            census.ahead += bytes(&states.ahead);
            census.accepted += bytes(&states.accepted);
            census.owned += bytes(&states.owned);
            census.unaccepted += bytes(&piece.unaccepted().without(&states.ahead));
        }
        census
    }

    /// All regions with what belongs to them, ascending.
    fn pieces(&self) -> impl Iterator<Item = Piece> {
        self.pieces_of(0..u64::MAX)
    }

    /// The same of the regions with these numbers. Regions outside cost nothing.
    fn pieces_of(&self, wanted: core::ops::Range<u64>) -> impl Iterator<Item = Piece> {
        self.map().ranges().iter().flat_map(move |range| {
            let (first, last) = (range.first(), range.last());
            let from = first.region_number().max(wanted.start);
            let end = (last.region_number() + 1).min(wanted.end);
            let numbers = from..end;
            // No index is larger than the number of regions, which is one.
            let skipped = usize::try_from(from - first.region_number()).unwrap_or(usize::MAX);
            let regions = range.regions().get(skipped..).unwrap_or_default();
            let pieces = numbers.zip(regions).map(move |(number, region)| {
                let start = Frame::try_new(number * PAGES_PER_REGION as u64)?;
                let from = if first > start {
                    first.index_in_region()
                } else {
                    0
                };
                let to = if number == last.region_number() {
                    last.index_in_region() + 1
                } else {
                    PAGES_PER_REGION
                };
                let pages = PageSet::span(from, to);
                Some(Piece {
                    first: start,
                    pages,
                    states: region.words().states(&pages),
                })
            });
            pieces.flatten()
        })
    }
}
