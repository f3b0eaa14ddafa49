//! From the reset vector to Rust as an ordinary trust domain starts: what a firmware for trust domains
//! does, in the smallest form.
//!
//! The last page of the image holds 32-bit code, the description that the image builder and the
//! paravisor read (OVMF's footer table and TDVF metadata), and the reset vector.

#![expect(unsafe_code, reason = "first instructions of the program")]

use core::arch::global_asm;

use protocols::tdvf::{Attributes, SectionKind};

/// Bytes of the image; as in the linker script.
const IMAGE_SIZE: u32 = 256 << 10;
/// Memory the program runs in; as in the linker script.
const RAM: u32 = 0x80_0000;
const RAM_SIZE: u32 = 512 << 10;
/// Where the paravisor lists memory.
pub const HOB: u32 = 0x90_0000;
const HOB_SIZE: u32 = 0x2000;

/// The shared bit, as a bit of the upper half of a page-table entry.
const SHARED_HIGH: u32 = 1 << (47 - 32);
const STACK_SIZE: usize = 64 << 10;
const CR0_PAGING: u32 = 1 << 31;
const CR4_PAE: u32 = 1 << 5;
/// Present, writable, accessed: an entry that points to a table.
const TABLE: u32 = 0x23;
/// Present, writable, accessed, dirty, large.
const LARGE: u32 = 0xE3;
/// Bytes of the footer table: an entry with four bytes of data and the table's own.
const FOOTER_SIZE: usize = (4 + 2 + 16) + (2 + 16);

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
    ".skip {stack_size}",
    "boot_stack_top:",
    ".skip {stack_size}",
    "second_stack_top:",
    // Behind what is copied and what is zeroed: the first code writes it before it does either.
    ".section .early, \"aw\", @nobits",
    ".balign 16",
    ".globl first_state",
    "first_state: .skip 48",
    "boot_ready: .skip 16",

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
    "cld",
    // Out of the image into memory.
    "movl $image_start, %esi",
    "movl $ram_start, %edi",
    "movl $copy_size, %ecx",
    "rep movsb",
    "xorl %eax, %eax",
    "movl $bss_start, %edi",
    "movl $bss_end, %ecx",
    "subl %edi, %ecx",
    "rep stosb",
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
    "xorl %esi, %esi",
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

    // TDVF metadata: head, then sections of two words, two addresses, two words.
    ".balign 16",
    "low_metadata:",
    ".ascii \"TDVF\"",
    ".long low_metadata_end - low_metadata",
    ".long 1",
    ".long (low_metadata_end - low_metadata_sections) / 32",
    "low_metadata_sections:",
    ".long 0, {image_size}",
    ".quad 0x100000000 - {image_size}, {image_size}",
    ".long {bfv}, {extend}",
    ".long 0, 0",
    ".quad {ram}, {ram_size}",
    ".long {temp_mem}, 0",
    ".long 0, 0",
    ".quad {hob}, {hob_size}",
    ".long {td_hob}, 0",
    "low_metadata_end:",

    // The footer table ends 32 bytes before the image. It is read backwards: an entry is its
    // data, u16 length of the whole entry, GUID.
    ".org 0xFE0 - {footer_size}",
    ".long 0x1000 - (low_metadata - low_start)",
    ".word 22",
    ".byte 0xf3, 0xf9, 0xea, 0xe9, 0x8e, 0x16, 0xd5, 0x44, 0xa8, 0xeb, 0x7f, 0x4d, 0x87, 0x38, 0xf6, 0xae",
    ".word {footer_size}",
    ".byte 0xde, 0x82, 0xb5, 0x96, 0xb2, 0x1f, 0xf7, 0x45, 0xba, 0xea, 0xa3, 0x66, 0xc5, 0x5a, 0x08, 0x2d",
    ".org 0xFE0",

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
    efer = const 0xC000_0080_u32,
    table = const TABLE,
    large = const LARGE,
    shared_high = const SHARED_HIGH,
    code64 = const CODE64,
    data = const DATA,
    image_size = const IMAGE_SIZE,
    ram = const RAM,
    ram_size = const RAM_SIZE,
    hob = const HOB,
    hob_size = const HOB_SIZE,
    bfv = const SectionKind::BFV.0,
    temp_mem = const SectionKind::TEMP_MEM.0,
    td_hob = const SectionKind::TD_HOB.0,
    extend = const Attributes::EXTEND.bits(),
    footer_size = const FOOTER_SIZE,
    main = sym crate::main,
    second = sym crate::second,
    options(att_syntax),
);
