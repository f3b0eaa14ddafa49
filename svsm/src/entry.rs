//! The first instructions of every virtual processor at VMPL0.
//!
//! The boot processor starts at `_start` as the image says: 64-bit mode on the launch page
//! tables, RDI = address of the launch parameters, interrupts off, no stack. It gets a static
//! stack with an unmapped page below (see [`boot_stack_guard`]). Those of a trust domain start
//! elsewhere: `tdx::entry`.
#![expect(unsafe_code, reason = "naked entry point and the static boot stack")]

use core::arch::naked_asm;
use core::cell::UnsafeCell;

use protocols::addr::PAGE_SIZE;

use crate::boot;

/// Bytes of the boot processor's stack.
pub(crate) const BOOT_STACK_SIZE: usize = 32 * 1024;

/// The stack with its guard page below.
#[repr(C, align(4096))]
pub(crate) struct BootStack {
    guard: UnsafeCell<[u8; PAGE_SIZE as usize]>,
    stack: UnsafeCell<[u8; BOOT_STACK_SIZE]>,
}

// SAFETY: no Rust code reads or writes the bytes; the boot processor alone runs on them.
unsafe impl Sync for BootStack {}

pub(crate) static BOOT_STACK: BootStack = BootStack {
    guard: UnsafeCell::new([0; PAGE_SIZE as usize]),
    stack: UnsafeCell::new([0; BOOT_STACK_SIZE]),
};

/// Address of the page that is to be unmapped, so that a stack overflow faults.
pub fn boot_stack_guard() -> u64 {
    BOOT_STACK.guard.get() as u64
}

/// Entry point of the image.
///
/// # Safety
///
/// Only the launch context may come here, once, with RDI as the module says.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn _start() -> ! {
    naked_asm!(
        "cld",
        "lea rsp, [rip + {stack} + {top}]",
        "xor ebp, ebp",
        "call {boot}",
        "ud2",
        stack = sym BOOT_STACK,
        top = const PAGE_SIZE as usize + BOOT_STACK_SIZE,
        boot = sym boot::boot_processor,
    )
}
