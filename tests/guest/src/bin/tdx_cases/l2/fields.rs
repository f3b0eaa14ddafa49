//! TDG.VP.RD and TDG.VP.WR of the fields of L2 VMs.

use guest::harness::{Case, Verdict, case, expect};
use protocols::tdx::metadata::FieldId;
use protocols::tdx::vmcs::{Field, msr_bitmaps};
use protocols::tdx::{L2Vm, Status};

use super::vm::{Vm, read_field, write_field, write_field_masked};

pub const CASES: &[Case] = &[
    case(
        "l2_field_at_first",
        "tdx.md §7: masks start as all ones; §6",
        at_first,
    ),
    case("l2_field_read_back", "tdx.md §6 L2 VMCS", read_back),
    case("l2_field_by_mask", "tdx.md §1 leaf 10", by_mask),
    case("l2_fields_are_apart", "tdx.md §6 class 36 / 44 / 52", apart),
    case("l2_field_unknown", "tdx.md §1 C0000C00", unknown),
    case("l2_field_bad_value", "tdx.md §1 C0000C03", bad),
    case(
        "l2_segment_unusable",
        "docs/machine.md, TDX: L2 VMCS",
        unusable,
    ),
    case("l2_msr_bitmaps", "tdx.md §6 class 37: all ones", bitmaps),
];

const INCORRECT: (u64, u64) = (Status::METADATA_FIELD_ID_INCORRECT.with(0), 0);
const NOT_VALID: (u64, u64) = (Status::METADATA_FIELD_VALUE_NOT_VALID.with(0), 0);

fn at_first() -> Verdict {
    // Nobody has touched VM 3.
    let get = |field: Field| read_field(field.id(L2Vm::Vm3));
    expect("CR0 mask", get(Field::CR0_MASK)?, (0, u64::MAX))?;
    expect("CR4 mask", get(Field::CR4_MASK)?, (0, u64::MAX))?;
    expect("virtual APIC", get(Field::VIRTUAL_APIC)?, (0, u64::MAX))?;
    expect("exceptions", get(Field::EXCEPTION_BITMAP)?, (0, 0))?;
    let ctls = read_field(FieldId::l2_ctls(L2Vm::Vm3))?;
    expect("L2_CTLS", ctls, (0, 0))
}

fn read_back() -> Verdict {
    let vm = Vm::new()?;
    for (field, value) in [
        (Field::CR0, 0x8005_0033),
        (Field::CR3, 0x12_3000),
        (Field::CR4, 0x2660),
        (Field::EFER, 0xD01),
        (Field::PAT, 0x0007_0406_0007_0400),
        (Field::DR7, 0x401),
        (Field::RSP, 0x1_2345),
        (Field::RIP, 0xFFFF_FFFF_8000_0000),
        (Field::RFLAGS, 0x246),
        (Field::SYSENTER_CS, 0x10),
        (Field::SYSENTER_ESP, 0x5000),
        (Field::SYSENTER_EIP, 0x6000),
        (Field::CS_SELECTOR, 0x33),
        (Field::CS_LIMIT, 0xFFFF_FFFF),
        (Field::CS_RIGHTS, 0xA0FB),
        (Field::CS_BASE, 0),
        (Field::TR_SELECTOR, 0x40),
        (Field::TR_RIGHTS, 0x8B),
        (Field::TR_BASE, 0x9000),
        (Field::GDTR_LIMIT, 0x7F),
        (Field::IDTR_BASE, 0xA000),
        (Field::CR0_MASK, 0xFFFF_FFFF),
        (Field::CR4_SHADOW, 0x620),
        (Field::EOI_EXIT_3, 1 << 63),
        (Field::TPR_THRESHOLD, 5),
        (Field::INTERRUPTIBILITY, 1),
        (Field::ENTRY_ERROR_CODE, 0x18),
    ] {
        vm.set(field, value)?;
        expect("read back", vm.get(field)?, value)?;
    }
    Ok(())
}

fn by_mask() -> Verdict {
    let vm = Vm::new()?;
    let id = Field::EXCEPTION_BITMAP.id(vm.vm);
    expect("set", write_field(id, 0xFF)?, (0, 0))?;
    expect("changed", write_field_masked(id, 0x100, 0x10F)?, (0, 0xFF))?;
    expect("read", read_field(id)?, (0, 0x1F0))
}

fn apart() -> Verdict {
    let [first, second] = [L2Vm::Vm1, L2Vm::Vm2].map(|vm| Field::CR3.id(vm));
    expect("first", write_field(first, 0x1000)?.0, 0)?;
    expect("second", write_field(second, 0x2000)?.0, 0)?;
    expect("first", read_field(first)?, (0, 0x1000))
}

fn unknown() -> Verdict {
    // The fields of the host's half, of a fourth VM, and none at all.
    for id in [
        0x2420_0003_0000_6C00,
        0x3C20_0003_0000_6800,
        0x2420_0003_0000_7FFE,
        u64::MAX,
    ] {
        expect("read", read_field(FieldId(id))?, INCORRECT)?;
        expect("write", write_field(FieldId(id), 0)?, INCORRECT)?;
    }
    Ok(())
}

fn bad() -> Verdict {
    let vm = Vm::new()?;
    for (field, value) in [
        (Field::CR0, 0x8000_0013),
        (Field::CR0, 0x4000_0033),
        (Field::CR4, 0x620),
        (Field::EFER, 0x1D01),
        (Field::RFLAGS, 0),
        (Field::CS_RIGHTS, 1 << 17),
        (Field::CS_SELECTOR, 0x1_0000),
        (Field::CR0_MASK, 0),
        (Field::CR4_MASK, 0),
        (Field::VIRTUAL_APIC, vm.virtual_apic() | 1 << 47),
        (Field::VIRTUAL_APIC, vm.virtual_apic() + 8),
        (Field::PRIMARY_CONTROLS, 0),
        (Field::SECONDARY_CONTROLS, 0xFFFF_FFFF),
        (Field::ENTRY_CONTROLS, 0),
        (Field::TPR_THRESHOLD, 16),
        (Field::ACTIVITY, 1),
        (Field::INTERRUPTIBILITY, 1 << 8),
        (Field::DEBUGCTL, 1),
    ] {
        let before = vm.get(field)?;
        let id = field.id(vm.vm);
        expect("write", write_field(id, value)?, NOT_VALID)?;
        expect("unchanged", vm.get(field)?, before)?;
    }
    let ctls = FieldId::l2_ctls(vm.vm);
    expect("L2_CTLS", write_field(ctls, 8)?, NOT_VALID)
}

fn unusable() -> Verdict {
    let vm = Vm::new()?;
    const ES: u32 = 0;
    vm.segment(ES, 0x1_0000, 0, 0)?;
    expect("rights", vm.get(Field::ES_RIGHTS)?, 0x1_0000)?;
    vm.segment(ES, 0x1_C093, 0, 0)?;
    expect("rights", vm.get(Field::ES_RIGHTS)?, 0x1_C013)
}

fn bitmaps() -> Verdict {
    for word in [0, 17, 255, 511] {
        let id = msr_bitmaps::id(L2Vm::Vm3, word);
        expect("word", read_field(id)?, (0, u64::MAX))?;
    }
    let id = msr_bitmaps::id(L2Vm::Vm2, 100);
    expect("set", write_field(id, 0)?, (0, u64::MAX))?;
    expect("read", read_field(id)?, (0, 0))?;
    expect("set", write_field(id, u64::MAX)?, (0, 0))
}
