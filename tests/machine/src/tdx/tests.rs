//! The module and the host's side of it, leaf by leaf; rows are those of the fact sheet `tdx.md`.

use std::string::String;
use std::vec::Vec;

use protocols::oracle::{Call, HOST_ACT_DONE, HOST_ACT_NOT_POSSIBLE, HostAct};
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
        25,
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

/// §2 rows 1 and 2.
#[test]
fn accept_looks_at_its_operand_first() {
    let mut td = td("");
    for rcx in [
        BLOCK.get() | 2,
        BLOCK.get() | 8,
        BLOCK.get() | 1 << 52,
        BLOCK.get() | 0x1000 | 1,
        BLOCK.get() | SHARED,
        BLOCK.get() | 1 << 48,
    ] {
        let gprs = td.call(Leaf::MEM_PAGE_ACCEPT, &[(RCX, rcx)]);
        assert_eq!(gprs[RAX], Operand::RCX.invalid(), "{rcx:#x}");
    }
    assert_eq!(td.state(BLOCK).0, State::Free);
    let accept = td.counters.level(L1).accept;
    assert_eq!((accept.size_4k.invalid, accept.size_2m.invalid), (5, 1));
}

/// §2 rows 3, 7, 9 and 10: zeroed once, then ALREADY_ACCEPTED with the level of the leaf.
#[test]
fn accept_zeroes_a_page_once() {
    for (backing, size, level) in [
        ("backing=4k", PageSize::Size4K, 0),
        ("backing=2m", PageSize::Size2M, 1),
    ] {
        let mut td = td(backing);
        assert_eq!(td.accept_td(BLOCK, size), OK);
        assert_eq!(td.state(BLOCK), (State::Mapped, size));
        assert_eq!(td.word(BLOCK), 0);
        td.memory().write_u64(td.spa_of(BLOCK).unwrap(), 5);
        assert_eq!(td.accept_td(BLOCK, size), already(level));
        assert_eq!(td.accept_td(BLOCK, PageSize::Size4K), already(level));
        assert_eq!(td.word(BLOCK), 5);
        assert_eq!(td.counters.violations.double_validation, 2);
        assert_eq!(td.counters.validated_bytes, size.bytes());
    }
}

/// §2 row 6: the block is held as pages, because the host backs it so or has split it.
#[test]
fn accept_of_a_block_in_pages_is_a_mismatch() {
    let mut small = td("backing=4k");
    assert_eq!(small.accept_td(BLOCK, PageSize::Size2M), MISMATCH);
    assert_eq!(small.state(BLOCK), (State::Pending, PageSize::Size4K));
    let mut large = td("backing=2m");
    let last = Gpa::new(BLOCK.get() + 511 * PAGE_SIZE);
    assert_eq!(large.accept_td(last, PageSize::Size4K), OK);
    assert_eq!(large.state(BLOCK), (State::Pending, PageSize::Size4K));
    assert_eq!(large.accept_td(BLOCK, PageSize::Size2M), MISMATCH);
    assert_eq!(large.accept_td(BLOCK, PageSize::Size4K), OK);
}

/// §2 rows 4 and 8: the host gives, splits and unblocks; the guest sees a longer instruction.
#[test]
fn what_is_missing_is_the_hosts_to_serve() {
    let mut td = td("backing=2m");
    assert_eq!(td.accept_td(BLOCK, PageSize::Size4K), OK);
    // Given as a block, then split.
    assert_eq!(td.counters.td_exits(L1), 2);
    let next = Gpa::new(BLOCK.get() + PAGE_SIZE);
    td.block(next);
    assert_eq!(td.state(next).0, State::PendingBlocked);
    assert_eq!(td.accept_td(next, PageSize::Size4K), OK);
    assert_eq!(td.counters.td_exits(L1), 3);
    td.block(next);
    assert_eq!(td.state(next).0, State::Blocked);
    assert_eq!(td.accept_td(next, PageSize::Size4K), already(0));
    let nowhere = Gpa::new(0x4000_0000);
    let mut gprs = [0; COUNT];
    (gprs[RAX], gprs[RCX]) = (6, nowhere.get());
    let outcome = td.tdcall(CPU0, KERNEL, &mut gprs, &mut FakeCpu::default());
    assert!(matches!(outcome, Outcome::Refused(_)), "{outcome:?}");
}

