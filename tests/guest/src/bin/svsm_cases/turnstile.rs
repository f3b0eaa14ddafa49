//! Turnstile's own protocol (docs/protocol.md): every call, right and wrong. Holds under every
//! policy.

use guest::harness::{Case, Finding, Verdict, case, expect};
use guest::memory::{self, page_of};
use guest::svsm::{self, Answer, Registers, call};
use protocols::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE, PageSize};
use protocols::efi::UnacceptedTable;
use protocols::svsm::turnstile::{
    LARGEST_LOOK, LOWEST_VERSION, TurnstileCall, TurnstileCounter, VERSION,
};
use protocols::svsm::{CallId, CoreCall, Protocol, ProtocolQuery, ResultCode};
use zerocopy::{FromZeros, IntoBytes};

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
    case("turnstile_table", "protocol.md §7", table_agrees),
    case(
        "turnstile_table_too_small",
        "protocol.md §7",
        table_too_small,
    ),
    case(
        "turnstile_table_bad",
        "protocol.md §7, design.md I4",
        table_bad,
    ),
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
    let both = u64::from(VERSION) << 32 | u64::from(LOWEST_VERSION);
    for (version, available) in [
        (LOWEST_VERSION, both),
        (VERSION, both),
        (0, 0),
        (VERSION + 1, 0),
    ] {
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
    for number in [6, 0x100, u32::MAX] {
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

/// Asks for the table of a range, in the guest's buffer of `size` bytes at `buffer`.
fn ask_table(range: (Gpa, u64), buffer: Gpa, size: u64) -> Result<Answer, Finding> {
    let registers = Registers {
        rcx: range.0.get(),
        rdx: range.1,
        r8: buffer.get(),
        r9: size,
    };
    call(TurnstileCall::UNACCEPTED_TABLE.id(), registers)
}

/// A page of the guest, full of something.
fn blank_page() -> Result<Gpa, Finding> {
    let page = accepted_page()?;
    memory::fill(memory::private(page), PAGE_SIZE, 0x7AB1E)?;
    Ok(page)
}

/// What the table says of each unit of a range is what the census says, and it reaches from the
/// lowest unaccepted unit to the highest.
fn table_agrees() -> Verdict {
    const UNITS: u64 = 20;
    let base = memory::fresh_regions(UNITS);
    let region = |unit| Gpa::new(base.get() + unit * LARGE_PAGE_SIZE);
    // Units 0, 5 and 19 as a whole, of unit 7 a page, which makes it no unaccepted unit.
    for unit in [0, 5, UNITS - 1] {
        ask_well(TurnstileCall::ACCEPT, region(unit).get(), LARGE_PAGE_SIZE)?;
    }
    ask_well(TurnstileCall::ACCEPT, region(7).get(), PAGE_SIZE)?;

    let buffer = blank_page()?;
    let range = (base, UNITS * LARGE_PAGE_SIZE);
    let answer = ask_table(range, buffer, PAGE_SIZE)?;
    expect("result", answer.result(), ResultCode::SUCCESS)?;
    let mut header = UnacceptedTable::new_zeroed();
    memory::take_bytes(memory::private(buffer), header.as_mut_bytes())?;
    let expected = UnacceptedTable {
        version: 1,
        unit_size: LARGE_PAGE_SIZE as u32,
        phys_base: region(1).get(),
        // Units 1 to 18.
        size: 3,
    };
    expect("header", header, expected)?;
    let length = size_of::<UnacceptedTable>() as u64 + header.size;
    expect("bytes", answer.registers.rcx, length)?;
    let bits = memory::read(memory::private(buffer) + size_of::<UnacceptedTable>() as u64)?;
    for unit in 1..24 {
        let [unaccepted, ahead, ..] = match unit {
            1..UNITS => census(region(unit), LARGE_PAGE_SIZE)?,
            _ => [0; 4],
        };
        let told = bits >> (unit - 1) & 1;
        let expected = u64::from(unaccepted + ahead == LARGE_PAGE_SIZE);
        expect("bit", (unit, told), (unit, expected))?;
    }
    let behind = length.next_multiple_of(64);
    memory::expect_filled(
        memory::private(buffer) + behind,
        PAGE_SIZE - behind,
        0x7AB1E,
    )
}

fn table_too_small() -> Verdict {
    let base = memory::fresh_regions(9);
    let range = (base, 9 * LARGE_PAGE_SIZE);
    let needed = size_of::<UnacceptedTable>() as u64 + 2;
    let buffer = blank_page()?;
    for size in [0, 24, needed - 1] {
        let answer = ask_table(range, buffer, size)?;
        expect("result", (size, answer.result()), (size, PARAMETER))?;
        expect("bytes needed", answer.registers.rcx, needed)?;
        memory::expect_filled(memory::private(buffer), PAGE_SIZE, 0x7AB1E)?;
    }
    let answer = ask_table(range, buffer, needed)?;
    expect("exactly as needed", answer.result(), ResultCode::SUCCESS)
}

fn table_bad() -> Verdict {
    let range = (memory::fresh_regions(2), 2 * LARGE_PAGE_SIZE);
    let page = accepted_page()?;
    let beyond = Gpa::new(1 << 52);
    let address = ResultCode::INVALID_ADDRESS;
    for (range, buffer, result) in [
        (range, Gpa::new(page.get() + 8), PARAMETER),
        (range, beyond, PARAMETER),
        ((page_of(range.0, 1), range.1), page, PARAMETER),
        ((range.0, PAGE_SIZE), page, PARAMETER),
        (range, setup::paravisor().0, address),
        (range, svsm::calling_area(), address),
        (range, memory::fresh_page(), address),
        (range, NO_MEMORY, address),
    ] {
        unchanged(&[svsm::calling_area(), range.0], || {
            let answer = ask_table(range, buffer, PAGE_SIZE)?;
            expect("result", (buffer, answer.result()), (buffer, result))?;
            expect("RCX", answer.registers.rcx, range.0.get())
        })?;
    }
    Ok(())
}
