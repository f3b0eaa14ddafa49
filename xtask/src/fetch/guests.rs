//! The guests' kernels and firmware: which package each name stands for, and what `--kernel` and
//! `--firmware` were given.

use std::borrow::Cow;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Result, bail};
use e2e::guests::{Firmware, Kernel, TdFirmware};

use super::apt::Candidate;
use super::{Version, Wanted};
use crate::layout::Layout;

/// Suites with 6.12. Debian 12's backports come first: their kernel is the oldest, so the one with
/// the most that has been mended since.
const SUITES_6_12: &[&str] = &["bookworm-backports", "trixie"];
/// Suites with 7.2, or what came after it.
const SUITES_7_2: &[&str] = &["trixie-backports", "forky"];
/// Where the kernel lies in packages up to 7.0, and from then on.
const IN_BOOT: Cow<'static, str> = Cow::Borrowed("boot/vmlinuz-*");
const IN_MODULES: Cow<'static, str> = Cow::Borrowed("usr/lib/modules/*/vmlinuz");

static CLOUD_6_12: Wanted = Wanted {
    name: "kernel-6.12",
    package: "linux-image-cloud-amd64",
    suites: SUITES_6_12,
    version: Version::Series(Cow::Borrowed("6.12.")),
    keep: IN_BOOT,
    purpose: "the guest's kernel 6.12",
};
static GENERIC_6_12: Wanted = Wanted {
    name: "kernel-6.12-generic",
    package: "linux-image-amd64",
    suites: SUITES_6_12,
    version: Version::Series(Cow::Borrowed("6.12.")),
    keep: IN_BOOT,
    purpose: "the guest's generic kernel 6.12",
};
static CLOUD_7_2: Wanted = Wanted {
    name: "kernel-7.2",
    package: "linux-image-cloud-amd64",
    suites: SUITES_7_2,
    version: Version::SeriesOrLater("7.2"),
    keep: IN_MODULES,
    purpose: "the guest's kernel 7.2",
};
static GENERIC_7_2: Wanted = Wanted {
    name: "kernel-7.2-generic",
    package: "linux-image-amd64",
    suites: SUITES_7_2,
    version: Version::SeriesOrLater("7.2"),
    keep: IN_MODULES,
    purpose: "the guest's generic kernel 7.2",
};

static OVMF_2026_08: Wanted = Wanted {
    name: "ovmf-2026.08",
    package: "ovmf-generic",
    suites: &["forky", "sid"],
    version: Version::AtLeast("2026.08"),
    keep: Cow::Borrowed("usr/share/ovmf/OVMF.fd"),
    purpose: "the guest's firmware",
};
static OVMF_2025_02: Wanted = Wanted {
    name: "ovmf-2025.02",
    package: "ovmf",
    suites: &["trixie"],
    version: Version::Series(Cow::Borrowed("2025.02")),
    keep: Cow::Borrowed("usr/share/ovmf/OVMF.fd"),
    purpose: "the guest's firmware 2025.02",
};
static OVMF_TDX_2026_08: Wanted = Wanted {
    name: "ovmf-inteltdx-2026.08",
    package: "ovmf-inteltdx",
    suites: &["forky", "sid"],
    version: Version::AtLeast("2026.08"),
    keep: Cow::Borrowed("usr/share/ovmf/OVMF.inteltdx.ms.fd"),
    purpose: "the firmware of trust domains",
};

/// The package of `kernel`.
pub fn kernel(kernel: Kernel) -> &'static Wanted {
    match kernel {
        Kernel::Cloud6_12 => &CLOUD_6_12,
        Kernel::Generic6_12 => &GENERIC_6_12,
        Kernel::Cloud7_2 => &CLOUD_7_2,
        Kernel::Generic7_2 => &GENERIC_7_2,
    }
}

/// The package of `firmware`.
pub fn firmware(firmware: Firmware) -> &'static Wanted {
    match firmware {
        Firmware::Ovmf2026_08 => &OVMF_2026_08,
        Firmware::Ovmf2025_02 => &OVMF_2025_02,
    }
}

/// The package of `firmware`.
pub fn td_firmware(firmware: TdFirmware) -> &'static Wanted {
    match firmware {
        TdFirmware::Ovmf2026_08 => &OVMF_TDX_2026_08,
    }
}

