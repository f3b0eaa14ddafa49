//! What a scenario is given and what it returns.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use igvm_build::sidecar::Sidecar;
use protocols::launch::Fault;
use protocols::report::{Outcome, Report};

use crate::image::Recipe;
use crate::vm::{Config, Console, Finished, Linux, Settings};

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
    /// Debian's OVMF.
    pub ovmf: PathBuf,
    /// Debian's kernel.
    pub kernel: PathBuf,
    /// Debian's static busybox.
    pub busybox: PathBuf,
    /// The `xtask` program itself, for scenarios about what it says.
    pub xtask: PathBuf,
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
            run: Box::new(run),
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
    /// violation, and its RMP agrees with the paravisor's map.
    pub fn good_run(&mut self, finished: &Finished, sidecar: &Sidecar) -> Result<()> {
        let report = finished.report()?;
        self.measured(finished, sidecar);
        self.check("no violations", report.violations.total() == 0, || {
            format!("{:?}", report.violations)
        });
        if sidecar.map_descriptor.is_some() {
            self.referee_agrees(report);
        }
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

    fn referee_agrees(&mut self, report: &Report) {
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
    /// Builds an image into the scenario's directory.
    pub fn image(
        &self,
        paravisor: &Path,
        firmware: Option<&Path>,
        fault: Fault,
    ) -> Result<(PathBuf, Sidecar)> {
        let file = self.dir.join("image.igvm");
        let sidecar = Recipe {
            paravisor,
            firmware,
            fault,
        }
        .write(&file)?;
        Ok((file, sidecar))
    }

    /// A machine of 4 GiB and one virtual processor, without an operating system. The referee is on
    /// if the image has a map to compare.
    pub fn machine(&self, image: PathBuf, sidecar: &Sidecar, settings: Settings) -> Config {
        Config {
            qemu: self.artefacts.qemu.clone(),
            rom: self.artefacts.rom.clone(),
            image,
            settings: Settings {
                map_descriptor: sidecar.map_descriptor,
                ..settings
            },
            memory: "4G".into(),
            vcpus: 1,
            linux: None,
            console: Console::File,
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
        let (image, sidecar) = self.image(paravisor, Some(&self.artefacts.svsm_cases), fault)?;
        let settings = Settings {
            oracle: true,
            ..settings
        };
        let config = Config {
            vcpus: 2,
            ..self.machine(image, &sidecar, settings)
        };
        Ok((config, sidecar))
    }

    /// Debian's kernel with a userspace that runs `command`.
    pub fn linux(&self, command: &str) -> Result<Linux> {
        let busybox = fs::read(&self.artefacts.busybox)
            .with_context(|| format!("{}", self.artefacts.busybox.display()))?;
        let initrd = self.dir.join("initramfs.cpio");
        fs::write(&initrd, crate::initramfs::build(&busybox, Some(command)))
            .with_context(|| format!("{}", initrd.display()))?;
        Ok(Linux {
            kernel: self.artefacts.kernel.clone(),
            initrd,
            append: "console=ttyS0".into(),
        })
    }
}

/// How long a run of a bare-metal guest may take.
pub const GUEST_LIMIT: Duration = Duration::from_secs(300);
/// How long a boot of Linux may take.
pub const BOOT_LIMIT: Duration = Duration::from_secs(600);
