//! `xtask test`: everything that decides whether the tree is good.
//!
//! Formatting and lints, unit tests, then the end-to-end scenarios in QEMU. Every unit test, every
//! check of a scenario and every case of the bare-metal guests counts as one. The last line is the
//! total, alone on standard output; each failure names the logs to look at.

mod at_once;
mod cargo;
mod elsewhere;
mod slots;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::env;
use std::fs;
use std::iter;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result};
use clap::Args;
use e2e::guests::{Firmware, Kernel, TdFirmware};
use e2e::scenario::{Artefacts, Check, Context, Scenario};
use e2e::scenarios;
use e2e::vm::Logs;
use protocols::launch::{Acceptance, Fault};

use crate::command::tail;
use crate::layout::{Layout, create_dir};
use crate::progress;
use crate::toolchain::BareTarget;
use crate::{build, disk, fetch, qemu};
use cargo::Job;
use slots::Slots;

/// What `xtask test` can be told.
#[derive(Debug, Args)]
pub struct Options {
    /// Run only what has this in its name (see --list); may be given several times
    #[arg(long, value_name = "NAME")]
    filter: Vec<String>,
    /// Run the long scenarios, too: the whole matrix of guests
    #[arg(long)]
    full: bool,
    /// List the names and stop
    #[arg(long)]
    list: bool,
}

/// Does a job that needs no scenario, with its logs in a directory.
type Perform = Box<dyn Fn(&Layout, BareTarget, &Path, &progress::Step) -> Result<Vec<Check>>>;

