//! The machine's words: JSON lines on port 0xe9 (QEMU `isa-debugcon`).
//!
//! One event is one line, written under one lock, so lines of two CPUs never mix.

use core::fmt::{self, Write};

use serde::Serialize;
use spin::Mutex;

use super::cpu;

/// The debug console's port.
pub const PORT: u16 = 0xE9;

struct Console;

impl Write for Console {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        for byte in s.bytes() {
            cpu::port_out(PORT, 1, u32::from(byte));
        }
        Ok(())
    }
}

static CONSOLE: Mutex<Console> = Mutex::new(Console);

/// Writes one event as one line.
pub fn event(event: &impl Serialize) {
    // Serialised first: the lock is held for the output alone, and a failure prints nothing.
    if let Ok(mut line) = serde_json::to_string(event) {
        line.push('\n');
        let _ = CONSOLE.lock().write_str(&line);
    }
}

/// Writes one `log` event without using the heap; also for the panic handler, hence `force`:
/// a CPU that panics while it holds the lock must still be heard.
pub fn raw_log(text: fmt::Arguments<'_>, force: bool) {
    struct Escaped<'a>(&'a mut Console);
    impl Write for Escaped<'_> {
        fn write_str(&mut self, s: &str) -> fmt::Result {
            for c in s.chars() {
                match c {
                    '"' | '\\' => write!(self.0, "\\{c}")?,
                    c if c < ' ' => write!(self.0, "\\u{:04x}", u32::from(c))?,
                    c => self.0.write_char(c)?,
                }
            }
            Ok(())
        }
    }
    if force {
        // A second writer may at worst mix two lines.
        let mut console = Console;
        let _ = emit(&mut console, text);
    } else {
        let _ = emit(&mut CONSOLE.lock(), text);
    }

    fn emit(console: &mut Console, text: fmt::Arguments<'_>) -> fmt::Result {
        console.write_str("{\"event\":\"log\",\"text\":\"")?;
        write!(Escaped(console), "{text}")?;
        console.write_str("\"}\n")
    }
}

/// Logs a line of text as a `log` event.
macro_rules! log {
    ($($arg:tt)*) => { $crate::metal::console::raw_log(format_args!($($arg)*), false) };
}
pub(crate) use log;
