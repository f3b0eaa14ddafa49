//! The disk with a real Debian: made once, kept in the cache, booted unmodified.
//!
//! | module | owns |
//! |---|---|
//! | [`recipe`] | what is in it: packages, added files, command line, GUIDs |
//! | [`tools`] | the programs that make it |
//! | [`root`] | the root file system |
//! | [`image`] | partitions and file systems |
//! | [`options`] | `xtask run --disk` |
//!
//! The image in the cache is never written again: machines run on a snapshot of it.

mod image;
mod options;
mod recipe;
mod root;
pub mod tools;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use e2e::guests::Kernel;

use crate::fetch::{apt, patiently};
use crate::layout::{Layout, create_dir, lock, write};
use crate::progress;
pub use options::DiskOptions;
use recipe::Recipe;
use tools::Tools;

/// Counts the ways in which a recipe was turned into an image; a new one makes old images stale.
const MAKING: u32 = 1;

/// Where the disk with `kernel` is, made or not.
fn place(layout: &Layout, recipe: &Recipe) -> PathBuf {
    let (kernel, key) = (recipe.kernel.name(), recipe.key(MAKING));
    layout
        .cache
        .join("disks")
        .join(format!("debian-{kernel}-{key}.img"))
}

/// The disk with `kernel`, if it was made before.
pub fn made(layout: &Layout, kernel: Kernel) -> Option<PathBuf> {
    Some(place(layout, &Recipe { kernel })).filter(|disk| disk.is_file())
}

/// The disk with `kernel`, made if need be.
pub fn obtain(layout: &Layout, kernel: Kernel) -> Result<PathBuf> {
    let recipe = Recipe { kernel };
    let disk = place(layout, &recipe);
    if disk.is_file() {
        return Ok(disk);
    }
    if !apt::is_root() {
        bail!(
            "{}: the disk is not made yet, and making a root file system needs root; run this once \
             as root or in a container, or give a disk of your own with --disk FILE",
            disk.display()
        );
    }
    let tools = Tools::obtain(layout)?;
    let dir = layout.cache.join("disks");
    create_dir(&dir)?;
    // One process makes disks at a time; held until the file is dropped.
    let _making = lock(&dir.join("lock"))?;
    if disk.is_file() {
        return Ok(disk);
    }
    let work = dir.join("work");
    make(&recipe, &tools, &work, &disk)?;
    clear(&work)?;
    Ok(disk)
}

/// Makes the disk in `work` and moves it to its place when it is complete.
fn make(recipe: &Recipe, tools: &Tools, work: &Path, disk: &Path) -> Result<()> {
    let root = patiently(|| {
        clear(work)?;
        create_dir(work)?;
        root::make(recipe, tools, work)
    })?;
    let step = progress::step("the disk image");
    let (command_line, release) = (work.join("cmdline"), work.join("uname"));
    write(&command_line, recipe.command_line())?;
    write(&release, &root.release)?;
    let uki = work.join("uki.efi");
    let sections = [
        (".osrel", root.dir.join("usr/lib/os-release")),
        (".uname", release),
        (".cmdline", command_line),
        (".initrd", root.initrd.clone()),
        (".linux", root.kernel.clone()),
    ];
    e2e::uki::write(&tools.uki, &sections, &uki)?;
    let image = work.join("disk.img");
    image::write(&uki, &root.dir, &tools.mke2fs, &image)?;
    fs::rename(&image, disk).with_context(|| format!("{}", disk.display()))?;
    step.done("");
    Ok(())
}

fn clear(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("{}: cannot be removed", dir.display()))
        }
        _ => Ok(()),
    }
}
