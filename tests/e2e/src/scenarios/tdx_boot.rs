//! Does an unmodified Debian boot in a trust domain?
//!
//! OVMF's build for TDX and Debian's kernels, nothing of ours in them. In `tdx_boot/l1-…` they are the
//! trust domain themselves, without a paravisor: what fails there is the machine's fault. In
//! `tdx_boot/l2-…` the paravisor is L1 and serves them.

use anyhow::Result;
use protocols::launch::{Acceptance, Fault};
use protocols::report::Outcome;

use super::{boot, matrix};
use crate::guests::Kernel;
use crate::image::{self, Recipe};
use crate::scenario::{BOOT_LIMIT, Context, Findings, Scenario};
use crate::vm::{Backing, Config, Finished, Settings};

/// MiB that the guest writes: more than is accepted when it starts.
const USED_MIB: u32 = 1000;

/// What is booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Row {
    kernel: Kernel,
    backing: Backing,
    vcpus: u32,
}

impl Row {
    /// Both kernels on both backings with one processor and with four, and two rows with two processors.
    fn all() -> Vec<Row> {
        let row = |kernel, backing, vcpus| Row {
            kernel,
            backing,
            vcpus,
        };
        let mut rows = vec![
            row(Kernel::Cloud6_12, Backing::Small, 2),
            row(Kernel::Cloud7_2, Backing::Large, 2),
        ];
        for kernel in [Kernel::Cloud6_12, Kernel::Cloud7_2] {
            for backing in Backing::BOTH {
                rows.extend([1, 4].map(|vcpus| row(kernel, backing, vcpus)));
            }
        }
        rows
    }

    fn name(self) -> String {
        let (kernel, backing) = (self.kernel.name(), self.backing.name());
        format!("{kernel}-{backing}-{}cpu", self.vcpus)
    }

    /// The row that judges the machine every day.
    const DAILY_L1: Row = Row {
        kernel: Kernel::Cloud7_2,
        backing: Backing::Large,
        vcpus: 2,
    };
    /// Those that judge the paravisor every day: both kernels and backings, one processor and four.
    const DAILY_L2: [Row; 3] = [
        Row {
            kernel: Kernel::Cloud6_12,
            backing: Backing::Large,
            vcpus: 1,
        },
        Row {
            kernel: Kernel::Cloud7_2,
            backing: Backing::Small,
            vcpus: 1,
        },
        Row {
            kernel: Kernel::Cloud7_2,
            backing: Backing::Large,
            vcpus: 4,
        },
    ];
}

pub fn scenarios() -> Vec<Scenario> {
    let plain = Row::all().into_iter().map(|row| {
        let scenario = Scenario::new(format!("tdx_boot/l1-{}", row.name()), move |context| {
            alone(context, row)
        });
        (scenario, row, row == Row::DAILY_L1)
    });
    let served = Row::all().into_iter().map(|row| {
        let scenario = Scenario::new(format!("tdx_boot/l2-{}", row.name()), move |context| {
            behind_the_paravisor(context, row)
        });
        (scenario, row, Row::DAILY_L2.contains(&row))
    });
    plain
        .chain(served)
        .map(|(scenario, row, every_day)| {
            let scenario = scenario.booting(row.kernel).in_trust_domain();
            if every_day {
                scenario
            } else {
                scenario.only_in_full()
            }
        })
        .collect()
}

/// Firmware and kernel are L1, all that there is.
fn alone(context: &Context, row: Row) -> Result<Findings> {
    let file = context.dir.join("td.igvm");
    let built = image::write_td_firmware(context.artefacts.td_firmware()?, &file)?;
    let settings = Settings {
        td_hob: Some(built.hob),
        ..settings(row)
    };
    let finished = run(context, context.machine_of(file, settings), row)?;
    let mut findings = Findings::default();
    findings.ended(&finished, Outcome::PowerOff)?;
    let launched = finished.launch.as_ref().map(|launch| launch.digest.clone());
    findings.equal("MRTD as built", launched, Some(built.mrtd));
    let report = finished.report()?;
    findings.equal("violations", report.violations.total(), 0);
    crate::report_laws::check(&mut findings, &finished, report);
    crate::report_laws::check_backing(&mut findings, report, row.backing);
    guest_says(&mut findings, &finished, row);
    Ok(findings)
}

/// Firmware and kernel are the guest of the paravisor, in an L2 VM.
fn behind_the_paravisor(context: &Context, row: Row) -> Result<Findings> {
    let artefacts = &context.artefacts;
    let (image, sidecar) = context.image_of(Recipe {
        paravisor: &artefacts.paravisor,
        firmware: Some(&artefacts.ovmf),
        td_firmware: Some(artefacts.td_firmware()?),
        fault: Fault::NONE,
        acceptance: Acceptance::LAZY,
    })?;
    let config = context.machine(image, &sidecar, settings(row));
    let finished = run(context, config, row)?;
    let mut findings = Findings::default();
    findings.ended(&finished, Outcome::PowerOff)?;
    let launched = finished.launch.as_ref().map(|launch| launch.digest.clone());
    findings.equal("MRTD as built", launched, sidecar.mrtd);
    let report = finished.report()?;
    findings.equal("violations", report.violations.total(), 0);
    findings.referee_agrees(report);
    crate::report_laws::check(&mut findings, &finished, report);
    crate::report_laws::check_backing(&mut findings, report, row.backing);
    let l1 = report.counters.first().cloned().unwrap_or_default();
    findings.check(
        "L1 accepts, and nothing twice",
        l1.accept.size_2m.ok + l1.accept.size_4k.ok > 0
            && l1.accept.size_2m.already_accepted + l1.accept.size_4k.already_accepted == 0,
        || format!("{:?}", l1.accept),
    );
    guest_says(&mut findings, &finished, row);
    Ok(findings)
}

fn settings(row: Row) -> Settings {
    Settings {
        backing: row.backing,
        tdx: true,
        ..Settings::default()
    }
}

/// The machine that `config` is, with the row's guest in it.
fn run(context: &Context, config: Config, row: Row) -> Result<Finished> {
    let command = format!(
        "uname -r; echo \"cpus $(nproc)\"; \
         dmesg | grep -iE 'tdx|unaccepted|BUG: |WARNING: |Call Trace:|rcu: INFO: '; \
         {}",
        boot::use_memory(USED_MIB)
    );
    let mut linux = context.linux_of(row.kernel, &command)?;
    // Each letter on the console is three exits of a trust domain. What is worse than a warning is told
    // all the same.
    linux.append.push_str(" quiet");
    let config = Config {
        vcpus: row.vcpus,
        // OVMF accepts the memory below 4 GiB itself.
        memory: "2G".into(),
        low_memory: Some("1G".into()),
        linux: Some(linux),
        ..config
    };
    // Every processor of the guest has the same core of the computer.
    config.run(BOOT_LIMIT * row.vcpus, |_| {})
}

fn guest_says(findings: &mut Findings, finished: &Finished, row: Row) {
    findings.equal(
        "the guest's command succeeds",
        finished.exec_status,
        Some(0),
    );
    let output = String::from_utf8_lossy(&finished.output).replace('\r', "");
    for words in [
        &format!("cpus {}\n", row.vcpus),
        "tdx: Guest detected",
        "Memory Encryption Features active: Intel TDX",
    ] {
        findings.check(
            format!("the guest says {words:?}"),
            output.contains(words),
            || format!("not in {} bytes of output", output.len()),
        );
    }
    matrix::kernel_is(findings, &output, row.kernel);
    matrix::no_complaint(findings, &output);
    boot::unaccepted_shrinks(findings, &output);
}
