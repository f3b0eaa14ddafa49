//! `xtask run`: one boot with its progress, and the machine's report at the end.
//!
//! With `--exec` the command's output is the only thing on standard output and its exit status is
//! xtask's. Without it the guest's console is the terminal. How a run ended otherwise is told by an
//! exit status of its own, see [`ending`]; one in which the referee or the machine found something
//! wrong never exits with 0.

mod ending;
mod native;
mod processors;
mod table;

use std::fs;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use e2e::guests::{Firmware, Kernel, TdFirmware};
use e2e::image::{Accept, Extras};
use e2e::vm::{
    Backing, Config, Console, Cores, Finished, Happening, Linux, Loader, Platform, Settings, Stage,
    Vc,
};
use e2e::{image, initramfs};
use protocols::launch::Touch;
use protocols::report::Event;

use crate::fetch::guests::{self, Choice, choice};
use crate::layout::{Layout, create_dir, read, write};
use crate::progress::{self, Step};
use crate::{build, disk, fetch, observe, qemu, stress, userspace};
use ending::Ending;

/// What `xtask run` can be told.
#[derive(Debug, Args)]
pub struct Options {
    /// What the image is started on: snp (emulated), tdx (a trust domain, emulated), or native
    /// (nothing confidential, acceptance simulated)
    #[arg(long, default_value = "snp")]
    platform: Platform,
    /// Memory of the machine, such as 4G or 2048M
    #[arg(long, default_value = "4G", value_parser = memory_size)]
    mem: String,
    /// Number of virtual processors
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    vcpus: u32,
    /// Cores of this computer that several virtual processors run on: one (slower, and right), or
    /// all (QEMU may then lose the state of the first, which ends the run)
    #[arg(long, default_value = "one")]
    cores: Cores,
    /// Granularity in which the host backs private memory: 4k or 2m
    #[arg(long, default_value = "4k")]
    backing: Backing,
    /// What of the guest's own intercepts is reflected as #VC: direct (little), strict (what KVM has
    /// reflected) or all (RDTSC, too)
    #[arg(long, default_value = "direct")]
    vc: Vc,
    /// Kernel to boot, one of Debian's or a file: 6.12, 6.12-generic, 7.2, 7.2-generic, FILE
    #[arg(long, value_name = "KERNEL", default_value = "6.12", value_parser = choice::<Kernel>)]
    kernel: Choice<Kernel>,
    /// Initial root file system to use instead of the built one
    #[arg(long, value_name = "FILE", conflicts_with = "exec")]
    initrd: Option<PathBuf>,
    /// Words to add to the kernel command line
    #[arg(
        long,
        value_name = "WORDS",
        default_value = "",
        allow_hyphen_values = true
    )]
    append: String,
    /// Firmware to use, one of Debian's OVMF or a file: 2026.08, 2025.02, FILE
    #[arg(long, value_name = "FIRMWARE", default_value = "2026.08", value_parser = choice::<Firmware>)]
    firmware: Choice<Firmware>,
    /// Firmware of the guest of a trust domain, Debian's OVMF or a TDVF image: 2026.08, FILE; makes
    /// the image one for TDX, too [with --platform tdx: 2026.08]
    #[arg(long, value_name = "FIRMWARE", value_parser = choice::<TdFirmware>)]
    td_firmware: Option<Choice<TdFirmware>>,
    /// When the paravisor accepts memory: lazy (on request), eager (all of it before the guest
    /// starts), ahead (in the background on processors the guest has not started, in a trust domain
    /// on those that halt); the last two
    /// with or without a budget, such as ahead:512M or ahead:50%
    #[arg(long, value_name = "POLICY", default_value = "lazy")]
    accept: Accept,
    #[command(flatten)]
    accept_extras: Extras,
    #[command(flatten)]
    disk: disk::DiskOptions,
    #[command(flatten)]
    stress: stress::Options,
    #[command(flatten)]
    kexec: userspace::KexecOptions,
    /// Command to run in the guest instead of a shell; ends with its output and exit status
    #[arg(long, value_name = "CMD")]
    exec: Option<String>,
    /// End the run after this many seconds; a run without --exec has no limit unless it is given
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Keep the logs of a run that ended well, too
    #[arg(long)]
    keep_logs: bool,
    /// Directory for the logs; they are kept
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    #[command(flatten)]
    observe: observe::Options,
}

/// How long a command in the guest may take unless `--timeout` says otherwise.
const EXEC_LIMIT: Duration = Duration::from_secs(1800);

