//! Where things are: the checkout, what is built, what is downloaded.
//!
//! Nothing is ever written into the tracked part of the checkout. Built things go below cargo's
//! target directory, downloads below the user's cache directory, so that a fresh clone on the same
//! machine does not download again.

use std::env;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The directories `xtask` works in.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The root of the checkout.
    pub root: PathBuf,
    /// Cargo's target directory.
    pub target: PathBuf,
    /// Images, ROM and initramfs: `target/turnstile`.
    pub artefacts: PathBuf,
    /// Downloads: `$TURNSTILE_CACHE`, or `turnstile` below the user's cache directory.
    pub cache: PathBuf,
}

impl Layout {
    /// Finds the directories and creates those that are written to.
    pub fn find() -> Result<Layout> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("xtask is not inside a checkout")?
            .to_path_buf();
        let target = match env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => root.join(dir),
            None => root.join("target"),
        };
        let artefacts = target.join("turnstile");
        let cache = env::var_os("TURNSTILE_CACHE")
            .map(|dir| root.join(dir))
            .or_else(|| env::var_os("XDG_CACHE_HOME").map(|dir| Path::new(&dir).join("turnstile")))
            .or_else(|| env::var_os("HOME").map(|dir| Path::new(&dir).join(".cache/turnstile")))
            .unwrap_or_else(|| target.join("turnstile-cache"));
        for dir in [&artefacts, &cache] {
            create_dir(dir)?;
        }
        Ok(Layout {
            root,
            target,
            artefacts,
            cache,
        })
    }
}

/// Creates `dir` and its parents; the error names it.
pub fn create_dir(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir)
        .with_context(|| format!("{}: the directory cannot be created", dir.display()))
}

/// Keeps other processes, and other threads, from what `path` stands for until the file is dropped; waits for
/// those that are at it.
pub fn lock(path: &Path) -> Result<File> {
    let file = File::create(path).with_context(|| format!("{}", path.display()))?;
    file.lock()
        .with_context(|| format!("{}: cannot be locked", path.display()))?;
    Ok(file)
}

/// Reads a whole file; the error names it.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("{}: the file cannot be read", path.display()))
}

/// Writes a whole file; the error names it.
pub fn write(path: &Path, data: impl AsRef<[u8]>) -> Result<()> {
    std::fs::write(path, data)
        .with_context(|| format!("{}: the file cannot be written", path.display()))
}
