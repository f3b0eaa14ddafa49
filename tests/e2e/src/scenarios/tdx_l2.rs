//! Does the paravisor serve the guest of a trust domain?
//!
//! The image is the one for SEV-SNP and TDX. The paravisor is L1, the test guest an L2 VM.

use anyhow::Result;
use igvm_build::sidecar::Sidecar;
use protocols::launch::{Acceptance, Fault, Touch};
use protocols::report::{Outcome, Report};
use protocols::terminate::{Reason, ReasonSet, TurnstileReason};

use super::cases::{self, Transcript};
use super::policy::{self, AHEAD, EAGER};
use crate::image::Recipe;
use crate::scenario::{Context, Findings, GUEST_LIMIT, Scenario};
use crate::vm::{Backing, Config, Cores, Finished, Settings};

/// The table has at least so many cases.
const LEAST_CASES: usize = 100;
/// The tables for memory that is accepted before the guest asks have at least so many.
const LEAST_SPECIAL_CASES: usize = 5;

/// A lie of the host's, by the name of the machine's setting, and the reason it must meet.
const LIES: [(&str, TurnstileReason); 6] = [
    ("map-overlap", TurnstileReason::MAP_OVERLAP),
    ("map-wrap", TurnstileReason::MAP_WRAP),
    ("map-many", TurnstileReason::MAP_TOO_MANY),
    ("map-own-missing", TurnstileReason::MAP_OWN_MISSING),
    ("map-unsorted", TurnstileReason::MAP_UNSORTED),
    ("map-gpa-retry", TurnstileReason::TD_MAP_GPA),
];

/// A host that goes on with L1 although its guest has stopped for nothing: it may, so it must be survived.
const EARLY_RETURN: &str = "early-return";

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

/// Memory is accepted on request, or when it is touched.
const ON_TOUCH: Acceptance = Acceptance {
    touch: Touch::ACCEPT,
    ..Acceptance::LAZY
};

/// When memory is accepted before the guest asks: in a scenario's name, which is the name of the guest's
/// table as well.
const POLICIES: [(&str, Acceptance); 3] = [("eager", EAGER), ("ahead", AHEAD), ("touch", ON_TOUCH)];

/// When memory is accepted while the host lies, in the name of a scenario; behind the dash is the name of
/// the guest's table.
const WHEN: [(&str, Acceptance); 3] =
    [("", Acceptance::LAZY), ("-eager", EAGER), ("-ahead", AHEAD)];

pub fn scenarios() -> Vec<Scenario> {
    let good = Backing::BOTH.into_iter().map(|backing| {
        Scenario::new(format!("tdx_l2/{}", backing.name()), move |context| {
            go_through(context, backing)
        })
    });
    let policies = POLICIES.into_iter().flat_map(|(table, acceptance)| {
        Backing::BOTH.into_iter().map(move |backing| {
            let name = format!("tdx_l2/policy-{table}-{}", backing.name());
            let scenario = Scenario::new(name, move |context| {
                under_policy(context, table, acceptance, backing)
            });
            // Every day with large pages, which need less time.
            match backing {
                Backing::Large => scenario,
                Backing::Small => scenario.only_in_full(),
            }
        })
    });
    let hostile = WHEN.into_iter().flat_map(|(suffix, acceptance)| {
        LIES.into_iter().map(move |(lie, reason)| {
            let name = format!("tdx_l2/hostile/{lie}{suffix}");
            let scenario =
                Scenario::new(name, move |context| meets(context, lie, reason, acceptance));
            // Every day under lazy, as for SEV-SNP.
            match suffix {
                "" => scenario,
                _ => scenario.only_in_full(),
            }
        })
    });
    let early = WHEN.into_iter().map(|(suffix, acceptance)| {
        let name = format!("tdx_l2/hostile/{EARLY_RETURN}{suffix}");
        let table = suffix.strip_prefix('-');
        let scenario = Scenario::new(name, move |context| {
            resumed_for_nothing(context, acceptance, table)
        });
        match suffix {
            "" => scenario,
            _ => scenario.only_in_full(),
        }
    });
    let re_added = RE_ADDED.into_iter().flat_map(|(how, vcpus, end)| {
        Backing::BOTH.into_iter().map(move |backing| {
            let name = format!("tdx_l2/re-add-{how}-{}", backing.name());
            Scenario::new(name, move |context| {
                let settings = Settings {
                    backing,
                    ..Settings::default()
                };
                re_add(context, Acceptance::LAZY, settings, vcpus, end)
            })
        })
    });
    // A page that is ready and that nobody has asked for yet.
    let re_added_ahead = [("eager", EAGER), ("ahead", AHEAD)].map(|(table, acceptance)| {
        Scenario::new(format!("tdx_l2/re-add-{table}"), move |context| {
            let settings = Settings {
                table: Some(table),
                ..Settings::default()
            };
            re_add(context, acceptance, settings, 2, "re_added_page_is_claimed")
        })
        .only_in_full()
    });
    good.chain(policies)
        .chain(hostile)
        .chain(early)
        .chain(re_added)
        .chain(re_added_ahead)
        .collect()
}

