//! Which cores of the computer QEMU runs on.
//!
//! QEMU emulates the pin by which an x87 error was told to a chipset, and keeps its state in the
//! flags of its *first* processor, beside those that say whether a guest runs, whether nested
//! paging is on and whether interrupts are held off. Every FXRSTOR, on whatever processor, writes
//! to these flags, with an ordinary AND in memory: while the first processor enters or leaves its
//! guest on another core, one of the two writes is lost (`docs/machine.md`). On one core there is
//! no such moment: threads are not exchanged in the middle of an instruction.
//!
//! Invariant: a core is given to another run only when every other one has as many.

use std::process::{Child, Command};
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{Context, Result, bail};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// What QEMU may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cores {
    /// One core if the machine has several processors: slower, and right.
    #[default]
    One,
    /// All: right for guests of one processor, and for such as do not use FXRSTOR.
    All,
}

impl FromStr for Cores {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Cores> {
        match text {
            "one" => Ok(Cores::One),
            "all" => Ok(Cores::All),
            _ => bail!("expected one or all"),
        }
    }
}

/// Cores that run machines, each as often as it does.
static TAKEN: Mutex<Vec<usize>> = Mutex::new(Vec::new());

/// A core that a machine runs on, until dropped.
#[derive(Debug)]
pub(super) struct Core(usize);

impl Core {
    /// The one that the fewest machines run on, of those this thread may use.
    fn take() -> Result<Core> {
        let allowed = sched_getaffinity(None).context("the cores that may be used")?;
        let mut taken = taken();
        let machines = |core: usize| taken.iter().filter(|&&other| other == core).count();
        let core = (0..CpuSet::MAX_CPU)
            .filter(|&core| allowed.is_set(core))
            .min_by_key(|&core| machines(core))
            .context("there is no core that may be used")?;
        taken.push(core);
        Ok(Core(core))
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        let mut taken = taken();
        if let Some(at) = taken.iter().position(|&core| core == self.0) {
            taken.swap_remove(at);
        }
    }
}

fn taken() -> MutexGuard<'static, Vec<usize>> {
    // Right at any time: a panic of another thread does not spoil it.
    TAKEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts `qemu` on one core of this computer, with all of its threads.
pub(super) fn spawn_on_one(qemu: &mut Command) -> Result<(Child, Core)> {
    let core = Core::take()?;
    // A process begins with the cores of the thread that has started it.
    let spawned = thread::scope(|scope| {
        let starter = scope.spawn(|| {
            let mut set = CpuSet::new();
            set.set(core.0);
            sched_setaffinity(None, &set)?;
            qemu.spawn()
        });
        starter
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    Ok((spawned?, core))
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    #[test]
    fn what_is_started_has_one_core_and_others_get_others() {
        let allowed = thread::available_parallelism().unwrap().get();
        let runs: Vec<_> = (0..allowed)
            .map(|_| {
                let mut command = Command::new("nproc");
                // It would believe these.
                command
                    .env_remove("OMP_NUM_THREADS")
                    .env_remove("OMP_THREAD_LIMIT")
                    .stdout(Stdio::piped());
                let (child, core) = spawn_on_one(&mut command).unwrap();
                let said = child.wait_with_output().unwrap().stdout;
                assert_eq!(String::from_utf8(said).unwrap(), "1\n");
                core
            })
            .collect();
        let mut cores: Vec<_> = runs.iter().map(|core| core.0).collect();
        cores.sort_unstable();
        cores.dedup();
        assert_eq!(cores.len(), allowed);
        assert_eq!(thread::available_parallelism().unwrap().get(), allowed);
        drop(runs);
        assert!(taken().is_empty());
    }
}
