//! The packages that `xtask` obtains by name, and where they lie once unpacked.
//!
//! Owns the list of what is taken from Debian ([`Wanted`]) and the package cache. A package found in
//! the cache is used without asking the network; removing the cache directory fetches afresh. Only
//! one process fills the cache at a time.

pub mod apt;
pub mod guests;
mod patience;
pub mod sources;

use std::borrow::Cow;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use e2e::guests::{Firmware, Kernel};

use apt::{Archive, Candidate};
use sources::Debian;

pub use patience::patiently;

use crate::layout::{self, Layout, create_dir, write};
use crate::progress;

/// A package to be taken from Debian, unpacked and used in place.
#[derive(Debug)]
pub struct Wanted {
    /// Its name in the cache; no two share one, though they may come from the same package.
    pub name: &'static str,
    /// Name of the package; for a kernel the meta package, which is followed to the image itself.
    pub package: &'static str,
    /// Suites that may have it, best first.
    pub suites: &'static [&'static str],
    /// Versions that will do.
    pub version: Version,
    /// The only part of the package that is kept, relative to its root; a whole directory or a file.
    /// A component may hold one `*`.
    pub keep: Cow<'static, str>,
    /// What it is for.
    pub purpose: &'static str,
}

/// Which versions of a package will do.
#[derive(Debug)]
pub enum Version {
    /// Any.
    Any,
    /// This or a later one, in Debian's order.
    AtLeast(&'static str),
    /// One that begins so.
    Series(Cow<'static, str>),
    /// One that begins so with a dot behind it; where no suite has one any more, a later one.
    SeriesOrLater(&'static str),
}

impl Version {
    fn admits(&self, version: &str) -> bool {
        match self {
            Version::Any => true,
            Version::AtLeast(minimum) => apt::at_least(version, minimum),
            Version::Series(series) => version.starts_with(series.as_ref()),
            Version::SeriesOrLater(series) => apt::at_least(version, series),
        }
    }

    /// What is looked for in all suites before the version is.
    fn preferred(&self) -> Option<Version> {
        match self {
            Version::SeriesOrLater(series) => Some(Version::Series(format!("{series}.").into())),
            Version::Any | Version::AtLeast(_) | Version::Series(_) => None,
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Version::Any => f.write_str("any version"),
            Version::AtLeast(minimum) => write!(f, "{minimum} or newer"),
            Version::Series(series) => write!(f, "{series}*"),
            Version::SeriesOrLater(series) => write!(f, "{series}.* or newer"),
        }
    }
}

/// The guest's userspace.
pub static BUSYBOX: Wanted = Wanted {
    name: "busybox-static",
    package: "busybox-static",
    suites: &["bookworm", "trixie"],
    version: Version::Any,
    keep: Cow::Borrowed("bin/busybox"),
    purpose: "the guest's userspace",
};

/// Everything that a plain run needs besides QEMU and the toolchain.
pub fn for_a_run() -> [&'static Wanted; 3] {
    [
        guests::firmware(Firmware::default()),
        guests::kernel(Kernel::default()),
        &BUSYBOX,
    ]
}

impl Wanted {
    /// The kept file, if the package is in the cache already, and the version it came from.
    pub fn cached(&self, layout: &Layout) -> Option<(PathBuf, String)> {
        let dir = self.dir(layout);
        let version = fs::read_to_string(dir.join("version"))
            .ok()?
            .trim()
            .to_owned();
        let file = find(&dir.join("files"), &self.keep)?;
        Some((file, version))
    }

    /// The kept file, fetched if need be.
    pub fn obtain(&self, layout: &Layout) -> Result<PathBuf> {
        if let Some((file, _)) = self.cached(layout) {
            return Ok(file);
        }
        let _filling = lock(layout)?;
        if let Some((file, _)) = self.cached(layout) {
            return Ok(file);
        }
        let debian = Debian::of_this_machine()?;
        let mut refused = Vec::new();
        let mut archives = Vec::new();
        for suite in self.suites {
            let preferred = self.version.preferred();
            let version = preferred.as_ref().unwrap_or(&self.version);
            match Archive::open(&debian, suite, &layout.cache) {
                Ok(archive) => match self.choose(&archive, version) {
                    Ok(candidate) => return self.fetch(layout, &archive, &candidate),
                    Err(reason) => {
                        refused.push(format!("{suite}: {reason}"));
                        archives.push(archive);
                    }
                },
                Err(error) => refused.push(format!("{suite}: {error:#}")),
            }
        }
        // Suites move on; what is preferred may be in none of them any more.
        for archive in &archives {
            if let Ok(candidate) = self.choose(archive, &self.version) {
                return self.fetch(layout, archive, &candidate);
            }
        }
        bail!(
            "{}: {} was not found in {} ({})",
            self.package,
            self.purpose,
            debian.mirror,
            refused.join("; ")
        )
    }

    /// The package in `archive` that will do, or why there is none.
    fn choose(&self, archive: &Archive, version: &Version) -> Result<Candidate, String> {
        let mut found = fitting(archive, self.package, version)?;
        while let Some(next) = guests::behind(&found) {
            found = fitting(archive, &next, version)?;
        }
        Ok(found)
    }

    fn fetch(&self, layout: &Layout, archive: &Archive, found: &Candidate) -> Result<PathBuf> {
        let dir = self.dir(layout);
        let (download, files) = (dir.join("download"), dir.join("files"));
        for stale in [&download, &files] {
            remove_dir(stale)?;
        }
        let deb = archive.download(found, &download)?;
        let step = progress::step(format!("unpack {}", found.package));
        let whole = download.join("unpacked");
        apt::unpack(&deb, &whole)?;
        let kept = find(&whole, &self.keep).with_context(|| {
            format!(
                "{}: expected {} in the package; it is not there",
                found.package, self.keep
            )
        })?;
        let place = files.join(kept.strip_prefix(&whole)?);
        if let Some(parent) = place.parent() {
            create_dir(parent)?;
        }
        fs::rename(&kept, &place).with_context(|| format!("{}", place.display()))?;
        remove_dir(&download)?;
        // Written last: it says that the rest is complete.
        write(
            &dir.join("version"),
            format!("{} ({})\n", found.version, archive.name()),
        )?;
        step.done("");
        Ok(place)
    }

    fn dir(&self, layout: &Layout) -> PathBuf {
        layout.cache.join("packages").join(self.name)
    }
}

/// The newest version of `package` in `archive` that will do.
fn fitting(archive: &Archive, package: &str, version: &Version) -> Result<Candidate, String> {
    let offers = archive.offers(package);
    if offers.is_empty() {
        return Err(format!("has no {package}"));
    }
    let versions: Vec<String> = offers.iter().map(|offer| offer.version.clone()).collect();
    offers
        .into_iter()
        .find(|offer| version.admits(&offer.version))
        .ok_or_else(|| {
            format!(
                "has {package} {}, expected {}",
                versions.join(" and "),
                version
            )
        })
}

/// The cache is filled by one process at a time; the lock is held until the file is dropped.
pub fn lock(layout: &Layout) -> Result<fs::File> {
    layout::lock(&layout.cache.join("lock"))
}

/// The entry below `root` that `pattern` names; each component may hold one `*`. Of several the last
/// in the order of names.
fn find(root: &Path, pattern: &str) -> Option<PathBuf> {
    let (component, rest) = match pattern.split_once('/') {
        Some((component, rest)) => (component, Some(rest)),
        None => (pattern, None),
    };
    let below = |path: PathBuf| match rest {
        Some(rest) => find(&path, rest),
        None => path.exists().then_some(path),
    };
    let Some((prefix, suffix)) = component.split_once('*') else {
        return below(root.join(component));
    };
    let fits = |name: &str| {
        name.len() >= prefix.len() + suffix.len()
            && name.starts_with(prefix)
            && name.ends_with(suffix)
    };
    let mut names: Vec<String> = fs::read_dir(root)
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| fits(name))
        .collect();
    names.sort();
    names
        .into_iter()
        .rev()
        .find_map(|name| below(root.join(name)))
}

fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("{}: cannot be removed", dir.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use e2e::guests::{Firmware, Kernel, TdFirmware};

    use super::{BUSYBOX, Layout, Version, find, for_a_run, guests};

    #[test]
    fn a_pattern_may_leave_out_part_of_any_component() {
        let root = Layout::find().unwrap().artefacts.join("find-test");
        let _ = fs::remove_dir_all(&root);
        for file in [
            "boot/config-1",
            "boot/vmlinuz-1",
            "lib/1/other",
            "lib/2/vmlinuz",
        ] {
            let file = root.join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, "").unwrap();
        }
        let found = |pattern: &str| {
            let path = find(&root, pattern)?;
            Some(path.strip_prefix(&root).unwrap().display().to_string())
        };
        assert_eq!(found("boot/vmlinuz-*").as_deref(), Some("boot/vmlinuz-1"));
        assert_eq!(found("lib/*/vmlinuz").as_deref(), Some("lib/2/vmlinuz"));
        assert_eq!(found("lib/*/other").as_deref(), Some("lib/1/other"));
        assert_eq!(found("boot").as_deref(), Some("boot"));
        assert_eq!(found("boot/initrd-*"), None);
        assert_eq!(found("lib/*/initrd"), None);
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn a_series_is_preferred_to_what_came_after() {
        let version = Version::SeriesOrLater("7.2");
        let preferred = version.preferred().unwrap();
        for (found, is_series, will_do) in [
            ("7.2.12-1", true, true),
            ("7.3.4-1~bpo13+1", false, true),
            ("7.20.1-1", false, true),
            ("7.1.9-1", false, false),
            ("6.12.95-1", false, false),
        ] {
            assert_eq!(preferred.admits(found), is_series, "{found}");
            assert_eq!(version.admits(found), will_do, "{found}");
        }
        assert!(Version::Any.preferred().is_none());
    }

    #[test]
    fn names_in_the_cache_are_unique() {
        let kernels = Kernel::ALL.map(|kernel| guests::kernel(kernel).name);
        let firmwares = Firmware::ALL.map(|firmware| guests::firmware(firmware).name);
        let mut names: Vec<&str> = kernels
            .into_iter()
            .chain(firmwares)
            .chain(TdFirmware::ALL.map(|firmware| guests::td_firmware(firmware).name))
            .chain([BUSYBOX.name])
            .collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
        assert!(
            for_a_run()
                .iter()
                .all(|wanted| names.contains(&wanted.name))
        );
    }
}
