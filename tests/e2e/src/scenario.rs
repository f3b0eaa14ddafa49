//! What a scenario is given and what it returns.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use igvm_build::sidecar::Sidecar;
use protocols::launch::{Acceptance, Fault};
use protocols::report::{Event, Outcome, Report};

use crate::chip::Chip;
use crate::guests::{Firmware, Kernel};
use crate::image::Recipe;
use crate::initramfs::Extra;
use crate::uki;
use crate::vm::{Config, Console, Cores, Finished, Linux, Loader, Settings};

/// Everything that was built and fetched for the scenarios.
#[derive(Clone, Debug)]
pub struct Artefacts {
    /// The QEMU program.
    pub qemu: PathBuf,
    /// The machine's ROM.
    pub rom: PathBuf,
    /// The paravisor's ELF file.
    pub paravisor: PathBuf,
    /// The paravisor with deliberate faults, an ELF file.
    pub faulty_paravisor: PathBuf,
    /// The VMPL0 test program, an ELF file.
    pub isa_cases: PathBuf,
    /// The VMPL1 test guest, packed as a firmware.
    pub svsm_cases: PathBuf,
    /// The VMPL1 guest that counts what calls cost, packed as a firmware.
    pub svsm_counts: PathBuf,
    /// The VMPL1 guest that hands out its evidence, packed as a firmware.
    pub svsm_evidence: PathBuf,
    /// The test program for L1 of a trust domain, an ELF file.
    pub tdx_cases: PathBuf,
    /// The test guest for an L2 VM, packed as a firmware.
    pub l2_cases: PathBuf,
    /// The guest for an L2 VM that counts, packed as a firmware.
    pub l2_counts: PathBuf,
    /// The default firmware.
    pub ovmf: PathBuf,
    /// The firmware of trust domains, if a chosen scenario boots it.
    pub td_firmware: Option<PathBuf>,
    /// The firmware that the chosen scenarios need, the default one included.
    pub firmwares: BTreeMap<Firmware, PathBuf>,
    /// The kernels that the chosen scenarios need, the default one included.
    pub kernels: BTreeMap<Kernel, PathBuf>,
    /// The disks that the chosen scenarios need, by the kernel in them, or why one is not there.
    pub disks: BTreeMap<Kernel, Result<PathBuf, String>>,
    /// What UKIs are made with, if one of the chosen scenarios makes one, or why it is not there.
    pub uki: Option<Result<uki::Tools, String>>,
    /// Debian's static busybox.
    pub busybox: PathBuf,
    /// The stress program and its module, for the kernels of the chosen scenarios that run it.
    pub stress: BTreeMap<Kernel, Vec<Extra>>,
    /// The kernel modules for attestation, for the kernels of the chosen scenarios that load them.
    pub modules: BTreeMap<Kernel, Vec<Extra>>,
    /// The chip of the emulated security processor.
    pub chip: Chip,
    /// The `xtask` program itself, for scenarios about what it says.
    pub xtask: PathBuf,
}

impl Artefacts {
    /// A kernel that the scenario said it boots.
    pub fn kernel(&self, kernel: Kernel) -> Result<&Path> {
        let found = self.kernels.get(&kernel).map(PathBuf::as_path);
        found.with_context(|| format!("kernel {}: not fetched for this scenario", kernel.name()))
    }

    /// The disk with `kernel`, for a scenario that said it boots from it.
    pub fn disk(&self, kernel: Kernel) -> Result<&Path> {
        match self.disks.get(&kernel) {
            Some(Ok(disk)) => Ok(disk),
            Some(Err(reason)) => bail!("the disk with kernel {}: {reason}", kernel.name()),
            None => bail!("the disk with kernel {}: not asked for", kernel.name()),
        }
    }

    /// The firmware of trust domains, for a scenario that said it boots it.
    pub fn td_firmware(&self) -> Result<&Path> {
        let found = self.td_firmware.as_deref();
        found.context("OVMF for TDX: not fetched for this scenario")
    }

    /// What UKIs are made with, for a scenario that said it makes one.
    pub fn uki(&self) -> Result<&uki::Tools> {
        match &self.uki {
            Some(Ok(tools)) => Ok(tools),
            Some(Err(reason)) => bail!("what UKIs are made with: {reason}"),
            None => bail!("what UKIs are made with: not asked for"),
        }
    }

