//! Turnstile's own protocol (docs/protocol.md): every call, right and wrong. Holds under every
//! policy.

use guest::harness::{Case, Finding, Verdict, case, expect};
use guest::memory::{self, page_of};
use guest::svsm::{self, Answer, Registers, call};
use protocols::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE, PageSize};
use protocols::svsm::turnstile::{LARGEST_LOOK, TurnstileCall, TurnstileCounter, VERSION};
use protocols::svsm::{CallId, CoreCall, Protocol, ProtocolQuery, ResultCode};

use crate::setup::{
    self, NO_MEMORY, accepted_page, done, expect_guests, expect_zero_page, rescind, unchanged,
};

/// The table.
pub const CASES: &[Case] = &[
    case("turnstile_query", "protocol.md §1", query),
    case("turnstile_unknown_calls", "protocol.md §1", unknown_calls),
    case("turnstile_accept_range", "protocol.md §2", accept_range),
    case(
        "turnstile_accept_twice",
        "protocol.md §2, design.md I2",
        accept_twice,
    ),
    case(
        "turnstile_accept_incomplete",
        "protocol.md §2, design.md I8",
        accept_incomplete,
    ),
    case("turnstile_accept_bad", "protocol.md §2", accept_bad),
    case(
        "turnstile_accept_owned",
        "protocol.md §2, design.md I4",
        accept_owned,
    ),
    case(
        "turnstile_accept_up_to_owned",
        "protocol.md §2, design.md I9",
        accept_up_to_owned,
    ),
    case("turnstile_census", "protocol.md §3", census_adds_up),
    case("turnstile_census_bad", "protocol.md §3", census_bad),
    case("turnstile_counters", "protocol.md §4", counters),
    case(
        "turnstile_counter_unknown",
        "protocol.md §4",
        unknown_counters,
    ),
    case("turnstile_contains", "protocol.md §5", contains),
    case("turnstile_contains_bad", "protocol.md §5", contains_bad),
];

const PARAMETER: ResultCode = ResultCode::INVALID_PARAMETER;

/// A call with two arguments.
pub fn ask(what: TurnstileCall, rcx: u64, rdx: u64) -> Result<Answer, Finding> {
    let registers = Registers {
        rcx,
        rdx,
        ..Registers::default()
    };
    call(what.id(), registers)
}

/// A call that must succeed; its output.
pub fn ask_well(what: TurnstileCall, rcx: u64, rdx: u64) -> Result<Registers, Finding> {
    let answer = ask(what, rcx, rdx)?;
    expect("result", answer.result(), ResultCode::SUCCESS)?;
    Ok(answer.registers)
}

/// A counter's value.
pub fn counter(counter: TurnstileCounter) -> Result<u64, Finding> {
    Ok(ask_well(TurnstileCall::COUNTER, counter.0, 0)?.rcx)
}

/// Bytes of a range by state: unaccepted, ahead, accepted, owned.
pub fn census(gpa: Gpa, bytes: u64) -> Result<[u64; 4], Finding> {
    let Registers { rcx, rdx, r8, r9 } = ask_well(TurnstileCall::CENSUS, gpa.get(), bytes)?;
    Ok([rcx, rdx, r8, r9])
}

/// A call that must be refused with `result`, change nothing, and leave the registers alone.
fn refused(what: TurnstileCall, rcx: u64, rdx: u64, result: ResultCode) -> Verdict {
    unchanged(&[svsm::calling_area()], || {
        let answer = ask(what, rcx, rdx)?;
        expect("result", (rcx, rdx, answer.result()), (rcx, rdx, result))?;
        let Registers { rcx: after, .. } = answer.registers;
        expect("RCX", after, rcx)?;
        expect("RDX", answer.registers.rdx, rdx)
    })
}

fn query() -> Verdict {
    for (version, available) in [(VERSION, u64::from(VERSION) << 32 | 1), (0, 0), (2, 0)] {
        let query = ProtocolQuery {
            protocol: Protocol::TURNSTILE,
            version,
        };
        let id = CallId::core(CoreCall::QUERY_PROTOCOL);
        let answer = call(id, Registers::rcx(query.encode()))?;
        expect("result", answer.result(), ResultCode::SUCCESS)?;
        expect("RCX", (version, answer.registers.rcx), (version, available))?;
    }
    Ok(())
}

fn unknown_calls() -> Verdict {
    for number in [5, 0x100, u32::MAX] {
        let gpa = svsm::buffer().get();
        refused(
            TurnstileCall(number),
            gpa,
            PAGE_SIZE,
            ResultCode::UNSUPPORTED_CALL,
        )?;
    }
    Ok(())
}

