//! TDCALL and what L1 of a trust domain does with it all the time.

use core::arch::naked_asm;

use protocols::addr::{Gpa, PageSize};
use protocols::ghcb::event::IoWidth;
use protocols::tdx::vmcall::register::{
    COUNT, R8, R9, R10, R11, R12, R13, R14, R15, RAX, RCX, RDX,
};
use protocols::tdx::vmcall::{Direction, SubFunction};
use protocols::tdx::{Leaf, page_operand};

use crate::harness::{Finding, Verdict, expect};
use crate::trap::{self, Trap};

/// General registers, by number. RSP is neither loaded nor stored.
pub type Registers = [u64; COUNT];

/// Loads all registers but RSP from RDI, executes TDCALL, stores them there.
#[unsafe(naked)]
extern "C" fn execute(registers: *mut Registers) {
    naked_asm!(
        "push rbx; push rbp; push r12; push r13; push r14; push r15; push rdi",
        "mov rax, [rdi]; mov rcx, [rdi + 8]; mov rdx, [rdi + 16]; mov rbx, [rdi + 24]",
        "mov rbp, [rdi + 40]; mov rsi, [rdi + 48]",
        "mov r8, [rdi + 64]; mov r9, [rdi + 72]; mov r10, [rdi + 80]; mov r11, [rdi + 88]",
        "mov r12, [rdi + 96]; mov r13, [rdi + 104]; mov r14, [rdi + 112]; mov r15, [rdi + 120]",
        "mov rdi, [rdi + 56]",
        "2:",
        ".byte 0x66, 0x0F, 0x01, 0xCC",
        "3:",
        ".pushsection .fixups, \"a\"",
        ".balign 8",
        ".quad 2b, 3b",
        ".popsection",
        "push rdi",
        "mov rdi, [rsp + 8]",
        "mov [rdi], rax; mov [rdi + 8], rcx; mov [rdi + 16], rdx; mov [rdi + 24], rbx",
        "mov [rdi + 40], rbp; mov [rdi + 48], rsi",
        "mov [rdi + 64], r8; mov [rdi + 72], r9; mov [rdi + 80], r10; mov [rdi + 88], r11",
        "mov [rdi + 96], r12; mov [rdi + 104], r13; mov [rdi + 112], r14; mov [rdi + 120], r15",
        "pop rax",
        "mov [rdi + 56], rax",
        "pop rdi; pop r15; pop r14; pop r13; pop r12; pop rbp; pop rbx",
        "ret",
    )
}

/// TDCALL with these registers; the registers afterwards.
///
/// # Errors
///
/// The exception it raised.
pub fn tdcall(registers: Registers) -> Result<Registers, Trap> {
    let mut registers = registers;
    execute(&raw mut registers);
    trap::result(registers)
}

/// Registers with values in some and a mark in the others.
#[must_use]
pub fn registers(values: &[(usize, u64)]) -> Registers {
    let mut registers = [MARK; COUNT];
    for &(number, value) in values {
        if let Some(register) = registers.get_mut(number) {
            *register = value;
        }
    }
    registers
}

/// What [`registers`] puts where nothing else is.
pub const MARK: u64 = 0x5A5A_5A5A_5A5A_5A5A;

/// A leaf that must not raise an exception.
///
/// # Errors
///
/// A finding with the exception.
pub fn call(leaf: Leaf, operands: &[(usize, u64)]) -> Result<Registers, Finding> {
    call_rax(u64::from(leaf.0), operands)
}

/// The same with all of RAX.
///
/// # Errors
///
/// A finding with the exception.
pub fn call_rax(rax: u64, operands: &[(usize, u64)]) -> Result<Registers, Finding> {
    let mut all = registers(operands);
    all[RAX] = rax;
    tdcall(all).map_err(|trap| Finding::new(format_args!("TDCALL {rax:#x}: {trap:x?}")))
}

/// TDG.MEM.PAGE.ACCEPT; RAX.
///
/// # Errors
///
/// A finding with the exception it raised.
pub fn accept(gpa: Gpa, size: PageSize) -> Result<u64, Finding> {
    Ok(call(Leaf::MEM_PAGE_ACCEPT, &[(RCX, page_operand(gpa, size))])?[RAX])
}

/// Demands that TDG.MEM.PAGE.ACCEPT ends with RAX = `want`.
///
/// # Errors
///
/// A finding when it does not.
pub fn expect_accept(gpa: Gpa, size: PageSize, want: u64) -> Verdict {
    expect("RAX of ACCEPT", accept(gpa, size)?, want)
}

/// TDG.MEM.PAGE.ATTR.RD: RAX, RCX, RDX.
///
/// # Errors
///
/// A finding with the exception it raised.
pub fn read_attributes(rcx: u64) -> Result<(u64, u64, u64), Finding> {
    let after = call(Leaf::MEM_PAGE_ATTR_RD, &[(RCX, rcx)])?;
    Ok((after[RAX], after[RCX], after[RDX]))
}

