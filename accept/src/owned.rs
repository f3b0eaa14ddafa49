//! Pages that the guest lends to the paravisor: VMSAs and calling areas.
//!
//! A lent page is Owned until it is given back, so that no request can rescind it meanwhile. The
//! right to give it back is a value, [`Taken`], which only [`Engine::take`] and
//! [`Engine::adopt`] make: the map does not know who owns an Owned page.

use crate::backend::{Backend, Operation, Trouble};
use crate::block::{Block, Frame};
use crate::engine::{Engine, Error, Held};
use crate::pages::{PageSet, PageState};
use crate::sweep::{Grain, Stopped, sweep};

/// What a page is lent for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The paravisor relies on its content: the guest loses all access, and every stale
    /// translation is flushed before the paravisor may look at it.
    Vmsa,
    /// Guest and paravisor both write to it: the guest keeps its access.
    CallingArea,
}

/// A page that the guest has lent, and the right to give it back.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a page that is not given back stays Owned for ever"]
pub struct Taken {
    frame: Frame,
    role: Role,
}

impl Taken {
    /// The page.
    #[must_use]
    pub const fn frame(&self) -> Frame {
        self.frame
    }

    /// What it was lent for.
    #[must_use]
    pub const fn role(&self) -> Role {
        self.role
    }
}

/// A page that could not be given back; it is still Owned.
#[derive(Debug, PartialEq, Eq)]
pub struct NotReturned {
    /// The page, to try again when the error is [`Error::Busy`].
    pub taken: Taken,
    /// Why.
    pub error: Error,
}

impl<B: Backend> Engine<'_, B> {
    /// Takes an Accepted page from the guest for `role`.
    ///
    /// # Errors
    /// [`Error::Owned`], [`Error::NotAccepted`], [`Error::OutOfRange`], [`Error::Busy`], and
    /// [`Error::HostLied`] or [`Error::Backend`] when the guest's access could not be revoked. In
    /// all cases the page's state is what it was: a page that turns out to be invalid stays
    /// Accepted, because nobody has rescinded it. Were it recorded Unaccepted, the guest could
    /// have it validated a second time while the host keeps the first page back: the remap attack
    /// (I2).
    pub fn take(&self, frame: Frame, role: Role) -> Result<Taken, Error> {
        let block = Block::page(frame);
        let held = self.hold(block)?;
        let result = match held.state(frame) {
            PageState::Owned => Err(Error::Owned),
            PageState::Unaccepted | PageState::Ahead => Err(Error::NotAccepted),
            PageState::Accepted => self.take_held(&held, frame, role),
        };
        self.end(held);
        result?;
        let taken = Taken { frame, role };
        // The flush follows the unlock; the page is Owned by then, so nobody can get between. A
        // vCPU that may still write to the page through a stale translation could change what is
        // found good in it, its privilege level for instance: no flush, no page.
        if role == Role::Vmsa && self.backend.flush().is_err() {
            return match self.give_back(taken) {
                Ok(()) => Err(Error::Busy),
                // It stays Owned: the guest has lost a page, nobody has gained one.
                Err(NotReturned { error, .. }) => Err(error),
            };
        }
        Ok(taken)
    }

    fn take_held(&self, held: &Held<'_>, frame: Frame, role: Role) -> Result<(), Error> {
        let page = PageSet::single(frame.index_in_region());
        held.record(&page, PageState::Owned);
        if role == Role::CallingArea {
            return Ok(());
        }
        match self.adjust(held, &page, |block| self.backend.revoke(block)) {
            None => Ok(()),
            Some(stopped) => {
                held.record(&page, PageState::Accepted);
                Err(held.error(Operation::Revoke, stopped))
            }
        }
    }

    /// The right to give back a page that was Owned from the launch on, and lent for `role`: the
    /// first calling area, the guest's first VMSA.
    ///
    /// # Errors
    /// [`Error::NotAccepted`] unless the page is Owned; [`Error::OutOfRange`].
    pub fn adopt(&self, frame: Frame, role: Role) -> Result<Taken, Error> {
        match self.state(frame) {
            Some(PageState::Owned) => Ok(Taken { frame, role }),
            Some(_) => Err(Error::NotAccepted),
            None => Err(Error::OutOfRange),
        }
    }

    /// Gives a page back to the guest, with its content.
    ///
    /// # Errors
    /// [`NotReturned`] when the guest could not be granted access, or the lock could not be had;
    /// the page is then still Owned.
    pub fn give_back(&self, taken: Taken) -> Result<(), NotReturned> {
        let held = match self.hold(Block::page(taken.frame)) {
            Ok(held) => held,
            Err(error) => return Err(NotReturned { taken, error }),
        };
        let page = PageSet::single(taken.frame.index_in_region());
        if taken.role == Role::Vmsa
            && let Some(stopped) = self.adjust(&held, &page, |block| self.backend.grant(block))
        {
            let error = held.error(Operation::Grant, stopped);
            return Err(NotReturned { taken, error });
        }
        held.record(&page, PageState::Accepted);
        Ok(())
    }

    /// Runs `access` while `frame` is Accepted and certain to stay so: the region is locked.
    ///
    /// For the few bytes that the paravisor reads or writes on the guest's behalf. A test of
    /// [`Engine::state`] and then an access would not do: between the two, another vCPU could lend
    /// the page as a VMSA and have it inspected, and the access would then write into a VMSA that
    /// was found good. `access` must be short and must not call the engine.
    ///
    /// # Errors
    /// [`Error::Owned`], [`Error::NotAccepted`], [`Error::OutOfRange`] or [`Error::Busy`];
    /// `access` was then not run.
    pub fn while_accepted<T>(&self, frame: Frame, access: impl FnOnce() -> T) -> Result<T, Error> {
        let held = self.hold(Block::page(frame))?;
        match held.state(frame) {
            PageState::Accepted => Ok(access()),
            PageState::Owned => Err(Error::Owned),
            PageState::Unaccepted | PageState::Ahead => Err(Error::NotAccepted),
        }
    }

    /// One instruction on one small page.
    fn adjust<F: Into<Trouble>>(
        &self,
        held: &Held<'_>,
        page: &PageSet,
        instruction: impl Fn(Block) -> Result<(), F>,
    ) -> Option<Stopped> {
        debug_assert_eq!(page.len(), 1);
        sweep(
            held.region(),
            page,
            &mut Grain::Small,
            held.tally(),
            instruction,
        )
        .err()
    }
}
