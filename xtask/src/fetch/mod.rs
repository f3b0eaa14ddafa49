//! The packages that `xtask` obtains by name, and where they lie once unpacked.
//!
//! Owns the list of what is taken from Debian ([`Wanted`]) and the package cache. A package found in
//! the cache is used without asking the network; removing the cache directory fetches afresh. Only
//! one process fills the cache at a time.

pub mod apt;
pub mod sources;

use std::borrow::Cow;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use apt::{Archive, Candidate};
use sources::Debian;

use crate::layout::{Layout, create_dir, write};
use crate::progress;

/// A package to be taken from Debian, unpacked and used in place.
#[derive(Debug)]
pub struct Wanted {
    /// Name of the package; for a kernel the meta package, which is followed to the image itself.
    pub package: &'static str,
    /// Suites that may have it, best first.
    pub suites: &'static [&'static str],
    /// Versions that will do.
    pub version: Version,
    /// The only part of the package that is kept, relative to its root; a whole directory or a file.
    /// The last component may end in `*`.
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
}

impl Version {
    fn admits(&self, version: &str) -> bool {
        match self {
            Version::Any => true,
            Version::AtLeast(minimum) => apt::at_least(version, minimum),
            Version::Series(series) => version.starts_with(series.as_ref()),
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Version::Any => f.write_str("any version"),
            Version::AtLeast(minimum) => write!(f, "{minimum} or newer"),
            Version::Series(series) => write!(f, "{series}*"),
        }
    }
}

/// The firmware: the first version with the IGVM parameter area that hides the paravisor's memory
/// and without the calling-area MSR mistake of older builds.
pub static OVMF: Wanted = Wanted {
    package: "ovmf-generic",
    suites: &["forky", "sid"],
    version: Version::AtLeast("2026.08"),
    keep: Cow::Borrowed("usr/share/ovmf/OVMF.fd"),
    purpose: "the guest's firmware",
};

/// The guest kernel: lazy acceptance and SVSM client code of the 6.12 series.
pub static KERNEL: Wanted = Wanted {
    package: "linux-image-cloud-amd64",
    suites: &["bookworm-backports", "trixie"],
    version: Version::Series(Cow::Borrowed("6.12.")),
    keep: Cow::Borrowed("boot/vmlinuz-*"),
    purpose: "the guest's kernel",
};

/// The guest's userspace.
pub static BUSYBOX: Wanted = Wanted {
    package: "busybox-static",
    suites: &["bookworm", "trixie"],
    version: Version::Any,
    keep: Cow::Borrowed("bin/busybox"),
    purpose: "the guest's userspace",
};

/// Everything that a run needs besides QEMU and the toolchain.
pub static ALL: [&Wanted; 3] = [&OVMF, &KERNEL, &BUSYBOX];

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
        for suite in self.suites {
            let archive = match Archive::open(&debian, suite, &layout.cache) {
                Ok(archive) => archive,
                Err(error) => {
                    refused.push(format!("{suite}: {error:#}"));
                    continue;
                }
            };
            match self.choose(&archive) {
                Ok(candidate) => return self.fetch(layout, &archive, &candidate),
                Err(reason) => refused.push(format!("{suite}: {reason}")),
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
    fn choose(&self, archive: &Archive) -> Result<Candidate, String> {
        let found = self.fitting(archive, self.package)?;
        match image_behind(&found) {
            Some(image) => self.fitting(archive, &image),
            None => Ok(found),
        }
    }

    /// The newest version of `package` in `archive` that will do.
    fn fitting(&self, archive: &Archive, package: &str) -> Result<Candidate, String> {
        let offers = archive.offers(package);
        if offers.is_empty() {
            return Err(format!("has no {package}"));
        }
        let versions: Vec<String> = offers.iter().map(|offer| offer.version.clone()).collect();
        offers
            .into_iter()
            .find(|offer| self.version.admits(&offer.version))
            .ok_or_else(|| {
                format!(
                    "has {package} {}, expected {}",
                    versions.join(" and "),
                    self.version
                )
            })
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
        layout.cache.join("packages").join(self.package)
    }
}

/// The cache is filled by one process at a time; the lock is held until the file is dropped.
pub fn lock(layout: &Layout) -> Result<fs::File> {
    let path = layout.cache.join("lock");
    let file = fs::File::create(&path).with_context(|| format!("{}", path.display()))?;
    file.lock()
        .with_context(|| format!("{}: cannot be locked", path.display()))?;
    Ok(file)
}

/// The package with the kernel image that a kernel meta package stands for.
fn image_behind(meta: &Candidate) -> Option<String> {
    let stem = meta.package.strip_suffix("-cloud-amd64")?;
    let name = meta
        .depends
        .split([',', '|'])
        .next()?
        .split_whitespace()
        .next()?;
    let specific = name.strip_prefix(stem)?.strip_prefix('-')?;
    specific
        .starts_with(|c: char| c.is_ascii_digit())
        .then(|| name.to_owned())
}

/// The entry below `root` that `pattern` names; its last component may end in `*`.
fn find(root: &Path, pattern: &str) -> Option<PathBuf> {
    let path = root.join(pattern);
    let Some(prefix) = path
        .file_name()?
        .to_str()?
        .strip_suffix('*')
        .map(str::to_owned)
    else {
        return path.exists().then_some(path);
    };
    let mut found: Vec<PathBuf> = fs::read_dir(path.parent()?)
        .ok()?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| {
            path.file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|n| n.starts_with(&prefix))
        })
        .collect();
    found.sort();
    found.pop()
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
    use super::image_behind;
    use crate::fetch::apt::Candidate;

    fn candidate(package: &str, depends: &str) -> Candidate {
        Candidate {
            package: package.into(),
            version: "6.12.1-1".into(),
            size: 0,
            depends: depends.into(),
        }
    }

    #[test]
    fn a_kernel_meta_package_is_followed_to_its_image() {
        let meta = candidate(
            "linux-image-cloud-amd64",
            "linux-image-6.12.95+deb12-cloud-amd64 (= 6.12.95-1~bpo12+1)",
        );
        assert_eq!(
            image_behind(&meta).as_deref(),
            Some("linux-image-6.12.95+deb12-cloud-amd64")
        );
    }

    #[test]
    fn other_packages_stand_for_themselves() {
        assert_eq!(
            image_behind(&candidate("busybox-static", "libc6 (>= 2)")),
            None
        );
        let image = candidate("linux-image-6.12.95-cloud-amd64", "kmod, initramfs-tools");
        assert_eq!(image_behind(&image), None);
    }
}
