//! Is all of memory accepted when the guest wants all of it?
//!
//! At once, because the kernel was told so (`accept_memory=eager`), or little by little under
//! pressure. In the end nothing is unaccepted: the kernel says so, and the machine has seen every
//! page of the guest's validated once.

use anyhow::Result;
use protocols::launch::Fault;
use protocols::report::Outcome;

use crate::guests::Kernel;
use crate::scenario::{BOOT_LIMIT, Context, Findings, Scenario};
use crate::vm::{Backing, Settings};

/// Fills memory by files of 64 MiB until nothing is unaccepted, and compares what it has written:
/// all files are the same.
const PRESSURE: &str = "
unaccepted() { awk '/^Unaccepted/ { print $2 }' /proc/meminfo; }
mkdir /m && mount -t tmpfs -o size=100% m /m && dd if=/dev/urandom of=/m/0 bs=1M count=64 || exit 1
i=0
while [ $(unaccepted) != 0 ] && [ $i -lt 56 ]; do
    i=$((i + 1))
    cp /m/0 /m/$i || exit 2
done
echo \"files $i\"
echo \"contents $(md5sum /m/* | cut -d' ' -f1 | sort -u | wc -l)\"
cat /proc/meminfo
";

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::new("boot/eager", |context| {
            let (mut findings, output) = boot(
                context,
                Kernel::Cloud7_2,
                1,
                "accept_memory=eager",
                "cat /proc/meminfo",
            )?;
            nothing_left(&mut findings, &output);
            Ok(findings)
        })
        .booting(Kernel::Cloud7_2),
        Scenario::new("boot/pressure", |context| {
            let (mut findings, output) = boot(context, Kernel::Cloud6_12, 2, "", PRESSURE)?;
            nothing_left(&mut findings, &output);
            findings.check("some files were needed for it", files(&output) > 0, || {
                output.clone()
            });
            findings.check(
                "all files have the same contents",
                output.contains("contents 1\n"),
                || output.clone(),
            );
            Ok(findings)
        }),
    ]
}

/// A good run of `command`, with its output.
fn boot(
    context: &Context,
    kernel: Kernel,
    vcpus: u32,
    append: &str,
    command: &str,
) -> Result<(Findings, String)> {
    let artefacts = &context.artefacts;
    let (image, sidecar) =
        context.image(&artefacts.paravisor, Some(&artefacts.ovmf), Fault::NONE)?;
    let settings = Settings {
        backing: Backing::Large,
        ..Settings::default()
    };
    let mut config = context.machine(image, &sidecar, settings);
    config.vcpus = vcpus;
    let mut linux = context.linux_of(kernel, command)?;
    linux.append = format!("{} {append}", linux.append);
    config.linux = Some(linux);
    let finished = config.run(BOOT_LIMIT, |_| {})?;

    let mut findings = Findings::default();
    findings.ended(&finished, Outcome::PowerOff)?;
    findings.good_run(&finished, &sidecar)?;
    findings.only_expected_exits(&finished)?;
    findings.equal(
        "the guest's command succeeds",
        finished.exec_status,
        Some(0),
    );
    // What OVMF and the paravisor leave alone is little: holes and what is shared.
    let memory = &finished.report()?.memory;
    let left = memory.guest_pages.saturating_sub(memory.validated_pages);
    findings.check(
        "nine tenths of memory are validated",
        left < memory.guest_pages / 10,
        || format!("{} of {} pages", memory.validated_pages, memory.guest_pages),
    );
    let output = String::from_utf8_lossy(&finished.output).replace('\r', "");
    Ok((findings, output))
}

fn nothing_left(findings: &mut Findings, output: &str) {
    let line = output.lines().find(|line| line.starts_with("Unaccepted:"));
    let words: Option<Vec<&str>> = line.map(|line| line.split_whitespace().collect());
    findings.equal(
        "nothing is unaccepted",
        words,
        Some(vec!["Unaccepted:", "0", "kB"]),
    );
}

fn files(output: &str) -> u32 {
    let number = output.lines().find_map(|line| line.strip_prefix("files "));
    number.and_then(|number| number.parse().ok()).unwrap_or(0)
}
