//! Is memory accepted before the guest asks, and does nobody notice but by the time it takes?
//!
//! Policies eager and ahead, for the test guest, which has the machine's word for every page, and
//! for an unmodified Debian on four processors. Everything is counted by the machine; nothing is
//! timed.

use anyhow::Result;
use protocols::addr::PAGE_SIZE;
use protocols::launch::{AcceptOrder, AcceptPolicy, Acceptance, Budget, BudgetUnit, Fault};
use protocols::report::{self, Outcome, Report, VcpuCounters};
use protocols::svsm::{CoreCall, Protocol};

use super::cases;
use crate::image::Recipe;
use crate::scenario::{BOOT_LIMIT, Context, Findings, GUEST_LIMIT, Scenario};
use crate::vm::{Backing, Config, Settings, Stage, Vc};

/// The test guest's table has at least so many cases under these policies.
const LEAST_CASES: usize = 35;
/// Pages of a step.
pub const PAGES_PER_STEP: u64 = 512;

/// All memory before the guest starts.
pub const EAGER: Acceptance = Acceptance {
    policy: AcceptPolicy::EAGER,
    ..Acceptance::LAZY
};
/// Memory by processors that the guest has not started.
pub const AHEAD: Acceptance = Acceptance {
    policy: AcceptPolicy::AHEAD,
    ..Acceptance::LAZY
};

/// Up to a number of bytes, memory above 4 GiB first. The guest's cases know the values (`budget.rs`).
const SOME_HIGH_FIRST: Acceptance = Acceptance {
    order: AcceptOrder::HIGH_FIRST,
    budget: Budget {
        unit: BudgetUnit::BYTES,
        amount: 512 << 20,
    },
    read_ahead: 2,
    ..AHEAD
};
/// Up to a share of memory. As above.
const A_SHARE: Acceptance = Acceptance {
    budget: Budget {
        unit: BudgetUnit::PER_CENT,
        amount: 6,
    },
    read_ahead: 2,
    ..AHEAD
};

pub fn scenarios() -> Vec<Scenario> {
    let (large, small) = (Backing::Large, Backing::Small);
    let boots = [
        ("policy/linux-eager", EAGER, large, Vc::Direct, "2G"),
        ("policy/linux-ahead", AHEAD, large, Vc::Direct, "2G"),
        ("policy/linux-ahead-4k", AHEAD, small, Vc::Direct, "1G"),
        ("policy/linux-eager-strict", EAGER, large, Vc::Strict, "2G"),
        ("policy/linux-ahead-strict", AHEAD, large, Vc::Strict, "2G"),
    ];
    let boots = boots.map(|(name, acceptance, backing, vc, memory)| {
        let scenario = Scenario::new(name, move |context| {
            boot(context, acceptance, backing, vc, memory)
        });
        // Every day one boot: the test guest goes through both policies and both backings.
        if name == "policy/linux-ahead" {
            scenario
        } else {
            scenario.only_in_full()
        }
    });
    let guests = [
        ("policy/calls-eager", EAGER, Vc::Direct),
        ("policy/calls-ahead", AHEAD, Vc::Direct),
        ("policy/calls-eager-strict", EAGER, Vc::Strict),
        ("policy/calls-ahead-strict", AHEAD, Vc::Strict),
    ];
    let guests = guests.map(|(name, acceptance, vc)| {
        let settings = Settings {
            vc,
            ..Settings::default()
        };
        let scenario = Scenario::new(name, move |context| {
            calls(context, acceptance, settings.clone())
        })
        .weighing(2);
        match vc {
            Vc::Direct => scenario,
            _ => scenario.only_in_full(),
        }
    });
    let budgets = [
        Scenario::new("policy/budget", |context| {
            within_budget(context, SOME_HIGH_FIRST, 2, ("2304M", "2G"), 2)
        })
        .weighing(2),
        Scenario::new("policy/read-ahead", |context| {
            within_budget(context, A_SHARE, 1, ("4G", "2G"), 4)
        }),
    ];
    guests.into_iter().chain(budgets).chain(boots).collect()
}

