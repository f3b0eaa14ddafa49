//! Does the machine behave as the architecture says, without any paravisor?
//!
//! A tiny program at VMPL0 goes through a table of instruction, RMP and GHCB cases. No line of the
//! paravisor takes part, so a failure here is the machine's.

use protocols::launch::Fault;

use super::cases;
use crate::scenario::{Findings, GUEST_LIMIT, Scenario};
use crate::vm::{Backing, Config, Cores, Settings, Vc};

/// The table has at least so many cases.
const LEAST_CASES: usize = 200;

pub fn scenarios() -> Vec<Scenario> {
    Backing::BOTH
        .into_iter()
        .map(|backing| {
            Scenario::new(format!("isa/{}", backing.name()), move |context| {
                let (image, sidecar) =
                    context.image(&context.artefacts.isa_cases, None, Fault::NONE)?;
                let settings = Settings {
                    backing,
                    vc: Vc::All,
                    oracle: true,
                    ..Settings::default()
                };
                let config = Config {
                    // What one processor may still use of what another has changed.
                    vcpus: 2,
                    cores: Cores::All,
                    ..context.machine(image, &sidecar, settings)
                };
                let finished = config.run(GUEST_LIMIT, |_| {})?;
                let mut findings = Findings::default();
                findings.measured(&finished, &sidecar);
                cases::judge(&mut findings, &finished, LEAST_CASES)?;
                Ok(findings)
            })
        })
        .collect()
}
