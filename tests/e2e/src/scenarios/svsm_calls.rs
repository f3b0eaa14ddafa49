//! Does the paravisor answer good and bad calls as it must?
//!
//! A bare-metal guest at VMPL1, packed as a firmware, goes through a table of SVSM calls. After each
//! it asks the machine whether RMP and map still agree.

use anyhow::Result;
use protocols::launch::Fault;

use super::cases;
use crate::scenario::{Context, Findings, GUEST_LIMIT, Scenario};
use crate::vm::{Backing, Settings, Vc};

/// The table has at least so many cases.
pub const LEAST_CASES: usize = 40;

pub fn scenarios() -> Vec<Scenario> {
    [
        (Backing::Small, Vc::Direct),
        (Backing::Large, Vc::Direct),
        (Backing::Small, Vc::Strict),
    ]
    .into_iter()
    .map(|(backing, vc)| {
        Scenario::new(
            format!("svsm_calls/{}-{}", backing.name(), vc.name()),
            move |context| {
                go_through(
                    context,
                    Settings {
                        backing,
                        vc,
                        ..Settings::default()
                    },
                )
            },
        )
    })
    .collect()
}

/// The whole table under `settings`; a good run.
pub fn go_through(context: &Context, settings: Settings) -> Result<Findings> {
    let paravisor = &context.artefacts.paravisor;
    let (config, sidecar) = context.svsm_cases(paravisor, Fault::NONE, settings)?;
    let finished = config.run(GUEST_LIMIT, |_| {})?;
    let mut findings = Findings::default();
    cases::judge(&mut findings, &finished, LEAST_CASES)?;
    findings.good_run(&finished, &sidecar)?;
    Ok(findings)
}
