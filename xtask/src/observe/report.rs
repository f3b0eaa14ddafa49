//! `--report`: everything known about a run as one JSON object (docs/running.md).
//!
//! What the machine said is passed on as it said it (docs/report.md); around it stands what only
//! `xtask` knows: what was put in, when kernel and userspace began, how the command ended.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use e2e::vm::{Config, Finished};
use protocols::report::{CallCounters, Event, Launch, Machine, Refusal, Report};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::layout::read;

/// Version of the object, raised when a field changes its meaning.
const VERSION: u32 = 1;

/// The object.
#[derive(Debug, Serialize)]
struct Document<'a> {
    version: u32,
    inputs: &'a Inputs,
    figures: Figures,
    stages: Vec<Stage>,
    wall_seconds: f64,
    timed_out: bool,
    exec_status: Option<i32>,
    machine: Option<&'a Machine>,
    launch: Option<&'a Launch>,
    refusals: Vec<&'a Refusal>,
    report: Option<&'a Report>,
}

/// What a run is made of, taken down before it begins.
#[derive(Debug, Serialize)]
pub struct Inputs {
    turnstile: &'static str,
    qemu: String,
    memory: String,
    vcpus: u32,
    rom: Source,
    image: Source,
    paravisor: Source,
    kernel: Option<Source>,
    initrd: Option<Source>,
    command_line: Option<String>,
}

/// A file by its content.
#[derive(Debug, Serialize)]
struct Source {
    path: PathBuf,
    bytes: u64,
    sha256: String,
}

impl Source {
    fn of(path: &Path) -> Result<Source> {
        let content = read(path)?;
        Ok(Source {
            path: path.to_owned(),
            bytes: content.len() as u64,
            sha256: Sha256::digest(&content)
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect(),
        })
    }
}

impl Inputs {
    /// Takes down what `config` will run; `paravisor` is the ELF file inside its image.
    pub fn of(config: &Config, paravisor: &Path) -> Result<Inputs> {
        let linux = config.linux.as_ref();
        let version = crate::command::output(Command::new(&config.qemu).arg("--version"))?;
        Ok(Inputs {
            turnstile: env!("CARGO_PKG_VERSION"),
            qemu: version.lines().next().unwrap_or_default().to_owned(),
            memory: config.memory.clone(),
            vcpus: config.vcpus,
            rom: Source::of(&config.rom)?,
            image: Source::of(&config.image)?,
            paravisor: Source::of(paravisor)?,
            kernel: linux.map(|linux| Source::of(&linux.kernel)).transpose()?,
            initrd: linux.map(|linux| Source::of(&linux.initrd)).transpose()?,
            command_line: linux.map(|linux| linux.append.clone()),
        })
    }
}

#[derive(Debug, PartialEq, Serialize)]
struct Stage {
    name: &'static str,
    /// Since QEMU was started.
    seconds: f64,
}

/// Sums and quotients of what the machine reports.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Figures {
    /// Calls of the guest to the paravisor, of any kind.
    calls: u64,
    /// Those of them that were answered by an error.
    failed_calls: u64,
    /// Validated by the paravisor at the end.
    accepted_bytes: u64,
    /// Validated by the paravisor, per PVALIDATE call.
    accepted_bytes_per_call: Option<f64>,
    /// Of all calls: the mean time, and one that 99 % did not exceed (rounded up to a power of
    /// two ticks).
    latency_mean_us: Option<f64>,
    latency_99_percent_us: Option<f64>,
}

impl Figures {
    fn of(report: &Report, tsc_hz: u64) -> Figures {
        let sum = |count: fn(&CallCounters) -> u64| report.calls.iter().map(count).sum::<u64>();
        let answered = sum(|call| call.latency.count);
        let us = |ticks: f64| (tsc_hz > 0).then(|| ticks * 1e6 / tsc_hz as f64);
        let accepted = report.memory.validated_bytes;
        let lists: u64 = report
            .calls
            .iter()
            .filter(|call| call.name == "CORE/PVALIDATE")
            .map(|call| call.latency.count)
            .sum();
        Figures {
            calls: answered + sum(|call| call.unanswered),
            failed_calls: sum(|call| {
                let good = ["SUCCESS", "INCOMPLETE"];
                let bad = call
                    .results
                    .iter()
                    .filter(|(r, _)| !good.contains(&r.as_str()));
                bad.map(|(_, count)| count).sum()
            }),
            accepted_bytes: accepted,
            accepted_bytes_per_call: (lists > 0).then(|| accepted as f64 / lists as f64),
            latency_mean_us: (answered > 0)
                .then(|| sum(|call| call.latency.total) as f64 / answered as f64)
                .and_then(us),
            latency_99_percent_us: super::latency::quantile(
                report.calls.iter().map(|call| &call.latency),
                0.99,
            )
            .and_then(|ticks| us(ticks as f64)),
        }
    }
}

/// Writes the object to `path`.
pub fn write(path: &Path, inputs: &Inputs, finished: &Finished) -> Result<()> {
    let machine = finished.events.iter().find_map(|event| match event {
        Event::Machine(machine) => Some(machine),
        _ => None,
    });
    let report = finished.report.as_ref();
    let tsc_hz = machine.map_or(0, |machine| machine.tsc_hz);
    let document = Document {
        version: VERSION,
        inputs,
        figures: report.map_or_else(Figures::default, |report| Figures::of(report, tsc_hz)),
        stages: finished
            .stages
            .iter()
            .map(|(stage, at)| Stage {
                name: stage.name(),
                seconds: at.as_secs_f64(),
            })
            .collect(),
        wall_seconds: finished.wall.as_secs_f64(),
        timed_out: finished.timed_out,
        exec_status: finished.exec_status,
        machine,
        launch: finished.launch.as_ref(),
        refusals: finished
            .events
            .iter()
            .filter_map(|event| match event {
                Event::Refusal(refusal) => Some(refusal),
                _ => None,
            })
            .collect(),
        report,
    };
    let mut text = serde_json::to_string_pretty(&document)?;
    text.push('\n');
    fs::write(path, text)
        .with_context(|| format!("{}: the report cannot be written", path.display()))
}

#[cfg(test)]
mod tests {
    use protocols::report::{Histogram, Outcome};

    use super::*;

    #[test]
    fn figures_are_sums_and_quotients() {
        let mut report = Report::new(Outcome::PowerOff, String::new());
        assert_eq!(Figures::of(&report, 1000), Figures::default());
        let mut call = CallCounters {
            name: "CORE/PVALIDATE".into(),
            unanswered: 1,
            latency: Histogram {
                count: 4,
                total: 4000,
                min: 500,
                max: 1500,
                buckets: vec![0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 1],
            },
            ..CallCounters::default()
        };
        for (result, count) in [("SUCCESS", 2), ("INCOMPLETE", 1), ("BUSY", 1)] {
            call.results.insert(result.into(), count);
        }
        report.calls.push(call);
        report.memory.validated_bytes = 8 << 20;
        let figures = Figures::of(&report, 1_000_000);
        assert_eq!((figures.calls, figures.failed_calls), (5, 1));
        assert_eq!(figures.accepted_bytes_per_call, Some((2 << 20) as f64));
        assert_eq!(figures.latency_mean_us, Some(1000.0));
        assert_eq!(figures.latency_99_percent_us, Some(1500.0));
        assert_eq!(Figures::of(&report, 0).latency_mean_us, None);
    }
}
