//! The engine: the map, the locks and the backend brought together, and what its flows share.
//!
//! The flows are in `accepting`, `rescinding` and `owned`. Each has the same shape: find the
//! region, take its lock, look at the states, act, record, release the lock, flush if something
//! went wrong half-way.

use core::cell::Cell;

use crate::backend::{Backend, NotFlushed, Operation, STATUS_SIZE_MISMATCH, Trouble};
use crate::block::{Block, Frame, PageSize};
use crate::counters::{Counters, Tally};
use crate::lock::{Guard, RegionLock, RegionLocks};
use crate::map::{Map, Place};
use crate::pages::{PageSet, PageState, StateSets};
use crate::shape::Pages;
use crate::sweep::Stopped;

/// The acceptance engine of one VM. All methods take `&self` and may be called on all vCPUs at
/// once, with interrupts off.
pub struct Engine<'m, B> {
    pub(crate) backend: B,
    map: Map<'m>,
    locks: RegionLocks<'m>,
}

/// What a request wants when it changes nothing for a page, because the page already is in the
/// state asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnNoChange {
    /// Refuse the whole block ([`Error::NoChange`]).
    Fail,
    /// Leave such pages alone and do the others.
    Ignore,
}

/// What a finished request has done. Numbers of a block's pages, 512 at most: so small that a result comes
/// back in a register, and not in memory behind the stores that have just filled a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// Pages of 4 KiB that were filled with zeros: the measure of the work.
    pub scrubbed_pages: u16,
    /// Pages of 4 KiB that changed hands.
    pub changed_pages: u16,
}

const _: () = assert!(size_of::<Option<Result<Done, Error>>>() <= size_of::<u64>());

impl Done {
    pub(crate) const NOTHING: Self = Self {
        scrubbed_pages: 0,
        changed_pages: 0,
    };

    /// What was filled with zeros, in bytes.
    #[must_use]
    pub fn scrubbed_bytes(self) -> u64 {
        u64::from(self.scrubbed_pages) * PageSize::Size4K.bytes()
    }
}

/// What a finished rescind has done, and what it still owes.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a flush may be owed"]
pub struct Rescinded {
    /// Pages that left.
    pub changed_pages: u16,
    /// The flush that is owed before the guest is answered, if a page left, or one that left in a
    /// flow that failed may be cached still.
    pub flush: Option<FlushOwed>,
}

/// A debt: pages were taken from the guest, and vCPUs may still hold translations of them. Several
/// debts are paid by one [`Engine::flush`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "pay with Engine::flush before answering the guest"]
pub struct FlushOwed(pub(crate) ());

/// Why a request was not carried out. Unless the variant says otherwise, nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The guest's fault: the block is not, or not as a whole, in memory that has a state.
    OutOfRange,
    /// The guest's fault: a page of the block is not the guest's to give or take.
    Owned,
    /// The guest's fault: the page is not accepted, and must be for this use.
    NotAccepted,
    /// The guest's fault: a page of the block already is what it should become.
    NoChange,
    /// The host's fault: the hardware contradicts the map. Nothing that the map did not know was
    /// granted, and the VM should stop. Every page is recorded as what the hardware says, but for
    /// one that is gone although nobody gave it back, and was to be claimed or lent ([`Engine::take`]):
    /// that stays what it was. Were it Unaccepted, a second page could be validated there (I2).
    HostLied,
    /// Nobody's fault: another vCPU held the lock, or kept a flush from being certain, for too
    /// long. Ask again.
    Busy,
    /// An instruction failed. What it did to part of the block was undone, or is recorded.
    Backend {
        /// The step.
        operation: Operation,
        /// The platform's status (SNP: EAX).
        status: u32,
    },
}

impl<'m, B: Backend> Engine<'m, B> {
    /// An engine over `map`, with every page in the state that the map's memory says.
    pub const fn new(backend: B, map: Map<'m>, locks: RegionLocks<'m>) -> Self {
        Self {
            backend,
            map,
            locks,
        }
    }

