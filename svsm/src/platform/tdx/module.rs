//! TDCALL itself: one safe function for each leaf that the paravisor uses.
//!
//! The module does what the operands say with memory, so a leaf that writes memory is only called
//! through here with pages whose use the caller knows. None of these functions panics on what module
//! or host answer; a status comes back as a value.
#![expect(unsafe_code, reason = "the instruction")]

use core::arch::{asm, naked_asm};

use protocols::addr::Gpa;
use protocols::tdx::l2::{Exit, Flush, enter_operand};
use protocols::tdx::metadata::FieldId;
use protocols::tdx::ve::{ExitReason, VeInfo};
use protocols::tdx::vmcall::SubFunction;
use protocols::tdx::vmcall::register::COUNT;
use protocols::tdx::{L2Vm, Leaf, Status};

use super::{Operands, Outcome, Tdcall};

/// The TDX module below this processor.
#[derive(Clone, Copy, Debug)]
pub struct Module;

/// RCX of TDG.VP.VMCALL: R10 to R15 go to the host and come back.
const PASSED: u64 = 0xFC00;

impl Tdcall for Module {
    #[inline]
    fn tdcall(&self, leaf: Leaf, operands: Operands) -> Outcome {
        let mut outcome = Outcome::default();
        // SAFETY: the registers that leaves change are all named. What a leaf does to memory is
        // covered by the rule of this module.
        unsafe {
            asm!(
                ".byte 0x66, 0x0F, 0x01, 0xCC",
                inout("rax") u64::from(leaf.0) => outcome.rax,
                inout("rcx") operands.rcx => outcome.rcx,
                inout("rdx") operands.rdx => outcome.rdx,
                inout("r8") operands.r8 => outcome.r8,
                inout("r9") operands.r9 => outcome.r9,
                out("r10") outcome.r10,
                out("r11") _,
                options(nostack),
            );
        }
        outcome
    }
}

/// What a request to the host returns: R10 to R15.
pub type HostRegisters = [u64; 6];

/// TDG.VP.VMCALL with R10 to R15; those afterwards, or the module's status.
///
/// # Errors
///
/// The module did not pass the request on.
pub fn vmcall(registers: HostRegisters) -> Result<HostRegisters, Status> {
    let [mut r10, mut r11, mut r12, mut r13, mut r14, mut r15] = registers;
    let rax: u64;
    // SAFETY: the host sees and changes the named registers only. Memory that it writes is shared, or
    // becomes the host's by what was asked; nobody holds a reference to such.
    unsafe {
        asm!(
            ".byte 0x66, 0x0F, 0x01, 0xCC",
            inout("rax") u64::from(Leaf::VP_VMCALL.0) => rax,
            inout("rcx") PASSED => _,
            inout("r10") r10,
            inout("r11") r11,
            inout("r12") r12,
            inout("r13") r13,
            inout("r14") r14,
            inout("r15") r15,
            options(nostack),
        );
    }
    match Status::of(rax) {
        Status::SUCCESS => Ok([r10, r11, r12, r13, r14, r15]),
        status => Err(status),
    }
}

/// ReportFatalError with R12, R13 and a text of 64 bytes, in the order of
/// [`FATAL_ERROR_TEXT`](protocols::tdx::vmcall::FATAL_ERROR_TEXT). Returns if the host goes on all the same.
pub fn report_fatal_error([r12, r13]: [u64; 2], text: [u64; 8]) {
    /// RDX, RBX, RSI, RDI and R8 to R15 are passed.
    const ALL: u64 = 0xFFCC;
    const { assert!(Leaf::VP_VMCALL.0 == 0) };
    let [r14, r15, rbx, rdi, rsi, r8, r9, rdx] = text;
    // SAFETY: nothing comes back but registers, which are named; RBX, which the compiler keeps, is put
    // back from the stack.
    unsafe {
        asm!(
            "push rbx",
            "mov rbx, rax",
            "xor eax, eax",
            ".byte 0x66, 0x0F, 0x01, 0xCC",
            "pop rbx",
            inout("rax") rbx => _,
            inout("rcx") ALL => _,
            inout("rdx") rdx => _,
            inout("rsi") rsi => _,
            inout("rdi") rdi => _,
            inout("r8") r8 => _,
            inout("r9") r9 => _,
            inout("r10") 0_u64 => _,
            inout("r11") SubFunction::REPORT_FATAL_ERROR.0 => _,
            inout("r12") r12 => _,
            inout("r13") r13 => _,
            inout("r14") r14 => _,
            inout("r15") r15 => _,
        );
    }
}

/// What TDG.VP.INFO tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// Bits of a guest-physical address.
    pub gpa_width: u32,
    /// ATTRIBUTES.
    pub attributes: u64,
    /// Processors of the trust domain.
    pub vcpus: u32,
    /// At most so many.
    pub max_vcpus: u32,
    /// The number of this one.
    pub index: u32,
}

/// TDG.VP.INFO.
///
/// # Errors
///
/// The status.
pub fn info() -> Result<Info, Status> {
    let outcome = Module.tdcall(Leaf::VP_INFO, Operands::default());
    match Status::of(outcome.rax) {
        Status::SUCCESS => Ok(Info {
            gpa_width: outcome.rcx as u32 & 0x3F,
            attributes: outcome.rdx,
            vcpus: outcome.r8 as u32,
            max_vcpus: (outcome.r8 >> 32) as u32,
            index: outcome.r9 as u32,
        }),
        status => Err(status),
    }
}

