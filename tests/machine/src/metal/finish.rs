//! How a run ends: the last line is written, then QEMU exits.

use core::fmt;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};

use machine::platform::End;
use machine::settings::Breakage;
use protocols::report::Event;

use super::backtrace::{self, StackTrace};
use super::{console, cpu, shared};

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

/// Ends the run: the report is the last line. `rip` is where the guest was.
pub fn end(end: End, rip: u64) -> ! {
    let machine = shared::lock(rip);
    let report = machine.platform.report(end);
    let code = u32::from(report.outcome.device_value());
    // Dropping the guard prints what the judge had to say, before the report.
    drop(machine);
    console::event(&Event::Report(report.into()));
    exit(code)
}

static PANICKING: AtomicBool = AtomicBool::new(false);

/// Tells that the machine itself is broken, where (an instruction, if that is known) and how it
/// got there (from the frame at `frame` on), and ends QEMU.
pub fn broken(what: fmt::Arguments<'_>, first: Option<u64>, frame: u64) -> ! {
    // A panic inside the panic handler must not recurse.
    if !PANICKING.swap(true, Ordering::SeqCst) {
        console::raw_log(format_args!("machine {what}"), true);
        let trace = StackTrace { first, frame };
        console::raw_log(format_args!("machine {trace}"), true);
    }
    exit(CODE_PANIC)
}

/// Breaks if the settings say so: a test of what is told then.
pub fn break_if_told() {
    let breakage = shared::lock(0).platform.settings().breakage;
    match breakage {
        None => {}
        Some(Breakage::Panic) => panic!("as told by the settings"),
        Some(Breakage::Exception) => cpu::undefined_instruction(),
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    broken(format_args!("{info}"), None, backtrace::frame_pointer())
}
