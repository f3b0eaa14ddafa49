//! Rescinding: record as leaving, revoke, invalidate, record (I3).
//!
//! A page on its way out is recorded Owned, which is what "nobody may touch it" is called in the
//! map. It is so only under the region's lock: who asks for the page meanwhile sees Owned in the
//! lock-free test, which decides nothing, and waits for the lock like everybody else.

use crate::backend::{Backend, Operation, Trouble};
use crate::block::{Block, PageSize};
use crate::counters::Tally;
use crate::engine::{Done, Engine, Error, FlushOwed, Held, OnNoChange, Rescinded};
use crate::pages::{PageSet, PageState};
use crate::sweep::{Grain, sweep, sweep_on};

/// The pages of one rescind, by what they were.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Leaving {
    /// The guest's.
    pub(crate) accepted: PageSet,
    /// Ready but unclaimed. To the guest these never were accepted, but the host is about to use
    /// the address for something else, so they must not stay valid behind the guest's back.
    pub(crate) ahead: PageSet,
}

impl Leaving {
    pub(crate) fn all(&self) -> PageSet {
        self.accepted.with(&self.ahead)
    }
}

impl<B: Backend> Engine<'_, B> {
    /// Takes `block` from the guest and makes it invalid, so that the host may have it.
    ///
    /// Not for platforms on which only the host makes a page invalid: see [`Engine::withdraw`].
    ///
    /// The answer owes a flush ([`Rescinded::flush`]): vCPUs of the guest may still reach the page.
    ///
    /// # Errors
    /// [`Error::Owned`] if any page of the block is; else, with [`OnNoChange::Fail`],
    /// [`Error::NoChange`] if any page is not accepted; and the others of [`Error`] except
    /// [`Error::NotAccepted`]. [`Error::HostLied`] means that a page had already lost its validity
    /// although nobody asked: the host removed it, and an older page may be waiting to take its
    /// place.
    pub fn rescind(&self, block: Block, on_no_change: OnNoChange) -> Result<Rescinded, Error> {
        const { assert!(!B::HOST_REMOVES, "withdraw, have the host remove, settle") };
        let held = self.hold(block)?;
        let result = self.rescind_held(&held, block, on_no_change);
        let maybe_stale = held.maybe_stale();
        self.end(held);
        let Done { changed_pages, .. } = result?;
        let flush = (changed_pages != 0 || maybe_stale).then_some(FlushOwed(()));
        Ok(Rescinded {
            changed_pages,
            flush,
        })
    }

    fn rescind_held(
        &self,
        held: &Held<'_>,
        block: Block,
        on_no_change: OnNoChange,
    ) -> Result<Done, Error> {
        let leaving = self.leaving(held, block, on_no_change)?;
        if leaving.all().is_empty() {
            return Ok(Done::NOTHING);
        }
        let done = self.put_out(held, &leaving)?;
        count_rescinded(held.tally(), block, &leaving);
        Ok(done)
    }

    /// Which pages of a block are to leave, if it may leave at all.
    pub(crate) fn leaving(
        &self,
        held: &Held<'_>,
        block: Block,
        on_no_change: OnNoChange,
    ) -> Result<Leaving, Error> {
        let asked = PageSet::of(block);
        let states = held.states(&asked);
        if !states.owned.is_empty() {
            return Err(Error::Owned);
        }
        // Also when nothing changes: the guest says what it is about to do with the pages.
        held.remember_given_back();
        if on_no_change == OnNoChange::Fail && states.accepted != asked {
            return Err(Error::NoChange);
        }
        Ok(Leaving {
            accepted: states.accepted,
            ahead: states.ahead,
        })
    }

    fn put_out(&self, held: &Held<'_>, leaving: &Leaving) -> Result<Done, Error> {
        let (region, tally) = (held.region(), held.tally());
        let mut grain = Grain::Large;
        let all = leaving.all();
        held.record(&all, PageState::Owned);
        self.take_access(held, leaving, &mut grain)?;

        let rescinded = sweep(region, &all, &mut grain, tally, |block| {
            self.backend.rescind(block)
        });
        if let Err(stopped) = rescinded {
            // What is invalid cannot be brought back: another page may be there by now, and its
            // content would be lost anyway. It is recorded as it is; the rest goes back.
            let lost = stopped
                .done(&all)
                .with(&lost_pages(stopped.trouble, &stopped.at()));
            held.record(&lost, PageState::Unaccepted);
            self.restore(
                held,
                leaving,
                &lost,
                &leaving.accepted.without(&lost),
                grain,
            );
            held.owe_flush();
            return Err(held.error(Operation::Rescind, stopped));
        }

        held.record(&all, PageState::Unaccepted);
        Ok(Done {
            scrubbed_pages: 0,
            changed_pages: all.len(),
        })
    }

    /// Takes the guest's access to pages that are recorded Owned by now. After a failure they are
    /// again what they were.
    pub(crate) fn take_access(
        &self,
        held: &Held<'_>,
        leaving: &Leaving,
        grain: &mut Grain,
    ) -> Result<(), Error> {
        let revoked = sweep(
            held.region(),
            &leaving.accepted,
            grain,
            held.tally(),
            |block| self.backend.revoke(block),
        );
        let Err(stopped) = revoked else {
            return Ok(());
        };
        // A page that the hardware calls invalid is out already; the rest goes back.
        let lost = lost_pages(stopped.trouble, &stopped.at());
        held.record(&lost, PageState::Unaccepted);
        let revoked = stopped.done(&leaving.accepted);
        self.restore(held, leaving, &lost, &revoked, *grain);
        if !lost.is_empty() {
            held.owe_flush();
        }
        Err(held.error(Operation::Revoke, stopped))
    }

    /// Undoes a rescind that failed half-way: the pages that are not `lost` become again what they
    /// were, those of `revoked` after a new grant. A page that cannot be granted again stays Owned.
    pub(crate) fn restore(
        &self,
        held: &Held<'_>,
        leaving: &Leaving,
        lost: &PageSet,
        revoked: &PageSet,
        grain: Grain,
    ) {
        let granted = sweep_on(
            held.region(),
            revoked,
            grain,
            held.tally(),
            |block| self.backend.grant(block),
            |_| false,
        );
        let untouched = leaving.accepted.without(revoked).without(lost);
        held.record(&untouched.with(&granted), PageState::Accepted);
        held.record(&leaving.ahead.without(lost), PageState::Ahead);
    }
}

/// Counts a block that the guest gave back.
pub(crate) fn count_rescinded(tally: &Tally, block: Block, leaving: &Leaving) {
    match block.size() {
        PageSize::Size4K => tally.rescinded_4k.add(1),
        PageSize::Size2M => tally.rescinded_2m.add(1),
    }
    let bytes = leaving.accepted.bytes();
    tally.rescinded_bytes.add(bytes);
}

/// The pages that a failure shows to be invalid already.
fn lost_pages(trouble: Trouble, at: &PageSet) -> PageSet {
    match trouble {
        Trouble::Contradiction => *at,
        Trouble::SizeMismatch | Trouble::Failed(_) => PageSet::EMPTY,
    }
}
