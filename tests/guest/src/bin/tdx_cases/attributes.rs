//! TDG.MEM.PAGE.ATTR.RD and ATTR.WR: what L2 VMs may do with a page.

use guest::harness::{Case, Verdict, case, expect};
use guest::memory::{self, page_of};
use guest::oracle::{self, expect_flags};
use guest::tdcall::{expect_accept, read_attributes, write_attributes};
use protocols::addr::{PageSize, Vmpl};
use protocols::oracle::{Counter, HostAct, PageFlags};
use protocols::tdx::{L2Vm, MAPPING_PENDING, Operand, PageAttributes, Status};

use crate::accept::{accepted_block, accepted_page};

pub const CASES: &[Case] = &[
    case(
        "attr_rd_of_an_accepted_page",
        "tdx.md §3 ATTR.RD",
        rd_mapped,
    ),
    case(
        "attr_rd_of_a_pending_page",
        "tdx.md §3 ATTR.RD pending",
        rd_pending,
    ),
    case("attr_rd_tells_the_level", "tdx.md §3 RCX out", rd_level),
    case(
        "attr_rd_of_a_shared_address",
        "tdx.md §1 leaf 23",
        rd_shared,
    ),
    case("attr_wr_grants", "tdx.md §3 RDX", wr_grants),
    case(
        "attr_wr_before_accept",
        "tdx.md §3 page may be PENDING",
        wr_pending,
    ),
    case("attr_wr_by_mask", "tdx.md §3 R8", wr_mask),
    case(
        "attr_wr_removes",
        "tdx.md §3 all of R, W, Xs, Xu = 0",
        wr_removes,
    ),
    case("attr_wr_vms_are_apart", "tdx.md §3 4 × u16", wr_apart),
    case("attr_wr_field_of_l1", "tdx.md §3 L1 must be 0", wr_l1),
    case("attr_wr_mask_of_l1", "tdx.md §3 L1 must be 0", wr_l1_mask),
    case(
        "attr_wr_without_valid",
        "tdx.md §3 VALID=0",
        wr_invalid_field,
    ),
    case("attr_wr_write_needs_read", "tdx.md §3 W⇒R", wr_lone_write),
    case(
        "attr_wr_refused_tells_what_there_is",
        "tdx.md §3 PAGE_ATTR_INVALID",
        wr_refused,
    ),
    case("attr_wr_of_a_busy_entry", "tdx.md §3 OPERAND_BUSY", wr_busy),
    case("attr_wr_sve", "tdx.md §3 SVE must be 0", wr_sve),
    case(
        "attr_wr_order",
        "tdx.md §3 errors: attributes before the page",
        wr_order,
    ),
    case("attr_wr_splits_a_block", "tdx.md §3 larger leaf", wr_splits),
    case(
        "attr_wr_of_a_block_in_pages",
        "tdx.md §3 entry is table",
        wr_table,
    ),
    case("attr_wr_of_a_gigabyte", "tdx.md §3 level 0–2", wr_gigabyte),
    case("attr_of_a_removed_page", "tdx.md §3 FREE", removed),
];

const ALL: PageAttributes = PageAttributes::ALL_ACCESS;
const VALID: PageAttributes = PageAttributes::VALID;
const VM1: L2Vm = L2Vm::Vm1;

/// RDX that gives everything to VM 1, and its mask.
fn all_to_vm1() -> (u64, u64) {
    (VM1.field(ALL | VALID), VM1.field(ALL))
}

/// The machine's own idea of VM 1's rights: R 1, W 2, Xu 4, Xs 8.
fn expect_rights(page: protocols::addr::Gpa, vm: L2Vm, want: u8) -> Verdict {
    let level = match vm {
        L2Vm::Vm1 => Vmpl::VMPL1,
        L2Vm::Vm2 => Vmpl::VMPL2,
        L2Vm::Vm3 => Vmpl::VMPL3,
    };
    let rights = oracle::page(page).permissions;
    expect(
        "rights of the VM",
        rights.get(level.index()).copied(),
        Some(want),
    )
}

fn rd_mapped() -> Verdict {
    let page = accepted_page(1)?;
    expect("ATTR.RD", read_attributes(page.get())?, (0, page.get(), 0))
}

fn rd_pending() -> Verdict {
    let page = memory::fresh_page();
    // The host has to give the page first; in what size is its own affair.
    let (rax, rcx, rdx) = read_attributes(page.get())?;
    expect("RAX, RDX", (rax, rdx), (0, 0))?;
    expect("pending", rcx & MAPPING_PENDING, MAPPING_PENDING)
}

