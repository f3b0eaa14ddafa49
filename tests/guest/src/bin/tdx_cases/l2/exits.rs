//! Which exits of an L2 VM go where, and what they tell.

use guest::harness::{Case, Finding, Verdict, case, expect};
use guest::memory;
use protocols::tdx::Status;
use protocols::tdx::l2::Exit;
use protocols::tdx::metadata::L2Controls;
use protocols::tdx::ve::ExitReason;
use protocols::tdx::vmcall::register::{
    R8, R10, R11, R12, R13, R14, R15, RAX, RBX, RCX, RDI, RDX, RSI, RSP,
};
use protocols::tdx::vmcall::{Direction, SubFunction};
use protocols::tdx::vmcs::{Field, PrimaryControls};

use super::vm::{HLT, LOAD, RDMSR, TDCALL, Vm, WRMSR};

pub const CASES: &[Case] = &[
    case("l2_cpuid", "tdx.md §7 routing: CPUID", cpuid),
    case("l2_out", "tdx.md §7 routing: IO", out),
    case("l2_in_with_immediate_port", "tdx.md §7 routing: IO", input),
    case("l2_outs", "tdx.md §7 routing: IO", string),
    case(
        "l2_rdmsr",
        "tdx.md §6 MSR bitmaps, initially all ones",
        rdmsr,
    ),
    case(
        "l2_wrmsr",
        "tdx.md §6 MSR bitmaps, initially all ones",
        wrmsr,
    ),
    case("l2_msr_native", "tdx.md §6 MSR bitmaps", native),
    case(
        "l2_msr_that_l1_has_not",
        "docs/machine.md, TDX: MSRs of L2",
        not_l1s,
    ),
    case("l2_efer", "docs/machine.md, TDX: MSRs of L2", efer),
    case("l2_vmcall", "tdx.md §7 routing: VMCALL", vmcall),
    case("l2_wbinvd", "tdx.md §7 routing: WBINVD", wbinvd),
    case("l2_mwait", "tdx.md §7 routing: MWAIT", mwait),
    case("l2_xsetbv", "tdx.md §7 routing: XSETBV", xsetbv),
    case(
        "l2_rdtsc",
        "tdx.md §7 routing: RDTSC, if intercepted",
        rdtsc,
    ),
    case("l2_debug_register", "tdx.md §7 routing: CR/DR", debug),
    case("l2_cr0_of_l1", "tdx.md §7 guest-host masks", cr0),
    case("l2_cr4_of_l1", "tdx.md §7 guest-host masks", cr4),
    case("l2_cr_shadow", "tdx.md §7 guest-host masks", shadow),
    case("l2_cr_native", "tdx.md §7 guest-host masks", cr_native),
    case(
        "l2_goes_on_a_thousand_times",
        "docs/machine.md, TDX: hostile=early-return",
        thousand,
    ),
    case("l2_cr_impossible", "docs/machine.md, TDX: CR0, CR4", cr_gp),
    case("l2_tdcall", "tdx.md §7 routing: TDCALL", tdcall),
    case(
        "l2_vmcall_of_tdcall",
        "tdx.md §7 routing: TDCALL leaf 0",
        tdvmcall,
    ),
    case(
        "l2_tdvmcall_to_the_host",
        "tdx.md §7 ENABLE_TDVMCALL",
        to_host,
    ),
    case(
        "l2_halts_by_the_host",
        "docs/machine.md, TDX: ENABLE_TDVMCALL",
        halts_by_host,
    ),
    case(
        "l2_undefined",
        "docs/machine.md, TDX: exceptions of L2",
        undefined,
    ),
    case(
        "l2_exception_bitmap",
        "docs/machine.md, TDX: exceptions of L2",
        bitmap,
    ),
    case(
        "l2_page_fault_to_l1",
        "docs/machine.md, TDX: exceptions of L2",
        page_fault,
    ),
    case("l2_triple_fault", "tdx.md §7 routing: triple fault", triple),
    case("l2_exit_in_delivery", "tdx.md §7 R10", in_delivery),
    case(
        "l2_interrupt_window",
        "docs/machine.md, TDX: interrupt window",
        window,
    ),
];

