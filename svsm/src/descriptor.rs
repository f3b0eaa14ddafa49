//! The map descriptor: the paravisor's page states, shown to the referee (decision 004).
//!
//! Written once at boot, never read by the paravisor.
#![expect(unsafe_code, reason = "an exported static that somebody else reads")]

use core::cell::UnsafeCell;

use protocols::map::MapDescriptor;

/// The exported page.
#[repr(transparent)]
pub struct Published(UnsafeCell<MapDescriptor>);

// SAFETY: only `publish` writes it, once, on the boot processor; nobody in this program reads it.
unsafe impl Sync for Published {}

/// Where the referee looks; `igvm-build` finds it by this name.
#[unsafe(no_mangle)]
pub static TURNSTILE_MAP_DESCRIPTOR: Published = Published(UnsafeCell::new(MapDescriptor::EMPTY));

/// Shows the finished descriptor. The boot processor calls this once.
pub fn publish(descriptor: MapDescriptor) {
    // SAFETY: see `Sync`; the write is volatile because its only reader is outside the program.
    unsafe { TURNSTILE_MAP_DESCRIPTOR.0.get().write_volatile(descriptor) }
}
