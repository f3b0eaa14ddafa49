//! Does a run show what it is asked to show?
//!
//! `xtask run` is started as a user would start it, and what it says or writes is judged.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

use crate::scenario::{Context, Findings, Scenario};

pub fn scenarios() -> Vec<Scenario> {
    vec![
        broken(
            "observe/paravisor-panic",
            "panic",
            &[
                "a deliberate panic at 0x1000000",
                "stack of the paravisor",
                // From the fault outwards: the wrapper, the engine, the call, the loop.
                "validate",
                "svsm/src/faulty.rs:",
                "accept/src/accepting.rs:",
                "pvalidate",
                "svsm/src/protocol/pvalidate.rs:",
                "serve",
                "svsm/src/requests.rs:",
                "boot_processor",
                "_start",
            ],
        ),
        broken(
            "observe/machine-panic",
            "machine-panic",
            &[
                "as told by the settings",
                "stack of the machine",
                "break_if_told",
                "tests/machine/src/metal/finish.rs:",
                "machine::metal::start",
                "tests/machine/src/metal/mod.rs:",
            ],
        ),
        broken(
            "observe/machine-exception",
            "machine-exception",
            &[
                "machine exception 6 at 0xffffffff8",
                "stack of the machine",
                // Innermost is the instruction itself, not the handler of its exception.
                "innermost call first:\n  0xffffffff8",
                "  undefined_instruction ",
                "break_if_told",
                "machine::metal::start",
            ],
        ),
    ]
}

/// A run with a deliberate fault ends, and all of `words` are said, in this order.
fn broken(name: &'static str, fault: &'static str, words: &'static [&'static str]) -> Scenario {
    Scenario::new(name, move |context| {
        let said = xtask(context, &["--fault", fault, "--exec", "true"])?;
        let mut findings = Findings::default();
        findings.check("does not succeed", !said.success, || said.text.clone());
        let mut rest = said.text.as_str();
        for word in words {
            let at = rest.find(word);
            findings.check(format!("says {word:?}"), at.is_some(), || said.text.clone());
            rest = at.map_or(rest, |at| rest.get(at + word.len()..).unwrap_or_default());
        }
        Ok(findings)
    })
}

/// What `xtask run` said.
struct Said {
    success: bool,
    text: String,
}

/// `xtask run` with 2 MiB backing, its logs in the scenario's directory.
fn xtask(context: &Context, arguments: &[&str]) -> Result<Said> {
    let program = &context.artefacts.xtask;
    let output = Command::new(program)
        .args(["run", "--backing", "2m", "--timeout", "600", "--out"])
        .arg(&context.dir)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{}: cannot be started", program.display()))?;
    Ok(Said {
        success: output.status.success(),
        text: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}
