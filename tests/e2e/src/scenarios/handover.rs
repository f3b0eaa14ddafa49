//! Does the firmware take what the image hands it?
//!
//! Nothing comes from the host: no disk, no kernel by fw_cfg. What is started is in the image, and measured
//! with it.

use std::fs;
use std::path::PathBuf;

use anyhow::Result;
use protocols::hob::IgvmDataKind;
use protocols::launch::{Acceptance, Fault};
use protocols::report::Outcome;

use crate::image::{Item, Recipe};
use crate::scenario::{BOOT_LIMIT, Context, Findings, Scenario};
use crate::vm::{Backing, Settings};

pub fn scenarios() -> Vec<Scenario> {
    vec![Scenario::new("image/uki", uki).with_uki()]
}

/// A unified kernel image is started by unmodified OVMF.
fn uki(context: &Context) -> Result<Findings> {
    let artefacts = &context.artefacts;
    let program = make_uki(context, "dmesg; echo handed over")?;
    let program = fs::read(program)?;
    let items = [Item {
        kind: IgvmDataKind::KERNEL,
        bytes: &program,
    }];
    let image = context.dir.join("image.igvm");
    let sidecar = Recipe {
        paravisor: &artefacts.paravisor,
        firmware: Some(&artefacts.ovmf),
        td_firmware: None,
        fault: Fault::NONE,
        acceptance: Acceptance::LAZY,
    }
    .write_with(&items, &image)?;
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
    let output = String::from_utf8_lossy(&finished.output);
    for words in ["Linux version 6.12.", "SNP running at VMPL1", "handed over"] {
        findings.check(
            format!("the guest says {words:?}"),
            output.contains(words),
            || format!("not in {} bytes of output", output.len()),
        );
    }
    Ok(findings)
}

/// Debian's kernel with a userspace that runs `command`, as one EFI program.
fn make_uki(context: &Context, command: &str) -> Result<PathBuf> {
    let linux = context.linux(command)?;
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