/// Runs what was asked for and prints the total.
pub fn run(layout: &Layout, options: &Options) -> Result<ExitCode> {
    // Asked for before cargo may put a new file in its place.
    let xtask = env::current_exe().context("the path of xtask is not known")?;
    let wanted = |name: &str| {
        options.filter.is_empty() || options.filter.iter().any(|part| name.contains(part))
    };
    let cargos = Job::ALL.map(|job| {
        let perform: Perform =
            Box::new(move |layout, target, logs, step| job.perform(layout, target, logs, step));
        (job.name(), perform)
    });
    let builds: [(&str, Perform); 2] = [
        (elsewhere::NAME, Box::new(elsewhere::perform)),
        (at_once::NAME, Box::new(at_once::perform)),
    ];
    let jobs: Vec<(&str, Perform)> = cargos
        .into_iter()
        .chain(builds)
        .filter(|(name, _)| wanted(name))
        .collect();
    let scenarios: Vec<Scenario> = scenarios::all()
        .into_iter()
        .filter(|scenario| wanted(&scenario.name) && (options.full || !scenario.full_only))
        .collect();
    if options.list {
        jobs.iter().for_each(|(name, _)| println!("{name}"));
        scenarios
            .iter()
            .for_each(|scenario| println!("{}", scenario.name));
        return Ok(ExitCode::SUCCESS);
    }
    if jobs.is_empty() && scenarios.is_empty() {
        anyhow::bail!(
            "nothing has {:?} in its name; see: cargo xtask test --full --list",
            options.filter
        );
    }

    let dir = layout.artefacts.join("tests");
    let tally = Tally::default();
    let target = build::prepare(layout)?;
    for (name, perform) in jobs {
        let logs = fresh(&dir, name)?;
        let step = progress::step(name);
        let started = Instant::now();
        let checks = perform(layout, target, &logs, &step).unwrap_or_else(impossible);
        drop(step);
        tally.add(name, &checks, started, &logs);
    }
    if !scenarios.is_empty() {
        let artefacts = artefacts(layout, target, xtask, &scenarios)?;
        all_scenarios(&scenarios, &artefacts, &dir, &tally)?;
    }
    let (passed, failed) = tally.totals();
    println!("{passed} passed, {failed} failed");
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Fetches and builds what the benches in the machine use: the defaults of everything.
pub fn artefacts_for_benches(layout: &Layout) -> Result<Artefacts> {
    let xtask = env::current_exe().context("the path of xtask is not known")?;
    artefacts(layout, build::prepare(layout)?, xtask, &[])
}

/// Fetches and builds what `scenarios` use.
fn artefacts(
    layout: &Layout,
    target: BareTarget,
    xtask: PathBuf,
    scenarios: &[Scenario],
) -> Result<Artefacts> {
    let qemu = qemu::obtain(layout)?;
    let ovmf = fetch::guests::firmware(Firmware::default()).obtain(layout)?;
    let mut firmwares = BTreeMap::from([(Firmware::default(), ovmf.clone())]);
    let mut kernels = BTreeMap::new();
    for kernel in iter::once(Kernel::default()).chain(scenarios.iter().map(|s| s.kernel)) {
        if let Entry::Vacant(place) = kernels.entry(kernel) {
            place.insert(fetch::guests::kernel(kernel).obtain(layout)?);
        }
    }
    for firmware in scenarios.iter().map(|s| s.firmware) {
        if let Entry::Vacant(place) = firmwares.entry(firmware) {
            place.insert(fetch::guests::firmware(firmware).obtain(layout)?);
        }
    }
    let td_firmware = if scenarios.iter().any(|s| s.trust_domain) {
        Some(fetch::guests::obtain_td_firmware(
            layout,
            TdFirmware::default(),
        )?)
    } else {
        None
    };
    let mut stress = BTreeMap::new();
    for kernel in scenarios.iter().filter(|s| s.stress).map(|s| s.kernel) {
        if let (Entry::Vacant(place), Some(file)) = (stress.entry(kernel), kernels.get(&kernel)) {
            place.insert(crate::stress::obtain(layout, file)?);
        }
    }
    let mut modules = BTreeMap::new();
    for kernel in scenarios.iter().filter(|s| s.modules).map(|s| s.kernel) {
        if let (Entry::Vacant(place), Some(file)) = (modules.entry(kernel), kernels.get(&kernel)) {
            place.insert(crate::modules::obtain(layout, file)?);
        }
    }
    let mut disks = BTreeMap::new();
    for kernel in scenarios.iter().filter(|s| s.disk).map(|s| s.kernel) {
        if let Entry::Vacant(place) = disks.entry(kernel) {
            // Not everybody may make one; whoever needs it then fails, and nobody else.
            place.insert(disk::obtain(layout, kernel).map_err(|error| format!("{error:#}")));
        }
    }
    let uki = scenarios
        .iter()
        .any(|scenario| scenario.uki)
        .then(|| disk::tools::for_uki(layout).map_err(|error| format!("{error:#}")));
    let busybox = fetch::BUSYBOX.obtain(layout)?;
    let run = build::for_run(
        layout,
        target,
        &ovmf,
        None,
        Fault::NONE,
        Acceptance::LAZY,
        &layout.artefacts,
    )?;
    let tests = build::for_tests(layout, target)?;
    Ok(Artefacts {
        qemu,
        rom: run.rom,
        paravisor: run.paravisor,
        faulty_paravisor: tests.faulty_paravisor,
        isa_cases: tests.isa_cases,
        svsm_cases: tests.svsm_cases,
        svsm_counts: tests.svsm_counts,
        svsm_evidence: tests.svsm_evidence,
        tdx_cases: tests.tdx_cases,
        l2_cases: tests.l2_cases,
        l2_counts: tests.l2_counts,
        ovmf,
        td_firmware,
        firmwares,
        kernels,
        disks,
        uki,
        busybox,
        stress,
        modules,
        chip: build::chip(layout)?,
        xtask,
    })
}

/// Runs the scenarios in their order, as many at a time as this machine has processors for.
fn all_scenarios(
    scenarios: &[Scenario],
    artefacts: &Artefacts,
    dir: &Path,
    tally: &Tally,
) -> Result<()> {
    let slots = Slots::of_this_machine();
    thread::scope(|scope| {
        let workers: Vec<_> = scenarios
            .iter()
            .map(|scenario| {
                let held = slots.take(scenario.weight);
                scope.spawn(|| {
                    let _held = held;
                    carry_out(scenario, artefacts, dir, tally)
                })
            })
            .collect();
        workers
            .into_iter()
            .try_for_each(|worker| match worker.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            })
    })
}

