//! What a run is made of: QEMU's command line and the machine's settings file.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;

use anyhow::{Context, Result, bail};

use super::{Cores, Disk};
use crate::chip::Chip;

/// The granularity in which the emulated host backs private memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// 4 KiB, as upstream KVM gives: every 2 MiB PVALIDATE mismatches.
    #[default]
    Small,
    /// 2 MiB.
    Large,
}

impl Backing {
    /// Both, for scenarios that run on each.
    pub const BOTH: [Backing; 2] = [Backing::Small, Backing::Large];

    /// The value of the machine's setting.
    pub const fn name(self) -> &'static str {
        match self {
            Backing::Small => "4k",
            Backing::Large => "2m",
        }
    }
}

impl FromStr for Backing {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Backing> {
        match text {
            "4k" => Ok(Backing::Small),
            "2m" => Ok(Backing::Large),
            _ => bail!("expected 4k or 2m"),
        }
    }
}

/// How much of what real hardware reflects into the guest the machine reflects too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Vc {
    /// Only what must be: the guest's own CPUID, I/O and MSR accesses are served directly.
    Direct,
    /// Everything that KVM has reflected, through the guest's #VC handler.
    #[default]
    Strict,
    /// That, RDTSC and RDTSCP.
    All,
}

impl Vc {
    /// The value of the machine's setting.
    pub const fn name(self) -> &'static str {
        match self {
            Vc::Direct => "direct",
            Vc::Strict => "strict",
            Vc::All => "all",
        }
    }
}

impl FromStr for Vc {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Vc> {
        match text {
            "direct" => Ok(Vc::Direct),
            "strict" => Ok(Vc::Strict),
            "all" => Ok(Vc::All),
            _ => bail!("expected direct, strict or all"),
        }
    }
}

/// What the machine tells while it runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trace {
    /// What everybody wants to know.
    #[default]
    Off,
    /// World switches and the guest's requests as well.
    Switches,
    /// Every exit as well.
    All,
}

impl Trace {
    /// The value of the machine's setting.
    pub const fn name(self) -> &'static str {
        match self {
            Trace::Off => "off",
            Trace::Switches => "on",
            Trace::All => "all",
        }
    }
}

/// What the machine is told through fw_cfg (`opt/turnstile/settings`).
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Granularity of the host's backing.
    pub backing: Backing,
    /// Reflection of intercepts at VMPL1 and below.
    pub vc: Vc,
    /// GPA of the paravisor's map descriptor; makes the machine compare it with its RMP.
    pub map_descriptor: Option<u64>,
    /// Where memory below 4 GiB ends for a firmware that asks fw_cfg instead of the paravisor.
    pub low_end: Option<u64>,
    /// Where the firmware of a trust domain looks for hand-off blocks, if the host is to write them.
    pub td_hob: Option<u64>,
    /// Whether a test guest may ask the machine about its state.
    pub oracle: bool,
    /// QEMU counts instructions: a tick of the time stamp counter is an instruction, time passes by
    /// them alone, and every run of the same is the same. One processor only.
    pub icount: bool,
    /// Misbehaviour of the host.
    pub hostile: Option<String>,
    /// What is traced.
    pub trace: Trace,
    /// How the machine itself breaks: `panic` or `exception`.
    pub breakage: Option<&'static str>,
    /// Which table a test guest goes through that cannot see for itself what it is run for: `eager`,
    /// `ahead` or `touch`.
    pub table: Option<&'static str>,
    /// The image's native platform, in a guest without SEV-SNP: the machine's plain mode.
    pub native: bool,
    /// The image's TDX platform: the machine is a trust domain.
    pub tdx: bool,
}

impl Settings {
    /// The file's text: one `key=value` per line.
    pub fn text(&self) -> String {
        let mut text = format!("backing={}\nvc={}\n", self.backing.name(), self.vc.name());
        // Writing to a String cannot fail.
        if let Some(gpa) = self.map_descriptor {
            let _ = writeln!(text, "referee={gpa:#x}");
        }
        if let Some(gpa) = self.low_end {
            let _ = writeln!(text, "low-end={gpa:#x}");
        }
        if let Some(gpa) = self.td_hob {
            let _ = writeln!(text, "td-hob={gpa:#x}");
        }
        if self.oracle {
            text.push_str("oracle=on\n");
        }
        if self.icount {
            text.push_str("icount=on\n");
        }
        if let Some(hostile) = &self.hostile {
            let _ = writeln!(text, "hostile={hostile}");
        }
        if self.trace != Trace::Off {
            let _ = writeln!(text, "trace={}", self.trace.name());
        }
        if let Some(breakage) = self.breakage {
            let _ = writeln!(text, "break={breakage}");
        }
        if let Some(table) = self.table {
            let _ = writeln!(text, "table={table}");
        }
        if self.native {
            text.push_str("platform=native\n");
        }
        if self.tdx {
            text.push_str("platform=tdx\n");
        }
        text
    }
}

