//! Two processors of the guest that ask at once (design.md I1, I2, I11).
//!
//! The second waits for jobs. While either waits for the other it goes on leaving the guest, by a leaf
//! that L1 answers alone: a conversion waits until every other processor has been outside.

use core::sync::atomic::{AtomicU64, Ordering};

use guest::harness::{Case, Finding, Verdict, case, expect};
use guest::memory::{self, page_of, private};
use guest::oracle;
use guest::tdcall::{accept, expect_accept, map_gpa, vm_rd};
use protocols::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE, PageSize};
use protocols::oracle::Counter;
use protocols::tdx::metadata::FieldId;
use protocols::tdx::vmcall::Status as HostStatus;
use protocols::tdx::{Operand, Status, page_operand};

use crate::second::{self, work};

/// The first one wakes the second processor, the last one sends it back to sleep.
pub const CASES: &[Case] = &[
    case("the_second_wakes", "", wake),
    case("one_page_for_both", "design.md I1, I2", one_page_for_both),
    case("one_region_in_two_sizes", "design.md I1, I2", two_sizes),
    case(
        "accept_against_share",
        "design.md I2, I11",
        accept_against_share,
    ),
    case("share_against_share", "design.md I11", share_against_share),
    case("neighbours_accept_and_share", "design.md §6", neighbours),
    case("the_second_sleeps", "", sleep),
];

const SHARED: u64 = 1 << 47;
const SMALL: PageSize = PageSize::Size4K;
const LARGE: PageSize = PageSize::Size2M;
/// A page in the middle of a region.
const INSIDE: u64 = 7;
const REFUSED: u64 = Operand::RCX.invalid();
/// How often one waits for the other, in exits.
const PATIENCE: u32 = 10_000_000;
/// How often a conversion is asked for that has to be asked for again.
const RETRIES: u32 = 100_000;

/// What the second processor does next: a number that grows with each job, in the low bits which.
static JOB: AtomicU64 = AtomicU64::new(0);
static OPERAND: AtomicU64 = AtomicU64::new(0);
/// The last job that was done, and what came of it.
static DONE: AtomicU64 = AtomicU64::new(0);
static ANSWER: AtomicU64 = AtomicU64::new(0);

const KIND: u64 = 3;
/// TDG.MEM.PAGE.ACCEPT of the operand; RAX.
const ACCEPT: u64 = 0;
/// MapGPA of the 2 MiB at the operand; R10.
const CONVERT: u64 = 1;
const SLEEP: u64 = 2;

/// No status of module or host.
const FAULTED: u64 = u64::MAX;

/// The second processor's work until it is to sleep.
pub fn serve() {
    let mut last = 0;
    loop {
        let job = JOB.load(Ordering::SeqCst);
        if job == last {
            let _ = vm_rd(FieldId::TD_CTLS.0);
            continue;
        }
        last = job;
        let operand = OPERAND.load(Ordering::SeqCst);
        let answer = match job & KIND {
            ACCEPT => {
                let size = if operand & 1 == 0 { SMALL } else { LARGE };
                accept(Gpa::new(operand & !1), size)
            }
            CONVERT => convert(operand).map(|status| status.0),
            _ => Ok(0),
        };
        ANSWER.store(answer.unwrap_or(FAULTED), Ordering::SeqCst);
        DONE.store(job, Ordering::SeqCst);
        if job & KIND == SLEEP {
            return;
        }
    }
}

/// Has the second processor begin a job.
fn begin(kind: u64, operand: u64) -> u64 {
    OPERAND.store(operand, Ordering::SeqCst);
    let job = (JOB.load(Ordering::SeqCst) | KIND) + 1 + kind;
    JOB.store(job, Ordering::SeqCst);
    job
}

/// What came of a job.
fn end(job: u64) -> Result<u64, Finding> {
    for _ in 0..PATIENCE {
        if DONE.load(Ordering::SeqCst) == job {
            return Ok(ANSWER.load(Ordering::SeqCst));
        }
        vm_rd(FieldId::TD_CTLS.0)?;
    }
    Err(Finding::new(format_args!("the second processor is lost")))
}

/// MapGPA of a region, to the end.
fn convert(start: u64) -> Result<HostStatus, Finding> {
    for _ in 0..RETRIES {
        let status = HostStatus(map_gpa(start, LARGE_PAGE_SIZE)?.0);
        if status != HostStatus::RETRY {
            return Ok(status);
        }
    }
    Err(Finding::new(format_args!("MapGPA of {start:#x}: no end")))
}

fn expect_converted(start: u64) -> Verdict {
    expect("R10 of MapGPA", convert(start)?, HostStatus::SUCCESS)
}

