//! The Rust toolchain for the bare-metal crates (`x86_64-unknown-none`).
//!
//! In order of preference: the target's precompiled `core` and `alloc`, installed already or by
//! `rustup target add`; otherwise the standard library's source, built by cargo (`-Zbuild-std`). The
//! source is taken from the toolchain's `rust-src` component or, where rustup's server cannot be
//! reached, from Debian's `rust-src` package of exactly the same version.

use std::borrow::Cow;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::command;
use crate::fetch::{Version, Wanted, lock};
use crate::layout::{Layout, create_dir};
use crate::progress;

/// The target of everything that runs below an operating system.
pub const BARE_TARGET: &str = "x86_64-unknown-none";

/// How long `rustup target add` may take before the other way is gone.
const RUSTUP_PATIENCE: Duration = Duration::from_secs(180);

/// How the bare-metal crates are compiled on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BareTarget {
    /// With the target's precompiled libraries.
    Precompiled,
    /// With `core` and `alloc` compiled from the toolchain's library source.
    FromSource,
}

/// The Rust compiler in use.
#[derive(Debug)]
pub struct Toolchain {
    /// Release number, such as `1.95.0`.
    pub release: String,
    sysroot: PathBuf,
}

impl Toolchain {
    /// Asks the compiler that cargo would use in the checkout.
    pub fn find(layout: &Layout) -> Result<Toolchain> {
        let rustc = || {
            let mut rustc = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
            rustc.current_dir(&layout.root);
            rustc
        };
        let version = command::output(rustc().arg("--version"))?;
        let release = version
            .split_whitespace()
            .nth(1)
            .with_context(|| format!("rustc --version: expected a version, found {version:?}"))?
            .to_owned();
        let sysroot = command::output(rustc().args(["--print", "sysroot"]))?
            .trim()
            .into();
        Ok(Toolchain { release, sysroot })
    }

    /// What is ready on this machine without fetching anything.
    pub fn ready(&self) -> Option<BareTarget> {
        if self
            .sysroot
            .join("lib/rustlib")
            .join(BARE_TARGET)
            .join("lib")
            .is_dir()
        {
            Some(BareTarget::Precompiled)
        } else if self.library().join("core/src/lib.rs").is_file()
            && self.library().join("Cargo.lock").is_file()
        {
            Some(BareTarget::FromSource)
        } else {
            None
        }
    }

    /// Makes the bare-metal target buildable, fetching what is missing.
    pub fn prepare(&self, layout: &Layout) -> Result<BareTarget> {
        if let Some(ready) = self.ready() {
            return Ok(ready);
        }
        if self.rustup_target_add(layout) && self.ready() == Some(BareTarget::Precompiled) {
            return Ok(BareTarget::Precompiled);
        }
        self.library_from_debian(layout)?;
        self.ready().with_context(|| {
            format!(
                "{}: the library source was unpacked but is not complete; install it with: \
                 rustup component add rust-src",
                self.library().display()
            )
        })
    }

    /// `rustup target add`; says whether it worked. No rustup and no network are no errors here.
    fn rustup_target_add(&self, layout: &Layout) -> bool {
        let step = progress::step(format!("rustup target add {BARE_TARGET}"));
        let child = Command::new("rustup")
            .args(["target", "add", BARE_TARGET])
            .current_dir(&layout.root)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(mut child) = child else {
            step.done("no rustup here");
            return false;
        };
        let started = Instant::now();
        loop {
            match child.try_wait() {
                Ok(Some(status)) if status.success() => {
                    step.done("");
                    return true;
                }
                Ok(None) if started.elapsed() < RUSTUP_PATIENCE => {
                    sleep(Duration::from_millis(100))
                }
                _ => break,
            }
        }
        // Either it has ended, and the kill does nothing, or it has used up its time.
        let _ = child.kill();
        let _ = child.wait();
        step.done("not available; the library source is taken instead");
        false
    }