/// The guest's operating system, handed to the guest's firmware by QEMU's fw_cfg.
#[derive(Clone, Debug)]
pub struct Linux {
    /// A bzImage.
    pub kernel: PathBuf,
    /// The initial root file system.
    pub initrd: PathBuf,
    /// The kernel command line.
    pub append: String,
}

/// Who reads the image and starts what is in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Loader {
    /// The machine, QEMU's firmware.
    #[default]
    Machine,
    /// QEMU itself: no machine, nothing confidential, the native platform.
    Qemu,
}

/// Where the guest's console goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Console {
    /// Into a file of the run's directory only.
    File,
    /// To this process's terminal, and into the file as well. Ctrl-A X ends QEMU.
    Terminal,
}

/// One run of the machine.
#[derive(Clone, Debug)]
pub struct Config {
    /// The QEMU program.
    pub qemu: PathBuf,
    /// The machine itself, QEMU's firmware.
    pub rom: PathBuf,
    /// The IGVM image to launch.
    pub image: PathBuf,
    /// Who launches it.
    pub loader: Loader,
    /// The machine's settings.
    pub settings: Settings,
    /// Memory, as QEMU's `-m` takes it.
    pub memory: String,
    /// Memory below 4 GiB at most, as QEMU's `max-ram-below-4g` takes it; QEMU's own choice if none.
    pub low_memory: Option<String>,
    /// Number of virtual processors.
    pub vcpus: u32,
    /// The computer's cores they run on.
    pub cores: Cores,
    /// The guest's operating system, if it is to have one.
    pub linux: Option<Linux>,
    /// A disk with an operating system, with network and randomness beside it.
    pub disk: Option<Disk>,
    /// Where the console goes.
    pub console: Console,
    /// The chip of the emulated security processor; without one it signs no reports.
    pub chip: Option<Chip>,
    /// Socket on which QEMU waits for a debugger, everything stopped until that says go on.
    pub debugger: Option<PathBuf>,
    /// Directory for the logs of this run; must exist.
    pub dir: PathBuf,
}

/// The files a run leaves in its directory.
#[derive(Clone, Debug)]
pub struct Logs {
    /// The machine's events, one JSON object per line.
    pub machine: PathBuf,
    /// The guest's console.
    pub console: PathBuf,
    /// The guest's second serial port.
    pub second: PathBuf,
    /// What QEMU itself says.
    pub qemu: PathBuf,
    /// What the processors were doing when the run's time was up.
    pub state: PathBuf,
}

impl Logs {
    /// The names of the files in `dir`.
    pub fn within(dir: &Path) -> Logs {
        Logs {
            machine: dir.join("machine.jsonl"),
            console: dir.join("console.log"),
            second: dir.join("com2.log"),
            qemu: dir.join("qemu.log"),
            state: dir.join("state.log"),
        }
    }

    /// Makes all of them, empty.
    pub(super) fn empty(&self) -> Result<()> {
        [
            &self.machine,
            &self.console,
            &self.second,
            &self.qemu,
            &self.state,
        ]
        .into_iter()
        .try_for_each(|log| write(log, ""))
    }
}

impl Config {
    /// QEMU's command line; also writes the settings file and empties the logs, so that nothing of
    /// an earlier run in the same directory is taken for this one's.
    pub(super) fn command(&self) -> Result<Command> {
        let logs = Logs::within(&self.dir);
        logs.empty()?;
        let settings = self.dir.join("settings.txt");
        write(&settings, &self.settings.text())?;
        let low_memory = self.low_memory.as_deref();
        let counts = self.settings.icount;
        let threads = if counts { "single" } else { "multi" };
        let mut qemu = hardware(&self.qemu, &self.memory, low_memory, self.vcpus, threads);
        if self.settings.tdx {
            // As QEMU has it for a trust domain, which takes no interrupt that an APIC has not sent.
            qemu.args(["-machine", "pic=off"]);
        }
        if counts {
            if self.vcpus != 1 {
                bail!(
                    "instructions are counted with one processor only, not with {}",
                    self.vcpus
                );
            }
            qemu.args(["-icount", "shift=0,sleep=off", "-seed", "1"])
                .args(["-rtc", "clock=vm,base=2026-01-01"]);
        }
        match self.loader {
            Loader::Machine => qemu
                .arg("-bios")
                .arg(&self.rom)
                .arg("-fw_cfg")
                .arg(option("name=opt/turnstile/igvm,file=", &self.image))
                .arg("-fw_cfg")
                .arg(option("name=opt/turnstile/settings,file=", &settings))
                .args(self.chip.iter().flat_map(Chip::options)),
            Loader::Qemu => qemu
                .arg("-object")
                .arg(option("igvm-cfg,id=igvm,file=", &self.image))
                .args(["-machine", "igvm-cfg=igvm"]),
        };
        serial_ports(&mut qemu, &logs, self.console)?;
        qemu.arg("-chardev")
            .arg(option("file,id=machine,path=", &logs.machine))
            .args(["-device", "isa-debugcon,iobase=0xe9,chardev=machine"])
            .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"]);
        if let Some(linux) = &self.linux {
            qemu.arg("-kernel")
                .arg(&linux.kernel)
                .arg("-initrd")
                .arg(&linux.initrd);
            qemu.args(["-append", &linux.append]);
        }
        if let Some(disk) = &self.disk {
            disk.attach(&mut qemu);
        }
        if let Some(socket) = &self.debugger {
            let mut device = option("unix:", socket);
            device.push(",server=on,wait=off");
            qemu.arg("-gdb").arg(device).arg("-S");
        }
        Ok(qemu)
    }
}

