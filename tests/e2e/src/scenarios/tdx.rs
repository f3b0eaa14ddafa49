//! Does the machine behave as TDX says when it is a trust domain, without any paravisor?
//!
//! A tiny L1 goes through a table of cases: the launch, TDCALL, the secure EPT, #VE, the host's answers,
//! and L2 VMs that it runs. No line of the paravisor takes part, so a failure here is the machine's.

use anyhow::Result;
use protocols::report::Report;

use super::cases;
use crate::image;
use crate::scenario::{Context, Findings, GUEST_LIMIT, Scenario};
use crate::vm::{Backing, Config, Cores, Settings};

/// The table has at least so many cases.
const LEAST_CASES: usize = 220;

/// A host that goes on with L1 for nothing.
const EARLY_RETURN: &str = "early-return";

pub fn scenarios() -> Vec<Scenario> {
    let honest = Backing::BOTH.into_iter().map(|backing| {
        Scenario::new(format!("tdx/{}", backing.name()), move |context| {
            let settings = Settings {
                backing,
                ..Settings::default()
            };
            let (findings, _) = go_through(context, settings)?;
            Ok(findings)
        })
    });
    let early = Scenario::new(format!("tdx/{EARLY_RETURN}"), |context| {
        let settings = Settings {
            hostile: Some(EARLY_RETURN.to_owned()),
            ..Settings::default()
        };
        let (mut findings, report) = go_through(context, settings)?;
        let l2 = report.counters.get(1).cloned().unwrap_or_default();
        let early = l2.td_exits.get(EARLY_RETURN).copied().unwrap_or(0);
        findings.check("L1 was resumed for nothing", early > 0, || "never".into());
        Ok(findings)
    });
    honest.chain([early]).collect()
}

/// Lets the L1 go through its cases.
fn go_through(context: &Context, settings: Settings) -> Result<(Findings, Report)> {
    let file = context.dir.join("td.igvm");
    let mrtd = image::write_td(&context.artefacts.tdx_cases, &file)?;
    let settings = Settings {
        oracle: true,
        ..settings
    };
    let config = Config {
        // The processors of a trust domain start at once.
        vcpus: 2,
        cores: Cores::All,
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
    let l2 = report.counters.get(1).cloned().unwrap_or_default();
    findings.check(
        "entries and exits of L2 VMs are counted",
        l2.world_switches > 0 && l2.tdcalls.contains_key("MEM_PAGE_ACCEPT"),
        || format!("{l2:?}"),
    );
    crate::report_laws::check(&mut findings, &finished, report);
    Ok((findings, report.clone()))
}
