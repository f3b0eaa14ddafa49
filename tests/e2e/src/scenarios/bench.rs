//! Does a call cost what it may? Exact counts of instructions against the budgets of design.md §10.

use anyhow::Result;
use protocols::report::Outcome;

use crate::bench::counts::{Count, Counts, Place, SCRUB_2M};
use crate::scenario::{Context, Findings, Scenario};
use crate::vm::Backing;

pub fn scenarios() -> Vec<Scenario> {
    let runs = Place::ALL
        .into_iter()
        .flat_map(|place| Backing::BOTH.map(|backing| (place, backing)));
    runs.map(|(place, backing)| {
        let name = format!("bench/{}counts-{}", place.prefix(), backing.name());
        Scenario::new(name, move |context| counts(context, place, backing))
    })
    .collect()
}

/// A 2 MiB page is validated and granted by so many instructions each.
const fn instructions_per_2m(backing: Backing) -> (u64, u64) {
    match backing {
        Backing::Large => (1, 1),
        // The first validating instruction meets the mismatch; it is not tried again for the grant.
        Backing::Small => (513, 512),
    }
}

/// Calls for so many pages of 2 MiB: a list is worked off in parts, TDCALLs are for one page each.
const fn calls_per(place: Place, entries: u64) -> u64 {
    match place {
        Place::Snp => entries.div_ceil(16),
        Place::Tdx => entries,
    }
}

fn counts(context: &Context, place: Place, backing: Backing) -> Result<Findings> {
    let counts = Counts::run(context, place, backing)?;
    let mut findings = Findings::default();
    findings.ended(&counts.finished, Outcome::GuestExit)?;
    findings.equal("the guest's exit code", counts.finished.report()?.code, 0);
    match place {
        Place::Snp => findings.good_run(&counts.finished, &counts.sidecar)?,
        Place::Tdx => findings.good_td_run(&counts.finished, &counts.sidecar)?,
    }

    let (got, want) = counts.check;
    findings.check("code of known length was counted", want > 0, || {
        "nothing was counted".into()
    });
    findings.equal(
        "the machine counts as many instructions as there are",
        got,
        want,
    );
    if place == Place::Snp {
        // What the scrub is taken to cost is what the guest's own fill of 2 MiB costs.
        let fill = counts.find("fill", 1)?.instructions;
        findings.check(
            "a fill of 2 MiB is as many instructions as its loop has",
            (0..16).contains(&(fill.wrapping_sub(SCRUB_2M))),
            || fill.to_string(),
        );
    }
    for entries in [1, 64] {
        judge(&mut findings, &counts, counts.find("accept-2m", entries)?);
    }
    let small = counts.find("accept-4k", 1)?;
    findings.equal("calls for a page", (small.calls, small.switches), (1, 2));
    findings.equal(
        "instructions of the platform for a page",
        (small.validates, small.adjusts),
        (1, 1),
    );
    let refused = counts.find("no-change-2m", 1)?;
    findings.equal(
        "instructions of the platform for what is accepted already",
        (refused.validates, refused.adjusts),
        (0, 0),
    );
    Ok(findings)
}

fn judge(findings: &mut Findings, counts: &Counts, count: &Count) {
    let entries = count.entries;
    let calls = calls_per(counts.place, entries);
    findings.equal(
        &format!("calls and world switches for {entries} x 2 MiB"),
        (count.calls, count.switches),
        (calls, 2 * calls),
    );
    let [validate, adjust] = counts.place.instructions();
    let (validates, adjusts) = instructions_per_2m(counts.backing);
    findings.equal(
        &format!("{validate}s and {adjust}s for {entries} x 2 MiB"),
        (count.validates, count.adjusts),
        (entries * validates, entries * adjusts),
    );
    if counts.place == Place::Tdx {
        // And nothing else but the way back into the guest.
        findings.equal(
            &format!("TDCALLs for {entries} x 2 MiB"),
            count.tdcalls,
            entries * (validates + adjusts) + calls,
        );
    }
    let (used, budget) = (counts.without_scrub(count), entries * counts.budget());
    findings.check(
        format!("{entries} x 2 MiB in the budget of instructions"),
        used <= budget,
        || format!("{used} of {budget}"),
    );
}
