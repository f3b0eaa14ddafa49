//! The engine's flows over all memory, with what each has to leave behind.
//!
//! ```text
//! accept -> zero? -> ask again -> mark -> marks there? -> rescind -> accept -> zero? -> compare
//! ```
//!
//! Every page of memory that is nobody's yet goes through all of it, in 2 MiB blocks where it has
//! whole ones. The marks tell pages apart (two addresses of one page would show) and outlive the
//! rescind, so only the scrub of the second acceptance can make the pages zero again.

use accept::{Backend, Block, Engine, Error, Frame, OnNoChange, PageSize, PageState};
use log::{error, info};
use protocols::addr::{Gpa, PAGE_SIZE, PAGES_PER_LARGE_PAGE};
use protocols::terminate::TurnstileReason;

use crate::memory::layout::PageRange;
use crate::platform::AccessFault;
use crate::platform::native::table::{Counts, Table};

/// Access to the memory that is being accepted.
pub trait Memory {
    /// Whether all bytes of the pages are zero.
    ///
    /// # Errors
    /// The fault.
    fn is_zero(&self, pages: PageRange) -> Result<bool, AccessFault>;

    /// Writes into the page what no other page holds.
    ///
    /// # Errors
    /// The fault.
    fn mark(&self, page: Gpa) -> Result<(), AccessFault>;

    /// Whether the page holds that.
    ///
    /// # Errors
    /// The fault.
    fn is_marked(&self, page: Gpa) -> Result<bool, AccessFault>;
}

/// All that takes part.
pub struct Rounds<'a, 'm, B, M> {
    /// The engine, which knows what is Owned and what is Accepted from the launch.
    pub engine: &'a Engine<'m, B>,
    /// The hardware's side of it.
    pub table: &'a Table<'m>,
    /// The memory.
    pub memory: M,
    /// What is to be accepted: all memory that is nobody's. Ascending.
    pub pages: &'a [PageRange],
}

/// What the rounds saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Pages that were accepted, twice each.
    pub pages: u64,
    /// Requests that were answered with "no change".
    pub repeated: u64,
    /// What the simulated processor was asked.
    pub counts: Counts,
}

/// A check that failed; what it was is in the log.
type Checked<T> = Result<T, TurnstileReason>;

impl<B: Backend, M: Memory> Rounds<'_, '_, B, M> {
    /// Runs all of it.
    ///
    /// # Errors
    /// [`TurnstileReason::NATIVE_CHECK`] at the first thing that is not as it has to be.
    pub fn run(&self) -> Checked<Summary> {
        let all: u64 = self.pages.iter().map(|pages| pages.pages()).sum();
        self.accept(all)?;
        self.expect_zero()?;
        info!(
            "accepted {all} pages, all zero: {}",
            Asked(self.table.counts())
        );

        let repeated = self.ask_again()?;
        info!("asked again: {repeated} requests, 0 validations");

        self.for_each_page(|page| self.memory.mark(page).map(|()| true), "written")?;
        self.for_each_page(|page| self.memory.is_marked(page), "as written")?;
        self.rescind(all)?;
        self.expect_state(PageState::Unaccepted)?;
        self.for_each_page(|page| self.memory.is_marked(page), "still as written")?;
        info!("wrote, compared and rescinded {all} pages");

        self.accept(all)?;
        self.expect_zero()?;
        self.expect_state(PageState::Accepted)?;
        info!("accepted again {all} pages, all zero");

        let counts = self.table.counts();
        let disagreements = self.compare();
        info!(
            "census: {}, double validations {}, violations {}, disagreements {disagreements}",
            Asked(counts),
            counts.double_validations,
            counts.violations()
        );
        if disagreements != 0 || counts.violations() != 0 || self.engine.counters().host_lies != 0 {
            return fail("map and table agree, and nothing forbidden was done");
        }
        Ok(Summary {
            pages: all,
            repeated,
            counts,
        })
    }

    fn blocks(&self) -> impl Iterator<Item = Block> {
        self.pages.iter().flat_map(|pages| blocks(*pages))
    }

    fn accept(&self, all: u64) -> Checked<()> {
        let mut changed = 0;
        for block in self.blocks() {
            match self.engine.accept(block, OnNoChange::Fail) {
                Ok(done) => changed += u64::from(done.changed_pages),
                Err(error) => return refused("accept", block, error),
            }
        }
        expect(changed == all, "every page was accepted")
    }

    /// I2: a second request executes nothing.
    fn ask_again(&self) -> Checked<u64> {
        let before = self.table.counts();
        let mut repeated = 0;
        for block in self.blocks() {
            match self.engine.accept(block, OnNoChange::Fail) {
                Err(Error::NoChange) => repeated += 1,
                Ok(_) => return fail("nothing is accepted twice"),
                Err(error) => return refused("accept again", block, error),
            }
        }
        expect(
            before == self.table.counts(),
            "a repeated request executes nothing",
        )?;
        Ok(repeated)
    }