    /// Puts the library source of Debian's `rust-src` where cargo looks for it.
    fn library_from_debian(&self, layout: &Layout) -> Result<()> {
        let source = Wanted {
            name: "rust-src",
            package: "rust-src",
            suites: &[
                "trixie-backports",
                "forky",
                "sid",
                "trixie",
                "bookworm-backports",
            ],
            version: Version::Series(Cow::Owned(format!("{}+", self.release))),
            keep: Cow::Owned(format!("usr/src/rustc-{}/library", self.release)),
            purpose: "the standard library's source",
        }
        .obtain(layout)
        .with_context(|| {
            format!(
                "the target {BARE_TARGET} is not installed; where rustup's server can be reached \
                 this helps: rustup target add {BARE_TARGET}"
            )
        })?;
        let _unpacking = lock(layout)?;
        let library = self.library();
        if let Some(parent) = library.parent() {
            create_dir(parent)?;
        }
        if self.ready().is_some() {
            // Another run was faster.
            return Ok(());
        }
        if library.exists() {
            bail!(
                "{}: incomplete library source; remove it and try again",
                library.display()
            );
        }
        let step = progress::step("library source into the toolchain");
        command::output(Command::new("cp").arg("-R").arg(&source).arg(&library))?;
        step.done("");
        Ok(())
    }

    /// Where cargo looks for the library source.
    fn library(&self) -> PathBuf {
        self.sysroot.join("lib/rustlib/src/rust/library")
    }
}

impl BareTarget {
    /// `cargo SUBCOMMAND` for the bare-metal target, in release mode.
    pub fn cargo(self, root: &Path, subcommand: &str) -> Command {
        self.cargo_of(root, &cargo_home(root), subcommand)
    }

    /// The same with another home of cargo's. What is built says nothing of either place: what it is
    /// measured as must not depend on who built it. Flags of the user's own are left out, as they would take
    /// the place of those in `.cargo/config.toml`.
    pub fn cargo_of(self, root: &Path, home: &Path, subcommand: &str) -> Command {
        let mut cargo = cargo(root);
        cargo
            .env("CARGO_HOME", home)
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .args([subcommand, "--release", "--target", BARE_TARGET])
            .args(["--config", &nameless(root, home)]);
        if self == BareTarget::FromSource {
            // Only these two options of cargo need the unlock; no crate uses an unstable feature.
            cargo.env("RUSTC_BOOTSTRAP", "1").args([
                "-Zbuild-std=core,alloc",
                "-Zbuild-std-features=compiler-builtins-mem",
            ]);
        }
        cargo
    }
}

/// Where cargo keeps its sources and settings, as seen from the checkout.
pub fn cargo_home(root: &Path) -> PathBuf {
    env::var_os("CARGO_HOME")
        .map(|home| root.join(home))
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")))
        .unwrap_or_default()
}

/// The setting of cargo's by which the names of the checkout, and of the places where cargo keeps sources, do
/// not come into what is built: messages of panics name files.
fn nameless(root: &Path, home: &Path) -> String {
    let registries = fs::read_dir(home.join("registry/src"))
        .into_iter()
        .flatten()
        .filter_map(|entry| Some((entry.ok()?.path(), "crates")));
    let flags: Vec<String> = registries
        .chain([(root.to_path_buf(), "turnstile")])
        .map(|(place, name)| format!("--remap-path-prefix={}={name}", place.display()))
        // A string of Rust's in quotes is one of TOML's.
        .map(|flag| format!("{flag:?}"))
        .collect();
    format!("target.{BARE_TARGET}.rustflags=[{}]", flags.join(","))
}

/// `cargo` in the checkout, as a child of the cargo that runs `xtask`.
pub fn cargo(root: &Path) -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root);
    // `cargo run` describes xtask itself in these; a build must not depend on them.
    for (name, _) in env::vars_os() {
        if name
            .to_str()
            .is_some_and(|n| n.starts_with("CARGO_PKG_") || n.starts_with("CARGO_MANIFEST_"))
        {
            cargo.env_remove(name);
        }
    }
    cargo
}
