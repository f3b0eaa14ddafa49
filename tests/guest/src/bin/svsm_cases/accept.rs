//! Accepting and giving back memory, done right.

use guest::ghcb::{self, change_page_state};
use guest::harness::{Case, Verdict, case, expect, expect_not};
use guest::insn;
use guest::memory::{self, page_of};
use guest::oracle;
use guest::svsm::{self, List, Outcome, Registers, pvalidate_from};
use guest::trap::Trap;
use protocols::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE, PAGES_PER_LARGE_PAGE, PageSize};
use protocols::ghcb::PageOperation;
use protocols::oracle::{Counter, HostAct, PageFlags};
use protocols::svsm::{CallId, CoreCall, MAX_ENTRIES_IN_CALLING_AREA, PvalidateEntry, ResultCode};

use crate::setup::{
    self, accepted_page, accepted_region, done, expect_guests, expect_not_accepted,
    expect_pvalidate, expect_zero_page, ignoring, rescind, unchanged, validate,
};

/// The table.
pub const CASES: &[Case] = &[
    case("accept_4k", "svsm.md §4.1", accept_small),
    case("accept_2m", "svsm.md §4.1", accept_large),
    case(
        "accept_2m_on_2m_backing",
        "design.md §3 step 4c",
        accept_large_backing,
    ),
    case(
        "accept_2m_on_4k_backing",
        "design.md §3 step 4c, pitfalls.md §3",
        accept_split,
    ),
    case(
        "accept_2m_behind_accepted_4k_ignoring",
        "svsm.md §4.1, design.md §4",
        accept_rest,
    ),
    case(
        "accepted_page_is_zero",
        "svsm.md §4.1, design.md I10",
        zero_small,
    ),
    case(
        "accepted_region_is_zero",
        "svsm.md §4.1, design.md I10",
        zero_large,
    ),
    case(
        "xmm_registers_survive_an_accept",
        "decision 021",
        xmm_registers_survive,
    ),
    case(
        "accept_again_after_rescind",
        "svsm.md §4.1, design.md I2",
        again,
    ),
    case("accept_again_is_zero", "design.md I10", again_zero),
    case("rescind_4k", "svsm.md §4.1, design.md I3", rescind_small),
    case("rescind_2m", "svsm.md §4.1, design.md I3", rescind_large),
    case(
        "rescind_4k_of_2m",
        "svsm.md §4.1, guests.md §5.9",
        rescind_part,
    ),
    case(
        "rescind_2m_of_4k_pages",
        "svsm.md §4.1",
        rescind_small_pages,
    ),
    case("rescinded_page_faults", "snp-isa.md §9", rescinded_faults),
    case(
        "share_and_take_back",
        "guests.md §2.5 (order)",
        share_and_take_back,
    ),
    case(
        "validate_ignoring_keeps_content",
        "svsm.md §4.1, issue 2",
        ignoring_keeps,
    ),
    case("rescind_ignoring", "svsm.md §4.1", rescind_ignoring),
    case("mixed_list", "svsm.md §4.1", mixed),
    case("longest_list", "svsm.md §4.1 (510 entries)", longest),
    case("list_in_any_page", "svsm.md §4.1", list_elsewhere),
    case("list_at_end_of_page", "svsm.md §4.1", list_at_end),
    case(
        "next_set_by_guest",
        "svsm.md §4.1, pitfalls.md §4",
        preset_next,
    ),
    case(
        "incomplete_is_bounded",
        "svsm.md §4.1, design.md I8, §10",
        incomplete,
    ),
    case(
        "incomplete_completes",
        "svsm.md §4.1, design.md I8",
        incomplete_completes,
    ),
    case("call_through_the_page", "svsm.md §2 step 1", through_page),
    case("only_next_is_written", "svsm.md §4.1", only_next),
];

const SMALL: PageSize = PageSize::Size4K;
const LARGE: PageSize = PageSize::Size2M;

fn accept_small() -> Verdict {
    let page = memory::fresh_page();
    expect_not_accepted(page)?;
    let before = oracle::counter(Counter::PVALIDATE_4K_VALIDATE);
    done(&[validate(page, SMALL)])?;
    expect(
        "PVALIDATEs",
        oracle::counter(Counter::PVALIDATE_4K_VALIDATE) - before,
        1,
    )?;
    expect_guests(page)?;
    expect_not_accepted(page_of(page, 1))?;
    memory::fill(page.get(), PAGE_SIZE, 0x1010)?;
    memory::expect_filled(page.get(), PAGE_SIZE, 0x1010)
}