/// §2 consequences: a page that the host removed and put back is pending again, and a second accept
/// zeroes it without a word. The machine counts it.
#[test]
fn a_page_put_back_is_pending_and_accepted_silently() {
    let mut td = td("");
    assert_eq!(td.accept_td(BLOCK, PageSize::Size4K), OK);
    td.remove(BLOCK);
    let verdict = td.access(L1, Alias::Private, BLOCK, Kind::Read);
    assert_eq!(verdict, Verdict::NotValidated);
    assert_eq!(td.state(BLOCK).0, State::Pending);
    assert_eq!(td.counters.violations.double_validation, 0);
    assert_eq!(td.accept_td(BLOCK, PageSize::Size4K), OK);
    assert_eq!(td.counters.violations.double_validation, 1);
    // Given back and accepted anew it is a new page.
    let shared = BLOCK.get() | SHARED;
    td.host_call(SubFunction::MAP_GPA, &[(R12, shared), (R13, 0x1000)]);
    td.host_call(SubFunction::MAP_GPA, &[(R12, BLOCK.get()), (R13, 0x1000)]);
    assert_eq!(td.accept_td(BLOCK, PageSize::Size4K), OK);
    assert_eq!(td.counters.violations.double_validation, 1);
}

/// What the host does to an accepted page of its own accord does not make it a new one.
#[test]
fn only_the_guest_gives_a_page_back() {
    let mut td = td("oracle=on\nhostile=re-add,remap");
    assert_eq!(td.accept_td(BLOCK, PageSize::Size4K), OK);
    let act = |td: &mut Platform<Sparse>, act: HostAct| {
        let answer = td.ask_oracle(Call::HOST_ACT.rax(), BLOCK.get(), act.0);
        answer.unwrap().rax
    };
    assert_eq!(act(&mut td, HostAct::RE_ADD), HOST_ACT_DONE);
    assert_eq!(td.accept_td(BLOCK, PageSize::Size4K), OK);
    assert_eq!(td.counters.violations.double_validation, 1);
    for to in [Alias::Shared, Alias::Private] {
        td.convert(BLOCK, PageSize::Size4K, to).unwrap();
    }
    assert_eq!(td.accept_td(BLOCK, PageSize::Size4K), OK);
    assert_eq!(td.counters.violations.double_validation, 2);
    // No module puts a page back as it was.
    assert_eq!(act(&mut td, HostAct::EXCHANGE), HOST_ACT_NOT_POSSIBLE);
    assert_eq!(act(&mut td, HostAct::BLOCK), HOST_ACT_DONE);
    assert_eq!(td.state(BLOCK).0, State::Blocked);
}

/// §3, "Guest access" by state, and the shared half.
#[test]
fn accesses_by_state() {
    let mut td = td("");
    let read = |td: &mut Platform<Sparse>| td.access(L1, Alias::Private, BLOCK, Kind::Read);
    assert_eq!(read(&mut td), Verdict::NotValidated);
    td.accept_td(BLOCK, PageSize::Size4K);
    assert!(matches!(read(&mut td), Verdict::Map(m) if m.write && m.execute));
    td.block(BLOCK);
    assert_eq!(td.peek(L1, Alias::Private, BLOCK), None);
    assert!(
        matches!(read(&mut td), Verdict::Map(_)),
        "the host unblocks"
    );
    for kind in [Kind::Execute, Kind::Walk] {
        let verdict = td.access(L1, Alias::Shared, BLOCK, kind);
        assert_eq!(verdict, Verdict::Denied(Denial::SharedCode));
    }
    assert_eq!(td.alias_of_bit(true), Alias::Shared);
    assert_eq!(platform("").alias_of_bit(true), Alias::Private);
}