/// QEMU with the processors and memory of every run, and no device that was not asked for.
/// `low_memory` limits the memory below 4 GiB; `threads` is a `single` one or `multi`.
pub(super) fn hardware(
    qemu: &Path,
    memory: &str,
    low_memory: Option<&str>,
    vcpus: u32,
    threads: &str,
) -> Command {
    let mut machine = "q35,smm=off".to_owned();
    if let Some(size) = low_memory {
        machine.push_str(&format!(",max-ram-below-4g={size}"));
    }
    let mut qemu = Command::new(qemu);
    qemu.args([
        "-accel",
        &format!("tcg,thread={threads}"),
        "-machine",
        &machine,
    ])
    .args(["-cpu", "EPYC-Milan,+svm,+x2apic,phys-bits=48"])
    .args(["-m", memory, "-smp", &vcpus.to_string()])
    .args(["-nodefaults", "-no-user-config", "-no-reboot"])
    .args(["-display", "none"]);
    qemu
}

/// Gives the guest its two serial ports, and files to QEMU's own words and, unless the monitor shares the
/// terminal, to what the monitor says.
pub(super) fn serial_ports(qemu: &mut Command, logs: &Logs, console: Console) -> Result<()> {
    qemu.arg("-chardev");
    match console {
        Console::File => {
            qemu.arg(option("file,id=console,path=", &logs.console))
                .args(["-chardev", "stdio,id=monitor,signal=off"])
                .args(["-mon", "chardev=monitor,mode=readline"])
                .stdin(Stdio::piped())
                .stdout(append_to(&logs.state)?);
        }
        Console::Terminal => {
            qemu.arg(option(
                "stdio,id=console,mux=on,signal=off,logfile=",
                &logs.console,
            ))
            .args(["-mon", "chardev=console,mode=readline"])
            .stdin(Stdio::inherit());
        }
    }
    qemu.args(["-serial", "chardev:console", "-chardev"])
        .arg(option("file,id=second,path=", &logs.second))
        .args(["-serial", "chardev:second"]);
    qemu.stderr(append_to(&logs.qemu)?);
    Ok(())
}

fn append_to(log: &Path) -> Result<File> {
    File::options()
        .append(true)
        .open(log)
        .with_context(|| format!("{}: cannot be written", log.display()))
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("{}: cannot be written", path.display()))
}

/// A QEMU option that ends in a path. In such options a comma is written twice.
pub(crate) fn option(head: &str, path: &Path) -> OsString {
    let mut option = OsString::from(head);
    let text = path.as_os_str().to_string_lossy();
    option.push(text.replace(',', ",,"));
    option
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{Settings, Trace, option};

    #[test]
    fn settings_name_only_what_differs_from_a_plain_run() {
        assert_eq!(Settings::default().text(), "backing=4k\nvc=strict\n");
        let settings = Settings {
            map_descriptor: Some(0x810_0000),
            low_end: Some(0x800_0000),
            td_hob: Some(0x80_9000),
            oracle: true,
            icount: true,
            hostile: Some("map-wrap".into()),
            trace: Trace::All,
            breakage: Some("panic"),
            table: Some("ahead"),
            native: true,
            ..Settings::default()
        };
        let text = settings.text();
        assert!(
            text.ends_with(
                "referee=0x8100000\nlow-end=0x8000000\ntd-hob=0x809000\noracle=on\nicount=on\nhostile=map-wrap\ntrace=all\nbreak=panic\ntable=ahead\nplatform=native\n"
            ),
            "{text}"
        );
    }

    #[test]
    fn a_comma_in_a_path_is_doubled() {
        assert_eq!(option("file=", Path::new("/a,b")), "file=/a,,b");
    }
}