    /// A firmware that the scenario said it boots.
    pub fn firmware(&self, firmware: Firmware) -> Result<&Path> {
        let found = self.firmwares.get(&firmware).map(PathBuf::as_path);
        found.with_context(|| format!("OVMF {}: not fetched for this scenario", firmware.name()))
    }
}

/// What one scenario works with.
#[derive(Clone, Debug)]
pub struct Context {
    /// What it may use.
    pub artefacts: Artefacts,
    /// A directory of its own; exists and is empty.
    pub dir: PathBuf,
}

/// One scenario.
pub struct Scenario {
    /// `INTENT/NAME`, unique.
    pub name: String,
    /// How many of the computer's cores it keeps busy: one for each virtual processor of a machine
    /// that may use them all, one for any other machine, and for a program.
    pub weight: u32,
    /// Whether it is left out unless everything is asked for (`xtask test --full`).
    pub full_only: bool,
    /// The kernel it boots; the default one is there always.
    pub kernel: Kernel,
    /// The firmware it boots; the default one is there always.
    pub firmware: Firmware,
    /// Whether it boots the firmware of trust domains.
    pub trust_domain: bool,
    /// Whether it runs the stress program.
    pub stress: bool,
    /// Whether it loads the kernel's modules for attestation.
    pub modules: bool,
    /// Whether it boots its kernel from the disk.
    pub disk: bool,
    /// Whether it makes a unified kernel image.
    pub uki: bool,
    /// Does it. An error means that it could not be carried out, which is a failure as well.
    #[expect(
        clippy::type_complexity,
        reason = "a boxed closure, named nowhere else"
    )]
    pub run: Box<dyn Fn(&Context) -> Result<Findings> + Send + Sync>,
}

impl Scenario {
    /// A scenario that does `run`.
    pub fn new(
        name: impl Into<String>,
        run: impl Fn(&Context) -> Result<Findings> + Send + Sync + 'static,
    ) -> Scenario {
        Scenario {
            name: name.into(),
            weight: 1,
            full_only: false,
            kernel: Kernel::default(),
            firmware: Firmware::default(),
            trust_domain: false,
            stress: false,
            modules: false,
            disk: false,
            uki: false,
            run: Box::new(run),
        }
    }

    /// The same, which keeps so many of the computer's cores busy.
    #[must_use]
    pub fn weighing(self, cores: u32) -> Scenario {
        Scenario {
            weight: cores,
            ..self
        }
    }

    /// The same, booting `kernel`.
    #[must_use]
    pub fn booting(self, kernel: Kernel) -> Scenario {
        Scenario { kernel, ..self }
    }

    /// The same, started by `firmware`.
    #[must_use]
    pub fn started_by(self, firmware: Firmware) -> Scenario {
        Scenario { firmware, ..self }
    }

    /// The same, started by the firmware of trust domains.
    #[must_use]
    pub fn in_trust_domain(self) -> Scenario {
        Scenario {
            trust_domain: true,
            ..self
        }
    }

    /// The same, with the stress program in the guest.
    #[must_use]
    pub fn with_stress(self) -> Scenario {
        Scenario {
            stress: true,
            ..self
        }
    }

    /// The same, with the kernel's modules for attestation in the guest.
    #[must_use]
    pub fn with_modules(self) -> Scenario {
        Scenario {
            modules: true,
            ..self
        }
    }

    /// The same, booting from the disk.
    #[must_use]
    pub fn on_disk(self) -> Scenario {
        Scenario { disk: true, ..self }
    }

    /// The same, making a unified kernel image.
    #[must_use]
    pub fn with_uki(self) -> Scenario {
        Scenario { uki: true, ..self }
    }

    /// The same, left out unless everything is asked for.
    #[must_use]
    pub fn only_in_full(self) -> Scenario {
        Scenario {
            full_only: true,
            ..self
        }
    }
}

/// One thing that was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What should be so.
    pub name: String,
    /// What was found instead.
    pub failure: Option<String>,
}

/// All that a scenario checked.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    /// In the order of checking.
    pub checks: Vec<Check>,
}

impl Findings {
    /// Records whether `name` is so; `otherwise` tells what was found.
    pub fn check(&mut self, name: impl Into<String>, so: bool, otherwise: impl FnOnce() -> String) {
        let failure = (!so).then(otherwise);
        self.checks.push(Check {
            name: name.into(),
            failure,
        });
    }

