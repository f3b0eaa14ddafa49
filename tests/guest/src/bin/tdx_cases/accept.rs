//! TDG.MEM.PAGE.ACCEPT, row by row, and what a host can do to an accepted page.

use guest::harness::{Case, Finding, Verdict, case, expect};
use guest::insn;
use guest::memory::{self, page_of, private};
use guest::oracle::{self, expect_flags};
use guest::tdcall::{call, expect_accept, map_gpa};
use guest::trap::Trap;
use protocols::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE, PageSize};
use protocols::oracle::{Counter, HostAct, PageFlags};
use protocols::tdx::vmcall::register::{RAX, RCX};
use protocols::tdx::{Leaf, Operand, Status};

use crate::ve::take_info;

pub const CASES: &[Case] = &[
    case("accept_4k", "tdx.md §2 rows 9, 10", accept_4k),
    case("accept_zeroes_every_line", "tdx.md §2 row 9", zeroes),
    case("accept_2m", "tdx.md §2 rows 6, 9, 10", accept_2m),
    case("accept_twice", "tdx.md §2 row 7", accept_twice),
    case(
        "accept_4k_in_an_accepted_block",
        "tdx.md §2 row 3",
        small_in_large,
    ),
    case(
        "accept_4k_in_a_pending_block",
        "tdx.md §2 row 4",
        splits_pending,
    ),
    case("accept_2m_over_pages", "tdx.md §2 row 6", large_over_small),
    case(
        "memory_below_1_mib_has_no_hole",
        "docs/machine.md, TDX: memory",
        legacy_hole,
    ),
    case("accept_of_a_busy_entry", "tdx.md §2 row 5", busy),
    case(
        "the_walk_comes_before_the_lock",
        "tdx.md §2 rows 3 to 5",
        walk_first,
    ),
    case("accept_level_2", "tdx.md §2 row 1 level", level_2),
    case(
        "accept_levels_3_to_7",
        "tdx.md §2 row 1 level",
        levels_above,
    ),
    case(
        "accept_reserved_low_bits",
        "tdx.md §2 row 1 bits 11:3",
        reserved_low,
    ),
    case(
        "accept_reserved_high_bits",
        "tdx.md §2 row 1 bits 63:52",
        reserved_high,
    ),
    case(
        "accept_misaligned_block",
        "tdx.md §2 row 1 alignment",
        misaligned,
    ),
    case("accept_shared_address", "tdx.md §2 row 2", shared_address),
    case("accept_above_the_width", "tdx.md §2 row 2", above_width),
    case(
        "accept_keeps_other_registers",
        "tdx.md §1 leaf 6: no output",
        keeps_registers,
    ),
    case("pending_until_accepted", "tdx.md §3 PENDING", pending_until),
    case(
        "accept_of_a_blocked_pending_page",
        "tdx.md §2 row 8",
        blocked_pending,
    ),
    case(
        "accept_of_a_blocked_page",
        "tdx.md §2 rows 8, 7",
        blocked_mapped,
    ),
    case("use_of_a_blocked_page", "tdx.md §3 BLOCKED", blocked_use),
    case(
        "removed_page_is_pending_again",
        "tdx.md §2 consequences",
        removed,
    ),
    case(
        "second_accept_zeroes_silently",
        "tdx.md §2 consequences",
        silently_zeroed,
    ),
    case(
        "removed_page_splits_its_block",
        "tdx.md §3 FREE",
        removed_in_block,
    ),
    case(
        "shared_then_private_is_pending",
        "tdx.md §4 MapGPA",
        back_to_private,
    ),
    case(
        "the_machine_counts_double_accepts",
        "tdx.md §2 consequences",
        counted,
    ),
];

const DONE: u64 = 0;
const fn already(level: u32) -> u64 {
    Status::PAGE_ALREADY_ACCEPTED.with(level)
}
const BUSY: u64 = Status::OPERAND_BUSY.with(Operand::RCX.0);
const MISMATCH: u64 = Status::PAGE_SIZE_MISMATCH.with(1);

/// A page that L1 has accepted, with a value in it.
pub fn accepted_page(value: u64) -> Result<Gpa, Finding> {
    let page = memory::fresh_page();
    expect_accept(page, PageSize::Size4K, DONE)?;
    memory::write(private(page), value)?;
    Ok(page)
}

/// A block that L1 has accepted at once.
pub fn accepted_block() -> Result<Gpa, Finding> {
    let region = memory::fresh_region();
    oracle::host_act(region, HostAct::BACK_BY_2M)?;
    expect_accept(region, PageSize::Size2M, DONE)?;
    Ok(region)
}

fn expect_operand_invalid(rcx: u64) -> Verdict {
    let after = call(Leaf::MEM_PAGE_ACCEPT, &[(RCX, rcx)])?;
    expect("RAX", after[RAX], Operand::RCX.invalid())
}

/// Reading the page raises #VE.
fn expect_pending(page: Gpa) -> Verdict {
    expect("read", insn::load(private(page)), Err(Trap::VE))?;
    take_info().map(|_| ())
}

