//! What is the paravisor's: its own memory, and the leaves it does not pass on.

use guest::harness::{Case, Verdict, case, expect, expect_not};
use guest::insn;
use guest::memory::{self, private};
use guest::oracle;
use guest::tdcall::{accept, call, expect_accept, map_gpa, read_attributes};
use guest::trap::Trap;
use protocols::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE, PageSize};
use protocols::launch::{REGION_GPA, REGION_SIZE};
use protocols::oracle::Counter;
use protocols::tdx::metadata::{Features0, FieldId};
use protocols::tdx::ve::ExitReason;
use protocols::tdx::vmcall::Status as HostStatus;
use protocols::tdx::vmcall::register::{R8, RAX, RCX, RDX};
use protocols::tdx::{Leaf, MAPPING_PENDING, Operand, Status};

use crate::reset;
use crate::ve::take_info;

pub const CASES: &[Case] = &[
    case("region_is_not_accepted", "design.md I4", region_accept),
    case("region_is_not_shared", "design.md I4", region_share),
    case("region_is_not_made_private", "design.md I4", region_private),
    case("region_is_not_read", "design.md I4", region_read),
    case("region_is_no_report_buffer", "design.md I4", region_report),
    case("region_is_no_measurement", "design.md I4", region_extend),
    case(
        "block_with_the_region_is_not_accepted",
        "design.md I4",
        region_block,
    ),
    case("carve_out_is_not_listed", "design.md §8", listed),
    case("no_l2_vms", "tdx.md §6 NUM_L2_VMS", no_l2_vms),
    case(
        "no_partitioning",
        "tdx.md §6 TDX_FEATURES0",
        no_partitioning,
    ),
    case("leaves_of_l1", "tdx.md §1 unknown leaf", leaves_of_l1),
    case(
        "one_page_accepted_in_a_block",
        "tdx.md §2 row 6",
        page_in_block,
    ),
    case("no_page_is_accepted_twice", "design.md I2", never_twice),
    case(
        "attributes_of_own_pages",
        "tdx.md §1 leaf 23",
        own_attributes,
    ),
];

const SHARED: u64 = 1 << 47;
const INVALID_RCX: u64 = Operand::RCX.invalid();

/// The map and the secure EPT agree (I11). Asked after every case.
pub fn map_and_sept_agree() -> Verdict {
    expect("disagreements", oracle::disagreements(), 0)
}

fn region_accept() -> Verdict {
    for gpa in [REGION_GPA, REGION_GPA + REGION_SIZE - PAGE_SIZE] {
        expect_accept(Gpa::new(gpa), PageSize::Size4K, INVALID_RCX)?;
    }
    expect_accept(Gpa::new(REGION_GPA), PageSize::Size2M, INVALID_RCX)
}

fn region_block() -> Verdict {
    let last = REGION_GPA + REGION_SIZE - LARGE_PAGE_SIZE;
    expect_accept(Gpa::new(last), PageSize::Size2M, INVALID_RCX)
}

fn region_share() -> Verdict {
    let wanted = HostStatus::INVALID_OPERAND.0;
    let answer = map_gpa(SHARED | REGION_GPA, PAGE_SIZE)?;
    expect("R10, R11", answer, (wanted, SHARED | REGION_GPA))?;
    // The part before it is done, and the answer says how far.
    let page = memory::fresh_region();
    expect_accept(page, PageSize::Size4K, 0)?;
    let before = REGION_GPA - PAGE_SIZE;
    let answer = map_gpa(SHARED | before, 2 * PAGE_SIZE)?;
    expect("R10, R11", answer, (wanted, SHARED | REGION_GPA))?;
    expect("back", map_gpa(before, PAGE_SIZE)?.0, 0)
}

fn region_private() -> Verdict {
    let wanted = HostStatus::INVALID_OPERAND.0;
    expect("R10", map_gpa(REGION_GPA, LARGE_PAGE_SIZE)?.0, wanted)
}

fn region_read() -> Verdict {
    let gpa = Gpa::new(REGION_GPA);
    expect("read", insn::load(private(gpa)), Err(Trap::VE))?;
    let [reason, _, _, at, _] = take_info()?;
    expect("reason", reason, u64::from(ExitReason::EPT_VIOLATION.0))?;
    expect("address", at & !(PAGE_SIZE - 1), REGION_GPA)
}