/// `firmware` as it is booted here: Debian's build for TDX with the empty variable store of its build for
/// everything. With the keys that it comes with, Secure Boot is on, and a kernel that is started
/// directly is refused ([decision 024](../../../docs/decisions/024-stock-firmware-empty-variables.md)).
pub fn obtain_td_firmware(layout: &Layout, firmware: TdFirmware) -> Result<PathBuf> {
    let wanted = td_firmware(firmware);
    let code = wanted.obtain(layout)?;
    let store = OVMF_2026_08.obtain(layout)?;
    let place = layout.artefacts.join(format!("{}.fd", wanted.name));
    e2e::image::write_with_variables(&code, &store, &place)?;
    Ok(place)
}

/// What an option of `xtask run` was given: a name of ours, or a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice<T> {
    /// One of Debian's.
    Named(T),
    /// The user's own.
    File(PathBuf),
}

/// Reads an option's value: what is no name of ours is a file. A file of such a name is reached by
/// `./NAME`.
pub fn choice<T: FromStr>(text: &str) -> Result<Choice<T>, std::convert::Infallible> {
    Ok(match text.parse() {
        Ok(named) => Choice::Named(named),
        Err(_) => Choice::File(text.into()),
    })
}

impl<T: Copy> Choice<T> {
    /// Fails if a file was chosen that is not there; `what` was expected.
    pub fn check(&self, what: &str) -> Result<()> {
        match self {
            Choice::File(file) if !file.is_file() => bail!(
                "{}: expected {what}, there is no such file; check the path, or give a name \
                 that --help lists",
                file.display()
            ),
            _ => Ok(()),
        }
    }

    /// The file itself, fetched if need be as the package that `package` tells.
    pub fn obtain(&self, layout: &Layout, package: fn(T) -> &'static Wanted) -> Result<PathBuf> {
        self.file_or(|named| package(named).obtain(layout))
    }

    /// The file itself, or what `named` makes of the name.
    pub fn file_or(&self, named: impl FnOnce(T) -> Result<PathBuf>) -> Result<PathBuf> {
        match self {
            Choice::Named(name) => named(*name),
            Choice::File(file) => Ok(file.clone()),
        }
    }
}

/// The package that holds what `found` only leads to. A kernel's meta package depends on the image
/// of one version; from 7.1 on that image is a meta package too, and the file is in
/// `linux-binary-VERSION`.
pub fn behind(found: &Candidate) -> Option<String> {
    if !found.package.starts_with("linux-image-") {
        return None;
    }
    let versioned = |name: &str, stem: &str| {
        let rest = name.strip_prefix(stem)?;
        rest.starts_with(|c: char| c.is_ascii_digit())
            .then(|| name.to_owned())
    };
    let mut names = found
        .depends
        .split([',', '|'])
        .filter_map(|dependency| dependency.split_whitespace().next());
    names.find_map(|name| {
        versioned(name, "linux-binary-")
            .or_else(|| versioned(name, "linux-image-").filter(|name| *name != found.package))
    })
}

#[cfg(test)]
mod tests {
    use e2e::guests::Kernel;

    use super::{Choice, behind, choice};
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
        for flavour in ["cloud-amd64", "amd64"] {
            let image = format!("linux-image-6.12.95+deb12-{flavour}");
            let meta = candidate(
                &format!("linux-image-{flavour}"),
                &format!("{image} (= 6.12.95-1~bpo12+1)"),
            );
            assert_eq!(behind(&meta), Some(image.clone()));
            assert_eq!(behind(&candidate(&image, "kmod, initramfs-tools")), None);
        }
    }

    #[test]
    fn a_split_kernel_is_followed_to_its_binary() {
        let meta = candidate(
            "linux-image-cloud-amd64",
            "linux-base-cloud-amd64 (= 7.2.12-1), linux-image-7.2.12+deb14-cloud-amd64 (= 7.2.12-1)",
        );
        let image = behind(&meta).unwrap();
        assert_eq!(image, "linux-image-7.2.12+deb14-cloud-amd64");
        let image = candidate(
            &image,
            "dracut | initramfs-tools (>= 0.120), linux-base-7.2.12+deb14-cloud-amd64 (= 1), \
             linux-binary-7.2.12+deb14-cloud-amd64 (= 7.2.12-1)",
        );
        let binary = behind(&image).unwrap();
        assert_eq!(binary, "linux-binary-7.2.12+deb14-cloud-amd64");
        assert_eq!(behind(&candidate(&binary, "linux-base-7.2.12")), None);
    }

    #[test]
    fn other_packages_stand_for_themselves() {
        assert_eq!(behind(&candidate("busybox-static", "libc6 (>= 2)")), None);
    }

    #[test]
    fn what_is_no_name_is_a_file() {
        assert_eq!(choice("7.2"), Ok(Choice::Named(Kernel::Cloud7_2)));
        assert_eq!(choice::<Kernel>("./7.2"), Ok(Choice::File("./7.2".into())));
    }
}