/// Runs code that must exit for this reason, having done nothing.
fn expect_reason(code: &[u8], reason: ExitReason, length: u64) -> Result<Exit, Finding> {
    let mut vm = Vm::of(code)?;
    let exit = vm.expect_exit(reason)?;
    expect("length", exit.instruction >> 32, length)?;
    expect("RIP", vm.state.rip, vm.code())?;
    Ok(exit)
}

fn cpuid() -> Verdict {
    expect_reason(&[0x0F, 0xA2], ExitReason::CPUID, 2).map(|_| ())
}

fn out() -> Verdict {
    let mut vm = Vm::of(&[0xEE])?;
    vm.state.gprs[RDX] = 0x3F8;
    let exit = vm.expect_exit(ExitReason::IO)?;
    let wanted = (0x3F8_0000, 1 << 32);
    expect(
        "qualification, length",
        (exit.qualification, exit.instruction),
        wanted,
    )
}

fn input() -> Verdict {
    // IN AL, 71h.
    let exit = expect_reason(&[0xE4, 0x71], ExitReason::IO, 2)?;
    expect(
        "qualification",
        exit.qualification,
        0x71_0000 | 1 << 3 | 1 << 6,
    )
}

fn string() -> Verdict {
    // REP OUTSB.
    let mut vm = Vm::of(&[0xF3, 0x6E])?;
    vm.state.gprs[RDX] = 0x402;
    vm.state.gprs[RCX] = 3;
    vm.state.gprs[RSI] = vm.stack() - 8;
    let exit = vm.expect_exit(ExitReason::IO)?;
    expect("qualification", exit.qualification, 0x402_0000 | 3 << 4)?;
    expect("linear address", exit.gla, vm.stack() - 8)
}

fn rdmsr() -> Verdict {
    for number in [0x10, 0x277, 0x802, 0xC000_0080, 0x4000_0000] {
        let mut vm = Vm::of(RDMSR)?;
        vm.state.gprs[RCX] = number;
        let exit = vm.expect_exit(ExitReason::RDMSR)?;
        expect("length", exit.instruction, 2 << 32)?;
        expect("RIP", vm.state.rip, vm.code())?;
    }
    Ok(())
}

fn wrmsr() -> Verdict {
    for number in [0x277, 0x830, 0xC000_0102] {
        let mut vm = Vm::of(WRMSR)?;
        vm.state.gprs[RCX] = number;
        vm.expect_exit(ExitReason::WRMSR)?;
        expect("RIP", vm.state.rip, vm.code())?;
    }
    Ok(())
}

fn native() -> Verdict {
    const GS_BASE: u64 = 0xC000_0101;
    let mut vm = Vm::of(WRMSR)?;
    vm.exit_msr(GS_BASE as u32, false)?;
    (vm.state.gprs[RCX], vm.state.gprs[RAX]) = (GS_BASE, 0x5678);
    let verdict = vm.expect_halt(2);
    vm.exit_msr(GS_BASE as u32, true)?;
    verdict?;
    const GS: u32 = 5;
    expect(
        "base of GS",
        vm.get(Field(Field::ES_BASE.0 + 2 * GS))?,
        0x5678,
    )
}

fn not_l1s() -> Verdict {
    // The x2APIC's identifier is the host's to tell.
    let mut vm = Vm::of(RDMSR)?;
    vm.exit_msr(0x802, false)?;
    vm.state.gprs[RCX] = 0x802;
    vm.expect_exit(ExitReason::RDMSR)?;
    // Writing the time stamp counter is nobody's.
    vm.load(WRMSR)?;
    vm.exit_msr(0x10, false)?;
    vm.state.gprs[RCX] = 0x10;
    vm.expect_exit(ExitReason::WRMSR).map(|_| ())
}

fn efer() -> Verdict {
    let mut vm = Vm::of(RDMSR)?;
    vm.exit_msr(0xC000_0080, false)?;
    vm.state.gprs[RCX] = 0xC000_0080;
    vm.expect_halt(2)?;
    expect("EFER", vm.state.gprs[RAX], 0xD01)?;
    // No bit that this processor does not have.
    vm.load(WRMSR)?;
    (vm.state.gprs[RAX], vm.state.gprs[RDX]) = (0x1D01, 0);
    vm.expect_handler(13)
}