fn carry_out(scenario: &Scenario, artefacts: &Artefacts, dir: &Path, tally: &Tally) -> Result<()> {
    let logs = fresh(dir, &scenario.name)?;
    let context = Context {
        artefacts: artefacts.clone(),
        dir: logs.clone(),
    };
    let started = Instant::now();
    let checks = (scenario.run)(&context).map_or_else(impossible, |findings| findings.checks);
    tally.add(&scenario.name, &checks, started, &logs);
    Ok(())
}

/// The one check of what could not be carried out.
fn impossible(error: anyhow::Error) -> Vec<Check> {
    vec![Check {
        name: "can be carried out".to_owned(),
        failure: Some(format!("{error:#}")),
    }]
}

/// An empty directory for the logs of `name`.
fn fresh(dir: &Path, name: &str) -> Result<PathBuf> {
    let dir = dir.join(name);
    if dir.exists() {
        fs::remove_dir_all(&dir)
            .with_context(|| format!("{}: cannot be emptied", dir.display()))?;
    }
    create_dir(&dir)?;
    Ok(dir)
}

/// What has passed and failed so far; prints as it counts.
#[derive(Default)]
struct Tally {
    counted: Mutex<(usize, usize)>,
}

impl Tally {
    fn add(&self, name: &str, checks: &[Check], started: Instant, logs: &Path) {
        let failed: Vec<(&str, &str)> = checks
            .iter()
            .filter_map(|check| Some((check.name.as_str(), check.failure.as_deref()?)))
            .collect();
        let passed = checks.len() - failed.len();
        // Held while printing, so that the lines of two scenarios do not mix.
        let mut counted = self
            .counted
            .lock()
            .unwrap_or_else(|poison| poison.into_inner());
        counted.0 += passed;
        counted.1 += failed.len();
        let verdict = if failed.is_empty() { "ok  " } else { "FAIL" };
        let seconds = started.elapsed().as_secs_f64();
        eprintln!(
            "  {verdict} {name:<28} {passed:>4} passed, {} failed ({seconds:.1} s)",
            failed.len()
        );
        for (check, failure) in &failed {
            eprintln!("       {check}: {failure}");
        }
        if !failed.is_empty() {
            last_words(logs);
        }
    }

    fn totals(&self) -> (usize, usize) {
        *self
            .counted
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
    }
}

/// Where the logs are, and the end of those that say something.
fn last_words(dir: &Path) {
    eprintln!("       logs: {}", dir.display());
    if Job::log(dir).is_some() {
        return;
    }
    let logs = Logs::within(dir);
    for (log, lines) in [
        (&logs.console, 8),
        (&logs.second, 4),
        (&logs.machine, 4),
        (&logs.qemu, 4),
        (&logs.state, 24),
    ] {
        let text = fs::read(log).map(|bytes| {
            let text = String::from_utf8_lossy(&bytes);
            // QEMU always warns about the processor features that TCG leaves out. Of the processors'
            // state a few lines say what they are at.
            let tells = |line: &&str| match log == &logs.state {
                true => ["RIP=", "ISR\t", "IRR\t", "PPR"]
                    .iter()
                    .any(|word| line.contains(word)),
                false => !line.contains("warning: TCG"),
            };
            text.lines()
                .filter(tells)
                .map(|line| format!("{line}\n"))
                .collect::<String>()
        });
        match text {
            Ok(text) if !text.trim().is_empty() => {
                let name = log.file_name().unwrap_or_default().to_string_lossy();
                eprintln!("       the end of {name}:");
                // The machine's report is one long line.
                for line in tail(&text, lines).lines() {
                    eprintln!("       {}", line.chars().take(400).collect::<String>());
                }
            }
            _ => {}
        }
    }
}
