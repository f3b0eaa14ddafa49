//! QEMU: found in `PATH`, or installed from Debian.
//!
//! The machine needs QEMU's SVM emulation as of 10.0. Only where the system has no QEMU, or Debian's
//! own is too old, is one installed; a QEMU that somebody put into `PATH` is never worked around.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command;
use crate::fetch::apt::{self, Archive};
use crate::fetch::sources::Debian;
use crate::fetch::{self};
use crate::layout::Layout;

/// Name of the program.
const PROGRAM: &str = "qemu-system-x86_64";
/// The Debian package that holds it.
const PACKAGE: &str = "qemu-system-x86";
/// The oldest major version whose SVM emulation the machine was written for.
const OLDEST_MAJOR: u32 = 10;

/// What `PATH` holds.
#[derive(Debug)]
pub enum Found {
    /// A QEMU that will do.
    Good(PathBuf, String),
    /// A QEMU that is too old.
    Old(PathBuf, String),
    /// None.
    Missing,
}

/// Looks for QEMU in `PATH` and asks for its version.
pub fn look() -> Result<Found> {
    let Some(path) = in_path(PROGRAM) else {
        return Ok(Found::Missing);
    };
    let text = command::output(Command::new(&path).arg("--version"))?;
    let version = parse_version(&text).with_context(|| {
        format!(
            "{}: expected \"QEMU emulator version N.N\", found {:?}; take it out of PATH",
            path.display(),
            text.lines().next().unwrap_or_default()
        )
    })?;
    let major = version
        .split('.')
        .next()
        .and_then(|major| major.parse().ok())
        .unwrap_or(0);
    Ok(if major >= OLDEST_MAJOR {
        Found::Good(path, version)
    } else {
        Found::Old(path, version)
    })
}

/// A QEMU that will do, installed if need be.
pub fn obtain(layout: &Layout) -> Result<PathBuf> {
    match look()? {
        Found::Good(path, _) => return Ok(path),
        Found::Old(path, version) if path != Path::new("/usr/bin").join(PROGRAM) => bail!(
            "{}: expected QEMU {OLDEST_MAJOR}.0 or newer, found {version}; take it out of PATH or \
             put a newer one before it",
            path.display()
        ),
        Found::Old(..) | Found::Missing => {}
    }
    let debian = Debian::of_this_machine().with_context(needed)?;
    let release = release_with_qemu(&debian);
    if !apt::is_root() {
        bail!(
            "{}; only root may install it. As root: {}",
            needed(),
            by_hand(&debian, &release)
        );
    }
    let _filling = fetch::lock(layout)?;
    let mut suites = vec![debian.codename.clone()];
    if release != debian.codename {
        suites.push(release.clone());
    }
    Archive::open_for_install(&debian, &suites, &layout.cache)?.install(PACKAGE, &release)?;
    match look()? {
        Found::Good(path, _) => Ok(path),
        Found::Old(path, version) => bail!(
            "{}: expected QEMU {OLDEST_MAJOR}.0 or newer, found {version} even after installing \
             {PACKAGE} from {release}",
            path.display()
        ),
        Found::Missing => bail!("{PROGRAM} is not in PATH even after installing {PACKAGE}"),
    }
}

/// What to type to get QEMU, for `doctor` and for those who are not root.
pub fn advice() -> String {
    match Debian::of_this_machine() {
        Ok(debian) => by_hand(&debian, &release_with_qemu(&debian)),
        Err(_) => format!("install QEMU {OLDEST_MAJOR}.0 or newer"),
    }
}

fn needed() -> String {
    format!("{PROGRAM} {OLDEST_MAJOR}.0 or newer is needed")
}

fn by_hand(debian: &Debian, release: &str) -> String {
    let add = if release == debian.codename {
        String::new()
    } else {
        format!(
            "echo 'deb {} {release} main' > /etc/apt/sources.list.d/{release}.list && ",
            debian.mirror
        )
    };
    format!("{add}apt-get update && apt-get install --no-install-recommends -t {release} {PACKAGE}")
}

/// The suite with a recent QEMU: Debian 12 has it in its backports only.
fn release_with_qemu(debian: &Debian) -> String {
    match debian.codename.as_str() {
        "bookworm" => "bookworm-backports".to_owned(),
        codename => codename.to_owned(),
    }
}

fn in_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// The version in the first line of `qemu-system-x86_64 --version`.
fn parse_version(text: &str) -> Option<String> {
    let version = text
        .strip_prefix("QEMU emulator version ")?
        .split_whitespace()
        .next()?;
    version
        .starts_with(|c: char| c.is_ascii_digit())
        .then(|| version.to_owned())
}

#[cfg(test)]
mod tests {
    use super::parse_version;

    #[test]
    fn the_version_is_the_word_after_the_title() {
        let text = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright\n";
        assert_eq!(parse_version(text).as_deref(), Some("10.0.2"));
        assert_eq!(parse_version("something else 3.1"), None);
    }
}
