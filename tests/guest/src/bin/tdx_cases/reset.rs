//! From the reset vector to Rust, as L1 of a trust domain starts (`tdx.md` §8): 32-bit protected mode
//! without paging, all processors at once. The registers are kept for the cases to look at.

#![expect(unsafe_code, reason = "first instructions of the program")]

use core::arch::global_asm;

/// The shared bit, as a bit of the upper half of a page-table entry.
const SHARED_HIGH: u32 = 1 << (47 - 32);

const STACK_SIZE: usize = 64 << 10;

const CR0_PAGING: u32 = 1 << 31;
const CR4_PAE: u32 = 1 << 5;
const EFER: u32 = 0xC000_0080;
/// Present, writable, accessed: an entry that points to a table.
const TABLE: u32 = 0x23;
/// Present, writable, accessed, dirty, large.
const LARGE: u32 = 0xE3;

/// Selectors of the table `low_gdt`, as [`guest::trap`] has them.
const CODE64: u16 = 0x08;
const DATA: u16 = 0x10;

/// What the first processor found at its first instruction.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstState {
    /// EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI.
    pub gprs: [u32; 8],
    /// CR0, CR4, EFER.
    pub control: [u32; 3],
    pad: u32,
    /// R8 to R15.
    pub upper: [u64; 8],
}

unsafe extern "C" {
    static first_state: FirstState;
}

/// What the first processor found.
pub fn first() -> FirstState {
    // SAFETY: written before Rust began, never after.
    unsafe { (&raw const first_state).read_volatile() }
}

global_asm!(
    ".section .bss.boot, \"aw\", @nobits",
    ".balign 4096",
    "boot_pml4: .skip 4096",
    "boot_private: .skip 4096",
    "boot_shared: .skip 4096",
    ".globl first_state",
    "first_state: .skip 112",
    "boot_ready: .skip 16",
    ".skip {stack_size}",
    "boot_stack_top:",
    ".skip {stack_size}",
    "second_stack_top:",

    ".section .low, \"ax\", @progbits",
    "low_start:",
    ".code32",
    "low_32:",
    "testl %esi, %esi",
    "jnz 2f",
    "movl %eax, first_state",
    "movl %ecx, first_state + 4",
    "movl %edx, first_state + 8",
    "movl %ebx, first_state + 12",
    "movl %esp, first_state + 16",
    "movl %ebp, first_state + 20",
    "movl %esi, first_state + 24",
    "movl %edi, first_state + 28",
    "movl %cr0, %eax",
    "movl %eax, first_state + 32",
    "movl %cr4, %eax",
    "movl %eax, first_state + 36",
    "movl ${efer}, %ecx",
    "rdmsr",
    "movl %eax, first_state + 40",
    // Two entries of the top table: the private and the shared mapping.
    "movl $boot_private + {table}, boot_pml4",
    "movl $boot_shared + {table}, boot_pml4 + 8",
    // 512 x 1 GiB each.
    "xorl %ecx, %ecx",
    "1:",
    "movl %ecx, %eax",
    "shll $30, %eax",
    "orl ${large}, %eax",
    "movl %ecx, %edx",
    "shrl $2, %edx",
    "movl %eax, boot_private(,%ecx,8)",
    "movl %edx, boot_private + 4(,%ecx,8)",
    "orl ${shared_high}, %edx",
    "movl %eax, boot_shared(,%ecx,8)",
    "movl %edx, boot_shared + 4(,%ecx,8)",
    "incl %ecx",
    "cmpl $512, %ecx",
    "jb 1b",
    "movl $1, boot_ready",
    // The others wait for the tables.
    "2:",
    "pause",
    "cmpl $0, boot_ready",
    "je 2b",
    "lgdtl low_gdt_pointer",
    "movw ${data}, %ax",
    "movw %ax, %ds",
    "movw %ax, %es",
    "movw %ax, %ss",
    "cld",
    "movl $boot_pml4, %eax",
    "movl %eax, %cr3",
    "movl %cr4, %eax",
    "orl ${cr4_pae}, %eax",
    "movl %eax, %cr4",
    // Long mode is enabled from the start.
    "movl %cr0, %eax",
    "orl ${cr0_pg}, %eax",
    "movl %eax, %cr0",
    "ljmpl ${code64}, $low_64",

    ".code64",
    "low_64:",
    "xorl %ebp, %ebp",
    "movl %esi, %edi",
    "testl %esi, %esi",
    "jnz 3f",
    "movq %r8, first_state + 48",
    "movq %r9, first_state + 56",
    "movq %r10, first_state + 64",
    "movq %r11, first_state + 72",
    "movq %r12, first_state + 80",
    "movq %r13, first_state + 88",
    "movq %r14, first_state + 96",
    "movq %r15, first_state + 104",
    "leaq boot_stack_top, %rsp",
    // Too far for a relative call.
    "movl ${main}, %eax",
    "callq *%rax",
    "ud2",
    "3:",
    // There is a stack for one more.
    "cmpl $1, %esi",
    "jne 3b",
    "leaq second_stack_top, %rsp",
    "movl ${second}, %eax",
    "callq *%rax",
    "ud2",

    ".balign 8",
    "low_gdt:",
    ".quad 0",
    ".quad 0x00AF9B000000FFFF",
    ".quad 0x00CF93000000FFFF",
    "low_gdt_pointer:",
    ".word low_gdt_pointer - low_gdt - 1",
    ".long low_gdt",

    ".org 0xFF0",
    ".code32",
    ".globl reset_vector",
    "reset_vector:",
    "jmp low_32",
    ".org 0x1000",
    ".code64",
    ".text",
    stack_size = const STACK_SIZE,
    cr0_pg = const CR0_PAGING,
    cr4_pae = const CR4_PAE,
    efer = const EFER,
    table = const TABLE,
    large = const LARGE,
    shared_high = const SHARED_HIGH,
    code64 = const CODE64,
    data = const DATA,
    main = sym crate::main,
    second = sym crate::second,
    options(att_syntax),
);
