//! The checks that cargo does: formatting, lints, unit tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use e2e::scenario::Check;

use crate::build::BARE_PACKAGES;
use crate::command::{self, tail};
use crate::layout::{Layout, write};
use crate::progress::Step;
use crate::toolchain::{BareTarget, cargo};

/// The fuzz target: a crate apart from the workspace.
const FUZZ: &str = "igvm-build/fuzz/Cargo.toml";

/// What cargo is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// Is everything formatted?
    Format,
    /// Do the host builds pass the lints?
    LintHost,
    /// Do the bare-metal builds pass the lints?
    LintBare,
    /// Do the tests of the host crates pass?
    TestHost,
    /// Do the host tests of the bare-metal crates' libraries pass?
    TestBare,
    /// Does the engine hold under every interleaving that the model checker tries?
    Interleavings,
    /// Do the engine's tests find the bugs that are put into copies of it?
    Mutants,
}

impl Job {
    /// In the order in which they are done.
    pub const ALL: [Job; 7] = [
        Job::Format,
        Job::LintHost,
        Job::LintBare,
        Job::TestHost,
        Job::TestBare,
        Job::Interleavings,
        Job::Mutants,
    ];

    /// The name for `--filter` and `--list`.
    pub const fn name(self) -> &'static str {
        match self {
            Job::Format => "lint/format",
            Job::LintHost => "lint/host",
            Job::LintBare => "lint/bare",
            Job::TestHost => "unit/host",
            Job::TestBare => "unit/bare",
            Job::Interleavings => "unit/interleavings",
            Job::Mutants => "unit/mutants",
        }
    }

    fn commands(self, layout: &Layout, target: BareTarget) -> Vec<Command> {
        let host = |arguments: &[&str]| {
            let mut cargo = cargo(&layout.root);
            cargo.args(arguments);
            cargo
        };
        match self {
            Job::Format => {
                let format = |which: &[&str]| {
                    let mut cargo = host(&["fmt"]);
                    cargo.args(which).args(["--check", "--", "--color=never"]);
                    cargo
                };
                vec![format(&["--all"]), format(&["--manifest-path", FUZZ])]
            }
            Job::LintHost => {
                let clippy = |which: &[&str]| {
                    let mut cargo = host(&["clippy"]);
                    cargo.args(which).args(["--", "-D", "warnings"]);
                    cargo
                };
                let mut fuzz = clippy(&[
                    "--manifest-path",
                    FUZZ,
                    "--target-dir",
                    "target",
                    "--locked",
                ]);
                // Nothing is linked, so that there need be no fuzzer, and no C++ compiler to build one.
                fuzz.env("CUSTOM_LIBFUZZER_PATH", layout.root.join("libfuzzer.a"));
                vec![clippy(&["--workspace", "--all-targets"]), fuzz]
            }
            Job::LintBare => {
                let clippy = |arguments: &[&str]| {
                    let mut cargo = target.cargo(&layout.root, "clippy");
                    cargo.args(arguments).args(["--", "-D", "warnings"]);
                    cargo
                };
                // One call for each, so that no crate's features leak into another.
                let mut calls: Vec<Command> = BARE_PACKAGES
                    .iter()
                    .map(|name| clippy(&["--package", name]))
                    .collect();
                calls.push(clippy(&["--package", "svsm", "--features", "faults"]));
                calls
            }
            Job::TestHost => vec![host(&["test", "--no-fail-fast"])],
            Job::TestBare => {
                let mut cargo = host(&[
                    "test",
                    "--lib",
                    "--no-fail-fast",
                    "--features",
                    "svsm/faults",
                ]);
                cargo.args(BARE_PACKAGES.iter().flat_map(|name| ["--package", name]));
                vec![cargo]
            }
            Job::Interleavings => {
                let mut cargo = host(&["test", "--release", "--no-fail-fast"]);
                cargo
                    // The engine on the model of SEV-SNP, and with the paravisor's TDX backend.
                    .args(["--package", "accept", "--package", "svsm"])
                    .args(["--test", "interleavings"])
                    .env("RUSTFLAGS", "--cfg loom")
                    // Other flags, other builds: they must not push each other out.
                    .env("CARGO_TARGET_DIR", layout.root.join("target/loom"));
                vec![cargo]
            }
            Job::Mutants => vec![host(&[
                "test",
                "--package",
                "accept",
                "--test",
                "mutants",
                "--",
                "--ignored",
            ])],
        }
    }

    /// Does the job; one check per unit test, or one for the whole of a lint. The output is kept in
    /// `dir`, whose file is named in every failure.
    pub fn perform(
        self,
        layout: &Layout,
        target: BareTarget,
        dir: &Path,
        step: &Step,
    ) -> Result<Vec<Check>> {
        let log = dir.join("cargo.log");
        let mut output = String::new();
        let mut success = true;
        for mut command in self.commands(layout, target) {
            let (ok, text) = command::watched(&mut command, step)?;
            success &= ok;
            output.push_str(&text);
        }
        write(&log, &output)?;
        let mut checks = match self {
            Job::TestHost | Job::TestBare | Job::Interleavings | Job::Mutants => {
                unit_tests(&output)
            }
            Job::Format | Job::LintHost | Job::LintBare => Vec::new(),
        };
        let accounted = checks.iter().any(|check| check.failure.is_some());
        // A build that failed has no test that failed; a lint has no tests at all.
        if !success && !accounted || checks.is_empty() {
            let failure = (!success).then(|| format!("its last words:\n{}", tail(&output, 12)));
            checks.push(Check {
                name: self.name().to_owned(),
                failure,
            });
        }
        Ok(checks)
    }

    /// Where the output of the job in `dir` lies.
    pub fn log(dir: &Path) -> Option<PathBuf> {
        let log = dir.join("cargo.log");
        fs::exists(&log).is_ok_and(|exists| exists).then_some(log)
    }
}

/// The verdicts of libtest's `test NAME ... ok` lines. Ignored tests are neither.
fn unit_tests(output: &str) -> Vec<Check> {
    output
        .lines()
        .filter_map(|line| {
            let (name, verdict) = line.strip_prefix("test ")?.rsplit_once(" ... ")?;
            let failure = match verdict {
                "ok" => None,
                "FAILED" => Some("the unit test failed".to_owned()),
                _ => return None,
            };
            Some(Check {
                name: name.to_owned(),
                failure,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::unit_tests;

    #[test]
    fn unit_tests_are_counted_by_their_verdicts() {
        let output = "running 4 tests\ntest a::b ... ok\ntest c - should panic ... ok\n\
                      test d ... FAILED\ntest e ... ignored\n\
                      test result: FAILED. 2 passed; 1 failed; 1 ignored\n";
        let checks = unit_tests(output);
        let failed: Vec<&str> = checks
            .iter()
            .filter(|c| c.failure.is_some())
            .map(|c| c.name.as_str())
            .collect();
        assert_eq!(checks.len(), 3);
        assert_eq!(failed, ["d"]);
    }
}
