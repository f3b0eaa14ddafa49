//! TDG.VP.ENTER: operands, what goes in, what comes out; TDG.VP.INVEPT, TDG.VP.INVGLA.

use guest::harness::{Case, Finding, Verdict, case, expect, expect_not};
use guest::insn;
use guest::memory::{self, private};
use guest::oracle;
use guest::tdcall::{self, MARK, call};
use guest::trap;
use protocols::addr::Gpa;
use protocols::oracle::Counter;
use protocols::tdx::l2::{Flush, GlaList, enter_operand, invgla_operand};
use protocols::tdx::ve::ExitReason;
use protocols::tdx::vmcall::register::{COUNT, R12, RAX, RBP, RBX, RCX, RDX, RSP};
use protocols::tdx::vmcs::{Field, interruption};
use protocols::tdx::{L2Vm, Leaf, Operand, Status};

use super::vm::{self, HLT, LOAD, SPIN, Vm};

pub const CASES: &[Case] = &[
    case(
        "enter_misaligned_state",
        "tdx.md §7 VP.ENTER RDX",
        misaligned,
    ),
    case(
        "enter_shared_state",
        "tdx.md §7 VP.ENTER RDX private",
        shared,
    ),
    case("enter_no_such_vm", "tdx.md §7 VP.ENTER RCX 53:52", no_vm),
    case(
        "enter_reserved_bits",
        "tdx.md §7 VP.ENTER RCX others 0",
        reserved,
    ),
    case("enter_without_virtual_apic", "tdx.md §7 setup 3", no_apic),
    case(
        "enter_order_of_checks",
        "tdx.md §7 VP.ENTER check order",
        order,
    ),
    case("enter_and_halt", "tdx.md §7 output", halts),
    case(
        "enter_passes_all_registers",
        "tdx.md §7 L2_ENTER_GUEST_STATE",
        registers,
    ),
    case("enter_leaves_rbp_of_l2", "tdx.md §7 save RBP yourself", rbp),
    case(
        "enter_msrs_are_shared",
        "docs/machine.md, TDX: one set of registers",
        one_set,
    ),
    case(
        "enter_32_bit_without_paging",
        "tdx.md §8: a firmware's first mode",
        flat,
    ),
    case(
        "l2_enters_long_mode",
        "docs/machine.md, TDX: EFER.LMA",
        long_mode,
    ),
    case("enter_mode_must_fit", "tdx.md §1 C0000731", mode),
    case(
        "enter_with_an_event",
        "docs/machine.md, TDX: entry events",
        event,
    ),
    case(
        "enter_with_an_error_code",
        "docs/machine.md, TDX: entry events",
        error_code,
    ),
    case(
        "enter_with_a_software_interrupt",
        "docs/machine.md, TDX: entry events",
        software,
    ),
    case(
        "enter_with_no_event_there_is",
        "tdx.md §1 C0000731",
        bad_event,
    ),
    case("enter_with_an_nmi", "docs/machine.md, TDX: NMI", nmi),
    case(
        "interrupt_of_l1_waits",
        "tdx.md §7 PENDING_INTERRUPT",
        pending_interrupt,
    ),
    case(
        "interrupt_of_l1_ends_l2",
        "tdx.md §7 routing: external interrupt",
        ends,
    ),
    case("two_vms_are_apart", "tdx.md §7 L2 VMs 1..3", two),
    case(
        "withdrawn_without_invept",
        "tdx.md §3 masks bit 15; §7 RCX 1:0",
        stale,
    ),
    case("invept_drops_translations", "tdx.md §1 leaf 26", invept),
    case(
        "invept_reserved",
        "tdx.md §1 leaf 26 bits 1–3",
        invept_reserved,
    ),
    case("invgla", "tdx.md §1 leaf 27", invgla),
    case(
        "invgla_operands",
        "tdx.md §1 leaf 27, list info",
        invgla_operands,
    ),
];