fn vmcall() -> Verdict {
    expect_reason(&[0x0F, 0x01, 0xC1], ExitReason::VMCALL, 3).map(|_| ())
}

fn wbinvd() -> Verdict {
    expect_reason(&[0x0F, 0x09], ExitReason::WBINVD, 2)?;
    expect_reason(&[0x0F, 0x08], ExitReason::INVD, 2).map(|_| ())
}

fn mwait() -> Verdict {
    expect_reason(&[0x0F, 0x01, 0xC8], ExitReason::MONITOR, 3)?;
    expect_reason(&[0x0F, 0x01, 0xC9], ExitReason::MWAIT, 3).map(|_| ())
}

fn xsetbv() -> Verdict {
    expect_reason(&[0x0F, 0x01, 0xD1], ExitReason::XSETBV, 3).map(|_| ())
}

fn rdtsc() -> Verdict {
    // RDTSC; HLT.
    let mut vm = Vm::of(&[0x0F, 0x31, 0xF4])?;
    vm.expect_halt(2)?;
    vm.open_primary(PrimaryControls::RDTSC.bits())?;
    vm.restart();
    let exit = vm.expect_exit(ExitReason::RDTSC)?;
    expect("length", exit.instruction, 2 << 32)
}

fn debug() -> Verdict {
    // MOV DR7, RBX; HLT. MOV RCX, DR6; HLT.
    let mut vm = Vm::of(&[0x0F, 0x23, 0xFB, 0xF4, 0x0F, 0x21, 0xF1, 0xF4])?;
    vm.state.gprs[RBX] = 0x400;
    vm.expect_halt(3)?;
    vm.open_primary(PrimaryControls::MOV_DR.bits())?;
    vm.restart();
    let exit = vm.expect_exit(ExitReason::DR_ACCESS)?;
    expect("qualification", exit.qualification, 7 | 3 << 8)?;
    vm.state.rip = vm.code() + 4;
    let exit = vm.expect_exit(ExitReason::DR_ACCESS)?;
    expect("qualification", exit.qualification, 6 | 1 << 4 | 1 << 8)
}

/// MOV CR0, RBX; HLT.
const MOV_CR0: &[u8] = &[0x0F, 0x22, 0xC3, 0xF4];
/// MOV CR4, RBX; HLT.
const MOV_CR4: &[u8] = &[0x0F, 0x22, 0xE3, 0xF4];

fn cr0() -> Verdict {
    // NE is L1's, and the VM takes it for set.
    let mut vm = Vm::of(MOV_CR0)?;
    vm.state.gprs[RBX] = 0x8000_0013;
    let exit = vm.expect_exit(ExitReason::CR_ACCESS)?;
    let wanted = (3 << 8, 3 << 32);
    expect(
        "qualification, length",
        (exit.qualification, exit.instruction),
        wanted,
    )?;
    expect("CR0", vm.get(Field::CR0)?, 0x8000_0033)
}

fn cr4() -> Verdict {
    let mut vm = Vm::of(MOV_CR4)?;
    vm.state.gprs[RBX] = 0x2620;
    let exit = vm.expect_exit(ExitReason::CR_ACCESS)?;
    expect("qualification", exit.qualification, 4 | 3 << 8)
}

fn shadow() -> Verdict {
    // MOV RAX, CR0; MOV RCX, CR4; MOV RDX, CR3; HLT.
    let code = [0x0F, 0x20, 0xC0, 0x0F, 0x20, 0xE1, 0x0F, 0x20, 0xDA, 0xF4];
    let mut vm = Vm::of(&code)?;
    vm.set(Field::CR0_MASK, 0x28)?;
    vm.set(Field::CR0_SHADOW, 0x08)?;
    vm.set(Field::CR4_MASK, 0x2004)?;
    vm.set(Field::CR4_SHADOW, 0x04)?;
    vm.expect_halt(9)?;
    let seen = [RAX, RCX, RDX].map(|number| vm.state.gprs[number]);
    expect("CR0, CR4, CR3", seen, [0x8000_001B, 0x624, vm.root()])
}