/// Boots, and returns the exit status that the documentation above promises.
pub fn run(layout: &Layout, options: &Options) -> Result<ExitCode> {
    let terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    if options.exec.is_none() && options.initrd.is_none() && !terminal {
        bail!("the guest's shell needs a terminal; run a command with --exec CMD instead");
    }
    options.accept.with(options.accept_extras)?;
    options.kernel.check("a kernel")?;
    options.firmware.check("an OVMF image")?;
    if let Some(firmware) = &options.td_firmware {
        firmware.check("a TDVF image")?;
    }
    options.disk.check()?;
    if let Some(file) = &options.initrd
        && !file.is_file()
    {
        bail!(
            "{}: expected a root file system, there is no such file; check the path",
            file.display()
        );
    }
    if options.platform == Platform::Native && options.vcpus != 1 {
        bail!("--platform native has one processor; leave --vcpus out");
    }
    if options.platform != Platform::Tdx && options.accept_extras.touch != Touch::FAULT {
        bail!("--on-touch accept is for --platform tdx: elsewhere the fault is the guest's own");
    }
    let mut config = prepare(layout, options, terminal)?;
    config.settings.tdx = options.platform == Platform::Tdx;
    if options.platform == Platform::Native {
        config = config.native()?;
    }
    let limit = match (options.timeout, &options.exec) {
        (Some(seconds), _) => Duration::from_secs(seconds),
        (None, Some(_)) if config.debugger.is_none() => EXEC_LIMIT,
        (None, _) => Duration::MAX,
    };
    let mut display = Display::new(&config, options.exec.is_some());
    let mut observer = options.observe.begin(&config, &layout.root)?;
    let finished = config.run(limit, |happening| {
        observer.see(happening);
        display.show(happening);
    })?;
    display.end();
    let (code, good) = if config.is_native() {
        native::conclude(&finished, options.exec.is_some())
    } else {
        conclude(&finished, options.exec.is_some())
    };
    observer.end(&finished)?;
    if options.out.is_none() && !options.keep_logs && good {
        fs::remove_dir_all(&config.dir)
            .with_context(|| format!("{}: cannot be removed", config.dir.display()))?;
    } else {
        eprintln!("  logs: {}", config.dir.display());
    }
    Ok(code)
}

/// Obtains and builds everything and puts the run together.
fn prepare(layout: &Layout, options: &Options, terminal: bool) -> Result<Config> {
    let qemu = qemu::obtain(layout)?;
    let target = build::prepare(layout)?;
    let firmware = options.firmware.obtain(layout, guests::firmware)?;
    let default = Choice::Named(TdFirmware::default());
    let td_firmware = match &options.td_firmware {
        None if options.platform == Platform::Tdx => Some(&default),
        chosen => chosen.as_ref(),
    };
    let td_firmware = td_firmware
        .map(|choice| choice.file_or(|named| guests::obtain_td_firmware(layout, named)))
        .transpose()?;
    let dir = match &options.out {
        Some(dir) => dir.clone(),
        None => layout
            .artefacts
            .join("runs")
            .join(std::process::id().to_string()),
    };
    create_dir(&dir)?;
    let exec = options.exec.as_deref();
    let disk = options.disk.obtain(layout, &options.kernel, exec, &dir)?;
    let linux = match disk {
        Some(_) => None,
        None => Some(linux(layout, options, &dir)?),
    };
    let built = build::for_run(
        layout,
        target,
        &firmware,
        td_firmware.as_deref(),
        options.observe.fault(),
        options.accept.with(options.accept_extras)?,
        &dir,
    )?;
    observe::keep_programs(&built, &dir)?;
    let sidecar = image::sidecar(&built.image)?;
    Ok(Config {
        qemu,
        rom: built.rom,
        settings: Settings {
            backing: options.backing,
            vc: options.vc,
            map_descriptor: sidecar.map_descriptor,
            low_end: sidecar.low_end,
            breakage: options.observe.breakage(),
            trace: options.observe.traced(),
            ..Settings::default()
        },
        image: built.image,
        loader: Loader::Machine,
        memory: options.mem.clone(),
        low_memory: None,
        vcpus: options.vcpus,
        cores: options.cores,
        linux,
        disk,
        console: if terminal && options.exec.is_none() {
            Console::Terminal
        } else {
            Console::File
        },
        chip: Some(build::chip(layout)?),
        debugger: options.observe.debugger(&dir),
        dir,
    })
}

/// The kernel for the firmware to start, and a userspace for it in `dir`.
fn linux(layout: &Layout, options: &Options, dir: &Path) -> Result<Linux> {
    let kernel = options.kernel.obtain(layout, guests::kernel)?;
    let userspace = match &options.initrd {
        Some(file) => read(file)?,
        None => {
            let mut extras = options.stress.extras(layout, &kernel)?;
            extras.extend(options.kexec.extras(layout, &kernel)?);
            let busybox = read(&fetch::BUSYBOX.obtain(layout)?)?;
            initramfs::build(&busybox, options.exec.as_deref(), &extras)
        }
    };
    let initrd = dir.join("initramfs.cpio");
    write(&initrd, userspace)?;
    let append = format!("{} {}", initramfs::COMMAND_LINE, options.append);
    Ok(Linux {
        kernel,
        initrd,
        append: append.trim().to_owned(),
    })
}

/// What the user sees while the machine runs.
struct Display {
    /// A spinner; absent when the terminal belongs to the guest.
    step: Option<Step>,
    /// Console lines go to standard output: neither a command nor a terminal wants it.
    print_console: bool,
    stage: &'static str,
    /// What has been accepted, if somebody tells.
    accepted: Option<u64>,
}

