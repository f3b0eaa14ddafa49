//! The programs that make the disk: found in `PATH`, or installed from Debian.
//!
//! Root makes root file systems, so root is who runs this; what is missing is installed as QEMU is.
//! mmdebstrap itself is one Perl script and is unpacked, not installed.

use std::borrow::Cow;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use e2e::uki;

use crate::fetch::apt::{self, Archive};
use crate::fetch::sources::Debian;
use crate::fetch::{self, Version, Wanted};
use crate::layout::Layout;

use super::recipe::SUITE;

/// The script that makes a root file system with apt.
static MMDEBSTRAP: Wanted = Wanted {
    name: "mmdebstrap",
    package: "mmdebstrap",
    suites: &["bookworm", SUITE],
    version: Version::Any,
    keep: Cow::Borrowed("usr/bin/mmdebstrap"),
    purpose: "the program that makes root file systems",
};

/// The PE program that a UKI begins with.
static STUB: Wanted = Wanted {
    name: "systemd-stub",
    package: "systemd-boot-efi",
    suites: &[SUITE],
    version: Version::AtLeast("255"),
    keep: Cow::Borrowed("usr/lib/systemd/boot/efi/linuxx64.efi.stub"),
    purpose: "the stub of unified kernel images",
};

/// What the disk is made with.
#[derive(Debug)]
pub struct Tools {
    /// Perl, to run [`mmdebstrap`](Tools::mmdebstrap).
    pub perl: PathBuf,
    /// The script.
    pub mmdebstrap: PathBuf,
    /// Makes ext4.
    pub mke2fs: PathBuf,
    /// Makes the UKI.
    pub uki: uki::Tools,
}

impl Tools {
    /// Finds everything, fetching and installing what is missing.
    pub fn obtain(layout: &Layout) -> Result<Tools> {
        let perl = program(layout, "perl", "perl")?;
        if !has_modules(&perl) {
            // A small container has perl-base only.
            install(layout, "perl")?;
            if !has_modules(&perl) {
                bail!(
                    "{}: has no Pod::Usage even after installing the package perl; is another perl \
                     before Debian's in PATH?",
                    perl.display()
                );
            }
        }
        Ok(Tools {
            perl,
            mmdebstrap: MMDEBSTRAP.obtain(layout)?,
            mke2fs: program(layout, "mke2fs", "e2fsprogs")?,
            uki: for_uki(layout)?,
        })
    }
}

/// Finds what UKIs are made with, fetching and installing what is missing.
pub fn for_uki(layout: &Layout) -> Result<uki::Tools> {
    Ok(uki::Tools {
        objcopy: program(layout, "objcopy", "binutils")?,
        stub: STUB.obtain(layout)?,
    })
}

/// Whether `perl` has the modules that mmdebstrap uses and that `perl-base` lacks.
fn has_modules(perl: &Path) -> bool {
    Command::new(perl)
        .args(["-MPod::Usage", "-MMath::BigInt", "-MTime::HiRes", "-e", "1"])
        .output()
        .is_ok_and(|output| output.status.success())
}

/// `name` in `PATH` or where only root's `PATH` leads; `package` is installed if it is not there.
fn program(layout: &Layout, name: &str, package: &str) -> Result<PathBuf> {
    if let Some(found) = find(name) {
        return Ok(found);
    }
    install(layout, package)?;
    find(name).with_context(|| format!("{name} is not in PATH even after installing {package}"))
}

fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")])
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

fn install(layout: &Layout, package: &str) -> Result<()> {
    if !apt::is_root() {
        bail!(
            "{package} is needed to make a disk and only root may install it; as root: apt-get \
             install --no-install-recommends {package}"
        );
    }
    let debian = Debian::of_this_machine()?;
    let _filling = fetch::lock(layout)?;
    Archive::open_for_install(
        &debian,
        std::slice::from_ref(&debian.codename),
        &layout.cache,
    )?
    .install(package, &debian.codename)
}
