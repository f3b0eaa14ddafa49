//! Fields of the trust domain, measurements, reports.

use guest::harness::{Case, Finding, Verdict, case, expect, expect_not};
use guest::memory::{self, private};
use guest::tdcall::{call, call_rax, vm_rd, vm_wr};
use protocols::addr::Gpa;
use protocols::tdx::metadata::{Features0, FieldId};
use protocols::tdx::report::{ReportMac, TdReport};
use protocols::tdx::vmcall::register::{R8, R9, RAX, RCX, RDX};
use protocols::tdx::{L2Vm, Leaf, Operand, Status};
use zerocopy::{FromZeros, IntoBytes};

use crate::accept::accepted_page;

pub const CASES: &[Case] = &[
    case("vm_rd", "tdx.md §6 CONFIG_FLAGS, NUM_L2_VMS", rd),
    case(
        "vm_rd_ignores_the_context",
        "tdx.md §6 openvmm's id of CONFIG_FLAGS",
        rd_context,
    ),
    case("vm_rd_unknown_field", "tdx.md §1 C0000C00", rd_unknown),
    case("vm_rd_rcx", "tdx.md §1 leaf 7: RCX 0", rd_rcx),
    case("vm_rd_walks", "tdx.md §1 leaf 7 v1", rd_walks),
    case("vm_wr_by_mask", "tdx.md §1 leaf 8", wr),
    case("vm_wr_not_writable", "tdx.md §1 C0000C01", wr_fixed),
    case("vm_wr_bad_value", "tdx.md §1 C0000C03", wr_bad),
    case("vp_l2_ctls", "tdx.md §6 L2_CTLS", l2_ctls),
    case("sys_rd", "tdx.md §1 leaf 11", sys_rd),
    case("rtmr_extend", "tdx.md §1 leaf 2, §11", rtmr),
    case("rtmr_operands", "tdx.md §1 leaf 2", rtmr_operands),
    case("report", "tdx.md §1 leaf 4, §11 TDREPORT", report),
    case(
        "report_to_shared_memory",
        "tdx.md §1 leaf 4: private or shared",
        report_shared,
    ),
    case("report_operands", "tdx.md §1 leaf 4", report_operands),
];

const INCORRECT: u64 = Status::METADATA_FIELD_ID_INCORRECT.with(0);

fn rd() -> Verdict {
    // 48 bits of address, #VE of pending pages is the guest's choice.
    expect("CONFIG_FLAGS", vm_rd(FieldId::CONFIG_FLAGS.0)?, (0, 2))?;
    expect("NUM_L2_VMS", vm_rd(FieldId::NUM_L2_VMS.0)?, (0, 3))
}

fn rd_context() -> Verdict {
    expect("CONFIG_FLAGS", vm_rd(0x9110_0003_0000_0016)?, (0, 2))
}

fn rd_unknown() -> Verdict {
    expect("code", vm_rd(0x1110_0003_00AB_CDEF)?, (INCORRECT, 0))?;
    expect(
        "two elements",
        vm_rd(FieldId::CONFIG_FLAGS.0 | 1 << 34)?,
        (INCORRECT, 0),
    )
}

fn rd_rcx() -> Verdict {
    let operands = [(RCX, 1), (RDX, FieldId::CONFIG_FLAGS.0)];
    let after = call(Leaf::VM_RD, &operands)?;
    expect(
        "RAX, R8",
        (after[RAX], after[R8]),
        (Operand::RCX.invalid(), 0),
    )
}

fn rd_walks() -> Verdict {
    let next = |id: u64| {
        let after = call_rax(0x1_0007, &[(RCX, 0), (RDX, id)])?;
        Ok::<_, Finding>((after[RAX], after[RDX]))
    };
    let (status, mut id) = next(FieldId::NONE.0)?;
    expect(
        "first",
        status,
        Status::METADATA_FIRST_FIELD_ID_IN_CONTEXT.with(0),
    )?;
    let mut fields = 0;
    while id != FieldId::NONE.0 && fields < 100 {
        let (status, following) = next(id)?;
        expect("RAX", status, 0)?;
        fields += 1;
        id = following;
    }
    expect("fields", fields, 5)
}

fn wr() -> Verdict {
    let field = FieldId::NOTIFY_ENABLES.0;
    expect("set", vm_wr(field, 1, 1)?, (0, 0))?;
    expect("nothing masked", vm_wr(field, 0, 0)?, (0, 1))?;
    expect("clear", vm_wr(field, 0, 1)?, (0, 1))?;
    expect("read", vm_rd(field)?, (0, 0))
}

fn wr_fixed() -> Verdict {
    let fixed = Status::METADATA_FIELD_NOT_WRITABLE.with(0);
    expect(
        "NUM_L2_VMS",
        vm_wr(FieldId::NUM_L2_VMS.0, 1, 0xFF)?,
        (fixed, 0),
    )?;
    expect("NUM_L2_VMS", vm_rd(FieldId::NUM_L2_VMS.0)?, (0, 3))
}

fn wr_bad() -> Verdict {
    let bad = Status::METADATA_FIELD_VALUE_NOT_VALID.with(0);
    expect(
        "TD_CTLS",
        vm_wr(FieldId::TD_CTLS.0, 1 << 50, 1 << 50)?,
        (bad, 0),
    )?;
    expect("TD_CTLS", vm_rd(FieldId::TD_CTLS.0)?, (0, 0))
}

