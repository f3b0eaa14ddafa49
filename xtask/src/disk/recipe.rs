//! What the disk is made of: packages, and the few files that are added to them.
//!
//! Everything that shapes the image is in one [`Recipe`], so that its [`key`](Recipe::key) names the
//! image in the cache. The newest package versions of the day of making go in; removing the image
//! makes it afresh.

use e2e::guests::Kernel;
use e2e::initramfs::{EXIT_TRAILER, OUTPUT_BEGINS, USERSPACE_MARKER};
use sha2::{Digest, Sha256};

/// The Debian release of the disk.
pub const SUITE: &str = "trixie";
/// Where that release gets kernels later than its own from.
const BACKPORTS: &str = "trixie-backports";

/// GUID of the root partition, by which the kernel finds it.
pub const ROOT_GUID: &str = "7475726e-7374-496c-8572-6f6f74667331";
/// GUID of the EFI system partition.
pub const ESP_GUID: &str = "7475726e-7374-496c-8565-737000000001";
/// GUID of the whole disk.
pub const DISK_GUID: &str = "7475726e-7374-496c-8564-69736b000001";

/// Beyond the essential ones: an init with network and udev, a kernel, and what makes its initrd.
const PACKAGES: [&str; 9] = [
    "dbus",
    "initramfs-tools",
    "iproute2",
    "kmod",
    "login",
    "systemd",
    "systemd-sysv",
    "udev",
    "zstd",
];

/// A file that is added to the root file system.
#[derive(Clone, Copy, Debug)]
pub struct Added {
    /// Relative to the root.
    pub path: &'static str,
    /// What is written; the marks of `e2e::initramfs` are filled in.
    pub text: &'static str,
    /// Permission bits.
    pub mode: u32,
}

/// A symbolic link that is added to the root file system.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Relative to the root.
    pub path: &'static str,
    /// What it holds.
    pub target: &'static str,
}

/// The files.
pub const FILES: [Added; 9] = [
    file("etc/hostname", "turnstile\n"),
    // Empty, not absent: systemd makes an identity without asking questions on the console.
    file("etc/machine-id", ""),
    file(
        "etc/fstab",
        "PARTUUID=7475726e-7374-496c-8572-6f6f74667331 / ext4 defaults 0 0\n",
    ),
    // An emulated processor is slow, and slower still when others share it.
    file(
        "etc/systemd/system.conf.d/patience.conf",
        "[Manager]\nDefaultTimeoutStartSec=15min\nDefaultDeviceTimeoutSec=15min\n",
    ),
    file("etc/resolv.conf", "nameserver 10.0.2.3\n"),
    file(
        "etc/systemd/network/20-dhcp.network",
        "[Match]\nType=ether\n\n[Network]\nDHCP=ipv4\nLinkLocalAddressing=no\nIPv6AcceptRA=no\n",
    ),
    file(
        "etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf",
        "[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin root --noclear \
         --keep-baud 115200,57600,38400,9600 - ${TERM}\n",
    ),
    file(
        "etc/systemd/system/turnstile.service",
        "[Unit]\nDescription=The command that the host left in fw_cfg\n\
         Wants=network-online.target\nAfter=network-online.target\n\n\
         [Service]\nType=oneshot\nExecStart=/usr/local/sbin/turnstile\nTimeoutStartSec=infinity\n\n\
         [Install]\nWantedBy=multi-user.target\n",
    ),
    Added {
        path: "usr/local/sbin/turnstile",
        text: include_str!("guest/turnstile.sh"),
        mode: 0o755,
    },
];

/// The units that are enabled.
pub const LINKS: [Link; 3] = [
    Link {
        path: "etc/systemd/system/multi-user.target.wants/turnstile.service",
        target: "/etc/systemd/system/turnstile.service",
    },
    Link {
        path: "etc/systemd/system/multi-user.target.wants/systemd-networkd.service",
        target: "/usr/lib/systemd/system/systemd-networkd.service",
    },
    Link {
        path: "etc/systemd/system/network-online.target.wants/systemd-networkd-wait-online.service",
        target: "/usr/lib/systemd/system/systemd-networkd-wait-online.service",
    },
];

