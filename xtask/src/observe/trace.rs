//! `--trace`: the machine's trace as text, one line per world switch and request.
//!
//! ```text
//!    0.318270 s  vcpu0  VMPL1  0xfffc3a1f          VMGEXIT MSR RunVmpl { vmpl: 0 }: Run(VMPL0)
//!    0.318291 s  vcpu0  VMPL0  0x800d87b           enter from VMPL1, call CORE/PVALIDATE
//!    0.319003 s  vcpu0  VMPL1  0xfffc3a22          enter from VMPL0, result SUCCESS
//! ```
//!
//! Time counts from the first line, in ticks of the time stamp counter if the machine does not
//! know how many make a second. Lines of different processors come in the order in which they were
//! written, which is not always that of their times.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use protocols::report::{Event, Trace};

/// A trace file that is being written.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    file: BufWriter<File>,
    /// Ticks in a second; 0 if unknown.
    tsc_hz: u64,
    /// Time of the first line.
    begin: Option<u64>,
}

impl Writer {
    /// Creates the file.
    pub fn create(path: &Path) -> Result<Writer> {
        let file = File::create(path)
            .with_context(|| format!("{}: the trace cannot be written", path.display()))?;
        Ok(Writer {
            path: path.to_owned(),
            file: BufWriter::new(file),
            tsc_hz: 0,
            begin: None,
        })
    }

    /// Writes what `event` adds to the trace.
    pub fn see(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::Machine(machine) => self.tsc_hz = machine.tsc_hz,
            Event::Trace(trace) => {
                let begin = *self.begin.get_or_insert(trace.tsc);
                writeln!(self.file, "{}", line(trace, begin, self.tsc_hz))
                    .with_context(|| self.failed())?;
            }
            _ => {}
        }
        Ok(())
    }

    /// Writes what is still in memory.
    pub fn close(mut self) -> Result<()> {
        self.file.flush().with_context(|| self.failed())
    }

    fn failed(&self) -> String {
        format!("{}: the trace cannot be written", self.path.display())
    }
}

fn line(trace: &Trace, begin: u64, tsc_hz: u64) -> String {
    let ticks = trace.tsc.saturating_sub(begin);
    let time = match tsc_hz {
        0 => format!("{ticks:>14} t"),
        hz => format!("{:>14.6} s", ticks as f64 / hz as f64),
    };
    format!(
        "{time}  vcpu{:<3} VMPL{}  {:<#18x}  {}",
        trace.vcpu, trace.vmpl, trace.rip, trace.text
    )
}

#[cfg(test)]
mod tests {
    use protocols::report::Machine;

    use super::*;

    fn trace(tsc: u64) -> Event {
        Event::Trace(Trace {
            tsc,
            vcpu: 3,
            vmpl: 1,
            rip: 0x1000,
            text: "enter from VMPL0, result BUSY".into(),
        })
    }

    #[test]
    fn a_line_is_a_step() {
        let path = std::env::temp_dir().join(format!("turnstile-trace-{}", std::process::id()));
        for (tsc_hz, times) in [(0, ["0 t", "2500 t"]), (1000, ["0.000000 s", "2.500000 s"])] {
            let mut writer = Writer::create(&path).unwrap();
            let machine = Machine {
                tsc_hz,
                ..Machine::default()
            };
            for event in [Event::Machine(machine), trace(7), trace(2507)] {
                writer.see(&event).unwrap();
            }
            writer.close().unwrap();
            let text = std::fs::read_to_string(&path).unwrap();
            assert_eq!(text.lines().count(), 2);
            for (line, time) in text.lines().zip(times) {
                assert!(line.trim_start().starts_with(time), "{line}");
                assert!(line.contains("vcpu3 "), "{line}");
                assert!(line.ends_with("VMPL1  0x1000              enter from VMPL0, result BUSY"));
            }
        }
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_file_that_cannot_be_written_is_named() {
        let error = Writer::create(Path::new("/no/such/dir/trace")).unwrap_err();
        assert!(format!("{error:#}").contains("/no/such/dir/trace"));
    }
}
