//! Does the machine behave as TDX says when it is a trust domain, without any paravisor?
//!
//! A tiny L1 goes through a table of cases: the launch, TDCALL, the secure EPT, #VE, the host's answers.
//! No line of the paravisor takes part, so a failure here is the machine's.

use super::cases;
use crate::image;
use crate::scenario::{Findings, GUEST_LIMIT, Scenario};
use crate::vm::{Backing, Config, Settings};

/// The table has at least so many cases.
const LEAST_CASES: usize = 200;

pub fn scenarios() -> Vec<Scenario> {
    Backing::BOTH
        .into_iter()
        .map(|backing| {
            Scenario::new(format!("tdx/{}", backing.name()), move |context| {
                let file = context.dir.join("td.igvm");
                let mrtd = image::write_td(&context.artefacts.tdx_cases, &file)?;
                let settings = Settings {
                    backing,
                    oracle: true,
                    ..Settings::default()
                };
                let config = Config {
                    // The processors of a trust domain start at once.
                    vcpus: 2,
                    ..context.machine_of(file, settings)
                };
                let finished = config.run(GUEST_LIMIT, |_| {})?;
                let mut findings = Findings::default();
                let launched = finished.launch.as_ref().map(|launch| launch.digest.clone());
                findings.equal("MRTD as built", launched, Some(mrtd));
                cases::judge(&mut findings, &finished, LEAST_CASES)?;
                let report = finished.report()?;
                let l1 = report.counters.first().cloned().unwrap_or_default();
                let (small, large) = (l1.accept.size_4k, l1.accept.size_2m);
                findings.check(
                    "accepts are counted by size and result",
                    small.ok > 0
                        && small.already_accepted > 0
                        && small.invalid > 0
                        && large.ok > 0
                        && large.size_mismatch > 0,
                    || format!("{:?}", l1.accept),
                );
                // Some cases accept a page that the host had put in an accepted one's place.
                let seen = small.already_accepted + large.already_accepted;
                let counted = report.violations.double_validation;
                findings.check(
                    "double accepts are counted, silent ones too",
                    counted > seen,
                    || format!("{counted}, of which {seen} were told"),
                );
                findings.check("#VE is counted", l1.ve_injected > 0, || "none".into());
                crate::report_laws::check(&mut findings, &finished, report);
                Ok(findings)
            })
        })
        .collect()
}
