//! What has to be true of every report, whatever was run: its parts add up and its figures fit each
//! other. A report that breaks one of these laws says nothing about the run.

use protocols::report::{CallCounters, Event, Histogram, Report, VmplCounters};

use crate::scenario::Findings;
use crate::vm::{Backing, Finished};

/// Pages of a 2 MiB folio.
const PAGES_PER_FOLIO: u64 = 512;

/// Checks the laws; one finding for each law that is broken, and one that they were looked at.
pub fn check(findings: &mut Findings, finished: &Finished, report: &Report) {
    let broken = broken_laws(finished, report);
    findings.check(
        "the report's figures fit each other",
        broken.is_empty(),
        || broken.join("; "),
    );
}

/// What the host's memory has to look like after the boot of an operating system, whose conversions
/// are of whole blocks but for a few.
pub fn check_backing(findings: &mut Findings, report: &Report, backing: Backing) {
    let folios = report.memory.folios;
    let map = report.memory.direct_map;
    match backing {
        Backing::Small => {
            findings.equal("no 2 MiB folio", folios.large_allocated, 0);
            // Private pages of 4 KiB are everywhere: so are the splits.
            let used = report.memory.assigned_pages / PAGES_PER_FOLIO;
            findings.check(
                "4 KiB folios split the direct map",
                map.splits >= used && used > 0,
                || format!("{} splits for {used} blocks in use", map.splits),
            );
        }
        Backing::Large => {
            findings.check(
                "19 of 20 of the 2 MiB folios in use are whole",
                folios.large > 0 && folios.large_whole * 20 >= folios.large * 19,
                || format!("{} of {}", folios.large_whole, folios.large),
            );
            findings.check(
                "1 of 20 blocks of the direct map is split at most",
                map.splits * 20 <= map.blocks,
                || format!("{} of {}", map.splits, map.blocks),
            );
        }
    }
}

fn broken_laws(finished: &Finished, report: &Report) -> Vec<String> {
    let mut broken = Vec::new();
    let mut law = |name: &str, holds: bool| {
        if !holds {
            broken.push(name.to_owned());
        }
    };
    let vcpus = finished.events.iter().find_map(|event| match event {
        Event::Machine(machine) => Some(machine.vcpus),
        _ => None,
    });
    law(
        "each vCPU is counted",
        vcpus.map(u64::from) == Some(report.vcpus.len() as u64),
    );
    for vmpl in 0..report.counters.len() {
        let levels = || {
            report
                .vcpus
                .iter()
                .filter_map(move |vcpu| vcpu.levels.get(vmpl))
        };
        law(
            &format!("VMPL{vmpl} is the sum of the vCPUs"),
            report.counters.get(vmpl).map(sums) == Some(add(levels().map(sums))),
        );
    }
    let made = report.vcpus.iter().flat_map(|vcpu| &vcpu.calls);
    law(
        "calls are the sum of the vCPUs'",
        totals(&report.calls) == totals(made),
    );
    for call in &report.calls {
        law(
            &format!("each answered {} has a latency", call.name),
            call.results.values().sum::<u64>() == call.latency.count,
        );
        law(
            &format!("the latency of {} adds up", call.name),
            is_consistent(&call.latency),
        );
    }
    let answered: u64 = report.calls.iter().map(|call| call.latency.count).sum();
    law(
        "no more calls than entries of VMPL0",
        report
            .counters
            .first()
            .is_none_or(|paravisor| answered <= paravisor.world_switches),
    );
    law(
        "samples are in order",
        report.samples.is_sorted_by(|a, b| a.tsc < b.tsc),
    );
    law(
        "the last sample is the end",
        report
            .samples
            .last()
            .is_some_and(|last| last.validated_bytes == report.memory.validated_bytes),
    );
    memory_laws(report, law);
    broken
}

fn memory_laws(report: &Report, mut law: impl FnMut(&str, bool)) {
    let memory = &report.memory;
    let (folios, map) = (memory.folios, memory.direct_map);
    law(
        "2 MiB folios are those allocated and not freed",
        folios.large + folios.large_freed == folios.large_allocated,
    );
    law(
        "4 KiB folios are those allocated and not freed",
        folios.small + folios.small_freed == folios.small_allocated,
    );
    law(
        "2 MiB RMP entries lie in whole folios",
        folios.large_in_rmp <= folios.large_whole && folios.large_whole <= folios.large,
    );
    law(
        "every assigned page has memory",
        memory.assigned_pages + folios.hole_pages <= folios.small + folios.large * PAGES_PER_FOLIO,
    );
    law(
        "pages are private, shared or not used",
        memory.assigned_pages + memory.shared_pages <= memory.guest_pages,
    );
    law(
        "shared pages were converted",
        memory.conversions.pages_to_shared
            == memory.conversions.pages_to_private + memory.shared_pages,
    );
    law(
        "splits needed are among those of Linux",
        map.splits <= map.splits_as_linux && map.splits_as_linux <= map.blocks,
    );
}

/// Figures of one level that a sum can be compared by.
fn sums(level: &VmplCounters) -> [u64; 6] {
    [
        level.world_switches,
        level.npf,
        level.exits.values().sum(),
        level.vmgexits.values().sum(),
        level.pvalidate.validate_4k.total() + level.pvalidate.validate_2m.total(),
        level.rmpadjust.size_4k.total() + level.rmpadjust.size_2m.total(),
    ]
}

fn add(parts: impl Iterator<Item = [u64; 6]>) -> [u64; 6] {
    parts.fold([0; 6], |sum, part| {
        std::array::from_fn(|n| sum[n] + part[n])
    })
}

/// Calls, answers and ticks of some calls together.
fn totals<'a>(calls: impl IntoIterator<Item = &'a CallCounters>) -> [u64; 3] {
    calls
        .into_iter()
        .fold([0; 3], |[made, answered, ticks], call| {
            [
                made + call.unanswered + call.results.values().sum::<u64>(),
                answered + call.latency.count,
                ticks + call.latency.total,
            ]
        })
}

fn is_consistent(latency: &Histogram) -> bool {
    let Histogram {
        count,
        total,
        min,
        max,
        buckets,
    } = latency;
    buckets.iter().sum::<u64>() == *count
        && min <= max
        && *total >= min * count
        && *total <= max.saturating_mul(*count)
        && (*count == 0) == buckets.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_has_to_add_up() {
        let good = Histogram {
            count: 3,
            total: 12,
            min: 2,
            max: 8,
            buckets: vec![0, 2, 0, 1],
        };
        assert!(is_consistent(&good));
        assert!(is_consistent(&Histogram::default()));
        let bad = |change: fn(&mut Histogram)| {
            let mut histogram = good.clone();
            change(&mut histogram);
            !is_consistent(&histogram)
        };
        assert!(bad(|h| h.buckets[0] = 1));
        assert!(bad(|h| h.total = 5));
        assert!(bad(|h| h.total = 25));
        assert!(bad(|h| h.min = 9));
    }
}
