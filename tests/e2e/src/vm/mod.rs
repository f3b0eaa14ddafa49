//! One run of the emulated machine in QEMU, from start to report.
//!
//! Owns the QEMU process and the files it writes. [`Config`] says what to run; [`Running`] turns the
//! growing logs into [`Happening`]s in the order they are seen; [`Finished`] holds what there is to
//! assert. Used by `xtask run` and by every scenario, so both see the same machine.
//!
//! Invariant: a QEMU started here never outlives its [`Running`]; no other process is ever touched.

mod config;
mod cores;
mod disk;
mod exec;
mod native;
mod plain;
mod state;
mod tail;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use protocols::report::{self, Event, Launch, Report, StageName};

pub(crate) use config::option;
pub use config::{Backing, Config, Console, Linux, Loader, Logs, Settings, Trace, Vc};
pub use cores::Cores;
use cores::{Core, spawn_on_one};
pub use disk::{Bus, Disk};
use exec::ExecStream;
pub use native::{Census, Platform};
pub use plain::Plain;
use tail::{Lines, Tail};

use crate::initramfs::USERSPACE_MARKER;

/// How often the logs are looked at.
const POLL: Duration = Duration::from_millis(25);

/// The stages of a boot, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// The machine has started and launches the image.
    Machine,
    /// VMPL0 runs.
    Paravisor,
    /// The guest's firmware runs.
    Firmware,
    /// The guest's kernel (its EFI stub) has spoken.
    Kernel,
    /// The guest's init runs.
    Userspace,
}

impl Stage {
    /// For humans.
    pub const fn name(self) -> &'static str {
        match self {
            Stage::Machine => "machine",
            Stage::Paravisor => "paravisor",
            Stage::Firmware => "firmware",
            Stage::Kernel => "kernel",
            Stage::Userspace => "userspace",
        }
    }
}

/// Something that was seen while the machine runs.
#[derive(Clone, Debug)]
pub enum Happening {
    /// A stage began, this long after QEMU was started.
    Stage(Stage, Duration),
    /// The machine said something; stages and the report come on their own as well.
    Machine(Event),
    /// A line of the guest's console.
    Console(String),
    /// A piece of the output of the guest's command.
    Output(Vec<u8>),
}

/// A machine that runs.
#[derive(Debug)]
pub struct Running {
    child: Child,
    /// Held while it runs.
    _core: Option<Core>,
    started: Instant,
    vcpus: u32,
    machine: (Tail, Lines),
    console: (Tail, Lines),
    second: Tail,
    exec: ExecStream,
    seen: Finished,
}

/// What a run leaves behind.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Where its logs are.
    pub dir: PathBuf,
    /// The machine's last word; none if it did not get that far.
    pub report: Option<Report>,
    /// What the machine said about the launch.
    pub launch: Option<Launch>,
    /// Everything the machine said, but for its trace.
    pub events: Vec<Event>,
    /// When each stage began.
    pub stages: Vec<(Stage, Duration)>,
    /// The guest's console.
    pub console: String,
    /// What the guest's command printed; without an operating system, the second serial port.
    pub output: Vec<u8>,
    /// Exit status of the guest's command, if it came to its end.
    pub exec_status: Option<i32>,
    /// From QEMU's start to its end.
    pub wall: Duration,
    /// Whether the run was ended because its time was up.
    pub timed_out: bool,
    /// QEMU's exit status, unless it was ended because its time was up.
    pub qemu_status: Option<ExitStatus>,
}

impl Config {
    /// Starts QEMU.
    pub fn start(&self) -> Result<Running> {
        let always: [(&Path, &str); 3] = [
            (&self.qemu, "the QEMU program"),
            (&self.rom, "the machine's ROM"),
            (&self.image, "an IGVM image"),
        ];
        present(always)?;
        if let Some(linux) = &self.linux {
            present([
                (&linux.kernel as &Path, "a Linux kernel"),
                (&linux.initrd, "an initial root file system"),
            ])?;
        }
        if let Some(disk) = &self.disk {
            present([(&disk.file as &Path, "a disk image")])?;
        }
        let firmware = self.linux.is_some() || self.disk.is_some();
        let cores = match self.vcpus {
            1 => Cores::All,
            _ => self.cores,
        };
        Running::start(self.command()?, self.vcpus, cores, &self.dir, firmware)
    }

    /// Runs the machine to its end, or until `limit` has passed, telling `watch` what happens.
    pub fn run(&self, limit: Duration, watch: impl FnMut(&Happening)) -> Result<Finished> {
        self.start()?.watch(limit, watch)
    }
}

/// Fails if a file is not there, and says which and what it should be.
fn present<'a>(files: impl IntoIterator<Item = (&'a Path, &'a str)>) -> Result<()> {
    for (file, what) in files {
        if !file.is_file() {
            bail!(
                "{}: expected {what}, there is no such file; check the path, or make what is \
                 missing with: cargo xtask build",
                file.display()
            );
        }
    }
    Ok(())
}

impl Running {
    /// Starts `qemu`, which has `vcpus` processors, on `cores`; its logs are in `dir`. `firmware` tells
    /// whether a firmware writes to the second serial port before the guest's command does.
    fn start(
        mut qemu: Command,
        vcpus: u32,
        cores: Cores,
        dir: &Path,
        firmware: bool,
    ) -> Result<Running> {
        let logs = Logs::within(dir);
        let started = match cores {
            Cores::One => spawn_on_one(&mut qemu).map(|(child, core)| (child, Some(core))),
            Cores::All => qemu.spawn().map(|child| (child, None)).map_err(Into::into),
        };
        let (child, core) = started.with_context(|| {
            format!(
                "{}: cannot be started",
                qemu.get_program().to_string_lossy()
            )
        })?;
        Ok(Running {
            child,
            _core: core,
            started: Instant::now(),
            vcpus,
            machine: (Tail::new(&logs.machine), Lines::default()),
            console: (Tail::new(&logs.console), Lines::default()),
            second: Tail::new(&logs.second),
            exec: if firmware {
                ExecStream::behind_firmware()
            } else {
                ExecStream::default()
            },
            seen: Finished {
                dir: dir.to_owned(),
                report: None,
                launch: None,
                events: Vec::new(),
                stages: Vec::new(),
                console: String::new(),
                output: Vec::new(),
                exec_status: None,
                wall: Duration::ZERO,
                timed_out: false,
                qemu_status: None,
            },
        })
    }