impl Display {
    fn new(config: &Config, exec: bool) -> Display {
        let title = if config.is_native() {
            format!("boot with {}, {}", config.memory, config.way())
        } else {
            format!(
                "boot with {} and {} backing",
                config.memory,
                config.settings.backing.name()
            )
        };
        let interactive = config.console == Console::Terminal;
        if interactive {
            eprintln!("  {title}; Ctrl-A X leaves");
        }
        Display {
            step: (!interactive).then(|| progress::step(title)),
            print_console: !interactive && !exec,
            stage: "QEMU",
            accepted: (!config.is_native()).then_some(0),
        }
    }

    fn show(&mut self, happening: &Happening) {
        match happening {
            Happening::Stage(stage, at) => {
                self.stage = stage.name();
                let line = match self.accepted {
                    Some(bytes) => format!(
                        "  {:6.1} s  {:<10} {} MiB accepted",
                        at.as_secs_f64(),
                        self.stage,
                        bytes >> 20
                    ),
                    None => format!("  {:6.1} s  {}", at.as_secs_f64(), self.stage),
                };
                match &self.step {
                    Some(step) => step.line(&line),
                    None => eprintln!("{line}"),
                }
                if *stage == Stage::Userspace {
                    self.stage = "in userspace";
                }
            }
            Happening::Machine(Event::Progress(progress)) => {
                self.accepted = self.accepted.map(|_| progress.validated_bytes);
            }
            Happening::Machine(Event::Log(log)) => self.remark(&log.text),
            Happening::Machine(Event::Refusal(refusal)) => {
                self.remark(&format!("refused: {}", refusal.text));
            }
            Happening::Machine(_) => {}
            Happening::Console(line) => {
                if self.print_console {
                    println!("{line}");
                }
            }
            Happening::Output(bytes) => {
                let mut out = std::io::stdout().lock();
                // A reader that went away (`| head`) is no reason to end the guest half-way.
                let _ = out.write_all(bytes).and_then(|()| out.flush());
            }
        }
        if let Some(step) = &self.step {
            step.note(&match self.accepted {
                Some(bytes) => format!("{}, {} MiB accepted", self.stage, bytes >> 20),
                None => self.stage.to_owned(),
            });
        }
    }

    fn remark(&self, text: &str) {
        match &self.step {
            Some(step) => step.line(&format!("           machine: {text}")),
            None => eprintln!("machine: {text}"),
        }
    }

    fn end(self) {
        if let Some(step) = self.step {
            step.done("");
        }
    }
}

/// Prints the report; the exit status, and whether everything was as it should be.
fn conclude(finished: &Finished, exec: bool) -> (ExitCode, bool) {
    if finished.left_by_user() {
        eprintln!("\nleft; a machine that is killed makes no report");
        return (ExitCode::SUCCESS, true);
    }
    let report = finished.report();
    if let Ok(report) = report {
        eprintln!(
            "\nreport of the machine\n{}",
            table::render(finished, report)
        );
    }
    let Some(ending) = Ending::of(finished, exec) else {
        print_tail(&finished.console);
        if let Err(error) = report {
            eprintln!("xtask: {error:#}");
        }
        return (ExitCode::from(ending::NO_REPORT), false);
    };
    match &ending {
        Ending::PowerOff | Ending::Kexec | Ending::Command(_) => {}
        Ending::Unfinished | Ending::Mistake(_) => eprintln!("xtask: {ending}"),
        _ => {
            print_tail(&finished.console);
            eprintln!("xtask: {ending}");
        }
    }
    let good = matches!(ending, Ending::PowerOff | Ending::Kexec);
    (ExitCode::from(ending.status()), good)
}

fn print_tail(console: &str) {
    eprintln!("last lines of the guest's console:");
    eprint!("{}", crate::command::tail(console, 15));
}

/// Accepts what QEMU's `-m` takes as a size in M or G.
fn memory_size(text: &str) -> Result<String, String> {
    let expected = "expected a size such as 4G or 2048M, at least 1G";
    let (digits, unit) = text
        .split_at_checked(text.len().saturating_sub(1))
        .ok_or(expected)?;
    let number: u64 = digits.parse().map_err(|_| expected)?;
    let mebibytes = match unit {
        "G" | "g" => number.checked_mul(1024).ok_or(expected)?,
        "M" | "m" => number,
        _ => return Err(expected.to_owned()),
    };
    if mebibytes < 1024 {
        Err(expected.to_owned())
    } else {
        Ok(format!("{mebibytes}M"))
    }
}

#[cfg(test)]
mod tests {
    use super::memory_size;

    #[test]
    fn memory_sizes_have_a_unit_and_a_floor() {
        assert_eq!(memory_size("4G").as_deref(), Ok("4096M"));
        assert_eq!(memory_size("2048m").as_deref(), Ok("2048M"));
        for bad in [
            "",
            "4",
            "G",
            "512M",
            "4T",
            "-4G",
            "99999999999999999999G",
            "é",
        ] {
            assert!(memory_size(bad).is_err(), "{bad}");
        }
    }
}