const fn file(path: &'static str, text: &'static str) -> Added {
    Added {
        path,
        text,
        mode: 0o644,
    }
}

impl Added {
    /// What is written.
    pub fn contents(&self) -> String {
        self.text
            .replace("@MARKER@", USERSPACE_MARKER)
            .replace("@BEGINS@", OUTPUT_BEGINS)
            .replace("@TRAILER@", EXIT_TRAILER)
    }
}

/// What one disk is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// The kernel in it.
    pub kernel: Kernel,
}

impl Recipe {
    /// The suites that packages come from.
    pub fn suites(&self) -> &'static [&'static str] {
        match self.kernel {
            Kernel::Cloud6_12 | Kernel::Generic6_12 => &[SUITE],
            Kernel::Cloud7_2 | Kernel::Generic7_2 => &[SUITE, BACKPORTS],
        }
    }

    /// The packages, the kernel's included, as apt is asked for them.
    pub fn packages(&self) -> Vec<String> {
        let kernel = match self.kernel {
            Kernel::Cloud6_12 => "linux-image-cloud-amd64".to_owned(),
            Kernel::Generic6_12 => "linux-image-amd64".to_owned(),
            Kernel::Cloud7_2 => format!("linux-image-cloud-amd64/{BACKPORTS}"),
            Kernel::Generic7_2 => format!("linux-image-amd64/{BACKPORTS}"),
        };
        let mut packages: Vec<String> = PACKAGES.map(str::to_owned).to_vec();
        packages.push(kernel);
        packages
    }

    /// The kernel command line in the UKI. Little is said on the console, whose every character costs
    /// a confidential guest several exits; `quiet` would silence the EFI stub as well.
    pub fn command_line(&self) -> String {
        let saying = "loglevel=4 systemd.show_status=auto";
        format!("root=PARTUUID={ROOT_GUID} ro console=ttyS0 {saying}")
    }

    /// Names the image: equal recipes have equal keys, different ones do not. `making` stands for
    /// what is done with the recipe.
    pub fn key(&self, making: u32) -> String {
        let mut hash = Sha256::new();
        let mut part = |text: &str| {
            // The length keeps neighbours apart.
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
        };
        part(&making.to_string());
        self.suites().iter().for_each(|suite| part(suite));
        self.packages().iter().for_each(|package| part(package));
        part(&self.command_line());
        for guid in [ROOT_GUID, ESP_GUID, DISK_GUID] {
            part(guid);
        }
        for file in FILES {
            part(file.path);
            part(&file.contents());
            part(&file.mode.to_string());
        }
        for link in LINKS {
            part(link.path);
            part(link.target);
        }
        let digest = hash.finalize();
        digest.iter().take(8).map(|b| format!("{b:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use e2e::guests::Kernel;

    use super::{FILES, ROOT_GUID, Recipe};

    #[test]
    fn every_recipe_has_its_own_key() {
        let keys: BTreeSet<String> = Kernel::ALL
            .into_iter()
            .flat_map(|kernel| [1, 2].map(|making| Recipe { kernel }.key(making)))
            .collect();
        assert_eq!(keys.len(), 2 * Kernel::ALL.len());
        assert!(keys.iter().all(|key| key.len() == 16));
    }

    #[test]
    fn files_agree_with_the_partition_table_and_have_no_marks_left() {
        let fstab = FILES.iter().find(|file| file.path == "etc/fstab").unwrap();
        assert!(fstab.contents().contains(ROOT_GUID));
        assert!(
            FILES
                .iter()
                .all(|file| !file.contents().contains('@') || file.path.contains("serial-getty"))
        );
    }
}
