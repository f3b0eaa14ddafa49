//! Modules of Debian's kernels for a guest's initramfs: exactly those of the kernel that is booted.
//!
//! They are in the package of that kernel's release, in one of its own from 7.1 on. The files are taken out of
//! it as they are, compressed, and kept in the cache.

use std::path::Path;

use anyhow::{Context, Result, bail};
use e2e::attestation::{MODULES, module_path};
use e2e::initramfs::Extra;

use crate::fetch::apt::{self, Archive};
use crate::fetch::lock;
use crate::fetch::sources::Debian;
use crate::layout::{Layout, read, write};
use crate::progress;
use crate::stress::{release, suites};

/// Where modules lie in a package, before and after `/usr` was merged.
const PLACES: [&str; 2] = ["lib/modules", "usr/lib/modules"];

/// The modules for attestation that go with `kernel`, a bzImage of Debian's.
pub fn obtain(layout: &Layout, kernel: &Path) -> Result<Vec<Extra>> {
    let release = release(&read(kernel)?).with_context(|| {
        format!(
            "{}: expected a bzImage whose header names its release",
            kernel.display()
        )
    })?;
    let dir = layout.cache.join("modules").join(&release);
    let complete = dir.join("complete");
    if !complete.is_file() {
        let _filling = lock(layout)?;
        fill(layout, &release, &dir)?;
        write(&complete, "")?;
    }
    MODULES
        .iter()
        .map(|module| (module, dir.join(module.name)))
        .filter(|(module, file)| !module.optional || file.is_file())
        .map(|(module, file)| {
            Ok(Extra {
                name: module_path(module),
                permissions: 0o644,
                data: read(&file)?,
            })
        })
        .collect()
}

/// Takes the modules of `release` out of its package into `dir`.
fn fill(layout: &Layout, release: &str, dir: &Path) -> Result<()> {
    let debian = Debian::of_this_machine()?;
    let suites = suites(release)?;
    let names = [
        format!("linux-modules-{release}"),
        format!("linux-image-{release}"),
    ];
    for suite in &suites {
        let archive = Archive::open(&debian, suite, &layout.cache)?;
        let Some(found) = names
            .iter()
            .find_map(|name| archive.offers(name).into_iter().next())
        else {
            continue;
        };
        let download = dir.join("download");
        let deb = archive.download(&found, &download)?;
        let step = progress::step(format!("unpack {}", found.package));
        let whole = download.join("unpacked");
        apt::unpack(&deb, &whole)?;
        let kernel = PLACES
            .map(|place| whole.join(place).join(release).join("kernel"))
            .into_iter()
            .find(|place| place.is_dir())
            .with_context(|| format!("{}: there are no modules in it", found.package))?;
        for module in &MODULES {
            let mut places = module.files.iter().map(|file| kernel.join(file));
            match places.find(|place| place.is_file()) {
                Some(file) => write(&dir.join(module.name), read(&file)?)?,
                None if module.optional => {}
                None => bail!("{}: has no {}", found.package, module.files.join(" or ")),
            }
        }
        std::fs::remove_dir_all(&download).with_context(|| format!("{}", download.display()))?;
        step.done("");
        return Ok(());
    }
    bail!(
        "{}: {} does not offer it (any more), and modules fit one kernel only; remove {} to fetch \
         a kernel that is offered",
        names.join(" or "),
        suites.join(", "),
        layout.cache.join("packages").display()
    )
}
