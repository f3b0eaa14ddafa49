//! The same virtual hardware without the machine: OVMF as QEMU's own firmware, nothing confidential.
//!
//! It exists for comparison: what boots here and above the paravisor, unchanged, was not made for
//! either.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use super::config::{self, Console, Logs};
use super::{Cores, Disk, Finished, Happening, Running, present};

/// One run of plain QEMU.
#[derive(Clone, Debug)]
pub struct Plain {
    /// The QEMU program.
    pub qemu: PathBuf,
    /// An OVMF image, QEMU's firmware.
    pub firmware: PathBuf,
    /// Memory, as QEMU's `-m` takes it.
    pub memory: String,
    /// Number of virtual processors.
    pub vcpus: u32,
    /// The guest's disk.
    pub disk: Disk,
    /// Directory for the logs of this run; must exist.
    pub dir: PathBuf,
}

impl Plain {
    /// Runs it to its end, or until `limit` has passed, telling `watch` what happens. There is no
    /// report: nobody makes one.
    pub fn run(&self, limit: Duration, watch: impl FnMut(&Happening)) -> Result<Finished> {
        let files: [(&Path, &str); 3] = [
            (&self.qemu, "the QEMU program"),
            (&self.firmware, "an OVMF image"),
            (&self.disk.file, "a disk image"),
        ];
        present(files)?;
        let logs = Logs::within(&self.dir);
        logs.empty()?;
        let mut qemu = config::hardware(&self.qemu, &self.memory, None, self.vcpus, "multi");
        qemu.arg("-bios").arg(&self.firmware);
        config::serial_ports(&mut qemu, &logs, Console::File)?;
        self.disk.attach(&mut qemu);
        Running::start(qemu, self.vcpus, Cores::All, &self.dir, true)?.watch(limit, watch)
    }
}
