//! How a run ends: the last line is written, then QEMU exits.

use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};

use super::{console, cpu};

/// Port of QEMU's `isa-debug-exit`; the value v makes QEMU exit with status `(v << 1) | 1`.
pub const EXIT_PORT: u16 = 0xF4;

/// The exit value of a machine that broke (no outcome of a run has it).
const CODE_PANIC: u32 = 0x3F;

/// Ends QEMU with an outcome's code.
pub fn exit(code: u32) -> ! {
    cpu::port_out(EXIT_PORT, 4, code);
    // Without the exit device there is nothing more to do.
    cpu::stop()
}

static PANICKING: AtomicBool = AtomicBool::new(false);

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    // A panic inside the panic handler must not recurse.
    if !PANICKING.swap(true, Ordering::SeqCst) {
        console::raw_log(format_args!("machine {info}"), true);
    }
    exit(CODE_PANIC)
}
