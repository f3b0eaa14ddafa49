//! Programs for the guest's userspace: compiled for this machine's own target, static, stripped.
//!
//! What `--kexec` puts into the guest is here as well: the program, the kernel that runs, and a
//! script that starts it anew with the same files.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args;
use e2e::initramfs::{Extra, kexec_files};

use crate::command::{self, tail};
use crate::layout::{Layout, read};
use crate::progress;
use crate::toolchain;

/// The target of the programs: a Linux with a C library that can be linked statically.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Compiles the program of the package `name`, which has its name.
pub fn program(layout: &Layout, name: &str) -> Result<PathBuf> {
    let step = progress::step(format!("build the guest's program {name}"));
    let mut cargo = toolchain::cargo(&layout.root);
    cargo
        .args(["build", "--release", "--package", name, "--bin", name])
        .args(["--target", TARGET, "--config", "profile.release.strip=true"])
        .env(
            "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS",
            "-Ctarget-feature=+crt-static",
        );
    let (ok, text) = command::watched(&mut cargo, &step)?;
    if !ok {
        bail!(
            "the guest's program {name} does not build (it needs a C compiler and a static C \
             library; Debian: apt-get install gcc libc6-dev):\n{}",
            tail(&text, 20).trim_end()
        );
    }
    step.done("");
    Ok(layout.target.join(TARGET).join("release").join(name))
}

/// Options of a command that can make the guest start another kernel.
#[derive(Clone, Copy, Debug, Args)]
#[group(id = "kexec_files")]
pub struct KexecOptions {
    /// Put the kernel and a way to start it anew into the guest: the command kexec-again, which
    /// takes words for the kernel's command line
    #[arg(long, conflicts_with_all = ["initrd", "disk"])]
    kexec: bool,
}

impl KexecOptions {
    /// The files to add for `kernel`; none unless asked for.
    pub fn extras(self, layout: &Layout, kernel: &Path) -> Result<Vec<Extra>> {
        if !self.kexec {
            return Ok(Vec::new());
        }
        Ok(kexec_files(
            read(&program(layout, "kexec")?)?,
            read(kernel)?,
        ))
    }
}
