//! The guests that are booted, by name: kernels and firmware as Debian ships them.
//!
//! Owns the names that `xtask run` takes and that scenarios carry. What package a name stands for,
//! and where it comes from, is `xtask`'s affair.

use std::str::FromStr;

/// A kernel of Debian's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kernel {
    /// 6.12, the build for clouds: few drivers, most of them built in.
    #[default]
    Cloud6_12,
    /// 6.12, the build for everything.
    Generic6_12,
    /// 7.2, the build for clouds; where Debian has left 7.2, what came after it. Its SVSM client differs from 6.12's in all that matters here:
    /// early calls, calling areas of secondary processors, kexec.
    Cloud7_2,
    /// 7.2, the build for everything.
    Generic7_2,
}

impl Kernel {
    /// All of them.
    pub const ALL: [Kernel; 4] = [
        Kernel::Cloud6_12,
        Kernel::Generic6_12,
        Kernel::Cloud7_2,
        Kernel::Generic7_2,
    ];

    /// The name on command lines and in the names of scenarios.
    pub const fn name(self) -> &'static str {
        match self {
            Kernel::Cloud6_12 => "6.12",
            Kernel::Generic6_12 => "6.12-generic",
            Kernel::Cloud7_2 => "7.2",
            Kernel::Generic7_2 => "7.2-generic",
        }
    }

    /// Whether a kernel that calls itself `release` is this one.
    pub fn is_release(self, release: &str) -> bool {
        let mut numbers = release.split(['.', '-', '+', '~']).map(str::parse::<u32>);
        let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
            return false;
        };
        match self {
            Kernel::Cloud6_12 | Kernel::Generic6_12 => (major, minor) == (6, 12),
            Kernel::Cloud7_2 | Kernel::Generic7_2 => (major, minor) >= (7, 2),
        }
    }
}

/// A build of OVMF of Debian's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Firmware {
    /// 2026.08: the first with the IGVM parameter area that tells it its memory map.
    #[default]
    Ovmf2026_08,
    /// 2025.02, as in Debian 13: takes its memory map from fw_cfg, and hands the MSR that holds the
    /// calling area on to the host.
    Ovmf2025_02,
}

impl Firmware {
    /// All of them.
    pub const ALL: [Firmware; 2] = [Firmware::Ovmf2026_08, Firmware::Ovmf2025_02];

    /// The name on command lines and in the names of scenarios.
    pub const fn name(self) -> &'static str {
        match self {
            Firmware::Ovmf2026_08 => "2026.08",
            Firmware::Ovmf2025_02 => "2025.02",
        }
    }
}

/// A firmware of Debian's for trust domains.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TdFirmware {
    /// OVMF 2026.08, the build for TDX.
    #[default]
    Ovmf2026_08,
}

impl TdFirmware {
    /// All of them.
    pub const ALL: [TdFirmware; 1] = [TdFirmware::Ovmf2026_08];

    /// The name on command lines.
    pub const fn name(self) -> &'static str {
        match self {
            TdFirmware::Ovmf2026_08 => "2026.08",
        }
    }
}

/// A name that stands for nothing here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unknown;

impl FromStr for Kernel {
    type Err = Unknown;

    fn from_str(text: &str) -> Result<Kernel, Unknown> {
        Kernel::ALL
            .into_iter()
            .find(|kernel| kernel.name() == text)
            .ok_or(Unknown)
    }
}

impl FromStr for Firmware {
    type Err = Unknown;

    fn from_str(text: &str) -> Result<Firmware, Unknown> {
        Firmware::ALL
            .into_iter()
            .find(|firmware| firmware.name() == text)
            .ok_or(Unknown)
    }
}

impl FromStr for TdFirmware {
    type Err = Unknown;

    fn from_str(text: &str) -> Result<TdFirmware, Unknown> {
        TdFirmware::ALL
            .into_iter()
            .find(|firmware| firmware.name() == text)
            .ok_or(Unknown)
    }
}

#[cfg(test)]
mod tests {
    use super::{Firmware, Kernel, TdFirmware, Unknown};

    #[test]
    fn a_kernel_is_known_by_what_it_calls_itself() {
        for (release, earlier, later) in [
            ("6.12.95+deb12-cloud-amd64", true, false),
            ("7.2.12+deb14-cloud-amd64", false, true),
            ("7.3.4+deb13-amd64", false, true),
            ("6.1.0-12-amd64", false, false),
            ("7.1.9+deb14-amd64", false, false),
            ("6.120.1", false, false),
            ("", false, false),
        ] {
            assert_eq!(Kernel::Cloud6_12.is_release(release), earlier, "{release}");
            assert_eq!(Kernel::Generic7_2.is_release(release), later, "{release}");
        }
    }

    #[test]
    fn every_name_is_read_back() {
        for kernel in Kernel::ALL {
            assert_eq!(kernel.name().parse(), Ok(kernel));
        }
        for firmware in Firmware::ALL {
            assert_eq!(firmware.name().parse(), Ok(firmware));
        }
        for firmware in TdFirmware::ALL {
            assert_eq!(firmware.name().parse(), Ok(firmware));
        }
        assert_eq!("6.1".parse::<Kernel>(), Err(Unknown));
        assert_eq!("".parse::<Firmware>(), Err(Unknown));
    }
}
