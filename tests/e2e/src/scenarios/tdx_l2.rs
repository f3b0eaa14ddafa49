//! Does the paravisor serve the guest of a trust domain?
//!
//! The image is the one for SEV-SNP and TDX. The paravisor is L1, the test guest an L2 VM.

use anyhow::Result;
use igvm_build::sidecar::Sidecar;
use protocols::launch::{Acceptance, Fault};
use protocols::report::Outcome;
use protocols::terminate::{Reason, ReasonSet, TurnstileReason};

use super::cases::{self, Transcript};
use crate::image::Recipe;
use crate::scenario::{Context, Findings, GUEST_LIMIT, Scenario};
use crate::vm::{Backing, Config, Cores, Finished, Settings};

/// The table has at least so many cases.
const LEAST_CASES: usize = 100;

/// A lie of the host's, by the name of the machine's setting, and the reason it must meet.
const LIES: [(&str, TurnstileReason); 6] = [
    ("map-overlap", TurnstileReason::MAP_OVERLAP),
    ("map-wrap", TurnstileReason::MAP_WRAP),
    ("map-many", TurnstileReason::MAP_TOO_MANY),
    ("map-own-missing", TurnstileReason::MAP_OWN_MISSING),
    ("map-unsorted", TurnstileReason::MAP_UNSORTED),
    ("map-gpa-retry", TurnstileReason::TD_MAP_GPA),
];

/// The host removes a page of the guest's and adds another; what the guest does with it then, as the
/// number of processors has the test guest choose, and the case that is its end.
const RE_ADDED: [(&str, u32, &str); 3] = [
    ("asked-again", 1, "re_added_and_asked_for_again"),
    ("used", 2, "re_added_page_is_used"),
    ("shared", 3, "re_added_and_shared"),
];

/// Both processors at once, and a host that keeps an entry busy.
const AT_ONCE: [&str; 6] = [
    "one_page_for_both",
    "one_region_in_two_sizes",
    "accept_against_share",
    "share_against_share",
    "neighbours_accept_and_share",
    "a_busy_entry_is_told",
];

pub fn scenarios() -> Vec<Scenario> {
    let good = Backing::BOTH.into_iter().map(|backing| {
        Scenario::new(format!("tdx_l2/{}", backing.name()), move |context| {
            go_through(context, backing)
        })
    });
    let hostile = LIES.into_iter().map(|(lie, reason)| {
        Scenario::new(format!("tdx_l2/hostile/{lie}"), move |context| {
            meets(context, lie, reason)
        })
    });
    let re_added = RE_ADDED.into_iter().flat_map(|(how, vcpus, end)| {
        Backing::BOTH.into_iter().map(move |backing| {
            let name = format!("tdx_l2/re-add-{how}-{}", backing.name());
            Scenario::new(name, move |context| re_add(context, backing, vcpus, end))
        })
    });
    good.chain(hostile).chain(re_added).collect()
}

/// Nothing of the guest's can break the paravisor, and nothing is accepted twice.
fn go_through(context: &Context, backing: Backing) -> Result<Findings> {
    let settings = Settings {
        backing,
        ..Settings::default()
    };
    let (config, sidecar) = machine(context, settings, 2)?;
    let finished = config.run(GUEST_LIMIT, |_| {})?;
    let mut findings = Findings::default();
    findings.good_td_run(&finished, &sidecar)?;
    cases::judge(&mut findings, &finished, LEAST_CASES)?;
    let transcript = Transcript::parse(&String::from_utf8_lossy(&finished.output));
    for wanted in AT_ONCE {
        let there = transcript.checks.iter().any(|check| check.name == wanted);
        findings.check(format!("{wanted} was tried"), there, || "no".into());
    }
    Ok(findings)
}

/// The paravisor ends the machine with the reason that names the lie, and has accepted nothing twice.
fn meets(context: &Context, lie: &str, reason: TurnstileReason) -> Result<Findings> {
    let settings = Settings {
        hostile: Some(lie.to_owned()),
        ..Settings::default()
    };
    let (config, _) = machine(context, settings, 2)?;
    let finished = config.run(GUEST_LIMIT, |_| {})?;
    let mut findings = Findings::default();
    ended_with(&mut findings, &finished, reason)?;
    Ok(findings)
}

/// What the guest has is not accepted again, and the host's page is found out by the first who meets it.
fn re_add(context: &Context, backing: Backing, vcpus: u32, end: &str) -> Result<Findings> {
    let settings = Settings {
        backing,
        hostile: Some("re-add".to_owned()),
        ..Settings::default()
    };
    let (config, _) = machine(context, settings, vcpus)?;
    let finished = config.run(GUEST_LIMIT, |_| {})?;
    let mut findings = Findings::default();
    let transcript = Transcript::parse(&String::from_utf8_lossy(&finished.output));
    let last = transcript.checks.last().map(|check| check.name.as_str());
    findings.equal("the last case", last, Some(end));
    findings.equal(
        "only that one was not survived",
        transcript.failed(),
        vec![end],
    );
    ended_with(&mut findings, &finished, TurnstileReason::NOT_VALIDATED)?;
    Ok(findings)
}

/// The paravisor has ended the machine with this reason, and has accepted nothing twice.
fn ended_with(findings: &mut Findings, finished: &Finished, reason: TurnstileReason) -> Result<()> {
    findings.ended(finished, Outcome::Terminated)?;
    let report = finished.report()?;
    // As `svsm::hypervisor::tdx` puts them together.
    let found = Reason {
        set: ReasonSet((report.code >> 8) as u8),
        code: report.code as u8,
    };
    let expected = Reason::turnstile(reason);
    findings.check(
        format!("with the reason {expected}"),
        found == expected,
        || found.to_string(),
    );
    findings.equal("double accepts", report.violations.double_validation, 0);
    Ok(())
}

/// A trust domain with the paravisor as L1 and the test guest.
fn machine(context: &Context, settings: Settings, vcpus: u32) -> Result<(Config, Sidecar)> {
    let (image, sidecar) = context.image_of(Recipe {
        paravisor: &context.artefacts.paravisor,
        firmware: Some(&context.artefacts.svsm_cases),
        td_firmware: Some(&context.artefacts.l2_cases),
        fault: Fault::NONE,
        acceptance: Acceptance::LAZY,
    })?;
    let settings = Settings {
        tdx: true,
        oracle: true,
        ..settings
    };
    let config = Config {
        // The processors of a trust domain start at once.
        vcpus,
        cores: Cores::All,
        ..context.machine(image, &sidecar, settings)
    };
    Ok((config, sidecar))
}