/// The test guest with an image that has a budget and a read-ahead. On one processor nobody walks.
fn within_budget(
    context: &Context,
    acceptance: Acceptance,
    vcpus: u32,
    (memory, below_4_gib): (&str, &str),
    least_cases: usize,
) -> Result<Findings> {
    let settings = Settings {
        backing: Backing::Large,
        ..Settings::default()
    };
    let paravisor = &context.artefacts.paravisor;
    let (config, sidecar) =
        context.svsm_cases_with(paravisor, Fault::NONE, settings, acceptance)?;
    let config = Config {
        vcpus,
        memory: memory.into(),
        low_memory: Some(below_4_gib.into()),
        ..config
    };
    let finished = config.run(GUEST_LIMIT, |_| {})?;
    let mut findings = Findings::default();
    cases::judge(&mut findings, &finished, least_cases)?;
    findings.good_run(&finished, &sidecar)?;
    Ok(findings)
}

/// The test guest on two processors.
///
/// Eager: all memory is ready when it starts. Ahead: there is more of it, in smaller pages, than is
/// ready when it wants its second processor. That there is work left then, and that a start was
/// awaited, is for the guest to see (`policy_processor_starts`).
pub fn calls(context: &Context, acceptance: Acceptance, settings: Settings) -> Result<Findings> {
    let (backing, memory) = match acceptance.policy {
        AcceptPolicy::AHEAD => (Backing::Small, "4G"),
        _ => (Backing::Large, "2G"),
    };
    let settings = Settings {
        backing,
        ..settings
    };
    let paravisor = &context.artefacts.paravisor;
    let (config, sidecar) =
        context.svsm_cases_with(paravisor, Fault::NONE, settings, acceptance)?;
    let config = Config {
        memory: memory.into(),
        ..config
    };
    let finished = config.run(GUEST_LIMIT, |_| {})?;
    let mut findings = Findings::default();
    cases::judge(&mut findings, &finished, LEAST_CASES)?;
    findings.good_run(&finished, &sidecar)?;
    let report = finished.report()?;
    starts_wait_a_step(&mut findings, report);
    match acceptance.policy {
        // The guest wants its second processor long before all is done, and keeps it.
        AcceptPolicy::AHEAD => a_start_waited(&mut findings, report),
        _ => others_at_work(&mut findings, report),
    }
    Ok(findings)
}

/// Debian on four processors, to userspace.
fn boot(
    context: &Context,
    acceptance: Acceptance,
    backing: Backing,
    vc: Vc,
    memory: &str,
) -> Result<Findings> {
    let artefacts = &context.artefacts;
    let (image, sidecar) = context.image_of(Recipe {
        paravisor: &artefacts.paravisor,
        firmware: Some(&artefacts.ovmf),
        td_firmware: None,
        fault: Fault::NONE,
        acceptance,
    })?;
    let settings = Settings {
        backing,
        vc,
        ..Settings::default()
    };
    let config = Config {
        vcpus: 4,
        memory: memory.into(),
        linux: Some(context.linux("nproc")?),
        ..context.machine(image, &sidecar, settings)
    };
    let finished = config.run(BOOT_LIMIT, |_| {})?;

    let mut findings = Findings::default();
    findings.ended(&finished, Outcome::PowerOff)?;
    findings.good_run(&finished, &sidecar)?;
    findings.equal(
        "the guest's command succeeds",
        finished.exec_status,
        Some(0),
    );
    let output = String::from_utf8_lossy(&finished.output);
    findings.check("four processors", output.trim() == "4", || {
        output.to_string()
    });
    findings.check(
        "userspace",
        finished
            .stages
            .iter()
            .any(|(stage, _)| *stage == Stage::Userspace),
        || format!("{:?}", finished.stages),
    );
    let report = finished.report()?;
    starts_wait_a_step(&mut findings, report);
    let ready = match acceptance.policy {
        AcceptPolicy::EAGER => Ready::before_the_guest(report, finished.guest_start()?),
        _ => Ready::beyond_what_was_asked(report),
    };
    ready_before_asked(&mut findings, report, ready);
    others_at_work(&mut findings, report);
    if backing == Backing::Small {
        super::boot::no_mismatch_reaches_the_guest(&mut findings, report);
    }
    Ok(findings)
}

