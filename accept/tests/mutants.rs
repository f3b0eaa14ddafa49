//! The tests of the engine, tested: each patch in `tests/mutants` puts one bug into a copy of the
//! engine, and the test that the patch names must then fail.
//!
//! A patch says so in its first lines: `# killed-by: FILE TEST`, a file of `tests` and one test in
//! it. Only that test is run: others may find the bug too, but this one has to. Only a test that was
//! built, ran and failed counts; a mutant that does not compile is a failure here.

// The model checker builds the engine its own way; the mutants are its guests, not it theirs.
#![cfg(not(loom))]

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// What each bug is, in a patch of its own.
const MUTANTS: [&str; 7] = [
    "retest-removed",
    "released-before-record",
    "claim-without-lock",
    "rescind-records-late",
    "two-locks",
    "lost-mismatch",
    "withdrawn-too-early",
];

/// The file of tests that need the model checker.
const MODEL_CHECKED: &str = "interleavings";

#[test]
#[ignore = "builds the engine seven times; cargo xtask test does it"]
fn every_seeded_bug_is_found() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the crate lies in the workspace");
    let patches = workspace.join("accept/tests/mutants");
    let scratch = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("mutants");
    let listed = fs::read_dir(&patches).expect("the patches").count();
    assert_eq!(listed, MUTANTS.len(), "a patch is not in the list");

    let mut survivors = Vec::new();
    for name in MUTANTS {
        let patch = patches.join(format!("{name}.patch"));
        let killer = killer(&patch);
        let copy = scratch.join("copy");
        copy_tree(workspace, &copy).expect("a copy of the workspace");
        let applied = Command::new("git")
            .args(["apply", "--whitespace=nowarn"])
            .arg(&patch)
            // No repository around the copy is to be asked what it thinks of it.
            .env("GIT_CEILING_DIRECTORIES", &scratch)
            .current_dir(&copy)
            .output()
            .expect("git is installed");
        assert!(applied.status.success(), "{name}: {}", said(&applied));

        let ran = cargo(&copy, &scratch, &killer);
        if ran.status.success() {
            survivors.push(name);
        } else {
            let said = said(&ran);
            assert!(said.contains("test result: FAILED"), "{name}: {said}");
        }
    }
    assert!(survivors.is_empty(), "nothing has found: {survivors:?}");
}

/// The test that a patch names.
struct Killer {
    file: String,
    test: String,
}

fn killer(patch: &Path) -> Killer {
    let text = fs::read_to_string(patch).expect("the patch");
    let (file, test) = text
        .lines()
        .find_map(|line| line.strip_prefix("# killed-by: ")?.split_once(' '))
        .expect("a line \"# killed-by: FILE TEST\"");
    Killer {
        file: file.to_owned(),
        test: test.to_owned(),
    }
}

/// Builds the copy and runs one test of it. Never in the workspace's own build directories: cargo
/// names what it builds by the path within the workspace, so a mutant would pass for the engine.
fn cargo(copy: &Path, scratch: &Path, Killer { file, test }: &Killer) -> Output {
    let mut command = Command::new(env!("CARGO"));
    command
        .args(["test", "--offline", "--package", "accept", "--test", file])
        .current_dir(copy)
        // Random histories must not leave their findings in the tree, and a model checker that
        // has found something need not say how it got there.
        .env("PROPTEST_FAILURE_PERSISTENCE", "off")
        .env("RUST_BACKTRACE", "0")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    if file == MODEL_CHECKED {
        command
            .env("RUSTFLAGS", "--cfg loom")
            .env("CARGO_TARGET_DIR", scratch.join("target-loom"))
            .arg("--release");
    } else {
        command
            .env_remove("RUSTFLAGS")
            .env("CARGO_TARGET_DIR", scratch.join("target"));
    }
    command.args(["--", "--exact", test]);
    command.output().expect("cargo runs")
}

fn said(output: &Output) -> String {
    [&output.stdout, &output.stderr]
        .map(|text| String::from_utf8_lossy(text).into_owned())
        .concat()
}

/// Copies the sources, not what was built from them.
fn copy_tree(from: &Path, to: &Path) -> io::Result<()> {
    match fs::remove_dir_all(to) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    copy_directory(from, to)
}

fn copy_directory(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let name = entry.file_name();
        let kind = entry.file_type()?;
        if kind.is_dir() {
            if name != "target" && name != ".git" {
                copy_directory(&entry.path(), &to.join(name))?;
            }
        } else if kind.is_file() {
            fs::copy(entry.path(), to.join(name))?;
        }
    }
    Ok(())
}
