//! Does the paravisor serve the guest of a trust domain?
//!
//! The image is the one for SEV-SNP and TDX. The paravisor is L1, the test guest an L2 VM.

use anyhow::Result;
use igvm_build::sidecar::Sidecar;
use protocols::launch::{Acceptance, Fault};
use protocols::report::Outcome;
use protocols::terminate::{Reason, ReasonSet, TurnstileReason};

use super::cases;
use crate::image::Recipe;
use crate::scenario::{Context, Findings, GUEST_LIMIT, Scenario};
use crate::vm::{Backing, Config, Cores, Settings};

/// The table has at least so many cases.
const LEAST_CASES: usize = 100;

/// A lie of the host's, by the name of the machine's setting, and the reason it must meet.
const LIES: [(&str, TurnstileReason); 7] = [
    ("map-overlap", TurnstileReason::MAP_OVERLAP),
    ("map-wrap", TurnstileReason::MAP_WRAP),
    ("map-many", TurnstileReason::MAP_TOO_MANY),
    ("map-own-missing", TurnstileReason::MAP_OWN_MISSING),
    ("map-unsorted", TurnstileReason::MAP_UNSORTED),
    ("map-gpa-retry", TurnstileReason::TD_MAP_GPA),
    ("re-add", TurnstileReason::NOT_VALIDATED),
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
    good.chain(hostile).collect()
}

/// Nothing of the guest's can break the paravisor, and nothing is accepted twice.
fn go_through(context: &Context, backing: Backing) -> Result<Findings> {
    let settings = Settings {
        backing,
        ..Settings::default()
    };
    let (config, sidecar) = machine(context, settings)?;
    let finished = config.run(GUEST_LIMIT, |_| {})?;
    let mut findings = Findings::default();
    let launched = finished.launch.as_ref().map(|launch| launch.digest.clone());
    findings.equal("MRTD as built", launched, sidecar.mrtd);
    cases::judge(&mut findings, &finished, LEAST_CASES)?;
    let report = finished.report()?;
    findings.equal("violations", report.violations.total(), 0);
    let disagreements = report.referee.as_ref().map(|verdict| verdict.disagreements);
    findings.equal("disagreements at the end", disagreements, Some(0));
    crate::report_laws::check(&mut findings, &finished, report);
    Ok(findings)
}

/// The paravisor ends the machine with the reason that names the lie, and has accepted nothing twice.
fn meets(context: &Context, lie: &str, reason: TurnstileReason) -> Result<Findings> {
    let settings = Settings {
        hostile: Some(lie.to_owned()),
        ..Settings::default()
    };
    let (config, _) = machine(context, settings)?;
    let finished = config.run(GUEST_LIMIT, |_| {})?;
    let mut findings = Findings::default();
    findings.ended(&finished, Outcome::Terminated)?;
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
    Ok(findings)
}

/// A trust domain of two processors with the paravisor as L1 and the test guest.
fn machine(context: &Context, settings: Settings) -> Result<(Config, Sidecar)> {
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
        vcpus: 2,
        cores: Cores::All,
        ..context.machine(image, &sidecar, settings)
    };
    Ok((config, sidecar))
}
