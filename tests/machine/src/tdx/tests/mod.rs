//! The module and the host's side of it, leaf by leaf; rows are those of the fact sheet `tdx.md`.

mod host;
mod l2;
mod pages;

use std::string::String;
use std::vec::Vec;

use protocols::tdx::metadata::{FieldId, L2Controls, TdControls};
use protocols::tdx::report::TdReport;
use protocols::tdx::ve::ExitReason;
use protocols::tdx::vmcall::register::*;
use protocols::tdx::vmcall::{Direction, Status as HostStatus, SubFunction};
use protocols::tdx::{L2Vm, Leaf, MAPPING_PENDING, Operand, PageAttributes, Status};
use sha2::{Digest as _, Sha384};
use zerocopy::{FromZeros, IntoBytes};

use super::sept::State;
use super::tdcall::{Caller, Gprs, Outcome};
use super::ve::{Delivery, MsrClass, ept_violation, instruction, msr_class};
use super::*;
use crate::access::{Denial, Verdict};
use crate::cpuid::{Context, Leaf as CpuidLeaf, Table};
use crate::launch::Environment;
use crate::testing::{BLOCK, CPU0, FakeCpu, Sparse, platform};
use crate::types::{PageSize, Vmpl};

const KERNEL: Caller = Caller {
    cpl: 0,
    long_mode: true,
};
const L1: Vmpl = Vmpl::VMPL0;
const L2: Vmpl = Vmpl::VMPL1;
/// All registers that may be passed to the host.
const ALL: u64 = 0xFFEC;

fn table() -> Table {
    let native = |leaf: u32, _| CpuidLeaf {
        eax: leaf,
        ebx: !0,
        ecx: !0,
        edx: !0,
    };
    Table::build_td(&native, 2, 2_500_000_000)
}

/// A trust domain with two processors, 640 KiB and 15 MiB of RAM.
fn td_with(settings: &str, policy: u64) -> Platform<Sparse> {
    let mut platform = platform(settings);
    let table = table();
    let mut environment = Environment {
        allocate: &mut |_| Some(Spa::new(0x5000_0000)),
        random: &mut || 7,
        cpuid: &table,
        td_cpuid: &table,
    };
    platform
        .finish_td(policy, [0x4D; 48], &mut environment)
        .unwrap();
    platform
}

fn td(settings: &str) -> Platform<Sparse> {
    td_with(settings, 0)
}

impl Platform<Sparse> {
    fn call(&mut self, leaf: Leaf, operands: &[(usize, u64)]) -> Gprs {
        let mut gprs = [0x1111_1111_1111_1111; COUNT];
        gprs[RAX] = leaf.0.into();
        for &(number, value) in operands {
            gprs[number] = value;
        }
        let outcome = self.tdcall(CPU0, KERNEL, &mut gprs, &mut FakeCpu::default());
        assert_eq!(outcome, Outcome::Complete, "{leaf:?}");
        gprs
    }

    fn accept_td(&mut self, gpa: Gpa, size: PageSize) -> u64 {
        let rcx = protocols::tdx::page_operand(gpa, size);
        self.call(Leaf::MEM_PAGE_ACCEPT, &[(RCX, rcx)])[RAX]
    }

    fn state(&self, gpa: Gpa) -> (State, PageSize) {
        let entry = self.host.rmp().entry(&self.layout().place(gpa).unwrap());
        (State::of(&entry), entry.size())
    }

    fn block(&mut self, gpa: Gpa) {
        let place = self.layout().place(gpa).unwrap();
        assert!(self.host.block(&place, gpa));
    }

    fn remove(&mut self, gpa: Gpa) {
        let place = self.layout().place(gpa).unwrap();
        let taken = self
            .host
            .take_away(&self.memory, &place, gpa, PageSize::Size4K);
        taken.unwrap();
    }

    fn host_call(&mut self, function: SubFunction, operands: &[(usize, u64)]) -> Gprs {
        let mut all = Vec::from([(R10, 0), (R11, function.0), (RCX, ALL)]);
        all.extend(operands);
        self.call(Leaf::VP_VMCALL, &all)
    }

