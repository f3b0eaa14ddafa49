//! From the reset vector to Rust, as L1 of a trust domain starts (`tdx.md` §8): 32-bit protected mode
//! without paging, all processors at once. The registers are kept for the cases to look at.

#![expect(unsafe_code, reason = "first instructions of the program")]

use core::arch::global_asm;

use guest::td_start::{self, FirstState};

unsafe extern "C" {
    static first_state: FirstState;
    static first_upper: [u64; 8];
}

/// What the first processor found.
pub fn first() -> FirstState {
    // SAFETY: written before Rust began, never after.
    unsafe { (&raw const first_state).read_volatile() }
}

/// R8 to R15, as it found them.
pub fn first_upper_registers() -> [u64; 8] {
    // SAFETY: as above.
    unsafe { (&raw const first_upper).read_volatile() }
}

global_asm!(
    ".section .bss.boot, \"aw\", @nobits",
    ".balign 4096",
    "boot_pml4: .skip 4096",
    "boot_private: .skip 4096",
    "boot_shared: .skip 4096",
    ".globl first_state",
    "first_state: .skip 48",
    ".globl first_upper",
    "first_upper: .skip 64",
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
    guest::td_keep_first_state!(),
    guest::td_make_tables!(),
    guest::td_enter_long_mode!(),

    ".code64",
    "low_64:",
    "xorl %ebp, %ebp",
    "movl %esi, %edi",
    "testl %esi, %esi",
    "jnz 3f",
    "movq %r8, first_upper",
    "movq %r9, first_upper + 8",
    "movq %r10, first_upper + 16",
    "movq %r11, first_upper + 24",
    "movq %r12, first_upper + 32",
    "movq %r13, first_upper + 40",
    "movq %r14, first_upper + 48",
    "movq %r15, first_upper + 56",
    guest::td_call_main!(),

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
    main = sym crate::main,
    second = sym crate::second,
    options(att_syntax),
);
