//! Page state changes by list: progress, partly done entries, and malformed lists.

use guest::ghcb::Reply;
use guest::harness::{Case, Verdict, case, expect};
use guest::insn::{self, Pvalidated, SIZE_4K};
use guest::memory::{self, page_of};
use guest::oracle::expect_flags;
use guest::trap::Trap;
use protocols::addr::{Gpa, PAGES_PER_LARGE_PAGE, PageSize};
use protocols::exit_code::ExitCode;
use protocols::ghcb::PageOperation;
use protocols::ghcb::page::{Field, MalformedReason, Response};
use protocols::ghcb::psc::{Entry, MAX_ENTRIES, Outcome};
use protocols::oracle::PageFlags;

use crate::setup::{VALIDATE, expect_pvalidate, ghcb_page, valid_page};

/// The table.
pub const CASES: &[Case] = &[
    case("psc_one_page", "ghcb.md §6", one_page),
    case("psc_mixed_list", "ghcb.md §6", mixed),
    case("psc_2m", "ghcb.md §6", large),
    case("psc_2m_partly_done", "ghcb.md §6", partly_done),
    case("psc_longest_list", "ghcb.md §6", longest),
    case("psc_starts_at_current", "ghcb.md §6", starts_at_current),
    case("psc_list_already_done", "ghcb.md §6", already_done),
    case("psc_repeated", "ghcb.md §6", repeated),
    case("psc_hints", "ghcb.md §6", hints),
    case(
        "psc_valid_page_must_be_validated_again",
        "snp-isa.md §8.1",
        valid_again,
    ),
    case("psc_too_long", "ghcb.md §6 (invalid header)", too_long),
    case(
        "psc_reserved_in_header",
        "ghcb.md §6 (as KVM and OVMF have it)",
        reserved_header,
    ),
    case(
        "psc_unknown_operation",
        "ghcb.md §6 (invalid entry)",
        unknown_operation,
    ),
    case(
        "psc_2m_misaligned",
        "ghcb.md §6 (invalid entry)",
        misaligned,
    ),
    case(
        "psc_reserved_in_entry",
        "ghcb.md §6 (invalid entry)",
        reserved_entry,
    ),
    case("psc_stops_at_bad_entry", "ghcb.md §6", stops_at_bad),
    case(
        "psc_scratch_outside",
        "ghcb.md §5, reason 3",
        scratch_outside,
    ),
];

fn put_header(current: u16, end: u16) {
    ghcb_page().put_buffer(0, u64::from(current) | u64::from(end) << 16);
}

fn current() -> u16 {
    ghcb_page().take_buffer(0) as u16
}

fn send() -> Reply {
    let page = ghcb_page();
    let scratch = [(Field::SCRATCH, page.buffer().get())];
    page.call(ExitCode::PAGE_STATE_CHANGE, [0, 0], &scratch)
}

/// Sends a whole list from its first entry.
fn send_list(entries: &[Entry]) -> Reply {
    for (index, entry) in entries.iter().enumerate() {
        ghcb_page().put_buffer(8 + index * 8, entry.0);
    }
    put_header(0, entries.len() as u16 - 1);
    send()
}

fn expect_outcome(reply: Reply, outcome: Outcome) -> Verdict {
    // KVM never touches SW_EXITINFO1 for this event.
    expect(
        "reply",
        reply,
        Reply {
            response: Response::NO_ACTION,
            info_2: outcome.0,
        },
    )
}

fn expect_shared(gpa: Gpa, shared: bool) -> Verdict {
    let want = if shared {
        PageFlags::empty()
    } else {
        PageFlags::HOST_PRIVATE
    };
    expect_flags(gpa, PageFlags::HOST_PRIVATE, want)
}

fn small(gpa: Gpa, operation: PageOperation) -> Entry {
    Entry::new(gpa.frame(), operation, PageSize::Size4K)
}

fn large_entry(gpa: Gpa, operation: PageOperation) -> Entry {
    Entry::new(gpa.frame(), operation, PageSize::Size2M)
}

