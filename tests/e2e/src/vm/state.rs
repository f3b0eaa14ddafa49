//! What the processors were doing when a run's time was up: QEMU's monitor is asked, and what it says is
//! kept beside the other logs. A run that ended tells by its report; of one that did not there is
//! nothing else.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::ChildStdin;
use std::thread::sleep;
use std::time::Duration;

/// The answers have come when nothing was added for so long.
const QUIET: Duration = Duration::from_millis(500);
/// How often QEMU is given that time, if it goes on talking or has yet to begin.
const LOOKS: u32 = 40;
/// How often each processor is looked at: one that is stuck and one that goes in circles differ by that.
const ROUNDS: u32 = 3;

/// Asks the monitor behind `questions`, whose answers go to the file `log`. What cannot be had is left out:
/// the run has failed already.
pub(super) fn ask(questions: &mut ChildStdin, log: &Path, vcpus: u32) {
    for _ in 0..ROUNDS {
        let mut text = String::from("info registers -a\n");
        // Identifiers of APICs are the processors' numbers.
        text.extend((0..vcpus).map(|id| format!("info lapic {id}\n")));
        if questions.write_all(text.as_bytes()).is_err() {
            return;
        }
        let size = || fs::metadata(log).map_or(0, |file| file.len());
        let mut before = size();
        for _ in 0..LOOKS {
            sleep(QUIET);
            let now = size();
            if now == before && now > 0 {
                break;
            }
            before = now;
        }
    }
}