/// 4 KiB pages, a whole region and 4 KiB pages again.
fn accept_range() -> Verdict {
    let base = memory::fresh_regions(3);
    let (first, bytes) = (page_of(base, 510), LARGE_PAGE_SIZE + 4 * PAGE_SIZE);
    let end = first.get() + bytes;
    let left = ask_well(TurnstileCall::ACCEPT, first.get(), bytes)?;
    expect("RCX and RDX", (left.rcx, left.rdx), (end, 0))?;
    for page in [510, 511, 512, 700, 1023, 1024, 1025] {
        expect_guests(page_of(base, page))?;
        expect_zero_page(page_of(base, page))?;
    }
    for page in [509, 1026] {
        expect(
            "permissions",
            guest::oracle::page(page_of(base, page)).permissions[1],
            0,
        )?;
    }
    Ok(())
}

/// What is accepted stays as it is, content and all.
fn accept_twice() -> Verdict {
    let region = memory::fresh_region();
    ask_well(TurnstileCall::ACCEPT, region.get(), LARGE_PAGE_SIZE)?;
    memory::fill(region.get(), LARGE_PAGE_SIZE, 0x7E57)?;
    unchanged(&[region], || {
        ask_well(TurnstileCall::ACCEPT, region.get(), LARGE_PAGE_SIZE).map(drop)
    })?;
    memory::expect_filled(region.get(), LARGE_PAGE_SIZE, 0x7E57)
}

/// 40 MiB are more than one call does. The registers of an answer are those of the next call.
fn accept_incomplete() -> Verdict {
    const BUDGET: u64 = 32 << 20;
    let base = memory::fresh_regions(20);
    let first = ask(TurnstileCall::ACCEPT, base.get(), 20 * LARGE_PAGE_SIZE)?;
    expect("result", first.result(), ResultCode::INCOMPLETE)?;
    let Registers { rcx, rdx, .. } = first.registers;
    let next = base.get() + BUDGET;
    expect("next", (rcx, rdx), (next, 20 * LARGE_PAGE_SIZE - BUDGET))?;
    expect_guests(Gpa::new(next - PAGE_SIZE))?;
    expect(
        "permissions",
        guest::oracle::page(Gpa::new(next)).permissions[1],
        0,
    )?;
    let left = ask_well(TurnstileCall::ACCEPT, rcx, rdx)?;
    expect("left", left.rdx, 0)?;
    expect_guests(Gpa::new(left.rcx - PAGE_SIZE))
}

fn accept_bad() -> Verdict {
    let region = memory::fresh_region().get();
    for (gpa, bytes) in [
        (region + 1, PAGE_SIZE),
        (region, PAGE_SIZE - 1),
        (region, 0),
        (0, 0),
        (u64::MAX - PAGE_SIZE + 1, PAGE_SIZE),
        (u64::MAX - PAGE_SIZE + 1, 2 * PAGE_SIZE),
        (1 << 52, PAGE_SIZE),
        ((1 << 52) - PAGE_SIZE, 2 * PAGE_SIZE),
        // The C-bit is no address bit.
        (region | 1 << 63, PAGE_SIZE),
    ] {
        refused(TurnstileCall::ACCEPT, gpa, bytes, PARAMETER)?;
    }
    refused(
        TurnstileCall::ACCEPT,
        NO_MEMORY.get(),
        PAGE_SIZE,
        ResultCode::INVALID_ADDRESS,
    )?;
    refused(
        TurnstileCall::ACCEPT,
        (1 << 52) - PAGE_SIZE,
        PAGE_SIZE,
        ResultCode::INVALID_ADDRESS,
    )
}

fn accept_owned() -> Verdict {
    let (base, _) = setup::paravisor();
    for (gpa, bytes) in [
        (base.get(), PAGE_SIZE),
        (base.get(), LARGE_PAGE_SIZE),
        (svsm::calling_area().get(), PAGE_SIZE),
    ] {
        refused(
            TurnstileCall::ACCEPT,
            gpa,
            bytes,
            ResultCode::INVALID_ADDRESS,
        )?;
    }
    Ok(())
}

/// The error names the first page that could not be done; all before it are.
fn accept_up_to_owned() -> Verdict {
    let (base, _) = setup::paravisor();
    let before = base.get() - 2 * PAGE_SIZE;
    let answer = ask(TurnstileCall::ACCEPT, before, 4 * PAGE_SIZE)?;
    expect("result", answer.result(), ResultCode::INVALID_ADDRESS)?;
    let Registers { rcx, rdx, .. } = answer.registers;
    expect("next", (rcx, rdx), (base.get(), 2 * PAGE_SIZE))?;
    expect_guests(Gpa::new(before))?;
    expect_guests(Gpa::new(before + PAGE_SIZE))
}