const VM1: u64 = enter_operand(L2Vm::Vm1, Flush::None);
/// The vector of this L1's interrupts.
const VECTOR: u64 = 0x31;
const SELF_IPI: u32 = 0x83F;

/// An entry that must fail like this.
fn expect_refused(rcx: u64, rdx: u64, status: u64) -> Verdict {
    let after = vm::enter(rcx, rdx)?;
    expect("RAX", after[RAX], status)?;
    // Nothing else has changed.
    expect("RBX", after[RBX], MARK)
}

fn misaligned() -> Verdict {
    let vm = Vm::new()?;
    expect_refused(VM1, vm.state_at() + 128, Operand::RDX.invalid())
}

fn shared() -> Verdict {
    let vm = Vm::new()?;
    expect_refused(VM1, vm.state_at() | 1 << 47, Operand::RDX.invalid())?;
    expect_refused(VM1, vm.state_at() | 1 << 52, Operand::RDX.invalid())
}

fn no_vm() -> Verdict {
    let vm = Vm::new()?;
    expect_refused(0, vm.state_at(), Operand::RCX.invalid())
}

fn reserved() -> Verdict {
    let vm = Vm::new()?;
    for bit in [2, 11, 12, 51, 54, 63] {
        expect_refused(VM1 | 1 << bit, vm.state_at(), Operand::RCX.invalid())?;
    }
    Ok(())
}

fn no_apic() -> Verdict {
    // Nobody has said where VM 3's is.
    let vm = Vm::new()?;
    let rcx = enter_operand(L2Vm::Vm3, Flush::None);
    expect_refused(rcx, vm.state_at(), Operand::L2_VAPIC_GPA.invalid())
}

fn order() -> Verdict {
    let vm = Vm::new()?;
    let vm3 = enter_operand(L2Vm::Vm3, Flush::None);
    expect_refused(vm3 | 4, vm.state_at() + 1, Operand::RDX.invalid())?;
    expect_refused(vm3 | 4, vm.state_at(), Operand::RCX.invalid())
}

fn halts() -> Verdict {
    let mut vm = Vm::of(HLT)?;
    let exit = vm.expect_exit(ExitReason::HLT)?;
    expect("length", exit.instruction, 1 << 32)?;
    // Selector 8, rights A09B, limit 4 GiB.
    expect("CS", exit.cs, 0xFFFF_FFFF_A09B_0008)?;
    expect("base of CS, CPL", (exit.cs_base, exit.cpl), (0, 0))?;
    let rest = [
        exit.qualification,
        exit.gla,
        exit.gpa,
        exit.interruption,
        exit.idt_vectoring,
        exit.extended,
    ];
    expect("all else", rest, [0; 6])?;
    expect("RIP", vm.state.rip, vm.code())?;
    expect("RFLAGS", vm.state.rflags, 2)
}

fn registers() -> Verdict {
    // MOV RAX, RSP; ADD RCX, 1; HLT.
    let mut vm = Vm::of(&[0x48, 0x89, 0xE0, 0x48, 0x83, 0xC1, 0x01, 0xF4])?;
    vm.state.gprs = core::array::from_fn(|n| 0x1_0000 + n as u64);
    vm.expect_halt(7)?;
    let mut wanted: [u64; COUNT] = core::array::from_fn(|n| 0x1_0000 + n as u64);
    wanted[RAX] = wanted[RSP];
    wanted[RCX] += 1;
    expect("registers", vm.state.gprs, wanted)
}

fn rbp() -> Verdict {
    let mut vm = Vm::of(HLT)?;
    vm.state.gprs[RBP] = 0xB0B0;
    vm.expect_halt(0)?;
    expect("RBP", vm.rbp, 0xB0B0)
}

