//! TD partitioning (§7): entry, exit, withdrawn rights, MSRs; the CPU side is not there.

use protocols::tdx::l2::{EnterState, Exit, Flush, enter_operand};
use protocols::tdx::vmcs::{Field, Interruptibility, SecondaryControls, msr_bitmaps};
use protocols::vmsa::Vmsa;
use zerocopy::FromBytes;

use super::*;
use crate::tdx::l2::interrupts::Virtual;
use crate::tdx::l2::msr::MsrAccess;
use crate::vcpu::EnterError;

const VM: L2Vm = L2Vm::Vm1;
const STATE: Gpa = Gpa::new(BLOCK.get() + 0x1100);
const APIC: Gpa = Gpa::new(BLOCK.get() + 0x2000);
const GIVEN: Gpa = Gpa::new(BLOCK.get() + 0x3000);

impl Platform<Sparse> {
    fn set_field(&mut self, id: FieldId, value: u64) -> u64 {
        let operands = [(RCX, 0), (RDX, id.0), (R8, value), (R9, u64::MAX)];
        self.call(Leaf::VP_WR, &operands)[RAX]
    }

    fn enter_l2(&mut self, flush: Flush) -> (Outcome, Gprs) {
        let mut gprs = [0; COUNT];
        gprs[RAX] = Leaf::VP_ENTER.0.into();
        (gprs[RCX], gprs[RDX]) = (enter_operand(VM, flush), STATE.get());
        let outcome = self.tdcall(CPU0, KERNEL, &mut gprs, &mut FakeCpu::default());
        (outcome, gprs)
    }

    fn state_page(&self, vmpl: Vmpl) -> Vmsa {
        let at = self.td().unwrap().state_of(CPU0, vmpl).unwrap();
        let mut page = [0; 4096];
        self.memory().read(at, &mut page);
        Vmsa::read_from_bytes(&page).unwrap()
    }
}

/// A trust domain whose VM 1 can be entered, with the pages accepted that it needs.
fn ready() -> Platform<Sparse> {
    let mut td = td("");
    for page in [STATE.align_down(PageSize::Size4K), APIC, GIVEN] {
        assert_eq!(td.accept_td(page, PageSize::Size4K), OK);
    }
    assert_eq!(td.set_field(Field::VIRTUAL_APIC.id(VM), APIC.get()), OK);
    td
}

/// Enters VM 1 with the structure as it is.
fn entered(flush: Flush) -> Platform<Sparse> {
    let mut td = ready();
    assert_eq!(td.enter_l2(flush).0, Outcome::Enter(L2));
    assert!(td.enter(CPU0, L2).is_ok());
    td
}

#[test]
fn registers_go_in_and_out() {
    let mut td = ready();
    let at = td.spa_of(STATE).unwrap();
    let state = EnterState {
        gprs: core::array::from_fn(|n| 100 + n as u64),
        rflags: 0x246,
        rip: 0x7777,
        ssp: 0,
        interrupt_status: 0x1234,
        padding: [0; 6],
    };
    td.memory().write(at, state.as_bytes());
    td.memory().write(at.plus(EnterState::USED as u64), &[0xEE]);
    assert_eq!(td.enter_l2(Flush::Ept).0, Outcome::Enter(L2));
    td.enter(CPU0, L2).unwrap();
    let inside = td.state_page(L2);
    assert_eq!((inside.rax, inside.rsp, inside.r15), (100, 104, 115));
    assert_eq!((inside.rip, inside.rflags), (0x7777, 0x246));

    let exit = Exit {
        qualification: 5,
        ..Exit::new(ExitReason::CPUID)
    };
    td.exit_l2(CPU0, exit, Interruptibility::STI);
    let rsp = td.state_page(L1).rsp;
    td.enter(CPU0, L1).unwrap();
    let l1 = td.state_page(L1);
    assert_eq!((l1.rax, l1.rcx, l1.rbx), (10, 5, 0));
    assert_eq!((l1.rbp, l1.rsp), (105, rsp));
    let mut left = EnterState::default();
    td.memory().read(at, left.as_mut_bytes());
    // The module does not touch what lies behind.
    assert_eq!(left.padding[0], 0xEE);
    left.padding[0] = 0;
    assert_eq!(left, state);
    let operands = [(RCX, 0), (RDX, Field::INTERRUPTIBILITY.id(VM).0)];
    assert_eq!(td.call(Leaf::VP_RD, &operands)[R8], 1);
}

#[test]
fn an_interrupt_that_waits_keeps_l1() {
    let mut td = ready();
    let mut gprs = [0; COUNT];
    gprs[RAX] = Leaf::VP_ENTER.0.into();
    (gprs[RCX], gprs[RDX]) = (enter_operand(VM, Flush::None), STATE.get());
    let mut cpu = FakeCpu::default();
    cpu.interrupted = true;
    let outcome = td.tdcall(CPU0, KERNEL, &mut gprs, &mut cpu);
    assert_eq!(outcome, Outcome::Complete);
    assert_eq!(gprs[RAX], Status::PENDING_INTERRUPT.with(0));
    assert!(td.running_l2(CPU0).is_none());
}

