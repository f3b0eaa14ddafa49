//! What a run can be asked to show: beyond its outcome, for people who look for something.
//!
//! | module | what it makes |
//! |---|---|
//! | [`gdb`] | a debugger session: symbols, breakpoints, memory |
//! | [`report`] | all that is known about the run, as JSON; [`latency`]: what its histograms tell |
//! | [`plot`] | memory and latency as a drawing |
//! | [`symbolise`] | stack traces with the names of functions |
//! | [`trace`] | a text file with a line per world switch and request |

mod gdb;
pub mod latency;
mod plot;
mod report;
mod symbolise;
mod trace;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::Args;
use e2e::vm::{Config, Finished, Happening, Trace};
use protocols::launch::Fault;

use crate::build::ForRun;
use symbolise::Programs;

/// What `xtask run` can be asked to show.
#[derive(Clone, Debug, Args)]
#[group(id = "observe")]
#[command(next_help_heading = "What to show, and faults to look at")]
pub struct Options {
    /// Let something go wrong on purpose: skip-scrub, validate-twice, panic, machine-panic, …
    /// (a wrong name lists all). Faults of the paravisor need its test build, so the launch digest
    /// differs
    #[arg(long, value_name = "FAULT", value_parser = fault)]
    fault: Option<Deliberate>,
    /// Write all that is known about the run to FILE, as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Draw accepted memory over time and the latency of calls into FILE, as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Write a line per world switch and request of the guest to FILE
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Trace every exit, too: the run becomes many times slower
    #[arg(long, requires = "trace")]
    trace_all: bool,
    /// Stop before the first instruction until gdb says go on; prints how to start gdb
    #[arg(long)]
    gdb: bool,
}

impl Options {
    /// The paravisor's deliberate fault, [`Fault::NONE`] if it is to behave.
    pub fn fault(&self) -> Fault {
        match self.fault {
            Some(Deliberate::Paravisor(fault)) => fault,
            Some(Deliberate::Machine(_)) | None => Fault::NONE,
        }
    }

    /// What the machine is to trace.
    pub fn traced(&self) -> Trace {
        match (&self.trace, self.trace_all) {
            (None, _) => Trace::Off,
            (Some(_), false) => Trace::Switches,
            (Some(_), true) => Trace::All,
        }
    }

    /// Where QEMU waits for the debugger of a run in `dir`, if it does.
    pub fn debugger(&self, dir: &Path) -> Option<PathBuf> {
        self.gdb.then(|| gdb::socket(dir))
    }

    /// Makes ready for a run of the programs that [`keep_programs`] put into its directory. `root`
    /// is the checkout: paths of source files are shown relative to it.
    pub fn begin(&self, config: &Config, root: &Path) -> Result<Observer> {
        if config.debugger.is_some() {
            gdb::prepare(&config.dir, root)?;
        }
        let programs = Programs {
            paravisor: config.dir.join(PARAVISOR),
            machine: config.dir.join(MACHINE),
            root: root.to_path_buf(),
        };
        // An hour later is too late to hear that a file cannot be written.
        for file in [&self.report, &self.plot].into_iter().flatten() {
            File::create(file).with_context(|| format!("{}: cannot be written", file.display()))?;
        }
        let report = match &self.report {
            Some(path) => Some((
                path.clone(),
                report::Inputs::of(config, &programs.paravisor)?,
            )),
            None => None,
        };
        Ok(Observer {
            report,
            plot: self.plot.clone(),
            trace: self
                .trace
                .as_deref()
                .map(trace::Writer::create)
                .transpose()?,
            failed: None,
            programs,
        })
    }

    /// How the machine is to break, if it is.
    pub fn breakage(&self) -> Option<&'static str> {
        match self.fault {
            Some(Deliberate::Machine(breakage)) => Some(breakage),
            Some(Deliberate::Paravisor(_)) | None => None,
        }
    }
}

/// The names that the programs of a run have in its directory: ELF files with debug information.
const PARAVISOR: &str = "svsm.elf";
const MACHINE: &str = "machine.elf";

/// Copies the programs of a run into its directory, so that a build during or after the run cannot
/// change what its addresses mean.
pub fn keep_programs(built: &ForRun, dir: &Path) -> Result<()> {
    for (elf, name) in [(&built.paravisor, PARAVISOR), (&built.machine, MACHINE)] {
        fs::copy(elf, dir.join(name))
            .with_context(|| format!("{}: cannot be copied to {}", elf.display(), dir.display()))?;
    }
    Ok(())
}

/// What is shown of one run, from its begin to its end.
#[derive(Debug)]
pub struct Observer {
    report: Option<(PathBuf, report::Inputs)>,
    plot: Option<PathBuf>,
    trace: Option<trace::Writer>,
    /// The first thing that could not be written; told at the end, the run goes on.
    failed: Option<anyhow::Error>,
    programs: Programs,
}

impl Observer {
    /// Looks at something that happened.
    pub fn see(&mut self, happening: &Happening) {
        if let (Some(trace), Happening::Machine(event)) = (&mut self.trace, happening)
            && let Err(error) = trace.see(event)
        {
            self.failed.get_or_insert(error);
            // A full disk does not get better by itself.
            self.trace = None;
        }
    }

    /// Shows what is shown at the end.
    pub fn end(self, finished: &Finished) -> Result<()> {
        eprint!("{}", symbolise::stack_traces(finished, &self.programs));
        if let Some(trace) = self.trace {
            trace.close()?;
        }
        if let Some((path, inputs)) = &self.report {
            report::write(path, inputs, finished)?;
        }
        if let Some(path) = &self.plot {
            plot::write(path, finished)?;
        }
        self.failed.map_or(Ok(()), Err)
    }
}

/// Something that goes wrong on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deliberate {
    /// The test build of the paravisor commits it.
    Paravisor(Fault),
    /// The machine breaks, as its setting `break` says.
    Machine(&'static str),
}

/// How the machine can break.
const BREAKAGES: [&str; 2] = ["panic", "exception"];

/// All faults by the name they have on command lines: the paravisor's are the constants of
/// [`Fault`].
fn faults() -> impl Iterator<Item = (String, Deliberate)> {
    let paravisor = (1..=u8::MAX).filter_map(|code| {
        let fault = Fault(code.into());
        let name = fault.name()?.to_ascii_lowercase().replace('_', "-");
        Some((name, Deliberate::Paravisor(fault)))
    });
    let machine = BREAKAGES.map(|name| (format!("machine-{name}"), Deliberate::Machine(name)));
    paravisor.chain(machine)
}

fn fault(text: &str) -> Result<Deliberate, String> {
    faults()
        .find_map(|(name, fault)| (name == text).then_some(fault))
        .ok_or_else(|| {
            let names: Vec<_> = faults().map(|(name, _)| name).collect();
            format!("expected one of {}", names.join(", "))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_have_names() {
        assert_eq!(fault("panic"), Ok(Deliberate::Paravisor(Fault::PANIC)));
        let before = Fault::GRANT_BEFORE_SCRUB;
        assert_eq!(
            fault("grant-before-scrub"),
            Ok(Deliberate::Paravisor(before))
        );
        assert_eq!(fault("machine-panic"), Ok(Deliberate::Machine("panic")));
        for bad in ["", "none", "PANIC", "skip_scrub"] {
            let error = fault(bad).unwrap_err();
            assert!(
                error.contains("skip-scrub") && error.contains("panic"),
                "{error}"
            );
        }
    }
}