fn rd_level() -> Verdict {
    let block = accepted_block()?;
    let inside = page_of(block, 100).get();
    expect("ATTR.RD", read_attributes(inside)?, (0, block.get() | 1, 0))
}

fn rd_shared() -> Verdict {
    let page = accepted_page(1)?;
    let invalid = (Operand::RCX.invalid(), 0, 0);
    expect("ATTR.RD", read_attributes(page.get() | 1 << 47)?, invalid)?;
    expect("ATTR.RD", read_attributes(page.get() | 1 << 50)?, invalid)
}

fn wr_grants() -> Verdict {
    let page = accepted_page(1)?;
    let (all, mask) = all_to_vm1();
    let done = (0, page.get(), all);
    expect("ATTR.WR", write_attributes(page.get(), all, mask)?, done)?;
    expect_rights(page, VM1, 0xF)?;
    expect("ATTR.RD", read_attributes(page.get())?, done)
}

fn wr_pending() -> Verdict {
    let page = memory::fresh_page();
    let (all, mask) = all_to_vm1();
    let pending = (0, page.get() | MAPPING_PENDING, all);
    expect("ATTR.WR", write_attributes(page.get(), all, mask)?, pending)?;
    expect_accept(page, PageSize::Size4K, 0)?;
    expect(
        "ATTR.RD",
        read_attributes(page.get())?,
        (0, page.get(), all),
    )
}

fn wr_mask() -> Verdict {
    let page = accepted_page(1)?;
    let (all, mask) = all_to_vm1();
    write_attributes(page.get(), all, mask)?;
    // Write goes, though RDX says nothing of the others.
    let wanted = VM1.field(VALID);
    let only_write = VM1.field(PageAttributes::WRITE);
    let left = VM1.field(ALL.difference(PageAttributes::WRITE) | VALID);
    let after = write_attributes(page.get(), wanted, only_write)?;
    expect("ATTR.WR", after, (0, page.get(), left))?;
    expect_rights(page, VM1, 0xD)
}

fn wr_removes() -> Verdict {
    let page = accepted_page(1)?;
    let (all, mask) = all_to_vm1();
    write_attributes(page.get(), all, mask)?;
    let gone = VM1.field(VALID);
    expect(
        "ATTR.WR",
        write_attributes(page.get(), gone, mask)?,
        (0, page.get(), gone),
    )?;
    expect_rights(page, VM1, 0)?;
    expect("ATTR.RD", read_attributes(page.get())?, (0, page.get(), 0))
}

fn wr_apart() -> Verdict {
    let page = accepted_page(1)?;
    let read = PageAttributes::READ | VALID;
    let both = L2Vm::Vm2.field(read) | L2Vm::Vm3.field(ALL | VALID);
    let mask = L2Vm::Vm2.field(ALL) | L2Vm::Vm3.field(ALL);
    expect(
        "ATTR.WR",
        write_attributes(page.get(), both, mask)?,
        (0, page.get(), both),
    )?;
    expect_rights(page, L2Vm::Vm1, 0)?;
    expect_rights(page, L2Vm::Vm2, 1)?;
    expect_rights(page, L2Vm::Vm3, 0xF)
}

fn wr_l1() -> Verdict {
    let page = accepted_page(1)?;
    let after = write_attributes(page.get(), 0x800F, 0)?;
    expect("ATTR.WR", after, (Operand::RDX.invalid(), 0, 0))
}

fn wr_l1_mask() -> Verdict {
    let page = accepted_page(1)?;
    let (all, _) = all_to_vm1();
    let after = write_attributes(page.get(), all, 1)?;
    expect("ATTR.WR", after, (Operand::R8.invalid(), 0, 0))?;
    expect_rights(page, VM1, 0)
}

fn wr_invalid_field() -> Verdict {
    let page = accepted_page(1)?;
    let after = write_attributes(page.get(), VM1.field(ALL), VM1.field(ALL))?;
    expect("ATTR.WR", after, (Operand::RDX.invalid(), 0, 0))
}

fn wr_lone_write() -> Verdict {
    let page = accepted_page(1)?;
    let write = VM1.field(PageAttributes::WRITE | VALID);
    let after = write_attributes(page.get(), write, VM1.field(ALL))?;
    expect("ATTR.WR", after, (Status::PAGE_ATTR_INVALID.with(0), 0, 0))?;
    expect_rights(page, VM1, 0)
}