fn accept_4k() -> Verdict {
    let page = memory::fresh_page();
    expect_accept(page, PageSize::Size4K, DONE)?;
    let wanted = PageFlags::ASSIGNED | PageFlags::VALIDATED | PageFlags::HOST_PRIVATE;
    expect_flags(page, wanted, wanted)?;
    memory::write(private(page), 7)?;
    expect("content", memory::read(private(page))?, 7)
}

fn zeroes() -> Verdict {
    let page = memory::fresh_page();
    expect_accept(page, PageSize::Size4K, DONE)?;
    memory::expect_zero(private(page), PAGE_SIZE)
}

fn accept_2m() -> Verdict {
    let region = memory::fresh_region();
    let status = guest::tdcall::accept(region, PageSize::Size2M)?;
    // The host backs by 4 KiB, or by 2 MiB.
    let large = oracle::page(region).flags.contains(PageFlags::SIZE_2M);
    expect("RAX", status, if large { DONE } else { MISMATCH })?;
    let region = accepted_block()?;
    expect_flags(region, PageFlags::SIZE_2M, PageFlags::SIZE_2M)?;
    memory::expect_zero(private(region), LARGE_PAGE_SIZE)
}

/// Linux looks for ROMs there, by private accesses.
fn legacy_hole() -> Verdict {
    for gpa in [0xA_0000, 0xC_0000, 0xF_F000] {
        let page = Gpa::new(gpa);
        expect_accept(page, PageSize::Size4K, DONE)?;
        memory::expect_zero(private(page), PAGE_SIZE)?;
    }
    Ok(())
}

fn accept_twice() -> Verdict {
    let page = accepted_page(0xA5)?;
    expect_accept(page, PageSize::Size4K, already(0))?;
    expect("content", memory::read(private(page))?, 0xA5)?;
    let block = accepted_block()?;
    memory::write(private(block), 0xA6)?;
    expect_accept(block, PageSize::Size2M, already(1))?;
    expect("content", memory::read(private(block))?, 0xA6)
}

fn small_in_large() -> Verdict {
    let block = accepted_block()?;
    let page = page_of(block, 77);
    memory::write(private(page), 0xA7)?;
    expect_accept(page, PageSize::Size4K, already(1))?;
    expect("content", memory::read(private(page))?, 0xA7)?;
    // Nothing was split for it.
    expect_flags(page, PageFlags::SIZE_2M, PageFlags::SIZE_2M)
}

fn splits_pending() -> Verdict {
    let region = memory::fresh_region();
    oracle::host_act(region, HostAct::BACK_BY_2M)?;
    let exits = oracle::counter(Counter::TD_EXIT);
    expect_accept(page_of(region, 5), PageSize::Size4K, DONE)?;
    let after = oracle::counter(Counter::TD_EXIT);
    expect("exits to the host", after - exits, 1)?;
    expect_flags(region, PageFlags::SIZE_2M, PageFlags::empty())?;
    oracle::expect_validated(page_of(region, 6), false)?;
    expect_pending(page_of(region, 6))
}

fn large_over_small() -> Verdict {
    let region = memory::fresh_region();
    expect_accept(page_of(region, 511), PageSize::Size4K, DONE)?;
    expect_accept(region, PageSize::Size2M, MISMATCH)?;
    oracle::expect_validated(region, false)
}

fn busy() -> Verdict {
    let region = memory::fresh_region();
    let page = page_of(region, 3);
    oracle::host_act(page, HostAct::HOLD)?;
    expect_accept(page, PageSize::Size4K, BUSY)?;
    oracle::expect_validated(page, false)?;
    // Its neighbour's entry is another.
    expect_accept(page_of(region, 4), PageSize::Size4K, DONE)?;
    // Row 5 comes before row 6.
    expect_accept(region, PageSize::Size2M, BUSY)?;
    oracle::host_act(page, HostAct::HOLD)?;
    expect_accept(region, PageSize::Size2M, MISMATCH)?;
    expect_accept(page, PageSize::Size4K, DONE)
}

/// A walk that ends before the entry asks for no lock.
fn walk_first() -> Verdict {
    let block = accepted_block()?;
    let page = page_of(block, 3);
    oracle::host_act(page, HostAct::HOLD)?;
    expect_accept(page, PageSize::Size4K, already(1))?;
    oracle::host_act(page, HostAct::HOLD)?;
    let region = memory::fresh_region();
    oracle::host_act(region, HostAct::BACK_BY_2M)?;
    let page = page_of(region, 3);
    oracle::host_act(page, HostAct::HOLD)?;
    let exits = oracle::counter(Counter::TD_EXIT);
    expect_accept(page, PageSize::Size4K, BUSY)?;
    expect("exits", oracle::counter(Counter::TD_EXIT) - exits, 1)?;
    oracle::host_act(page, HostAct::HOLD)?;
    expect_accept(page, PageSize::Size4K, DONE)
}

fn level_2() -> Verdict {
    expect_operand_invalid(0x4000_0000 | 2)
}

fn levels_above() -> Verdict {
    (3..8).try_for_each(expect_operand_invalid)
}

