//! What do the tools say to bad input?
//!
//! One line that names the file, what was expected and what to do; a status that is not success; no
//! panic. `xtask` is started as a user would start it.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};
use protocols::ovmf::SEV_METADATA_GUID;

use crate::scenario::{Context, Findings, Scenario};

/// GUID of OVMF's SEV metadata block, as it is stored.
const SEV_METADATA: [u8; 16] = SEV_METADATA_GUID.to_bytes();

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::new("tools/missing-kernel", |context| {
            let file = context.dir.join("no-such-kernel");
            refused(
                context,
                &["--kernel".into(), file.clone().into()],
                &file,
                &["expected a kernel"],
            )
        }),
        Scenario::new("tools/missing-firmware", |context| {
            let file = context.dir.join("no-such-firmware.fd");
            refused(
                context,
                &["--firmware".into(), file.clone().into()],
                &file,
                &["expected"],
            )
        }),
        Scenario::new("tools/missing-disk", |context| {
            let file = context.dir.join("no-such-disk.img");
            refused(
                context,
                &["--disk".into(), file.clone().into()],
                &file,
                &["expected a disk image", "debian"],
            )
        }),
        Scenario::new("tools/not-ovmf", |context| {
            let file = context.dir.join("zeroes.fd");
            fs::write(&file, vec![0; 1 << 20])?;
            let words = ["not an OVMF image", "ovmf-generic"];
            refused(
                context,
                &["--firmware".into(), file.clone().into()],
                &file,
                &words,
            )
        }),
        Scenario::new("tools/no-sev-metadata", |context| {
            let file = context.dir.join("plain.fd");
            fs::write(&file, without_metadata(&context.artefacts.ovmf)?)?;
            let words = ["in the firmware's table", "ovmf-generic"];
            refused(
                context,
                &["--firmware".into(), file.clone().into()],
                &file,
                &words,
            )
        }),
        Scenario::new("tools/old-qemu", |context| {
            let file = fake_qemu(&context.dir, "QEMU emulator version 9.2.0")?;
            refused(
                context,
                &[],
                &file,
                &["expected QEMU 10.0 or newer", "found 9.2.0", "PATH"],
            )
        }),
        Scenario::new("tools/not-qemu", |context| {
            let file = fake_qemu(&context.dir, "something else")?;
            refused(context, &[], &file, &["expected", "PATH"])
        }),
        Scenario::new("tools/bad-memory-size", |context| {
            bad_value(context, &["--mem", "4"], "such as 4G")
        }),
        Scenario::new("tools/bad-policy", |context| {
            let mut findings = Findings::default();
            for (arguments, expected) in [
                (
                    ["--accept", "soon"].as_slice(),
                    "expected lazy, eager or ahead",
                ),
                (&["--accept", "ahead:512"], "such as 512M"),
                (
                    &["--accept", "ahead:3M"],
                    "3145728 bytes: expected a multiple of 2 MiB",
                ),
                (&["--accept", "ahead:101%"], "101 %: expected 1 to 100 %"),
                (&["--accept", "lazy:1G"], "takes no budget"),
                (
                    &["--accept", "ahead", "--read-ahead", "16"],
                    "expected at most 15",
                ),
                (&["--accept-order", "middle"], "expected low"),
            ] {
                findings
                    .checks
                    .extend(bad_value(context, arguments, expected)?.checks);
            }
            Ok(findings)
        }),
    ]
}

/// `xtask run` with `arguments` must fail and say `expected`.
fn bad_value(context: &Context, arguments: &[&str], expected: &str) -> Result<Findings> {
    let arguments: Vec<OsString> = arguments.iter().map(OsString::from).collect();
    let said = xtask(context, &arguments)?;
    let mut findings = Findings::default();
    findings.check(format!("{arguments:?} is refused"), !said.success, || {
        said.text.clone()
    });
    findings.check(
        format!("and what is expected is said: {expected:?}"),
        said.text.contains(expected) && !said.text.contains("panicked"),
        || said.text.clone(),
    );
    Ok(findings)
}

/// What `xtask run` said.
struct Said {
    success: bool,
    text: String,
}

/// `xtask run` with `arguments` must fail with one line that names `file` and holds `words`.
fn refused(
    context: &Context,
    arguments: &[OsString],
    file: &Path,
    words: &[&str],
) -> Result<Findings> {
    let said = xtask(context, arguments)?;
    let mut findings = Findings::default();
    findings.check("is refused", !said.success, || "it succeeded".into());
    let errors: Vec<&str> = said
        .text
        .lines()
        .filter(|line| line.starts_with("xtask: "))
        .collect();
    findings.check("in one line", errors.len() == 1, || said.text.clone());
    let line = errors.first().copied().unwrap_or_default();
    let name = file.display().to_string();
    findings.check("that names the file", line.contains(&name), || {
        line.to_owned()
    });
    for word in words {
        findings.check(format!("and says {word:?}"), line.contains(word), || {
            line.to_owned()
        });
    }
    findings.check("without a panic", !said.text.contains("panicked"), || {
        said.text.clone()
    });
    Ok(findings)
}

/// Starts `xtask run`; a QEMU in the scenario's directory comes first in `PATH`.
fn xtask(context: &Context, arguments: &[OsString]) -> Result<Said> {
    let mut path = context.dir.clone().into_os_string();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    let output = Command::new(&context.artefacts.xtask)
        .args(["run", "--exec", "true"])
        .args(arguments)
        .env("PATH", path)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{}: cannot be started", context.artefacts.xtask.display()))?;
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(Said {
        success: output.status.success(),
        text,
    })
}

/// Debian's OVMF with the identifier of its SEV metadata made unknown.
fn without_metadata(ovmf: &Path) -> Result<Vec<u8>> {
    let mut bytes = fs::read(ovmf).with_context(|| format!("{}", ovmf.display()))?;
    let at = bytes
        .windows(SEV_METADATA.len())
        .position(|window| window == SEV_METADATA)
        .with_context(|| format!("{}: has no SEV metadata to begin with", ovmf.display()))?;
    if let Some(byte) = bytes.get_mut(at) {
        *byte ^= 0xff;
    }
    Ok(bytes)
}

/// A program of QEMU's name that only claims a version.
fn fake_qemu(dir: &Path, claim: &str) -> Result<PathBuf> {
    let file = dir.join("qemu-system-x86_64");
    fs::write(&file, format!("#!/bin/sh\necho '{claim}'\n"))?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
    Ok(file)
}
