//! [`Platform`]: all state of the emulated platform, and the queues between it and the CPU
//! side.
//!
//! The methods are spread over the modules by subject: accesses in [`crate::access`],
//! instructions in [`crate::isa`], worlds in [`crate::vcpu`], VMGEXIT in [`crate::ghcb`], the
//! launch in [`crate::launch`], the judge in [`crate::referee`]. One `Platform` serves all
//! vCPUs; the caller holds a lock around it and calls it for one exit at a time.
//!
//! After every call the caller
//! 1. zaps in its nested page tables what [`Platform::take_invalidations`] names, before any
//!    vCPU runs again on this CPU;
//! 2. prints what [`Platform::take_events`] gives.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use protocols::report::{
    Event, Log, Memory, Outcome, Progress, Refusal, Report, Sample, Termination,
};

use crate::amd_sp::{Chip, SecurityProcessor};
use crate::counters::{self, Counters};
use crate::ghcb::guest_request::Courier;
use crate::host_memory::HostMemory;
use crate::layout::{Layout, LayoutError};
use crate::memory::PhysicalMemory;
use crate::settings::Settings;
use crate::stale::Stale;
use crate::tdx::Personality;
use crate::types::{Gpa, Spa, VcpuId, Vmpl};
use crate::vcpu::Vcpu;

/// A set of nested page tables, by VMPL.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Views(u8);

impl Views {
    /// Those of every VMPL.
    pub const ALL: Self = Self(0xF);

    /// Those of one VMPL.
    pub const fn of(vmpl: Vmpl) -> Self {
        Self(1 << vmpl.index())
    }

    /// Whether those of `vmpl` are among them.
    pub const fn contains(self, vmpl: Vmpl) -> bool {
        self.0 & (1 << vmpl.index()) != 0
    }
}

/// Who changed what nested page tables show.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cause {
    /// The host took or gave the page, and gets every CPU to drop its translations at once.
    Host,
    /// An RMP instruction of this level withdrew rights. CPUs inside the guest keep their
    /// translations until they leave: see [`crate::stale`].
    Instruction(Vmpl),
    /// The RMP entry was split; nobody has more or fewer rights than before.
    Split,
}

/// Mappings that are stale: both aliases of `[gpa, gpa + bytes)` in the views named.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Invalidation {
    /// First byte, aligned to the change (4 KiB or 2 MiB).
    pub gpa: Gpa,
    /// Length, a multiple of 4 KiB.
    pub bytes: u64,
    /// Whose tables.
    pub views: Views,
    /// Why.
    pub cause: Cause,
}

/// Progress is told every time this much more has been validated.
const PROGRESS_STEP: u64 = 64 << 20;

/// The emulated platform over some physical memory.
pub struct Platform<P> {
    pub(crate) memory: P,
    pub(crate) host: HostMemory,
    pub(crate) settings: Settings,
    pub(crate) counters: Counters,
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) events: Vec<Event>,
    pub(crate) clock: fn() -> u64,
    /// Whether paravisor and firmware have been entered.
    pub(crate) stages: [bool; 2],
    pub(crate) ap_jump_table: u64,
    pub(crate) stale: Stale,
    pub(crate) personality: Personality,
    pub(crate) courier: Courier,
    pub(crate) chip: Option<Chip>,
    /// From the launch of an SNP guest on.
    pub(crate) security_processor: Option<SecurityProcessor>,
    progress: u64,
}

impl<P: PhysicalMemory> Platform<P> {
    /// A platform without memory. `clock` reads the time stamp counter.
    pub fn new(memory: P, settings: Settings, vcpus: u32, clock: fn() -> u64) -> Self {
        let mut platform = Self {
            memory,
            host: HostMemory::new(settings.backing),
            settings,
            counters: Counters::new(vcpus),
            vcpus: vec![Vcpu::default(); vcpus as usize],
            events: Vec::new(),
            clock,
            stages: [false; 2],
            ap_jump_table: 0,
            stale: Stale::default(),
            personality: Personality::Snp,
            courier: Courier::default(),
            chip: None,
            security_processor: None,
            progress: 0,
        };
        let reset = platform.sev_info();
        for vcpu in &mut platform.vcpus {
            for context in &mut vcpu.contexts {
                context.ghcb_msr = reset;
            }
        }
        platform
    }

    /// Adds RAM (GPA = SPA) that the guest may use.
    pub fn add_ram(&mut self, gpa: Gpa, bytes: u64) -> Result<(), LayoutError> {
        self.host.add_ram(gpa, bytes)
    }

    /// Adds pages where QEMU has no RAM, backed by machine memory at `spa`.
    pub fn add_window(&mut self, gpa: Gpa, bytes: u64, spa: Spa) -> Result<(), LayoutError> {
        self.host.add_window(gpa, bytes, spa)
    }

    /// Makes the legacy hole below 1 MiB memory, backed by machine memory at `spa`.
    pub fn add_legacy(&mut self, spa: Spa) -> Result<(), LayoutError> {
        self.host.add_legacy(spa)
    }