/// TDG.VP.VEINFO.GET: why the last #VE was raised; none if there is none.
#[must_use]
pub fn take_ve() -> Option<VeInfo> {
    let outcome = Module.tdcall(Leaf::VP_VEINFO_GET, Operands::default());
    (Status::of(outcome.rax) == Status::SUCCESS).then_some(VeInfo {
        reason: ExitReason(outcome.rcx as u32),
        qualification: outcome.rdx,
        gla: outcome.r8,
        gpa: outcome.r9,
        instruction_length: outcome.r10 as u32,
        instruction_info: (outcome.r10 >> 32) as u32,
    })
}

/// TDG.VM.RD.
///
/// # Errors
///
/// The status.
pub fn read_vm(field: FieldId) -> Result<u64, Status> {
    read(Leaf::VM_RD, field)
}

/// TDG.SYS.RD.
///
/// # Errors
///
/// The status.
pub fn read_sys(field: FieldId) -> Result<u64, Status> {
    read(Leaf::SYS_RD, field)
}

/// TDG.VP.RD.
///
/// # Errors
///
/// The status.
pub fn read_vp(field: FieldId) -> Result<u64, Status> {
    read(Leaf::VP_RD, field)
}

fn read(leaf: Leaf, field: FieldId) -> Result<u64, Status> {
    let operands = Operands {
        rdx: field.0,
        ..Operands::default()
    };
    let outcome = Module.tdcall(leaf, operands);
    match Status::of(outcome.rax) {
        Status::SUCCESS => Ok(outcome.r8),
        status => Err(status),
    }
}

/// TDG.VP.WR of the bits in `mask`.
///
/// # Errors
///
/// The status.
#[inline(never)]
pub fn write_vp(field: FieldId, value: u64, mask: u64) -> Result<(), Status> {
    let operands = Operands {
        rcx: 0,
        rdx: field.0,
        r8: value,
        r9: mask,
    };
    match Status::of(Module.tdcall(Leaf::VP_WR, operands).rax) {
        Status::SUCCESS => Ok(()),
        status => Err(status),
    }
}

/// CPUID as L1 has it; none if it is the host's to answer (#VE).
#[must_use]
pub fn cpuid(leaf: u32, subleaf: u32) -> Option<[u32; 4]> {
    let (eax, ebx, ecx, edx): (u64, u64, u64, u64);
    let fault: u64;
    // SAFETY: CPUID changes four registers; RBX, which the compiler keeps, is put back. The landing
    // pad is behind the instruction and its result is the fault.
    unsafe {
        asm!(
            "mov rsi, rbx",
            "xor edi, edi",
            "2: cpuid",
            "jmp 4f",
            "3: mov rdi, rax",
            "4: xchg rsi, rbx",
            crate::exceptions::fixup::fixup!("2b", "3b"),
            // By name: a register that the compiler picks could be RBX.
            out("rsi") ebx,
            out("rdi") fault,
            inout("rax") u64::from(leaf) => eax,
            inout("rcx") u64::from(subleaf) => ecx,
            out("rdx") edx,
            options(nostack),
        );
    }
    (fault == 0).then_some([eax as u32, ebx as u32, ecx as u32, edx as u32])
}

/// TDG.VP.ENTER of `vm` with the state at `state`, which is written back.
///
/// # Safety
///
/// `state` is the address of an `l2::EnterState` in private memory that nobody else uses meanwhile.
#[must_use]
pub unsafe fn enter(vm: L2Vm, flush: Flush, state: Gpa) -> Exit {
    let mut registers = [0_u64; COUNT];
    // SAFETY: the registers are ours, the rest is the caller's promise.
    unsafe { execute_enter(&raw mut registers, enter_operand(vm, flush), state.get()) };
    Exit::load(&registers)
}

/// TDCALL with leaf 25, RCX = RSI and RDX = RDI's second and third argument; stores all registers but
/// RSP to the array in RDI. Those that a callee keeps are put back: the L2 VM's are in them.
#[unsafe(naked)]
unsafe extern "C" fn execute_enter(registers: *mut [u64; COUNT], rcx: u64, rdx: u64) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "push rdi",
        "mov rcx, rsi",
        "mov eax, {leaf}",
        ".byte 0x66, 0x0F, 0x01, 0xCC",
        // All but RSP is the module's answer.
        "xchg rdi, [rsp]",
        "mov [rdi], rax",
        "mov [rdi + 8], rcx",
        "mov [rdi + 16], rdx",
        "mov [rdi + 48], rsi",
        "mov [rdi + 64], r8",
        "mov [rdi + 72], r9",
        "mov [rdi + 80], r10",
        "mov [rdi + 88], r11",
        "mov [rdi + 96], r12",
        "mov [rdi + 104], r13",
        "pop rax",
        "mov [rdi + 56], rax",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        // Flags of an exit are not defined.
        "cld",
        "ret",
        leaf = const Leaf::VP_ENTER.0 as u32,
    )
}