fn l2_ctls() -> Verdict {
    let field = FieldId::l2_ctls(L2Vm::Vm1).0;
    let write = |value| {
        let operands = [(RCX, 0), (RDX, field), (R8, value), (R9, u64::MAX)];
        let after = call(Leaf::VP_WR, &operands)?;
        Ok::<_, Finding>((after[RAX], after[R8]))
    };
    expect("set", write(3)?, (0, 0))?;
    let after = call(Leaf::VP_RD, &[(RCX, 0), (RDX, field)])?;
    expect("read", (after[RAX], after[R8]), (0, 3))?;
    let bad = Status::METADATA_FIELD_VALUE_NOT_VALID.with(0);
    expect("unknown bit", write(8)?, (bad, 0))?;
    expect("clear", write(0)?, (0, 3))
}

fn sys_rd() -> Verdict {
    let read = |field| {
        let after = call(Leaf::SYS_RD, &[(RDX, field)])?;
        Ok::<_, Finding>((after[RAX], after[R8]))
    };
    let partitioning = Features0::TD_PARTITIONING.bits();
    let features = read(FieldId::TDX_FEATURES0.0)?;
    expect("TDX_FEATURES0", features, (0, partitioning))?;
    expect("unknown", read(0x0A00_0003_0000_7777)?, (INCORRECT, 0))
}

fn extend(address: u64, index: u64) -> Result<u64, Finding> {
    Ok(call(Leaf::MR_RTMR_EXTEND, &[(RCX, address), (RDX, index)])?[RAX])
}

/// TDG.MR.REPORT; RAX.
fn make(to: u64, from: u64, subtype: u64) -> Result<u64, Finding> {
    Ok(call(Leaf::MR_REPORT, &[(RCX, to), (RDX, from), (R8, subtype)])?[RAX])
}

/// Copies a report from where it was made.
fn read_report(address: u64) -> Result<TdReport, Finding> {
    let mut report = TdReport::new_zeroed();
    for (index, word) in report.as_mut_bytes().chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&memory::read(address + 8 * index as u64)?.to_le_bytes());
    }
    Ok(report)
}

/// A report in a page of its own, with a mark as the asker's data.
fn fresh_report() -> Result<TdReport, Finding> {
    let page = accepted_page(0)?;
    let from = page.get() + 0x400;
    for word in 0..8 {
        memory::write(private(Gpa::new(from + 8 * word)), 0x1111 * (word + 1))?;
    }
    expect("RAX of REPORT", make(page.get(), from, 0)?, 0)?;
    read_report(private(page))
}

fn rtmr() -> Verdict {
    let before = fresh_report()?.td_info.rtmr;
    let page = accepted_page(0x77)?;
    expect("RAX", extend(page.get(), 2)?, 0)?;
    let once = fresh_report()?.td_info.rtmr;
    expect(
        "RTMR0, 1, 3",
        [once[0], once[1], once[3]],
        [before[0], before[1], before[3]],
    )?;
    expect_not("RTMR2", once[2], before[2])?;
    expect("RAX", extend(page.get(), 2)?, 0)?;
    expect_not("RTMR2", fresh_report()?.td_info.rtmr[2], once[2])
}

fn rtmr_operands() -> Verdict {
    let page = accepted_page(0)?.get();
    expect("alignment", extend(page + 32, 9)?, Operand::RCX.invalid())?;
    expect("shared", extend(page | 1 << 47, 9)?, Operand::RCX.invalid())?;
    expect("index", extend(page, 4)?, Operand::RDX.invalid())
}

fn report() -> Verdict {
    let report = fresh_report()?;
    expect("type", report.mac.report_type, ReportMac::TYPE_TDX)?;
    let data: [u64; 8] = core::array::from_fn(|n| 0x1111 * (n as u64 + 1));
    expect(
        "data",
        report.mac.report_data.as_bytes() == data.as_bytes(),
        true,
    )?;
    expect(
        "ATTRIBUTES, XFAM",
        (report.td_info.attributes, report.td_info.xfam),
        (0, 3),
    )?;
    expect_not("MRTD", report.td_info.mrtd, [0; 48])?;
    expect_not("TEE_INFO hash", report.mac.tee_info_hash, [0; 48])?;
    // The code covers the data.
    let page = accepted_page(0)?;
    expect("RAX", make(page.get(), page.get() + 0x400, 0)?, 0)?;
    expect_not("MAC", read_report(private(page))?.mac.mac, report.mac.mac)
}

fn report_shared() -> Verdict {
    let from = accepted_page(0x99)?;
    let to = memory::fresh_page();
    let shared = to.get() | 1 << 47;
    expect("MapGPA", guest::tdcall::map_gpa(shared, 0x1000)?.0, 0)?;
    expect("RAX", make(shared, from.get(), 0)?, 0)?;
    let report = read_report(memory::shared(to))?;
    expect("type", report.mac.report_type, ReportMac::TYPE_TDX)?;
    expect("data", report.mac.report_data[0], 0x99)
}

fn report_operands() -> Verdict {
    let page = accepted_page(0)?.get();
    let data = page + 0x800;
    expect(
        "report",
        make(page + 512, data + 32, 1)?,
        Operand::RCX.invalid(),
    )?;
    expect("data", make(page, data + 32, 1)?, Operand::RDX.invalid())?;
    expect("subtype", make(page, data, 1)?, Operand::R8.invalid())?;
    expect("width", make(1 << 50, data, 0)?, Operand::RCX.invalid())
}
