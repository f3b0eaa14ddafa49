//! Is no page ever validated twice, whatever host and guest try?
//!
//! The machine is the witness: it remembers which address VMPL0 has validated and not rescinded
//! since, also where the host has removed the page from the RMP, so that the instruction would
//! succeed with CF=0. The test guest asks again in both sizes, in one call and in several, on one
//! processor and on two at once; the host puts other memory under accepted pages, or removes them
//! and adds them again. At the end the guest gives such a page back, and the paravisor, which then
//! meets a page that is gone, ends the guest.

use anyhow::Result;
use protocols::launch::Fault;
use protocols::report::{Event, Outcome};
use protocols::terminate::{Reason, ReasonSet, TurnstileReason};

use super::cases::Transcript;
use crate::report_laws;
use crate::scenario::{Context, Findings, GUEST_LIMIT, Scenario};
use crate::vm::{Backing, Settings};

/// A host by its setting, the cases that are about it, and the one that ends the guest.
struct Host {
    name: &'static str,
    cases: &'static [&'static str],
    end: &'static str,
}

const HOSTS: [Host; 2] = [
    Host {
        name: "remap",
        cases: &[
            "remap_page_and_ask_again",
            "remap_in_region_and_ask_again",
            "remap_and_ask_on_all_processors",
            "remap_what_was_given_back",
        ],
        end: "remap_and_rescind",
    },
    Host {
        name: "re-add",
        cases: &["re_add_what_was_given_back"],
        end: "re_add_and_ask_again_and_rescind",
    },
];

/// What guests alone try, under every host.
const GUESTS: [&str; 6] = [
    "entry_validated_twice",
    "entry_2m_validated_twice",
    "entry_twice_in_one_list",
    "smp_one_page_for_all",
    "smp_accept_against_rescind",
    "smp_one_region_asked_for_in_two_sizes",
];

pub fn scenarios() -> Vec<Scenario> {
    let hosts = HOSTS.iter().flat_map(|host| {
        Backing::BOTH.into_iter().map(move |backing| {
            let name = format!("double_validation/{}-{}", host.name, backing.name());
            Scenario::new(name, move |context| refused(context, host, backing)).weighing(2)
        })
    });
    hosts
        .chain([Scenario::new("double_validation/witness", witness)])
        .collect()
}

/// Nothing is validated twice, and the guest ends as it must.
fn refused(context: &Context, host: &Host, backing: Backing) -> Result<Findings> {
    let settings = Settings {
        backing,
        hostile: Some(host.name.to_owned()),
        ..Settings::default()
    };
    let paravisor = &context.artefacts.paravisor;
    let (config, sidecar) = context.svsm_cases(paravisor, Fault::NONE, settings)?;
    let finished = config.run(GUEST_LIMIT, |_| {})?;
    let report = finished.report()?;
    let mut findings = Findings::default();

    findings.equal("double validations", report.violations.double_validation, 0);
    findings.check(
        "no other violations",
        report.violations.total() == 0,
        || format!("{:?}", report.violations),
    );
    let transcript = Transcript::parse(&String::from_utf8_lossy(&finished.output));
    for wanted in host.cases.iter().chain(&GUESTS) {
        let there = transcript.checks.iter().any(|check| check.name == *wanted);
        findings.check(format!("{wanted} was tried"), there, || "no".into());
    }
    let last = transcript.checks.last().map(|check| check.name.as_str());
    findings.equal("the last case", last, Some(host.end));
    findings.equal(
        "only that one was not survived",
        transcript.failed(),
        vec![host.end],
    );
    findings.equal("nothing else was said", transcript.other, Vec::new());

    findings.ended(&finished, Outcome::Terminated)?;
    let termination = report.termination.clone().unwrap_or_default();
    findings.equal("by the paravisor", termination.vmpl, 0);
    let found = Reason {
        set: ReasonSet(termination.set),
        code: termination.code,
    };
    let expected = Reason::turnstile(TurnstileReason::NOT_VALIDATED);
    findings.check(
        format!("with the reason {expected}"),
        found == expected,
        || found.to_string(),
    );
    // What the paravisor has met is recorded as it is.
    let disagreements = report.referee.as_ref().map(|verdict| verdict.disagreements);
    findings.equal("disagreements at the end", disagreements, Some(0));
    findings.measured(&finished, &sidecar);
    report_laws::check(&mut findings, &finished, report);
    Ok(findings)
}

/// The witness sees what the processor does not tell: with a paravisor that records a page as given
/// back without rescinding it, and a host that adds it again, the second validation has CF=0.
fn witness(context: &Context) -> Result<Findings> {
    let settings = Settings {
        hostile: Some("re-add".to_owned()),
        ..Settings::default()
    };
    let paravisor = &context.artefacts.faulty_paravisor;
    let (config, _) = context.svsm_cases(paravisor, Fault::SKIP_RESCIND, settings)?;
    let finished = config.run(GUEST_LIMIT, |_| {})?;
    let report = finished.report()?;
    let mut findings = Findings::default();
    let seen = report.violations.double_validation;
    findings.check("double validations are seen", seen > 0, || seen.to_string());
    let told = finished.events.iter().any(|event| {
        matches!(event, Event::Refusal(refusal) if refusal.text.contains("validated before (CF=0)"))
    });
    findings.check("one of them with CF=0", told, || "none".into());
    Ok(findings)
}