fn one_set() -> Verdict {
    const KERNEL_GS_BASE: u32 = 0xC000_0102;
    let mut vm = Vm::of(vm::RDMSR)?;
    vm.exit_msr(KERNEL_GS_BASE, false)?;
    expect("WRMSR", insn::wrmsr(KERNEL_GS_BASE, 0x1234), Ok(()))?;
    vm.state.gprs[RCX] = KERNEL_GS_BASE.into();
    vm.expect_halt(2)?;
    expect("in L2", vm.state.gprs[RAX], 0x1234)?;
    vm.load(vm::WRMSR)?;
    (vm.state.gprs[RAX], vm.state.gprs[RDX]) = (0x4321, 0);
    vm.expect_halt(2)?;
    expect("in L1", insn::rdmsr(KERNEL_GS_BASE), Ok(0x4321))
}

/// 32-bit protected mode without paging, as a trust domain starts.
fn make_flat(vm: &Vm, efer: u64) -> Verdict {
    vm.set(Field::CS_RIGHTS, 0xC09B)?;
    vm.set(Field::CR0, 0x21)?;
    vm.set(Field::CR4, 0x2000)?;
    vm.set(Field::EFER, efer)?;
    vm.set(Field::ENTRY_CONTROLS, 0xC000)
}

fn flat() -> Verdict {
    // MOV EAX, [EBX]; HLT.
    let mut vm = Vm::of(&[0x8B, 0x03, 0xF4])?;
    make_flat(&vm, 0x100)?;
    memory::write(vm.stack() - 8, 0x1122_3344)?;
    vm.state.gprs[RBX] = vm.stack() - 8;
    vm.expect_halt(2)?;
    expect("EAX", vm.state.gprs[RAX], 0x1122_3344)
}

fn long_mode() -> Verdict {
    // MOV CR4, EAX; MOV CR3, EBX; MOV CR0, ECX; HLT.
    let mut vm = Vm::of(&[0x0F, 0x22, 0xE0, 0x0F, 0x22, 0xDB, 0x0F, 0x22, 0xC1, 0xF4])?;
    make_flat(&vm, 0x901)?;
    vm.state.gprs[RAX] = 0x20;
    vm.state.gprs[RBX] = vm.root();
    vm.state.gprs[RCX] = 0x8000_0021;
    vm.expect_halt(9)?;
    expect("CR0", vm.get(Field::CR0)? & 0x8000_0021, 0x8000_0021)?;
    expect("CR4", vm.get(Field::CR4)?, 0x2020)?;
    expect("EFER", vm.get(Field::EFER)?, 0xD01)?;
    expect("IA-32e mode", vm.get(Field::ENTRY_CONTROLS)?, 0xC200)
}

const ERROR: u64 = Status::TD_VMCS_FIELD_ERROR.with(0);

fn mode() -> Verdict {
    let vm = Vm::of(HLT)?;
    vm.set(Field::ENTRY_CONTROLS, 0xC000)?;
    expect_refused(VM1, vm.state_at(), ERROR)
}

fn inject(vm: &Vm, kind: interruption::Kind, vector: u8, error: Option<u32>) -> Verdict {
    let event = interruption::Event {
        kind,
        vector,
        has_error: error.is_some(),
    };
    vm.set(Field::ENTRY_ERROR_CODE, error.unwrap_or(0).into())?;
    vm.set(Field::ENTRY_INTERRUPTION, event.encode().into())
}

fn event() -> Verdict {
    let mut vm = Vm::of(HLT)?;
    inject(&vm, interruption::Kind::EXCEPTION, 20, None)?;
    vm.expect_handler(20)?;
    let rsp = vm.state.gprs[RSP];
    expect("RIP on the stack", memory::read(rsp)?, vm.code())?;
    let left = vm.get(Field::ENTRY_INTERRUPTION)?;
    expect("delivered once", left >> 31, 0)?;
    vm.return_from_handler();
    vm.expect_halt(0)
}