fn accept_large() -> Verdict {
    let region = accepted_region()?;
    for index in 0..PAGES_PER_LARGE_PAGE {
        expect_guests(page_of(region, index))?;
    }
    expect_not_accepted(page_of(region, PAGES_PER_LARGE_PAGE))
}

fn pvalidates() -> (u64, u64) {
    (
        oracle::counter(Counter::PVALIDATE_2M_VALIDATE),
        oracle::counter(Counter::PVALIDATE_4K_VALIDATE),
    )
}

fn accept_large_backing() -> Verdict {
    let region = memory::fresh_region();
    oracle::host_act(region, HostAct::BACK_BY_2M)?;
    let before = pvalidates();
    done(&[validate(region, LARGE)])?;
    expect(
        "PVALIDATEs of 2 MiB, of 4 KiB",
        pvalidates(),
        (before.0 + 1, before.1),
    )?;
    oracle::expect_flags(region, PageFlags::SIZE_2M, PageFlags::SIZE_2M)
}

/// Host backs by 4 KiB: the paravisor splits, the guest hears nothing of it.
fn accept_split() -> Verdict {
    let region = memory::fresh_region();
    // A page the host takes away leaves no large backing, whatever the host prefers.
    change_page_state(page_of(region, 3), PageOperation::SHARED)?;
    change_page_state(page_of(region, 3), PageOperation::PRIVATE)?;
    done(&[
        validate(page_of(region, 3), SMALL),
        rescind(page_of(region, 3), SMALL),
    ])?;
    let before = pvalidates();
    done(&[validate(region, LARGE)])?;
    let after = pvalidates();
    expect(
        "PVALIDATEs of 4 KiB",
        after.1 - before.1,
        PAGES_PER_LARGE_PAGE,
    )?;
    oracle::expect_flags(region, PageFlags::SIZE_2M, PageFlags::empty())?;
    expect_guests(page_of(region, 3))?;
    expect_guests(page_of(region, PAGES_PER_LARGE_PAGE - 1))
}

fn accept_rest() -> Verdict {
    let region = memory::fresh_region();
    let first = page_of(region, 17);
    done(&[validate(first, SMALL)])?;
    memory::fill(first.get(), PAGE_SIZE, 0x2020)?;
    done(&[ignoring(validate(region, LARGE))])?;
    memory::expect_filled(first.get(), PAGE_SIZE, 0x2020)?;
    for index in [0, 16, 18, PAGES_PER_LARGE_PAGE - 1] {
        expect_guests(page_of(region, index))?;
        expect_zero_page(page_of(region, index))?;
    }
    Ok(())
}

fn zero_small() -> Verdict {
    expect_zero_page(accepted_page()?)
}

fn zero_large() -> Verdict {
    memory::expect_zero(accepted_region()?.get(), LARGE_PAGE_SIZE)
}

/// The paravisor scrubs with XMM0; to the guest its own is as it was.
fn xmm_registers_survive() -> Verdict {
    insn::enable_xmm();
    let values = insn::Xmm(core::array::from_fn(|n| {
        [0x5858_0000 + n as u64, !(n as u64)]
    }));
    insn::load_xmm(&values);
    let region = accepted_region();
    let after = insn::read_xmm();
    memory::expect_zero(region?.get(), LARGE_PAGE_SIZE)?;
    expect("XMM registers kept", after == values, true)
}

fn again() -> Verdict {
    let page = accepted_page()?;
    done(&[rescind(page, SMALL)])?;
    expect_not_accepted(page)?;
    done(&[validate(page, SMALL)])?;
    expect_guests(page)
}

fn again_zero() -> Verdict {
    let page = accepted_page()?;
    memory::fill(page.get(), PAGE_SIZE, 0x3030)?;
    done(&[rescind(page, SMALL), validate(page, SMALL)])?;
    expect_zero_page(page)
}

fn rescind_small() -> Verdict {
    let page = accepted_page()?;
    let live = oracle::counter(Counter::LIVE_RESCIND);
    done(&[rescind(page, SMALL)])?;
    expect_not_accepted(page)?;
    // Permissions were revoked before the instruction, not after it.
    expect(
        "rescinds of pages in use",
        oracle::counter(Counter::LIVE_RESCIND),
        live,
    )
}