/// One VM's field is wrong: nothing changes for any, and RDX has what all of them have.
fn wr_refused() -> Verdict {
    let page = accepted_page(1)?;
    let read = PageAttributes::READ | VALID;
    let now = VM1.field(ALL | VALID) | L2Vm::Vm3.field(read);
    let mask = VM1.field(ALL) | L2Vm::Vm2.field(ALL) | L2Vm::Vm3.field(ALL);
    let done = (0, page.get(), now);
    expect("ATTR.WR", write_attributes(page.get(), now, mask)?, done)?;
    let lone_write = L2Vm::Vm2.field(PageAttributes::WRITE | VALID);
    let wanted = VM1.field(read) | lone_write | L2Vm::Vm3.field(ALL | VALID);
    let refused = (Status::PAGE_ATTR_INVALID.with(0), 0, now);
    expect(
        "ATTR.WR",
        write_attributes(page.get(), wanted, mask)?,
        refused,
    )?;
    expect("ATTR.RD", read_attributes(page.get())?, done)
}

fn wr_busy() -> Verdict {
    let page = accepted_page(1)?;
    let (all, mask) = all_to_vm1();
    oracle::host_act(page, HostAct::HOLD)?;
    let busy = (Status::OPERAND_BUSY.with(Operand::RCX.0), 0, 0);
    expect("ATTR.WR", write_attributes(page.get(), all, mask)?, busy)?;
    expect_rights(page, VM1, 0)?;
    oracle::host_act(page, HostAct::HOLD)?;
    let done = (0, page.get(), all);
    expect("ATTR.WR", write_attributes(page.get(), all, mask)?, done)
}

fn wr_sve() -> Verdict {
    let page = accepted_page(1)?;
    let sve = PageAttributes::from_bits_retain(1 << 7);
    let wanted = VM1.field(ALL | VALID | sve);
    let after = write_attributes(page.get(), wanted, VM1.field(ALL | sve))?;
    expect("RAX", after.0, Status::PAGE_ATTR_INVALID.with(0))?;
    expect_rights(page, VM1, 0)
}

fn wr_order() -> Verdict {
    let (all, mask) = all_to_vm1();
    let shared = 1 << 47 | 7;
    let rax = |after: (u64, u64, u64)| after.0;
    expect(
        "field",
        rax(write_attributes(shared, 1, 1)?),
        Operand::RDX.invalid(),
    )?;
    expect(
        "mask",
        rax(write_attributes(shared, all, mask | 1)?),
        Operand::R8.invalid(),
    )?;
    expect(
        "page",
        rax(write_attributes(shared, all, mask)?),
        Operand::RCX.invalid(),
    )
}

fn wr_splits() -> Verdict {
    let block = accepted_block()?;
    let (all, mask) = all_to_vm1();
    let page = page_of(block, 3);
    let exits = oracle::counter(Counter::TD_EXIT);
    expect(
        "ATTR.WR",
        write_attributes(page.get(), all, mask)?,
        (0, page.get(), all),
    )?;
    expect("exits", oracle::counter(Counter::TD_EXIT) - exits, 1)?;
    expect_rights(page, VM1, 0xF)?;
    expect_rights(page_of(block, 4), VM1, 0)?;
    let kept = PageFlags::VALIDATED | PageFlags::SIZE_2M;
    expect_flags(page_of(block, 4), kept, PageFlags::VALIDATED)
}

fn wr_table() -> Verdict {
    let region = memory::fresh_region();
    expect_accept(page_of(region, 1), PageSize::Size4K, 0)?;
    let (all, mask) = all_to_vm1();
    let after = write_attributes(region.get() | 1, all, mask)?;
    expect("ATTR.WR", after, (Status::PAGE_SIZE_MISMATCH.with(1), 0, 0))
}

fn wr_gigabyte() -> Verdict {
    let (all, mask) = all_to_vm1();
    let rax = |after: (u64, u64, u64)| after.0;
    let after = rax(write_attributes(0x4000_0000 | 2, all, mask)?);
    expect("level 2", after, Status::PAGE_SIZE_MISMATCH.with(2))?;
    let after = rax(write_attributes(0x4000_0000 | 3, all, mask)?);
    expect("level 3", after, Operand::RCX.invalid())
}

fn removed() -> Verdict {
    let page = accepted_page(1)?;
    let (all, mask) = all_to_vm1();
    write_attributes(page.get(), all, mask)?;
    oracle::host_act(page, HostAct::TAKE_AWAY)?;
    // The alias went with the page.
    let pending = (0, page.get() | MAPPING_PENDING, 0);
    expect("ATTR.RD", read_attributes(page.get())?, pending)
}
