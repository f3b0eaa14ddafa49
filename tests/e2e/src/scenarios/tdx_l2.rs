//! Does the paravisor serve the guest of a trust domain?
//!
//! The image is the one for SEV-SNP and TDX. The paravisor is L1, the test guest an L2 VM.

use super::cases;
use crate::scenario::{Context, Findings, GUEST_LIMIT, Scenario};
use crate::vm::{Backing, Config, Settings};
use crate::image::Recipe;
use anyhow::Result;
use igvm_build::sidecar::Sidecar;
use protocols::launch::{Acceptance, Fault};

/// The table has at least so many cases.
const LEAST_CASES: usize = 80;

pub fn scenarios() -> Vec<Scenario> {
    Backing::BOTH
        .into_iter()
        .map(|backing| {
            Scenario::new(format!("tdx_l2/{}", backing.name()), move |context| {
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
                crate::report_laws::check(&mut findings, &finished, finished.report()?);
                Ok(findings)
            })
        })
        .collect()
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
        ..context.machine(image, &sidecar, settings)
    };
    Ok((config, sidecar))
}
