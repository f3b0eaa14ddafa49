//! The host of the native platform: QEMU's devices, used directly.
//!
//! There is a port to write to and an end. There are no privilege levels to run, so the requests for
//! them are refused; nobody who runs natively makes them.
#![expect(unsafe_code, reason = "port writes, and a deliberate triple fault")]

use core::arch::asm;
use core::sync::atomic::{AtomicBool, Ordering};

use protocols::addr::{Gpa, Vmpl};
use protocols::terminate::{NATIVE_EXIT_PORT, NATIVE_EXIT_VALUE, TurnstileReason};
use x86_64::VirtAddr;
use x86_64::instructions::port::Port;
use x86_64::instructions::tables::lidt;
use x86_64::structures::DescriptorTablePointer;

use super::{Hypervisor, VcpuRequest};

/// Whether this is the platform we are on.
static HERE: AtomicBool = AtomicBool::new(false);

/// Notes that this is the native platform: the measured launch parameters say so.
pub fn arrive() {
    HERE.store(true, Ordering::Relaxed);
}

/// Whether this is the native platform.
#[must_use]
pub fn is_here() -> bool {
    HERE.load(Ordering::Relaxed)
}

/// The devices.
#[derive(Clone, Copy, Debug)]
pub struct Devices;

impl Hypervisor for Devices {
    fn run_vmpl(&self, _: Vmpl) -> Result<(), TurnstileReason> {
        Err(TurnstileReason::NATIVE_ONLY)
    }

    fn create_vcpu(&self, _: VcpuRequest) -> Result<(), TurnstileReason> {
        Err(TurnstileReason::NATIVE_ONLY)
    }

    fn list_apic_ids(&self, _: Gpa) -> Result<(), TurnstileReason> {
        Err(TurnstileReason::NATIVE_ONLY)
    }

    // All memory is as private as it can be: there is no state of a page to change.
    fn make_private(&self, _: &[Gpa]) -> Result<(), TurnstileReason> {
        Ok(())
    }

    fn write_port(&self, port: u16, value: u8) -> Result<(), TurnstileReason> {
        // SAFETY: a port write reaches devices; none of them was told to write to memory.
        unsafe { Port::new(port).write(value) };
        Ok(())
    }
}

/// Ends the machine: QEMU's exit device, and where there is none a triple fault, which resets it.
pub fn stop() -> ! {
    // SAFETY: as above; the device ends QEMU.
    unsafe { Port::new(NATIVE_EXIT_PORT).write(NATIVE_EXIT_VALUE) };
    let nothing = DescriptorTablePointer {
        limit: 0,
        base: VirtAddr::zero(),
    };
    // SAFETY: nothing runs after this on purpose: the exception finds no handler, nor does the double
    // fault.
    unsafe {
        lidt(&nothing);
        asm!("ud2", options(noreturn))
    }
}
