//! Does an unmodified Debian boot, its memory accepted by the paravisor?
//!
//! OVMF and a 6.12 kernel as Debian ships them, at VMPL1, on one processor; other guests and more
//! processors are in `matrix`. The guest reports its kernel log and
//! memory figures, uses a good part of its memory, and reports again.

use anyhow::Result;
use protocols::launch::Fault;
use protocols::report::{Outcome, Report};
use protocols::svsm::ResultCode;

use crate::scenario::{BOOT_LIMIT, Context, Findings, Scenario};
use crate::vm::{Backing, Finished, Settings, Stage, Vc};

/// Separates the guest's two looks at its memory.
const AFTER: &str = "== after use ==";
/// MiB that the guest writes in between: more than is accepted when it starts.
const USED_MIB: u32 = 1536;

pub fn scenarios() -> Vec<Scenario> {
    let boots = [
        ("4k", Backing::Small, Vc::Direct),
        ("2m", Backing::Large, Vc::Direct),
        ("strict", Backing::Large, Vc::Strict),
    ];
    boots
        .into_iter()
        .map(|(name, backing, vc)| {
            Scenario::new(format!("boot/linux-{name}"), move |context| {
                boot(
                    context,
                    Settings {
                        backing,
                        vc,
                        ..Settings::default()
                    },
                )
            })
        })
        .collect()
}

/// What a guest does to use so many MiB and tell of it, for [`unaccepted_shrinks`].
pub(super) fn use_memory(mebibytes: u32) -> String {
    format!(
        "cat /proc/meminfo; mkdir /m && mount -t tmpfs -o size=100% m /m && \
         dd if=/dev/zero of=/m/f bs=1M count={mebibytes} && echo '{AFTER}' && cat /proc/meminfo"
    )
}

fn boot(context: &Context, settings: Settings) -> Result<Findings> {
    let artefacts = &context.artefacts;
    let (image, sidecar) =
        context.image(&artefacts.paravisor, Some(&artefacts.ovmf), Fault::NONE)?;
    let command = format!("dmesg; {}", use_memory(USED_MIB));
    let backing = settings.backing;
    let mut config = context.machine(image, &sidecar, settings);
    if backing == Backing::Small {
        // OVMF accepts all memory below 4 GiB, page by page here: half of it does as well.
        config.memory = "3G".into();
        config.low_memory = Some("1G".into());
    }
    config.linux = Some(context.linux(&command)?);
    let finished = config.run(BOOT_LIMIT, |_| {})?;

    let mut findings = Findings::default();
    findings.ended(&finished, Outcome::PowerOff)?;
    findings.good_run(&finished, &sidecar)?;
    findings.equal(
        "the guest's command succeeds",
        finished.exec_status,
        Some(0),
    );
    let stages: Vec<Stage> = finished.stages.iter().map(|(stage, _)| *stage).collect();
    let order = [
        Stage::Machine,
        Stage::Paravisor,
        Stage::Firmware,
        Stage::Kernel,
        Stage::Userspace,
    ];
    findings.equal("all stages, in order", stages.as_slice(), order.as_slice());
    guest_says(&mut findings, &finished);
    crate::report_laws::check_backing(&mut findings, finished.report()?, backing);
    if backing == Backing::Small {
        no_mismatch_reaches_the_guest(&mut findings, finished.report()?);
    }
    let guest = finished
        .report()?
        .counters
        .get(1)
        .cloned()
        .unwrap_or_default();
    findings.equal(
        "the guest validates nothing itself",
        guest.pvalidate.validate_4k.ok,
        0,
    );
    Ok(findings)
}

/// The host has no large page, and the guest does not hear of it: each of its requests for 2 MiB is
/// done with the call that made it.
pub(super) fn no_mismatch_reaches_the_guest(findings: &mut Findings, report: &Report) {
    let mismatch = ResultCode::FAIL_SIZE_MISMATCH.name().unwrap_or_default();
    let told: u64 = report
        .calls
        .iter()
        .filter_map(|call| call.results.get(mismatch))
        .sum();
    findings.equal("answers of size mismatch", told, 0);
    let large = report.calls.iter().map(|call| call.entries.validate_2m);
    let (done, refused) = large.fold((0, 0), |(done, refused), entries| {
        (done + entries.done, refused + entries.refused)
    });
    findings.equal("requests for 2 MiB that were refused", refused, 0);
    let met = report
        .counters
        .first()
        .map_or(0, |paravisor| paravisor.pvalidate.validate_2m.size_mismatch);
    findings.check(
        "each request for 2 MiB met one mismatch, at VMPL0",
        done > 0 && met >= done,
        || format!("{done} requests, {met} mismatches"),
    );
}

fn guest_says(findings: &mut Findings, finished: &Finished) {
    let output = String::from_utf8_lossy(&finished.output);
    for words in [
        "Linux version 6.12.",
        "Memory Encryption Features active: AMD SEV SEV-ES SEV-SNP",
        "SNP running at VMPL1",
    ] {
        findings.check(
            format!("the guest says {words:?}"),
            output.contains(words),
            || format!("not in {} bytes of output", output.len()),
        );
    }
    // dmesg comes first; the firmware writes to the same port before.
    findings.check(
        "nothing stands before the command's output",
        output.starts_with('['),
        || output.chars().take(80).collect(),
    );
    unaccepted_shrinks(findings, &output);
}

/// Memory was unaccepted, and less of it after some was used.
pub(super) fn unaccepted_shrinks(findings: &mut Findings, output: &str) {
    let (before, after) = output.split_once(AFTER).unwrap_or((output, ""));
    match (unaccepted_kib(before), unaccepted_kib(after)) {
        (Some(before), Some(after)) => {
            findings.check("some memory is unaccepted at first", before > 0, || {
                "none".into()
            });
            findings.check("memory in use grows by acceptance", after < before, || {
                format!("unaccepted {before} KiB before, {after} KiB after")
            });
        }
        found => findings.check("/proc/meminfo has Unaccepted twice", false, || {
            format!("{found:?}")
        }),
    }
}

/// The `Unaccepted:` line of a `/proc/meminfo`, in KiB.
fn unaccepted_kib(text: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Unaccepted:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::unaccepted_kib;

    #[test]
    fn the_figure_is_read_with_its_unit() {
        let text = "MemTotal:  4 kB\r\nUnaccepted:     1638400 kB\r\n";
        assert_eq!(unaccepted_kib(text), Some(1_638_400));
        assert_eq!(unaccepted_kib("MemTotal: 4 kB\n"), None);
        assert_eq!(unaccepted_kib("Unaccepted: 4 MB\n"), None);
    }
}
