//! The end of a run on the native platform.
//!
//! Without the machine nobody reports but the paravisor, on the console and before the firmware starts;
//! what happens afterwards is between guest and QEMU. In plain mode the machine tells how the guest ended,
//! and nothing else that says anything here.

use std::process::ExitCode;

use e2e::vm::{Census, Finished};
use protocols::report::Outcome;
use protocols::terminate::NATIVE_EXIT_VALUE;

use super::ending::{self, Ending};
use super::print_tail;

/// QEMU's exit status when the paravisor has ended it.
const ENDED_BY_PARAVISOR: u32 = NATIVE_EXIT_VALUE << 1 | 1;
/// What the paravisor says before that.
const LAST_WORDS: &str = "terminating: ";

/// Prints what the paravisor said; the exit status, and whether everything was as it should be.
pub fn conclude(finished: &Finished, exec: bool) -> (ExitCode, bool) {
    if finished.left_by_user() {
        return (ExitCode::SUCCESS, true);
    }
    let said = finished
        .console
        .lines()
        .filter_map(|line| line.trim().strip_prefix("[svsm] "));
    eprintln!("\nthe paravisor, natively");
    said.for_each(|line| eprintln!("  {line}"));
    let ending = ending(finished, exec);
    match &ending {
        Some(Ending::PowerOff | Ending::Command(_)) => {}
        Some(ending) => {
            print_tail(&finished.console);
            eprintln!("xtask: {ending}");
        }
        None => {
            print_tail(&finished.console);
            eprintln!("xtask: QEMU ended ({:?})", finished.qemu_status);
        }
    }
    let status = ending.as_ref().map_or(ending::NO_REPORT, Ending::status);
    (ExitCode::from(status), ending == Some(Ending::PowerOff))
}

/// How it ended; none if nothing tells.
fn ending(finished: &Finished, exec: bool) -> Option<Ending> {
    if finished.timed_out {
        return Some(Ending::TimedOut(finished.wall.as_secs()));
    }
    let by_paravisor = match &finished.report {
        Some(report) => {
            report.outcome == Outcome::GuestExit && report.code == u64::from(NATIVE_EXIT_VALUE)
        }
        None => {
            finished.qemu_status.and_then(|status| status.code())
                == i32::try_from(ENDED_BY_PARAVISOR).ok()
        }
    };
    if by_paravisor {
        let words = finished.console.lines().find_map(|line| {
            let at = line.find(LAST_WORDS)?;
            line.get(at + LAST_WORDS.len()..)
        });
        let words = words.unwrap_or("it gave no reason").trim();
        return Some(Ending::Terminated(0, words.to_owned()));
    }
    // What the firmware is given is only right if the rounds were.
    match Census::of(&finished.console) {
        Some(census) if census.is_good() => {}
        Some(census) => {
            return Some(Ending::Mistake(format!(
                "the paravisor's account: {census:?}"
            )));
        }
        None => return Some(Ending::Mistake("the paravisor gave no account".to_owned())),
    }
    match &finished.report {
        Some(_) => Ending::of(finished, exec),
        // QEMU ends alike for a guest that switches off and, with -no-reboot, for one that resets.
        None => finished
            .qemu_status
            .is_some_and(|status| status.success())
            .then(|| ending::switched_off(finished, exec)),
    }
}
