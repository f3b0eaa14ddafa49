//! The native platform: which way it is started, and what the paravisor says there.
//!
//! A QEMU that was built with IGVM support (10.1 or newer, `igvm-cfg` among its objects) loads the image
//! itself, without the machine. Any other QEMU runs the machine in plain mode, which does the same in a
//! guest without SEV-SNP.

use std::path::Path;
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context, Result, bail};

use super::{Config, Loader, Settings, Stage};

/// What an image is started on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Platform {
    /// The emulated SEV-SNP machine.
    #[default]
    Snp,
    /// The emulated machine as a trust domain.
    Tdx,
    /// No confidential hardware.
    Native,
}

impl FromStr for Platform {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Platform> {
        match text {
            "snp" => Ok(Platform::Snp),
            "tdx" => Ok(Platform::Tdx),
            "native" => Ok(Platform::Native),
            _ => bail!("expected snp, tdx or native"),
        }
    }
}

/// Whether this QEMU loads IGVM images.
fn loads_igvm(qemu: &Path) -> Result<bool> {
    let output = Command::new(qemu)
        .args(["-object", "help"])
        .output()
        .with_context(|| format!("{}: cannot be started", qemu.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().any(|line| line.trim() == "igvm-cfg"))
}

impl Config {
    /// The same for the image's native platform, by the way that this QEMU has.
    pub fn native(self) -> Result<Config> {
        let loader = if loads_igvm(&self.qemu)? {
            Loader::Qemu
        } else {
            Loader::Machine
        };
        Ok(Config {
            loader,
            settings: Settings {
                native: true,
                map_descriptor: None,
                low_end: None,
                ..self.settings
            },
            ..self
        })
    }

    /// Whether this is a run of the native platform.
    pub fn is_native(&self) -> bool {
        self.settings.native
    }

    /// The way, in words.
    pub fn way(&self) -> &'static str {
        match (self.is_native(), self.loader) {
            (false, _) if self.settings.tdx => "a trust domain, emulated by the machine",
            (false, _) => "SEV-SNP, emulated by the machine",
            (true, Loader::Qemu) => "native, loaded by QEMU itself (igvm-cfg)",
            (true, Loader::Machine) => {
                "native, by the machine's plain mode: this QEMU has no igvm-cfg"
            }
        }
    }
}

/// The stage that begins with a line of the paravisor's, natively: no machine tells it.
pub(super) fn stage(line: &str) -> Option<Stage> {
    let said = line.trim().strip_prefix("[svsm] ")?;
    if said.starts_with("Turnstile ") && said.contains(", native: ") {
        Some(Stage::Paravisor)
    } else if said.starts_with("all memory, ours too, is the firmware's") {
        Some(Stage::Firmware)
    } else {
        None
    }
}

/// The figures of the paravisor's last account (`svsm::native::rounds`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Census {
    /// 2 MiB validated.
    pub validated_2m: u64,
    /// 4 KiB validated.
    pub validated_4k: u64,
    /// 2 MiB rescinded.
    pub rescinded_2m: u64,
    /// 4 KiB rescinded.
    pub rescinded_4k: u64,
    /// 2 MiB refused because the simulated host holds 4 KiB pages.
    pub mismatches: u64,
    /// Pages validated while they were valid.
    pub double_validations: u64,
    /// All that no correct paravisor does.
    pub violations: u64,
    /// Pages on which map and simulated hardware disagree.
    pub disagreements: u64,
}

impl Census {
    /// Reads it from a console; none if it is not there.
    pub fn of(console: &str) -> Option<Census> {
        let line = console
            .lines()
            .find_map(|line| line.trim().strip_prefix("[svsm] census: "))?;
        let mut figures = line
            .split(|c: char| !c.is_ascii_digit())
            .filter(|digits| !digits.is_empty())
            .map(|digits| digits.parse::<u64>().ok());
        let mut next = || figures.next().flatten();
        // "validated A x 2 MiB and B x 4 KiB, rescinded C and D, E size mismatches, ...".
        let validated_2m = next()?;
        (next()? == 2).then_some(())?;
        let validated_4k = next()?;
        (next()? == 4).then_some(())?;
        Some(Census {
            validated_2m,
            validated_4k,
            rescinded_2m: next()?,
            rescinded_4k: next()?,
            mismatches: next()?,
            double_validations: next()?,
            violations: next()?,
            disagreements: next()?,
        })
    }

    /// Whether nothing is wrong.
    pub fn is_good(&self) -> bool {
        self.double_validations == 0 && self.violations == 0 && self.disagreements == 0
    }
}

#[cfg(test)]
mod tests {
    use super::{Census, Stage, stage};

    #[test]
    fn the_account_is_read_from_its_line() {
        let console = "BdsDxe\r\n[svsm] census: validated 700 x 2 MiB and 90000 x 4 KiB, rescinded 350 \
                       and 45000, 180 size mismatches, double validations 1, violations 3, \
                       disagreements 0\r\n";
        let census = Census::of(console).unwrap();
        assert_eq!((census.validated_2m, census.validated_4k), (700, 90_000));
        assert_eq!((census.rescinded_2m, census.rescinded_4k), (350, 45_000));
        assert_eq!((census.mismatches, census.double_validations), (180, 1));
        assert_eq!((census.violations, census.disagreements), (3, 0));
        assert!(!census.is_good());
        assert_eq!(Census::of("[svsm] census: of sheep"), None);
    }

    #[test]
    fn stages_are_the_paravisors_own_words() {
        assert_eq!(
            stage("[svsm] Turnstile 0.1.0, native: nothing\r"),
            Some(Stage::Paravisor)
        );
        assert_eq!(stage("[svsm] Turnstile 0.1.0 at VMPL0, 1 vCPU(s)"), None);
        assert_eq!(stage("Turnstile 0.1.0, native: "), None);
    }
}
