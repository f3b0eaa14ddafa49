//! Exceptions at VMPL0: the table, the stubs, and what is done about each.
//!
//! | exception | what happens |
//! |---|---|
//! | #VC 0x72 at a CPUID instruction | answered from the launch table ([`crate::cpuid`]) |
//! | #PF, #GP, #VC at an instruction with a landing pad | continue there ([`fixup`]) |
//! | #VE for CPUID at an instruction with a landing pad | continue there: the host's to answer |
//! | #VC 0x404, #VE for an access anywhere else | I6: the host replaced a page of ours; terminate |
//! | NMI | ignored: nobody at VMPL0 waits for one |
//! | interrupts in a trust domain | noted for the loop that lets them come ([`interrupts`]) |
//! | everything else | a bug or an attack; terminate |
//!
//! Exceptions can be injected by the host at any instruction, so the handler believes neither
//! vector nor error code: CPUID is only emulated where the bytes say CPUID, and a landing pad
//! only reports a fault, which every caller handles.
#![expect(unsafe_code, reason = "interrupt stubs and descriptor table")]

pub mod fixup;
pub mod interrupts;

use core::arch::naked_asm;

use protocols::exit_code::ExitCode;
use protocols::tdx::ve::{self, ExitReason};
use protocols::terminate::TurnstileReason;
use spin::Once;
use x86_64::VirtAddr;
use x86_64::registers::control::Cr2;
use x86_64::structures::idt::InterruptDescriptorTable;

use crate::cpuid::CpuidTable;
use crate::hypervisor::tdx;
use crate::panic;
use crate::percpu::EMERGENCY_STACK;
use crate::platform::AccessFault;
use crate::platform::tdx::module;
use crate::tdx::l2::interrupts::FIRST_VECTOR;
use crate::terminate::terminate;

/// First vector of interrupts.
const FIRST_INTERRUPT: u64 = FIRST_VECTOR as u64;
/// Vector of NMI.
const NMI: u64 = 2;
/// Vector of #GP.
const GENERAL_PROTECTION: u64 = 13;
/// Vector of #PF.
const PAGE_FAULT: u64 = 14;
/// Vector of #VE.
const VIRTUALIZATION: u64 = ve::VECTOR as u64;
/// Vector of #VC.
const VMM_COMMUNICATION: u64 = 29;

/// Encoding of CPUID.
const CPUID_OPCODE: [u8; 2] = [0x0F, 0xA2];