fn cr_native() -> Verdict {
    // MOV CR4, RBX; MOV RAX, CR4; HLT: global pages on.
    let mut vm = Vm::of(&[0x0F, 0x22, 0xE3, 0x0F, 0x20, 0xE0, 0xF4])?;
    vm.state.gprs[RBX] = 0x6A0;
    vm.expect_halt(6)?;
    expect("in L2", vm.state.gprs[RAX], 0x6A0)?;
    expect("VMCS", vm.get(Field::CR4)?, 0x26A0)?;
    // PCIDE, which CPUID does not show: nothing happens (docs/machine.md).
    vm.load(&[0x0F, 0x22, 0xE3, 0x0F, 0x20, 0xE0, 0xF4])?;
    vm.state.gprs[RBX] = 0x2_0620;
    vm.expect_halt(6)?;
    expect("PCIDE", vm.state.gprs[RAX], 0x620)?;
    // Write protection off.
    vm.load(MOV_CR0)?;
    vm.state.gprs[RBX] = 0x8000_0031;
    vm.expect_halt(3)?;
    expect("CR0", vm.get(Field::CR0)? & 0x8001_0022, 0x8000_0020)
}

/// Exits that are nobody's but the machine's, for a host that makes something of them.
fn thousand() -> Verdict {
    // MOV CR4, RBX; DEC ECX; JNZ back; HLT.
    let mut vm = Vm::of(&[0x0F, 0x22, 0xE3, 0xFF, 0xC9, 0x75, 0xF9, 0xF4])?;
    (vm.state.gprs[RBX], vm.state.gprs[RCX]) = (0x620, 1000);
    vm.expect_halt(7)?;
    expect("turns left", vm.state.gprs[RCX], 0)
}

fn cr_gp() -> Verdict {
    let mut vm = Vm::of(MOV_CR4)?;
    // Paging without PAE in long mode.
    vm.state.gprs[RBX] = 0x600;
    vm.expect_handler(13)?;
    vm.load(MOV_CR0)?;
    // Paging without protection.
    vm.state.gprs[RBX] = 0x8000_0020;
    vm.expect_handler(13)
}

fn tdcall() -> Verdict {
    for leaf in [1, 3, 6, 7, 25, 0xFFFF] {
        let mut vm = Vm::of(TDCALL)?;
        (vm.state.gprs[RAX], vm.state.gprs[RCX], vm.state.gprs[R8]) = (leaf, 0x1234, 0x5678);
        let exit = vm.expect_exit(ExitReason::TDCALL)?;
        expect("length", exit.instruction, 4 << 32)?;
        let seen = [RAX, RCX, R8].map(|number| vm.state.gprs[number]);
        expect("registers", seen, [leaf, 0x1234, 0x5678])?;
        expect("RIP", vm.state.rip, vm.code())?;
    }
    Ok(())
}

/// Registers for an OUT by the host, to a port that nobody listens at.
fn ask_for_out(vm: &mut Vm) {
    vm.state.gprs[RAX] = 0;
    vm.state.gprs[RCX] = 0xFC00;
    vm.state.gprs[R10] = 0;
    vm.state.gprs[R11] = SubFunction::IO.0;
    (vm.state.gprs[R12], vm.state.gprs[R13]) = (1, Direction::WRITE.0);
    (vm.state.gprs[R14], vm.state.gprs[R15]) = (0x80, 0x11);
}

fn tdvmcall() -> Verdict {
    let mut vm = Vm::of(TDCALL)?;
    ask_for_out(&mut vm);
    vm.expect_exit(ExitReason::TDCALL).map(|_| ())
}

fn to_host() -> Verdict {
    let mut vm = Vm::of(TDCALL)?;
    vm.control(L2Controls::ENABLE_TDVMCALL)?;
    ask_for_out(&mut vm);
    vm.state.gprs[RDI] = 0xD1;
    vm.expect_halt(4)?;
    let seen = [RAX, R10, RDI].map(|number| vm.state.gprs[number]);
    expect("RAX, R10, RDI", seen, [0, 0, 0xD1])?;
    // All other leaves are L1's as ever.
    vm.restart();
    vm.state.gprs[RAX] = 6;
    vm.expect_exit(ExitReason::TDCALL).map(|_| ())
}

