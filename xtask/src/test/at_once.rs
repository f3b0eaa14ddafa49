//! Do builds at the same time get in each other's way?
//!
//! Cargo writes the paravisor and the one with deliberate faults to the same place. Two runs of `xtask` build
//! both at once, and each must get its own.

use std::path::Path;
use std::thread;

use anyhow::{Result, anyhow, ensure};
use e2e::scenario::Check;

use crate::build;
use crate::layout::{Layout, read};
use crate::progress::Step;
use crate::toolchain::BareTarget;

/// The name for `--filter` and `--list`.
pub const NAME: &str = "build/at-once";

/// How often both are built. Without a lock one of the first few pairs goes wrong.
const ROUNDS: u32 = 20;

/// Builds each alone, then both at once.
pub fn perform(layout: &Layout, target: BareTarget, _: &Path, step: &Step) -> Result<Vec<Check>> {
    let plain = || read(&build::paravisor(layout, target, step)?);
    let faulty = || read(&build::faulty_paravisor(layout, target, step)?);
    let (plain_alone, faulty_alone) = (plain()?, faulty()?);
    ensure!(plain_alone != faulty_alone, "the two are the same");
    let mut wrong = [0; 2];
    for _ in 0..ROUNDS {
        let (plain_now, faulty_now) = thread::scope(|scope| {
            let other = scope.spawn(faulty);
            let plain_now = plain();
            let faulty_now = other.join().map_err(|_| anyhow!("a build panicked"))?;
            anyhow::Ok((plain_now?, faulty_now?))
        })?;
        wrong[0] += u32::from(plain_now != plain_alone);
        wrong[1] += u32::from(faulty_now != faulty_alone);
    }
    let checks = [("plain", wrong[0]), ("faulty", wrong[1])].map(|(name, wrong)| Check {
        name: format!("the {name} paravisor is the one that was asked for"),
        failure: (wrong > 0).then(|| format!("{wrong} of {ROUNDS} were not")),
    });
    Ok(checks.into())
}