    /// Records that two values should be equal.
    pub fn equal<T: PartialEq + std::fmt::Debug>(&mut self, name: &str, found: T, expected: T) {
        let so = found == expected;
        self.check(name, so, || {
            format!("expected {expected:?}, found {found:?}")
        });
    }

    /// What every good run has in common: the machine measured the image that was built, saw no
    /// violation, its RMP agrees with the paravisor's map, and its figures fit each other.
    pub fn good_run(&mut self, finished: &Finished, sidecar: &Sidecar) -> Result<()> {
        self.measured(finished, sidecar);
        self.lawful_run(finished, sidecar)
    }

    /// The same of a trust domain.
    pub fn good_td_run(&mut self, finished: &Finished, sidecar: &Sidecar) -> Result<()> {
        let digest = finished.launch.as_ref().map(|launch| launch.digest.clone());
        self.equal("MRTD as built", digest, sidecar.mrtd.clone());
        self.lawful_run(finished, sidecar)
    }

    fn lawful_run(&mut self, finished: &Finished, sidecar: &Sidecar) -> Result<()> {
        let report = finished.report()?;
        self.check("no violations", report.violations.total() == 0, || {
            format!("{:?}", report.violations)
        });
        if sidecar.map_descriptor.is_some() {
            self.referee_agrees(report);
        }
        crate::report_laws::check(self, finished, report);
        Ok(())
    }

    /// The digest printed when the image was built is the one the machine computed.
    pub fn measured(&mut self, finished: &Finished, sidecar: &Sidecar) {
        let digest = finished.launch.as_ref().map(|launch| launch.digest.clone());
        self.equal(
            "launch digest as built",
            digest,
            Some(sidecar.digest.clone()),
        );
    }

    /// The paravisor's map and the machine say the same of every page.
    pub fn referee_agrees(&mut self, report: &Report) {
        let verdict = report.referee.clone().unwrap_or_default();
        self.check("the referee looked at pages", verdict.checked > 0, || {
            "none".into()
        });
        self.check("the referee agrees", verdict.disagreements == 0, || {
            format!(
                "{} disagreements, such as {:?}",
                verdict.disagreements, verdict.first
            )
        });
    }

    /// A good run of an operating system under `vc=strict`: nobody left the guest for a reason that
    /// has no place in a boot, and the machine refused nothing.
    pub fn only_expected_exits(&mut self, finished: &Finished) -> Result<()> {
        let report = finished.report()?;
        for (vmpl, expected) in [(0, PARAVISOR_EXITS), (1, GUEST_EXITS)] {
            let kinds = report.counters.get(vmpl).map(|counters| &counters.exits);
            let strange: Vec<(&String, &u64)> = kinds
                .into_iter()
                .flatten()
                .filter(|(kind, _)| !expected.contains(&kind.as_str()))
                .collect();
            self.check(
                format!("only expected exits of VMPL{vmpl}"),
                strange.is_empty(),
                || format!("{strange:?}"),
            );
        }
        let refusal = finished.events.iter().find_map(|event| match event {
            Event::Refusal(refusal) => Some(refusal.text.clone()),
            _ => None,
        });
        self.equal("nothing was refused", refusal, None);
        Ok(())
    }

    /// The run ended so.
    pub fn ended(&mut self, finished: &Finished, outcome: Outcome) -> Result<()> {
        let report = finished.report()?;
        self.check(
            format!("ends by {outcome:?}"),
            report.outcome == outcome,
            || {
                let why = report
                    .termination
                    .as_ref()
                    .map_or(&report.reason, |t| &t.text);
                format!("{:?}: {why}", report.outcome)
            },
        );
        Ok(())
    }
}

impl Context {
    /// Builds an image into the scenario's directory. Its paravisor accepts memory on request.
    pub fn image(
        &self,
        paravisor: &Path,
        firmware: Option<&Path>,
        fault: Fault,
    ) -> Result<(PathBuf, Sidecar)> {
        self.image_of(Recipe {
            paravisor,
            firmware,
            td_firmware: None,
            fault,
            acceptance: Acceptance::LAZY,
        })
    }

