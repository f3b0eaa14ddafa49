//! Cases of L1's that mean something else to its guest: a trust domain without L2 VMs, whose accepts
//! the paravisor splits.

use guest::harness::{Case, Verdict, case, expect};
use guest::memory::{self, private};
use guest::tdcall::{call, expect_accept, vm_rd, vm_wr};
use protocols::addr::{LARGE_PAGE_SIZE, PageSize};
use protocols::tdx::metadata::{FieldId, TdControls};
use protocols::tdx::vmcall::register::{R8, R9, RAX, RCX, RDX};
use protocols::tdx::{L2Vm, Leaf, Status};

pub const CASES: &[Case] = &[
    case(
        "accept_2m_on_any_backing",
        "tdx.md §2 rows 6, 9, 10",
        accept_2m,
    ),
    case("fields_without_l2_vms", "tdx.md §6", fields),
    case("controls_by_mask", "tdx.md §6 TD_CTLS", by_mask),
    case(
        "fields_that_are_fixed",
        "tdx.md §6 not writable",
        not_writable,
    ),
    case(
        "no_notifications",
        "tdx.md §6 NOTIFY_ENABLES",
        no_notifications,
    ),
    case(
        "no_field_of_a_processor",
        "tdx.md §6 VP.RD, VP.WR",
        vp_fields,
    ),
    case("no_such_system_field", "tdx.md §6 SYS.RD", sys_rd),
];

const INCORRECT: u64 = Status::METADATA_FIELD_ID_INCORRECT.with(0);

/// What the host holds as small pages the paravisor accepts one by one: never a mismatch.
fn accept_2m() -> Verdict {
    let region = memory::fresh_region();
    expect_accept(region, PageSize::Size2M, 0)?;
    memory::expect_zero(private(region), LARGE_PAGE_SIZE)
}

fn fields() -> Verdict {
    for (field, wanted) in [
        (FieldId::NUM_L2_VMS, 0),
        (FieldId::NOTIFY_ENABLES, 0),
        (FieldId::TD_CTLS, 0),
    ] {
        expect("RAX, R8", vm_rd(field.0)?, (0, wanted))?;
    }
    expect("CONFIG_FLAGS", vm_rd(FieldId::CONFIG_FLAGS.0)?.0, 0)?;
    expect(
        "of a processor",
        vm_rd(FieldId::l2_ctls(L2Vm::Vm1).0)?,
        (INCORRECT, 0),
    )
}

fn by_mask() -> Verdict {
    let field = FieldId::TD_CTLS.0;
    let bit = TdControls::PENDING_VE_DISABLE.bits();
    expect("nothing masked", vm_wr(field, bit, 0)?, (0, 0))?;
    expect("set", vm_wr(field, u64::MAX, bit)?, (0, 0))?;
    expect("read", vm_rd(field)?, (0, bit))?;
    expect("clear", vm_wr(field, 0, bit)?, (0, bit))?;
    expect("read", vm_rd(field)?, (0, 0))
}

fn not_writable() -> Verdict {
    let fixed = Status::METADATA_FIELD_NOT_WRITABLE.with(0);
    for field in [FieldId::NUM_L2_VMS, FieldId::CONFIG_FLAGS] {
        let before = vm_rd(field.0)?;
        expect("RAX, R8", vm_wr(field.0, 1, 0xFF)?, (fixed, 0))?;
        expect("unchanged", vm_rd(field.0)?, before)?;
    }
    Ok(())
}

/// There are none, so nobody can ask for them.
fn no_notifications() -> Verdict {
    let field = FieldId::NOTIFY_ENABLES.0;
    let bad = Status::METADATA_FIELD_VALUE_NOT_VALID.with(0);
    expect("set", vm_wr(field, 1, 1)?, (bad, 0))?;
    expect("nothing masked", vm_wr(field, 1, 0)?, (0, 0))?;
    expect("read", vm_rd(field)?, (0, 0))
}

fn vp_fields() -> Verdict {
    let field = FieldId::l2_ctls(L2Vm::Vm1).0;
    let write = [(RCX, 0), (RDX, field), (R8, 3), (R9, u64::MAX)];
    for (leaf, operands) in [
        (Leaf::VP_RD, &[(RCX, 0), (RDX, field)] as &[(usize, u64)]),
        (Leaf::VP_WR, &write),
    ] {
        let after = call(leaf, operands)?;
        expect("RAX, R8", (after[RAX], after[R8]), (INCORRECT, 0))?;
    }
    Ok(())
}

fn sys_rd() -> Verdict {
    let after = call(Leaf::SYS_RD, &[(RDX, 0x0A00_0003_0000_7777)])?;
    expect("RAX, R8", (after[RAX], after[R8]), (INCORRECT, 0))
}
