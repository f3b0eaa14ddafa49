//! Is the image reproducible and measured as told?

use protocols::launch::{Acceptance, Fault};
use protocols::report::Outcome;

use crate::image::Recipe;
use crate::scenario::{Findings, GUEST_LIMIT, Scenario};
use crate::vm::Settings;

/// Largest image without firmware, in bytes (design budget).
const LARGEST_IMAGE: u64 = 512 << 10;

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::new("image/reproducible", |context| {
            let artefacts = &context.artefacts;
            let recipe = Recipe {
                paravisor: &artefacts.paravisor,
                firmware: Some(&artefacts.ovmf),
                td_firmware: None,
                fault: Fault::NONE,
                acceptance: Acceptance::LAZY,
            };
            let (first, first_told) = recipe.build()?;
            let (second, second_told) = recipe.build()?;
            let mut findings = Findings::default();
            findings.check("the same bytes twice", first.bytes == second.bytes, || {
                "the images differ".into()
            });
            findings.equal("the same description twice", first_told, second_told);
            let (faulty, _) = Recipe {
                fault: Fault::SKIP_SCRUB,
                ..recipe
            }
            .build()?;
            findings.check(
                "another content has another digest",
                faulty.digest != first.digest,
                || "the digest is the same".into(),
            );
            Ok(findings)
        }),
        Scenario::new("image/budget", |context| {
            let recipe = Recipe {
                paravisor: &context.artefacts.paravisor,
                firmware: None,
                td_firmware: None,
                fault: Fault::NONE,
                acceptance: Acceptance::LAZY,
            };
            let (_, sidecar) = recipe.build()?;
            let mut findings = Findings::default();
            let size = sidecar.image_bytes;
            findings.check(
                format!("at most {LARGEST_IMAGE} bytes without firmware"),
                size <= LARGEST_IMAGE,
                || format!("{size} bytes"),
            );
            Ok(findings)
        }),
        Scenario::new("image/measured", |context| {
            let artefacts = &context.artefacts;
            let (image, sidecar) =
                context.image(&artefacts.paravisor, Some(&artefacts.ovmf), Fault::NONE)?;
            // The launch is all that is wanted; a host without processors ends the run behind it.
            let settings = Settings {
                hostile: Some("vp-count-zero".into()),
                ..Settings::default()
            };
            let finished = context
                .machine(image, &sidecar, settings)
                .run(GUEST_LIMIT, |_| {})?;
            let mut findings = Findings::default();
            findings.ended(&finished, Outcome::Terminated)?;
            findings.measured(&finished, &sidecar);
            let pages = finished.launch.unwrap_or_default().pages;
            findings.equal(
                "one VMSA, secrets and CPUID page",
                (pages.vmsa, pages.secrets, pages.cpuid),
                (1, 1, 1),
            );
            Ok(findings)
        }),
    ]
}