    /// The same, with everything that can be chosen.
    pub fn image_of(&self, recipe: Recipe<'_>) -> Result<(PathBuf, Sidecar)> {
        let file = self.dir.join("image.igvm");
        let sidecar = recipe.write(&file)?;
        Ok((file, sidecar))
    }

    /// A machine of 4 GiB and one virtual processor, without an operating system. The referee is on
    /// if the image has a map to compare.
    pub fn machine(&self, image: PathBuf, sidecar: &Sidecar, settings: Settings) -> Config {
        let settings = Settings {
            map_descriptor: sidecar.map_descriptor,
            low_end: sidecar.low_end,
            ..settings
        };
        self.machine_of(image, settings)
    }

    /// The same without a paravisor in the image.
    pub fn machine_of(&self, image: PathBuf, settings: Settings) -> Config {
        Config {
            qemu: self.artefacts.qemu.clone(),
            rom: self.artefacts.rom.clone(),
            image,
            loader: Loader::Machine,
            settings,
            memory: "4G".into(),
            low_memory: None,
            vcpus: 1,
            cores: Cores::One,
            linux: None,
            disk: None,
            console: Console::File,
            chip: Some(self.artefacts.chip.clone()),
            debugger: None,
            dir: self.dir.clone(),
        }
    }

    /// The same machine with the test guest for SVSM calls above `paravisor`. That guest creates
    /// virtual processors, so there is a second one it may create.
    pub fn svsm_cases(
        &self,
        paravisor: &Path,
        fault: Fault,
        settings: Settings,
    ) -> Result<(Config, Sidecar)> {
        self.svsm_cases_with(paravisor, fault, settings, Acceptance::LAZY)
    }

    /// The same, with a paravisor that accepts memory so.
    pub fn svsm_cases_with(
        &self,
        paravisor: &Path,
        fault: Fault,
        settings: Settings,
        acceptance: Acceptance,
    ) -> Result<(Config, Sidecar)> {
        let (image, sidecar) = self.image_of(Recipe {
            paravisor,
            firmware: Some(&self.artefacts.svsm_cases),
            td_firmware: None,
            fault,
            acceptance,
        })?;
        let settings = Settings {
            oracle: true,
            ..settings
        };
        let config = Config {
            vcpus: 2,
            // It uses no FXRSTOR, and its processors shall meet.
            cores: Cores::All,
            ..self.machine(image, &sidecar, settings)
        };
        Ok((config, sidecar))
    }

    /// Debian's default kernel with a userspace that runs `command`.
    pub fn linux(&self, command: &str) -> Result<Linux> {
        self.linux_of(Kernel::default(), command)
    }

    /// A kernel of Debian's with a userspace that runs `command`.
    pub fn linux_of(&self, kernel: Kernel, command: &str) -> Result<Linux> {
        self.linux_with(kernel, command, &[])
    }

    /// The same, with more files.
    pub fn linux_with(&self, kernel: Kernel, command: &str, extras: &[Extra]) -> Result<Linux> {
        let busybox = fs::read(&self.artefacts.busybox)
            .with_context(|| format!("{}", self.artefacts.busybox.display()))?;
        let initrd = self.dir.join("initramfs.cpio");
        fs::write(
            &initrd,
            crate::initramfs::build(&busybox, Some(command), extras),
        )
        .with_context(|| format!("{}", initrd.display()))?;
        Ok(Linux {
            kernel: self.artefacts.kernel(kernel)?.to_owned(),
            initrd,
            append: crate::initramfs::COMMAND_LINE.into(),
        })
    }
}

/// Why the paravisor may leave the processor: RMP instructions arrive as #UD, accesses to memory
/// that the host has yet to give as nested page faults. It does no I/O and never halts.
const PARAVISOR_EXITS: &[&str] = &["intr", "msr", "nmi", "npf", "ud", "vmmcall"];
/// Why an operating system that is reflected its #VCs may leave it.
const GUEST_EXITS: &[&str] = &[
    "cpuid", "cr-write", "dr-read", "dr-write", "hlt", "intr", "io", "monitor", "msr", "mwait",
    "nmi", "npf", "rdpmc", "rdtsc", "ud", "vintr", "vmmcall", "wbinvd",
];

/// How long a run of a bare-metal guest may take.
pub const GUEST_LIMIT: Duration = Duration::from_secs(300);
/// How long a boot of Linux may take.
pub const BOOT_LIMIT: Duration = Duration::from_secs(600);
