//! Is nothing lost when memory and processors change all the time?
//!
//! The stress program (`tests/stress`) in a guest of 4 processors and 4 GiB: each processor
//! converts pages both ways, all memory is taken, filled and compared, and processors go offline and
//! come back meanwhile. What it found, what the machine saw and what the referee says must agree that
//! nothing was lost.

use std::time::Duration;

use anyhow::{Context as _, Result};
use protocols::launch::Fault;
use protocols::report::Outcome;
use stress::{Conversions, Summary};

use crate::guests::Kernel;
use crate::scenario::{BOOT_LIMIT, Context, Findings, Scenario};
use crate::stress::command;
use crate::vm::{Backing, Finished, Settings, Vc};

/// Virtual processors of the guest.
const VCPUS: u32 = 4;
/// What is left to the kernel, and to rounding, of the 4 GiB that the program takes.
const MEMORY_TAKEN_MIB: u64 = 2816;

/// One kernel and backing, and how much is asked of it.
#[derive(Clone, Copy, Debug)]
struct Row {
    kernel: Kernel,
    backing: Backing,
    /// Each makes a range of pages shared and private again: two conversions.
    cycles: u64,
    every_day: bool,
}

/// The short ones are for every day; the long ones do 10,000 conversions each.
const ROWS: [Row; 4] = [
    row(Kernel::Cloud6_12, Backing::Large, 600, true),
    row(Kernel::Cloud6_12, Backing::Large, 5_000, false),
    row(Kernel::Cloud6_12, Backing::Small, 5_000, false),
    row(Kernel::Cloud7_2, Backing::Large, 5_000, false),
];

const fn row(kernel: Kernel, backing: Backing, cycles: u64, every_day: bool) -> Row {
    Row {
        kernel,
        backing,
        cycles,
        every_day,
    }
}

pub fn scenarios() -> Vec<Scenario> {
    ROWS.into_iter()
        .map(|row| {
            let length = if row.every_day { "short" } else { "long" };
            let (kernel, backing) = (row.kernel.name(), row.backing.name());
            let scenario = Scenario::new(
                format!("stress/{kernel}-{backing}-{length}"),
                move |context| run(context, row),
            )
            .booting(row.kernel)
            .with_stress();
            if row.every_day {
                scenario
            } else {
                scenario.only_in_full()
            }
        })
        .collect()
}

fn run(context: &Context, row: Row) -> Result<Findings> {
    let artefacts = &context.artefacts;
    let (image, sidecar) =
        context.image(&artefacts.paravisor, Some(&artefacts.ovmf), Fault::NONE)?;
    let settings = Settings {
        backing: row.backing,
        vc: Vc::Strict,
        ..Settings::default()
    };
    let mut config = context.machine(image, &sidecar, settings);
    config.vcpus = VCPUS;
    let files = artefacts
        .stress
        .get(&row.kernel)
        .context("the stress program was not built for this scenario")?;
    let command = format!("{}; echo \"status $?\"; dmesg -r", command(row.cycles));
    config.linux = Some(context.linux_with(row.kernel, &command, files)?);
    // Half a second for a cycle is what four processors on two busy ones may take.
    let limit = BOOT_LIMIT * 2 + Duration::from_millis(500 * row.cycles);
    let finished = config.run(limit, |_| {})?;

    let mut findings = Findings::default();
    findings.ended(&finished, Outcome::PowerOff)?;
    findings.good_run(&finished, &sidecar)?;
    findings.only_expected_exits(&finished)?;
    if let Some(conversions) = guest_says(&mut findings, &finished, row) {
        machine_saw(&mut findings, &finished, &conversions)?;
    }
    Ok(findings)
}

