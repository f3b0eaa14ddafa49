//! Accepting: validate, scrub, grant, record (I3).
//!
//! The steps are phases over the whole block, not a loop over its pages: the scrub can then be one
//! fill of 2 MiB even when the platform holds small pages, and a failure in an early phase has
//! nothing to take back from the guest.

use crate::backend::{Backend, Operation, Trouble};
use crate::block::{Block, Frame, PageSize};
use crate::engine::{Done, Engine, Error, Held, OnNoChange};
use crate::pages::{PageSet, PageState};
use crate::shape::{OnePage, Pages, WholeRegion};
use crate::sweep::{Grain, Stopped, sweep, sweep_on, sweep_runs};

/// What becomes of the pages.
#[derive(Clone, Copy, PartialEq, Eq)]
enum For {
    /// Granted to the guest and recorded Accepted.
    Guest,
    /// Not granted; recorded Ahead.
    Later,
}

impl<B: Backend> Engine<'_, B> {
    /// Accepts `block` for the guest. Pages that were made ready ahead are granted without a
    /// validating instruction: to the guest they are as new as the others.
    ///
    /// # Errors
    /// [`Error::Owned`] if any page of the block is; else, with [`OnNoChange::Fail`],
    /// [`Error::NoChange`] if any page is already accepted; and the others of [`Error`] except
    /// [`Error::NotAccepted`].
    pub fn accept(&self, block: Block, on_no_change: OnNoChange) -> Result<Done, Error> {
        let glance = self.look(block)?;
        if let Some(answer) = glance.answer(on_no_change) {
            return answer;
        }
        let held = self.hold_seen(glance)?;
        match self.accept_usual(&held, block) {
            Some(result) => {
                self.end(held);
                result
            }
            None => {
                let result = self.accept_mixed(&held, block, on_no_change);
                self.end(held);
                result
            }
        }
    }

    /// Accepts for the guest what it has touched without asking: all of the region around `frame`, but
    /// for what it has already. Where it ever gave back a page of the region, `frame` alone: guest and
    /// host may be sharing the others.
    ///
    /// # Errors
    /// Those of [`Engine::accept`], except [`Error::NoChange`]; of the whole region, or of `frame` where
    /// that is all there is.
    pub fn accept_around(&self, frame: Frame) -> Result<Done, Error> {
        let region = Block::region_around(frame);
        let held = self.hold(region)?;
        let block = if held.maybe_given_back() {
            Block::page(frame)
        } else {
            region
        };
        let result = self
            .accept_usual(&held, block)
            .unwrap_or_else(|| self.accept_mixed(&held, block, OnNoChange::Ignore));
        self.end(held);
        result
    }

    /// Makes the Unaccepted pages of `block` ready before the guest asks for them: validated and
    /// zero, state [`PageState::Ahead`]. Pages in another state are left alone, and so is all of a
    /// region of which the guest ever gave a page back: guest and host may be sharing memory there.
    ///
    /// # Errors
    /// Those of [`Engine::accept`], except [`Error::Owned`] and [`Error::NoChange`].
    pub fn prepare(&self, block: Block) -> Result<Done, Error> {
        let held = self.hold(block)?;
        if held.maybe_given_back() {
            return Ok(Done::NOTHING);
        }
        let asked = PageSet::of(block);
        let states = held.states(&asked);
        let fresh = asked
            .without(&states.ahead)
            .without(&states.accepted)
            .without(&states.owned);
        let result = self.bring_in(&held, &fresh, None, For::Later);
        self.end(held);
        result
    }

    /// The test under the lock, and the work, if it finds what nearly every request finds: nobody
    /// has anything of the block.
    #[inline]
    pub(crate) fn accept_usual(
        &self,
        held: &Held<'_>,
        block: Block,
    ) -> Option<Result<Done, Error>> {
        match block.size() {
            PageSize::Size4K if held.state(block.first()) == PageState::Unaccepted => {
                let page = OnePage(block.first().index_in_region());
                Some(self.accept_pages(held, block, &page, None))
            }
            PageSize::Size2M if held.is_unaccepted() => {
                Some(self.accept_pages(held, block, &WholeRegion, None))
            }
            _ => None,
        }
    }

    /// The same where somebody has some of it: kept apart, for the sets of pages that it works with
    /// would be in the way of the usual case.
    #[inline(never)]
    pub(crate) fn accept_mixed(
        &self,
        held: &Held<'_>,
        block: Block,
        on_no_change: OnNoChange,
    ) -> Result<Done, Error> {
        let asked = PageSet::of(block);
        let states = held.states(&asked);
        if !states.owned.is_empty() {
            return Err(Error::Owned);
        }
        let accepted = states.accepted;
        if on_no_change == OnNoChange::Fail && !accepted.is_empty() {
            return Err(Error::NoChange);
        }
        let ready = states.ahead;
        let fresh = asked.without(&accepted).without(&ready);
        if fresh.is_empty() && ready.is_empty() {
            return Ok(Done::NOTHING);
        }
        let ready = (!ready.is_empty()).then_some(&ready);
        self.accept_pages(held, block, &fresh, ready)
    }

    /// The work, and what is counted of it.
    fn accept_pages(
        &self,
        held: &Held<'_>,
        block: Block,
        fresh: &impl Pages,
        ready: Option<&PageSet>,
    ) -> Result<Done, Error> {
        let done = self.bring_in(held, fresh, ready, For::Guest)?;
        match block.size() {
            PageSize::Size4K => held.tally().accepted_4k.add(1),
            PageSize::Size2M => {
                let page = PageSize::Size4K.bytes();
                held.tally().accepted_2m.add(1);
                held.tally()
                    .accepted_2m_bytes
                    .add(u64::from(done.changed_pages) * page);
            }
        }
        if let Some(ready) = ready {
            held.tally().claimed_bytes.add(ready.bytes());
        }
        Ok(done)
    }

    /// The phases: `fresh` pages are validated and scrubbed; they and the `ready` ones are granted
    /// if they are for the guest; then all are recorded.
    fn bring_in(
        &self,
        held: &Held<'_>,
        fresh: &impl Pages,
        ready: Option<&PageSet>,
        destination: For,
    ) -> Result<Done, Error> {
        let (region, tally) = (held.region(), held.tally());
        let mut grain = Grain::Large;

        let validated = sweep_runs(
            region,
            fresh,
            &mut grain,
            tally,
            |block| self.backend.validate(block),
            |run| self.backend.validate_run(run),
        );
        if let Err(stopped) = validated {
            self.take_back(held, &stopped.done(fresh), &PageSet::EMPTY, grain);
            self.expel(held, stopped, grain);
            return Err(held.error(Operation::Validate, stopped));
        }

        // Memory is filled alike whatever page size the platform holds it in.
        let scrubbed = sweep(region, fresh, &mut Grain::Large, tally, |block| {
            self.backend.scrub(block)
        });
        if let Err(stopped) = scrubbed {
            self.take_back(held, &fresh.to_set(), &PageSet::EMPTY, grain);
            return Err(held.error(Operation::Scrub, stopped));
        }

        match (destination, ready) {
            (For::Later, _) => {
                held.record(fresh, PageState::Ahead);
                let done = Done {
                    scrubbed_pages: fresh.len(),
                    changed_pages: fresh.len(),
                };
                tally.prepared_bytes.add(done.scrubbed_bytes());
                Ok(done)
            }
            (For::Guest, None) => self.hand_over(held, fresh, fresh, grain),
            (For::Guest, Some(ready)) => {
                let all = fresh.to_set().with(ready);
                self.hand_over(held, &all, fresh, grain)
            }
        }
    }

    /// The last phases of what is for the guest: `all` pages, of which `fresh` were just scrubbed,
    /// are granted and recorded.
    fn hand_over(
        &self,
        held: &Held<'_>,
        all: &impl Pages,
        fresh: &impl Pages,
        mut grain: Grain,
    ) -> Result<Done, Error> {
        let granted = sweep_runs(
            held.region(),
            all,
            &mut grain,
            held.tally(),
            |block| self.backend.grant(block),
            |run| self.backend.grant_run(run),
        );
        if let Err(stopped) = granted {
            // A page that was ready and not yet granted stays ready.
            let granted = stopped.done(all);
            let ours = fresh.to_set().with(&granted);
            self.take_back(held, &ours, &granted, grain);
            if !granted.is_empty() {
                held.owe_flush();
            }
            return Err(held.error(Operation::Grant, stopped));
        }
        held.record(all, PageState::Accepted);
        Ok(Done {
            scrubbed_pages: fresh.len(),
            changed_pages: all.len(),
        })
    }

    /// Undoes an accept that failed half-way: `valid` pages become Unaccepted again, `granted`
    /// being those of them that the guest already has.
    ///
    /// Where the platform refuses even that, I9 asks for the truth: a page that stays granted is
    /// Accepted (it was scrubbed before), a page that stays valid is Owned, so that nobody gets it
    /// unscrubbed and nobody validates it again. Where only the host could make the pages invalid,
    /// they are what pages that nobody has claimed are: ready, unless the guest could write to them.
    fn take_back(&self, held: &Held<'_>, valid: &PageSet, granted: &PageSet, grain: Grain) {
        let (region, tally) = (held.region(), held.tally());
        let not_valid = |trouble| trouble == Trouble::Contradiction;
        let revoked = sweep_on(
            region,
            granted,
            grain,
            tally,
            |block| self.backend.revoke(block),
            not_valid,
        );
        let kept = granted.without(&revoked);
        let leaving = valid.without(&kept);
        held.record(&kept, PageState::Accepted);
        if B::HOST_REMOVES {
            held.record(&leaving.without(granted), PageState::Ahead);
            held.record(&leaving.and(granted), PageState::Owned);
            return;
        }
        let gone = sweep_on(
            region,
            &leaving,
            grain,
            tally,
            |block| self.backend.rescind(block),
            not_valid,
        );
        held.record(&gone, PageState::Unaccepted);
        held.record(&leaving.without(&gone), PageState::Owned);
    }

    /// Puts out pages that turned out to be valid although the map says Unaccepted (I5).
    ///
    /// The attack: the host once let the guest validate page X at this address, later put Y there,
    /// had the guest give "the page" back, which invalidated Y, and now presents X again: valid,
    /// with the guest's old permissions and contents. To call that success would hand out stale
    /// data; to leave it would let the guest reach memory that the map calls Unaccepted. So X loses
    /// its permissions and its validity, and the map is true again.
    fn expel(&self, held: &Held<'_>, stopped: Stopped, grain: Grain) {
        if stopped.trouble != Trouble::Contradiction {
            return;
        }
        let (region, tally) = (held.region(), held.tally());
        let not_valid = |trouble| trouble == Trouble::Contradiction;
        // Failure to revoke makes no difference to what follows.
        sweep_on(
            region,
            &stopped.at(),
            grain,
            tally,
            |b| self.backend.revoke(b),
            not_valid,
        );
        let gone = if B::HOST_REMOVES {
            // It stays valid, with a content that nobody knows.
            PageSet::EMPTY
        } else {
            sweep_on(
                region,
                &stopped.at(),
                grain,
                tally,
                |b| self.backend.rescind(b),
                not_valid,
            )
        };
        held.record(&stopped.at().without(&gone), PageState::Owned);
        held.owe_flush();
    }
}
