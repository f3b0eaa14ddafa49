//! From the reset vector to Rust: what a firmware does, in the smallest form.
//!
//! The last page of the image holds 16-bit and 32-bit code, the description that the image
//! builder and the paravisor read (OVMF's footer table and SEV metadata, snp-launch.md §3.1),
//! and the reset vector. The way is that of a real SNP firmware: real mode, protected mode
//! without paging (all accesses are private), then long mode on page tables with the C-bit.
//! As in OVMF, CR3 has no C-bit at first: walks are private anyway.

#![expect(unsafe_code, reason = "first instructions of the program")]

use core::arch::global_asm;

use protocols::ovmf::SectionKind;

/// Where the image ends.
const IMAGE_END: u64 = 1 << 32;
/// Memory the program runs in; as in the linker script.
const RAM: u64 = 0x80_0000;
const RAM_SIZE: u64 = 768 << 10;
/// Where the paravisor puts the guest's secrets page.
pub const SECRETS: u64 = 0x90_0000;
/// Where the paravisor puts the CPUID page.
const CPUID: u64 = 0x90_1000;
/// The calling area the guest starts with.
pub const CALLING_AREA: u64 = 0x90_2000;

/// Position of the C-bit on the machine (CPUID 0x8000001F EBX). A firmware would ask CPUID;
/// the machine has one answer.
const C_BIT: u32 = 47;

const STACK_SIZE: usize = 64 << 10;

const CR0_PROTECTION: u32 = 1;
const CR0_PAGING: u32 = 1 << 31;
const CR4_PAE: u32 = 1 << 5;
const EFER: u32 = 0xC000_0080;
const EFER_LONG_MODE: u32 = 1 << 8;
/// Present, writable, accessed: an entry that points to a table.
const TABLE: u32 = 0x23;
/// Present, writable, accessed, dirty, large.
const LARGE: u32 = 0xE3;

/// Bytes of the footer table: two entries with four bytes of data and the table's own.
const FOOTER_SIZE: usize = 2 * (4 + 2 + 16) + (2 + 16);

/// Selectors of the table `low_gdt`. 64-bit code is 8 as in the launch VMSA.
const CODE64: u16 = 0x08;
const DATA: u16 = 0x10;
const CODE32: u16 = 0x18;