/// No page was accepted twice meanwhile, as the machine has counted.
fn without_double(work: impl FnOnce() -> Verdict) -> Verdict {
    let before = oracle::counter(Counter::DOUBLE_VALIDATION);
    work()?;
    let after = oracle::counter(Counter::DOUBLE_VALIDATION);
    expect("double accepts", after, before)
}

fn expect_one_of(what: &str, got: u64, wanted: &[u64]) -> Verdict {
    if wanted.contains(&got) {
        return Ok(());
    }
    Err(Finding::new(format_args!("{what}: {got:#x}")))
}

fn one_page_for_both() -> Verdict {
    let region = memory::fresh_region();
    let already = Status::PAGE_ALREADY_ACCEPTED.with(0);
    without_double(|| {
        (0..64).try_for_each(|round| {
            let page = page_of(region, round);
            let job = begin(ACCEPT, page_operand(page, SMALL));
            let mine = accept(page, SMALL)?;
            let mut answers = [mine, end(job)?];
            answers.sort_unstable();
            expect("answers", answers, [0, already])?;
            memory::expect_zero(private(page), PAGE_SIZE)
        })
    })
}

fn two_sizes() -> Verdict {
    without_double(|| {
        (0..8).try_for_each(|round| {
            let region = memory::fresh_region();
            let page = page_of(region, INSIDE);
            let sizes = match round % 2 {
                0 => [(region, LARGE), (page, SMALL)],
                _ => [(page, SMALL), (region, LARGE)],
            };
            let [mine, theirs] = sizes;
            let job = begin(ACCEPT, page_operand(theirs.0, theirs.1));
            let answers = [accept(mine.0, mine.1)?, end(job)?];
            let winners = answers.iter().filter(|&&answer| answer == 0).count();
            expect("winners", winners, 1)?;
            for answer in answers {
                let status = Status::of(answer);
                let refused = [Status::PAGE_ALREADY_ACCEPTED, Status::PAGE_SIZE_MISMATCH];
                expect("refused", answer == 0 || refused.contains(&status), true)?;
            }
            memory::expect_zero(private(page), PAGE_SIZE)
        })
    })
}

/// One has the host share a region of which the other wants a page accepted, again and again. Between
/// the two it is nobody's; before, it is accepted already; after, it may be accepted anew.
fn accept_against_share() -> Verdict {
    let wanted = [
        0,
        Status::PAGE_ALREADY_ACCEPTED.with(0),
        Status::PAGE_ALREADY_ACCEPTED.with(1),
        REFUSED,
    ];
    without_double(|| {
        (0..6).try_for_each(|_| {
            let region = memory::fresh_region();
            expect_accept(region, LARGE, 0)?;
            let page = page_of(region, INSIDE);
            let job = begin(CONVERT, SHARED | region.get());
            while DONE.load(Ordering::SeqCst) != job {
                expect_one_of("RAX of ACCEPT", accept(page, SMALL)?, &wanted)?;
            }
            expect("R10 of the other", end(job)?, HostStatus::SUCCESS.0)?;
            // Whoever was last, the region can be had anew.
            expect_converted(SHARED | region.get())?;
            expect_converted(region.get())?;
            expect_accept(region, LARGE, 0)?;
            memory::expect_zero(private(page), PAGE_SIZE)
        })
    })
}

/// Both give the same region away: one of them may be told that it is not its to give.
fn share_against_share() -> Verdict {
    let wanted = [HostStatus::SUCCESS.0, HostStatus::INVALID_OPERAND.0];
    without_double(|| {
        (0..4).try_for_each(|_| {
            let region = memory::fresh_region();
            expect_accept(region, LARGE, 0)?;
            let job = begin(CONVERT, SHARED | region.get());
            let mine = convert(SHARED | region.get())?.0;
            let theirs = end(job)?;
            expect_one_of("R10", mine, &wanted)?;
            expect_one_of("R10 of the other", theirs, &wanted)?;
            let one = [mine, theirs].contains(&HostStatus::SUCCESS.0);
            expect("one has done it", one, true)?;
            expect_converted(region.get())?;
            expect_accept(region, LARGE, 0)
        })
    })
}

/// Who works on one region is not in the way of who works on its neighbour.
fn neighbours() -> Verdict {
    without_double(|| {
        (0..4).try_for_each(|_| {
            let region = memory::fresh_regions(2);
            let other = Gpa::new(region.get() + LARGE_PAGE_SIZE);
            expect_accept(region, LARGE, 0)?;
            let job = begin(CONVERT, SHARED | region.get());
            expect_accept(other, LARGE, 0)?;
            expect("R10 of the other", end(job)?, HostStatus::SUCCESS.0)?;
            expect_converted(region.get())?;
            expect_accept(region, LARGE, 0)
        })
    })
}

fn wake() -> Verdict {
    second::ask(work::PAIR)
}

fn sleep() -> Verdict {
    end(begin(SLEEP, 0))?;
    second::await_answer()
}
