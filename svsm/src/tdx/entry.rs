//! The first instructions of every processor of a trust domain.
//!
//! All processors start at once at the reset vector, in flat 32-bit protected mode without paging, with
//! their number in ESI (facts: tdx §8). The reset page, made with the image, jumps here and tells where
//! page tables and launch parameters are ([`ResetPage`]). Processor 0 gets the boot stack; the others
//! wait until it has made them a stack each ([`release`]).
//!
//! EFER.LME and EFER.NXE are set from the start, so switching on paging is switching to long mode.
#![expect(unsafe_code, reason = "first instructions, and the words they wait on")]

use core::arch::global_asm;
use core::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use protocols::addr::PAGE_SIZE;
use protocols::launch::ResetPage;

use crate::entry::{BOOT_STACK, BOOT_STACK_SIZE};
use crate::percpu::PerCpu;

/// How often a processor looks whether the others have come to a certain point.
pub const LOOKS_AT_OTHERS: u32 = 1 << 28;

/// Where a waiting processor goes on.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Start {
    /// Upper end of its stack.
    pub stack_top: u64,
    /// Its block.
    pub percpu: &'static PerCpu,
}

/// How many processors, the first one included, have left the reset page. Each counts itself by its
/// first instruction here.
static LEFT: AtomicU32 = AtomicU32::new(0);
/// The starts, by number of the processor; null while they wait.
static STARTS: AtomicPtr<Start> = AtomicPtr::new(core::ptr::null_mut());
/// How many there are. Written before `STARTS`.
static START_COUNT: AtomicU32 = AtomicU32::new(0);

/// How many processors have left the reset page.
#[must_use]
pub fn processors_here() -> u32 {
    LEFT.load(Ordering::Acquire)
}

/// Lets the other processors go on; the first of `starts` is nobody's.
pub fn release(starts: &'static [Start]) {
    START_COUNT.store(starts.len() as u32, Ordering::Relaxed);
    STARTS.store(starts.as_ptr().cast_mut(), Ordering::Release);
}

const CR0_WRITE_PROTECT_AND_PAGING: u32 = 1 << 16 | 1 << 31;
const CR4_PAE: u32 = 1 << 5;
/// Selectors of `td_gdt`, as in the processors' own tables.
const CODE64: u16 = 0x08;
const DATA: u16 = 0x10;

global_asm!(
    ".section .text.td_start, \"ax\", @progbits",
    ".code32",
    ".globl turnstile_td_start",
    "turnstile_td_start:",
    "lock incl {left}",
    "movl ${reset_page} + {root}, %eax",
    "movl (%eax), %eax",
    "movl %eax, %cr3",
    "movl ${reset_page} + {params}, %edi",
    "movl (%edi), %edi",
    "lgdtl td_gdt_pointer",
    "movw ${data}, %ax",
    "movw %ax, %ds",
    "movw %ax, %es",
    "movw %ax, %ss",
    "cld",
    "movl %cr4, %eax",
    "orl ${cr4}, %eax",
    "movl %eax, %cr4",
    "movl %cr0, %eax",
    "orl ${cr0}, %eax",
    "movl %eax, %cr0",
    "ljmpl ${code64}, $td_64",

    ".code64",
    "td_64:",
    "xorl %ebp, %ebp",
    // Upper halves are not defined after the switch.
    "movl %edi, %edi",
    "movl %esi, %esi",
    "testl %esi, %esi",
    "jnz 2f",
    "leaq {stack} + {top}(%rip), %rsp",
    "callq {boot}",
    "ud2",
    // The others, without a stack.
    "2:",
    "pause",
    "movq {starts}(%rip), %rax",
    "testq %rax, %rax",
    "jz 2b",
    // A number that nobody expects waits for ever.
    "cmpl {count}(%rip), %esi",
    "jae 2b",
    "shll $4, %esi",
    "movq (%rax, %rsi), %rsp",
    "movq 8(%rax, %rsi), %rdi",
    "callq {other}",
    "ud2",

    ".balign 8",
    "td_gdt:",
    ".quad 0",
    ".quad 0x00AF9B000000FFFF",
    ".quad 0x00CF93000000FFFF",
    "td_gdt_pointer:",
    ".word td_gdt_pointer - td_gdt - 1",
    ".long td_gdt",
    ".text",
    left = sym LEFT,
    starts = sym STARTS,
    count = sym START_COUNT,
    stack = sym BOOT_STACK,
    top = const PAGE_SIZE as usize + BOOT_STACK_SIZE,
    boot = sym super::bare::boot_processor,
    other = sym super::bare::other_processor,
    reset_page = const ResetPage::GPA as u32,
    root = const ResetPage::ROOT_OFFSET,
    params = const ResetPage::PARAMS_OFFSET,
    cr0 = const CR0_WRITE_PROTECT_AND_PAGING,
    cr4 = const CR4_PAE,
    code64 = const CODE64,
    data = const DATA,
    options(att_syntax),
);

const _: () = assert!(size_of::<Start>() == 1 << 4);