fn rescind_large() -> Verdict {
    let region = accepted_region()?;
    let live = oracle::counter(Counter::LIVE_RESCIND);
    done(&[rescind(region, LARGE)])?;
    for index in 0..PAGES_PER_LARGE_PAGE {
        expect_not_accepted(page_of(region, index))?;
    }
    expect(
        "rescinds of pages in use",
        oracle::counter(Counter::LIVE_RESCIND),
        live,
    )
}

fn rescind_part() -> Verdict {
    let region = accepted_region()?;
    memory::fill(region.get(), PAGE_SIZE, 0x4040)?;
    done(&[rescind(page_of(region, 100), SMALL)])?;
    expect_not_accepted(page_of(region, 100))?;
    expect_guests(page_of(region, 99))?;
    expect_guests(page_of(region, 101))?;
    memory::expect_filled(region.get(), PAGE_SIZE, 0x4040)
}

fn rescind_small_pages() -> Verdict {
    let region = memory::fresh_region();
    for index in 0..PAGES_PER_LARGE_PAGE {
        done(&[validate(page_of(region, index), SMALL)])?;
    }
    done(&[rescind(region, LARGE)])?;
    expect_not_accepted(region)?;
    expect_not_accepted(page_of(region, PAGES_PER_LARGE_PAGE - 1))
}

fn rescinded_faults() -> Verdict {
    let page = accepted_page()?.get();
    memory::write(page, 1)?;
    done(&[rescind(Gpa::new(page), SMALL)])?;
    expect("read", insn::load(page), Err(Trap::not_validated(page)))
}

fn share_and_take_back() -> Verdict {
    let page = accepted_page()?;
    memory::fill(page.get(), PAGE_SIZE, 0x5050)?;
    done(&[rescind(page, SMALL)])?;
    change_page_state(page, PageOperation::SHARED)?;
    memory::fill(memory::shared(page), PAGE_SIZE, 0x6060)?;
    change_page_state(page, PageOperation::PRIVATE)?;
    done(&[validate(page, SMALL)])?;
    expect_guests(page)?;
    expect_zero_page(page)
}

fn ignoring_keeps() -> Verdict {
    let page = accepted_page()?;
    memory::fill(page.get(), PAGE_SIZE, 0x7070)?;
    unchanged(&[page], || done(&[ignoring(validate(page, SMALL))]))?;
    memory::expect_filled(page.get(), PAGE_SIZE, 0x7070)
}

fn rescind_ignoring() -> Verdict {
    let page = memory::fresh_page();
    unchanged(&[page], || done(&[ignoring(rescind(page, SMALL))]))
}

fn mixed() -> Verdict {
    let small = memory::fresh_page();
    let region = memory::fresh_region();
    let leaving = accepted_page()?;
    let leaving_region = accepted_region()?;
    done(&[
        validate(small, SMALL),
        rescind(leaving, SMALL),
        validate(region, LARGE),
        rescind(leaving_region, LARGE),
        rescind(page_of(region, 8), SMALL),
    ])?;
    expect_guests(small)?;
    expect_not_accepted(leaving)?;
    expect_guests(page_of(region, 7))?;
    expect_not_accepted(page_of(region, 8))?;
    expect_not_accepted(page_of(leaving_region, 300))
}

const LONGEST: usize = MAX_ENTRIES_IN_CALLING_AREA as usize;

fn longest() -> Verdict {
    let region = memory::fresh_region();
    let list: [PvalidateEntry; LONGEST] =
        core::array::from_fn(|index| validate(page_of(region, index as u64), SMALL));
    done(&list)?;
    expect_guests(region)?;
    expect_guests(page_of(region, LONGEST as u64 - 1))?;
    expect_not_accepted(page_of(region, LONGEST as u64))
}

fn submit_at(list: List, entries: &[PvalidateEntry]) -> Verdict {
    list.put_entries(entries)?;
    list.put_head(entries.len() as u16, 0)?;
    expect("result", list.submit()?, ResultCode::SUCCESS)?;
    expect(
        "head of the list",
        list.head()?,
        (entries.len() as u16, entries.len() as u16),
    )
}

fn list_elsewhere() -> Verdict {
    let list = List::at(Gpa::new(accepted_page()?.get() + 0x238));
    let page = memory::fresh_page();
    submit_at(list, &[validate(page, SMALL)])?;
    expect_guests(page)
}

