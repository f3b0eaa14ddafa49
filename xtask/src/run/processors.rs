//! The parts of the machine's report that are about calls and single processors, for people.

use std::fmt::Write as _;

use e2e::vm::Finished;
use protocols::report::{CallCounters, Event, Histogram, Report, VcpuCounters};

use super::table::{NAME, column};
use crate::observe::latency::quantile;

/// Names of result codes that are no error of a call.
const GOOD: [&str; 2] = ["SUCCESS", "INCOMPLETE"];

/// How ticks of the time stamp counter are shown.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clock {
    hz: u64,
}

impl Clock {
    /// The clock of the machine that `finished` ran on.
    pub fn of(finished: &Finished) -> Clock {
        let hz = finished.events.iter().find_map(|event| match event {
            Event::Machine(machine) => Some(machine.tsc_hz),
            _ => None,
        });
        Clock {
            hz: hz.unwrap_or(0),
        }
    }

    fn show(self, ticks: f64) -> String {
        match self.hz {
            0 => format!("{ticks:.0} t"),
            hz => match ticks * 1e6 / hz as f64 {
                us if us < 1e4 => format!("{us:.0} us"),
                us => format!("{:.0} ms", us / 1e3),
            },
        }
    }
}

/// A line for each kind of call: how many, how many of them failed, and how long they took.
pub fn calls(text: &mut String, report: &Report, clock: Clock) {
    if report.calls.is_empty() {
        return;
    }
    let head = ["calls", "errors", "mean", "99 % within", "longest"].map(column);
    // Writing to a String cannot fail.
    let _ = writeln!(text, "  {:NAME$}{}", "", head.concat());
    for call in &report.calls {
        let cells = [
            made(call).to_string(),
            errors(call).to_string(),
            mean(&[&call.latency], clock),
            most([&call.latency].into_iter(), clock),
            clock.show(call.latency.max as f64),
        ]
        .map(|cell| column(&cell));
        let name = format!("VMPL{} {}", call.vmpl, call.name);
        let _ = writeln!(text, "  {name:NAME$}{}", cells.concat());
    }
    text.push('\n');
}

/// A line for each processor, if there are several.
pub fn processors(text: &mut String, report: &Report, clock: Clock) {
    if report.vcpus.len() < 2 {
        return;
    }
    let head = [
        "calls",
        "errors",
        "mean",
        "to VMPL0",
        "exits",
        "validated",
        "#VC",
    ]
    .map(column);
    let _ = writeln!(text, "  {:NAME$}{}", "", head.concat());
    for vcpu in &report.vcpus {
        let latencies: Vec<&Histogram> = vcpu.calls.iter().map(|call| &call.latency).collect();
        let cells = [
            vcpu.calls.iter().map(made).sum::<u64>().to_string(),
            vcpu.calls.iter().map(errors).sum::<u64>().to_string(),
            mean(&latencies, clock),
            vcpu.levels[0].world_switches.to_string(),
            exits(vcpu).to_string(),
            format!("{} MiB", validated(vcpu) >> 20),
            vcpu.levels
                .iter()
                .map(|level| level.vc_injected)
                .sum::<u64>()
                .to_string(),
        ]
        .map(|cell| column(&cell));
        let name = format!("vCPU {}", vcpu.id);
        let _ = writeln!(text, "  {name:NAME$}{}", cells.concat());
    }
    text.push('\n');
}

fn made(call: &CallCounters) -> u64 {
    call.latency.count + call.unanswered
}

fn errors(call: &CallCounters) -> u64 {
    let bad = call
        .results
        .iter()
        .filter(|(result, _)| !GOOD.contains(&result.as_str()));
    bad.map(|(_, count)| count).sum()
}

fn mean(latencies: &[&Histogram], clock: Clock) -> String {
    let count: u64 = latencies.iter().map(|latency| latency.count).sum();
    let total: u64 = latencies.iter().map(|latency| latency.total).sum();
    match count {
        0 => "-".to_owned(),
        _ => clock.show(total as f64 / count as f64),
    }
}

fn most<'a>(latencies: impl Iterator<Item = &'a Histogram>, clock: Clock) -> String {
    quantile(latencies, 0.99).map_or_else(|| "-".to_owned(), |ticks| clock.show(ticks as f64))
}

fn exits(vcpu: &VcpuCounters) -> u64 {
    vcpu.levels
        .iter()
        .flat_map(|level| level.exits.values())
        .sum()
}

/// Bytes that VMPL0 of this processor validated.
fn validated(vcpu: &VcpuCounters) -> u64 {
    let done = &vcpu.levels[0].pvalidate;
    (done.validate_4k.ok << 12) + (done.validate_2m.ok << 21)
}

#[cfg(test)]
mod tests {
    use protocols::report::Outcome;

    use super::*;

    fn call() -> CallCounters {
        let mut call = CallCounters {
            vmpl: 1,
            name: "CORE/PVALIDATE".into(),
            unanswered: 1,
            latency: Histogram {
                count: 2,
                total: 3000,
                min: 1000,
                max: 2000,
                buckets: vec![0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1],
            },
            ..CallCounters::default()
        };
        for (result, count) in [("SUCCESS", 1), ("BUSY", 1)] {
            call.results.insert(result.into(), count);
        }
        call
    }

    fn words(text: &str, begin: &str) -> Vec<String> {
        let line = text
            .lines()
            .find(|line| line.trim_start().starts_with(begin));
        let words = line.unwrap_or_default().split_whitespace();
        words.map(str::to_owned).collect()
    }

    #[test]
    fn calls_have_their_times() {
        let mut report = Report::new(Outcome::PowerOff, String::new());
        let mut text = String::new();
        calls(&mut text, &report, Clock { hz: 0 });
        assert_eq!(text, "");
        report.calls.push(call());
        calls(&mut text, &report, Clock { hz: 1_000_000 });
        assert_eq!(
            words(&text, "VMPL1"),
            [
                "VMPL1",
                "CORE/PVALIDATE",
                "3",
                "1",
                "1500",
                "us",
                "2000",
                "us",
                "2000",
                "us"
            ]
        );
    }

    #[test]
    fn processors_are_compared_if_there_are_several() {
        let mut report = Report::new(Outcome::PowerOff, String::new());
        let mut first = VcpuCounters {
            calls: vec![call()],
            ..VcpuCounters::default()
        };
        first.levels[0].world_switches = 7;
        first.levels[0].pvalidate.validate_2m.ok = 3;
        first.levels[1].exits.insert("io".into(), 11);
        report.vcpus.push(first);
        let mut text = String::new();
        processors(&mut text, &report, Clock { hz: 0 });
        assert_eq!(text, "");
        report.vcpus.push(VcpuCounters {
            id: 1,
            ..VcpuCounters::default()
        });
        processors(&mut text, &report, Clock { hz: 0 });
        assert_eq!(
            words(&text, "vCPU 0"),
            [
                "vCPU", "0", "3", "1", "1500", "t", "7", "11", "6", "MiB", "0"
            ]
        );
        assert_eq!(
            words(&text, "vCPU 1"),
            ["vCPU", "1", "0", "0", "-", "0", "0", "0", "MiB", "0"]
        );
    }
}
