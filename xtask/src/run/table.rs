//! The machine's report as a table for people.

use std::fmt::Write as _;
use std::time::Duration;

use e2e::vm::{Finished, Stage};
use protocols::report::{Outcome, PvalidateResults, Report, RmpadjustResults, VmplCounters};
use protocols::terminate::explain;

use super::processors::{self, Clock};

/// Width of the first column.
pub(super) const NAME: usize = 40;
/// Width of a column of numbers.
const NUMBER: usize = 12;

/// How the run ended, in one line.
pub fn ending(report: &Report) -> String {
    match (&report.outcome, &report.termination) {
        (Outcome::PowerOff, _) => "the guest switched the machine off".to_owned(),
        (Outcome::Terminated, Some(why)) => {
            format!(
                "VMPL{} ended the guest: {}",
                why.vmpl,
                explain(why.set, why.code)
            )
        }
        (outcome, _) => format!("{outcome:?}: {}", report.reason),
    }
}

/// Everything the run has to tell, several lines.
pub fn render(finished: &Finished, report: &Report) -> String {
    let mut text = String::new();
    line(&mut text, "outcome", &ending(report));
    if let Some(launch) = &finished.launch {
        line(&mut text, "launch digest", &launch.digest);
    }
    stages(&mut text, &finished.stages, finished.wall);
    text.push('\n');
    let clock = Clock::of(finished);
    processors::calls(&mut text, report, clock);
    processors::processors(&mut text, report, clock);
    counters(&mut text, report);
    text.push('\n');
    memory(&mut text, report);
    verdicts(&mut text, report);
    text
}

fn stages(text: &mut String, stages: &[(Stage, Duration)], wall: Duration) {
    let ends = stages.iter().skip(1).map(|(_, begin)| *begin).chain([wall]);
    for ((stage, begin), end) in stages.iter().zip(ends) {
        let (begin, length) = (
            begin.as_secs_f64(),
            end.saturating_sub(*begin).as_secs_f64(),
        );
        let when = format!("from {begin:6.1} s, {length:6.1} s long");
        line(text, &format!("stage {}", stage.name()), &when);
    }
}

fn counters(text: &mut String, report: &Report) {
    let idle = VmplCounters::default();
    let levels: Vec<(usize, &VmplCounters)> = report
        .counters
        .iter()
        .enumerate()
        .filter(|(_, counters)| **counters != idle)
        .collect();
    let head: String = levels
        .iter()
        .map(|(vmpl, _)| column(&format!("VMPL{vmpl}")))
        .collect();
    let _ = writeln!(text, "  {:NAME$}{head}", "");
    let mut row = |name: &str, value: &dyn Fn(&VmplCounters) -> u64| {
        let values: Vec<u64> = levels.iter().map(|(_, counters)| value(counters)).collect();
        if values.iter().any(|value| *value != 0) {
            let cells: String = values
                .iter()
                .map(|value| column(&value.to_string()))
                .collect();
            let _ = writeln!(text, "  {name:NAME$}{cells}");
        }
    };
    row("entered from another level", &|c| c.world_switches);
    for (what, of) in PVALIDATE {
        for (result, count) in PVALIDATE_RESULTS {
            row(&format!("PVALIDATE {what}{result}"), &|c| count(&of(c)));
        }
    }
    for (size, of) in RMPADJUST {
        for (result, count) in RMPADJUST_RESULTS {
            row(&format!("RMPADJUST {size}{result}"), &|c| count(&of(c)));
        }
    }
    row("RMPQUERY", &|c| c.rmpquery);
    row("nested page faults", &|c| c.npf);
    row("#VC delivered", &|c| c.vc_injected);
    row("pages made private", &|c| c.psc_private_pages);
    row("pages made shared", &|c| c.psc_shared_pages);
    let names = |of: &dyn Fn(&VmplCounters) -> Vec<String>| {
        let mut names: Vec<String> = levels
            .iter()
            .flat_map(|(_, counters)| of(counters))
            .collect();
        names.sort();
        names.dedup();
        names
    };
    for name in names(&|c| c.vmgexits.keys().cloned().collect()) {
        row(&format!("VMGEXIT {name}"), &|c| {
            c.vmgexits.get(&name).copied().unwrap_or(0)
        });
    }
    for name in names(&|c| c.exits.keys().cloned().collect()) {
        row(&format!("exit {name}"), &|c| {
            c.exits.get(&name).copied().unwrap_or(0)
        });
    }
}

