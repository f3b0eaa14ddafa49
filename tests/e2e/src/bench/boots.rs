//! How long a boot takes in virtual time, and what of it is acceptance.
//!
//! The measure is the instructions that guest and paravisor execute between the guest's start and
//! its end. Ticks of the time stamp counter are told beside it, but say little: most are the
//! machine's, which needs thousands of instructions for what a real processor does in one, and
//! overwrites and searches every page that changes hands.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use protocols::launch::{AcceptPolicy, Acceptance, Fault, READ_AHEAD_LIMIT};
use protocols::report::{Outcome, Report};

use crate::image::Recipe;
use crate::scenario::Context;
use crate::vm::{Backing, Config, Finished, Settings, Stage, Vc};

/// How long the boot may take.
const LIMIT: Duration = Duration::from_secs(1800);
/// The local APIC's timer cannot be read while QEMU counts instructions (it gives up with "Bad
/// icount read" in x2APIC mode), and Linux reads it to calibrate it: another timer has to do.
const APPEND: &str = "nolapic_timer";

/// How memory is accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// When the guest asks.
    Lazy,
    /// All of it before the guest starts, which is not counted.
    Eager,
    /// Behind each request, as much as an image may say. Nobody walks: that takes a processor which the guest
    /// has not started, and instructions are counted with one processor only.
    Ahead,
    /// Not at all: it costs nothing ([`Fault::PRE_ACCEPTED`]).
    Control,
}

impl Policy {
    /// All of them, the control last.
    pub const ALL: [Policy; 4] = [Policy::Lazy, Policy::Eager, Policy::Ahead, Policy::Control];

    /// The name on command lines and in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Policy::Lazy => "lazy",
            Policy::Eager => "eager",
            Policy::Ahead => "ahead",
            Policy::Control => "control",
        }
    }

    /// What the image says about it.
    const fn acceptance(self) -> Acceptance {
        let policy = match self {
            Policy::Lazy | Policy::Control => AcceptPolicy::LAZY,
            Policy::Eager => AcceptPolicy::EAGER,
            Policy::Ahead => AcceptPolicy::AHEAD,
        };
        let read_ahead = match self {
            Policy::Ahead => READ_AHEAD_LIMIT,
            _ => 0,
        };
        Acceptance {
            policy,
            read_ahead,
            ..Acceptance::LAZY
        }
    }
}

/// What one boot took.
#[derive(Clone, Debug)]
pub struct Boot {
    /// How memory was accepted.
    pub policy: Policy,
    /// Ticks from the guest's start to its end, which is when userspace runs: the command that it
    /// runs does nothing.
    pub ticks: u64,
    /// Instructions of the paravisor from the guest's start on.
    pub paravisor: u64,
    /// Instructions of the guest.
    pub guest: u64,
    /// What the machine reported.
    pub report: Report,
    /// Seconds that it took here.
    pub wall: Duration,
}

impl Boot {
    /// Virtual time from the guest's start on: what guest and paravisor have executed.
    pub const fn time(&self) -> u64 {
        self.paravisor + self.guest
    }

    /// Boots Debian in a guest with so much memory.
    pub fn run(context: &Context, policy: Policy, backing: Backing, memory: &str) -> Result<Boot> {
        let artefacts = &context.artefacts;
        let (paravisor, fault) = match policy {
            Policy::Control => (&artefacts.faulty_paravisor, Fault::PRE_ACCEPTED),
            _ => (&artefacts.paravisor, Fault::NONE),
        };
        let (image, sidecar) = context.image_of(Recipe {
            paravisor,
            firmware: Some(&artefacts.ovmf),
            td_firmware: None,
            fault,
            acceptance: policy.acceptance(),
        })?;
        let settings = Settings {
            backing,
            vc: Vc::Direct,
            icount: true,
            ..Settings::default()
        };
        let mut linux = context.linux("true")?;
        linux.append = format!("{} {APPEND}", linux.append);
        let mut config = Config {
            memory: memory.to_owned(),
            linux: Some(linux),
            ..context.machine(image, &sidecar, settings)
        };
        if policy == Policy::Control {
            // What is valid and unclaimed is just what the referee would complain of.
            config.settings.map_descriptor = None;
        }
        Boot::of(policy, &config.run(LIMIT, |_| {})?)
    }

    fn of(policy: Policy, finished: &Finished) -> Result<Boot> {
        let report = finished.report()?;
        ensure!(
            report.outcome == Outcome::PowerOff
                && finished
                    .stages
                    .iter()
                    .any(|(stage, _)| *stage == Stage::Userspace),
            "the boot did not end in userspace but by {:?}: {}; its logs are in {}",
            report.outcome,
            report.reason,
            finished.dir.display()
        );
        let started = finished.guest_start()?;
        let ended = report.samples.last().context("the end was not seen")?.tsc;
        Ok(Boot {
            policy,
            ticks: ended.saturating_sub(started.tsc),
            paravisor: report.counters[0]
                .instructions
                .saturating_sub(started.instructions),
            guest: report.counters[1].instructions,
            report: report.clone(),
            wall: finished.wall,
        })
    }
}