/// What the stress program and the kernel say; returns the conversions the program counted.
fn guest_says(findings: &mut Findings, finished: &Finished, row: Row) -> Option<Conversions> {
    let output = String::from_utf8_lossy(&finished.output).replace('\r', "");
    findings.check(
        "the stress program succeeds",
        output.lines().any(|line| line == "status 0"),
        || {
            let told = output.lines().find(|line| line.starts_with("status "));
            told.unwrap_or("it did not end").to_owned()
        },
    );
    let Some(summary) = Summary::find(&output) else {
        findings.check("the stress program has a summary", false, || {
            format!("none in {} bytes of output", output.len())
        });
        return None;
    };
    let Summary {
        failures,
        processors,
        conversions,
        hotplug,
        memory,
        ..
    } = summary;
    findings.equal("nothing failed", failures, Vec::new());
    findings.equal("processors at the start", processors, VCPUS);
    findings.equal(
        "cycles of set_memory_decrypted and set_memory_encrypted",
        (conversions.to_shared_calls, conversions.to_private_calls),
        (row.cycles, row.cycles),
    );
    findings.equal(
        "pages that became shared are private again",
        conversions.to_private_pages,
        conversions.to_shared_pages,
    );
    findings.check(
        "ranges of one page, of several, and whole blocks were converted",
        conversions.whole_blocks > 0 && conversions.to_shared_pages > row.cycles,
        || format!("{conversions:?}"),
    );
    findings.check(
        "every processor converted",
        conversions.cycles.len() == VCPUS as usize && !conversions.cycles.contains(&0),
        || format!("cycles {:?}", conversions.cycles),
    );
    findings.equal(
        "wrong words in converted blocks",
        conversions.words_wrong,
        0,
    );
    findings.equal("wrong words in held memory", memory.words_wrong, 0);
    findings.check(
        "all memory was taken",
        memory.held_mib >= MEMORY_TAKEN_MIB,
        || format!("{} MiB", memory.held_mib),
    );
    findings.check(
        "some memory was unaccepted at first",
        memory.unaccepted_before_kib > 0,
        || "none".into(),
    );
    findings.equal("KiB unaccepted at the end", memory.unaccepted_after_kib, 0);
    let others = u64::from(VCPUS - 1);
    findings.equal(
        "processors that went offline and came back",
        (hotplug.offline, hotplug.online),
        (others, others),
    );
    let trouble = output.lines().find(|line| is_complaint(line));
    findings.equal("the kernel has no complaint", trouble, None);
    Some(conversions)
}

/// Whether a line of the kernel's log says that something is wrong. One warning is the scheduler's
/// own affair: 6.12 miscounts the bandwidth of its fair server when a processor goes offline.
fn is_complaint(line: &str) -> bool {
    const FAIR_SERVER: &str = " at kernel/sched/deadline.c:";
    ["BUG: ", "] WARNING: ", "rcu: INFO: "]
        .iter()
        .any(|mark| line.contains(mark))
        && !line.contains(FAIR_SERVER)
}

/// The machine counted at least what the guest says it did.
fn machine_saw(findings: &mut Findings, finished: &Finished, said: &Conversions) -> Result<()> {
    let report = finished.report()?;
    let guest = report.counters.get(1).cloned().unwrap_or_default();
    let (shared, private) = (guest.psc_shared_pages, guest.psc_private_pages);
    findings.check(
        "the host was asked for as many conversions",
        shared >= said.to_shared_pages && private >= said.to_private_pages,
        || format!("{shared} pages shared, {private} private, the guest says {said:?}"),
    );
    findings.equal(
        "the guest validates nothing itself",
        guest.pvalidate.validate_4k.ok,
        0,
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::is_complaint;

    #[test]
    fn warnings_are_complaints_but_for_the_fair_servers() {
        let at =
            |place: &str| format!("<4>[   71.337422] WARNING: CPU: 0 PID: 176 at {place} x+1/2");
        assert!(is_complaint(&at("mm/page_alloc.c:5")));
        assert!(!is_complaint(&at("kernel/sched/deadline.c:265")));
        assert!(is_complaint("[  1.0] BUG: soft lockup - CPU#1 stuck"));
        assert!(!is_complaint("[  1.0] Speculation: WARNING: See the web"));
    }
}