fn halts_by_host() -> Verdict {
    let mut vm = Vm::of(TDCALL)?;
    vm.control(L2Controls::ENABLE_TDVMCALL)?;
    ask_for_out(&mut vm);
    vm.state.gprs[R11] = SubFunction::HLT.0;
    let exit = vm.run()?;
    let wanted = (Status::L2_EXIT_HOST_ROUTED_TDVMCALL, ExitReason::TDCALL);
    expect("why", (exit.status, exit.reason), wanted)?;
    expect("RIP", vm.state.rip, vm.code() + 4)
}

fn undefined() -> Verdict {
    // UD2 is the VM's own affair, and so is what only other processors have.
    for code in [
        &[0x0F, 0x0B][..],
        &[0xF2, 0x0F, 0x01, 0xFF],
        &[0x0F, 0x01, 0xD8],
        &[0x66, 0x0F, 0x01, 0xCF],
    ] {
        let mut vm = Vm::of(code)?;
        vm.expect_handler(6)?;
        expect(
            "RIP on the stack",
            memory::read(vm.state.gprs[RSP])?,
            vm.code(),
        )?;
    }
    Ok(())
}

fn bitmap() -> Verdict {
    let mut vm = Vm::of(&[0x0F, 0x0B])?;
    vm.set(Field::EXCEPTION_BITMAP, 1 << 6 | 1 << 13)?;
    let exit = vm.expect_exit(ExitReason::EXCEPTION_OR_NMI)?;
    expect("#UD", exit.interruption, 0x8000_0306)?;
    expect("RIP", vm.state.rip, vm.code())?;
    // MOV CR3, RBX with reserved bits.
    vm.load(&[0x0F, 0x22, 0xDB])?;
    vm.state.gprs[RBX] = 1 << 60;
    vm.set(Field::EXCEPTION_BITMAP, 1 << 6)?;
    vm.expect_handler(13)
}

/// An address that the VM's tables do not map.
const NOWHERE: u64 = 0x40_0000_0000;

fn page_fault() -> Verdict {
    let mut vm = Vm::of(LOAD)?;
    vm.state.gprs[RBX] = NOWHERE;
    vm.expect_handler(14)?;
    vm.restart();
    vm.set(Field::EXCEPTION_BITMAP, 1 << 14)?;
    let exit = vm.expect_exit(ExitReason::EXCEPTION_OR_NMI)?;
    expect("#PF", exit.interruption, 0x8000_0B0E)?;
    expect("address", exit.qualification, NOWHERE)?;
    // Only writes: error code bit 1.
    vm.set(Field::PAGE_FAULT_MASK, 2)?;
    vm.set(Field::PAGE_FAULT_MATCH, 2)?;
    vm.restart();
    vm.expect_handler(14)
}

fn triple() -> Verdict {
    let mut vm = Vm::of(&[0x0F, 0x0B])?;
    vm.set(Field::IDTR_LIMIT, 0)?;
    vm.expect_exit(ExitReason::TRIPLE_FAULT)?;
    // L1 is alive, and so is the VM when it is made anew.
    vm.set(Field::IDTR_LIMIT, 4095)?;
    vm.load(HLT)?;
    vm.expect_halt(0)
}

fn in_delivery() -> Verdict {
    // INT 80h with a stack that L1 has not given.
    let mut vm = Vm::of(&[0xCD, 0x80])?;
    vm.state.gprs[RSP] = vm.kept() + 0x800;
    let exit = vm.expect_exit(ExitReason::EPT_VIOLATION)?;
    expect("what was delivered", exit.idt_vectoring, 0x8000_0480)?;
    expect("page", exit.gpa & !0xFFF, vm.kept())?;
    expect("RIP", vm.state.rip, vm.code())
}

fn window() -> Verdict {
    let mut vm = Vm::of(super::vm::STI)?;
    vm.open_primary(PrimaryControls::INTERRUPT_WINDOW.bits())?;
    vm.expect_exit(ExitReason::INTERRUPT_WINDOW)?;
    // Behind STI there is one instruction more.
    expect("RIP", vm.state.rip, vm.code() + 2)?;
    vm.open_primary(0)?;
    vm.expect_halt(3)
}