/// The host takes the page of the structure while the VM runs: no register of L2's is lost in
/// silence.
#[test]
fn an_exit_without_its_page_ends_the_run() {
    let mut td = entered(Flush::Ept);
    td.remove(STATE.align_down(PageSize::Size4K));
    td.exit_l2(CPU0, Exit::new(ExitReason::HLT), Interruptibility::empty());
    assert!(matches!(
        td.enter(CPU0, L1),
        Err(EnterError::TdExit(why)) if why.contains("does not help")
    ));
}

fn stale(td: &Platform<Sparse>) -> u64 {
    td.counters.violations.stale_translation
}

fn leave(td: &mut Platform<Sparse>) {
    td.exit_l2(CPU0, Exit::new(ExitReason::HLT), Interruptibility::empty());
    td.enter(CPU0, L1).unwrap();
}

#[test]
fn withdrawn_rights_need_a_flush_on_each_processor_that_ran_the_vm() {
    let mut td = entered(Flush::Ept);
    leave(&mut td);
    let mask = VM.field(PageAttributes::ALL_ACCESS);
    let gone = VM.field(PageAttributes::VALID);
    let withdraw = |td: &mut Platform<Sparse>, mask| {
        td.write_attributes(GIVEN, PageSize::Size4K, full(VM), mask);
        td.write_attributes(GIVEN, PageSize::Size4K, gone, mask);
    };
    let again = |td: &mut Platform<Sparse>, flush| {
        assert_eq!(td.enter_l2(flush).0, Outcome::Enter(L2));
        td.enter(CPU0, L2).unwrap();
        leave(td);
        stale(td)
    };
    withdraw(&mut td, mask);
    assert_eq!(again(&mut td, Flush::Ept), 0);
    withdraw(&mut td, mask);
    assert_eq!(again(&mut td, Flush::Linear), 1);
    assert_eq!(again(&mut td, Flush::None), 1, "told once");
    // INVEPT by the mask.
    withdraw(&mut td, mask | VM.field(PageAttributes::VALID));
    assert_eq!(again(&mut td, Flush::None), 1);
    withdraw(&mut td, mask);
    td.call(Leaf::VP_INVEPT, &[(RCX, VM.invept_bit())]);
    assert_eq!(again(&mut td, Flush::None), 1);
    // An honest host makes all flush when it takes the page; L1 must not build on that.
    withdraw(&mut td, mask);
    td.host_call(
        SubFunction::MAP_GPA,
        &[(R12, GIVEN.get() | 1 << 47), (R13, 0x1000)],
    );
    assert_eq!(again(&mut td, Flush::None), 2);
    // A processor that has not run the VM holds nothing of it.
    withdraw(&mut td, mask);
    let other = VcpuId(1);
    let mut call = |leaf: Leaf, operands: &[(usize, u64)]| {
        let mut gprs = [0; COUNT];
        gprs[RAX] = leaf.0.into();
        for &(number, value) in operands {
            gprs[number] = value;
        }
        td.tdcall(other, KERNEL, &mut gprs, &mut FakeCpu::default())
    };
    let field = Field::VIRTUAL_APIC.id(VM).0;
    let set = [(RDX, field), (R8, APIC.get()), (R9, u64::MAX)];
    assert_eq!(call(Leaf::VP_WR, &set), Outcome::Complete);
    let enter = [(RCX, enter_operand(VM, Flush::None)), (RDX, STATE.get())];
    assert_eq!(call(Leaf::VP_ENTER, &enter), Outcome::Enter(L2));
    assert_eq!(stale(&td), 2);
}