    fn rescind(&self, all: u64) -> Checked<()> {
        let mut changed = 0;
        let mut owed = None;
        for block in self.blocks() {
            match self.engine.rescind(block, OnNoChange::Fail) {
                Ok(rescinded) => {
                    changed += u64::from(rescinded.changed_pages);
                    owed = rescinded.flush.or(owed);
                }
                Err(error) => return refused("rescind", block, error),
            }
        }
        if let Some(owed) = owed
            && self.engine.flush(owed).is_err()
        {
            return fail("the flush is certain: there is one processor");
        }
        expect(changed == all, "every page was rescinded")
    }

    fn expect_zero(&self) -> Checked<()> {
        for block in self.blocks() {
            let first = block.first().number();
            let pages = PageRange::try_from_frames(first, first + block.size().pages())
                .ok_or(TurnstileReason::INTERNAL)?;
            match self.memory.is_zero(pages) {
                Ok(true) => {}
                Ok(false) => return fail_at("zero", pages.start()),
                Err(fault) => return faulted(pages.start(), fault),
            }
        }
        Ok(())
    }

    fn expect_state(&self, state: PageState) -> Checked<()> {
        let is = |page: Gpa| self.engine.state(Frame::containing(page.get())) == Some(state);
        self.for_each_page(|page| Ok(is(page)), "in the state that was asked for")
    }

    fn for_each_page(
        &self,
        look: impl Fn(Gpa) -> Result<bool, AccessFault>,
        what: &str,
    ) -> Checked<()> {
        for page in self.pages.iter().flat_map(|pages| pages.frames()) {
            match look(page) {
                Ok(true) => {}
                Ok(false) => return fail_at(what, page),
                Err(fault) => return faulted(page, fault),
            }
        }
        Ok(())
    }

    /// I11: pages on which the map and the table disagree, of all that have a state.
    fn compare(&self) -> u64 {
        let ranges = self.engine.map();
        let frames = ranges
            .ranges()
            .iter()
            .flat_map(|range| range.first().number()..=range.last().number());
        let agree = |number: u64| {
            let page = Gpa::from_frame_truncating(number);
            let entry = self.table.entry(page);
            match self.engine.state(Frame::containing(page.get())) {
                Some(PageState::Accepted) => entry == (true, true),
                Some(PageState::Owned | PageState::Ahead) => entry == (true, false),
                Some(PageState::Unaccepted) => entry == (false, false),
                None => false,
            }
        };
        frames.filter(|&number| !agree(number)).count() as u64
    }
}

/// The pages as blocks: whole regions, and single pages before and behind.
fn blocks(pages: PageRange) -> impl Iterator<Item = Block> {
    let mut next = pages.start_frame();
    core::iter::from_fn(move || {
        let left = pages.end_frame() - next;
        let frame = (left != 0).then(|| Frame::try_new(next))??;
        let block = if left >= PAGES_PER_LARGE_PAGE {
            Block::try_new(frame, PageSize::Size2M).unwrap_or(Block::page(frame))
        } else {
            Block::page(frame)
        };
        next += block.size().pages();
        Some(block)
    })
}

/// The counts as the log shows them.
struct Asked(Counts);

impl core::fmt::Display for Asked {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let Counts {
            validated_2m,
            validated_4k,
            rescinded_2m,
            rescinded_4k,
            mismatches,
            ..
        } = self.0;
        write!(
            f,
            "validated {validated_2m} x 2 MiB and {validated_4k} x 4 KiB, rescinded {rescinded_2m} \
             and {rescinded_4k}, {mismatches} size mismatches"
        )
    }
}

fn expect(held: bool, what: &str) -> Checked<()> {
    if held { Ok(()) } else { fail(what) }
}

fn fail<T>(what: &str) -> Checked<T> {
    error!("expected: {what}");
    Err(TurnstileReason::NATIVE_CHECK)
}

fn fail_at<T>(what: &str, page: Gpa) -> Checked<T> {
    error!("page {page:#x}: expected it {what}");
    Err(TurnstileReason::NATIVE_CHECK)
}

fn faulted<T>(page: Gpa, fault: AccessFault) -> Checked<T> {
    error!(
        "page {page:#x}: exception {} code {:#x}",
        fault.vector, fault.code
    );
    Err(TurnstileReason::NATIVE_CHECK)
}

fn refused<T>(what: &str, block: Block, error: Error) -> Checked<T> {
    error!(
        "{what} of {:#x} + {:#x}: {error:?}",
        block.gpa(),
        block.size().bytes()
    );
    Err(TurnstileReason::NATIVE_CHECK)
}

const _: () = assert!(PAGE_SIZE == PageSize::Size4K.bytes());

#[cfg(test)]
mod tests;
