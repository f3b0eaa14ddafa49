//! The calls that are counted.

use core::fmt::Write;

use guest::harness::{Finding, Verdict, expect};
use guest::tdcall::{accept, expect_accept, map_gpa, vm_rd};
use guest::{counting, oracle};
use protocols::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE, PageSize};
use protocols::oracle::Counter;
use protocols::tdx::Status;
use protocols::tdx::metadata::FieldId;

const SMALL: PageSize = PageSize::Size4K;
const LARGE: PageSize = PageSize::Size2M;

/// The bit of an address that says "shared".
const SHARED: u64 = 1 << 47;

/// Memory that nobody uses: all above 4 GiB, where the machine has 2 GiB.
struct Fresh(u64);

impl Fresh {
    fn regions(&mut self, count: u64) -> u64 {
        let start = self.0;
        self.0 += count * LARGE_PAGE_SIZE;
        assert!(self.0 <= 6 << 30, "more memory than planned");
        start
    }
}

/// The machine's counters at a moment.
#[derive(Clone, Copy)]
struct Reading {
    instructions: u64,
    switches: u64,
    accepts: u64,
    attributes: u64,
    tdcalls: u64,
}

impl Reading {
    fn take() -> Self {
        Self {
            instructions: oracle::counter(Counter::INSTRUCTIONS),
            switches: oracle::counter(Counter::WORLD_SWITCHES),
            accepts: oracle::counter(Counter::ACCEPT_4K) + oracle::counter(Counter::ACCEPT_2M),
            attributes: oracle::counter(Counter::ATTR_WR),
            tdcalls: oracle::counter(Counter::TDCALL),
        }
    }
}

/// Counts `work` on `entries` pages, in which `pages` pages of 4 KiB change hands; returns the number
/// of calls it made.
fn count(
    out: &mut dyn Write,
    name: &str,
    entries: u64,
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
         accepts={} attributes={} tdcalls={}",
        after.instructions - before.instructions,
        after.switches - before.switches,
        after.accepts - before.accepts,
        after.attributes - before.attributes,
        after.tdcalls - before.tdcalls,
    );
    Ok(())
}

/// Everything, in an order in which nothing is counted that happens only once.
pub fn all(out: &mut dyn Write) -> Verdict {
    let mut fresh = Fresh(4 << 30);
    counting::check_counter(out);
    // The first of everything, not counted.
    let first = fresh.regions(1);
    accept_all(first, LARGE, 1)?;
    convert(SHARED | first)?;

    count(out, "query", 0, 0, || {
        expect("RAX of VM.RD", vm_rd(FieldId::TD_CTLS.0)?.0, 0)?;
        Ok(1)
    })?;
    for entries in [1, 64] {
        let start = fresh.regions(1);
        count(out, "accept-4k", entries, entries, || {
            accept_all(start, SMALL, entries)
        })?;
    }
    for entries in [1, 64] {
        let start = fresh.regions(entries);
        let pages = entries * LARGE_PAGE_SIZE / PAGE_SIZE;
        count(out, "accept-2m", entries, pages, || {
            accept_all(start, LARGE, entries)
        })?;
        if entries == 1 {
            refused(out, start)?;
            count(out, "rescind-2m", 1, pages, || convert(SHARED | start))?;
            count(out, "private-2m", 1, 0, || convert(start))?;
        }
    }
    Ok(())
}

/// Accepts pages one after the other, as a guest does; the number of calls.
fn accept_all(start: u64, size: PageSize, entries: u64) -> Result<u64, Finding> {
    for index in 0..entries {
        expect_accept(Gpa::new(start + index * size.bytes()), size, 0)?;
    }
    Ok(entries)
}

/// MapGPA of a region, which becomes what its address says.
fn convert(start: u64) -> Result<u64, Finding> {
    expect("R10 of MapGPA", map_gpa(start, LARGE_PAGE_SIZE)?.0, 0)?;
    Ok(1)
}

/// A request for what is accepted already. The level in the answer is that of the host's page.
fn refused(out: &mut dyn Write, start: u64) -> Verdict {
    count(out, "no-change-2m", 1, 0, || {
        let answer = Status::of(accept(Gpa::new(start), LARGE)?);
        let refusals = [Status::PAGE_ALREADY_ACCEPTED, Status::PAGE_SIZE_MISMATCH];
        expect("refused", refusals.contains(&answer), true)?;
        Ok(1)
    })
}
