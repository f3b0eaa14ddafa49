//! Acceptance before the guest asks: how far it has come, and who goes on with it.
//!
//! One [`Walk`] is shared by all processors. Who takes steps of it is decided by the policy that
//! was measured with the image:
//!
//! - eager: all processors, until the walk is over; the guest starts after that;
//! - ahead: the processors that have nothing of the guest's to run, while it runs on the others.
//!   They look after each step whether that is still so: whether there is a VMSA to run
//!   ([`crate::requests`]), or in a trust domain whether there is an interrupt to end the guest's
//!   HLT (`crate::tdx`);
//! - lazy: nobody.
//!
//! A request for 2 MiB may prepare the regions behind it (read-ahead), out of the same budget and
//! out of the work that one call may do.
//!
//! A step holds its region's lock for one region's work and asks the host for nothing meanwhile:
//! the host was told that the memory is private before the guest existed.

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use accept::{Backend, Block, Engine, Error, Order, PAGES_PER_REGION, Step, Walk};
use protocols::launch::{AcceptOrder, Acceptance};

/// What is prepared ahead, and how far that has come.
pub struct Ahead {
    acceptance: Acceptance,
    /// Bytes that may be prepared in all.
    budget: u64,
    walk: Walk,
    /// Steps that were begun and are not ended.
    at_work: AtomicUsize,
    /// Regions that an instruction failed on. They are left to requests.
    failed: AtomicU64,
}

/// The host lied about a page's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostLied;

impl Ahead {
    /// A walk that has not begun, where `memory` bytes have a state. `acceptance` was checked.
    #[must_use]
    pub const fn new(acceptance: Acceptance, memory: u64) -> Self {
        let budget = acceptance.budget.bytes_of(memory);
        Self {
            acceptance,
            budget,
            walk: Walk::new(order_of(acceptance), budget),
            at_work: AtomicUsize::new(0),
            failed: AtomicU64::new(0),
        }
    }

    /// The policy, and what belongs to it.
    #[must_use]
    pub const fn acceptance(&self) -> Acceptance {
        self.acceptance
    }

    /// Bytes that may be prepared in all.
    #[must_use]
    pub const fn budget(&self) -> u64 {
        self.budget
    }

    /// In which order regions are prepared.
    #[must_use]
    pub const fn order(&self) -> Order {
        order_of(self.acceptance)
    }

    /// Takes one step; false when there is none to take any more.
    ///
    /// # Errors
    /// [`HostLied`].
    pub fn step<B: Backend>(&self, engine: &Engine<'_, B>) -> Result<bool, HostLied> {
        if self.acceptance.is_lazy() {
            return Ok(false);
        }
        self.at_work.fetch_add(1, Ordering::SeqCst);
        let done = engine.prepare_next(&self.walk);
        self.at_work.fetch_sub(1, Ordering::SeqCst);
        match done {
            Ok(Step::Done(_)) => Ok(true),
            Ok(Step::Over) => Ok(false),
            Err(Error::HostLied) => Err(HostLied),
            // The walk does not come back to the region, so this happens a bounded number of times.
            Err(_) => {
                self.failed.fetch_add(1, Ordering::Relaxed);
                Ok(true)
            }
        }
    }

    /// Takes steps as long as there are any and nobody wants the processor, which is asked before
    /// each of them. Whether somebody does.
    ///
    /// # Errors
    /// [`HostLied`].
    pub fn steps_until_wanted<B: Backend>(
        &self,
        engine: &Engine<'_, B>,
        mut is_wanted: impl FnMut() -> bool,
    ) -> Result<bool, HostLied> {
        while !is_wanted() {
            if !self.step(engine)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether nobody is in the middle of a step.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.at_work.load(Ordering::SeqCst) == 0
    }

    /// Prepares the regions behind `block`, which the guest has just got, as long as that takes no
    /// more than `room` bytes of work. Returns the bytes.
    ///
    /// # Errors
    /// [`HostLied`].
    pub fn prepare_behind<B: Backend>(
        &self,
        engine: &Engine<'_, B>,
        block: Block,
        room: u64,
    ) -> Result<u64, HostLied> {
        let mut work = 0;
        let own = Block::region_around(block.first());
        for distance in 1..=u64::from(self.acceptance.read_ahead) {
            let next = own.first().checked_add(distance * PAGES_PER_REGION as u64);
            let Some(next) = next.filter(|_| work + own.size().bytes() <= room) else {
                break;
            };
            match engine.prepare_near(&self.walk, Block::region_around(next)) {
                Ok(Step::Done(done)) => work += done.scrubbed_bytes(),
                Err(Error::HostLied) => return Err(HostLied),
                // No budget, no memory there, or an instruction failed: it was a favour.
                Ok(Step::Over) | Err(_) => break,
            }
        }
        Ok(work)
    }

    /// Regions that could not be prepared because an instruction failed.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }
}

const fn order_of(acceptance: Acceptance) -> Order {
    match acceptance.order {
        AcceptOrder::HIGH_FIRST => Order::HighFirst,
        _ => Order::LowFirst,
    }
}
