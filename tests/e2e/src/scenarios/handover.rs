//! Does the firmware take what the image hands it?
//!
//! Nothing comes from the host: no disk, no kernel by fw_cfg. What is started is in the image, and measured
//! with it.

use std::fs;
use std::path::PathBuf;

use anyhow::Result;
use protocols::hob::IgvmDataKind;
use protocols::launch::{AcceptPolicy, Acceptance, Fault};
use protocols::report::Outcome;

use crate::attestation::{self, fresh_nonce, guest_files};
use crate::guests::Kernel;
use crate::image::{Item, Recipe};
use crate::prediction::{Prediction, Signers, demand_both};
use crate::scenario::{BOOT_LIMIT, Context, Findings, Scenario};
use crate::vm::{Backing, Linux, Settings};

pub fn scenarios() -> Vec<Scenario> {
    let scenario = |name: &str, kernel| {
        Scenario::new(name, move |context| uki(context, kernel))
            .booting(kernel)
            .with_uki()
            .with_modules()
    };
    vec![
        scenario("image/uki", Kernel::Cloud6_12),
        scenario("image/uki-7.2", Kernel::Cloud7_2).only_in_full(),
    ]
}

/// A unified kernel image is started by unmodified OVMF, and the report's MEASUREMENT says so.
fn uki(context: &Context, kernel: Kernel) -> Result<Findings> {
    let artefacts = &context.artefacts;
    let nonce = fresh_nonce();
    let command = format!("dmesg; echo handed over; {}", attestation::command());
    let files = guest_files(context, kernel, &nonce)?;
    let program = make_uki(context, context.linux_with(kernel, &command, &files)?)?;
    let program = fs::read(program)?;
    let items = [Item::new(IgvmDataKind::KERNEL, &program)?];
    let image = context.dir.join("image.igvm");
    let sidecar = Recipe {
        paravisor: &artefacts.paravisor,
        firmware: Some(&artefacts.ovmf),
        td_firmware: None,
        fault: Fault::NONE,
        acceptance: Acceptance::LAZY,
    }
    .write_with(&items, &image)?;
    let prediction = Prediction::of(&image, Signers::Nobody)?;
    // Large pages, for the time: what the firmware is handed is the same with small ones.
    let settings = Settings {
        backing: Backing::Large,
        ..Settings::default()
    };
    let finished = context
        .machine(image, &sidecar, settings)
        .run(BOOT_LIMIT, |_| {})?;

    let mut findings = Findings::default();
    findings.ended(&finished, Outcome::PowerOff)?;
    findings.good_run(&finished, &sidecar)?;
    findings.equal(
        "the guest's command succeeds",
        finished.exec_status,
        Some(0),
    );
    let output = String::from_utf8_lossy(&finished.output).replace('\r', "");
    let version = match kernel {
        Kernel::Cloud6_12 => "Linux version 6.12.",
        // What came after it has its place, too (`guests`).
        _ => "Linux version 7.",
    };
    for words in [version, "SNP running at VMPL1", "handed over"] {
        findings.check(
            format!("the guest says {words:?}"),
            output.contains(words),
            || format!("not in {} bytes of output", output.len()),
        );
    }
    let demands = prediction.demands(&artefacts.chip, AcceptPolicy::LAZY)?;
    demand_both(&mut findings, &output, &demands, &nonce)?;
    Ok(findings)
}

/// A kernel with its userspace, as one EFI program.
fn make_uki(context: &Context, linux: Linux) -> Result<PathBuf> {
    let command_line = context.dir.join("cmdline");
    fs::write(&command_line, &linux.append)?;
    let sections = [
        (".cmdline", command_line),
        (".initrd", linux.initrd),
        (".linux", linux.kernel),
    ];
    let out = context.dir.join("uki.efi");
    crate::uki::write(context.artefacts.uki()?, &sections, &out)?;
    Ok(out)
}