fn region_report() -> Verdict {
    let page = memory::fresh_page();
    expect_accept(page, PageSize::Size4K, 0)?;
    let operands = [(RCX, REGION_GPA), (RDX, page.get()), (R8, 0)];
    expect("RAX", call(Leaf::MR_REPORT, &operands)?[RAX], INVALID_RCX)?;
    let operands = [(RCX, page.get()), (RDX, REGION_GPA), (R8, 0)];
    let after = call(Leaf::MR_REPORT, &operands)?;
    expect("RAX", after[RAX], Operand::RDX.invalid())
}

fn region_extend() -> Verdict {
    let operands = [(RCX, REGION_GPA), (RDX, 2)];
    expect(
        "RAX",
        call(Leaf::MR_RTMR_EXTEND, &operands)?[RAX],
        INVALID_RCX,
    )
}

/// No stretch of the list touches the region, and the list's own page is in one that is accepted.
fn listed() -> Verdict {
    let read = |offset: u64| memory::read(private(Gpa::new(u64::from(reset::HOB) + offset)));
    let mut offset = 56;
    let mut found = 0;
    loop {
        let head = read(offset)?;
        let (kind, length) = (head & 0xFFFF, head >> 16 & 0xFFFF);
        if kind == 0xFFFF {
            break;
        }
        expect("kind, length", (kind, length), (3, 48))?;
        let resource = read(offset + 24)? as u32;
        let (start, bytes) = (read(offset + 32)?, read(offset + 40)?);
        let end = start + bytes;
        if start < REGION_GPA + REGION_SIZE && REGION_GPA < end {
            expect("a stretch with the region", (start, end), (0, 0))?;
        }
        if (start..end).contains(&u64::from(reset::HOB)) {
            expect("the list's own page is", resource, 0)?;
            found += 1;
        }
        offset += length;
    }
    expect("stretches with the list", found, 1)
}

fn no_l2_vms() -> Verdict {
    let after = call(Leaf::VM_RD, &[(RCX, 0), (RDX, FieldId::NUM_L2_VMS.0)])?;
    expect("RAX, R8", (after[RAX], after[R8]), (0, 0))
}

fn no_partitioning() -> Verdict {
    let after = call(Leaf::SYS_RD, &[(RDX, FieldId::TDX_FEATURES0.0)])?;
    expect("RAX", after[RAX], 0)?;
    expect("bit", after[R8] & Features0::TD_PARTITIONING.bits(), 0)
}

fn leaves_of_l1() -> Verdict {
    let wanted = Operand::RAX.invalid();
    for leaf in [
        Leaf::MEM_PAGE_ATTR_WR,
        Leaf::VP_ENTER,
        Leaf::VP_INVEPT,
        Leaf::VP_INVGLA,
        Leaf(12),
        Leaf(0xFFFF),
    ] {
        let page = u64::from(reset::HOB);
        let after = call(leaf, &[(RCX, page), (RDX, page), (R8, 0)])?;
        expect("RAX", after[RAX], wanted)?;
    }
    Ok(())
}

fn page_in_block() -> Verdict {
    let block = memory::fresh_region();
    let page = Gpa::new(block.get() + 5 * PAGE_SIZE);
    expect_accept(page, PageSize::Size4K, 0)?;
    memory::write(private(page), 77)?;
    let mismatch = Status::PAGE_SIZE_MISMATCH.with(1);
    expect_accept(block, PageSize::Size2M, mismatch)?;
    expect("content", memory::read(private(page))?, 77)?;
    expect_accept(Gpa::new(block.get() + 6 * PAGE_SIZE), PageSize::Size4K, 0)
}

fn never_twice() -> Verdict {
    let before = oracle::counter(Counter::DOUBLE_VALIDATION);
    let block = memory::fresh_region();
    expect_accept(block, PageSize::Size2M, 0)?;
    memory::write(private(block), 99)?;
    for size in [PageSize::Size2M, PageSize::Size4K] {
        expect_not("RAX", accept(block, size)?, 0)?;
    }
    expect("content", memory::read(private(block))?, 99)?;
    expect(
        "counted",
        oracle::counter(Counter::DOUBLE_VALIDATION),
        before,
    )
}

fn own_attributes() -> Verdict {
    let block = memory::fresh_region();
    let (rax, rcx, rdx) = read_attributes(block.get())?;
    expect(
        "pending",
        (rax, rcx, rdx),
        (0, block.get() | MAPPING_PENDING, 0),
    )?;
    expect_accept(block, PageSize::Size4K, 0)?;
    let (rax, rcx, _) = read_attributes(block.get())?;
    expect("accepted", (rax, rcx), (0, block.get()))?;
    let (rax, ..) = read_attributes(REGION_GPA)?;
    expect("the region", rax, INVALID_RCX)
}
