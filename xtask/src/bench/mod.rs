//! `xtask bench`: what things cost, as ratios within one run or as exact counts.
//!
//! | module | owns |
//! |---|---|
//! | [`host`] | the engine alone, on this computer: runs the benches of `accept` |
//! | [`machine`] | calls and boots in the machine, in counted instructions |
//! | [`figure`] | one figure, the table, the JSON file |
//!
//! The figures of the machine are the same on every computer; those of the host are medians of
//! interleaved rounds. `docs/performance.md` has the last ones and what they mean.

mod figure;
mod host;
mod machine;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use e2e::bench::boots::Policy;

use crate::layout::{Layout, write};
use crate::progress;
use figure::Figure;
use host::HostBench;
use machine::MachineBench;

/// What `xtask bench` can be told.
#[derive(Debug, Args)]
pub struct Options {
    /// Run only what has this in its name (see --list); may be given several times
    #[arg(long, value_name = "NAME")]
    filter: Vec<String>,
    /// Run the engine with maps of 1 and 16 TiB and 128 simulated processors, too
    #[arg(long)]
    scale: bool,
    /// Boot with these policies of acceptance: lazy, eager, ahead, control
    #[arg(long, value_name = "POLICY,POLICY", value_delimiter = ',', value_parser = policy)]
    policies: Vec<Policy>,
    /// Write the figures to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// List the names and stop
    #[arg(long)]
    list: bool,
}

fn policy(text: &str) -> Result<Policy, String> {
    let mut all = Policy::ALL.into_iter();
    all.find(|policy| policy.name() == text).ok_or_else(|| {
        let names = Policy::ALL.map(Policy::name);
        format!("expected one of {}", names.join(", "))
    })
}

/// One thing to run.
enum Bench {
    Host(HostBench),
    Machine(MachineBench),
}

impl Bench {
    fn all() -> Vec<Bench> {
        let host = HostBench::ALL.into_iter().map(Bench::Host);
        let machine = MachineBench::all().into_iter().map(Bench::Machine);
        host.chain(machine).collect()
    }

    fn name(&self) -> String {
        match self {
            Bench::Host(bench) => format!("host/{}", bench.name()),
            Bench::Machine(bench) => format!("machine/{}", bench.name()),
        }
    }
}

/// Runs what was asked for, prints the table, and fails if a figure is outside of its limit.
pub fn run(layout: &Layout, options: &Options) -> Result<ExitCode> {
    let wanted = |bench: &Bench| {
        let named = options
            .filter
            .iter()
            .any(|part| bench.name().contains(part));
        match bench {
            // Takes a while and a gigabyte: on request only.
            Bench::Host(HostBench::Scale) => options.scale || named,
            _ => named || options.filter.is_empty(),
        }
    };
    let benches: Vec<Bench> = Bench::all().into_iter().filter(wanted).collect();
    if options.list {
        benches
            .iter()
            .for_each(|bench| println!("{}", bench.name()));
        return Ok(ExitCode::SUCCESS);
    }
    if benches.is_empty() {
        bail!(
            "nothing has {:?} in its name; see: cargo xtask bench --list",
            options.filter
        );
    }
    let policies = match options.policies.as_slice() {
        [] => &Policy::ALL,
        given => given,
    };
    let in_machine = benches
        .iter()
        .any(|bench| matches!(bench, Bench::Machine(_)));
    let prepared = match in_machine {
        true => Some(machine::prepare(layout)?),
        false => None,
    };
    let mut figures: Vec<Figure> = Vec::new();
    for bench in &benches {
        let name = bench.name();
        let step = progress::step(&name);
        let found = match (bench, &prepared) {
            (Bench::Host(bench), _) => bench.run(layout, &step)?,
            (Bench::Machine(bench), Some(prepared)) => {
                bench.run(layout, prepared, policies, &step)?
            }
            (Bench::Machine(_), None) => Vec::new(),
        };
        step.done(&format!("{} figures", found.len()));
        figures.extend(found.into_iter().map(|figure| figure.of(&name)));
    }
    print!("{}", figure::table(&figures));
    if let Some(file) = &options.json {
        write(file, figure::json(&figures)?)?;
    }
    let missed = figures.iter().filter(|figure| !figure.holds()).count();
    println!(
        "{} figures, {missed} outside of their limits",
        figures.len()
    );
    Ok(match missed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}
