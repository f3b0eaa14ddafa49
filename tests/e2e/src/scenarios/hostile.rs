//! Does a lying host meet a termination with a reason?
//!
//! Each scenario lets the machine lie in one way. The paravisor must end the guest with the reason
//! that names the lie, or live with it where the lie can do no harm. Which guest it is does not
//! matter, so the small one is used. When memory is accepted might matter: with `--full` every lie
//! is told under each policy.

use protocols::launch::{AcceptPolicy, Acceptance, Fault};
use protocols::report::Outcome;
use protocols::terminate::{Reason, ReasonSet, TurnstileReason};

use super::{cases, policy, svsm_calls};
use crate::scenario::{Findings, GUEST_LIMIT, Scenario};
use crate::vm::Settings;

/// The lie, by the name of the machine's setting, and the reason it must meet.
const LIES: [(&str, TurnstileReason); 13] = [
    ("map-overlap", TurnstileReason::MAP_OVERLAP),
    ("map-wrap", TurnstileReason::MAP_WRAP),
    ("map-many", TurnstileReason::MAP_TOO_MANY),
    ("map-own-missing", TurnstileReason::MAP_OWN_MISSING),
    ("map-unsorted", TurnstileReason::MAP_UNSORTED),
    ("cpuid-count", TurnstileReason::CPUID_PAGE),
    ("vp-count-zero", TurnstileReason::VP_COUNT),
    ("vp-count-huge", TurnstileReason::VP_COUNT),
    ("ghcb-version", TurnstileReason::GHCB_VERSION),
    ("ghcb-features", TurnstileReason::GHCB_FEATURES),
    ("ghcb-register", TurnstileReason::GHCB_REGISTER),
    ("ghcb-psc", TurnstileReason::GHCB_PAGE_STATE),
    ("ghcb-unknown", TurnstileReason::GHCB_REPLY),
];

/// Entering VMPL0 without a call pending: allowed to the host, so it must be survived.
const EARLY_RETURN: &str = "early-return";

/// When memory is accepted, in the name of a scenario.
const POLICIES: [(&str, Acceptance); 3] = [
    ("", Acceptance::LAZY),
    ("-eager", policy::EAGER),
    ("-ahead", policy::AHEAD),
];

pub fn scenarios() -> Vec<Scenario> {
    let mut scenarios = Vec::new();
    for (suffix, acceptance) in POLICIES {
        for (lie, reason) in LIES {
            let scenario = meets(lie, reason, suffix, acceptance);
            // Beyond lazy, every day only what the host is asked for before the guest starts.
            scenarios.push(match (lie, suffix) {
                (_, "") | ("ghcb-psc", "-eager") => scenario,
                _ => scenario.only_in_full(),
            });
        }
        let early = Scenario::new(format!("hostile/{EARLY_RETURN}{suffix}"), move |context| {
            let settings = Settings {
                hostile: Some(EARLY_RETURN.to_owned()),
                ..Settings::default()
            };
            match acceptance.policy {
                AcceptPolicy::LAZY => svsm_calls::go_through(context, settings),
                _ => policy::calls(context, acceptance, settings),
            }
        });
        scenarios.push(match suffix {
            "" => early,
            _ => early.weighing(2).only_in_full(),
        });
    }
    scenarios.extend(MESSAGES.map(lies_about_messages));
    scenarios
}

/// Hosts that keep, change or make up what goes between the paravisor and the security processor: the guest is
/// told, nothing is believed, and the VM goes on.
const MESSAGES: [&str; 3] = ["messages-tampered", "messages-replayed", "messages-lost"];
/// The cases about attestation are at least so many.
const LEAST_MESSAGE_CASES: usize = 20;

fn lies_about_messages(lie: &'static str) -> Scenario {
    Scenario::new(format!("hostile/{lie}"), move |context| {
        let settings = Settings {
            hostile: Some(lie.to_owned()),
            ..Settings::default()
        };
        let paravisor = &context.artefacts.paravisor;
        let (config, sidecar) = context.svsm_cases(paravisor, Fault::NONE, settings)?;
        let finished = config.run(GUEST_LIMIT, |_| {})?;
        let mut findings = Findings::default();
        cases::judge(&mut findings, &finished, LEAST_MESSAGE_CASES)?;
        findings.good_run(&finished, &sidecar)?;
        Ok(findings)
    })
    .weighing(2)
}

fn meets(
    lie: &'static str,
    expected: TurnstileReason,
    suffix: &str,
    acceptance: Acceptance,
) -> Scenario {
    Scenario::new(format!("hostile/{lie}{suffix}"), move |context| {
        let settings = Settings {
            hostile: Some(lie.to_owned()),
            ..Settings::default()
        };
        let paravisor = &context.artefacts.paravisor;
        let (config, sidecar) =
            context.svsm_cases_with(paravisor, Fault::NONE, settings, acceptance)?;
        let finished = config.run(GUEST_LIMIT, |_| {})?;
        let mut findings = Findings::default();
        findings.ended(&finished, Outcome::Terminated)?;
        let termination = finished.report()?.termination.clone().unwrap_or_default();
        findings.equal("by the paravisor", termination.vmpl, 0);
        let found = Reason {
            set: ReasonSet(termination.set),
            code: termination.code,
        };
        let expected = Reason::turnstile(expected);
        findings.check(
            format!("with the reason {expected}"),
            found == expected,
            || found.to_string(),
        );
        findings.measured(&finished, &sidecar);
        Ok(findings)
    })
}
