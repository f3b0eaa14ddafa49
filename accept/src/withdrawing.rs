//! Withdrawing: the way out where only the host makes a page invalid (TDX).
//!
//! An instruction takes the guest's access, but the page stays valid until the host has removed it,
//! and no lock is held while the host is waited for (I12). Were the page Unaccepted meanwhile, another
//! vCPU could have it validated a second time before the host comes to it (I2); were it so that the
//! host comes to it only after that, it would remove a page that the map calls Accepted (I11). So the
//! way has two halves, and between them all of the block is Owned: nobody may touch it.

use crate::backend::Backend;
use crate::block::Block;
use crate::engine::{Engine, Error, FlushOwed, Held, OnNoChange};
use crate::pages::{PageSet, PageState};
use crate::rescinding::{Leaving, count_rescinded};
use crate::sweep::Grain;

/// A block on its way to the host, and the right to say what became of it. The guest has no access
/// to it any more, but vCPUs may still hold translations.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a block that is neither settled nor reinstated stays Owned for ever"]
pub struct Withdrawn {
    block: Block,
    leaving: Leaving,
}

impl Withdrawn {
    /// The block.
    #[must_use]
    pub const fn block(&self) -> Block {
        self.block
    }

    /// The flush that is owed before the host is asked, if the guest had any of the pages.
    #[must_use]
    pub fn flush(&self) -> Option<FlushOwed> {
        (!self.leaving.accepted.is_empty()).then_some(FlushOwed(()))
    }
}

impl<B: Backend> Engine<'_, B> {
    /// Takes `block` from the guest, so that the host may be asked to remove it: then
    /// [`Engine::settle`], or, if it was not asked, [`Engine::reinstate`].
    ///
    /// # Errors
    /// Those of [`Engine::rescind`](Engine::rescind).
    pub fn withdraw(&self, block: Block, on_no_change: OnNoChange) -> Result<Withdrawn, Error> {
        let held = self.hold(block)?;
        let result = self.withdraw_held(&held, block, on_no_change);
        self.end(held);
        Ok(Withdrawn {
            block,
            leaving: result?,
        })
    }

    fn withdraw_held(
        &self,
        held: &Held<'_>,
        block: Block,
        on_no_change: OnNoChange,
    ) -> Result<Leaving, Error> {
        let leaving = self.leaving(held, block, on_no_change)?;
        let asked = PageSet::of(block);
        held.record(&asked, PageState::Owned);
        let taken = self.take_access(held, &leaving, &mut Grain::Large);
        if let Err(error) = taken {
            held.record(&asked.without(&leaving.all()), PageState::Unaccepted);
            return Err(error);
        }
        Ok(leaving)
    }

    /// The host says that it has removed the pages: from now on they can be accepted anew. One that
    /// says so and has not is found out by that.
    ///
    /// Returns the block, still Owned, when its lock could not be had: try again.
    #[must_use = "a block that comes back is not settled"]
    pub fn settle(&self, withdrawn: Withdrawn) -> Option<Withdrawn> {
        let Withdrawn { block, leaving } = withdrawn;
        let Ok(held) = self.hold(block) else {
            return Some(Withdrawn { block, leaving });
        };
        held.record(&PageSet::of(block), PageState::Unaccepted);
        if !leaving.all().is_empty() {
            count_rescinded(held.tally(), block, &leaving);
        }
        None
    }

    /// The host was not asked, so that the pages are what they were: the guest's again. A page that
    /// cannot be granted any more stays Owned.
    ///
    /// Returns the block as [`Engine::settle`] does.
    #[must_use = "a block that comes back is not reinstated"]
    pub fn reinstate(&self, withdrawn: Withdrawn) -> Option<Withdrawn> {
        let Withdrawn { block, leaving } = withdrawn;
        let Ok(held) = self.hold(block) else {
            return Some(Withdrawn { block, leaving });
        };
        let untouched = PageSet::of(block).without(&leaving.all());
        held.record(&untouched, PageState::Unaccepted);
        let nothing = PageSet::EMPTY;
        self.restore(&held, &leaving, &nothing, &leaving.accepted, Grain::Large);
        None
    }
}
