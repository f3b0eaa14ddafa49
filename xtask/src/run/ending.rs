//! How a run ended, and the exit status of `xtask run` that tells it.
//!
//! | status | the run ended because |
//! |---|---|
//! | 0 | the guest switched the machine off, and the command of `--exec`, if any, succeeded |
//! | 1 | `xtask` could not do what it was asked; nothing is said about the guest |
//! | 2 | the command line was not understood |
//! | 80 | the guest asked for a reset (reboot) |
//! | 81 | the guest's kernel panicked |
//! | 82 | the guest ended itself through the GHCB |
//! | 83 | the paravisor ended the guest through the GHCB |
//! | 84 | a processor halted with nothing left that could wake it |
//! | 85 | a processor met a triple fault |
//! | 86 | the machine refused to go on: something no host can resolve |
//! | 87 | the image could not be launched |
//! | 88 | the machine did not understand its settings |
//! | 89 | a test guest ended itself by port 0xF4 |
//! | 90 | the referee or the machine found a mistake, though the guest went on |
//! | 91 | its time was up (`--timeout`) |
//! | 92 | QEMU ended without a report of the machine |
//! | 93 | the guest was switched off before the command of `--exec` had ended |
//! | 94 | as 0, in a kernel that was started by kexec |
//! | 95 | QEMU has lost the state of a processor; nothing is said about the guest |
//!
//! Any other status is that of the command of `--exec` (above 255: 255). Such a command is told from
//! the rows above by its own use of 80 to 95.

use std::fmt;

use e2e::vm::Finished;
use protocols::report::{Outcome, Report};
use protocols::terminate::explain;

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Switched off, and all is well.
    PowerOff,
    /// Switched off in a kernel that another one started, and all is well.
    Kexec,
    /// Switched off after the command of `--exec` had ended with this status.
    Command(i32),
    /// Switched off before the command of `--exec` had ended.
    Unfinished,
    /// The guest asked for a reset.
    Reset,
    /// The guest's kernel panicked.
    Panic(String),
    /// A termination request of this level, with its reason.
    Terminated(u8, String),
    /// Another word of the machine, with its reason.
    Machine(Outcome, String),
    /// Something was found that must not be.
    Mistake(String),
    /// Its time was up.
    TimedOut(u64),
}

/// What a kernel says first, once for each kernel.
const KERNEL_BEGINS: &str = "] Linux version ";
/// What a kernel says when it panics.
const KERNEL_PANICS: &str = "Kernel panic - not syncing";

impl Ending {
    /// Reads how `finished` ended; `exec` says whether there was a command. None if neither the
    /// machine nor the clock has said anything.
    pub fn of(finished: &Finished, exec: bool) -> Option<Ending> {
        let panic = finished
            .console
            .lines()
            .find_map(|line| line.find(KERNEL_PANICS).and_then(|at| line.get(at..)));
        let Some(report) = &finished.report else {
            return finished.timed_out.then(|| match panic {
                Some(line) => Ending::panic(line),
                None => Ending::TimedOut(finished.wall.as_secs()),
            });
        };
        Some(match report.outcome {
            Outcome::Terminated => {
                let why = report.termination.clone().unwrap_or_default();
                Ending::Terminated(why.vmpl, explain(why.set, why.code).to_string())
            }
            Outcome::PowerOff | Outcome::Reset | Outcome::GuestExit | Outcome::Halted
                if mistake(report).is_some() =>
            {
                Ending::Mistake(mistake(report).unwrap_or_default())
            }
            Outcome::Reset | Outcome::Halted | Outcome::Shutdown if panic.is_some() => {
                Ending::panic(panic.unwrap_or_default())
            }
            Outcome::Reset => Ending::Reset,
            Outcome::PowerOff => switched_off(finished, exec),
            outcome => Ending::Machine(outcome, report.reason.clone()),
        })
    }

    fn panic(line: &str) -> Ending {
        Ending::Panic(line.trim().to_owned())
    }

    /// The exit status, as in the table above.
    pub fn status(&self) -> u8 {
        match self {
            Ending::PowerOff => 0,
            Ending::Reset => 80,
            Ending::Panic(_) => 81,
            Ending::Terminated(0, _) => 83,
            Ending::Terminated(..) => 82,
            Ending::Machine(outcome, _) => match outcome {
                Outcome::Halted => 84,
                Outcome::Shutdown => 85,
                Outcome::LaunchFailed => 87,
                Outcome::BadSettings => 88,
                Outcome::GuestExit => 89,
                Outcome::EmulatorFault => 95,
                // The first three have endings of their own.
                Outcome::PowerOff | Outcome::Reset | Outcome::Terminated | Outcome::Refused => 86,
            },
            Ending::Mistake(_) => 90,
            Ending::TimedOut(_) => 91,
            Ending::Unfinished => 93,
            Ending::Kexec => 94,
            Ending::Command(status) => u8::try_from(*status).unwrap_or(u8::MAX),
        }
    }
}

/// The status of a run whose QEMU left no report.
pub const NO_REPORT: u8 = 92;

/// How a run ended whose guest switched the machine off; all else is well.
pub fn switched_off(finished: &Finished, exec: bool) -> Ending {
    let kernels = finished.console.matches(KERNEL_BEGINS).count();
    match finished.exec_status {
        None if exec => Ending::Unfinished,
        Some(status) if exec && status != 0 => Ending::Command(status),
        _ if kernels > 1 => Ending::Kexec,
        _ => Ending::PowerOff,
    }
}