    /// Follows it to its end, or until `limit` has passed.
    fn watch(mut self, limit: Duration, mut watch: impl FnMut(&Happening)) -> Result<Finished> {
        loop {
            let ended = self.ended()?;
            // Looked at once more after the end, so that the last words are not lost.
            self.look(&mut watch);
            if ended {
                return Ok(self.finish());
            }
            if self.started.elapsed() > limit {
                self.seen.timed_out = true;
                if let Some(questions) = &mut self.child.stdin {
                    let log = Logs::within(&self.seen.dir).state;
                    state::ask(questions, &log, self.vcpus);
                }
                return Ok(self.finish());
            }
            sleep(POLL);
        }
    }

    fn ended(&mut self) -> Result<bool> {
        self.seen.qemu_status = self.child.try_wait().context("QEMU cannot be waited for")?;
        Ok(self.seen.qemu_status.is_some())
    }

    fn look(&mut self, watch: &mut impl FnMut(&Happening)) {
        let (tail, lines) = &mut self.machine;
        for line in lines.push(&tail.read()) {
            // A line that is not an event is kept in the log only.
            if let Ok(event) = serde_json::from_str::<Event>(&line) {
                self.machine_said(event, watch);
            }
        }
        let (tail, lines) = &mut self.console;
        let bytes = tail.read();
        self.seen.console.push_str(&String::from_utf8_lossy(&bytes));
        for line in lines.push(&bytes) {
            if let Some(stage) = native::stage(&line) {
                self.stage(stage, watch);
            }
            if line.contains("EFI stub: ") || line.contains("Linux version ") {
                self.stage(Stage::Kernel, watch);
            }
            if line.contains(USERSPACE_MARKER) {
                self.stage(Stage::Userspace, watch);
            }
            watch(&Happening::Console(line));
        }
        let output = self.exec.push(&self.second.read());
        if !output.is_empty() {
            self.seen.output.extend_from_slice(&output);
            watch(&Happening::Output(output));
        }
    }

    fn machine_said(&mut self, event: Event, watch: &mut impl FnMut(&Happening)) {
        match &event {
            Event::Machine(_) => self.stage(Stage::Machine, watch),
            Event::Stage(stage) => match stage.name {
                StageName::Paravisor => self.stage(Stage::Paravisor, watch),
                StageName::Firmware => self.stage(Stage::Firmware, watch),
            },
            Event::Launch(launch) => self.seen.launch = Some(launch.clone()),
            Event::Report(report) => self.seen.report = Some((**report).clone()),
            Event::Progress(_) | Event::Log(_) | Event::Refusal(_) => {}
            // There may be millions; who wants them takes them as they come.
            Event::Trace(_) => {
                watch(&Happening::Machine(event));
                return;
            }
        }
        watch(&Happening::Machine(event.clone()));
        self.seen.events.push(event);
    }

    fn stage(&mut self, stage: Stage, watch: &mut impl FnMut(&Happening)) {
        if self.seen.stages.iter().all(|(seen, _)| *seen != stage) {
            let at = self.started.elapsed();
            self.seen.stages.push((stage, at));
            watch(&Happening::Stage(stage, at));
        }
    }

    fn finish(mut self) -> Finished {
        self.seen.wall = self.started.elapsed();
        self.seen.exec_status = self.exec.status();
        self.seen.clone()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Only this child. If it has ended already both calls do nothing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Finished {
    /// Whether the user left the machine by Ctrl-A X: QEMU says so as its last word.
    pub fn left_by_user(&self) -> bool {
        self.report.is_none() && self.console.trim_end().ends_with("QEMU: Terminated")
    }

    /// What the machine saw when the guest's first processor was entered for the first time.
    pub fn guest_start(&self) -> Result<&report::Stage> {
        let start = self.events.iter().find_map(|event| match event {
            Event::Stage(stage) if stage.name == StageName::Firmware => Some(stage),
            _ => None,
        });
        start.context("the guest's start was not seen")
    }

    /// The machine's report, or what can be said about its absence.
    pub fn report(&self) -> Result<&Report> {
        if let Some(report) = &self.report {
            return Ok(report);
        }
        let own = std::fs::read_to_string(Logs::within(&self.dir).qemu).unwrap_or_default();
        let why = if self.timed_out {
            format!("the run was ended after {:.0} s", self.wall.as_secs_f64())
        } else {
            // TCG always warns about the processor features it leaves out.
            let tells = |line: &&str| !line.trim().is_empty() && !line.contains("warning: TCG");
            let own_word = own.lines().rfind(tells).map(str::trim).unwrap_or_default();
            match self.qemu_status {
                // With -no-reboot QEMU takes a reset, such as a triple fault, for its end.
                Some(status) if status.success() => "the machine itself was reset".to_owned(),
                Some(status) => format!("QEMU ended ({status}): {own_word}"),
                None => format!("QEMU was ended: {own_word}"),
            }
        };
        bail!(
            "{why}, without a report of the machine; its logs are in {}",
            self.dir.display()
        )
    }
}
