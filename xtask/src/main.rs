//! The project's one command: build, run, test, and say what is missing.
//!
//! ```text
//! cargo xtask run --mem 4G --exec 'dmesg; cat /proc/meminfo'
//! cargo xtask test
//! ```
//!
//! | module | owns |
//! |---|---|
//! | [`fetch`] | packages taken from Debian: which, from where, checked how |
//! | [`toolchain`] | the Rust target of the bare-metal crates |
//! | [`qemu`] | finding or installing QEMU |
//! | [`build`] | crates, ROMs, images |
//! | [`stress`] | the stress program and its kernel module |
//! | [`run`] | a boot with its progress and the machine's report |
//! | [`observe`] | what a run can be asked to show: stack traces, reports, plots, gdb |
//! | [`bench`] | what things cost |
//! | [`test`] | everything that decides whether the tree is good |
//! | [`disk`] | the disk with a real Debian |
//! | [`doctor`] | what is there and what is missing |
//! | [`userspace`] | programs for the guest's userspace |
//! | [`layout`], [`command`], [`progress`] | directories, other programs, what the user sees |
//!
//! Standard output carries results only, standard error everything else. An error is one line that
//! names the file or program, what was expected and what to do.

#![forbid(unsafe_code)]

mod bench;
mod build;
mod command;
mod disk;
mod doctor;
mod fetch;
mod layout;
mod modules;
mod observe;
mod progress;
mod qemu;
mod run;
mod stress;
mod test;
mod toolchain;
mod userspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use e2e::guests::Firmware;
use e2e::image::{Accept, Extras};
use protocols::launch::Fault;

use layout::Layout;

/// Builds, runs and tests Turnstile.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Boot a Debian kernel in a confidential guest on the emulated machine
    Run(Box<run::Options>),
    /// Run all tests and end with one line of totals
    Test(test::Options),
    /// Measure what things cost, and end with a table
    Bench(bench::Options),
    /// Build everything: paravisor, machine, test guests, images
    Build(BuildOptions),
    /// Say what this machine lacks and how to get it
    Doctor,
}

/// What `xtask build` can be told.
#[derive(Debug, clap::Args)]
struct BuildOptions {
    /// When the image's paravisor accepts memory, as for run
    #[arg(long, value_name = "POLICY", default_value = "lazy")]
    accept: Accept,
    #[command(flatten)]
    accept_extras: Extras,
}

fn main() -> ExitCode {
    match perform(Arguments::parse().task) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(task: Task) -> Result<ExitCode> {
    let layout = Layout::find()?;
    match task {
        Task::Run(options) => run::run(&layout, &options),
        Task::Test(options) => test::run(&layout, &options),
        Task::Bench(options) => bench::run(&layout, &options),
        Task::Build(options) => {
            let acceptance = options.accept.with(options.accept_extras)?;
            let target = build::prepare(&layout)?;
            let firmware = fetch::guests::firmware(Firmware::default()).obtain(&layout)?;
            build::for_run(
                &layout,
                target,
                &firmware,
                None,
                Fault::NONE,
                acceptance,
                &layout.artefacts,
            )?;
            build::for_tests(&layout, target)?;
            println!("{}", layout.artefacts.display());
            Ok(ExitCode::SUCCESS)
        }
        Task::Doctor => {
            let good = doctor::run(&layout)?;
            Ok(if good {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    /// clap checks itself only when a task is parsed, and each task's options on their own.
    #[test]
    fn all_options_fit_together() {
        super::Arguments::command().debug_assert();
    }
}
