//! What the stress scenarios put into the guest's initramfs: the program and its kernel module.
//!
//! The program (`tests/stress`) is compiled for this machine's own target, statically. The module
//! (`tests/stress/module`) is compiled against the Debian headers of exactly the kernel that is
//! booted, see [`room`].

mod room;

pub use room::suites;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use e2e::initramfs::Extra;
use e2e::stress::{MODULE, PROGRAM};

use crate::layout::{Layout, create_dir, read, write};
use crate::userspace;

/// The module's sources, relative to the checkout.
const MODULE_SOURCES: &str = "tests/stress/module";
/// The file that kbuild makes of them.
const MODULE_FILE: &str = "turnstile_convert.ko";

/// Options of a command that can take the stress program into the guest.
#[derive(Clone, Copy, Debug, clap::Args)]
#[group(id = "stress_files")]
pub struct Options {
    /// Put the stress program and its kernel module into the guest: /turnstile/stress and
    /// /turnstile/convert.ko
    #[arg(long, conflicts_with_all = ["initrd", "disk"])]
    pub stress: bool,
}

impl Options {
    /// The files to add for `kernel`; none unless asked for.
    pub fn extras(self, layout: &Layout, kernel: &Path) -> Result<Vec<Extra>> {
        if self.stress {
            obtain(layout, kernel)
        } else {
            Ok(Vec::new())
        }
    }
}

/// Builds program and module for `kernel`, a bzImage of Debian's.
pub fn obtain(layout: &Layout, kernel: &Path) -> Result<Vec<Extra>> {
    Ok(vec![
        Extra {
            name: PROGRAM.to_owned(),
            permissions: 0o755,
            data: read(&userspace::program(layout, "stress")?)?,
        },
        Extra {
            name: MODULE.to_owned(),
            permissions: 0o644,
            data: read(&module(layout, kernel)?)?,
        },
    ])
}

/// Compiles the module for `kernel`, unless it was compiled from the same sources before.
fn module(layout: &Layout, kernel: &Path) -> Result<PathBuf> {
    let image = read(kernel)?;
    let release = release(&image).with_context(|| {
        format!(
            "{}: expected a bzImage whose header names its release",
            kernel.display()
        )
    })?;
    let sources = sources(&layout.root.join(MODULE_SOURCES))?;
    let dir = layout.artefacts.join("modules").join(&release);
    let (built, from) = (dir.join(MODULE_FILE), dir.join("sources"));
    let text: String = sources.iter().map(|(_, text)| text.as_str()).collect();
    if built.is_file() && fs::read_to_string(&from).is_ok_and(|old| old == text) {
        return Ok(built);
    }
    create_dir(&dir)?;
    let compiled = room::compile(layout, &release, &sources, MODULE_FILE)?;
    write(&built, compiled)?;
    // Written last: it says that the module is what these sources give.
    write(&from, text)?;
    Ok(built)
}

/// Name and text of every file of the module.
fn sources(dir: &Path) -> Result<Vec<(String, String)>> {
    let entries = fs::read_dir(dir).with_context(|| format!("{}", dir.display()))?;
    let mut sources = Vec::new();
    for entry in entries {
        let entry = entry?;
        let text = fs::read_to_string(entry.path())
            .with_context(|| format!("{}: cannot be read", entry.path().display()))?;
        sources.push((entry.file_name().to_string_lossy().into_owned(), text));
    }
    sources.sort();
    Ok(sources)
}

/// The release that a bzImage names: the first word of the text that `kernel_version` points at
/// (Linux, Documentation/arch/x86/boot.rst). It is part of package names and of paths, so only
/// what Debian's releases consist of is let through.
pub fn release(image: &[u8]) -> Option<String> {
    const MAGIC: usize = 0x202;
    const KERNEL_VERSION: usize = 0x20e;
    /// What the pointer is relative to.
    const BASE: usize = 0x200;
    if image.get(MAGIC..MAGIC + 4)? != b"HdrS" {
        return None;
    }
    let pointer = image.get(KERNEL_VERSION..KERNEL_VERSION + 2)?;
    let at = BASE + usize::from(u16::from_le_bytes(pointer.try_into().ok()?));
    let text = image.get(at..)?.split(|byte| *byte == 0).next()?;
    let word = std::str::from_utf8(text).ok()?.split(' ').next()?;
    let fits = |c: char| c.is_ascii_alphanumeric() || "+-.~".contains(c);
    (word.starts_with(|c: char| c.is_ascii_digit()) && word.chars().all(fits))
        .then(|| word.to_owned())
}

#[cfg(test)]
mod tests {
    use super::release;

    fn image(version: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 0x400];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
        image[0x300..0x300 + version.len()].copy_from_slice(version);
        image
    }

    #[test]
    fn the_release_is_the_first_word() {
        let found = release(&image(b"6.12.95+deb12-cloud-amd64 (a@b) #1\0"));
        assert_eq!(found.as_deref(), Some("6.12.95+deb12-cloud-amd64"));
    }

    #[test]
    fn what_is_no_release_is_refused() {
        assert_eq!(release(&image(b"../etc x\0")), None);
        assert_eq!(release(&image(b"6.1/../.. x\0")), None);
        assert_eq!(release(&image(b"\0")), None);
        assert_eq!(release(b"MZ"), None);
        let mut cut = image(b"6.12 x\0");
        cut.truncate(0x2ff);
        assert_eq!(release(&cut), None);
    }
}