/// What the referee or the machine found wrong.
fn mistake(report: &Report) -> Option<String> {
    let disagreements = report
        .referee
        .as_ref()
        .map_or(0, |referee| referee.disagreements);
    if disagreements > 0 {
        return Some(format!(
            "the referee found {disagreements} disagreements of map and RMP"
        ));
    }
    (report.violations.total() > 0).then(|| format!("the machine saw {:?}", report.violations))
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ending::PowerOff => f.write_str("the guest switched the machine off"),
            Ending::Kexec => {
                f.write_str("the guest switched the machine off, in a kernel started by kexec")
            }
            Ending::Command(status) => write!(f, "the command ended with status {status}"),
            Ending::Unfinished => {
                f.write_str("the guest was switched off before the command of --exec had ended")
            }
            Ending::Reset => f.write_str("the guest asked for a reset"),
            Ending::Panic(line) => write!(f, "the guest's kernel panicked: {line}"),
            Ending::Terminated(vmpl, why) => write!(f, "VMPL{vmpl} ended the guest: {why}"),
            Ending::Machine(outcome, reason) => write!(f, "{outcome:?}: {reason}"),
            Ending::Mistake(what) => f.write_str(what),
            Ending::TimedOut(seconds) => write!(f, "its time was up after {seconds} s"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use protocols::report::{Referee, Termination};

    use super::*;

    fn finished(report: Option<Report>, console: &str, exec_status: Option<i32>) -> Finished {
        Finished {
            dir: PathBuf::new(),
            timed_out: report.is_none(),
            report,
            launch: None,
            events: Vec::new(),
            stages: Vec::new(),
            console: console.into(),
            output: Vec::new(),
            exec_status,
            wall: Duration::from_secs(7),
            qemu_status: None,
        }
    }

    fn status(outcome: Outcome, console: &str, exec_status: Option<i32>) -> u8 {
        let report = Report::new(outcome, String::new());
        let finished = finished(Some(report), console, exec_status);
        Ending::of(&finished, exec_status.is_some())
            .unwrap()
            .status()
    }

    #[test]
    fn a_commands_status_is_passed_on() {
        assert_eq!(status(Outcome::PowerOff, "", Some(0)), 0);
        assert_eq!(status(Outcome::PowerOff, "", Some(42)), 42);
        assert_eq!(status(Outcome::PowerOff, "", Some(300)), 255);
        let report = Report::new(Outcome::PowerOff, String::new());
        let unfinished = finished(Some(report), "", None);
        assert_eq!(Ending::of(&unfinished, true).unwrap().status(), 93);
        assert_eq!(Ending::of(&unfinished, false).unwrap().status(), 0);
    }

    #[test]
    fn the_console_tells_a_panic_and_a_second_kernel() {
        let panic = "[    1.0] Kernel panic - not syncing: sysrq triggered crash\n";
        assert_eq!(status(Outcome::Reset, panic, None), 81);
        assert_eq!(status(Outcome::Reset, "", None), 80);
        let two = "[    0.0] Linux version 7.2\n[    0.0] Linux version 7.2\n";
        assert_eq!(status(Outcome::PowerOff, two, None), 94);
        assert_eq!(status(Outcome::PowerOff, two, Some(0)), 94);
        assert_eq!(status(Outcome::PowerOff, two, Some(3)), 3);
    }

    #[test]
    fn without_a_report_the_clock_decides() {
        let late = finished(None, "", None);
        assert_eq!(Ending::of(&late, false), Some(Ending::TimedOut(7)));
        let hung = finished(None, "Kernel panic - not syncing: x\n", None);
        assert_eq!(Ending::of(&hung, false).unwrap().status(), 81);
        let crashed = Finished {
            timed_out: false,
            ..hung
        };
        assert_eq!(Ending::of(&crashed, false), None);
    }

    #[test]
    fn a_mistake_is_never_a_success() {
        let mut report = Report::new(Outcome::PowerOff, String::new());
        report.referee = Some(Referee {
            disagreements: 1,
            ..Referee::default()
        });
        let finished = finished(Some(report), "", Some(0));
        assert_eq!(Ending::of(&finished, true).unwrap().status(), 90);
    }

    #[test]
    fn who_terminated_is_told() {
        for (vmpl, expected) in [(0, 83), (1, 82)] {
            let mut report = Report::new(Outcome::Terminated, String::new());
            report.termination = Some(Termination {
                vmpl,
                ..Termination::default()
            });
            let finished = finished(Some(report), "", None);
            assert_eq!(Ending::of(&finished, false).unwrap().status(), expected);
        }
    }

    #[test]
    fn every_word_of_the_machine_has_a_status_of_its_own() {
        let mut statuses: Vec<u8> = [
            Outcome::PowerOff,
            Outcome::Reset,
            Outcome::GuestExit,
            Outcome::Terminated,
            Outcome::Halted,
            Outcome::Shutdown,
            Outcome::Refused,
            Outcome::LaunchFailed,
            Outcome::BadSettings,
            Outcome::EmulatorFault,
        ]
        .map(|outcome| status(outcome, "", None))
        .into();
        statuses.push(NO_REPORT);
        let all = statuses.len();
        statuses.sort_unstable();
        statuses.dedup();
        assert_eq!(statuses.len(), all);
    }
}
