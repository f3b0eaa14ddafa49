//! The unified kernel image: kernel, initrd and command line as sections of one PE program.
//!
//! The format is the UAPI group's "Unified Kernel Image": the stub finds its parts by the names of
//! its sections. They are laid behind the stub's own, each at its page.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use object::read::pe::PeFile64;
use object::{Object, ObjectSection};

use crate::command;
use crate::layout::read;

/// PE sections begin at multiples of this in memory.
const PAGE: u64 = 0x1000;

/// What goes into the image.
#[derive(Debug)]
pub struct Parts<'a> {
    /// The PE program that starts the kernel.
    pub stub: &'a Path,
    /// Section name and file of each part, the kernel last: the kernel may unpack itself in place,
    /// into what follows it.
    pub sections: [(&'static str, PathBuf); 5],
}

/// Writes the image to `out`.
pub fn write(parts: &Parts<'_>, objcopy: &Path, out: &Path) -> Result<()> {
    let mut at = end_of(&read(parts.stub)?)
        .with_context(|| format!("{}: expected a PE program", parts.stub.display()))?;
    let mut command = Command::new(objcopy);
    for (name, file) in &parts.sections {
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
    command::output(command.arg(parts.stub).arg(out)).map(drop)
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
