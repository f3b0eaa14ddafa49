//! Does the paravisor answer good and bad calls as it must?
//!
//! A bare-metal guest at VMPL1, packed as a firmware, goes through a table of SVSM calls. After each
//! it asks the machine whether RMP and map still agree.

use anyhow::Result;
use protocols::launch::Fault;

use super::cases;
use crate::scenario::{Context, Findings, GUEST_LIMIT, Scenario};
use crate::vm::{Backing, Config, Settings, Vc};

/// The table has at least so many cases.
pub const LEAST_CASES: usize = 50;

pub fn scenarios() -> Vec<Scenario> {
    let with_two = [
        (Backing::Small, Vc::Direct),
        (Backing::Large, Vc::Direct),
        (Backing::Small, Vc::Strict),
    ];
    let scenario = |(backing, vc): (Backing, Vc), name: String, vcpus| {
        Scenario::new(name, move |context| {
            let settings = Settings {
                backing,
                vc,
                ..Settings::default()
            };
            go_through_on(context, settings, vcpus)
        })
        .weighing(vcpus)
    };
    let name = |backing: Backing, vc: Vc| format!("svsm_calls/{}-{}", backing.name(), vc.name());
    let with_two = with_two
        .into_iter()
        .map(|how| scenario(how, name(how.0, how.1), 2));
    let with_four = (Backing::Large, Vc::Strict);
    let with_four = scenario(with_four, name(with_four.0, with_four.1) + "-4cpu", 4);
    with_two.chain([with_four]).collect()
}

/// The whole table under `settings`; a good run.
pub fn go_through(context: &Context, settings: Settings) -> Result<Findings> {
    go_through_on(context, settings, 2)
}

/// The same on so many processors: the cases use as many as there are, up to four.
fn go_through_on(context: &Context, settings: Settings, vcpus: u32) -> Result<Findings> {
    let paravisor = &context.artefacts.paravisor;
    let (config, sidecar) = context.svsm_cases(paravisor, Fault::NONE, settings)?;
    let config = Config { vcpus, ..config };
    let finished = config.run(GUEST_LIMIT, |_| {})?;
    let mut findings = Findings::default();
    cases::judge(&mut findings, &finished, LEAST_CASES)?;
    findings.good_run(&finished, &sidecar)?;
    Ok(findings)
}