/// A name, and how the value it stands for is found in a `T`.
type Named<T, V> = (&'static str, fn(&T) -> V);

const PVALIDATE: [Named<VmplCounters, PvalidateResults>; 4] = [
    ("2 MiB validate", |c| c.pvalidate.validate_2m),
    ("4 KiB validate", |c| c.pvalidate.validate_4k),
    ("2 MiB rescind", |c| c.pvalidate.rescind_2m),
    ("4 KiB rescind", |c| c.pvalidate.rescind_4k),
];
const PVALIDATE_RESULTS: [Named<PvalidateResults, u64>; 4] = [
    ("", |r| r.ok),
    (", no change", |r| r.no_change),
    (", mismatch", |r| r.size_mismatch),
    (", refused", |r| r.fail_input),
];
const RMPADJUST: [Named<VmplCounters, RmpadjustResults>; 2] = [
    ("2 MiB", |c| c.rmpadjust.size_2m),
    ("4 KiB", |c| c.rmpadjust.size_4k),
];
const RMPADJUST_RESULTS: [Named<RmpadjustResults, u64>; 5] = [
    ("", |r| r.ok),
    (", mismatch", |r| r.size_mismatch),
    (", refused (input)", |r| r.fail_input),
    (", refused (permission)", |r| r.fail_permission),
    (", refused (in use)", |r| r.fail_in_use),
];

fn memory(text: &mut String, report: &Report) {
    let memory = &report.memory;
    let pages = |pages: u64| format!("{pages} pages, {} MiB", pages >> 8);
    line(text, "guest memory", &pages(memory.guest_pages));
    line(text, "assigned to the guest", &pages(memory.assigned_pages));
    line(text, "validated", &pages(memory.validated_pages));
    line(
        text,
        "validated by the paravisor",
        &format!("{} MiB", memory.validated_bytes >> 20),
    );
    line(
        text,
        "scrambled",
        &format!("{} MiB", memory.scrambled_bytes >> 20),
    );
    line(text, "2 MiB entries split", &memory.psmashes.to_string());
}

fn verdicts(text: &mut String, report: &Report) {
    let referee = match &report.referee {
        None => "not asked".to_owned(),
        Some(referee) => {
            format!(
                "{} pages checked, {} disagreements",
                referee.checked, referee.disagreements
            )
        }
    };
    line(text, "referee", &referee);
    for page in report.referee.iter().flat_map(|referee| &referee.first) {
        let what = format!("{:#x}: map {}, RMP {}", page.gpa, page.map, page.rmp);
        line(text, "  disagreement", &what);
    }
    let violations = match report.violations.total() {
        0 => "none".to_owned(),
        _ => format!("{:?}", report.violations),
    };
    line(text, "violations", &violations);
}

fn line(text: &mut String, name: &str, value: &str) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "  {name:NAME$}{value}");
}

pub(super) fn column(text: &str) -> String {
    format!("{text:>NUMBER$}")
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use protocols::report::{Referee, Termination};

    use super::*;

    fn finished() -> Finished {
        Finished {
            dir: PathBuf::new(),
            report: None,
            launch: None,
            events: Vec::new(),
            stages: vec![
                (Stage::Machine, Duration::from_millis(200)),
                (Stage::Paravisor, Duration::from_millis(700)),
            ],
            console: String::new(),
            output: Vec::new(),
            exec_status: None,
            wall: Duration::from_secs(2),
            timed_out: false,
            qemu_status: None,
        }
    }

    #[test]
    fn only_levels_and_counters_in_use_are_shown() {
        let mut report = Report::new(Outcome::PowerOff, String::new());
        report.counters[0].pvalidate.validate_2m.size_mismatch = 7;
        report.counters[1].vmgexits.insert("nae:0x7b".into(), 9);
        report.referee = Some(Referee {
            checked: 5,
            ..Referee::default()
        });
        let text = render(&finished(), &report);
        let row = |name: &str| {
            text.lines().find(|l| l.contains(name)).map(|l| {
                l.split_whitespace()
                    .rev()
                    .take(2)
                    .map(str::to_owned)
                    .collect::<Vec<_>>()
            })
        };
        assert_eq!(
            row("PVALIDATE 2 MiB validate, mismatch"),
            Some(vec!["0".into(), "7".into()])
        );
        assert_eq!(row("VMGEXIT nae:0x7b"), Some(vec!["9".into(), "0".into()]));
        assert!(!text.contains("VMPL2") && !text.contains("RMPADJUST"));
        assert!(text.contains("5 pages checked, 0 disagreements"));
        assert!(text.contains("from    0.2 s,    0.5 s long"));
        assert!(text.contains("from    0.7 s,    1.3 s long"));
    }

    #[test]
    fn a_termination_is_explained() {
        let mut report = Report::new(Outcome::Terminated, "terminated".into());
        report.termination = Some(Termination {
            set: 5,
            code: 8,
            text: String::new(),
            vmpl: 0,
        });
        assert_eq!(
            ending(&report),
            "VMPL0 ended the guest: turnstile 8 (MAP_OVERLAP): entries of the host's memory map \
             overlap"
        );
    }
}
