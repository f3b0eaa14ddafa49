//! What the emulated machine says: one JSON object per line, told apart by the field `event`.
//!
//! The machine writes these lines to port 0xE9 while it runs; the last line of every run is
//! an [`Event::Report`]. `xtask` and the end-to-end tests read them back with the same types.
//! The format is described field by field in `docs/report.md`; readers ignore unknown fields,
//! so fields may be added without a new version.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::addr::Vmpl;

mod calls;
mod counters;
mod memory;

pub use calls::*;
pub use counters::*;
pub use memory::*;

/// Version of the format, field `version` of [`Machine`].
pub const FORMAT_VERSION: u32 = 2;

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The machine has started.
    Machine(Machine),
    /// The image has been launched and measured.
    Launch(Launch),
    /// A stage of the boot has begun.
    Stage(Stage),
    /// Another 64 MiB have been validated.
    Progress(Progress),
    /// A remark.
    Log(Log),
    /// The machine refused something that real hardware or a strict host would refuse.
    Refusal(Refusal),
    /// What a processor does, if the run is traced.
    Trace(Trace),
    /// The end of the run; always the last line.
    Report(Box<Report>),
}

/// The machine as it was configured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Machine {
    /// [`FORMAT_VERSION`].
    pub version: u32,
    /// Bytes of RAM below 4 GiB, the machine's own included.
    pub low_ram: u64,
    /// Bytes of RAM from 4 GiB.
    pub high_ram: u64,
    /// Bytes the machine keeps for itself at the top of low RAM.
    pub reserved: u64,
    /// Virtual processors.
    pub vcpus: u32,
    /// Ticks of the time stamp counter in a second, as measured; 0 if they were not.
    pub tsc_hz: u64,
    /// Settings as understood, defaults included.
    pub settings: BTreeMap<String, String>,
}

/// The launched image.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Launch {
    /// Launch digest, 96 hexadecimal digits, lower case.
    pub digest: String,
    /// Launched 4 KiB pages by type.
    pub pages: LaunchPages,
    /// Where the VMSA was launched.
    pub vmsa_gpa: u64,
}

/// Launched 4 KiB pages by page type (SNP ABI, SNP_LAUNCH_UPDATE).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LaunchPages {
    /// Normal pages.
    pub normal: u64,
    /// VMSA pages.
    pub vmsa: u64,
    /// Zero pages.
    pub zero: u64,
    /// Unmeasured pages.
    pub unmeasured: u64,
    /// Secrets pages.
    pub secrets: u64,
    /// CPUID pages.
    pub cpuid: u64,
}

/// A stage of the boot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stage {
    /// Which stage.
    pub name: StageName,
    /// Time stamp counter when it began.
    pub tsc: u64,
    /// Instructions of VMPL0 until then, if they are counted; else 0.
    #[serde(default)]
    pub instructions: u64,
    /// Bytes validated by VMPL0 since the launch until then, minus those rescinded.
    #[serde(default)]
    pub validated_bytes: u64,
}

/// The stages that the machine can see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StageName {
    /// VMPL0 is entered for the first time.
    Paravisor,
    /// A lower VMPL is entered for the first time.
    Firmware,
}

/// How much memory has been accepted.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Progress {
    /// Bytes validated by VMPL0 since the launch, minus those rescinded.
    pub validated_bytes: u64,
    /// Time stamp counter.
    pub tsc: u64,
}

/// A remark.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Log {
    /// For humans.
    pub text: String,
}

/// Something that was refused.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Refusal {
    /// For humans.
    pub text: String,
    /// The page in question, if one was.
    pub gpa: Option<u64>,
    /// Who asked.
    pub vmpl: u8,
    /// Where it asked from.
    pub rip: u64,
}

/// One step of a traced run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Trace {
    /// Time stamp counter.
    pub tsc: u64,
    /// Which processor.
    pub vcpu: u32,
    /// The level that runs there.
    pub vmpl: u8,
    /// Where that level is.
    pub rip: u64,
    /// For humans.
    pub text: String,
}

/// The end of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// How the run ended.
    pub outcome: Outcome,
    /// The value a guest wrote to port 0xF4 ([`Outcome::GuestExit`]), the code of a trust domain's
    /// ReportFatalError ([`Outcome::Terminated`]), else 0.
    pub code: u64,
    /// One line for humans.
    pub reason: String,
    /// Who ended the run, and why ([`Outcome::Terminated`]).
    #[serde(default)]
    pub termination: Option<Termination>,
    /// Counters of VMPL 0 to 3, summed over all processors.
    #[serde(default)]
    pub counters: [VmplCounters; Vmpl::COUNT],
    /// Calls, summed over all processors.
    #[serde(default)]
    pub calls: Vec<CallCounters>,
    /// The same of each processor.
    #[serde(default)]
    pub vcpus: Vec<VcpuCounters>,
    /// Accepted memory over time, oldest first.
    #[serde(default)]
    pub samples: Vec<Sample>,
    /// Memory at the end, and what was done to it.
    #[serde(default)]
    pub memory: Memory,
    /// The referee's verdict; none if no map was named in the settings.
    #[serde(default)]
    pub referee: Option<Referee>,
    /// What the machine saw and no good run contains.
    #[serde(default)]
    pub violations: Violations,
}

