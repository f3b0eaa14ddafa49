//! The virtual APIC: interrupts that L1 gives to an L2 VM.

use guest::harness::{Case, Verdict, case, expect};
use guest::{insn, memory, tdcall, trap};
use protocols::tdx::Status;
use protocols::tdx::ve::ExitReason;
use protocols::tdx::vmcall::register::{RAX, RBX, RCX, RDX};
use protocols::tdx::vmcs::{Field, SecondaryControls, apic};

use super::vm::{HLT, RDMSR, STI, Vm, WRMSR};

pub const CASES: &[Case] = &[
    case(
        "virtual_interrupt",
        "docs/machine.md, TDX: virtual APIC",
        deliver,
    ),
    case(
        "virtual_interrupt_waits_for_if",
        "docs/machine.md, TDX: virtual APIC",
        waits,
    ),
    case(
        "virtual_interrupt_waits_for_tpr",
        "docs/machine.md, TDX: virtual APIC",
        tpr,
    ),
    case(
        "virtual_interrupt_by_cr8",
        "docs/machine.md, TDX: virtual APIC",
        cr8,
    ),
    case(
        "cr8_while_an_interrupt_waits",
        "docs/machine.md, TDX: virtual APIC",
        cr8_with_one_waiting,
    ),
    case(
        "virtual_end_of_interrupt",
        "docs/machine.md, TDX: virtual APIC",
        eoi,
    ),
    case(
        "virtual_end_of_interrupt_for_l1",
        "docs/machine.md, TDX: virtual APIC",
        eoi_exit,
    ),
    case(
        "virtual_self_ipi",
        "docs/machine.md, TDX: virtual APIC",
        self_ipi,
    ),
    case(
        "virtual_registers",
        "docs/machine.md, TDX: virtual APIC",
        registers,
    ),
    case(
        "virtual_icr_is_l1s",
        "docs/machine.md, TDX: virtual APIC",
        icr,
    ),
    case(
        "virtual_tpr_threshold",
        "tdx.md §7 routing: TPR below threshold",
        threshold,
    ),
    case(
        "no_virtual_interrupts",
        "docs/machine.md, TDX: virtual APIC",
        off,
    ),
    case(
        "no_interrupt_is_lost_while_one_waits",
        "docs/machine.md: a lost interrupt",
        none_lost,
    ),
];

const VECTOR: u8 = 0x51;
const TPR: u32 = 0x808;
const EOI: u32 = 0x80B;
const SELF_IPI: u32 = 0x83F;

/// A VM with a virtual APIC, whose registers it may use.
fn with_apic(code: &[u8]) -> Result<Vm, guest::harness::Finding> {
    let vm = Vm::of(code)?;
    vm.open_secondary(
        SecondaryControls::VIRTUALIZE_X2APIC
            | SecondaryControls::APIC_REGISTERS
            | SecondaryControls::VIRTUAL_INTERRUPTS,
    )?;
    for number in [0x802, TPR, EOI, SELF_IPI] {
        vm.exit_msr(number, false)?;
    }
    Ok(vm)
}

/// L1 posts an interrupt.
fn post(vm: &mut Vm, vector: u8) -> Verdict {
    let (offset, bit) = apic::bit(vector);
    // Words of 32 bits with nothing behind them.
    let at = vm.virtual_apic() + apic::IRR + offset;
    memory::write(at, memory::read(at)? | 1 << bit)?;
    let status = vm.state.interrupt_status;
    vm.state.interrupt_status = status & 0xFF00 | status.to_le_bytes()[0].max(vector) as u16;
    Ok(())
}

fn in_page(vm: &Vm, base: u64, vector: u8) -> Result<bool, guest::harness::Finding> {
    let (offset, bit) = apic::bit(vector);
    Ok(memory::read(vm.virtual_apic() + base + offset)? >> bit & 1 != 0)
}

fn expect_status(vm: &Vm, requested: u8, in_service: u8) -> Verdict {
    expect(
        "RVI, SVI",
        vm.state.interrupt_status,
        u16::from_le_bytes([requested, in_service]),
    )
}

const IF: u64 = 1 << 9;