fn error_code() -> Verdict {
    let mut vm = Vm::of(HLT)?;
    inject(&vm, interruption::Kind::EXCEPTION, 13, Some(0x1238))?;
    vm.expect_handler(13)?;
    let rsp = vm.state.gprs[RSP];
    expect("error code", memory::read(rsp)?, 0x1238)?;
    expect("RIP on the stack", memory::read(rsp + 8)?, vm.code())
}

fn software() -> Verdict {
    let mut vm = Vm::of(HLT)?;
    inject(&vm, interruption::Kind::SOFTWARE_INTERRUPT, 0x80, None)?;
    vm.set(Field::ENTRY_INSTRUCTION_LENGTH, 2)?;
    vm.expect_handler(0x80)?;
    let pushed = memory::read(vm.state.gprs[RSP])?;
    expect("RIP on the stack", pushed, vm.code() + 2)
}

fn bad_event() -> Verdict {
    let vm = Vm::of(HLT)?;
    for (kind, vector, error) in [
        (interruption::Kind::EXCEPTION, 20, Some(0)),
        (interruption::Kind::EXCEPTION, 13, None),
        (interruption::Kind::EXCEPTION, 32, None),
        (interruption::Kind::NMI, 3, None),
        (interruption::Kind(1), 3, None),
    ] {
        inject(&vm, kind, vector, error)?;
        expect_refused(VM1, vm.state_at(), ERROR)?;
    }
    vm.set(Field::ENTRY_INTERRUPTION, 0)
}

fn nmi() -> Verdict {
    const BLOCKED: u64 = 1 << 3;
    let mut vm = Vm::of(HLT)?;
    inject(&vm, interruption::Kind::NMI, 2, None)?;
    vm.expect_handler(2)?;
    expect("blocked", vm.get(Field::INTERRUPTIBILITY)?, BLOCKED)?;
    vm.return_from_handler();
    vm.expect_halt(0)?;
    expect("unblocked", vm.get(Field::INTERRUPTIBILITY)?, 0)
}

fn pending_interrupt() -> Verdict {
    let mut vm = Vm::of(HLT)?;
    let _ = trap::interrupts();
    expect("self IPI", insn::wrmsr(SELF_IPI, VECTOR), Ok(()))?;
    let waits = Status::PENDING_INTERRUPT.with(0);
    expect_refused(VM1, vm.state_at(), waits)?;
    // It waits as long as L1 does not take it.
    expect_refused(VM1, vm.state_at(), waits)?;
    insn::open_interrupts();
    expect("taken", trap::interrupts(), 1 << (VECTOR - 32))?;
    vm.expect_halt(0)
}

fn ends() -> Verdict {
    let mut vm = Vm::of(SPIN)?;
    let _ = trap::interrupts();
    // One shot, from the host's timer. On a busy computer it may come before the VM is entered:
    // then with more time once more.
    for doublings in 0..12 {
        tdcall::start_timer(VECTOR, 2_500 << doublings)?;
        let exit = vm.run_or_wait()?;
        insn::open_interrupts();
        expect("taken", trap::interrupts(), 1 << (VECTOR - 32))?;
        let Some(exit) = exit else { continue };
        expect("RIP", vm.state.rip, vm.code())?;
        return expect(
            "why",
            (exit.status, exit.reason),
            (
                Status::L2_EXIT_PENDING_INTERRUPT,
                ExitReason::EXTERNAL_INTERRUPT,
            ),
        );
    }
    Err(Finding::new(format_args!(
        "the VM is never entered in time"
    )))
}

fn two() -> Verdict {
    let mut first = Vm::of(LOAD)?;
    let mut second = Vm::with(L2Vm::Vm2)?;
    second.load(LOAD)?;
    memory::write(first.stack() - 8, 0x77)?;
    for vm in [&mut first, &mut second] {
        vm.state.gprs[RBX] = vm.stack() - 8;
        vm.state.gprs[R12] = vm.code();
        vm.expect_halt(3)?;
    }
    expect(
        "RAX",
        (first.state.gprs[RAX], second.state.gprs[RAX]),
        (0x77, 0),
    )?;
    // The second has no right to the first one's memory.
    second.restart();
    second.state.gprs[RBX] = first.stack() - 8;
    second.expect_violation(first.stack() - 8, 0x181, 0)?;
    expect_not("CR3", first.get(Field::CR3)?, second.get(Field::CR3)?)
}

