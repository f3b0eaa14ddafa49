//! The unified kernel image: kernel, initrd and command line as sections of one PE program.
//!
//! The format is the UAPI group's "Unified Kernel Image": the stub finds its parts by the names of
//! its sections. They are laid behind the stub's own, each at its page.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use object::read::pe::PeFile64;
use object::{Object, ObjectSection};

/// PE sections begin at multiples of this in memory.
const PAGE: u64 = 0x1000;

/// What such images are made with.
#[derive(Clone, Debug)]
pub struct Tools {
    /// Adds sections to a PE program.
    pub objcopy: PathBuf,
    /// The PE program that starts the kernel.
    pub stub: PathBuf,
}

/// Writes the image to `out`. `sections` are the name and the file of each part, the kernel last: the kernel
/// may unpack itself in place, into what follows it.
pub fn write(tools: &Tools, sections: &[(&str, PathBuf)], out: &Path) -> Result<()> {
    let stub = fs::read(&tools.stub).with_context(|| format!("{}", tools.stub.display()))?;
    let mut at = end_of(&stub)
        .with_context(|| format!("{}: expected a PE program", tools.stub.display()))?;
    let mut command = Command::new(&tools.objcopy);
    for (name, file) in sections {
        let size = fs::metadata(file)
            .with_context(|| format!("{}: cannot be read", file.display()))?
            .len();
        let mut section = OsString::from(format!("{name}="));
        section.push(file);
        command.arg("--add-section").arg(section);
        command.args(["--set-section-flags", &format!("{name}=data,readonly")]);
        command.args(["--change-section-vma", &format!("{name}={at:#x}")]);
        at = (at + size).next_multiple_of(PAGE);
    }
    let output = command
        .arg(&tools.stub)
        .arg(out)
        .output()
        .with_context(|| format!("{}: cannot be started", tools.objcopy.display()))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        bail!("{}: {}", tools.objcopy.display(), errors.trim());
    }
    Ok(())
}

/// The first page behind the sections of a PE program, as an address that holds its image base.
fn end_of(bytes: &[u8]) -> Result<u64> {
    let file = PeFile64::parse(bytes)?;
    let ends = file
        .sections()
        .map(|section| section.address() + section.size());
    let end = ends.max().context("the program has no sections")?;
    Ok(end.next_multiple_of(PAGE))
}