    fn write_attributes(&mut self, gpa: Gpa, size: PageSize, new: u64, mask: u64) -> Gprs {
        let rcx = protocols::tdx::page_operand(gpa, size);
        self.call(
            Leaf::MEM_PAGE_ATTR_WR,
            &[(RCX, rcx), (RDX, new), (R8, mask)],
        )
    }

    fn word(&self, gpa: Gpa) -> u64 {
        self.memory().read_u64(self.spa_of(gpa).unwrap())
    }
}

const OK: u64 = 0;
const fn already(level: u32) -> u64 {
    Status::PAGE_ALREADY_ACCEPTED.with(level)
}
const MISMATCH: u64 = Status::PAGE_SIZE_MISMATCH.with(1);

fn full(vm: L2Vm) -> u64 {
    vm.field(PageAttributes::ALL_ACCESS | PageAttributes::VALID)
}

/// §1: mode and privilege before anything else; leaf, version and reserved bits of RAX.
#[test]
fn who_may_call_and_which_leaf() {
    let mut snp = platform("");
    let mut gprs = [0; COUNT];
    let call = |platform: &mut Platform<Sparse>, caller, gprs: &mut Gprs| {
        platform.tdcall(CPU0, caller, gprs, &mut FakeCpu::default())
    };
    assert_eq!(call(&mut snp, KERNEL, &mut gprs), Outcome::UndefinedOpcode);
    let mut td = td("");
    for (cpl, long_mode) in [(3, true), (0, false)] {
        let caller = Caller { cpl, long_mode };
        assert_eq!(call(&mut td, caller, &mut gprs), Outcome::GeneralProtection);
    }
    for rax in [
        0x10_0001,
        0x2_0007,
        1 << 24 | 1,
        1 << 63 | 1,
        19,
        0xFFFF,
        28,
    ] {
        gprs = [0x77; COUNT];
        gprs[RAX] = rax;
        assert_eq!(call(&mut td, KERNEL, &mut gprs), Outcome::Complete);
        assert_eq!(gprs[RAX], Operand::RAX.invalid(), "{rax:#x}");
        assert_eq!(gprs[RCX], 0x77);
    }
}

/// §1, leaf 1.
#[test]
fn vp_info_tells_width_and_processors() {
    let mut td = td_with("", 2);
    let gprs = td.call(Leaf::VP_INFO, &[]);
    assert_eq!(gprs[RAX], OK);
    assert_eq!((gprs[RCX], gprs[RDX]), (48, 1 << 28));
    assert_eq!((gprs[R8], gprs[R9]), (2 << 32 | 2, 0));
    assert_eq!((gprs[R10], gprs[R11]), (1, 0));
}

/// §6: reading, writing by mask, walking through, and what is refused.
#[test]
fn fields_of_the_trust_domain() {
    let mut td = td("");
    let rd = |td: &mut Platform<Sparse>, id: FieldId| {
        let gprs = td.call(Leaf::VM_RD, &[(RCX, 0), (RDX, id.0)]);
        (gprs[RAX], gprs[R8])
    };
    assert_eq!(rd(&mut td, FieldId::CONFIG_FLAGS), (OK, 2));
    assert_eq!(rd(&mut td, FieldId::NUM_L2_VMS), (OK, 3));
    let incorrect = Status::METADATA_FIELD_ID_INCORRECT.with(0);
    for id in [
        0x1110_0003_0000_7777,
        FieldId::CONFIG_FLAGS.0 | 1 << 34,
        u64::MAX,
    ] {
        assert_eq!(rd(&mut td, FieldId(id)), (incorrect, 0));
    }
    let gprs = td.call(Leaf::VM_RD, &[(RCX, 1), (RDX, FieldId::CONFIG_FLAGS.0)]);
    assert_eq!((gprs[RAX], gprs[R8]), (Operand::RCX.invalid(), 0));
    let wr = |td: &mut Platform<Sparse>, id: FieldId, value, mask| {
        let operands = [(RCX, 0), (RDX, id.0), (R8, value), (R9, mask)];
        let gprs = td.call(Leaf::VM_WR, &operands);
        (gprs[RAX], gprs[R8])
    };
    assert_eq!(wr(&mut td, FieldId::TD_CTLS, u64::MAX, 1), (OK, 0));
    assert_eq!(wr(&mut td, FieldId::TD_CTLS, 0, 0), (OK, 1));
    let invalid = Status::METADATA_FIELD_VALUE_NOT_VALID.with(0);
    assert_eq!(
        wr(&mut td, FieldId::TD_CTLS, 1 << 40, 1 << 40),
        (invalid, 0)
    );
    let fixed = Status::METADATA_FIELD_NOT_WRITABLE.with(0);
    assert_eq!(wr(&mut td, FieldId::NUM_L2_VMS, 1, 1), (fixed, 0));
    // Version 1: first, next, none behind the last.
    let mut id = FieldId::NONE.0;
    let mut seen = Vec::new();
    loop {
        let mut gprs = [0; COUNT];
        (gprs[RAX], gprs[RDX]) = (0x1_0007, id);
        td.tdcall(CPU0, KERNEL, &mut gprs, &mut FakeCpu::default());
        if id == FieldId::NONE.0 {
            assert_eq!(
                gprs[RAX],
                Status::METADATA_FIRST_FIELD_ID_IN_CONTEXT.with(0)
            );
        } else {
            assert_eq!(gprs[RAX], OK);
            seen.push(id);
        }
        id = gprs[RDX];
        if id == FieldId::NONE.0 {
            break;
        }
    }
    assert_eq!(seen.len(), 5);
}