    /// Gives the platform the identity of its chip, and the host the certificates to it. Before the launch.
    pub fn endorse(&mut self, chip: Chip, certificates: &[u8]) {
        self.chip = Some(chip);
        self.courier.certificates = certificates.into();
    }

    /// The memory map.
    pub const fn layout(&self) -> &Layout {
        self.host.layout()
    }

    /// The bytes underneath.
    pub const fn memory(&self) -> &P {
        &self.memory
    }

    /// The settings of this run.
    pub const fn settings(&self) -> &Settings {
        &self.settings
    }

    /// What happens from now on is counted as this vCPU's doing. Every call that names a vCPU
    /// says so itself; the CPU side does for the others.
    pub const fn serve(&mut self, vcpu: VcpuId) {
        self.counters.serve(vcpu);
    }

    /// The counters; the CPU side counts exits here.
    pub const fn counters(&mut self) -> &mut Counters {
        &mut self.counters
    }

    /// System address of a guest byte; `None` if there is no memory.
    pub fn spa_of(&self, gpa: Gpa) -> Option<Spa> {
        self.host.layout().spa_of(gpa)
    }

    /// Stale mappings since the last call. The caller zaps them before it runs any guest.
    #[must_use = "stale mappings must be zapped"]
    pub fn take_invalidations(&mut self) -> Vec<Invalidation> {
        self.host.take_invalidations()
    }

    /// What CPUs inside the guest may still use although it was withdrawn. The CPU side writes
    /// it when it acts on an invalidation caused by VMPL0, and brings it up to date before
    /// [`Self::execute`] and [`Self::enter`].
    pub const fn stale(&mut self) -> &mut Stale {
        &mut self.stale
    }

    /// Whether there is anything to take: invalidations or events.
    #[inline]
    pub const fn has_news(&self) -> bool {
        self.host.has_invalidations() || !self.events.is_empty()
    }

    /// Lines for the log since the last call, oldest first.
    pub fn take_events(&mut self) -> Vec<Event> {
        core::mem::take(&mut self.events)
    }

    /// Queues a remark.
    pub fn log(&mut self, text: String) {
        self.events.push(Event::Log(Log { text }));
    }

    /// Queues a refusal. The caller of the platform fills in RIP when it prints the line.
    pub(crate) fn refuse(&mut self, vmpl: Vmpl, gpa: Option<Gpa>, text: String) {
        let refusal = Refusal {
            text,
            gpa: gpa.map(Gpa::get),
            vmpl: vmpl.number(),
            rip: 0,
        };
        self.events.push(Event::Refusal(refusal));
    }

    /// Books validated (or rescinded) bytes and tells progress.
    pub(crate) fn book_validated(&mut self, bytes: u64, validated: bool) {
        let total = &mut self.counters.validated_bytes;
        if validated {
            *total += bytes;
        } else {
            // Launch pages count as validated by the AMD-SP: rescinding them takes nothing off.
            *total = total.saturating_sub(bytes);
        }
        let sample = self.sample();
        self.counters.samples.offer(sample);
        if sample.validated_bytes >= self.progress + PROGRESS_STEP {
            self.progress = sample.validated_bytes / PROGRESS_STEP * PROGRESS_STEP;
            let event = Progress {
                validated_bytes: sample.validated_bytes,
                tsc: sample.tsc,
            };
            self.events.push(Event::Progress(event));
        }
    }

    /// How much is accepted now.
    pub(crate) fn sample(&self) -> Sample {
        Sample {
            tsc: (self.clock)(),
            validated_bytes: self.counters.validated_bytes,
        }
    }

    /// The last line of a run: counters, memory, the referee's verdict.
    pub fn report(&self, end: End) -> Report {
        let (outcome, code, reason, termination) = end.parts();
        let mut report = Report::new(outcome, reason);
        report.code = code;
        report.termination = termination;
        report.vcpus = self.counters.report();
        report.counters = counters::sum_of_levels(&report.vcpus);
        report.calls = counters::sum_of_calls(&report.vcpus);
        report.samples = self.counters.samples.report(self.sample());
        report.memory = Memory {
            validated_bytes: self.counters.validated_bytes,
            ..self.host.report()
        };
        report.referee = self.judge();
        report.violations = self.counters.violations;
        report
    }
}

