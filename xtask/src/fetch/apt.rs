//! apt with a private state: the machine's own configuration, lists and cache stay as they are.
//!
//! Each [`Archive`] is one suite of the Debian mirror with its own package lists below the cache
//! directory. Everything that comes out of it was checked by apt against the signature of the suite's
//! `InRelease` file; nothing is downloaded by any other way. Packages are unpacked into the cache,
//! never installed; the one exception is QEMU (`qemu.rs`).

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::patiently;
use super::sources::Debian;
use crate::command::{self, telling_line};
use crate::layout::{create_dir, write};
use crate::progress;

/// One or more suites of the mirror, with package lists of their own.
#[derive(Debug)]
pub struct Archive {
    name: String,
    dir: PathBuf,
    /// Whether packages already installed on this machine count (for installing), or the archive is
    /// looked at alone (for downloading).
    with_system: bool,
}

/// A version of a package that an archive offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub package: String,
    pub version: String,
    /// Size of the package file in bytes.
    pub size: u64,
    /// The `Depends` field, as it is written.
    pub depends: String,
}

impl Archive {
    /// Reads the package lists of one suite, for downloading from it.
    pub fn open(debian: &Debian, suite: &str, cache: &Path) -> Result<Archive> {
        Archive::update(debian, suite, &[suite.to_owned()], cache, false)
    }

    /// Reads the package lists of several suites, for installing from them on this machine.
    pub fn open_for_install(debian: &Debian, suites: &[String], cache: &Path) -> Result<Archive> {
        Archive::update(debian, "install", suites, cache, true)
    }

    /// Reads the package lists of several suites as one archive called `name`, for downloading
    /// packages with all that they need ([`Archive::download_with_dependencies`]).
    pub fn open_several(
        debian: &Debian,
        name: &str,
        suites: &[String],
        cache: &Path,
    ) -> Result<Archive> {
        Archive::update(debian, name, suites, cache, false)
    }

    fn update(
        debian: &Debian,
        name: &str,
        suites: &[String],
        cache: &Path,
        with_system: bool,
    ) -> Result<Archive> {
        let dir = cache.join("apt").join(name);
        for sub in ["lists/partial", "archives/partial"] {
            create_dir(&dir.join(sub))?;
        }
        let lines: String = suites
            .iter()
            .map(|suite| debian.source_line(suite))
            .collect();
        write(&dir.join("sources.list"), lines)?;
        write(&dir.join("no-status"), "")?;
        let archive = Archive {
            name: name.to_owned(),
            dir,
            with_system,
        };
        patiently(|| archive.read_lists(suites))?;
        Ok(archive)
    }

    fn read_lists(&self, suites: &[String]) -> Result<()> {
        let step = progress::step(format!("package lists of {}", suites.join(", ")));
        let mut outcome = "";
        let mut update = self.apt("apt-get");
        let (mut ok, mut text) = command::watched(update.arg("update"), &step)?;
        if !fetched(ok, &text) && text.contains(" is expired ") {
            // A mirror that is frozen at some day (a snapshot, an offline copy) offers lists whose
            // validity has run out. What they say is signed all the same, and an old list can do no
            // more here than hide a newer package: each one wanted has a least version.
            outcome = "older than their validity, signatures are good";
            update.args(["-o", "Acquire::Check-Valid-Until=false"]);
            (ok, text) = command::watched(&mut update, &step)?;
        }
        if !fetched(ok, &text) {
            let reason = telling_line(&text, "");
            bail!(
                "apt: the package lists of {} could not be fetched: {reason}",
                self.name
            );
        }
        step.done(outcome);
        Ok(())
    }

    /// Every version of `package` that this archive offers, the newest first.
    pub fn offers(&self, package: &str) -> Vec<Candidate> {
        let text = command::output(self.apt("apt-cache").args(["show", package]));
        // apt-cache fails when there is no such package.
        text.map(|text| parse_offers(&text)).unwrap_or_default()
    }

    /// Downloads the package file into `into` and returns its path.
    pub fn download(&self, candidate: &Candidate, into: &Path) -> Result<PathBuf> {
        create_dir(into)?;
        patiently(|| self.try_download(candidate, into))
    }