fn one_page() -> Verdict {
    let page = memory::fresh_page();
    expect_outcome(
        send_list(&[small(page, PageOperation::SHARED)]),
        Outcome::OK,
    )?;
    expect("current entry", current(), 1)?;
    expect_shared(page, true)?;
    expect_shared(page_of(page, 1), false)?;
    expect_outcome(
        send_list(&[small(page, PageOperation::PRIVATE)]),
        Outcome::OK,
    )?;
    expect_shared(page, false)
}

fn mixed() -> Verdict {
    let region = memory::fresh_region();
    let other = memory::fresh_region();
    let list = [
        small(page_of(region, 3), PageOperation::SHARED),
        large_entry(other, PageOperation::SHARED),
        small(page_of(region, 5), PageOperation::SHARED),
        small(page_of(region, 3), PageOperation::PRIVATE),
    ];
    expect_outcome(send_list(&list), Outcome::OK)?;
    expect("current entry", current(), 4)?;
    expect_shared(page_of(region, 3), false)?;
    expect_shared(page_of(region, 4), false)?;
    expect_shared(page_of(region, 5), true)?;
    expect_shared(page_of(other, 511), true)
}

fn large() -> Verdict {
    let region = memory::fresh_region();
    expect_outcome(
        send_list(&[large_entry(region, PageOperation::SHARED)]),
        Outcome::OK,
    )?;
    for index in [0, 1, PAGES_PER_LARGE_PAGE - 1] {
        expect_shared(page_of(region, index), true)?;
    }
    expect_shared(page_of(region, PAGES_PER_LARGE_PAGE), false)?;
    expect_outcome(
        send_list(&[large_entry(region, PageOperation::PRIVATE)]),
        Outcome::OK,
    )?;
    expect_shared(page_of(region, 256), false)
}

fn partly_done() -> Verdict {
    let region = memory::fresh_region();
    let entry = large_entry(region, PageOperation::SHARED).with_current_page(500);
    expect_outcome(send_list(&[entry]), Outcome::OK)?;
    for (index, shared) in [(0, false), (499, false), (500, true), (511, true)] {
        expect_shared(page_of(region, index), shared)?;
    }
    Ok(())
}

fn longest() -> Verdict {
    let region = memory::fresh_region();
    for index in 0..MAX_ENTRIES {
        let entry = small(page_of(region, index as u64), PageOperation::SHARED);
        ghcb_page().put_buffer(8 + index * 8, entry.0);
    }
    put_header(0, MAX_ENTRIES as u16 - 1);
    expect_outcome(send(), Outcome::OK)?;
    expect("current entry", usize::from(current()), MAX_ENTRIES)?;
    expect_shared(page_of(region, MAX_ENTRIES as u64 - 1), true)?;
    expect_shared(page_of(region, MAX_ENTRIES as u64), false)
}

fn starts_at_current() -> Verdict {
    let region = memory::fresh_region();
    for index in 0..3 {
        let entry = small(page_of(region, index), PageOperation::SHARED);
        ghcb_page().put_buffer(8 + index as usize * 8, entry.0);
    }
    put_header(2, 2);
    expect_outcome(send(), Outcome::OK)?;
    expect_shared(page_of(region, 1), false)?;
    expect_shared(page_of(region, 2), true)
}

fn already_done() -> Verdict {
    let page = memory::fresh_page();
    ghcb_page().put_buffer(8, small(page, PageOperation::SHARED).0);
    put_header(1, 0);
    expect_outcome(send(), Outcome::OK)?;
    expect_shared(page, false)
}

fn repeated() -> Verdict {
    let page = memory::fresh_page();
    expect_outcome(
        send_list(&[small(page, PageOperation::SHARED)]),
        Outcome::OK,
    )?;
    memory::fill(memory::shared(page), 4096, 0x7777)?;
    expect_outcome(
        send_list(&[small(page, PageOperation::SHARED)]),
        Outcome::OK,
    )?;
    memory::expect_filled(memory::shared(page), 4096, 0x7777)
}

