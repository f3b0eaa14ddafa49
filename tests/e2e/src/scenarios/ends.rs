//! Does the exit status of `xtask run` tell how a run ended?
//!
//! `xtask run` is started as a user would start it; the guest ends in every way there is. The
//! statuses are those of the table in `xtask/src/run/ending.rs` and `docs/running.md`.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

use crate::scenario::{Context, Findings, Scenario};
use crate::vm::Logs;

/// One way to end.
struct End {
    name: &'static str,
    arguments: &'static [&'static str],
    status: i32,
    /// What is said about it on standard error.
    says: &'static str,
}

/// Starts the kernel anew, once.
const KEXEC: &str = "grep -q kexeced /proc/cmdline || kexec-again kexeced || exit 9";

const ENDS: [End; 8] = [
    End {
        name: "poweroff",
        arguments: &["--exec", "true"],
        status: 0,
        says: "the guest switched the machine off",
    },
    End {
        name: "command",
        arguments: &["--exec", "exit 42"],
        status: 42,
        says: "the guest switched the machine off",
    },
    End {
        name: "unfinished",
        arguments: &["--exec", "poweroff -f"],
        status: 93,
        says: "switched off before the command of --exec had ended",
    },
    End {
        name: "reboot",
        arguments: &["--exec", "reboot -f"],
        status: 80,
        says: "the guest asked for a reset",
    },
    End {
        name: "panic",
        arguments: &["--exec", "echo c > /proc/sysrq-trigger"],
        status: 81,
        says: "panicked: Kernel panic - not syncing: sysrq triggered crash",
    },
    End {
        name: "paravisor",
        arguments: &["--exec", "true", "--fault", "panic"],
        status: 83,
        says: "VMPL0 ended the guest: turnstile",
    },
    End {
        name: "refused",
        arguments: &["--exec", "true", "--fault", "skip-grant"],
        status: 86,
        says: "Refused",
    },
    End {
        name: "mistake",
        arguments: &["--exec", "true", "--fault", "skip-scrub"],
        status: 90,
        says: "the machine saw",
    },
];

pub fn scenarios() -> Vec<Scenario> {
    let mut scenarios: Vec<Scenario> = ENDS
        .into_iter()
        .map(|end| {
            Scenario::new(format!("ends/{}", end.name), move |context| {
                let arguments: Vec<OsString> = end.arguments.iter().map(OsString::from).collect();
                Ok(judge(&xtask(context, &arguments)?, end.status, end.says))
            })
        })
        .collect();
    scenarios.push(Scenario::new("ends/timeout", |context| {
        let arguments = ["--exec", "true", "--timeout", "1"].map(OsString::from);
        let mut findings = judge(&xtask(context, &arguments)?, 91, "its time was up");
        let state = fs::read_to_string(Logs::within(&context.dir).state)?;
        for word in ["RIP=", "IRR"] {
            findings.check(
                format!("the log says where the processor was: {word}"),
                state.contains(word),
                || state.clone(),
            );
        }
        Ok(findings)
    }));
    scenarios.push(Scenario::new("ends/terminated", |context| {
        let firmware = terminating_firmware(context)?;
        let arguments = ["--exec", "true", "--firmware"].map(OsString::from);
        let said = xtask(context, &[&arguments[..], &[firmware.into()]].concat())?;
        Ok(judge(&said, 82, "VMPL1 ended the guest: "))
    }));
    // What 6.12 does with SNP knows no kexec: its successor runs into pages that are still shared.
    scenarios.push(Scenario::new("ends/kexec-6.12", |context| {
        let arguments = ["--kernel", "6.12", "--kexec", "--exec", KEXEC].map(OsString::from);
        let said = xtask(context, &arguments)?;
        Ok(judge(&said, 85, "VMPL1 triple fault"))
    }));
    // 7.2 jumps, and its successor calls through the calling area that the secrets page names, which
    // its predecessor has moved away from. Not strict: there it does not get so far, because it
    // writes DR7 once it has no GHCB any more (docs/known-limits.md).
    scenarios.push(Scenario::new("ends/kexec-7.2", |context| {
        let arguments = [
            "--kernel", "7.2", "--vc", "direct", "--kexec", "--exec", KEXEC,
        ];
        let said = xtask(context, &arguments.map(OsString::from))?;
        Ok(judge(
            &said,
            82,
            "VMPL1 ended the guest: linux 11 (SVSM_CA_REMAP_FAIL)",
        ))
    }));
    scenarios
}

/// What `xtask run` said.
struct Said {
    status: Option<i32>,
    errors: String,
}

fn judge(said: &Said, status: i32, says: &str) -> Findings {
    let mut findings = Findings::default();
    let found = said.status;
    findings.check(
        format!("ends with status {status}"),
        found == Some(status),
        || format!("{found:?}: {}", said.errors),
    );
    findings.check(format!("says {says:?}"), said.errors.contains(says), || {
        said.errors.clone()
    });
    findings
}

/// `xtask run` with 2 MiB backing and its logs in the scenario's directory; everything reflected
/// and ten minutes unless `arguments` say otherwise.
fn xtask(context: &Context, arguments: &[OsString]) -> Result<Said> {
    let program = &context.artefacts.xtask;
    let mut command = Command::new(program);
    command.args(["run", "--backing", "2m", "--out"]);
    command.arg(&context.dir);
    for (option, default) in [("--vc", "strict"), ("--timeout", "600")] {
        if !arguments.iter().any(|argument| argument == option) {
            command.args([option, default]);
        }
    }
    let output = command
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{}: cannot be started", program.display()))?;
    Ok(Said {
        status: output.status.code(),
        errors: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// Debian's OVMF, but its first act is to ask the host to end the guest.
///
/// The reset vector, 16 bytes below 4 GiB, is a jump to the 16 bytes before it, and that code goes
/// on behind the jump. In real mode:
///
/// ```text
///   -0x20  mov ecx, 0xC0010130     the GHCB MSR
///          mov ax, 0x100           termination request, reason 0 of set 0
///          xor edx, edx
///          jmp -0x0E
///   -0x10  jmp -0x20
///   -0x0E  wrmsr
///          rep vmmcall             VMGEXIT
///          hlt
///          jmp to the hlt
/// ```
fn terminating_firmware(context: &Context) -> Result<PathBuf> {
    const BEFORE: [u8; 14] = [
        0x66, 0xB9, 0x30, 0x01, 0x01, 0xC0, 0xB8, 0x00, 0x01, 0x66, 0x31, 0xD2, 0xEB, 0x04,
    ];
    const AT_RESET: [u8; 11] = [
        0xEB, 0xEE, 0x0F, 0x30, 0xF3, 0x0F, 0x01, 0xD9, 0xF4, 0xEB, 0xFD,
    ];
    let ovmf = &context.artefacts.ovmf;
    let mut bytes = fs::read(ovmf).with_context(|| format!("{}", ovmf.display()))?;
    for (from_end, code) in [(0x20, &BEFORE[..]), (0x10, &AT_RESET[..])] {
        let at = bytes.len().saturating_sub(from_end);
        let place = bytes.get_mut(at..at + code.len());
        place
            .with_context(|| format!("{}: has no reset vector", ovmf.display()))?
            .copy_from_slice(code);
    }
    let file = context.dir.join("terminating.fd");
    fs::write(&file, bytes).with_context(|| format!("{}", file.display()))?;
    Ok(file)
}
