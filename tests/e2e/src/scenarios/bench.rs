//! Does a call cost what it may? Exact counts of instructions against the budgets of design.md §10.

use anyhow::Result;
use protocols::report::Outcome;

use crate::bench::counts::{Count, Counts, SCRUB_2M};
use crate::scenario::{Context, Findings, Scenario};
use crate::vm::Backing;

pub fn scenarios() -> Vec<Scenario> {
    Backing::BOTH
        .into_iter()
        .map(|backing| {
            Scenario::new(format!("bench/counts-{}", backing.name()), move |context| {
                counts(context, backing)
            })
        })
        .collect()
}

/// A 2 MiB page is validated and granted by so many instructions each.
const fn instructions_per_2m(backing: Backing) -> (u64, u64) {
    match backing {
        Backing::Large => (1, 1),
        // The first PVALIDATE meets the mismatch; it is not tried again for RMPADJUST.
        Backing::Small => (513, 512),
    }
}

fn counts(context: &Context, backing: Backing) -> Result<Findings> {
    let counts = Counts::run(context, backing)?;
    let mut findings = Findings::default();
    findings.ended(&counts.finished, Outcome::GuestExit)?;
    findings.equal("the guest's exit code", counts.finished.report()?.code, 0);
    findings.good_run(&counts.finished, &counts.sidecar)?;

    let (got, want) = counts.check;
    findings.check("code of known length was counted", want > 0, || {
        "nothing was counted".into()
    });
    findings.equal(
        "the machine counts as many instructions as there are",
        got,
        want,
    );
    // What the scrub is taken to cost is what the guest's own fill of 2 MiB costs.
    let fill = counts.find("fill", 1)?.instructions;
    findings.check(
        "a fill of 2 MiB is as many instructions as its loop has",
        (0..16).contains(&(fill.wrapping_sub(SCRUB_2M))),
        || fill.to_string(),
    );
    for (entries, calls) in [(1, 1), (64, 4)] {
        let count = counts.find("accept-2m", entries)?;
        judge(&mut findings, count, counts.budget(), calls, backing);
    }
    let small = counts.find("accept-4k", 1)?;
    findings.equal("calls for a page", (small.calls, small.switches), (1, 2));
    findings.equal(
        "instructions of the platform for a page",
        (small.pvalidates, small.rmpadjusts),
        (1, 1),
    );
    let refused = counts.find("no-change-2m", 1)?;
    findings.equal(
        "instructions of the platform for what is accepted already",
        (refused.pvalidates, refused.rmpadjusts),
        (0, 0),
    );
    Ok(findings)
}

fn judge(findings: &mut Findings, count: &Count, budget: u64, calls: u64, backing: Backing) {
    let entries = count.entries;
    let (pvalidates, rmpadjusts) = instructions_per_2m(backing);
    findings.equal(
        &format!("calls and world switches for {entries} x 2 MiB"),
        (count.calls, count.switches),
        (calls, 2 * calls),
    );
    findings.equal(
        &format!("PVALIDATEs and RMPADJUSTs for {entries} x 2 MiB"),
        (count.pvalidates, count.rmpadjusts),
        (entries * pvalidates, entries * rmpadjusts),
    );
    let used = count.without_scrub();
    findings.check(
        format!("{entries} x 2 MiB in the budget of instructions"),
        used <= entries * budget,
        || format!("{used} of {}", entries * budget),
    );
}
