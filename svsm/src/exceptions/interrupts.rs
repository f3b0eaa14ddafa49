//! Interrupts of L1 in a trust domain: they are the guest's, or another processor's of ours.
//!
//! Interrupts are off at L1, but for a moment that the loop chooses ([`take`]). A handler only notes its
//! vector in the processor's block and ends the interrupt at the APIC, so that nothing of the loop's can
//! be interrupted in its midst. What the host sends is the host's choice; see decision 026.

use core::arch::{asm, global_asm};

use x86_64::VirtAddr;
use x86_64::registers::model_specific::Msr;
use x86_64::structures::idt::InterruptDescriptorTable;

use crate::percpu;
use crate::tdx::l2::interrupts::FIRST_VECTOR;
use crate::tdx::l2::msr::x2apic;
use crate::tdx::vectors::Vectors;

/// Bytes from one stub to the next.
const STUB_SIZE: usize = 16;
/// Vectors that have one.
const STUBS: usize = 256 - FIRST_VECTOR as usize;

// As those of exceptions without an error code (`stub!`).
global_asm!(
    ".balign {size}",
    "turnstile_interrupt_stubs:",
    ".set vector, {first}",
    ".rept {stubs}",
    ".balign {size}",
    "push 0",
    "push vector",
    "jmp {common}",
    ".set vector, vector + 1",
    ".endr",
    size = const STUB_SIZE,
    first = const FIRST_VECTOR,
    stubs = const STUBS,
    common = sym super::common,
);

unsafe extern "C" {
    #[link_name = "turnstile_interrupt_stubs"]
    static STUB_CODE: [[u8; STUB_SIZE]; STUBS];
}

/// Gives each vector its stub.
pub(super) fn install(idt: &mut InterruptDescriptorTable) {
    let stubs = (&raw const STUB_CODE) as u64;
    for (stub, vector) in (stubs..).step_by(STUB_SIZE).zip(FIRST_VECTOR..=u8::MAX) {
        // SAFETY: the stub is written for this vector and returns with IRETQ.
        unsafe { idt[vector].set_handler_addr(VirtAddr::new(stub)) };
    }
}

/// Notes an interrupt and ends it.
pub(super) fn note(vector: u8) {
    if let Some(processor) = percpu::current() {
        processor.taken().insert(vector);
    }
    // SAFETY: the APIC is in x2APIC mode, as in every trust domain. Nothing else is ever in service, so
    // the end of one that the APIC does not know of (a spurious one) ends nothing.
    unsafe { Msr::new(x2apic::EOI).write(0) };
}

/// Takes the interrupts that wait for this processor.
pub fn take() -> Vectors {
    // SAFETY: the handlers are installed, change nothing but the processor's set of taken vectors, and
    // keep all registers; interrupts are off before and after. Those that wait come behind the NOP, as
    // STI holds them off for one instruction.
    unsafe { asm!("sti", "nop", "cli") };
    percpu::current().map_or_else(Vectors::default, |processor| processor.taken().empty())
}
