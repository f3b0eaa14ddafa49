//! The one loop that applies an instruction to a set of pages: as one 2 MiB page when it can, as
//! small pages when it must.

use crate::backend::Trouble;
use crate::block::{Block, Frame};
use crate::counters::Tally;
use crate::pages::PageSet;

/// The page size that is worth trying next on a region. A platform that holds the region as small
/// pages says so once per flow, not once per instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Grain {
    Large,
    Small,
}

/// What a sweep did.
pub(crate) struct Swept {
    /// The pages on which the instruction succeeded.
    pub(crate) done: PageSet,
    /// Why the sweep ended early, if it did.
    pub(crate) stopped: Option<Stopped>,
}

/// The end of a sweep before its time.
#[derive(Clone, Copy)]
pub(crate) struct Stopped {
    /// The pages that the failing instruction was asked for.
    pub(crate) at: PageSet,
    pub(crate) trouble: Trouble,
}

/// Applies `instruction` to `pages` of the region that starts at `region`, ascending, and stops at
/// the first failure.
pub(crate) fn sweep<F: Into<Trouble>>(
    region: Frame,
    pages: &PageSet,
    grain: &mut Grain,
    tally: &Tally,
    instruction: impl Fn(Block) -> Result<(), F>,
) -> Swept {
    if *grain == Grain::Large && pages.is_full() {
        match instruction(Block::region_around(region)).map_err(Into::into) {
            Ok(()) => {
                return Swept {
                    done: PageSet::FULL,
                    stopped: None,
                };
            }
            Err(Trouble::SizeMismatch) => {
                *grain = Grain::Small;
                tally.splits.add(1);
            }
            Err(trouble) => {
                return Swept {
                    done: PageSet::EMPTY,
                    stopped: Some(Stopped {
                        at: PageSet::FULL,
                        trouble,
                    }),
                };
            }
        }
    }
    for index in pages.indices() {
        if let Err(fault) = instruction(Block::page(region.at_index(index))) {
            let stopped = Stopped {
                at: PageSet::single(index),
                trouble: fault.into(),
            };
            return Swept {
                done: pages.below(index),
                stopped: Some(stopped),
            };
        }
    }
    Swept {
        done: *pages,
        stopped: None,
    }
}

/// As [`sweep`], but goes on after a failure, for cleaning up: returns the pages on which the
/// instruction succeeded, or on which `as_good` takes the trouble for success.
pub(crate) fn sweep_on<F: Into<Trouble>>(
    region: Frame,
    pages: &PageSet,
    mut grain: Grain,
    tally: &Tally,
    instruction: impl Fn(Block) -> Result<(), F>,
    as_good: impl Fn(Trouble) -> bool,
) -> PageSet {
    let mut rest = *pages;
    let mut done = PageSet::EMPTY;
    // Each round either finishes or removes at least the page it stopped at.
    while !rest.is_empty() {
        let swept = sweep(region, &rest, &mut grain, tally, &instruction);
        done = done.with(&swept.done);
        let Some(stopped) = swept.stopped else { break };
        if as_good(stopped.trouble) {
            done = done.with(&stopped.at);
        }
        rest = rest.without(&swept.done).without(&stopped.at);
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::AdjustFault;
    use crate::block::PageSize;
    use core::cell::RefCell;

    fn run(
        pages: &PageSet,
        grain: &mut Grain,
        answer: impl Fn(Block) -> Result<(), AdjustFault>,
    ) -> (Swept, Vec<(u64, PageSize)>) {
        let calls = RefCell::new(Vec::new());
        let region = Frame::containing(0x40_0000);
        let swept = sweep(region, pages, grain, &Tally::new(), |block: Block| {
            calls.borrow_mut().push((block.gpa(), block.size()));
            answer(block)
        });
        (swept, calls.into_inner())
    }

    #[test]
    fn a_whole_region_is_one_instruction() {
        let (swept, calls) = run(&PageSet::FULL, &mut Grain::Large, |_| Ok(()));
        assert!(swept.done.is_full() && swept.stopped.is_none());
        assert_eq!(calls, [(0x40_0000, PageSize::Size2M)]);
    }

    #[test]
    fn a_mismatch_is_asked_for_once() {
        let mut grain = Grain::Large;
        let (swept, calls) = run(&PageSet::FULL, &mut grain, |block| match block.size() {
            PageSize::Size2M => Err(AdjustFault::SizeMismatch),
            PageSize::Size4K => Ok(()),
        });
        assert!(swept.done.is_full() && grain == Grain::Small);
        assert_eq!(calls.len(), 513);
        let (_, calls) = run(&PageSet::FULL, &mut grain, |_| Ok(()));
        assert_eq!(calls.len(), 512);
    }

    #[test]
    fn a_partial_set_is_done_in_small_pages() {
        let (swept, calls) = run(&PageSet::span(3, 5), &mut Grain::Large, |_| Ok(()));
        assert_eq!(swept.done, PageSet::span(3, 5));
        assert_eq!(
            calls,
            [(0x40_3000, PageSize::Size4K), (0x40_4000, PageSize::Size4K)]
        );
    }

    #[test]
    fn i9_a_sweep_tells_where_it_stopped() {
        let (swept, _) = run(&PageSet::span(0, 9), &mut Grain::Large, |block| {
            if block.gpa() == 0x40_7000 {
                Err(AdjustFault::Failed(9))
            } else {
                Ok(())
            }
        });
        assert_eq!(swept.done, PageSet::span(0, 7));
        let stopped = swept.stopped.expect("stopped");
        assert_eq!(
            (stopped.at, stopped.trouble),
            (PageSet::single(7), Trouble::Failed(9))
        );
    }

    #[test]
    fn cleaning_up_goes_on_after_a_failure() {
        let done = sweep_on(
            Frame::containing(0),
            &PageSet::span(0, 6),
            Grain::Large,
            &Tally::new(),
            |block| match block.gpa() >> 12 {
                2 => Err(AdjustFault::Failed(1)),
                4 => Err(AdjustFault::NotValidated),
                _ => Ok(()),
            },
            |trouble| trouble == Trouble::Contradiction,
        );
        assert_eq!(done, PageSet::span(0, 6).without(&PageSet::single(2)));
    }
}
