//! Makes a guest's memory and processors change, all at once and without end, and checks that
//! nothing is lost.
//!
//! Three things go on at the same time: every processor converts pages between private and shared
//! through the kernel module beside this program, all of the guest's memory is taken, filled and
//! compared, and processors go offline and come back. The end is one line of JSON
//! ([`stress::Summary`]) and status 0 if everything was right.

#![forbid(unsafe_code)]

mod convert;
mod memory;
mod processors;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Parser;
use stress::Summary;

use convert::Work;
use memory::{Hoard, MemInfo};

/// Converts pages, holds memory, switches processors.
#[derive(Debug, Parser)]
#[command(name = "stress")]
struct Options {
    /// Cycles to do: each makes a range of pages shared and private again
    #[arg(long, default_value_t = 10_000)]
    cycles: u64,
    /// Times that each processor but the first goes offline and comes back. A kernel under SEV-SNP
    /// can do it once: the processor parks with its GHCB in hand and comes back by a new VMSA, so
    /// it never puts it down; the second time takes the backup GHCB, and then there is none left
    #[arg(long, default_value_t = 1)]
    turns: u32,
    /// Leave the guest's memory alone
    #[arg(long)]
    no_memory: bool,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(summary) => {
            let line = serde_json::to_string(&summary).expect("a summary is plain data");
            println!("{line}");
            if summary.good() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Err(error) => {
            eprintln!("stress: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<Summary> {
    let mut summary = Summary {
        processors: thread::available_parallelism()?.get().try_into()?,
        ..Summary::default()
    };
    summary.memory.unaccepted_before_kib = MemInfo::read()?.unaccepted_kib;
    let begun = Instant::now();
    let work = Work {
        cycles: options.cycles,
        begun: AtomicU64::new(0),
        whole_blocks: AtomicU64::new(0),
    };
    let hoard = Hoard::default();
    let end = AtomicBool::new(false);
    let mut failures = Vec::new();

    thread::scope(|scope| {
        let converters: Vec<_> = (0..summary.processors)
            .map(|processor| {
                let work = &work;
                scope.spawn(move || work.do_on(processor))
            })
            .collect();
        let growers = if options.no_memory {
            0
        } else {
            summary.processors
        };
        let growers: Vec<_> = (0..growers).map(|_| scope.spawn(|| hoard.grow())).collect();
        let switcher = scope.spawn({
            let (processors, turns, end) = (summary.processors, options.turns, &end);
            move || Ok(processors::come_and_go(processors, turns, end))
        });
        let reporter = scope.spawn(|| report(&work, &hoard, &end));

        for grower in growers {
            if let Err(error) = joined(grower) {
                failures.push(format!("{error:#}"));
            }
        }
        let watcher = scope.spawn(|| hoard.watch(&end));
        for converter in converters {
            match joined(converter) {
                Ok(cycles) => summary.conversions.cycles.push(cycles),
                Err(error) => failures.push(format!("{error:#}")),
            }
        }
        summary.milliseconds = begun.elapsed().as_millis().try_into().unwrap_or(u64::MAX);
        end.store(true, Ordering::Relaxed);
        let switched = joined(switcher).and_then(|(hotplug, done)| {
            summary.hotplug = hotplug;
            done
        });
        if let Err(error) = switched {
            failures.push(format!("{error:#}"));
        }
        for helper in [watcher, reporter] {
            if helper.join().is_err() {
                failures.push("a thread panicked".to_owned());
            }
        }
    });

    let cycles = std::mem::take(&mut summary.conversions.cycles);
    summary.conversions = convert::counted()?;
    summary.conversions.cycles = cycles;
    summary.conversions.whole_blocks = work.whole_blocks.load(Ordering::Relaxed);
    summary.memory.rechecked_mib = hoard.compared.load(Ordering::Relaxed) >> 20;
    summary.memory.held_mib = hoard.compare_all() >> 20;
    summary.memory.words_wrong = hoard.words_wrong.load(Ordering::Relaxed);
    summary.memory.unaccepted_after_kib = MemInfo::read()?.unaccepted_kib;
    summary.failures = failures;
    Ok(summary)
}

/// Time between two lines of the report below.
const TOLD_EVERY: Duration = Duration::from_secs(10);

/// Tells on standard error how far it is, until the end.
fn report(work: &Work, hoard: &Hoard, end: &AtomicBool) {
    let mut told = Instant::now();
    while !end.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(100));
        if told.elapsed() >= TOLD_EVERY {
            told = Instant::now();
            eprintln!(
                "stress: {} of {} cycles begun, {} MiB held, {} MiB compared",
                work.begun.load(Ordering::Relaxed),
                work.cycles,
                hoard.held() >> 20,
                hoard.compared.load(Ordering::Relaxed) >> 20,
            );
        }
    }
}

fn joined<T>(thread: thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread
        .join()
        .unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked")))
}