fn hints() -> Verdict {
    let page = valid_page()?;
    memory::fill(page.get(), 4096, 0x8888)?;
    let list = [
        small(page, PageOperation::PSMASH),
        small(page, PageOperation::UNSMASH),
    ];
    expect_outcome(send_list(&list), Outcome::OK)?;
    expect("current entry", current(), 2)?;
    memory::expect_filled(page.get(), 4096, 0x8888)
}

fn valid_again() -> Verdict {
    let page = valid_page()?;
    let there_and_back = [
        small(page, PageOperation::SHARED),
        small(page, PageOperation::PRIVATE),
    ];
    expect_outcome(send_list(&there_and_back), Outcome::OK)?;
    expect(
        "read",
        insn::load(page.get()),
        Err(Trap::not_validated(page.get())),
    )?;
    expect_pvalidate(page.get(), SIZE_4K, VALIDATE, Pvalidated::DONE)
}

fn too_long() -> Verdict {
    let page = memory::fresh_page();
    ghcb_page().put_buffer(8, small(page, PageOperation::SHARED).0);
    for end in [MAX_ENTRIES as u16, u16::MAX] {
        put_header(0, end);
        expect_outcome(send(), Outcome::INVALID_HEADER)?;
    }
    expect_shared(page, false)
}

/// OVMF builds its lists in buffers it has used before: the host neither looks at the reserved
/// half of the header nor changes it.
fn reserved_header() -> Verdict {
    const USED: u64 = 0xABCD_1234 << 32;
    let page = memory::fresh_page();
    ghcb_page().put_buffer(8, small(page, PageOperation::SHARED).0);
    ghcb_page().put_buffer(0, USED);
    expect_outcome(send(), Outcome::OK)?;
    expect("header", ghcb_page().take_buffer(0), USED | 1)?;
    expect_shared(page, true)
}

fn expect_invalid_entry(gpa: Gpa, entry: Entry) -> Verdict {
    expect_outcome(send_list(&[entry]), Outcome::INVALID_ENTRY)?;
    expect("current entry", current(), 0)?;
    expect_shared(gpa, false)
}

fn unknown_operation() -> Verdict {
    let page = memory::fresh_page();
    for operation in [0, 5, 15] {
        expect_invalid_entry(page, small(page, PageOperation(operation)))?;
    }
    Ok(())
}

fn misaligned() -> Verdict {
    let inside = page_of(memory::fresh_region(), 1);
    expect_invalid_entry(inside, large_entry(inside, PageOperation::SHARED))
}

fn reserved_entry() -> Verdict {
    let page = memory::fresh_page();
    for bit in [57, 63] {
        expect_invalid_entry(page, Entry(small(page, PageOperation::SHARED).0 | 1 << bit))?;
    }
    // More pages done than the entry has.
    expect_invalid_entry(
        page,
        small(page, PageOperation::SHARED).with_current_page(2),
    )
}

fn stops_at_bad() -> Verdict {
    let region = memory::fresh_region();
    let list = [
        small(page_of(region, 0), PageOperation::SHARED),
        small(page_of(region, 1), PageOperation(9)),
        small(page_of(region, 2), PageOperation::SHARED),
    ];
    expect_outcome(send_list(&list), Outcome::INVALID_ENTRY)?;
    expect("current entry", current(), 1)?;
    expect_shared(page_of(region, 0), true)?;
    expect_shared(page_of(region, 2), false)
}

fn scratch_outside() -> Verdict {
    let page = ghcb_page();
    for scratch in [0, page.gpa().get(), page.buffer().get() + 2040] {
        let fields = [(Field::SCRATCH, scratch)];
        let reply = page.call(ExitCode::PAGE_STATE_CHANGE, [0, 0], &fields);
        expect(
            "reply",
            reply,
            Reply::malformed(MalformedReason::INVALID_SCRATCH),
        )?;
    }
    Ok(())
}