    fn try_download(&self, candidate: &Candidate, into: &Path) -> Result<PathBuf> {
        let Candidate {
            package,
            version,
            size,
            ..
        } = candidate;
        let step = progress::transfer(format!("download {package} {version}"), *size);
        let log = self.dir.join("download.log");
        let file = fs::File::create(&log).with_context(|| format!("{}", log.display()))?;
        let mut child = self
            .apt("apt-get")
            .args(["download", &format!("{package}={version}")])
            .current_dir(into)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .context("apt-get cannot be started")?;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            step.at(bytes_below(into));
            sleep(Duration::from_millis(150));
        };
        match debs(into)?.pop() {
            Some(deb) if status.success() => {
                step.done(&format!("{:.1} MB", *size as f64 / 1e6));
                Ok(deb)
            }
            _ => {
                let text = fs::read_to_string(&log).unwrap_or_default();
                bail!(
                    "apt: {package} {version} was not downloaded: {}",
                    telling_line(&text, "")
                )
            }
        }
    }

    /// Downloads packages and everything they depend on, as if nothing were installed; returns the
    /// package files, in no order. They stay in the archive's own cache.
    pub fn download_with_dependencies(&self, packages: &[&str]) -> Result<Vec<PathBuf>> {
        patiently(|| self.try_download_with_dependencies(packages))
    }

    fn try_download_with_dependencies(&self, packages: &[&str]) -> Result<Vec<PathBuf>> {
        let step = progress::step(format!(
            "download {} and what it needs",
            packages.join(", ")
        ));
        let files = self.dir.join("archives");
        // What an earlier download left would be taken for a part of this one.
        for stale in debs(&files)? {
            fs::remove_file(&stale).with_context(|| format!("{}", stale.display()))?;
        }
        let mut apt = self.apt("apt-get");
        apt.args([
            "install",
            "--download-only",
            "--yes",
            "--no-install-recommends",
        ])
        .args(packages);
        let (ok, text) = command::watched(&mut apt, &step)?;
        if !ok {
            bail!(
                "apt: {} from {} could not be downloaded with what it needs: {}",
                packages.join(", "),
                self.name,
                telling_line(&text, "")
            );
        }
        let debs = debs(&files)?;
        step.done(&format!("{} packages", debs.len()));
        Ok(debs)
    }

    /// Installs a package and what it depends on, on this machine. Needs root.
    pub fn install(&self, package: &str, release: &str) -> Result<()> {
        patiently(|| self.try_install(package, release))
    }

    fn try_install(&self, package: &str, release: &str) -> Result<()> {
        let step = progress::step(format!("install {package} from {release}"));
        let mut apt = self.apt("apt-get");
        apt.args(["install", "--yes", "--no-install-recommends", "-t", release])
            .args([
                "-o",
                "Dpkg::Options::=--force-confold",
                "-o",
                "Dpkg::Use-Pty=0",
                package,
            ])
            .env("DEBIAN_FRONTEND", "noninteractive");
        let (ok, text) = command::watched(&mut apt, &step)?;
        write(&self.dir.join("install.log"), &text)?;
        if !ok {
            bail!(
                "apt: {package} could not be installed: {}; the whole output is in {}",
                telling_line(&text, ""),
                self.dir.join("install.log").display()
            );
        }
        step.done("");
        Ok(())
    }

    /// An apt program that works on this archive's state only.
    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let mut option = |name: &str, value: &str| {
            command.arg("-o").arg(format!("{name}={value}"));
        };
        let path = |sub: &str| self.dir.join(sub).display().to_string();
        option("Dir::Etc::SourceList", &path("sources.list"));
        option("Dir::Etc::SourceParts", "-");
        option("Dir::Etc::Preferences", "-");
        option("Dir::Etc::PreferencesParts", "-");
        option("Dir::State::Lists", &path("lists"));
        option("Dir::Cache", &path(""));
        option("Acquire::Languages", "none");
        option("Acquire::Retries", "3");
        // A machine that has just started may be updating itself.
        option("DPkg::Lock::Timeout", "600");
        if !self.with_system {
            option("Dir::State::Status", &path("no-status"));
        }
        if is_root() {
            // The unprivileged download user cannot enter a cache below root's home.
            option("APT::Sandbox::User", "root");
        }
        command.env("LC_ALL", "C.UTF-8");
        command
    }

    /// The suite, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// Whether an update fetched everything: apt-get ends with success even when it could not reach the
/// mirror, and says so in its lines only.
fn fetched(success: bool, output: &str) -> bool {
    success && !output.lines().any(|line| line.starts_with("Err:"))
}

/// Unpacks a package file below `into`, without running its scripts.
pub fn unpack(deb: &Path, into: &Path) -> Result<()> {
    create_dir(into)?;
    command::output(Command::new("dpkg-deb").arg("--extract").arg(deb).arg(into))
        .with_context(|| format!("{}: the package cannot be unpacked", deb.display()))?;
    Ok(())
}

/// Whether Debian's version order puts `version` at or after `minimum`.
pub fn at_least(version: &str, minimum: &str) -> bool {
    Command::new("dpkg")
        .args(["--compare-versions", version, "ge", minimum])
        .status()
        .is_ok_and(|status| status.success())
}

/// Whether this process may install packages.
pub fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
}

/// The stanzas of `apt-cache show`.
fn parse_offers(text: &str) -> Vec<Candidate> {
    let parse = |stanza: &str| {
        let field = |name: &str| {
            stanza
                .lines()
                .filter_map(|line| line.split_once(": "))
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value.trim().to_owned())
        };
        Some(Candidate {
            package: field("Package")?,
            version: field("Version")?,
            size: field("Size")
                .and_then(|size| size.parse().ok())
                .unwrap_or(0),
            depends: field("Depends").unwrap_or_default(),
        })
    };
    text.split("\n\n").filter_map(parse).collect()
}

/// The package files in `dir`.
fn debs(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).with_context(|| format!("{}", dir.display()))?;
    Ok(entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "deb"))
        .collect())
}

/// Bytes of all files below `dir`; what cannot be read counts as nothing.
fn bytes_below(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else {
        return 0;
    };
    entries
        .filter_map(Result::ok)
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => bytes_below(&entry.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::{Candidate, parse_offers};

    #[test]
    fn every_stanza_is_an_offer() {
        let text = "Package: a\nVersion: 1:2~b\nDepends: c (= 1), d\nSize: 42\nDescription: x\n y: z\n\n\
                    Package: a\nVersion: 1\n\n";
        let offer = |version: &str, size, depends: &str| Candidate {
            package: "a".into(),
            version: version.into(),
            size,
            depends: depends.into(),
        };
        assert_eq!(
            parse_offers(text),
            [offer("1:2~b", 42, "c (= 1), d"), offer("1", 0, "")]
        );
        assert!(parse_offers("").is_empty());
    }
}