/// What the guest wants run on a processor waits for one step of VMPL0 at most.
pub fn starts_wait_a_step(findings: &mut Findings, report: &Report) {
    let longest = report
        .vcpus
        .iter()
        .map(|vcpu| vcpu.pages_while_awaited)
        .max();
    findings.check(
        "no start of a processor waited for more than one step",
        longest.is_some_and(|pages| pages <= PAGES_PER_STEP),
        || format!("{longest:?} pages were validated meanwhile"),
    );
}

/// The rule above was put to the test.
pub fn a_start_waited(findings: &mut Findings, report: &Report) {
    let awaited: u64 = report.vcpus.iter().map(|vcpu| vcpu.awaited_starts).sum();
    findings.check("a start of a processor was awaited", awaited > 0, || {
        awaited.to_string()
    });
}

/// The boot processor has not accepted memory alone.
fn others_at_work(findings: &mut Findings, report: &Report) {
    let others: u64 = report.vcpus.iter().skip(1).map(validated).sum();
    // Two that share the work have a half each.
    let least = report.memory.guest_pages / 8;
    findings.check(
        "other processors than the first have validated memory",
        others >= least,
        || format!("{others} pages, expected {least} at least"),
    );
}

/// What was validated, by whether the guest had asked.
struct Ready {
    /// Pages, before it did.
    unasked: u64,
    /// Pages that may have been validated because it did.
    at_request: u64,
}

impl Ready {
    /// All that was there when the guest started.
    fn before_the_guest(report: &Report, start: &report::Stage) -> Self {
        let unasked = start.validated_bytes / PAGE_SIZE;
        let all: u64 = report.vcpus.iter().map(validated).sum();
        Self {
            unasked,
            at_request: all.saturating_sub(unasked),
        }
    }

    /// On each processor, what it validated beyond all that the guest asked for there.
    fn beyond_what_was_asked(report: &Report) -> Self {
        let of = |vcpu| (validated(vcpu), asked(vcpu));
        let both = report.vcpus.iter().map(of);
        let (unasked, at_request) = both.fold((0, 0), |(unasked, at_request), (done, asked)| {
            let unasked = unasked + done.saturating_sub(asked);
            (unasked, at_request + done.min(asked))
        });
        Self {
            unasked,
            at_request,
        }
    }
}

/// Most of memory was validated before the guest asked, and the host was told before.
fn ready_before_asked(findings: &mut Findings, report: &Report, ready: Ready) {
    let Ready {
        unasked,
        at_request,
    } = ready;
    let memory = report.memory.guest_pages;
    findings.check(
        "half of memory at least was ready before the guest asked",
        unasked * 2 >= memory,
        || format!("{unasked} of {memory} pages"),
    );
    // Claims of what is ready execute nothing: the guest asked for more than was validated for it.
    let asked: u64 = report.vcpus.iter().map(asked).sum();
    findings.check(
        "three of four pages that the guest asked for needed no PVALIDATE",
        at_request * 4 <= asked && asked > 0,
        || format!("{at_request} PVALIDATEs for {asked} pages"),
    );
    let private = report.counters.first().map(|level| level.psc_private_pages);
    findings.check(
        "the paravisor had the host make memory private",
        private.is_some_and(|pages| pages * 2 >= memory),
        || format!("{private:?} of {memory} pages"),
    );
}

/// Pages that VMPL0 validated on a processor.
fn validated(vcpu: &VcpuCounters) -> u64 {
    let Some(level) = vcpu.levels.first() else {
        return 0;
    };
    level.pvalidate.validate_4k.ok + level.pvalidate.validate_2m.ok * PAGES_PER_STEP
}

/// Pages that the guest asked for on a processor, and got.
fn asked(vcpu: &VcpuCounters) -> u64 {
    let lists = vcpu
        .calls
        .iter()
        .filter(|call| call.protocol == Protocol::CORE.0 && call.call == CoreCall::PVALIDATE.0);
    lists
        .map(|call| call.entries.validate_4k.done + call.entries.validate_2m.done * PAGES_PER_STEP)
        .sum()
}
