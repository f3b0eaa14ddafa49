//! Do all the guests boot, on any number of processors and on both backings?
//!
//! `matrix/KERNEL-BACKING-Ncpu` for every kernel of Debian's, 1, 2, 4 and 8 processors and both
//! backings, everything reflected (`vc=strict`); one row with the older firmware. A part of it is
//! enough for every day, all of it runs with `--full`: see [`every_day`].

use anyhow::Result;
use protocols::launch::Fault;
use protocols::report::Outcome;

use crate::guests::{Firmware, Kernel};
use crate::scenario::{BOOT_LIMIT, Context, Findings, Scenario};
use crate::vm::{Backing, Finished, Settings, Vc};

/// What is booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Row {
    kernel: Kernel,
    firmware: Firmware,
    backing: Backing,
    vcpus: u32,
}

/// The numbers of processors; 8 are more than a small machine has.
const VCPUS: [u32; 4] = [1, 2, 4, 8];

impl Row {
    fn all() -> Vec<Row> {
        let firmware = Firmware::default();
        let mut rows = Vec::new();
        for kernel in [Kernel::Cloud6_12, Kernel::Cloud7_2] {
            for backing in Backing::BOTH {
                rows.extend(VCPUS.map(|vcpus| Row {
                    kernel,
                    firmware,
                    backing,
                    vcpus,
                }));
            }
        }
        // The generic kernels differ in drivers, not in what they ask of a paravisor.
        for kernel in [Kernel::Generic6_12, Kernel::Generic7_2] {
            rows.extend(Backing::BOTH.map(|backing| Row {
                kernel,
                firmware,
                backing,
                vcpus: 2,
            }));
        }
        rows.push(Row {
            kernel: Kernel::Cloud6_12,
            firmware: Firmware::Ovmf2025_02,
            backing: Backing::Large,
            vcpus: 2,
        });
        rows
    }

    fn name(self) -> String {
        let (kernel, backing) = (self.kernel.name(), self.backing.name());
        let firmware = if self.firmware == Firmware::default() {
            String::new()
        } else {
            format!("-ovmf{}", self.firmware.name())
        };
        format!("matrix/{kernel}-{backing}-{}cpu{firmware}", self.vcpus)
    }

    /// Whether the row is in the part for every day: each kernel generation on each backing, and
    /// each number of processors up to 4: more take minutes where two real ones share their work.
    fn every_day(self) -> bool {
        matches!(
            (self.kernel, self.backing, self.vcpus),
            (Kernel::Cloud6_12, Backing::Small, 2)
                | (Kernel::Cloud6_12, Backing::Large, 4)
                | (Kernel::Cloud7_2, Backing::Small, 1)
                | (Kernel::Cloud7_2, Backing::Large, 2)
        ) || self.firmware != Firmware::default()
    }
}

pub fn scenarios() -> Vec<Scenario> {
    Row::all()
        .into_iter()
        .map(|row| {
            let scenario = Scenario::new(row.name(), move |context| boot(context, row))
                .booting(row.kernel)
                .started_by(row.firmware);
            if row.every_day() {
                scenario
            } else {
                scenario.only_in_full()
            }
        })
        .collect()
}

fn boot(context: &Context, row: Row) -> Result<Findings> {
    let artefacts = &context.artefacts;
    let firmware = artefacts.firmware(row.firmware)?;
    let (image, sidecar) = context.image(&artefacts.paravisor, Some(firmware), Fault::NONE)?;
    let settings = Settings {
        backing: row.backing,
        vc: Vc::Strict,
        ..Settings::default()
    };
    let mut config = context.machine(image, &sidecar, settings);
    config.vcpus = row.vcpus;
    if row.backing == Backing::Small {
        // OVMF accepts all memory below 4 GiB, page by page here: half of it does as well.
        config.memory = "3G".into();
        config.low_memory = Some("1G".into());
    }
    let command = "uname -r; echo \"cpus $(nproc)\"; \
                   echo \"online $(cat /sys/devices/system/cpu/online)\"; dmesg";
    config.linux = Some(context.linux_of(row.kernel, command)?);
    let finished = config.run(BOOT_LIMIT * row.vcpus, |_| {})?;

    let mut findings = Findings::default();
    findings.ended(&finished, Outcome::PowerOff)?;
    findings.good_run(&finished, &sidecar)?;
    findings.only_expected_exits(&finished)?;
    findings.equal(
        "the guest's command succeeds",
        finished.exec_status,
        Some(0),
    );
    guest_says(&mut findings, &finished, row);
    Ok(findings)
}

fn guest_says(findings: &mut Findings, finished: &Finished, row: Row) {
    let output = String::from_utf8_lossy(&finished.output).replace('\r', "");
    let online = match row.vcpus {
        1 => "online 0\n".to_owned(),
        n => format!("online 0-{}\n", n - 1),
    };
    for words in [
        &format!("cpus {}\n", row.vcpus),
        &online,
        "Memory Encryption Features active: AMD SEV SEV-ES SEV-SNP",
        "SNP running at VMPL1",
    ] {
        findings.check(
            format!("the guest says {words:?}"),
            output.contains(words),
            || format!("not in {} bytes of output", output.len()),
        );
    }
    kernel_is(findings, &output, row.kernel);
    no_complaint(findings, &output);
}

/// The first line of `output` is the release of `kernel`.
pub(super) fn kernel_is(findings: &mut Findings, output: &str, kernel: Kernel) {
    let release = output.lines().next().unwrap_or_default();
    findings.check(
        format!("the guest's kernel is {}", kernel.name()),
        kernel.is_release(release),
        || release.to_owned(),
    );
}

/// The kernel's log in `output` tells of no fault of its own.
pub(super) fn no_complaint(findings: &mut Findings, output: &str) {
    // As the kernel begins such lines: mitigations it lacks are warned of in other words.
    let marks = ["BUG: ", "] WARNING: ", "] Call Trace:", "rcu: INFO: "];
    let trouble = output
        .lines()
        .find(|line| marks.iter().any(|mark| line.contains(mark)));
    findings.equal("the kernel has no complaint", trouble, None);
}

#[cfg(test)]
mod tests {
    use super::{Kernel, Row, VCPUS};
    use crate::vm::Backing;

    /// The part for every day leaves nothing out altogether.
    #[test]
    fn every_day_has_each_of_all() {
        let rows: Vec<Row> = Row::all()
            .into_iter()
            .filter(|row| row.every_day())
            .collect();
        for vcpus in VCPUS.into_iter().filter(|count| *count <= 4) {
            assert!(rows.iter().any(|row| row.vcpus == vcpus), "{vcpus}");
        }
        for kernel in [Kernel::Cloud6_12, Kernel::Cloud7_2] {
            for backing in Backing::BOTH {
                let found = rows
                    .iter()
                    .any(|row| row.kernel == kernel && row.backing == backing);
                assert!(found, "{kernel:?} {backing:?}");
            }
        }
    }
}