/// Nothing of the guest's can break the paravisor, and nothing is accepted twice.
fn go_through(context: &Context, backing: Backing) -> Result<Findings> {
    let settings = Settings {
        backing,
        ..Settings::default()
    };
    let (mut findings, finished) = judged(context, Acceptance::LAZY, settings, LEAST_CASES)?;
    let transcript = Transcript::parse(&String::from_utf8_lossy(&finished.output));
    for wanted in AT_ONCE {
        let there = transcript.checks.iter().any(|check| check.name == wanted);
        findings.check(format!("{wanted} was tried"), there, || "no".into());
    }
    Ok(findings)
}

/// Memory is accepted before the guest asks, which it sees only by what it does not wait for.
fn under_policy(
    context: &Context,
    table: &'static str,
    acceptance: Acceptance,
    backing: Backing,
) -> Result<Findings> {
    let settings = Settings {
        backing,
        table: Some(table),
        ..Settings::default()
    };
    let (mut findings, finished) = judged(context, acceptance, settings, LEAST_SPECIAL_CASES)?;
    let report = finished.report()?;
    policy::starts_wait_a_step(&mut findings, report);
    if acceptance.touch == Touch::FAULT {
        policy::a_start_waited(&mut findings, report);
        second_at_work(&mut findings, acceptance, report);
    }
    Ok(findings)
}

/// Under eager both processors have accepted memory, under ahead the one that the guest left idle.
fn second_at_work(findings: &mut Findings, acceptance: Acceptance, report: &Report) {
    let accepted = |index: usize| {
        let level = report.vcpus.get(index).and_then(|vcpu| vcpu.levels.first());
        level.map_or(0, |level| {
            level.accept.size_4k.ok + level.accept.size_2m.ok * policy::PAGES_PER_STEP
        })
    };
    let (first, second) = (accepted(0), accepted(1));
    let memory = report.memory.guest_pages;
    // What the first accepts for the paravisor and on request is less.
    let least = match acceptance {
        EAGER => memory / 8,
        _ => memory / 4,
    };
    findings.check(
        "the second processor has accepted memory",
        second >= least,
        || format!("{first} and {second} of {memory} pages"),
    );
}

/// A run whose guest judges, with what holds of every good one.
fn judged(
    context: &Context,
    acceptance: Acceptance,
    settings: Settings,
    least_cases: usize,
) -> Result<(Findings, Finished)> {
    let (config, sidecar) = machine(context, acceptance, settings, 2)?;
    let finished = config.run(GUEST_LIMIT, |_| {})?;
    let mut findings = Findings::default();
    findings.good_td_run(&finished, &sidecar)?;
    cases::judge(&mut findings, &finished, least_cases)?;
    Ok((findings, finished))
}

/// The paravisor ends the machine with the reason that names the lie, and has accepted nothing twice.
fn meets(
    context: &Context,
    lie: &str,
    reason: TurnstileReason,
    acceptance: Acceptance,
) -> Result<Findings> {
    let settings = Settings {
        hostile: Some(lie.to_owned()),
        ..Settings::default()
    };
    let (config, _) = machine(context, acceptance, settings, 2)?;
    let finished = config.run(GUEST_LIMIT, |_| {})?;
    let mut findings = Findings::default();
    ended_with(&mut findings, &finished, reason)?;
    Ok(findings)
}

/// The guest's cases are as without it, however often L1 is resumed for nothing.
fn resumed_for_nothing(
    context: &Context,
    acceptance: Acceptance,
    table: Option<&'static str>,
) -> Result<Findings> {
    let settings = Settings {
        hostile: Some(EARLY_RETURN.to_owned()),
        table,
        ..Settings::default()
    };
    let least = table.map_or(LEAST_CASES, |_| LEAST_SPECIAL_CASES);
    let (mut findings, finished) = judged(context, acceptance, settings, least)?;
    let counters = finished.report()?.counters.get(1);
    let early = counters.and_then(|guest| guest.td_exits.get(EARLY_RETURN));
    let early = early.copied().unwrap_or(0);
    findings.check("L1 was resumed for nothing", early > 0, || "never".into());
    Ok(findings)
}

/// What the guest has is not accepted again, and the host's page is found out by the first who meets it.
fn re_add(
    context: &Context,
    acceptance: Acceptance,
    settings: Settings,
    vcpus: u32,
    end: &str,
) -> Result<Findings> {
    let settings = Settings {
        hostile: Some("re-add".to_owned()),
        ..settings
    };
    let (config, _) = machine(context, acceptance, settings, vcpus)?;
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
fn machine(
    context: &Context,
    acceptance: Acceptance,
    settings: Settings,
    vcpus: u32,
) -> Result<(Config, Sidecar)> {
    let (image, sidecar) = context.image_of(Recipe {
        paravisor: &context.artefacts.paravisor,
        firmware: Some(&context.artefacts.svsm_cases),
        td_firmware: Some(&context.artefacts.l2_cases),
        fault: Fault::NONE,
        acceptance,
    })?;
    let settings = Settings {
        tdx: true,
        oracle: true,
        ..settings
    };
    let config = Config {
        // Under ahead there is to be work left when the guest wants the processor that does it.
        memory: match acceptance {
            EAGER => "1G",
            _ => "2G",
        }
        .into(),
        // The processors of a trust domain start at once.
        vcpus,
        cores: Cores::All,
        ..context.machine(image, &sidecar, settings)
    };
    Ok((config, sidecar))
}