/// How a run ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum End {
    /// The guest switched the machine off.
    PowerOff,
    /// The guest asked for a reset; how.
    Reset(String),
    /// The guest wrote this value to port 0xF4.
    GuestExit(u64),
    /// A termination request.
    Terminated {
        /// Who asked.
        vmpl: Vmpl,
        /// Reason set.
        set: u8,
        /// Reason code.
        code: u8,
    },
    /// A trust domain reported that it cannot go on.
    FatalError {
        /// Who reported.
        vmpl: Vmpl,
        /// The code it gave.
        code: u64,
        /// The text it gave.
        text: String,
    },
    /// Halted with nothing left that could wake it.
    Halted {
        /// Who halted.
        vmpl: Vmpl,
        /// RIP behind the HLT.
        rip: u64,
        /// RSP; tells Linux' early checks apart.
        rsp: u64,
    },
    /// Triple fault.
    Shutdown {
        /// Who shut down.
        vmpl: Vmpl,
        /// Where.
        rip: u64,
    },
    /// The machine refused to go on.
    Refused(String),
    /// The image could not be launched.
    LaunchFailed(String),
    /// The settings were not understood.
    BadSettings(String),
    /// QEMU has lost the state of this processor.
    EmulatorFault(u32),
}

/// RSP with which Linux stops when its C-bit check fails (`guests.md`, sev_verify_cbit).
const LINUX_C_BIT_CHECK_RSP: u64 = 0xFFFF_FFFF_FFFF_F000;

impl End {
    fn parts(self) -> (Outcome, u64, String, Option<Termination>) {
        match self {
            Self::PowerOff => (Outcome::PowerOff, 0, String::from("ACPI power-off"), None),
            Self::Reset(how) => (Outcome::Reset, 0, how, None),
            Self::GuestExit(value) => (
                Outcome::GuestExit,
                value,
                format!("the guest exited with {value:#x}"),
                None,
            ),
            Self::Terminated { vmpl, set, code } => {
                let text = format!("{}", protocols::terminate::explain(set, code));
                let reason = format!("{vmpl} terminated: {text}");
                let termination = Termination {
                    set,
                    code,
                    text,
                    vmpl: vmpl.number(),
                };
                (Outcome::Terminated, 0, reason, Some(termination))
            }
            Self::FatalError { vmpl, code, text } => (
                Outcome::Terminated,
                code,
                format!("{vmpl} reported fatal error {code:#x}: {text}"),
                None,
            ),
            Self::Halted { vmpl, rip, rsp } => {
                let hint = if rsp == LINUX_C_BIT_CHECK_RSP {
                    " (Linux stops so when its C-bit check fails)"
                } else {
                    ""
                };
                let reason = format!("{vmpl} halted for good, RIP {rip:#x} RSP {rsp:#x}{hint}");
                (Outcome::Halted, 0, reason, None)
            }
            Self::Shutdown { vmpl, rip } => (
                Outcome::Shutdown,
                0,
                format!("{vmpl} triple fault at RIP {rip:#x}"),
                None,
            ),
            Self::Refused(why) => (Outcome::Refused, 0, why, None),
            Self::LaunchFailed(why) => (Outcome::LaunchFailed, 0, why, None),
            Self::BadSettings(why) => (Outcome::BadSettings, 0, why, None),
            Self::EmulatorFault(vcpu) => (
                Outcome::EmulatorFault,
                u64::from(vcpu),
                format!(
                    "QEMU has lost the state of vCPU {vcpu}; with --cores one it does not \
                     (docs/machine.md)"
                ),
                None,
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{BLOCK, platform};
    use crate::types::PageSize;

    #[test]
    fn the_report_adds_up() {
        let mut platform = platform("backing=2m");
        platform.pval(BLOCK, PageSize::Size2M, true);
        let report = platform.report(End::PowerOff);
        assert_eq!(report.outcome, Outcome::PowerOff);
        assert_eq!(
            (report.memory.assigned_pages, report.memory.validated_pages),
            (512, 512)
        );
        assert_eq!(report.memory.guest_pages, (0xA_0000 + 0xF0_0000) / 4096);
        assert_eq!(report.memory.scrambled_bytes, 2 << 20);
        assert_eq!(report.counters[0].pvalidate.validate_2m.ok, 1);
        assert!(report.referee.is_none());
    }

    #[test]
    fn ends_say_why() {
        let platform = platform("");
        let terminated = End::Terminated {
            vmpl: Vmpl::VMPL0,
            set: 5,
            code: 8,
        };
        let report = platform.report(terminated);
        assert!(report.reason.contains("MAP_OVERLAP"));
        assert_eq!(report.termination.map(|t| (t.set, t.code)), Some((5, 8)));
        let halted = End::Halted {
            vmpl: Vmpl::VMPL1,
            rip: 0x1000,
            rsp: LINUX_C_BIT_CHECK_RSP,
        };
        assert!(platform.report(halted).reason.contains("C-bit"));
        assert_eq!(platform.report(End::GuestExit(0x2A)).code, 0x2A);
    }

    #[test]
    fn progress_is_told_in_steps() {
        let mut platform = platform("");
        for _ in 0..3 {
            platform.book_validated(48 << 20, true);
        }
        platform.book_validated(48 << 20, false);
        platform.book_validated(48 << 20, true);
        let steps: Vec<u64> = platform
            .take_events()
            .iter()
            .filter_map(|event| match event {
                Event::Progress(progress) => Some(progress.validated_bytes >> 20),
                _ => None,
            })
            .collect();
        assert_eq!(steps, [96, 144]);
    }
}
