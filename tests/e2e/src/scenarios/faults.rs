//! Do the checks catch a paravisor that misbehaves?
//!
//! A test build of the paravisor wraps its platform backend so that one step goes wrong, chosen by
//! the image. Each fault must be reported by the check that is meant for it: a check that cannot
//! fail proves nothing. The same build without a fault must pass, so that it is the fault that is
//! caught and not the build.

use anyhow::Result;
use protocols::launch::Fault;
use protocols::report::Report;
use protocols::terminate::{Reason, TurnstileReason, explain};

use super::cases::{self, Transcript};
use super::svsm_calls::LEAST_CASES;
use crate::scenario::{Context, Findings, GUEST_LIMIT, Scenario};
use crate::vm::{Finished, Settings};

/// A fault and the check that must report it.
struct Expectation {
    name: &'static str,
    fault: Fault,
    /// What must be reported, for people.
    witness: &'static str,
    /// Whether it was.
    reported: fn(&Report, &Transcript) -> bool,
}

const EXPECTATIONS: [Expectation; 10] = [
    Expectation {
        name: "skip-scrub",
        fault: Fault::SKIP_SCRUB,
        witness: "the machine sees a grant of an unscrubbed page",
        reported: |report, _| report.violations.unscrubbed_grant > 0,
    },
    Expectation {
        name: "skip-grant",
        fault: Fault::SKIP_GRANT,
        witness: "the referee finds accepted pages that the guest may not use",
        reported: |report, _| disagreements(report) > 0,
    },
    Expectation {
        name: "validate-twice",
        fault: Fault::VALIDATE_TWICE,
        witness: "the machine sees a second validation",
        reported: |report, _| report.violations.double_validation > 0,
    },
    Expectation {
        name: "wrong-next",
        fault: Fault::WRONG_NEXT,
        witness: "the test guest finds a wrong index",
        reported: |_, transcript| !transcript.failed().is_empty(),
    },
    Expectation {
        name: "wrong-order",
        fault: Fault::WRONG_ORDER,
        witness: "the machine sees a rescind of a page still in use",
        reported: |report, _| report.violations.live_rescind > 0,
    },
    Expectation {
        name: "grant-before-scrub",
        fault: Fault::GRANT_BEFORE_SCRUB,
        witness: "the machine sees a grant of an unscrubbed page",
        reported: |report, _| report.violations.unscrubbed_grant > 0,
    },
    Expectation {
        name: "skip-validate",
        fault: Fault::SKIP_VALIDATE,
        witness: "the paravisor meets a page that is not validated, or the referee does",
        reported: |report, _| {
            let met = Reason::turnstile(TurnstileReason::NOT_VALIDATED);
            let ended = report.termination.as_ref().map(|t| explain(t.set, t.code));
            ended == Some(met) || disagreements(report) > 0
        },
    },
    Expectation {
        name: "missing-flush",
        fault: Fault::MISSING_FLUSH,
        witness: "the machine sees an answer while another processor may still use the page",
        reported: |report, _| report.violations.stale_translation > 0,
    },
    Expectation {
        name: "remote-stale-translation",
        fault: Fault::REMOTE_STALE_TRANSLATION,
        witness: "the machine sees an answer while another processor may still use the page",
        reported: |report, _| report.violations.stale_translation > 0,
    },
    Expectation {
        name: "in-use-vmsa",
        fault: Fault::IN_USE_VMSA,
        witness: "the referee finds a VMSA where the map says guest memory",
        reported: |report, _| disagreements(report) > 0,
    },
];

fn disagreements(report: &Report) -> u64 {
    report
        .referee
        .as_ref()
        .map_or(0, |referee| referee.disagreements)
}

pub fn scenarios() -> Vec<Scenario> {
    let mut scenarios = vec![Scenario::new("faults/none", |context| {
        let (finished, sidecar) = run(context, Fault::NONE)?;
        let mut findings = Findings::default();
        cases::judge(&mut findings, &finished, LEAST_CASES)?;
        findings.good_run(&finished, &sidecar)?;
        Ok(findings)
    })];
    scenarios.extend(EXPECTATIONS.into_iter().map(|expected| {
        Scenario::new(format!("faults/{}", expected.name), move |context| {
            let (finished, _) = run(context, expected.fault)?;
            let report = finished.report()?;
            let transcript = Transcript::parse(&String::from_utf8_lossy(&finished.output));
            let mut findings = Findings::default();
            findings.check(
                expected.witness,
                (expected.reported)(report, &transcript),
                || {
                    format!(
                        "not reported: {:?}, violations {:?}, referee {:?}, failed cases {:?}",
                        report.outcome,
                        report.violations,
                        report.referee,
                        transcript.failed()
                    )
                },
            );
            Ok(findings)
        })
    }));
    scenarios
}

fn run(context: &Context, fault: Fault) -> Result<(Finished, igvm_build::sidecar::Sidecar)> {
    let paravisor = &context.artefacts.faulty_paravisor;
    let (config, sidecar) = context.svsm_cases(paravisor, fault, Settings::default())?;
    let finished = config.run(GUEST_LIMIT, |_| {})?;
    Ok((finished, sidecar))
}