/// The other processor may come and go with what it has, until the one that has withdrawn it goes on
/// with its guest; then it has to be outside, and to drop it before it comes back.
#[test]
fn a_withdrawn_right_has_to_be_gone_when_its_processor_goes_on() {
    let other = VcpuId(1);
    let call = |td: &mut Platform<Sparse>, leaf: Leaf, operands: &[(usize, u64)]| {
        let mut gprs = [0; COUNT];
        gprs[RAX] = leaf.0.into();
        for &(number, value) in operands {
            gprs[number] = value;
        }
        td.tdcall(other, KERNEL, &mut gprs, &mut FakeCpu::default())
    };
    let enter = |td: &mut Platform<Sparse>, flush| {
        let operands = [(RCX, enter_operand(VM, flush)), (RDX, STATE.get())];
        assert_eq!(call(td, Leaf::VP_ENTER, &operands), Outcome::Enter(L2));
        td.enter(other, L2).unwrap();
        stale(td)
    };
    let leave_other = |td: &mut Platform<Sparse>| {
        td.exit_l2(other, Exit::new(ExitReason::HLT), Interruptibility::empty());
        td.enter(other, L1).unwrap();
    };
    // Both have run the VM; the first has withdrawn a right and dropped it for itself.
    let both = || {
        let mut td = entered(Flush::Ept);
        leave(&mut td);
        let field = Field::VIRTUAL_APIC.id(VM).0;
        let set = [(RDX, field), (R8, APIC.get()), (R9, u64::MAX)];
        assert_eq!(call(&mut td, Leaf::VP_WR, &set), Outcome::Complete);
        assert_eq!(enter(&mut td, Flush::None), 0);
        let mask = VM.field(PageAttributes::ALL_ACCESS | PageAttributes::VALID);
        let gone = VM.field(PageAttributes::VALID);
        td.write_attributes(GIVEN, PageSize::Size4K, full(VM), mask);
        td.write_attributes(GIVEN, PageSize::Size4K, gone, mask);
        td
    };
    let go_on = |td: &mut Platform<Sparse>| {
        assert_eq!(td.enter_l2(Flush::None).0, Outcome::Enter(L2));
        stale(td)
    };
    let mut inside = both();
    assert_eq!(go_on(&mut inside), 1, "the other is still inside");

    let mut back = both();
    leave_other(&mut back);
    assert_eq!(enter(&mut back, Flush::None), 0, "nobody has relied on it");
    leave_other(&mut back);
    assert_eq!(go_on(&mut back), 0, "the other is outside");
    assert_eq!(enter(&mut back, Flush::None), 1);

    let mut restored = both();
    let mask = VM.field(PageAttributes::ALL_ACCESS);
    restored.write_attributes(GIVEN, PageSize::Size4K, full(VM), mask);
    assert_eq!(go_on(&mut restored), 0, "nothing is gone");

    let mut flushed = both();
    leave_other(&mut flushed);
    assert_eq!(go_on(&mut flushed), 0);
    assert_eq!(enter(&mut flushed, Flush::Ept), 0);
}

#[test]
fn msrs_exit_are_virtual_or_native() {
    let mut td = ready();
    let on = SecondaryControls::VIRTUALIZE_X2APIC
        | SecondaryControls::VIRTUAL_INTERRUPTS
        | SecondaryControls::EPT
        | SecondaryControls::VPID
        | SecondaryControls::WBINVD
        | SecondaryControls::UNRESTRICTED;
    let id = Field::SECONDARY_CONTROLS.id(VM);
    assert_eq!(td.set_field(id, on.bits().into()), OK);
    for number in [0x277, 0x802, 0x808, 0x80B, 0x830, 0x1B] {
        for write in [false, true] {
            let (word, _) = msr_bitmaps::place(number, write).unwrap();
            td.set_field(msr_bitmaps::id(VM, word), 0);
        }
    }
    assert_eq!(td.enter_l2(Flush::Ept).0, Outcome::Enter(L2));
    td.enter(CPU0, L2).unwrap();
    let mut access = |number, write| td.l2_msr(CPU0, number, write);
    assert_eq!(access(0xC000_0080, None), MsrAccess::Exit);
    assert_eq!(access(0x277, None), MsrAccess::Native);
    assert_eq!(access(0x1B, None), MsrAccess::Exit);
    assert_eq!(access(0x4000_0000, None), MsrAccess::Exit);
    assert_eq!(access(0x808, Some(0x30)), MsrAccess::Done(0));
    assert_eq!(access(0x808, None), MsrAccess::Done(0x30));
    assert_eq!(access(0x808, Some(0x100)), MsrAccess::GeneralProtection);
    assert_eq!(access(0x80B, Some(1)), MsrAccess::GeneralProtection);
    // Without virtual registers they are L1's.
    assert_eq!(access(0x802, None), MsrAccess::Exit);
    assert_eq!(access(0x830, Some(0)), MsrAccess::Exit);
}

#[test]
fn a_virtual_interrupt_is_delivered_once() {
    let mut td = ready();
    let on = SecondaryControls::all()
        .difference(SecondaryControls::VIRTUALIZE_X2APIC | SecondaryControls::APIC_REGISTERS);
    let id = Field::SECONDARY_CONTROLS.id(VM);
    assert_eq!(td.set_field(id, on.bits().into()), OK);
    let state = td.spa_of(STATE).unwrap();
    td.memory().write(state.plus(0x98), &[0x41]);
    let page = td.spa_of(APIC).unwrap();
    td.memory().write(page.plus(0x220), &[2]);
    assert_eq!(td.enter_l2(Flush::Ept).0, Outcome::Enter(L2));
    td.enter(CPU0, L2).unwrap();
    assert_eq!(td.virtual_interrupt(CPU0, false), Some(Virtual::Wait));
    assert_eq!(
        td.virtual_interrupt(CPU0, true),
        Some(Virtual::Deliver(0x41))
    );
    assert_eq!(td.virtual_interrupt(CPU0, true), Some(Virtual::None));
    leave(&mut td);
    assert_eq!(td.memory().read_u64(state.plus(0x98)) & 0xFFFF, 0x4100);
}
