//! Is the paravisor the same whoever builds it?
//!
//! It is built once more from a copy of the sources in another directory, with another home of cargo's, and
//! the two images are compared.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use e2e::image::Recipe;
use e2e::scenario::Check;
use protocols::launch::{Acceptance, Fault};

use crate::build;
use crate::command;
use crate::layout::{Layout, create_dir, read, write};
use crate::progress::Step;
use crate::toolchain::{BARE_TARGET, BareTarget, cargo_home};

/// The name for `--filter` and `--list`.
pub const NAME: &str = "build/elsewhere";

/// Builds in `dir`, and compares with what is built in the checkout.
pub fn perform(layout: &Layout, target: BareTarget, dir: &Path, step: &Step) -> Result<Vec<Check>> {
    let (root, home) = (dir.join("a checkout"), dir.join("home"));
    copy_sources(&layout.root, &root)?;
    let real = cargo_home(&layout.root);
    create_dir(&home)?;
    // The same sources under another name, so that nothing is downloaded again.
    symlink(real.join("registry"), home.join("registry"))
        .with_context(|| format!("{}: no link can be made", home.display()))?;
    let settings = real.join("config.toml");
    if settings.exists() {
        write(&home.join("config.toml"), read(&settings)?)?;
    }
    let mut cargo = target.cargo_of(&root, &home, "build");
    cargo
        .args(["--package", "svsm", "--bin", "svsm"])
        .env("CARGO_TARGET_DIR", root.join("target"));
    let (built, text) = command::watched(&mut cargo, step)?;
    write(&dir.join("cargo.log"), &text)?;
    let theirs = root.join("target").join(BARE_TARGET).join("release/svsm");
    let mut checks = vec![check("it builds there", built, "see cargo.log")];
    if built {
        let ours = image(&build::paravisor(layout, target, step)?)?;
        let theirs = image(&theirs)?;
        let same = format!("{} and {} bytes, not the same", ours.len(), theirs.len());
        checks.push(check("it is the same image", ours == theirs, &same));
        for (name, place) in [("checkout", &layout.root), ("cargo's home", &real)] {
            let place = place.as_os_str().as_encoded_bytes();
            let tells = ours.windows(place.len()).any(|bytes| bytes == place);
            checks.push(check(
                &format!("it does not name the {name}"),
                !tells,
                "it does",
            ));
        }
    }
    fs::remove_dir_all(&root).with_context(|| format!("{}: stays", root.display()))?;
    Ok(checks)
}

fn check(name: &str, holds: bool, failure: &str) -> Check {
    Check {
        name: name.to_owned(),
        failure: (!holds).then(|| failure.to_owned()),
    }
}

/// The image of a paravisor without a guest.
fn image(paravisor: &Path) -> Result<Vec<u8>> {
    let recipe = Recipe {
        paravisor,
        firmware: None,
        td_firmware: None,
        fault: Fault::NONE,
        acceptance: Acceptance::LAZY,
    };
    Ok(recipe.build()?.0.bytes)
}

/// Copies what git has, or would take.
fn copy_sources(from: &Path, to: &Path) -> Result<()> {
    let mut git = Command::new("git");
    git.current_dir(from).args([
        // A checkout may belong to another user.
        "-c",
        "safe.directory=*",
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]);
    let listed = command::output(&mut git)?;
    for name in listed.split('\0').filter(|name| !name.is_empty()) {
        let (source, place) = (from.join(name), to.join(name));
        // Removed, and not yet committed.
        if !source.is_file() {
            continue;
        }
        create_dir(place.parent().unwrap_or(to))?;
        fs::copy(&source, &place).with_context(|| format!("{}: not copied", source.display()))?;
    }
    Ok(())
}
