//! A disk with an operating system, and the devices such a guest expects beside it.
//!
//! All of them are QEMU's own and reach memory by DMA. A confidential guest lets them reach shared
//! memory only, which the modern virtio interface with translated addresses (`iommu_platform`) tells
//! its drivers; NVMe needs no telling.

use std::path::PathBuf;
use std::process::Command;
use std::str::FromStr;

use anyhow::{Result, bail};

use super::config::option;

/// What makes a virtio device of QEMU fit for a confidential guest.
const VIRTIO: &str = "iommu_platform=on,disable-legacy=on";

/// How the disk is attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bus {
    /// virtio-blk.
    #[default]
    Virtio,
    /// NVMe.
    Nvme,
}

impl Bus {
    /// The name on command lines.
    pub const fn name(self) -> &'static str {
        match self {
            Bus::Virtio => "virtio",
            Bus::Nvme => "nvme",
        }
    }

    /// QEMU's device for it.
    fn device(self) -> String {
        match self {
            Bus::Virtio => format!("virtio-blk-pci,drive=disk,bootindex=0,{VIRTIO}"),
            Bus::Nvme => "nvme,drive=disk,bootindex=0,serial=turnstile".to_owned(),
        }
    }
}

impl FromStr for Bus {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Bus> {
        match text {
            "virtio" => Ok(Bus::Virtio),
            "nvme" => Ok(Bus::Nvme),
            _ => bail!("expected virtio or nvme"),
        }
    }
}

/// A disk that the guest's firmware boots from.
#[derive(Clone, Debug)]
pub struct Disk {
    /// A raw image. It is never written: what the guest writes lasts until the end of the run.
    pub file: PathBuf,
    /// How it is attached.
    pub bus: Bus,
    /// A shell script for the guest to run, which a disk made by `xtask` looks for in fw_cfg
    /// (`opt/turnstile/exec`).
    pub exec: Option<PathBuf>,
}

impl Disk {
    /// Adds the disk, a network card behind QEMU's user network and a source of randomness.
    pub(super) fn attach(&self, qemu: &mut Command) {
        qemu.arg("-drive")
            .arg(option(
                "if=none,id=disk,format=raw,snapshot=on,cache.no-flush=on,file=",
                &self.file,
            ))
            .args(["-device", &self.bus.device()])
            .args(["-netdev", "user,id=net", "-device"])
            // Without its own program the card is no boot device.
            .arg(format!("virtio-net-pci,netdev=net,romfile=,{VIRTIO}"))
            .args(["-device", &format!("virtio-rng-pci,{VIRTIO}")]);
        if let Some(script) = &self.exec {
            qemu.arg("-fw_cfg")
                .arg(option("name=opt/turnstile/exec,file=", script));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::{Bus, Disk};

    #[test]
    fn every_virtio_device_is_told_to_translate() {
        for bus in [Bus::Virtio, Bus::Nvme] {
            assert_eq!(bus.name().parse::<Bus>().unwrap(), bus);
            let mut qemu = Command::new("qemu");
            let disk = Disk {
                file: "/a,b".into(),
                bus,
                exec: Some("/exec".into()),
            };
            disk.attach(&mut qemu);
            let words: Vec<String> = qemu
                .get_args()
                .map(|word| word.to_string_lossy().into_owned())
                .collect();
            let virtio = words.iter().filter(|word| word.starts_with("virtio-"));
            for device in virtio {
                assert!(device.contains("iommu_platform=on"), "{device}");
            }
            assert!(
                words
                    .iter()
                    .any(|word| word.contains("snapshot=on") && word.ends_with("file=/a,,b"))
            );
            assert!(words.contains(&"name=opt/turnstile/exec,file=/exec".to_owned()));
        }
        assert!("scsi".parse::<Bus>().is_err());
    }
}
