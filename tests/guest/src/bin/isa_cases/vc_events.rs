//! Events whose delivery itself ends in #VC: their stack is not validated.

use guest::harness::{Case, Finding, Verdict, case, expect};
use guest::trap::{GENERAL_PROTECTION, INVALID_OPCODE, VMM_COMMUNICATION};
use protocols::addr::PAGE_SIZE;
use protocols::exit_code::ExitCode;
use protocols::ghcb::event::MSR_WRITE;
use protocols::ghcb::page::Field;

use crate::modes::{Block, INTERRUPT, Mode, Stop, block, give_page, place};
use crate::setup::{RESCIND, expect_pvalidate, expect_rmpadjust, ghcb_page};
use guest::ghcb::Reply;
use guest::insn::{Pvalidated, SIZE_4K, attributes};

/// The table.
pub const CASES: &[Case] = &[
    case(
        "interrupt_behind_vc_is_not_lost",
        "APM 15.20, docs/machine.md",
        interrupt,
    ),
    case(
        "interrupt_behind_vc_waits_for_if",
        "APM 15.20, docs/machine.md",
        interrupt_waits,
    ),
    case("exception_behind_vc_repeats", "APM 8.2.9", exception),
    case(
        "contributory_behind_vc_is_a_double_fault",
        "APM 8.2.9",
        double_fault,
    ),
    case("single_step_is_vc", "snp-isa.md §15 (0x41)", single_step),
    case("hlt_is_no_vc", "snp-isa.md §15 (AE)", hlt),
];

/// RFLAGS.IF.
const IF: u64 = 1 << 9;
/// RFLAGS.TF.
const TF: u64 = 1 << 8;

/// x2APIC registers (APM 16.11).
mod x2apic {
    pub const EOI: u64 = 0x80B;
    pub const SPURIOUS: u64 = 0x80F;
    pub const SELF_IPI: u64 = 0x83F;
    /// The APIC is on, spurious vector 0xFF.
    pub const ON: u64 = 0x1FF;
}

fn write_msr(register: u64, value: u64) -> Verdict {
    let fields = [(Field::RCX, register), (Field::RAX, value), (Field::RDX, 0)];
    let reply = ghcb_page().call(ExitCode::MSR, [MSR_WRITE, 0], &fields);
    expect("reply to WRMSR", reply, Reply::DONE)
}

/// Makes an interrupt pend for the next level that has interrupts on.
fn raise() -> Verdict {
    write_msr(x2apic::SPURIOUS, x2apic::ON)?;
    write_msr(x2apic::SELF_IPI, INTERRUPT)
}

/// JMP to itself.
const LOOP: [u8; 2] = [0xEB, 0xFE];

/// The page of IST1's stack, valid or not.
fn give_stack(block: &Block) -> Verdict {
    give_page(block.at(place::IST1_TOP) - PAGE_SIZE)
}

fn take_stack(block: &Block) -> Verdict {
    let page = block.at(place::IST1_TOP) - PAGE_SIZE;
    expect_rmpadjust(page, SIZE_4K, attributes(1, 0, false), 0)?;
    expect_pvalidate(page, SIZE_4K, RESCIND, Pvalidated::DONE)
}

/// #VC has its own good stack, all else the one that is not validated.
fn gates() -> Result<&'static Block, Finding> {
    let block = block()?;
    block.write_gates(Mode::Long, 2, 1)?;
    Ok(block)
}

/// The program was stopped by #VC 0x404 for a push onto the lost stack.
fn expect_lost_stack(block: &Block, stop: &Stop) -> Verdict {
    expect("vector", stop.vector, u64::from(VMM_COMMUNICATION))?;
    let [error, rip] = stop.frame(8)?;
    expect("error code", error, ExitCode::PAGE_NOT_VALIDATED.0)?;
    expect("RIP", rip, block.at(place::CODE))?;
    let page = block.at(place::IST1_TOP) - PAGE_SIZE;
    expect("page of CR2", stop.vmsa.cr2 & !0xFFF, page)
}