/// The interrupted registers, as the stubs push them.
#[derive(Debug)]
#[repr(C)]
struct Frame {
    r15: u64,
    r14: u64,
    r13: u64,
    r12: u64,
    r11: u64,
    r10: u64,
    r9: u64,
    r8: u64,
    rbp: u64,
    rdi: u64,
    rsi: u64,
    rdx: u64,
    rcx: u64,
    rbx: u64,
    rax: u64,
    vector: u64,
    code: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

/// The table CPUID is answered from, once the boot processor has checked it.
static CPUID: Once<CpuidTable<'static>> = Once::new();
/// The descriptor table of all processors.
static IDT: Once<InterruptDescriptorTable> = Once::new();

/// From now on CPUID is answered from this table.
pub fn set_cpuid_table(table: CpuidTable<'static>) {
    CPUID.call_once(|| table);
}

/// Loads the descriptor table on this processor. Its GDT and TSS have to be loaded.
pub fn load() {
    IDT.call_once(build_idt).load();
}

fn build_idt() -> InterruptDescriptorTable {
    let mut idt = InterruptDescriptorTable::new();
    macro_rules! gate {
        ($entry:expr, $stub:ident) => {
            // SAFETY: the stub is written for this vector and returns with IRETQ.
            unsafe { $entry.set_handler_addr(VirtAddr::new($stub as *const () as u64)) }
        };
    }
    macro_rules! emergency_gate {
        ($entry:expr, $stub:ident) => {{
            let options = gate!($entry, $stub);
            // SAFETY: every processor's TSS has the emergency stack, and handlers of these
            // exceptions do not return, so a frame on it that is overwritten is not missed.
            unsafe { options.set_stack_index(EMERGENCY_STACK) };
        }};
    }
    gate!(idt.divide_error, divide_error);
    gate!(idt.debug, debug);
    // On the current stack, as there is no SYSCALL here: the host can inject a second NMI while
    // the first is handled, and on a stack of its own that would overwrite the first one's frame.
    gate!(idt.non_maskable_interrupt, nmi);
    gate!(idt.breakpoint, breakpoint);
    gate!(idt.overflow, overflow);
    gate!(idt.bound_range_exceeded, bound_range);
    gate!(idt.invalid_opcode, invalid_opcode);
    gate!(idt.device_not_available, device_not_available);
    emergency_gate!(idt.double_fault, double_fault);
    gate!(idt.invalid_tss, invalid_tss);
    gate!(idt.segment_not_present, segment_not_present);
    gate!(idt.stack_segment_fault, stack_segment);
    gate!(idt.general_protection_fault, general_protection);
    gate!(idt.page_fault, page_fault);
    gate!(idt.x87_floating_point, x87);
    gate!(idt.alignment_check, alignment_check);
    emergency_gate!(idt.machine_check, machine_check);
    gate!(idt.simd_floating_point, simd);
    gate!(idt.virtualization, virtualization);
    gate!(idt.vmm_communication_exception, vmm_communication);
    // Elsewhere there are none, and one that the host injects all the same ends the machine.
    if tdx::is_here() {
        interrupts::install(&mut idt);
    }
    idt
}

/// A stub that completes the frame with a vector (and a zero where the processor pushes no
/// error code) and goes to the common part.
macro_rules! stub {
    ($name:ident, $vector:literal) => {
        stub!($name, $vector, "push 0");
    };
    ($name:ident, $vector:literal, has_code) => {
        stub!($name, $vector, "");
    };
    ($name:ident, $vector:literal, $push:literal) => {
        #[unsafe(naked)]
        extern "C" fn $name() {
            naked_asm!($push, "push {vector}", "jmp {common}",
                vector = const $vector, common = sym common)
        }
    };
}

stub!(divide_error, 0);
stub!(debug, 1);
stub!(nmi, 2);
stub!(breakpoint, 3);
stub!(overflow, 4);
stub!(bound_range, 5);
stub!(invalid_opcode, 6);
stub!(device_not_available, 7);
stub!(double_fault, 8, has_code);
stub!(invalid_tss, 10, has_code);
stub!(segment_not_present, 11, has_code);
stub!(stack_segment, 12, has_code);
stub!(general_protection, 13, has_code);
stub!(page_fault, 14, has_code);
stub!(x87, 16);
stub!(alignment_check, 17, has_code);
stub!(machine_check, 18);
stub!(simd, 19);
stub!(virtualization, 20);
stub!(vmm_communication, 29, has_code);

/// Saves the registers as a [`Frame`], handles, restores.
///
/// The processor aligned the stack to 16 before it pushed five words; error code, vector and
/// 15 registers make 22, so the stack is aligned at the call.
#[unsafe(naked)]
extern "C" fn common() {
    naked_asm!(
        "push rax",
        "push rbx",
        "push rcx",
        "push rdx",
        "push rsi",
        "push rdi",
        "push rbp",
        "push r8",
        "push r9",
        "push r10",
        "push r11",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "cld",
        "clac", // a fault inside a guest copy leaves AC set
        "mov rdi, rsp",
        "call {handle}",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop r11",
        "pop r10",
        "pop r9",
        "pop r8",
        "pop rbp",
        "pop rdi",
        "pop rsi",
        "pop rdx",
        "pop rcx",
        "pop rbx",
        "pop rax",
        "add rsp, 16",
        "iretq",
        handle = sym handle,
    )
}

/// Decides what to do; returning resumes what `frame` says.
extern "C" fn handle(frame: &mut Frame) {
    if frame.vector == VMM_COMMUNICATION && emulate_cpuid(frame) {
        return;
    }
    let vector = frame.vector;
    match vector {
        NMI => return,
        FIRST_INTERRUPT.. if tdx::is_here() => return interrupts::note(vector as u8),
        GENERAL_PROTECTION | PAGE_FAULT | VMM_COMMUNICATION if land(frame) => return,
        // First of all the information: without it the next #VE would be a double fault.
        VIRTUALIZATION => {
            let reason = module::take_ve().map(|info| info.reason);
            if reason == Some(ExitReason::CPUID) && land(frame) {
                return;
            }
            fatal_ve(frame, reason)
        }
        _ => {}
    }
    fatal(frame)
}

/// Continues at the landing pad of the instruction, if it has one.
fn land(frame: &mut Frame) -> bool {
    let Some(landing) = fixup::landing_for(frame.rip) else {
        return false;
    };
    let fault = AccessFault {
        vector: frame.vector as u8,
        code: frame.code as u32,
    };
    frame.rax = fixup::encode(fault);
    frame.rip = landing;
    true
}

/// Answers a CPUID instruction that raised #VC; false if that is not what happened.
fn emulate_cpuid(frame: &mut Frame) -> bool {
    if frame.code != ExitCode::CPUID.0 {
        return false;
    }
    // SAFETY: the processor was about to execute at RIP, so the bytes are mapped and readable;
    // text is never written.
    let opcode = unsafe { (frame.rip as *const [u8; 2]).read_unaligned() };
    let Some(table) = CPUID.get().filter(|_| opcode == CPUID_OPCODE) else {
        return false;
    };
    let answer = table.lookup(frame.rax as u32, frame.rcx as u32);
    frame.rax = answer.eax.into();
    frame.rbx = answer.ebx.into();
    frame.rcx = answer.ecx.into();
    frame.rdx = answer.edx.into();
    frame.rip += CPUID_OPCODE.len() as u64;
    true
}

/// The same for a #VE. I6: one for an access means that the host took a page and put another there.
fn fatal_ve(frame: &Frame, reason: Option<ExitReason>) -> ! {
    report(frame);
    terminate(match reason {
        Some(ExitReason::EPT_VIOLATION) => TurnstileReason::NOT_VALIDATED,
        _ => TurnstileReason::VE_UNEXPECTED,
    })
}

/// Says what happened and ends the machine.
fn fatal(frame: &Frame) -> ! {
    report(frame);
    terminate(match (frame.vector, ExitCode(frame.code)) {
        (VMM_COMMUNICATION, ExitCode::PAGE_NOT_VALIDATED) => TurnstileReason::NOT_VALIDATED,
        (VMM_COMMUNICATION, _) => TurnstileReason::VC_UNEXPECTED,
        _ => TurnstileReason::EXCEPTION,
    })
}

/// Says what happened.
fn report(frame: &Frame) {
    panic::report_exception(
        format_args!(
            "exception {} code {:#x} at {:#x}, cr2 {:#x}, rsp {:#x}",
            frame.vector,
            frame.code,
            frame.rip,
            Cr2::read_raw(),
            frame.rsp
        ),
        frame.rip,
        frame.rbp,
    );
}