#[test]
fn fields_of_a_processor() {
    let mut td = td("");
    let id = FieldId::l2_ctls(L2Vm::Vm2).0;
    let wr = |td: &mut Platform<Sparse>, value| {
        let operands = [(RCX, 0), (RDX, id), (R8, value), (R9, u64::MAX)];
        td.call(Leaf::VP_WR, &operands)[RAX]
    };
    assert_eq!(wr(&mut td, L2Controls::ENABLE_TDVMCALL.bits()), OK);
    assert_eq!(
        wr(&mut td, 8),
        Status::METADATA_FIELD_VALUE_NOT_VALID.with(0)
    );
    let rd = |td: &mut Platform<Sparse>, id| {
        let gprs = td.call(Leaf::VP_RD, &[(RCX, 0), (RDX, id)]);
        (gprs[RAX], gprs[R8])
    };
    assert_eq!(rd(&mut td, id), (OK, 2));
    assert_eq!(rd(&mut td, FieldId::l2_ctls(L2Vm::Vm1).0), (OK, 0));
    let incorrect = Status::METADATA_FIELD_ID_INCORRECT.with(0);
    assert_eq!(rd(&mut td, FieldId::CONFIG_FLAGS.0), (incorrect, 0));
}

/// §5: kept until it is asked for, once; a second one before is #DF and NMIs wait.
#[test]
fn ve_information_is_read_once() {
    let mut td = td("");
    let empty = td.call(Leaf::VP_VEINFO_GET, &[])[RAX];
    assert_eq!(empty, Status::NO_VALID_VE_INFO.with(0));
    let info = instruction(ExitReason::CPUID, 0, 2);
    assert_eq!(td.raise_ve(CPU0, info), Delivery::Ve);
    assert!(td.holds_nmi(CPU0) && !td.holds_nmi(VcpuId(1)));
    assert_eq!(td.raise_ve(CPU0, info), Delivery::DoubleFault);
    assert_eq!(td.raise_ve(VcpuId(1), info), Delivery::Ve);
    let gprs = td.call(Leaf::VP_VEINFO_GET, &[]);
    assert_eq!((gprs[RAX], gprs[RCX], gprs[RDX]), (OK, 10, 0));
    assert_eq!((gprs[R8], gprs[R9], gprs[R10]), (0, 0, 2));
    assert!(!td.holds_nmi(CPU0));
    assert_eq!(td.call(Leaf::VP_VEINFO_GET, &[])[RAX], empty);
    assert_eq!(td.counters.level(L1).ve_injected, 2);
}

