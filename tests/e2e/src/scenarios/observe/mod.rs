//! Does a run show what it is asked to show?
//!
//! `xtask run` is started as a user would start it, and what it says or writes is judged.

mod stub;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

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
        Scenario::new("observe/gdb", gdb),
        Scenario::new("observe/files", files),
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

/// A breakpoint at the paravisor's first instruction hits, in a guest below the machine.
fn gdb(context: &Context) -> Result<Findings> {
    let mut findings = Findings::default();
    let mut run = Run(command(context, &["--gdb", "--exec", "true"]).spawn()?);
    let socket = context.dir.join("gdb.sock");
    let mut stub = stub::Stub::connect(&socket, || run.has_ended())?;
    let entry = entry_point(&context.dir.join("svsm.elf"))?;
    let rip = stub.run_to(entry)?;
    findings.equal("it is stopped where asked", rip, entry);
    let commands = fs::read_to_string(context.dir.join("turnstile.gdb"))?;
    for word in ["machine.elf", "svsm.elf", "gdb.sock"] {
        let so = commands.contains(word);
        findings.check(format!("gdb is told of {word}"), so, || commands.clone());
    }
    stub.kill()?;
    Ok(findings)
}

/// The entry point in the header of an ELF file.
fn entry_point(elf: &Path) -> Result<u64> {
    let bytes = fs::read(elf).with_context(|| format!("{}", elf.display()))?;
    let entry = bytes.get(24..32).and_then(|field| field.try_into().ok());
    Ok(u64::from_le_bytes(entry.context("no ELF file")?))
}

/// The files that a run is asked to write tell what happened in it.
fn files(context: &Context) -> Result<Findings> {
    let file = |name: &str| context.dir.join(name).to_string_lossy().into_owned();
    let (trace, report, plot) = (file("trace.txt"), file("report.json"), file("plot.svg"));
    // It ends at the first page above 16 MiB: long enough for firmware that makes calls.
    xtask(
        context,
        &[
            "--fault", "panic", "--exec", "true", "--trace", &trace, "--report", &report, "--plot",
            &plot,
        ],
    )?;
    let read = |path: &str| fs::read_to_string(path).with_context(|| path.to_owned());
    let mut findings = Findings::default();
    in_trace(&mut findings, &read(&trace)?);
    in_report(&mut findings, &serde_json::from_str(&read(&report)?)?);
    let drawing = read(&plot)?;
    for words in ["Memory accepted", "CORE/PVALIDATE (", "firmware", "</svg>"] {
        let so = drawing.contains(words);
        findings.check(format!("the plot has {words:?}"), so, || {
            drawing.chars().take(2000).collect()
        });
    }
    Ok(findings)
}

/// The trace shows calls with their results, and each switch in both directions.
fn in_trace(findings: &mut Findings, text: &str) {
    for words in [
        // An address in the paravisor's region.
        "VMPL0  0x300",
        "enter from VMPL0, result",
        "enter from VMPL1, call CORE/PVALIDATE",
        "VMGEXIT RUN_VMPL",
        "VMGEXIT MSR PageState",
        "VMGEXIT MSR Terminate",
    ] {
        let so = text.contains(words);
        findings.check(format!("the trace has {words:?}"), so, || {
            text.chars().take(2000).collect()
        });
    }
    let down = text.matches("enter from VMPL0").count();
    let up = text.matches("enter from VMPL1").count();
    // The firmware is entered once before its first call, and its last call is not answered.
    findings.equal("every call but the last returned", up, down);
}

/// The report names what was run and how it went.
fn in_report(findings: &mut Findings, report: &serde_json::Value) {
    let text = |pointer: &str| {
        let value = report.pointer(pointer).and_then(serde_json::Value::as_str);
        value.unwrap_or_default().to_owned()
    };
    let number = |pointer: &str| {
        let value = report.pointer(pointer).and_then(serde_json::Value::as_u64);
        value.unwrap_or_default()
    };
    findings.equal(
        "it tells the outcome",
        text("/report/outcome"),
        "terminated".into(),
    );
    for input in ["rom", "image", "paravisor", "kernel", "initrd"] {
        let hash = text(&format!("/inputs/{input}/sha256"));
        findings.check(
            format!("it identifies the {input}"),
            hash.len() == 64,
            || hash,
        );
    }
    let calls = number("/figures/calls");
    findings.check("it counts calls", calls > 0, || report.to_string());
    // The last call has met the panic.
    let unanswered = number("/report/calls/0/unanswered");
    findings.equal("one of them was not answered", unanswered, 1);
    let accepted = number("/figures/accepted_bytes");
    findings.check("it tells what was accepted", accepted > 0, || {
        report.to_string()
    });
}

/// A child that never outlives its scenario.
struct Run(Child);

impl Run {
    fn has_ended(&mut self) -> bool {
        !matches!(self.0.try_wait(), Ok(None))
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // xtask ends by itself when its machine has: it is waited for, so that its QEMU is never
        // left alone.
        let _ = self.0.wait();
    }
}

/// What `xtask run` said.
struct Said {
    success: bool,
    text: String,
}

/// Starts `xtask run` and waits for it.
fn xtask(context: &Context, arguments: &[&str]) -> Result<Said> {
    let output = command(context, arguments)
        .stderr(Stdio::piped())
        .output()
        .with_context(|| format!("{}: cannot be started", context.artefacts.xtask.display()))?;
    Ok(Said {
        success: output.status.success(),
        text: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// `xtask run` with 2 MiB backing, its logs in the scenario's directory.
fn command(context: &Context, arguments: &[&str]) -> Command {
    let mut command = Command::new(&context.artefacts.xtask);
    command
        .args(["run", "--backing", "2m", "--timeout", "600", "--out"])
        .arg(&context.dir)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}
