//! Acceptance ahead of the guest: memory is validated and scrubbed before anybody asks.
//!
//! [`Engine::prepare_next`] is one step of a [`Walk`] that all vCPUs share: one region of 2 MiB, so
//! that who is doing this in its spare time is back within one step. What policy there is lies with
//! the caller: eager is all vCPUs walking to the end before the guest starts, ahead is the vCPUs
//! walking that the guest has not started yet.
//!
//! A walk visits each region once and takes only pages that are Unaccepted in regions of which the
//! guest never gave a page back (see `given_back`). Regions that stick out of their range are left
//! to requests.

use crate::backend::Backend;
use crate::block::{Block, Frame, PAGES_PER_REGION, PageSize};
use crate::engine::{Done, Engine, Error};
use crate::map::{Map, Range};
use crate::sync::{AtomicU64, Ordering};

/// The first region number above 4 GiB.
const ABOVE_4G: u64 = (1 << 32) / PageSize::Size2M.bytes();

/// Which memory is made ready first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// From address 0 up: for guests whose devices need memory below 4 GiB early.
    LowFirst,
    /// Memory above 4 GiB, then below: for guests whose firmware accepts low memory itself.
    HighFirst,
}

/// A walk over all memory, shared by everyone who takes part.
pub struct Walk {
    order: Order,
    /// Regions begun, in the walk's order.
    begun: AtomicU64,
    /// Bytes that may still be made ready.
    left: AtomicU64,
}

impl Walk {
    /// A walk that makes at most `budget` bytes ready, in whole steps of 2 MiB.
    #[must_use]
    pub const fn new(order: Order, budget: u64) -> Self {
        Self {
            order,
            begun: AtomicU64::new(0),
            left: AtomicU64::new(budget),
        }
    }

    /// Takes a step's bytes out of the budget.
    fn reserve(&self) -> bool {
        self.left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(PageSize::Size2M.bytes())
            })
            .is_ok()
    }

    /// The next region, or none at the end.
    fn next(&self, map: &Map<'_>) -> Option<Block> {
        // The test first keeps the count from wrapping however long it is asked.
        nth(map, self.order, self.begun.load(Ordering::Relaxed))?;
        nth(map, self.order, self.begun.fetch_add(1, Ordering::Relaxed))
    }
}

/// What one step of a [`Walk`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// This much of a region was made ready: nothing, where the guest was first.
    Done(Done),
    /// The walk is over: no region is left, or no budget.
    Over,
}

impl<B: Backend> Engine<'_, B> {
    /// Takes one step of `walk`. A region that another vCPU is at work on is passed over: that
    /// vCPU is doing what this step would do.
    ///
    /// # Errors
    /// [`Error::HostLied`] and [`Error::Backend`]; the walk may go on.
    pub fn prepare_next(&self, walk: &Walk) -> Result<Step, Error> {
        if !walk.reserve() {
            return Ok(Step::Over);
        }
        let step = walk.next(&self.map());
        self.spend(walk, step)
    }

    /// Makes the region of `block` ready out of the budget of `walk`, wherever that has come to: for
    /// the regions behind one that the guest has just asked for.
    ///
    /// # Errors
    /// Those of [`Engine::prepare_next`], and [`Error::OutOfRange`] unless all of the region is in
    /// one range.
    pub fn prepare_near(&self, walk: &Walk, block: Block) -> Result<Step, Error> {
        if !walk.reserve() {
            return Ok(Step::Over);
        }
        self.spend(walk, Some(Block::region_around(block.first())))
    }

    /// Leaves the region of `block` to requests, as if the guest had given back a page of it: for
    /// memory that the guest is known to share with the host without asking anybody.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless the block is in one range; [`Error::Busy`].
    pub fn leave_to_requests(&self, block: Block) -> Result<(), Error> {
        self.hold(block)?.remember_given_back();
        Ok(())
    }

    /// Does a step whose bytes are reserved, and puts back what it did not need.
    fn spend(&self, walk: &Walk, region: Option<Block>) -> Result<Step, Error> {
        let done = match region.map(|block| self.prepare(block)) {
            None => Ok(Step::Over),
            Some(Err(Error::Busy)) => Ok(Step::Done(Done::NOTHING)),
            Some(Ok(done)) => Ok(Step::Done(done)),
            Some(Err(error)) => Err(error),
        };
        let used = match done {
            Ok(Step::Done(done)) => done.scrubbed_bytes(),
            Ok(Step::Over) | Err(_) => 0,
        };
        let unused = PageSize::Size2M.bytes() - used;
        walk.left.fetch_add(unused, Ordering::Relaxed);
        done
    }

    /// The regions that a walk would visit, in its order.
    pub fn regions_of_walk(&self, order: Order) -> impl Iterator<Item = Block> {
        let map = self.map();
        (0..).map_while(move |index| nth(&map, order, index))
    }
}

/// The region at `index` of the walk, if there are so many.
fn nth(map: &Map<'_>, order: Order, index: u64) -> Option<Block> {
    let (low, high) = (0..ABOVE_4G, ABOVE_4G..u64::MAX);
    let zones = match order {
        Order::LowFirst => [low, high],
        Order::HighFirst => [high, low],
    };
    let mut rest = index;
    for zone in zones {
        for range in map.ranges() {
            let whole = whole_regions(range);
            let from = whole.start.max(zone.start);
            let count = whole.end.min(zone.end).saturating_sub(from);
            if rest < count {
                let first = Frame::try_new((from + rest) * PAGES_PER_REGION as u64)?;
                return Some(Block::region_around(first));
            }
            rest -= count;
        }
    }
    None
}

/// The numbers of the regions that lie wholly in the range.
fn whole_regions(range: &Range<'_>) -> core::ops::Range<u64> {
    let pages = PAGES_PER_REGION as u64;
    range.first().number().div_ceil(pages)..(range.last().number() + 1) / pages
}