/// §3: #VE, or an exit of type 6 when the guest does not want it.
#[test]
fn pending_pages_raise_ve_unless_disabled() {
    let info = ept_violation(BLOCK, Alias::Private, Kind::Write, Some(0x1234));
    assert_eq!(
        (info.gla, info.gpa, info.qualification),
        (0x1234, BLOCK.get(), 0x182)
    );
    let shared = ept_violation(BLOCK, Alias::Shared, Kind::Read, None);
    assert_eq!(shared.gpa, BLOCK.get() | SHARED);
    let mut td_ = td("");
    assert_eq!(td_.pending_access(CPU0, info), Delivery::Ve);
    for platform in [td_with("", 2), {
        let mut td = td("");
        let disable = TdControls::PENDING_VE_DISABLE.bits();
        let operands = [(RCX, 0), (RDX, FieldId::TD_CTLS.0), (R8, disable), (R9, 1)];
        td.call(Leaf::VM_WR, &operands);
        td
    }] {
        let mut td = platform;
        assert!(matches!(td.pending_access(CPU0, info), Delivery::Host(_)));
    }
}

/// §5, classes of registers.
#[test]
fn classes_of_model_specific_registers() {
    for number in [
        0x48,
        0x175,
        0x277,
        0x808,
        0x80B,
        0x83F,
        0xC000_0080,
        0xC000_0102,
    ] {
        assert_eq!(msr_class(number, true), MsrClass::Native, "{number:#x}");
    }
    assert_eq!(msr_class(0x10, false), MsrClass::Native);
    for number in [0x10, 0x1B, 0x802, 0x830, 0x832, 0x2FF, 0xC001_0130] {
        assert_eq!(msr_class(number, true), MsrClass::Host, "{number:#x}");
    }
    // What Linux reads before it can handle #VE.
    assert!(matches!(msr_class(0x1A0, false), MsrClass::Fixed(value) if value >> 34 & 1 == 0));
    assert_eq!(msr_class(0x1A0, true), MsrClass::Host);
    assert_eq!(msr_class(0x345, false), MsrClass::Fixed(0));
    for number in [
        0x8C, 0x9B, 0xC1, 0x186, 0x38F, 0x6E0, 0x800, 0x804, 0x831, 0x8FF,
    ] {
        assert_eq!(msr_class(number, false), MsrClass::None, "{number:#x}");
    }
}

/// §5 and §6: what the module answers, what is the host's, and #VE on demand.
#[test]
fn cpuid_is_the_modules_or_the_hosts() {
    let mut td = td("");
    let table = table();
    let ask = |td: &Platform<Sparse>, cpl, leaf| {
        let context = Context {
            osxsave: false,
            apic_id: 0,
            svsm: false,
        };
        td.td_cpuid(CPU0, cpl, &table, (leaf, 0), &context)
    };
    let name = ask(&td, 0, 0x21).unwrap();
    let letters: Vec<u8> = [name.ebx, name.edx, name.ecx]
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .collect();
    assert_eq!(String::from_utf8(letters).unwrap(), "IntelTDX    ");
    assert_eq!(ask(&td, 0, 1).unwrap().eax, 0x806F8);
    // Beyond the maximum: as the highest basic leaf.
    assert_eq!(ask(&td, 0, 0x22), Some(name));
    assert_eq!(ask(&td, 0, 0x8000_0009), Some(name));
    for leaf in [2, 6, 0xB, 0x4000_0000, 0x4FFF_FFFF, 0x8000_0002, 0x12] {
        assert_eq!(ask(&td, 0, leaf), None, "{leaf:#x}");
    }
    assert_eq!(td.call(Leaf::VP_CPUIDVE_SET, &[(RCX, 2)])[RAX], OK);
    assert!(ask(&td, 0, 1).is_some() && ask(&td, 3, 1).is_none());
    let reserved = td.call(Leaf::VP_CPUIDVE_SET, &[(RCX, 4)])[RAX];
    assert_eq!(reserved, Operand::RCX.invalid());
    assert!(ask(&td, 3, 1).is_none(), "unchanged");
}

