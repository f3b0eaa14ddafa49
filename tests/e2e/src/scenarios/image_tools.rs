//! Does `igvm-build` say of an image what other people's tools say?
//!
//! The tools are fetched when the scenario runs, so it needs Python, pip and a package index: only under
//! `--full`. What they said of smaller inputs is recorded in igvm-build's own tests.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use igvm_build::cpu::signature_of;
use igvm_build::measure::plain::launch_digest;
use igvm_build::measure::quietly;
use igvm_build::measure::snp::Processors;
use igvm_build::sidecar::hex;

use crate::scenario::{Context, Findings, Scenario};

/// The tool, as pip calls it.
const PACKAGE: &str = "sev-snp-measure==0.0.13";

/// Virtual processors and their model, as QEMU calls it.
const LAUNCHES: [(u16, &str); 4] = [
    (1, "EPYC-v4"),
    (4, "EPYC-v4"),
    (1, "EPYC-Milan"),
    (8, "EPYC-Genoa"),
];

pub fn scenarios() -> Vec<Scenario> {
    vec![Scenario::new("image/sev-snp-measure", sev_snp_measure).only_in_full()]
}

/// Debian's OVMF as QEMU launches it by itself.
fn sev_snp_measure(context: &Context) -> Result<Findings> {
    let environment = context.dir.join("venv");
    let text = |path: &Path| path.display().to_string();
    output("python3", &["-m", "venv", &text(&environment)])?;
    let pip = text(&environment.join("bin/pip"));
    output(&pip, &["install", "--quiet", PACKAGE])?;
    let tool = text(&environment.join("bin/sev-snp-measure"));

    let ovmf = &context.artefacts.ovmf;
    let image = std::fs::read(ovmf).with_context(|| text(ovmf))?;
    let mut findings = Findings::default();
    for (count, model) in LAUNCHES {
        let signature = signature_of(model).map_err(anyhow::Error::msg)?;
        let processors = Processors {
            count,
            signature: Some(signature),
        };
        let ours = launch_digest(&image, processors, &mut quietly)?;
        let vcpus = count.to_string();
        let arguments = [
            "--mode",
            "snp",
            "--vcpus",
            &vcpus,
            "--vcpu-type",
            model,
            "--ovmf",
            &text(ovmf),
        ];
        let theirs = output(&tool, &arguments)?;
        let name = format!("the digest of {count} × {model}");
        findings.equal(&name, hex(&ours).as_str(), theirs.trim());
    }
    Ok(findings)
}

/// What a program prints.
fn output(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| {
            format!("{program}: cannot be started; this scenario needs python3 and pip")
        })?;
    if !output.status.success() {
        bail!(
            "{program} {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8(output.stdout)?)
}