fn interrupt() -> Verdict {
    let block = gates()?;
    raise()?;
    let mut state = block.state(Mode::Long, 0);
    state.rflags |= IF;
    let stop = block.run(&state, &LOOP)?;
    expect_lost_stack(block, &stop)?;
    give_stack(block)?;
    // The handler returns, interrupts are on again.
    let stop = block.go_on()?;
    take_stack(block)?;
    write_msr(x2apic::EOI, 0)?;
    expect("vector", stop.vector, INTERRUPT)
}

/// CLI where the handler of #VC returns to: the interrupt is held until STI.
fn interrupt_waits() -> Verdict {
    let block = gates()?;
    raise()?;
    let mut state = block.state(Mode::Long, 0);
    state.rflags |= IF;
    let stop = block.run(&state, &LOOP)?;
    expect_lost_stack(block, &stop)?;
    give_stack(block)?;
    // Clear IF in the flags that the handler returns to: then CPUID comes first, again as #VC,
    // and the interrupt only behind STI.
    let flags = stop.vmsa.rsp + 24;
    guest::memory::write(flags, 0x3002)?;
    block.write_code(&[0x0F, 0xA2, 0xFB, 0xEB, 0xFE])?;
    let stop = block.go_on()?;
    expect("vector", stop.vector, u64::from(VMM_COMMUNICATION))?;
    let [error, rip] = stop.frame(8)?;
    expect("error code", error, ExitCode::CPUID.0)?;
    // On behind CPUID.
    guest::memory::write(stop.vmsa.rsp + 8, rip + 2)?;
    let stop = block.go_on()?;
    take_stack(block)?;
    write_msr(x2apic::EOI, 0)?;
    expect("vector", stop.vector, INTERRUPT)
}

fn exception() -> Verdict {
    let block = gates()?;
    let state = block.state(Mode::Long, 0);
    // ud2
    let stop = block.run(&state, &[0x0F, 0x0B])?;
    expect_lost_stack(block, &stop)?;
    give_stack(block)?;
    let stop = block.go_on()?;
    take_stack(block)?;
    expect("vector", stop.vector, u64::from(INVALID_OPCODE))
}

fn double_fault() -> Verdict {
    const DOUBLE_FAULT: u64 = 8;
    let block = gates()?;
    block.set_ist(DOUBLE_FAULT, 2)?;
    let state = block.state(Mode::Long, 0);
    // mov ss, ax with a selector beyond the table: #GP
    let code = [0x66, 0xB8, 0xF8, 0xFF, 0x8E, 0xD0];
    let stop = block.run(&state, &code)?;
    expect("vector", stop.vector, DOUBLE_FAULT)?;
    // The same with a stack is #GP and nothing else.
    block.write_gates(Mode::Long, 2, 2)?;
    let stop = block.run(&state, &code)?;
    expect("vector", stop.vector, u64::from(GENERAL_PROTECTION))
}

fn single_step() -> Verdict {
    let block = block()?;
    block.write_gates(Mode::Long, 2, 2)?;
    let mut state = block.state(Mode::Long, 0);
    state.rflags |= TF;
    // nop
    let stop = block.run(&state, &[0x90, 0x90])?;
    let [error, rip] = stop.frame(8)?;
    expect(
        "vector, error code",
        (stop.vector, error),
        (u64::from(VMM_COMMUNICATION), ExitCode::EXCEPTION_DB.0),
    )?;
    expect("RIP behind the instruction", rip, state.rip + 1)?;
    expect("DR6.BS", stop.vmsa.dr6 >> 14 & 1, 1)
}

/// HLT is the host's: the program goes on with the interrupt, and no #VC comes in between.
fn hlt() -> Verdict {
    let block = block()?;
    block.write_gates(Mode::Long, 2, 2)?;
    raise()?;
    let state = block.state(Mode::Long, 0);
    // sti; hlt
    let stop = block.run(&state, &[0xFB, 0xF4, 0xEB, 0xFE])?;
    write_msr(x2apic::EOI, 0)?;
    expect("vector", stop.vector, INTERRUPT)?;
    let [rip] = stop.frame(8)?;
    expect("RIP behind HLT", rip, state.rip + 2)
}