/// §3: attributes of L2 VMs, read back, before and after the page is accepted.
#[test]
fn attributes_give_a_page_to_an_l2_vm() {
    let mut td = td("");
    let all = full(L2Vm::Vm1);
    let mask = L2Vm::Vm1.field(PageAttributes::ALL_ACCESS);
    let gprs = td.write_attributes(BLOCK, PageSize::Size4K, all, mask);
    assert_eq!(gprs[RAX], OK);
    assert_eq!(gprs[RCX], BLOCK.get() | MAPPING_PENDING);
    assert_eq!(gprs[RDX], all);
    let peek = |td: &Platform<Sparse>| td.peek(L2, Alias::Private, BLOCK);
    assert_eq!(peek(&td), None);
    td.accept_td(BLOCK, PageSize::Size4K);
    assert!(peek(&td).is_some_and(|mapping| mapping.write));
    let gprs = td.call(Leaf::MEM_PAGE_ATTR_RD, &[(RCX, BLOCK.get())]);
    assert_eq!((gprs[RAX], gprs[RCX], gprs[RDX]), (OK, BLOCK.get(), all));
    // Only what the mask names changes.
    let read_only = L2Vm::Vm1.field(PageAttributes::READ | PageAttributes::VALID);
    let write = L2Vm::Vm1.field(PageAttributes::WRITE);
    let gprs = td.write_attributes(BLOCK, PageSize::Size4K, read_only, write);
    let rx = PageAttributes::ALL_ACCESS - PageAttributes::WRITE | PageAttributes::VALID;
    assert_eq!(gprs[RDX], L2Vm::Vm1.field(rx));
    // Nothing left: the alias goes.
    let gone = L2Vm::Vm1.field(PageAttributes::VALID);
    let gprs = td.write_attributes(BLOCK, PageSize::Size4K, gone, mask);
    assert_eq!((gprs[RAX], gprs[RDX]), (OK, gone));
    assert_eq!(
        td.call(Leaf::MEM_PAGE_ATTR_RD, &[(RCX, BLOCK.get())])[RDX],
        0
    );
    assert_eq!(peek(&td), None);
}

