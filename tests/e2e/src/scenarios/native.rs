//! Does the same image start where nothing is confidential?
//!
//! By QEMU itself if it loads IGVM images, else by the machine's plain mode ([`Config::native`]). The
//! paravisor takes all memory through the engine's flows, says what it counted, and the firmware and
//! kernel it leaves to are as Debian ships them. Assertions are on counts that follow from the size of
//! memory, and on what the guest says of itself.

use anyhow::Result;
use protocols::launch::{Fault, REGION_SIZE};
use protocols::terminate::{NATIVE_EXIT_VALUE, TurnstileReason};

use crate::scenario::{BOOT_LIMIT, Context, Findings, GUEST_LIMIT, Scenario};
use crate::vm::{Census, Config, Finished, Loader, Settings, Stage};

/// Memory below and above 4 GiB, in MiB.
const LOW_MIB: u64 = 1024;
const HIGH_MIB: u64 = 256;
/// Regions of 2 MiB in a MiB, and pages in a region.
const MIB_PER_REGION: u64 = 2;
const PAGES_PER_REGION: u64 = 512;

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::new("native/boot", boot),
        Scenario::new("native/lying-host", lying_host),
    ]
}

/// The machine without an operating system.
fn machine(context: &Context, settings: Settings) -> Result<Config> {
    let artefacts = &context.artefacts;
    let (image, sidecar) =
        context.image(&artefacts.paravisor, Some(&artefacts.ovmf), Fault::NONE)?;
    Config {
        memory: format!("{}M", LOW_MIB + HIGH_MIB),
        low_memory: Some(format!("{LOW_MIB}M")),
        ..context.machine(image, &sidecar, settings)
    }
    .native()
}

fn boot(context: &Context) -> Result<Findings> {
    let mut config = machine(context, Settings::default())?;
    let command = "dmesg; grep -e flags -e bugs /proc/cpuinfo; cat /proc/meminfo";
    config.linux = Some(context.linux(command)?);
    let finished = config.run(BOOT_LIMIT, |_| {})?;

    let mut findings = Findings::default();
    let way = match config.loader {
        Loader::Machine => "the machine's plain mode",
        Loader::Qemu => "QEMU's own loader",
    };
    findings.equal(
        &format!("the guest's command succeeds, by {way}"),
        finished.exec_status,
        Some(0),
    );
    let stages: Vec<Stage> = finished.stages.iter().map(|(stage, _)| *stage).collect();
    let order = [
        Stage::Paravisor,
        Stage::Firmware,
        Stage::Kernel,
        Stage::Userspace,
    ];
    findings.check("all stages, in order", stages.ends_with(&order), || {
        format!("{stages:?}")
    });
    counts(&mut findings, &finished);
    guest_says(&mut findings, &finished);
    Ok(findings)
}

/// What the paravisor counted, against what follows from the size of memory.
fn counts(findings: &mut Findings, finished: &Finished) {
    let Some(census) = Census::of(&finished.console) else {
        findings.check("the paravisor gives its account", false, || {
            finished.console.clone()
        });
        return;
    };
    findings.check("nothing in it is wrong", census.is_good(), || {
        format!("{census:?}")
    });
    // All memory but the paravisor's was accepted twice: a little of it is the machine's, too.
    let bytes = (census.validated_2m * PAGES_PER_REGION + census.validated_4k) << 12;
    let all = (LOW_MIB + HIGH_MIB) << 20;
    let most = 2 * (all - REGION_SIZE);
    findings.check(
        "nearly all memory was accepted twice",
        bytes <= most && bytes >= most / 10 * 9,
        || format!("{bytes} bytes of {most}"),
    );
    // One region of eight is backed by small pages, so its request is split.
    let regions = (LOW_MIB + HIGH_MIB) / MIB_PER_REGION;
    findings.check(
        "size mismatches were met and split",
        census.mismatches >= regions / 10 && census.validated_4k > regions / 10 * PAGES_PER_REGION,
        || format!("{census:?}"),
    );
    findings.equal(
        "what was accepted twice was rescinded once",
        (census.rescinded_2m * 2, census.rescinded_4k * 2),
        (census.validated_2m, census.validated_4k),
    );
}

fn guest_says(findings: &mut Findings, finished: &Finished) {
    let output = String::from_utf8_lossy(&finished.output);
    findings.check(
        "the guest is Debian's kernel",
        output.contains("Linux version 6.12."),
        || format!("not in {} bytes of output", output.len()),
    );
    for words in ["Memory Encryption Features", "SNP running", " svm "] {
        findings.check(
            format!("the guest sees nothing of {words:?}"),
            !output.contains(words),
            || format!("{words:?} in its output"),
        );
    }
    // The paravisor's region is the guest's: the e820 map has no hole there. The figure is what is
    // left to use; the kernel's own takes its part.
    let total = memory_kib(&output).unwrap_or_default();
    let all = (LOW_MIB + HIGH_MIB) << 10;
    findings.check(
        "the guest has all memory, the paravisor's too",
        total > all / 10 * 8 && total <= all,
        || format!("{total} KiB of {all}"),
    );
    let kept = output
        .lines()
        .filter(|line| line.contains("e820: ") || line.contains("BIOS-e820:"))
        .filter(|line| line.contains("0x0000000030"))
        .collect::<Vec<_>>();
    findings.check(
        "no entry of its memory map begins or ends at the paravisor's region",
        kept.is_empty(),
        || format!("{kept:?}"),
    );
}

/// The `MemTotal:` line of a `/proc/meminfo`, in KiB.
fn memory_kib(text: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// The host's words are checked as on SEV-SNP, and the end without a termination request works. Only
/// the machine lies.
fn lying_host(context: &Context) -> Result<Findings> {
    let settings = Settings {
        hostile: Some("map-overlap".into()),
        ..Settings::default()
    };
    let config = Config {
        loader: Loader::Machine,
        ..machine(context, settings)?
    };
    let finished = config.run(GUEST_LIMIT, |_| {})?;
    let mut findings = Findings::default();
    let expected = protocols::terminate::Reason::turnstile(TurnstileReason::MAP_OVERLAP);
    let words = format!("terminating: {expected}");
    findings.check(
        "the paravisor says why",
        finished.console.contains(&words),
        || finished.console.clone(),
    );
    findings.equal(
        "and ends the machine by the exit device",
        finished.report()?.code,
        u64::from(NATIVE_EXIT_VALUE),
    );
    Ok(findings)
}

#[cfg(test)]
mod tests {
    use super::memory_kib;

    #[test]
    fn the_figure_is_read_with_its_unit() {
        assert_eq!(memory_kib("MemTotal:  4 kB\r\n"), Some(4));
        assert_eq!(memory_kib("MemFree:  4 kB\n"), None);
    }
}
