//! The calls that are counted.

#![expect(unsafe_code, reason = "code of known length")]

use core::arch::asm;
use core::fmt::Write;

use guest::harness::{Finding, Verdict, expect};
use guest::svsm::{self, Outcome, Registers, pvalidate_from};
use guest::{counting, insn, oracle};
use protocols::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE, PAGES_PER_LARGE_PAGE, PageSize};
use protocols::oracle::Counter;
use protocols::svsm::{
    CallId, CoreCall, MAX_ENTRIES_IN_CALLING_AREA, PvalidateAction, PvalidateEntry, ResultCode,
};

const SMALL: PageSize = PageSize::Size4K;
const LARGE: PageSize = PageSize::Size2M;

/// The longest list.
const MOST: usize = 506;
const _: () = assert!(MOST as u64 <= MAX_ENTRIES_IN_CALLING_AREA);

/// Memory that nobody uses: all above 4 GiB, where the machine has 2 GiB.
struct Fresh(u64);

impl Fresh {
    fn regions(&mut self, count: usize) -> Gpa {
        let start = self.0;
        self.0 += count as u64 * LARGE_PAGE_SIZE;
        assert!(self.0 <= 6 << 30, "more memory than planned");
        Gpa::new(start)
    }
}

/// The machine's counters at a moment.
#[derive(Clone, Copy)]
struct Reading {
    instructions: u64,
    switches: u64,
    pvalidates: u64,
    rmpadjusts: u64,
}

impl Reading {
    fn take() -> Self {
        Self {
            instructions: oracle::counter(Counter::INSTRUCTIONS),
            switches: oracle::counter(Counter::WORLD_SWITCHES),
            pvalidates: oracle::pvalidates(),
            rmpadjusts: oracle::counter(Counter::RMPADJUST),
        }
    }
}

/// Counts `work`, which returns the number of calls it made.
fn count(
    out: &mut dyn Write,
    name: &str,
    entries: usize,
    pages: u64,
    work: impl FnOnce() -> Result<u64, Finding>,
) -> Verdict {
    let before = Reading::take();
    let calls = work()?;
    let after = Reading::take();
    // The port cannot fail.
    let _ = writeln!(
        out,
        "count {name} entries={entries} pages={pages} calls={calls} instructions={} switches={} \
         pvalidates={} rmpadjusts={}",
        after.instructions - before.instructions,
        after.switches - before.switches,
        after.pvalidates - before.pvalidates,
        after.rmpadjusts - before.rmpadjusts,
    );
    Ok(())
}

/// Everything, in an order in which nothing is counted that happens only once.
pub fn all(out: &mut dyn Write) -> Verdict {
    let mut fresh = Fresh(4 << 30);
    counting::check_counter(out);
    // The first of everything, not counted.
    let first = fresh.regions(1);
    pvalidate(&list(first, LARGE, PvalidateAction::Validate, 1)[..1])?;
    pvalidate(&list(first, LARGE, PvalidateAction::Rescind, 1)[..1])?;

    count(out, "query", 0, 0, || {
        let id = CallId::core(CoreCall::QUERY_PROTOCOL);
        let answer = svsm::call(id, Registers::rcx(1))?;
        expect("QUERY_PROTOCOL", answer.result(), ResultCode::SUCCESS)?;
        Ok(1)
    })?;
    for entries in [1, 64] {
        let start = fresh.regions(1);
        accept(out, "accept-4k", start, SMALL, entries)?;
    }
    for entries in [1, 64, MOST] {
        let start = fresh.regions(entries);
        accept(out, "accept-2m", start, LARGE, entries)?;
        if entries == 1 {
            fill(out, start)?;
            refused(out, start)?;
        }
        if entries < MOST {
            rescind(out, start, entries)?;
        }
    }
    Ok(())
}

fn accept(out: &mut dyn Write, name: &str, start: Gpa, size: PageSize, entries: usize) -> Verdict {
    let list = list(start, size, PvalidateAction::Validate, entries);
    count(out, name, entries, pages(size, entries), || {
        pvalidate(&list[..entries])
    })
}

fn rescind(out: &mut dyn Write, start: Gpa, entries: usize) -> Verdict {
    let list = list(start, LARGE, PvalidateAction::Rescind, entries);
    count(out, "rescind-2m", entries, pages(LARGE, entries), || {
        pvalidate(&list[..entries])
    })
}

/// A request for what is accepted already.
fn refused(out: &mut dyn Write, start: Gpa) -> Verdict {
    let list = list(start, LARGE, PvalidateAction::Validate, 1);
    count(out, "no-change-2m", 1, 0, || {
        let no_change = Outcome {
            result: ResultCode::FAIL_NO_CHANGE,
            next: 0,
        };
        expect("PVALIDATE", pvalidate_from(0, &list[..1])?, no_change)?;
        Ok(1)
    })
}

/// The instructions of filling a region the way the paravisor scrubs it, executed by this guest.
fn fill(out: &mut dyn Write, region: Gpa) -> Verdict {
    insn::enable_xmm();
    let before = oracle::counter(Counter::INSTRUCTIONS_OF_GUEST);
    let between = oracle::counter(Counter::INSTRUCTIONS_OF_GUEST);
    // SAFETY: the region was just accepted, is mapped one to one, and holds no Rust object. This
    // guest's compiler does not use XMM0.
    unsafe {
        asm!(
            "xorps xmm0, xmm0",
            "2:",
            ".irp offset, 0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240",
            "movntps [{end} + {at} + \\offset], xmm0",
            "movntps [{end} + {at} + \\offset + 256], xmm0",
            ".endr",
            "add {at}, 512",
            "jnz 2b",
            "sfence",
            end = in(reg) region.get() + LARGE_PAGE_SIZE,
            at = inout(reg) LARGE_PAGE_SIZE.wrapping_neg() => _,
            options(nostack),
        );
    }
    let after = oracle::counter(Counter::INSTRUCTIONS_OF_GUEST);
    // What reading a counter costs is in both differences. A few instructions load the operands.
    let instructions = (after - between).saturating_sub(between - before);
    let _ = writeln!(
        out,
        "count fill entries=1 pages={PAGES_PER_LARGE_PAGE} calls=0 instructions={instructions} \
         switches=0 pvalidates=0 rmpadjusts=0"
    );
    Ok(())
}

fn pages(size: PageSize, entries: usize) -> u64 {
    entries as u64 * size.bytes() / PAGE_SIZE
}

/// The first `entries` of the list are consecutive blocks from `start` on.
fn list(
    start: Gpa,
    size: PageSize,
    action: PvalidateAction,
    entries: usize,
) -> [PvalidateEntry; MOST] {
    let mut list = [PvalidateEntry(0); MOST];
    for (index, entry) in list.iter_mut().take(entries).enumerate() {
        let gpa = Gpa::new(start.get() + index as u64 * size.bytes());
        *entry = PvalidateEntry::new(gpa, size, action, false);
    }
    list
}

/// Works off one list; the number of calls that took.
fn pvalidate(entries: &[PvalidateEntry]) -> Result<u64, Finding> {
    let mut calls = 1;
    let mut outcome = pvalidate_from(0, entries)?;
    while outcome.result == ResultCode::INCOMPLETE {
        let list = svsm::List::in_calling_area();
        outcome = Outcome {
            result: list.submit()?,
            next: list.head()?.1,
        };
        calls += 1;
    }
    let done = Outcome {
        result: ResultCode::SUCCESS,
        next: entries.len() as u16,
    };
    expect("PVALIDATE", outcome, done)?;
    Ok(calls)
}