fn deliver() -> Verdict {
    let mut vm = with_apic(HLT)?;
    vm.state.rflags |= IF;
    post(&mut vm, VECTOR)?;
    vm.expect_handler(VECTOR)?;
    expect_status(&vm, 0, VECTOR)?;
    expect("requested", in_page(&vm, apic::IRR, VECTOR)?, false)?;
    expect("in service", in_page(&vm, apic::ISR, VECTOR)?, true)?;
    let priority = memory::read(vm.virtual_apic() + apic::PPR)?;
    expect("processor priority", priority, 0x50)
}

fn waits() -> Verdict {
    let mut vm = with_apic(STI)?;
    post(&mut vm, VECTOR)?;
    vm.expect_handler(VECTOR)?;
    let pushed = memory::read(vm.state.gprs[protocols::tdx::vmcall::register::RSP])?;
    // Behind STI there is one instruction more.
    expect("RIP on the stack", pushed, vm.code() + 2)
}

fn tpr() -> Verdict {
    // HLT; WRMSR; HLT.
    let mut vm = with_apic(&[0xF4, 0x0F, 0x30, 0xF4])?;
    memory::write(vm.virtual_apic() + apic::TPR, 0x50)?;
    vm.state.rflags |= IF;
    post(&mut vm, VECTOR)?;
    vm.expect_halt(0)?;
    expect_status(&vm, VECTOR, 0)?;
    vm.state.rip += 1;
    (vm.state.gprs[RCX], vm.state.gprs[RAX]) = (TPR.into(), 0x40);
    vm.state.gprs[RDX] = 0;
    vm.expect_handler(VECTOR)?;
    expect_status(&vm, 0, VECTOR)
}

fn cr8() -> Verdict {
    // MOV RBX, CR8; MOV CR8, RAX; HLT.
    let mut vm = with_apic(&[0x44, 0x0F, 0x20, 0xC3, 0x44, 0x0F, 0x22, 0xC0, 0xF4])?;
    memory::write(vm.virtual_apic() + apic::TPR, 0x50)?;
    vm.state.gprs[RAX] = 9;
    vm.expect_halt(8)?;
    let priority = memory::read(vm.virtual_apic() + apic::TPR)?;
    expect("task priority", priority, 0x90)
}

/// OVMF's handlers write CR8 with interrupts off, whatever waits.
fn cr8_with_one_waiting() -> Verdict {
    // MOV CR8, RAX; MOV RBX, CR8; STI; NOP; HLT.
    let code = [
        0x44, 0x0F, 0x22, 0xC0, 0x44, 0x0F, 0x20, 0xC3, 0xFB, 0x90, 0xF4,
    ];
    let mut vm = with_apic(&code)?;
    post(&mut vm, VECTOR)?;
    // Its class is below that of the interrupt.
    vm.state.gprs[RAX] = 3;
    vm.expect_handler(VECTOR)?;
    expect("CR8", vm.state.gprs[RBX], 3)?;
    let mut vm = with_apic(&code)?;
    post(&mut vm, VECTOR)?;
    vm.state.gprs[RAX] = 9;
    vm.expect_halt(10)?;
    expect_status(&vm, VECTOR, 0)?;
    let mut vm = with_apic(&code)?;
    post(&mut vm, VECTOR)?;
    vm.state.gprs[RAX] = 16;
    vm.expect_handler(13)
}

fn eoi() -> Verdict {
    // In the handler's place: WRMSR; HLT.
    let mut vm = with_apic(WRMSR)?;
    vm.state.rflags |= IF;
    post(&mut vm, 0x41)?;
    post(&mut vm, VECTOR)?;
    vm.expect_handler(VECTOR)?;
    expect_status(&vm, 0x41, VECTOR)?;
    vm.state.rip = vm.code();
    vm.state.rflags &= !IF;
    vm.state.gprs[RCX] = EOI.into();
    (vm.state.gprs[RAX], vm.state.gprs[RDX]) = (0, 0);
    vm.expect_halt(2)?;
    expect_status(&vm, 0x41, 0)?;
    expect("in service", in_page(&vm, apic::ISR, VECTOR)?, false)?;
    vm.state.rflags |= IF;
    vm.expect_handler(0x41)
}