fn reserved_low() -> Verdict {
    let page = memory::fresh_page();
    (3..12).try_for_each(|bit| expect_operand_invalid(page.get() | 1 << bit))?;
    oracle::expect_validated(page, false)
}

fn reserved_high() -> Verdict {
    let page = memory::fresh_page();
    (52..64).try_for_each(|bit| expect_operand_invalid(page.get() | 1 << bit))?;
    oracle::expect_validated(page, false)
}

fn misaligned() -> Verdict {
    let region = memory::fresh_region();
    expect_operand_invalid(page_of(region, 1).get() | 1)?;
    oracle::expect_validated(region, false)
}

fn shared_address() -> Verdict {
    let page = memory::fresh_page();
    expect_operand_invalid(page.get() | 1 << 47)?;
    oracle::expect_validated(page, false)
}

fn above_width() -> Verdict {
    let page = memory::fresh_page();
    (48..52).try_for_each(|bit| expect_operand_invalid(page.get() | 1 << bit))
}

fn keeps_registers() -> Verdict {
    let page = memory::fresh_page();
    let before = guest::tdcall::registers(&[(RAX, 6), (RCX, page.get())]);
    let after =
        guest::tdcall::tdcall(before).map_err(|trap| Finding::new(format_args!("{trap:x?}")))?;
    let mut wanted = before;
    wanted[RAX] = DONE;
    // RSP is no register of the call.
    wanted[4] = after[4];
    expect("registers", after, wanted)
}

fn pending_until() -> Verdict {
    let page = memory::fresh_page();
    expect_pending(page)?;
    // The access made the host give a page; it is the guest's only when accepted.
    expect_flags(
        page,
        PageFlags::ASSIGNED | PageFlags::VALIDATED,
        PageFlags::ASSIGNED,
    )?;
    expect_accept(page, PageSize::Size4K, DONE)?;
    expect("content", memory::read(private(page))?, 0)
}

fn blocked_pending() -> Verdict {
    let page = memory::fresh_page();
    expect_pending(page)?;
    oracle::host_act(page, HostAct::BLOCK)?;
    let exits = oracle::counter(Counter::TD_EXIT);
    expect_accept(page, PageSize::Size4K, DONE)?;
    let after = oracle::counter(Counter::TD_EXIT);
    expect("an exit to the host", after > exits, true)
}

fn blocked_mapped() -> Verdict {
    let page = accepted_page(0xB1)?;
    oracle::host_act(page, HostAct::BLOCK)?;
    expect_accept(page, PageSize::Size4K, already(0))?;
    expect("content", memory::read(private(page))?, 0xB1)
}

fn blocked_use() -> Verdict {
    let page = accepted_page(0xB2)?;
    oracle::host_act(page, HostAct::BLOCK)?;
    // The host unblocks, and the guest has seen nothing.
    expect("content", memory::read(private(page))?, 0xB2)
}

fn removed() -> Verdict {
    let page = accepted_page(0xC1)?;
    oracle::host_act(page, HostAct::TAKE_AWAY)?;
    expect_pending(page)?;
    oracle::expect_validated(page, false)
}

fn silently_zeroed() -> Verdict {
    let page = accepted_page(0xC2)?;
    oracle::host_act(page, HostAct::TAKE_AWAY)?;
    expect_accept(page, PageSize::Size4K, DONE)?;
    expect("content", memory::read(private(page))?, 0)
}

fn removed_in_block() -> Verdict {
    let block = accepted_block()?;
    memory::write(private(page_of(block, 9)), 0xC3)?;
    oracle::host_act(page_of(block, 8), HostAct::TAKE_AWAY)?;
    expect_pending(page_of(block, 8))?;
    expect("neighbour", memory::read(private(page_of(block, 9)))?, 0xC3)?;
    expect_accept(block, PageSize::Size2M, MISMATCH)
}

fn back_to_private() -> Verdict {
    let page = accepted_page(0xC4)?;
    expect("to shared", map_gpa(page.get() | 1 << 47, PAGE_SIZE)?.0, 0)?;
    expect_flags(
        page,
        PageFlags::ASSIGNED | PageFlags::HOST_PRIVATE,
        PageFlags::empty(),
    )?;
    memory::write(memory::shared(page), 0xC5)?;
    expect("to private", map_gpa(page.get(), PAGE_SIZE)?.0, 0)?;
    expect_pending(page)?;
    expect_accept(page, PageSize::Size4K, DONE)?;
    expect("content", memory::read(private(page))?, 0)
}

fn counted() -> Verdict {
    let before = oracle::counter(Counter::DOUBLE_VALIDATION);
    let accepts = oracle::counter(Counter::ACCEPT_4K);
    let page = accepted_page(1)?;
    expect_accept(page, PageSize::Size4K, already(0))?;
    oracle::host_act(page, HostAct::TAKE_AWAY)?;
    expect_accept(page, PageSize::Size4K, DONE)?;
    let after = oracle::counter(Counter::DOUBLE_VALIDATION);
    expect("double accepts", after - before, 2)?;
    let executed = oracle::counter(Counter::ACCEPT_4K) - accepts;
    expect("accepts of 4 KiB", executed, 3)
}
