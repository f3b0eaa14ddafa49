//! The way out: result lines on the second serial port, the end of the run on port 0xF4.
//!
//! How a port is written depends on where the guest runs (a plain OUT at VMPL1, the GHCB at
//! VMPL0), so the program attaches its way once, before the first line.

use core::fmt::{self, Write};

use protocols::ghcb::event::IoWidth;
use spin::Once;

use crate::harness::Verdict;

/// Data register of the second serial port (COM2), where the harness reads results.
const COM2: u16 = 0x2F8;
/// QEMU's `isa-debug-exit`; the machine watches it and ends the run.
const EXIT_PORT: u16 = 0xF4;

/// Writes `value` to an I/O port.
pub type PortWrite = fn(port: u16, width: IoWidth, value: u32);

static PORT_WRITE: Once<PortWrite> = Once::new();

/// How the run ended, as written to the exit port (agreed with `tests/e2e`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Exit {
    /// All cases passed.
    Passed = 0,
    /// Some case failed.
    Failed = 1,
    /// A panic or an unexpected exception: the table was not finished.
    Panicked = 2,
}

/// Sets the way ports are written. Later calls have no effect.
pub fn attach(write: PortWrite) {
    PORT_WRITE.call_once(|| write);
}

/// The second serial port as a text stream; without an attached way text is dropped.
#[derive(Debug)]
pub struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if let Some(write) = PORT_WRITE.get() {
            for byte in text.bytes() {
                if byte == b'\n' {
                    write(COM2, IoWidth::Byte, u32::from(b'\r'));
                }
                write(COM2, IoWidth::Byte, u32::from(byte));
            }
        }
        Ok(())
    }
}

/// Ends the run of a guest that has one thing to do, and says why if that failed. Nobody hears it if no way
/// out was attached; the status says it as well.
pub fn exit_with(verdict: Verdict) -> ! {
    exit(match verdict {
        Ok(()) => Exit::Passed,
        Err(finding) => {
            let _ = writeln!(Console, "failed: {finding}");
            Exit::Failed
        }
    })
}

/// Ends the run.
pub fn exit(how: Exit) -> ! {
    if let Some(write) = PORT_WRITE.get() {
        write(EXIT_PORT, IoWidth::Dword, how as u32);
    }
    // Only reached when the machine does not watch the port: halting with interrupts off is
    // its other way to learn that a guest is done.
    loop {
        crate::insn::halt();
    }
}