    /// The map, for whoever publishes or enumerates it.
    #[must_use]
    pub const fn map(&self) -> Map<'m> {
        self.map
    }

    /// The backend.
    #[must_use]
    pub const fn backend(&self) -> &B {
        &self.backend
    }

    /// The state of a page at this moment, or `None` when it has none. Takes no lock: the answer
    /// may be old before the caller reads it, except that only the holder of a [`Taken`] changes
    /// that page.
    ///
    /// [`Taken`]: crate::Taken
    #[inline]
    #[must_use]
    pub fn state(&self, frame: Frame) -> Option<PageState> {
        Some(
            self.map
                .find(Block::page(frame))?
                .state(frame.index_in_region()),
        )
    }

    /// Whether a page of the block is not the guest's to give or take. Takes no lock, as
    /// [`Engine::state`].
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn is_owned(&self, block: Block) -> Result<bool, Error> {
        let Glance { place, .. } = self.look(block)?;
        Ok(!place.words.states(&PageSet::of(block)).owned.is_empty())
    }

    /// Pays every debt there is, this one included: one flush is enough for many rescinds.
    ///
    /// # Errors
    /// The debt, when a vCPU kept the flush from being certain for too long.
    pub fn flush(&self, owed: FlushOwed) -> Result<(), FlushOwed> {
        self.backend.flush().map_err(|NotFlushed| owed)
    }

    /// The sum of all counters.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let mut sum = Counters::default();
        for tally in self.locks.tallies() {
            sum.absorb(tally);
        }
        sum
    }

    /// Records what the launch, or the paravisor itself before this engine existed, has made of
    /// `pages` pages from `first`. No instruction is executed.
    ///
    /// For boot time: states are overwritten without a look at them.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless all pages lie in one range; [`Error::Busy`].
    pub fn record_launch(&self, first: Frame, pages: u64, state: PageState) -> Result<(), Error> {
        let mut busy = false;
        let inside = self
            .map
            .for_each_piece(first, pages, |words, start, indices| {
                match self.locks.lock(start) {
                    // The guard lives to the end of the arm.
                    Some(_guard) => {
                        words.record(&PageSet::span(indices.start, indices.end), state);
                    }
                    None => busy = true,
                }
            });
        match (inside, busy) {
            (false, _) => Err(Error::OutOfRange),
            (true, true) => Err(Error::Busy),
            (true, false) => Ok(()),
        }
    }

    /// The words and the lock of a block's region, before it is taken.
    pub(crate) fn look(&self, block: Block) -> Result<Glance<'m>, Error> {
        let place = self.map.place(block).ok_or(Error::OutOfRange)?;
        Ok(Glance {
            place,
            lock: self.locks.of(block.first()),
            block,
        })
    }

    /// Locks a block's region.
    pub(crate) fn hold(&self, block: Block) -> Result<Held<'m>, Error> {
        self.hold_seen(self.look(block)?)
    }

    /// Locks the region of a block that was looked at.
    pub(crate) fn hold_seen(
        &self,
        Glance { place, lock, block }: Glance<'m>,
    ) -> Result<Held<'m>, Error> {
        let guard = self.locks.take(lock).ok_or(Error::Busy)?;
        Ok(Held {
            place,
            region: block.first().region_start(),
            guard,
            owes_flush: Cell::new(false),
        })
    }

    /// Ends a flow: releases the lock first, then pays for what a failure has left behind. I12: no
    /// lock is held across a flush.
    pub(crate) fn end(&self, held: Held<'m>) {
        let owes_flush = held.owes_flush.get();
        drop(held);
        if owes_flush {
            // The caller hears of the failure whether this is certain or not, and relies on
            // nothing. Who gives pages back later does: see `Held::maybe_stale`.
            let _ = self.backend.flush();
        }
    }
}

/// A region seen without its lock.
pub(crate) struct Glance<'m> {
    place: Place<'m>,
    lock: &'m RegionLock,
    block: Block,
}