fn census_adds_up() -> Verdict {
    let base = memory::fresh_regions(2);
    let before = census(base, 2 * LARGE_PAGE_SIZE)?;
    expect("memory", before.iter().sum::<u64>(), 2 * LARGE_PAGE_SIZE)?;
    expect("accepted, owned", before[2..].iter().sum::<u64>(), 0)?;
    ask_well(TurnstileCall::ACCEPT, page_of(base, 3).get(), 5 * PAGE_SIZE)?;
    let after = census(base, 2 * LARGE_PAGE_SIZE)?;
    expect("accepted", after[2], 5 * PAGE_SIZE)?;
    expect("memory", after.iter().sum::<u64>(), 2 * LARGE_PAGE_SIZE)?;
    let (paravisor, size) = setup::paravisor();
    let ours = census(paravisor, size)?;
    // The pages shared with the host have no state.
    expect(
        "the paravisor's memory that is not its own",
        ours[..3].iter().sum::<u64>(),
        0,
    )?;
    expect("none", census(NO_MEMORY, LARGE_PAGE_SIZE)?, [0; 4])
}

fn looks_bad(what: TurnstileCall) -> Verdict {
    for (gpa, bytes) in [
        (0, 0),
        (0, LARGEST_LOOK + LARGE_PAGE_SIZE),
        (0, u64::MAX),
        (u64::MAX - LARGE_PAGE_SIZE + 1, LARGE_PAGE_SIZE),
        (1 << 52, LARGE_PAGE_SIZE),
        ((1 << 52) - LARGE_PAGE_SIZE, 2 * LARGE_PAGE_SIZE),
    ] {
        refused(what, gpa, bytes, PARAMETER)?;
    }
    Ok(())
}

fn census_bad() -> Verdict {
    looks_bad(TurnstileCall::CENSUS)?;
    refused(TurnstileCall::CENSUS, PAGE_SIZE, LARGE_PAGE_SIZE, PARAMETER)?;
    refused(TurnstileCall::CENSUS, 0, PAGE_SIZE, PARAMETER)
}

fn counters() -> Verdict {
    let names = [
        TurnstileCounter::ACCEPTED_4K,
        TurnstileCounter::ACCEPTED_2M,
        TurnstileCounter::ACCEPTED_BYTES,
        TurnstileCounter::RESCINDED_BYTES,
    ];
    let before = names.map(counter);
    let page = accepted_page()?;
    setup::accepted_region()?;
    done(&[rescind(page, PageSize::Size4K)])?;
    let added = [1, 1, LARGE_PAGE_SIZE + PAGE_SIZE, PAGE_SIZE];
    for ((name, before), added) in names.into_iter().zip(before).zip(added) {
        expect("added", (name, counter(name)? - before?), (name, added))?;
    }
    for number in 0..=TurnstileCounter::FAILED_STEPS.0 {
        counter(TurnstileCounter(number))?;
    }
    Ok(())
}

fn unknown_counters() -> Verdict {
    for number in [TurnstileCounter::FAILED_STEPS.0 + 1, 1 << 32, u64::MAX] {
        refused(TurnstileCall::COUNTER, number, 0, PARAMETER)?;
    }
    Ok(())
}

fn contains_unaccepted(gpa: Gpa, bytes: u64) -> Result<u64, Finding> {
    Ok(ask_well(TurnstileCall::CONTAINS_UNACCEPTED, gpa.get(), bytes)?.rcx)
}

/// What was made ready is unaccepted to the guest, too. A range that ends with a region needs the
/// next one: the kernel may read a few bytes beyond.
fn contains() -> Verdict {
    let base = memory::fresh_regions(2);
    let second = page_of(base, 512);
    expect("fresh", contains_unaccepted(base, PAGE_SIZE)?, 1)?;
    ask_well(TurnstileCall::ACCEPT, base.get(), LARGE_PAGE_SIZE)?;
    expect(
        "accepted",
        contains_unaccepted(base, LARGE_PAGE_SIZE - 1)?,
        0,
    )?;
    expect(
        "up to the edge",
        contains_unaccepted(base, LARGE_PAGE_SIZE)?,
        1,
    )?;
    expect("beyond", contains_unaccepted(second, 8)?, 1)?;
    ask_well(TurnstileCall::ACCEPT, second.get(), LARGE_PAGE_SIZE)?;
    expect(
        "up to the edge",
        contains_unaccepted(base, LARGE_PAGE_SIZE)?,
        0,
    )?;
    expect("no memory", contains_unaccepted(NO_MEMORY, PAGE_SIZE)?, 0)
}

fn contains_bad() -> Verdict {
    looks_bad(TurnstileCall::CONTAINS_UNACCEPTED)
}