/// §3 errors: fields before the address, then the page, then the combination.
#[test]
fn attributes_are_checked_in_order() {
    let mut td = td("backing=2m");
    let all = full(L2Vm::Vm2);
    let mask = L2Vm::Vm2.field(PageAttributes::ALL_ACCESS);
    let bad_address = Gpa::new(BLOCK.get() | SHARED);
    let rows = [
        (bad_address, 1, 0, Operand::RDX.invalid()),
        (bad_address, 0, 1, Operand::R8.invalid()),
        (
            bad_address,
            L2Vm::Vm3.field(PageAttributes::READ),
            0,
            Operand::RDX.invalid(),
        ),
        (bad_address, all, mask, Operand::RCX.invalid()),
    ];
    for (gpa, new, mask, want) in rows {
        let gprs = td.write_attributes(gpa, PageSize::Size4K, new, mask);
        assert_eq!((gprs[RAX], gprs[RCX], gprs[RDX]), (want, 0, 0), "{new:#x}");
    }
    // A larger leaf is split by the host; then the block is one of pages.
    td.accept_td(BLOCK, PageSize::Size2M);
    assert_eq!(
        td.write_attributes(BLOCK, PageSize::Size4K, all, mask)[RAX],
        OK
    );
    assert_eq!(td.state(BLOCK), (State::Mapped, PageSize::Size4K));
    assert_eq!(
        td.write_attributes(BLOCK, PageSize::Size2M, all, mask)[RAX],
        MISMATCH
    );
    // Write without read, and features that there are not.
    let unknown = PageAttributes::from_bits_retain(1 << 4) | PageAttributes::READ;
    for wanted in [PageAttributes::WRITE, unknown] {
        let new = L2Vm::Vm1.field(wanted | PageAttributes::VALID);
        let mask = L2Vm::Vm1.field(PageAttributes::from_bits_retain(0x7FFF));
        let gprs = td.write_attributes(BLOCK, PageSize::Size4K, new, mask);
        assert_eq!(
            (gprs[RAX], gprs[RDX]),
            (Status::PAGE_ATTR_INVALID.with(0), 0)
        );
    }
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
    for number in [0x8C, 0x9B, 0x800, 0x804, 0x831, 0x8FF] {
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

/// §4: what RCX may name, what is returned, and what stays.
#[test]
fn the_host_sees_and_changes_what_is_passed() {
    let mut td = td("");
    for rcx in [1, 2, 1 << 4, 1 << 32] {
        let gprs = td.call(Leaf::VP_VMCALL, &[(RCX, rcx), (R10, 0), (R11, 0x0A)]);
        assert_eq!(gprs[RAX], Operand::RCX.invalid());
    }
    let operands = [(RCX, 0x3C00), (R10, 0), (R11, 0x0A), (R12, 1), (R13, 2)];
    let gprs = td.call(Leaf::VP_VMCALL, &operands);
    // FakeCpu answers leaf, subleaf, 0xC, 0xD; R14 and R15 were not passed.
    assert_eq!((gprs[RAX], gprs[R10], gprs[R12], gprs[R13]), (OK, 0, 1, 2));
    assert_eq!((gprs[R14], gprs[R15]), ([0x1111_1111_1111_1111; 2]).into());
    // R10 is no sub-function of the interface.
    let gprs = td.call(Leaf::VP_VMCALL, &[(RCX, ALL), (R10, 5), (R11, 1)]);
    assert_eq!(gprs[R10].cast_signed(), -1000);
    let unknown = td.host_call(SubFunction(0x1_0FFF), &[]);
    assert_eq!(unknown[R10], HostStatus::SUBFUNCTION_UNSUPPORTED.0);
}

/// §4: ports, registers, devices, and their refusals.
#[test]
fn instructions_by_request() {
    let mut td = td("");
    let io = |td: &mut Platform<Sparse>, bytes, direction: u64, port| {
        let operands = [(R12, bytes), (R13, direction), (R14, port), (R15, 7)];
        let gprs = td.host_call(SubFunction::IO, &operands);
        (gprs[R10], gprs[R11])
    };
    assert_eq!(io(&mut td, 2, Direction::READ.0, 0x60), (0, 0xCC01));
    assert_eq!(io(&mut td, 1, Direction::WRITE.0, 0x60).0, 0);
    let invalid = HostStatus::INVALID_OPERAND.0;
    for (bytes, direction, port) in [(3, 0, 0x60), (8, 0, 0x60), (1, 2, 0x60), (1, 0, 0x1_0000)] {
        assert_eq!(io(&mut td, bytes, direction, port).0, invalid);
    }
    let msr = |td: &mut Platform<Sparse>, function, number| {
        let gprs = td.host_call(function, &[(R12, number), (R13, 1)]);
        (gprs[R10], gprs[R11])
    };
    assert_eq!(
        msr(&mut td, SubFunction::RDMSR, 0x802),
        (0, 0x1111_2222_3333_4444)
    );
    assert_eq!(msr(&mut td, SubFunction::RDMSR, 0xBAD).0, invalid);
    assert_eq!(msr(&mut td, SubFunction::WRMSR, 0x830).0, 0);
    assert_eq!(msr(&mut td, SubFunction::WRMSR, 0xBAD).0, invalid);
    let device = 0xFEE0_0000 | SHARED;
    let mmio = |td: &mut Platform<Sparse>, bytes, address| {
        let operands = [(R12, bytes), (R13, 0), (R14, address)];
        let gprs = td.host_call(SubFunction::MMIO, &operands);
        (gprs[R10], gprs[R11])
    };
    assert_eq!(mmio(&mut td, 4, device), (0, 0x4433_2211));
    for (bytes, address) in [(4, 0xFEE0_0000), (3, device), (4, device + 2), (4, SHARED)] {
        assert_eq!(mmio(&mut td, bytes, address).0, invalid, "{address:#x}");
    }
    for (r12, want) in [(0, 0), (1, invalid)] {
        let gprs = td.host_call(SubFunction::GET_TD_VMCALL_INFO, &[(R12, r12)]);
        assert_eq!(gprs[R10], want);
    }
    let quote = |td: &mut Platform<Sparse>, address| {
        td.host_call(SubFunction::GET_QUOTE, &[(R12, address), (R13, 0x1000)])[R10]
    };
    assert_eq!(
        quote(&mut td, SHARED),
        HostStatus::SUBFUNCTION_UNSUPPORTED.0
    );
    assert_eq!(quote(&mut td, 0x1000), invalid);
}

/// §4: HLT and ReportFatalError do not simply return.
#[test]
fn requests_that_stop_the_processor() {
    let mut td = td("");
    let mut call = |function: SubFunction, r12, text: u64| {
        let mut gprs = [0; COUNT];
        (gprs[RCX], gprs[R11], gprs[R12], gprs[R14]) = (ALL, function.0, r12, text);
        td.tdcall(CPU0, KERNEL, &mut gprs, &mut FakeCpu::default())
    };
    for (r12, blocked) in [(0, false), (1, true)] {
        assert_eq!(call(SubFunction::HLT, r12, 0), Outcome::Halt { blocked });
    }
    let text = u64::from_le_bytes(*b"lost\x01it\0");
    let Outcome::End(End::FatalError { code, text, .. }) =
        call(SubFunction::REPORT_FATAL_ERROR, 5, text)
    else {
        panic!()
    };
    assert_eq!((code, text.as_str()), (5, "lost.it"));
}

/// §4 MapGPA: both ways, a bounded part at a time, and its refusals.
#[test]
fn map_gpa_converts() {
    let mut td = td("backing=2m");
    td.accept_td(BLOCK, PageSize::Size2M);
    let map = |td: &mut Platform<Sparse>, start, bytes| {
        let gprs = td.host_call(SubFunction::MAP_GPA, &[(R12, start), (R13, bytes)]);
        (gprs[R10], gprs[R11])
    };
    let (private, shared) = (BLOCK.get(), BLOCK.get() | SHARED);
    assert_eq!(map(&mut td, shared, 0x20_0000).0, 0);
    assert_eq!(td.state(BLOCK).0, State::Free);
    assert_eq!(td.counters.validated_bytes, 0);
    assert!(td.peek(L1, Alias::Shared, BLOCK).is_some());
    assert_eq!(map(&mut td, private, 0x20_0000).0, 0);
    assert_eq!(
        td.access(L1, Alias::Private, BLOCK, Kind::Read),
        Verdict::NotValidated
    );
    let invalid = HostStatus::INVALID_OPERAND.0;
    for (start, bytes, want) in [
        (private, 0, invalid),
        (private, u64::MAX, invalid),
        (SHARED - 0x1000, 0x2000, invalid),
        (shared + 8, 0x1000, HostStatus::ALIGN_ERROR.0),
        (shared, 0x800, HostStatus::ALIGN_ERROR.0),
    ] {
        assert_eq!(map(&mut td, start, bytes).0, want, "{start:#x} {bytes:#x}");
    }
    // The memory of this platform ends at 16 MiB.
    assert_eq!(map(&mut td, 0xFF_F000, 0x2000), (invalid, 0x100_0000));
    let mut lying = td_with("hostile=map-gpa-retry", 0);
    let answer = map(&mut lying, shared, 0x1000);
    assert_eq!(answer, (HostStatus::RETRY.0, shared));
    assert_eq!(lying.state(BLOCK).0, State::Free);
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