impl Glance<'_> {
    /// The test before the lock: whether the whole block can be answered with "already accepted".
    ///
    /// Accepted is the only answer that can be given without the lock: it is written after all the
    /// work is done and erased before any work of a rescind begins. Owned may be a page that is
    /// just leaving, Unaccepted one that is just arriving; both are looked at again under the lock.
    #[inline]
    fn is_accepted(&self) -> bool {
        match self.block.size() {
            PageSize::Size4K => {
                self.place.words.state(self.block.first().index_in_region()) == PageState::Accepted
            }
            PageSize::Size2M => self.place.words.looks_accepted(),
        }
    }

    /// What a request to accept the block is answered without the lock, if it can be.
    #[inline]
    pub(crate) fn answer(&self, on_no_change: OnNoChange) -> Option<Result<Done, Error>> {
        // With `Ignore` one page decides nothing about the other 511.
        let one_page_decides =
            on_no_change == OnNoChange::Fail || self.block.size() == PageSize::Size4K;
        if !(one_page_decides && self.is_accepted()) {
            return None;
        }
        Some(match on_no_change {
            OnNoChange::Fail => Err(Error::NoChange),
            OnNoChange::Ignore => Ok(Done::NOTHING),
        })
    }
}

/// A region whose lock is held: the only way to change states (I1).
pub(crate) struct Held<'m> {
    place: Place<'m>,
    region: Frame,
    guard: Guard<'m>,
    /// See [`Held::owe_flush`].
    owes_flush: Cell<bool>,
}

impl<'m> Held<'m> {
    /// Whether `block` lies in what is locked: in the region, and in the same range.
    #[inline]
    pub(crate) fn has(&self, block: Block) -> bool {
        block.first().region_start() == self.region && self.place.range.contains_block(block)
    }

    /// The first frame of the region.
    #[inline]
    pub(crate) const fn region(&self) -> Frame {
        self.region
    }

    #[inline]
    pub(crate) fn tally(&self) -> &'m Tally {
        self.guard.tally()
    }

    /// The pages of `pages` by their states, for sure.
    pub(crate) fn states(&self, pages: &PageSet) -> StateSets {
        self.place.words.states(pages)
    }

    /// Whether the whole region is Unaccepted, for sure.
    #[inline]
    pub(crate) fn is_unaccepted(&self) -> bool {
        self.place.words.is_unaccepted()
    }

    /// The state of one page, for sure.
    #[inline]
    pub(crate) fn state(&self, frame: Frame) -> PageState {
        self.place.words.state(frame.index_in_region())
    }

    /// A failed flow took permissions from the guest, and its caller will not pay for it: there has
    /// to be a flush when the lock is released.
    pub(crate) fn owe_flush(&self) {
        self.owes_flush.set(true);
        self.guard.distrust();
    }

    /// Whether a flow that failed has ever put out pages of the region: its flush may be under way
    /// still, or was not certain. To who gives these pages back nothing changes, but he shares them
    /// with the host when he is answered.
    pub(crate) fn maybe_stale(&self) -> bool {
        self.guard.is_distrusted()
    }

    pub(crate) fn record(&self, pages: &impl Pages, state: PageState) {
        pages.record(self.place.words, state);
    }

    /// Remembers that the guest gives pages of the region back.
    pub(crate) fn remember_given_back(&self) {
        if let Some(flag) = self.place.given_back() {
            flag.set();
        }
    }

    /// Whether the guest may have given back a page of the region.
    pub(crate) fn maybe_given_back(&self) -> bool {
        self.place.given_back().is_none_or(|flag| flag.is_set())
    }

    /// Turns the reason why a sweep stopped into the caller's error, and counts it.
    pub(crate) fn error(&self, operation: Operation, stopped: Stopped) -> Error {
        match stopped.trouble {
            Trouble::Contradiction => {
                self.tally().host_lies.add(1);
                Error::HostLied
            }
            Trouble::SizeMismatch => self.failure(operation, STATUS_SIZE_MISMATCH),
            Trouble::Failed(status) => self.failure(operation, status),
        }
    }

    fn failure(&self, operation: Operation, status: u32) -> Error {
        self.tally().failures.add(1);
        Error::Backend { operation, status }
    }
}