/// §1 leaf 2, §11: SHA-384 of old and new; alignment, half, index.
#[test]
fn rtmrs_are_extended() {
    let mut td = td("");
    td.accept_td(BLOCK, PageSize::Size4K);
    let spa = td.spa_of(BLOCK).unwrap();
    td.memory().write(spa, &[9; 48]);
    let extend = |td: &mut Platform<Sparse>, rcx, rdx| {
        td.call(Leaf::MR_RTMR_EXTEND, &[(RCX, rcx), (RDX, rdx)])[RAX]
    };
    let at = BLOCK.get();
    assert_eq!(extend(&mut td, at + 8, 9), Operand::RCX.invalid());
    assert_eq!(extend(&mut td, at | SHARED, 9), Operand::RCX.invalid());
    assert_eq!(extend(&mut td, at, 4), Operand::RDX.invalid());
    assert_eq!(td.td().unwrap().rtmr, [[0; 48]; 4]);
    assert_eq!(extend(&mut td, at, 2), OK);
    let digest: [u8; 48] = Sha384::new()
        .chain_update([0; 48])
        .chain_update([9; 48])
        .finalize()
        .into();
    assert_eq!(td.td().unwrap().rtmr[2], digest);
    // A value in a page that is not accepted is an access to it.
    let next = at + PAGE_SIZE;
    let mut gprs = [0; COUNT];
    (gprs[RAX], gprs[RCX]) = (2, next);
    let outcome = td.tdcall(CPU0, KERNEL, &mut gprs, &mut FakeCpu::default());
    assert_eq!(outcome, Outcome::Pending(Gpa::new(next)));
}

/// §1 leaf 4, §11: the report holds what it is about; checks in their order.
#[test]
fn a_report_is_made() {
    let mut td = td_with("", 2);
    td.accept_td(BLOCK, PageSize::Size4K);
    let (to, from) = (BLOCK.get(), BLOCK.get() + 0x800);
    let spa = td.spa_of(Gpa::new(from)).unwrap();
    td.memory().write(spa, &[0xDA; 64]);
    let report = |td: &mut Platform<Sparse>, rcx, rdx, r8| {
        td.call(Leaf::MR_REPORT, &[(RCX, rcx), (RDX, rdx), (R8, r8)])[RAX]
    };
    assert_eq!(
        report(&mut td, to + 512, from + 1, 1),
        Operand::RCX.invalid()
    );
    assert_eq!(report(&mut td, to, from + 1, 1), Operand::RDX.invalid());
    assert_eq!(report(&mut td, to, from, 1), Operand::R8.invalid());
    assert_eq!(report(&mut td, 1 << 48, from, 0), Operand::RCX.invalid());
    assert_eq!(report(&mut td, to, from, 0), OK);
    let mut made = TdReport::new_zeroed();
    td.memory()
        .read(td.spa_of(BLOCK).unwrap(), made.as_mut_bytes());
    assert_eq!(made.mac.report_data, [0xDA; 64]);
    assert_eq!(made.td_info.mrtd, [0x4D; 48]);
    assert_eq!((made.td_info.attributes, made.td_info.xfam), (1 << 28, 3));
    let hash: [u8; 48] = Sha384::digest(made.td_info.as_bytes()).into();
    assert_eq!(made.mac.tee_info_hash, hash);
    assert_ne!(made.mac.mac, [0; 32]);
}

/// §8: what a processor starts with.
#[test]
fn processors_start_at_the_reset_vector() {
    use protocols::vmsa::Vmsa;
    let mut td = td("");
    for index in 0..2 {
        let spa = td.enter(VcpuId(index), L1).unwrap();
        let mut state = Vmsa::new_zeroed();
        td.memory().read(spa, state.as_mut_bytes());
        assert_eq!((state.rip, state.cr0, state.cr4), (0xFFFF_FFF0, 0x21, 0x40));
        assert_eq!((state.efer.0, state.rflags), (0x901, 2));
        assert_eq!((state.rbx, state.rcx, state.r8), (48, 0, 0));
        assert_eq!((state.rdx, state.rsi), (0x806F8, index.into()));
        assert_eq!((state.cs.base, state.cs.limit), (0, u32::MAX));
    }
    assert!(td.enter(CPU0, L2).is_err(), "no L2 VM runs");
    assert!(td.enter(VcpuId(2), L1).is_err());
}
