//! The log: lines on COM1 until the guest owns it.
//!
//! Text goes byte by byte through the GHCB of the processor that logs, or straight to the port on the
//! native platform, or by TDG.VP.VMCALL in a trust domain; before there is a way, and after [`shut`], text is dropped. Once the guest runs, [`quiet`] lets only errors through:
//! those that come right before the end, and lies of the host. Nothing a guest does is logged,
//! so a guest can neither flood the log nor garble its own console through it.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

use log::{LevelFilter, Log, Metadata, Record};

use crate::hypervisor::Hypervisor;
use crate::hypervisor::native::{self, Devices};
use crate::hypervisor::tdx::{self, TdHost};
use crate::percpu;

/// I/O port of COM1's transmit register.
const COM1_DATA: u16 = 0x3F8;

struct Console;

static CONSOLE: Console = Console;
/// Set when nothing shall be written any more.
static SHUT: AtomicBool = AtomicBool::new(false);

/// Lines of a boot are at level info.
pub fn open() {
    // Fails only if a logger was set before, which would be this one.
    let _ = log::set_logger(&CONSOLE);
    log::set_max_level(LevelFilter::Info);
}

/// The guest owns the console from here on.
pub fn quiet() {
    log::set_max_level(LevelFilter::Error);
}

/// Nothing is written any more: the machine is about to end, possibly because of the host's
/// answer to a byte of the log.
pub fn shut() {
    SHUT.store(true, Ordering::Relaxed);
}

impl Log for Console {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        !SHUT.load(Ordering::Relaxed)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        // Errors of the sink are dropped: there is nowhere to report them.
        if native::is_here() {
            let _ = writeln!(Port(&Devices), "[svsm] {}\r", record.args());
        } else if tdx::is_here() {
            let _ = writeln!(Port(&TdHost), "[svsm] {}\r", record.args());
        } else if let Some(ghcb) = percpu::current().and_then(percpu::PerCpu::ghcb) {
            let _ = writeln!(Port(ghcb), "[svsm] {}\r", record.args());
        }
    }

    fn flush(&self) {}
}

/// Writes text to COM1 through the host.
struct Port<'a, H>(&'a H);

impl<H: Hypervisor> Write for Port<'_, H> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            self.0.write_port(COM1_DATA, byte).map_err(|_| fmt::Error)?;
        }
        Ok(())
    }
}