/// TDG.MEM.PAGE.ATTR.WR: RAX, RCX, RDX.
///
/// # Errors
///
/// A finding with the exception it raised.
pub fn write_attributes(rcx: u64, attributes: u64, mask: u64) -> Result<(u64, u64, u64), Finding> {
    let operands = [(RCX, rcx), (RDX, attributes), (R8, mask)];
    let after = call(Leaf::MEM_PAGE_ATTR_WR, &operands)?;
    Ok((after[RAX], after[RCX], after[RDX]))
}

/// TDG.VP.VEINFO.GET: RAX, then reason, qualification, linear and physical address, instruction.
///
/// # Errors
///
/// A finding with the exception it raised.
pub fn ve_info() -> Result<(u64, [u64; 5]), Finding> {
    let after = call(Leaf::VP_VEINFO_GET, &[])?;
    let info = [RCX, RDX, R8, R9, R10].map(|number| after[number]);
    Ok((after[RAX], info))
}

/// The registers that requests to the host pass: all that may be.
pub const PASSED: u64 = 0xFFEC;

/// TDG.VP.VMCALL that the module must take; the registers afterwards.
///
/// # Errors
///
/// A finding with the exception it raised, or with the module's status.
pub fn ask_host(function: SubFunction, operands: &[(usize, u64)]) -> Result<Registers, Finding> {
    let mut all = registers(operands);
    all[RAX] = 0;
    (all[RCX], all[R10], all[R11]) = (PASSED, 0, function.0);
    let after = tdcall(all)
        .map_err(|trap| Finding::new(format_args!("VP.VMCALL {function:?}: {trap:x?}")))?;
    expect("RAX of VP.VMCALL", after[RAX], 0)?;
    Ok(after)
}

/// MapGPA of `bytes` from `start`: R10 and R11.
///
/// # Errors
///
/// A finding when the module does not take it.
pub fn map_gpa(start: u64, bytes: u64) -> Result<(u64, u64), Finding> {
    let after = ask_host(SubFunction::MAP_GPA, &[(R12, start), (R13, bytes)])?;
    Ok((after[R10], after[R11]))
}

/// OUT by the host. Nothing can be done where it fails.
pub fn port_out(port: u16, width: IoWidth, value: u32) {
    let bytes = match width {
        IoWidth::Byte => 1,
        IoWidth::Word => 2,
        IoWidth::Dword => 4,
    };
    let operands = [
        (R12, bytes),
        (R13, Direction::WRITE.0),
        (R14, u64::from(port)),
        (R15, u64::from(value)),
    ];
    let _ = ask_host(SubFunction::IO, &operands);
}

/// Halts for ever, as a processor that has nothing to do.
pub fn sleep() -> ! {
    loop {
        // With interrupts off nothing but an NMI could end it.
        let _ = ask_host(SubFunction::HLT, &[(R12, 1)]);
    }
}

/// RDMSR by the host: R10 and R11.
///
/// # Errors
///
/// A finding when the module does not take it.
pub fn host_rdmsr(number: u64) -> Result<(u64, u64), Finding> {
    let after = ask_host(SubFunction::RDMSR, &[(R12, number)])?;
    Ok((after[R10], after[R11]))
}

/// WRMSR by the host: R10.
///
/// # Errors
///
/// A finding when the module does not take it.
pub fn host_wrmsr(number: u64, value: u64) -> Result<u64, Finding> {
    Ok(ask_host(SubFunction::WRMSR, &[(R12, number), (R13, value)])?[R10])
}

/// x2APIC: the timer's divider.
pub const TIMER_DIVIDER: u64 = 0x83E;
/// x2APIC: the timer's entry of the local vector table.
const TIMER_LVT: u64 = 0x832;
/// x2APIC: the timer's initial count.
const TIMER_COUNT: u64 = 0x838;
/// Bit of the entry: it sends nothing.
pub const TIMER_MASKED: u64 = 1 << 16;
/// It begins anew each time it has come to its end.
pub const TIMER_PERIODIC: u64 = 1 << 17;

/// Starts the timer of this processor's APIC: `count` cycles of its clock, and what the entry of the local
/// vector table says. None is the end of it.
///
/// # Errors
///
/// A finding when the host does not do it.
pub fn start_timer(entry: u64, count: u64) -> Verdict {
    // Divided by one.
    for (register, value) in [
        (TIMER_DIVIDER, 0xB),
        (TIMER_LVT, entry),
        (TIMER_COUNT, count),
    ] {
        expect("timer", host_wrmsr(register, value)?, 0)?;
    }
    Ok(())
}

/// TDG.VM.RD: RAX and R8.
///
/// # Errors
///
/// A finding with the exception it raised.
pub fn vm_rd(field: u64) -> Result<(u64, u64), Finding> {
    let after = call(Leaf::VM_RD, &[(RCX, 0), (RDX, field)])?;
    Ok((after[RAX], after[R8]))
}

/// TDG.VM.WR: RAX and R8.
///
/// # Errors
///
/// A finding with the exception it raised.
pub fn vm_wr(field: u64, value: u64, mask: u64) -> Result<(u64, u64), Finding> {
    let operands = [(RCX, 0), (RDX, field), (R8, value), (R9, mask)];
    let after = call(Leaf::VM_WR, &operands)?;
    Ok((after[RAX], after[R8]))
}
