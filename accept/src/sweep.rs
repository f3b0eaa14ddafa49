//! The one loop that applies an instruction to a set of pages: as one 2 MiB page when it can, as
//! small pages when it must.

use crate::backend::{Broken, Run, Trouble};
use crate::block::{Block, Frame};
use crate::counters::Tally;
use crate::pages::PageSet;
use crate::shape::Pages;

/// The page size that is worth trying next on a region. A platform that holds the region as small
/// pages says so once per flow, not once per instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Grain {
    Large,
    Small,
}

/// The end of a sweep before its time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stopped {
    /// The index of the small page that failed; none if it was the whole region as one page.
    index: Option<usize>,
    pub(crate) trouble: Trouble,
}

impl Stopped {
    /// The pages that the failing instruction was asked for.
    pub(crate) fn at(&self) -> PageSet {
        self.index.map_or(PageSet::FULL, PageSet::single)
    }

    /// The pages of the sweep, `pages`, on which the instruction succeeded.
    pub(crate) fn done(&self, pages: &impl Pages) -> PageSet {
        self.index
            .map_or(PageSet::EMPTY, |index| pages.to_set().below(index))
    }
}

/// Applies `instruction` to `pages` of the region that starts at `region`, ascending, and stops at
/// the first failure. After success it was done on all of them.
#[inline]
pub(crate) fn sweep<F: Into<Trouble>>(
    region: Frame,
    pages: &impl Pages,
    grain: &mut Grain,
    tally: &Tally,
    instruction: impl Fn(Block) -> Result<(), F>,
) -> Result<(), Stopped> {
    let small = |run: Run| run.page_by_page(&instruction);
    sweep_runs(region, pages, grain, tally, &instruction, small)
}

/// As [`sweep`], with an instruction for runs of small pages.
#[inline]
pub(crate) fn sweep_runs<F: Into<Trouble>>(
    region: Frame,
    pages: &impl Pages,
    grain: &mut Grain,
    tally: &Tally,
    instruction: impl Fn(Block) -> Result<(), F>,
    small: impl Fn(Run) -> Result<(), Broken<F>>,
) -> Result<(), Stopped> {
    if *grain == Grain::Large && pages.is_full() {
        match instruction(Block::region_around(region)).map_err(Into::into) {
            Ok(()) => return Ok(()),
            Err(Trouble::SizeMismatch) => {
                *grain = Grain::Small;
                tally.splits.add(1);
            }
            Err(trouble) => {
                return Err(Stopped {
                    index: None,
                    trouble,
                });
            }
        }
    }
    for run in pages.runs() {
        if let Err(broken) = small(Run::new(region.at_index(run.start), run.len())) {
            // A platform that says it did more pages than there are did all but the last.
            let index = run.start + broken.done.min(run.len() - 1);
            return Err(Stopped {
                index: Some(index),
                trouble: broken.fault.into(),
            });
        }
    }
    Ok(())
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
        let Err(stopped) = sweep(region, &rest, &mut grain, tally, &instruction) else {
            return done.with(&rest);
        };
        let finished = stopped.done(&rest);
        done = done.with(&finished);
        if as_good(stopped.trouble) {
            done = done.with(&stopped.at());
        }
        rest = rest.without(&finished).without(&stopped.at());
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
    ) -> (Result<(), Stopped>, Vec<(u64, PageSize)>) {
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
        assert!(swept.is_ok());
        assert_eq!(calls, [(0x40_0000, PageSize::Size2M)]);
    }

    #[test]
    fn a_mismatch_is_asked_for_once() {
        let mut grain = Grain::Large;
        let (swept, calls) = run(&PageSet::FULL, &mut grain, |block| match block.size() {
            PageSize::Size2M => Err(AdjustFault::SizeMismatch),
            PageSize::Size4K => Ok(()),
        });
        assert!(swept.is_ok() && grain == Grain::Small);
        assert_eq!(calls.len(), 513);
        let (_, calls) = run(&PageSet::FULL, &mut grain, |_| Ok(()));
        assert_eq!(calls.len(), 512);
    }

    #[test]
    fn a_partial_set_is_done_in_small_pages() {
        let (swept, calls) = run(&PageSet::span(3, 5), &mut Grain::Large, |_| Ok(()));
        assert!(swept.is_ok());
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
        let stopped = swept.expect_err("stopped");
        assert_eq!(stopped.done(&PageSet::span(0, 9)), PageSet::span(0, 7));
        assert_eq!(
            (stopped.at(), stopped.trouble),
            (PageSet::single(7), Trouble::Failed(9))
        );
    }

    #[test]
    fn i9_a_run_that_breaks_is_told_by_its_page() {
        let gaps = PageSet::span(0, 4).with(&PageSet::span(10, 14));
        for (lie, expected) in [(2, 12), (4, 13), (usize::MAX, 13)] {
            let swept = sweep_runs(
                Frame::containing(0),
                &gaps,
                &mut Grain::Large,
                &Tally::new(),
                |_| -> Result<(), AdjustFault> { panic!("a large page") },
                |run| {
                    assert_eq!(run.pages(), 4);
                    match run.first().number() {
                        0 => Ok(()),
                        _ => Err(Broken {
                            done: lie,
                            fault: AdjustFault::Failed(9),
                        }),
                    }
                },
            );
            let stopped = swept.expect_err("stopped");
            assert_eq!(stopped.at(), PageSet::single(expected));
            assert_eq!(stopped.done(&gaps), gaps.below(expected));
        }
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