fn stale() -> Verdict {
    let mut vm = Vm::of(HLT)?;
    vm.expect_halt(0)?;
    let before = oracle::counter(Counter::STALE_TRANSLATION);
    let page = Gpa::new(vm.kept());
    vm::give(vm.vm, page, protocols::tdx::PageAttributes::READ)?;
    vm.expect_halt(0)?;
    vm::withdraw(vm.vm, page)?;
    vm.expect_halt(0)?;
    expect(
        "with INVEPT",
        oracle::counter(Counter::STALE_TRANSLATION),
        before,
    )?;
    vm::give(vm.vm, page, protocols::tdx::PageAttributes::READ)?;
    vm::withdraw(vm.vm, page)?;
    vm.flush = Flush::Linear;
    vm.expect_halt(0)?;
    let now = oracle::counter(Counter::STALE_TRANSLATION);
    expect("with INVVPID", now - before, 1)
}

fn invept() -> Verdict {
    let mut vm = Vm::of(HLT)?;
    vm.flush = Flush::None;
    vm.expect_halt(0)?;
    let before = oracle::counter(Counter::STALE_TRANSLATION);
    let page = Gpa::new(vm.kept());
    vm::give(vm.vm, page, protocols::tdx::PageAttributes::READ)?;
    vm::withdraw(vm.vm, page)?;
    let after = call(Leaf::VP_INVEPT, &[(RCX, vm.vm.invept_bit())])?;
    expect("RAX", after[RAX], 0)?;
    vm.expect_halt(0)?;
    expect("stale", oracle::counter(Counter::STALE_TRANSLATION), before)
}

fn invept_reserved() -> Verdict {
    for rcx in [1, 0x10, 1 << 63] {
        let after = call(Leaf::VP_INVEPT, &[(RCX, rcx)])?;
        expect("RAX", after[RAX], Operand::RCX.invalid())?;
    }
    Ok(())
}

fn invgla() -> Verdict {
    let vm = Vm::new()?;
    let single = [(RCX, invgla_operand(vm.vm, false)), (RDX, 0x1000)];
    let after = call(Leaf::VP_INVGLA, &single)?;
    expect("RAX, RDX", (after[RAX], after[RDX]), (0, 0x1000))?;
    memory::write(private(Gpa::new(vm.kept())), 0x1000)?;
    let list = GlaList {
        gpa: vm.kept(),
        first: 0,
        count: 1,
    };
    let operands = [(RCX, invgla_operand(vm.vm, true)), (RDX, list.encode())];
    let after = call(Leaf::VP_INVGLA, &operands)?;
    let done = GlaList {
        first: 1,
        count: 0,
        ..list
    };
    expect("RAX, RDX", (after[RAX], after[RDX]), (0, done.encode()))
}

fn invgla_operands() -> Verdict {
    let vm = Vm::new()?;
    let rax = |rcx, rdx| Ok::<_, Finding>(call(Leaf::VP_INVGLA, &[(RCX, rcx), (RDX, rdx)])?[RAX]);
    expect("VM 0", rax(0, 0)?, Operand::RCX.invalid())?;
    let list = invgla_operand(vm.vm, true);
    expect(
        "reserved",
        rax(list | 2, vm.kept())?,
        Operand::RCX.invalid(),
    )?;
    let beyond = vm.kept() | 1 << 52 | 511 | 2 << 52;
    expect("beyond", rax(list, beyond)?, Operand::RDX.invalid())?;
    let shared = vm.kept() | 1 << 47;
    expect("shared", rax(list, shared)?, Operand::RDX.invalid())
}