fn list_at_end() -> Verdict {
    let list = List::at(Gpa::new(accepted_page()?.get() + PAGE_SIZE - 16));
    let page = memory::fresh_page();
    submit_at(list, &[validate(page, SMALL)])?;
    expect_guests(page)
}

/// What Linux does after a size mismatch: it skips the entry itself.
fn preset_next() -> Verdict {
    let pages = [
        memory::fresh_page(),
        memory::fresh_page(),
        memory::fresh_page(),
    ];
    let list = pages.map(|page| validate(page, SMALL));
    let want = Outcome {
        result: ResultCode::SUCCESS,
        next: 3,
    };
    expect("PVALIDATE", pvalidate_from(2, &list)?, want)?;
    expect_not_accepted(pages[0])?;
    expect_not_accepted(pages[1])?;
    expect_guests(pages[2])
}

/// 2 MiB regions that one call may scrub (design.md §10: 32 MiB).
const BUDGET_REGIONS: u64 = 16;

fn incomplete() -> Verdict {
    const REGIONS: usize = 24;
    let first = memory::fresh_regions(REGIONS as u64);
    let region = |index: u64| Gpa::new(first.get() + index * LARGE_PAGE_SIZE);
    let list: [PvalidateEntry; REGIONS] =
        core::array::from_fn(|index| validate(region(index as u64), LARGE));
    let outcome = pvalidate_from(0, &list)?;
    expect("result", outcome.result, ResultCode::INCOMPLETE)?;
    expect_not("next", outcome.next, 0)?;
    let done = u64::from(outcome.next);
    expect(
        "entries done within the budget",
        done <= BUDGET_REGIONS,
        true,
    )?;
    // `next` is exact: all before it are done, none after it.
    for index in 0..done {
        expect_guests(page_of(region(index), PAGES_PER_LARGE_PAGE - 1))?;
    }
    for index in done..REGIONS as u64 {
        expect_not_accepted(region(index))?;
    }
    Ok(())
}

fn incomplete_completes() -> Verdict {
    const REGIONS: usize = 40;
    let first = memory::fresh_regions(REGIONS as u64);
    let list: [PvalidateEntry; REGIONS] = core::array::from_fn(|index| {
        validate(
            Gpa::new(first.get() + index as u64 * LARGE_PAGE_SIZE),
            LARGE,
        )
    });
    done(&list)?;
    for entry in list {
        let region = Gpa::new(entry.0).align_down(LARGE);
        expect_guests(region)?;
        expect_zero_page(page_of(region, 511))?;
    }
    Ok(())
}

fn through_page() -> Verdict {
    let verdict = call_through_own_page();
    setup::reopen_console();
    verdict
}

/// With a GHCB page made as Linux makes its: rescinded, then shared, then registered.
fn call_through_own_page() -> Verdict {
    let page = accepted_page()?;
    done(&[rescind(page, SMALL)])?;
    change_page_state(page, PageOperation::SHARED)?;
    let ghcb = ghcb::Page::at(page);
    ghcb.register()?;
    let target = memory::fresh_page();
    let list = List::in_calling_area();
    list.put_entries(&[validate(target, SMALL)])?;
    list.put_head(1, 0)?;
    let id = CallId::core(CoreCall::PVALIDATE);
    let answer = svsm::call_through_page(ghcb, id, Registers::rcx(svsm::buffer().get()))?;
    expect("result", answer.result(), ResultCode::SUCCESS)?;
    expect("head of the list", list.head()?, (1, 1))?;
    expect_guests(target)
}

/// The list is the guest's: the paravisor writes `next` and nothing else.
fn only_next() -> Verdict {
    let page = memory::fresh_page();
    let list = List::in_calling_area();
    let entries = [validate(page, SMALL), validate(page_of(page, 1), SMALL)];
    list.put_entries(&entries)?;
    memory::write(svsm::buffer().get() + 24, 0x5A5A_5A5A_5A5A_5A5A)?;
    list.put_head(2, 0)?;
    expect("result", list.submit()?, ResultCode::SUCCESS)?;
    for (index, entry) in entries.iter().enumerate() {
        let word = memory::read(svsm::buffer().get() + 8 + index as u64 * 8)?;
        expect("entry", word, entry.0)?;
    }
    let behind = memory::read(svsm::buffer().get() + 24)?;
    expect("word behind the list", behind, 0x5A5A_5A5A_5A5A_5A5A)?;
    expect_pvalidate(&[rescind(page, SMALL)], ResultCode::SUCCESS, 1)
}
