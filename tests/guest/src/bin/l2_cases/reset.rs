//! From the reset vector to Rust as an ordinary trust domain starts: what a firmware for trust domains
//! does, in the smallest form.
//!
//! The last page of the image holds 32-bit code, the description that the image builder and the
//! paravisor read (OVMF's footer table and TDVF metadata), and the reset vector.

#![expect(unsafe_code, reason = "first instructions of the program")]

use core::arch::global_asm;

use guest::td_start::{self, FirstState};
use protocols::tdvf::{Attributes, SectionKind};

/// Bytes of the image; as in the linker script.
const IMAGE_SIZE: u32 = 256 << 10;
/// Memory the program runs in; as in the linker script.
const RAM: u32 = 0x80_0000;
const RAM_SIZE: u32 = 512 << 10;
/// Where the paravisor lists memory.
pub const HOB: u32 = 0x90_0000;
const HOB_SIZE: u32 = 0x2000;
/// Bytes of the footer table: an entry with four bytes of data and the table's own.
const FOOTER_SIZE: usize = (4 + 2 + 16) + (2 + 16);

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
    guest::td_keep_first_state!(),
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
    guest::td_make_tables!(),
    "xorl %esi, %esi",
    guest::td_enter_long_mode!(),

    ".code64",
    "low_64:",
    "xorl %ebp, %ebp",
    "movl %esi, %edi",
    "testl %esi, %esi",
    "jnz 3f",
    guest::td_call_main!(),

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
    ".byte 0x35, 0x65, 0x7a, 0xe4, 0x4a, 0x98, 0x98, 0x47, 0x86, 0x5e, 0x46, 0x85, 0xa7, 0xbf, 0x8e, 0xc2",
    ".word {footer_size}",
    ".byte 0xde, 0x82, 0xb5, 0x96, 0xb2, 0x1f, 0xf7, 0x45, 0xba, 0xea, 0xa3, 0x66, 0xc5, 0x5a, 0x08, 0x2d",
    ".org 0xFE0",

    guest::td_reset_vector!(),
    stack_size = const td_start::STACK_SIZE,
    cr0_pg = const td_start::CR0_PAGING,
    cr4_pae = const td_start::CR4_PAE,
    efer = const td_start::EFER,
    table = const td_start::TABLE,
    large = const td_start::LARGE,
    shared_high = const td_start::SHARED_HIGH,
    code64 = const td_start::CODE64,
    data = const td_start::DATA,
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
    second = sym crate::second_start,
    options(att_syntax),
);