impl Report {
    /// A report that says how the run ended and nothing else yet.
    #[must_use]
    pub fn new(outcome: Outcome, reason: String) -> Self {
        Self {
            outcome,
            code: 0,
            reason,
            termination: None,
            counters: Default::default(),
            calls: Vec::new(),
            vcpus: Vec::new(),
            samples: Vec::new(),
            memory: Memory::default(),
            referee: None,
            violations: Violations::default(),
        }
    }
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The guest switched the machine off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest wrote to port 0xF4.
    GuestExit,
    /// A termination request through the GHCB, or ReportFatalError of a trust domain.
    Terminated,
    /// A processor halted with nothing left that could wake it.
    Halted,
    /// Triple fault.
    Shutdown,
    /// The machine refused to go on.
    Refused,
    /// The image could not be launched.
    LaunchFailed,
    /// The settings were not understood.
    BadSettings,
    /// QEMU has lost the state of a processor; nothing is said about the guest.
    EmulatorFault,
}

impl Outcome {
    /// The value the machine writes to QEMU's exit device.
    #[must_use]
    pub const fn device_value(self) -> u8 {
        match self {
            Self::PowerOff => 0x10,
            Self::Reset => 0x11,
            Self::GuestExit => 0x12,
            Self::Terminated => 0x13,
            Self::Halted => 0x14,
            Self::Shutdown => 0x15,
            Self::Refused => 0x16,
            Self::LaunchFailed => 0x17,
            Self::BadSettings => 0x18,
            Self::EmulatorFault => 0x19,
        }
    }

    /// QEMU's exit status for this outcome. Never 0 or 1, which QEMU uses itself.
    #[must_use]
    pub const fn qemu_status(self) -> u8 {
        self.device_value() << 1 | 1
    }
}

/// A termination request, decoded.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Termination {
    /// Reason set.
    pub set: u8,
    /// Reason code.
    pub code: u8,
    /// [`crate::terminate::explain`] of both.
    pub text: String,
    /// Who asked.
    pub vmpl: u8,
}

/// The referee's comparison of the machine's RMP with the paravisor's map.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Referee {
    /// Pages compared.
    pub checked: u64,
    /// Pages on which RMP and map disagree.
    pub disagreements: u64,
    /// Pages that are not validated although the map says so, because the guest gave them away
    /// itself by an access through the shared alias. No fault of the paravisor's, which is not told.
    pub given_away: u64,
    /// The first few of them.
    pub first: Vec<Disagreement>,
}

/// One page on which RMP and map disagree.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Disagreement {
    /// The page.
    pub gpa: u64,
    /// What the map says.
    pub map: String,
    /// What the RMP says.
    pub rmp: String,
}

/// What the machine saw and no good run contains: all zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Violations {
    /// PVALIDATE(1) at VMPL0 on a validated page; in a trust domain TDG.MEM.PAGE.ACCEPT by L1 of a
    /// page that it had accepted and not given back.
    pub double_validation: u64,
    /// A lower VMPL was granted a page that still held the scramble pattern.
    pub unscrubbed_grant: u64,
    /// PVALIDATE(0) on a page a lower VMPL still had permissions on.
    pub live_rescind: u64,
    /// An access of VMPL0 through the wrong alias made the host convert the page.
    pub implicit_conversion: u64,
    /// The host was asked to run a VMSA without EFER.SVME.
    pub run_without_svme: u64,
    /// A page state change to shared found the page still validated.
    pub unrescinded_share: u64,
    /// VMPL0 relied on a right being gone that another CPU may still have used: it had been in
    /// the guest since before the right was withdrawn.
    pub stale_translation: u64,
    /// PVALIDATE(0) at VMPL0 on a VMSA that runs.
    pub in_use_rescind: u64,
}

impl Violations {
    /// All of them together; 0 in a good run.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.double_validation
            + self.unscrubbed_grant
            + self.live_rescind
            + self.implicit_conversion
            + self.run_without_svme
            + self.unrescinded_share
            + self.stale_translation
            + self.in_use_rescind
    }
}

#[cfg(test)]
mod tests;