fn eoi_exit() -> Verdict {
    let mut vm = with_apic(WRMSR)?;
    vm.set(Field(Field::EOI_EXIT_0.0 + 2), 1 << (VECTOR - 64))?;
    vm.state.rflags |= IF;
    post(&mut vm, VECTOR)?;
    vm.expect_handler(VECTOR)?;
    vm.state.rip = vm.code();
    vm.state.gprs[RCX] = EOI.into();
    (vm.state.gprs[RAX], vm.state.gprs[RDX]) = (0, 0);
    let exit = vm.expect_exit(ExitReason::VIRTUALIZED_EOI);
    vm.set(Field(Field::EOI_EXIT_0.0 + 2), 0)?;
    expect("vector", exit?.qualification, VECTOR.into())?;
    // The instruction is complete.
    expect("RIP", vm.state.rip, vm.code() + 2)?;
    expect_status(&vm, 0, 0)
}

fn self_ipi() -> Verdict {
    let mut vm = with_apic(WRMSR)?;
    vm.state.gprs[RCX] = SELF_IPI.into();
    (vm.state.gprs[RAX], vm.state.gprs[RDX]) = (VECTOR.into(), 0);
    vm.expect_halt(2)?;
    expect_status(&vm, VECTOR, 0)?;
    vm.restart();
    vm.state.interrupt_status = VECTOR.into();
    vm.state.rflags |= IF;
    vm.expect_handler(VECTOR)
}

fn registers() -> Verdict {
    let mut vm = with_apic(RDMSR)?;
    // The identifier is at 0x20.
    memory::write(vm.virtual_apic() + 0x20, 0x7_0000_0003)?;
    vm.state.gprs[RCX] = 0x802;
    vm.expect_halt(2)?;
    expect(
        "identifier",
        (vm.state.gprs[RAX], vm.state.gprs[RDX]),
        (3, 7),
    )
}

fn icr() -> Verdict {
    let mut vm = with_apic(WRMSR)?;
    vm.exit_msr(0x830, false)?;
    vm.state.gprs[RCX] = 0x830;
    let verdict = vm.expect_exit(ExitReason::WRMSR);
    vm.exit_msr(0x830, true)?;
    verdict.map(|_| ())
}

fn threshold() -> Verdict {
    let mut vm = with_apic(WRMSR)?;
    vm.open_secondary(SecondaryControls::VIRTUALIZE_X2APIC)?;
    vm.set(Field::TPR_THRESHOLD, 4)?;
    memory::write(vm.virtual_apic() + apic::TPR, 0x80)?;
    vm.state.gprs[RCX] = TPR.into();
    (vm.state.gprs[RAX], vm.state.gprs[RDX]) = (0x40, 0);
    vm.expect_halt(2)?;
    vm.restart();
    vm.state.gprs[RAX] = 0x3F;
    vm.expect_exit(ExitReason::TPR_BELOW_THRESHOLD)?;
    expect("RIP", vm.state.rip, vm.code() + 2)
}

fn off() -> Verdict {
    let mut vm = Vm::of(HLT)?;
    vm.state.rflags |= IF;
    post(&mut vm, VECTOR)?;
    vm.expect_halt(0)?;
    expect_status(&vm, VECTOR, 0)
}

/// Interrupts of L1's come while the VM is entered with one of its own waiting: QEMU forgot two in 300,000,
/// on two cores (docs/machine.md).
fn none_lost() -> Verdict {
    const ROUNDS: u64 = 30_000;
    const PHYSICAL: u64 = 0x31;
    // MOV CR8, RAX; DEC ECX; JNZ back; HLT: the machine enters the VM anew behind each MOV.
    let mut vm = with_apic(&[0x44, 0x0F, 0x22, 0xC0, 0xFF, 0xC9, 0x75, 0xF8, 0xF4])?;
    post(&mut vm, VECTOR)?;
    let _ = trap::interrupts();
    for round in 0..ROUNDS {
        // Each a little later than the last, so that all places of an entry have their turn.
        tdcall::start_timer(PHYSICAL, 500 + round % 400)?;
        loop {
            vm.state.rip = vm.code();
            (vm.state.gprs[RCX], vm.state.gprs[RAX]) = (100, 0);
            match vm.run_or_wait()? {
                Some(exit) if exit.status == Status::SUCCESS => {
                    expect("reason", exit.reason, ExitReason::HLT)?;
                }
                _ => break,
            }
        }
        insn::open_interrupts();
        expect("taken", trap::interrupts(), 1 << (PHYSICAL - 32))?;
    }
    Ok(())
}