global_asm!(
    ".section .bss.boot, \"aw\", @nobits",
    ".balign 4096",
    "boot_pml4: .skip 4096",
    "boot_private: .skip 4096",
    "boot_shared: .skip 4096",
    ".skip {stack_size}",
    "boot_stack_top:",

    ".section .low, \"ax\", @progbits",
    "low_start:",

    ".code16",
    "low_16:",
    "cli",
    // CS, and only CS, is still based at 4 GiB - 64 KiB: offsets are the low halves of
    // addresses.
    "lgdtl %cs:(low_gdt_pointer - low_start + 0xF000)",
    "movl %cr0, %eax",
    "orl ${cr0_pe}, %eax",
    "movl %eax, %cr0",
    "ljmpl ${code32}, $low_32",

    ".code32",
    "low_32:",
    "movw ${data}, %ax",
    "movw %ax, %ds",
    "movw %ax, %es",
    "movw %ax, %ss",
    "cld",
    // Out of the image into that memory.
    "movl $image_start, %esi",
    "movl $ram_start, %edi",
    "movl $copy_size, %ecx",
    "rep movsb",
    // The memory in the metadata is promised to be zero; not to rely on it here leaves the
    // program able to say so.
    "xorl %eax, %eax",
    "movl $bss_start, %edi",
    "movl $bss_end, %ecx",
    "subl %edi, %ecx",
    "rep stosb",
    // Two entries of the top table: the private and the shared mapping.
    "movl $boot_private + {table}, boot_pml4",
    "movl ${c_bit_high}, boot_pml4 + 4",
    "movl $boot_shared + {table}, boot_pml4 + 8",
    "movl ${c_bit_high}, boot_pml4 + 12",
    // 512 x 1 GiB each.
    "xorl %ecx, %ecx",
    "1:",
    "movl %ecx, %eax",
    "shll $30, %eax",
    "orl ${large}, %eax",
    "movl %ecx, %edx",
    "shrl $2, %edx",
    "movl %eax, boot_shared(,%ecx,8)",
    "movl %edx, boot_shared + 4(,%ecx,8)",
    "orl ${c_bit_high}, %edx",
    "movl %eax, boot_private(,%ecx,8)",
    "movl %edx, boot_private + 4(,%ecx,8)",
    "incl %ecx",
    "cmpl $512, %ecx",
    "jb 1b",
    "movl $boot_pml4, %eax",
    "movl %eax, %cr3",
    "movl %cr4, %eax",
    "orl ${cr4_pae}, %eax",
    "movl %eax, %cr4",
    "movl ${efer}, %ecx",
    "rdmsr",
    "orl ${efer_lme}, %eax",
    "wrmsr",
    "movl %cr0, %eax",
    "orl ${cr0_pg}, %eax",
    "movl %eax, %cr0",
    "ljmpl ${code64}, $low_64",

    ".code64",
    "low_64:",
    "movq ${c_bit_high}, %rax",
    "shlq $32, %rax",
    "leaq boot_pml4, %rdx",
    "orq %rdx, %rax",
    "movq %rax, %cr3",
    "leaq boot_stack_top, %rsp",
    "xorl %ebp, %ebp",
    // Too far for a relative call.
    "movl ${main}, %eax",
    "callq *%rax",
    "ud2",

    ".balign 8",
    "low_gdt:",
    ".quad 0",
    ".quad 0x00AF9B000000FFFF",
    ".quad 0x00CF93000000FFFF",
    ".quad 0x00CF9B000000FFFF",
    "low_gdt_pointer:",
    ".word low_gdt_pointer - low_gdt - 1",
    ".long low_gdt",

    // SEV metadata: header, then the areas the program wants.
    ".balign 4",
    "low_metadata:",
    ".ascii \"ASEV\"",
    ".long low_metadata_end - low_metadata",
    ".long 1",
    ".long (low_metadata_end - low_metadata_areas) / 12",
    "low_metadata_areas:",
    ".long {ram}, {ram_size}, {sec_mem}",
    ".long {secrets}, 0x1000, {secrets_kind}",
    ".long {cpuid}, 0x1000, {cpuid_kind}",
    ".long {calling_area}, 0x1000, {calling_area_kind}",
    "low_metadata_end:",

    // The footer table ends 32 bytes before the image. It is read backwards: an entry is its
    // data, u16 length of the whole entry, GUID.
    ".org 0xFE0 - {footer_size}",
    "low_footer:",
    // SEV metadata: distance from the image's end.
    ".long 0x1000 - (low_metadata - low_start)",
    ".word 22",
    ".byte 0x66, 0x65, 0x88, 0xdc, 0x4a, 0x98, 0x98, 0x47, 0xa7, 0x5e, 0x55, 0x85, 0xa7, 0xbf, 0x67, 0xcc",
    // Reset block: where further processors would start.
    ".long {reset_eip}",
    ".word 22",
    ".byte 0xde, 0x71, 0xf7, 0x00, 0x7e, 0x1a, 0xcb, 0x4f, 0x89, 0x0e, 0x68, 0xc7, 0x7e, 0x2f, 0xb4, 0x4e",
    // The table itself: its length including this entry.
    ".word {footer_size}",
    ".byte 0xde, 0x82, 0xb5, 0x96, 0xb2, 0x1f, 0xf7, 0x45, 0xba, 0xea, 0xa3, 0x66, 0xc5, 0x5a, 0x08, 0x2d",
    ".org 0xFE0",

    ".org 0xFF0",
    ".code16",
    ".globl reset_vector",
    "reset_vector:",
    "jmp low_16",
    ".org 0x1000",
    ".code64",
    ".text",
    stack_size = const STACK_SIZE,
    cr0_pe = const CR0_PROTECTION,
    cr0_pg = const CR0_PAGING,
    cr4_pae = const CR4_PAE,
    efer = const EFER,
    efer_lme = const EFER_LONG_MODE,
    table = const TABLE,
    large = const LARGE,
    c_bit_high = const (1_u32 << (C_BIT - 32)),
    code64 = const CODE64,
    code32 = const CODE32,
    data = const DATA,
    ram = const RAM,
    ram_size = const RAM_SIZE,
    footer_size = const FOOTER_SIZE,
    sec_mem = const SectionKind::SEC_MEM.0,
    secrets = const SECRETS,
    secrets_kind = const SectionKind::SECRETS.0,
    cpuid = const CPUID,
    cpuid_kind = const SectionKind::CPUID.0,
    calling_area = const CALLING_AREA,
    calling_area_kind = const SectionKind::SVSM_CAA.0,
    reset_eip = const (IMAGE_END - 16) as u32,
    main = sym crate::main,
    options(att_syntax),
);
