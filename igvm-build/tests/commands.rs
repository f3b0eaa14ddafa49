//! The command as it is run: what it prints, what it writes, and with which status it ends.

#[path = "support/raw.rs"]
mod raw;
mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use p384::SecretKey;
use p384::pkcs8::{EncodePrivateKey, LineEnding};
use raw::Raw;
use serde_json::Value;
use support::{AREAS, certificate_list, ovmf, paravisor};

/// An empty directory.
fn directory(name: &str) -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join("commands")
        .join(name);
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory).unwrap();
    directory
}

/// Writes the inputs of an image, and its recipe.
fn inputs(directory: &Path) {
    fs::write(directory.join("svsm.elf"), paravisor()).unwrap();
    fs::write(directory.join("ovmf.fd"), ovmf(Some(&AREAS))).unwrap();
    let recipe =
        "paravisor = \"svsm.elf\"\nfirmware = \"ovmf.fd\"\nc-bit = 47\nout = \"out.igvm\"\n";
    fs::write(directory.join("recipe.toml"), recipe).unwrap();
}

/// Runs the command in a directory.
fn run(directory: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_igvm-build"))
        .args(arguments)
        .current_dir(directory)
        .output()
        .unwrap()
}

/// Runs it, wants this status, and gives what it prints.
fn ends(directory: &Path, arguments: &[&str], status: i32) -> String {
    let output = run(directory, arguments);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(status), "{arguments:?}: {error}");
    assert_eq!(error.is_empty(), status < 2, "{arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// The last word of a line that begins so.
fn value<'a>(text: &'a str, label: &str) -> &'a str {
    let line = text.lines().find(|line| line.starts_with(label));
    line.and_then(|line| line.split(' ').next_back()).unwrap()
}

fn write_key(directory: &Path, name: &str, seed: u8) -> SecretKey {
    let key = SecretKey::from_slice(&[seed; 48]).unwrap();
    let pem = key.to_pkcs8_pem(LineEnding::LF).unwrap();
    fs::write(directory.join(name), pem.as_bytes()).unwrap();
    key
}

#[test]
fn two_builds_on_two_paths_give_identical_bytes() {
    let (here, there) = (directory("here"), directory("some/where/else entirely"));
    for place in [&here, &there] {
        inputs(place);
    }
    let arguments = ["build", "--recipe", "recipe.toml"];
    let first = ends(&here, &arguments, 0);
    // Another working directory, and paths instead of a recipe.
    let file = |name: &str| there.join(name).to_str().unwrap().to_owned();
    let (elf, firmware, out) = (file("svsm.elf"), file("ovmf.fd"), file("out.igvm"));
    let arguments = [
        "build",
        "--paravisor",
        &elf,
        "--firmware",
        &firmware,
        "--c-bit",
        "47",
        "--out",
        &out,
    ];
    let second = ends(&here, &arguments, 0);
    assert_eq!(first, second);
    for name in ["out.igvm", "out.igvm.json"] {
        let [one, other] = [&here, &there].map(|place| fs::read(place.join(name)).unwrap());
        assert!(one == other, "{name}");
    }
}

#[test]
fn what_the_recipe_says_can_be_said_otherwise() {
    let place = directory("recipe");
    inputs(&place);
    let recipe = ["build", "--recipe", "recipe.toml"];
    let plain = ends(&place, &recipe, 0);
    let other = ends(&place, &[&recipe[..], &["--accept", "eager"]].concat(), 0);
    assert_ne!(plain, other);
    fs::write(place.join("bad.toml"), "paravizor = \"a\"\n").unwrap();
    ends(&place, &["build", "--recipe", "bad.toml"], 3);
    ends(&place, &["build", "--recipe", "no.toml"], 4);
    // What the command line and the recipe lack, or the command line alone has wrong.
    for wrong in [
        &["--paravisor", "svsm.elf"][..],
        &["--out", "out.igvm"],
        &["--target", "xen"],
        &["--recipe", "recipe.toml", "--c-bit", "52"],
        &["--recipe", "recipe.toml", "--accept-order", "high"],
        &["--recipe", "recipe.toml", "--on-touch", "accept"],
    ] {
        let output = run(&place, &[&["build"], wrong].concat());
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{wrong:?}: {error}");
        assert!(error.starts_with("error: "), "{wrong:?}: {error}");
    }
    fs::write(place.join("bad.toml"), "c-bit = 52\n").unwrap();
    let bad = [
        "build",
        "--recipe",
        "bad.toml",
        "--paravisor",
        "svsm.elf",
        "--out",
        "o",
    ];
    ends(&place, &bad, 3);
    ends(
        &place,
        &["flat", "svsm.elf", "--size", "5", "--out", "rom"],
        2,
    );
}

/// Text in place of a list of keys or of a program would be launched, and the firmware would say nothing.
#[test]
fn keys_and_programs_are_looked_at() {
    let place = directory("keys");
    inputs(&place);
    fs::write(place.join("pk.pem"), "-----BEGIN CERTIFICATE-----\n").unwrap();
    fs::write(place.join("notefi.txt"), "no program").unwrap();
    for (option, file, expected) in [
        ("--pk", "pk.pem", "cert-to-efi-sig-list"),
        ("--dbx", "svsm.elf", "cert-to-efi-sig-list"),
        ("--uki", "notefi.txt", "ukify"),
        ("--uki", "svsm.elf", "ukify"),
    ] {
        let output = run(&place, &["build", "--recipe", "recipe.toml", option, file]);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(3), "{error}");
        for expected in [file, "at offset 0x0", expected] {
            assert!(error.contains(expected), "{expected}: {error}");
        }
        assert!(!place.join("out.igvm").exists());
    }
    // What is good goes on, to a firmware that takes nothing of the kind.
    fs::write(place.join("pk.esl"), certificate_list()).unwrap();
    let output = run(
        &place,
        &["build", "--recipe", "recipe.toml", "--pk", "pk.esl"],
    );
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3), "{error}");
    assert!(
        error.contains("ovmf.fd: the firmware has no area"),
        "{error}"
    );
}

/// Files that are longer than what they should be, or have no end, are not read into memory.
#[test]
fn inputs_have_a_limit_and_the_message_names_it() {
    let place = directory("limits");
    inputs(&place);
    let sparse = |name: &str, begins: &[u8], bytes| {
        fs::write(place.join(name), begins).unwrap();
        let file = fs::File::options().write(true).open(place.join(name));
        file.unwrap().set_len(bytes).unwrap();
    };
    sparse("long.igvm", b"IGVM", 1 << 32);
    sparse("long", b"", (16 << 20) + 1);
    sparse("long.elf", b"\x7fELF", (256 << 20) + 1);
    sparse("long.esl", b"", (128 << 20) + 1);
    sparse("long.toml", b"", (1 << 20) + 1);
    sparse("long.pem", b"", (64 << 10) + 1);
    let build = &["build", "--recipe", "recipe.toml"][..];
    let sign = &["sign", "good.igvm", "--out", "signed.igvm", "--id-key"][..];
    fs::write(place.join("good.igvm"), Raw::snp().bytes()).unwrap();
    for (command, file, limit) in [
        (&["show"][..], "long.igvm", u64::from(u32::MAX)),
        (&["check"], "long.igvm", u64::from(u32::MAX)),
        (&["show"], "long", 16 << 20),
        (&["show"], "/dev/zero", 16 << 20),
        (&["check"], "/dev/zero", 16 << 20),
        (&["measure"], "/dev/zero", 16 << 20),
        (&["diff", "good.igvm"], "/dev/zero", 16 << 20),
        (&[build, &["--firmware"]].concat(), "long", 16 << 20),
        (&[build, &["--td-firmware"]].concat(), "long", 16 << 20),
        (&[build, &["--paravisor"]].concat(), "long.elf", 256 << 20),
        (&[build, &["--db"]].concat(), "long.esl", 128 << 20),
        (&[build, &["--uki"]].concat(), "long.esl", 128 << 20),
        (&["build", "--recipe"], "long.toml", 1 << 20),
        (sign, "long.pem", 64 << 10),
        (sign, "/dev/zero", 64 << 10),
    ] {
        let output = run(&place, &[command, &[file]].concat());
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(3), "{command:?} {file}: {error}");
        let expected = format!("{file}: more than {limit} bytes");
        assert!(error.contains(&expected), "{command:?}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn measure_show_and_the_description_agree() {
    let place = directory("measure");
    inputs(&place);
    let digest = ends(&place, &["build", "--recipe", "recipe.toml"], 0);
    assert_eq!(ends(&place, &["measure", "out.igvm"], 0), digest);
    let digest = value(&digest, "launch digest");
    assert_eq!(
        value(&ends(&place, &["show", "out.igvm"], 0), "launch digest"),
        digest
    );
    let sidecar: Value =
        serde_json::from_slice(&fs::read(place.join("out.igvm.json")).unwrap()).unwrap();
    assert_eq!(sidecar["digest"], digest);
    let shown: Value =
        serde_json::from_str(&ends(&place, &["show", "--json", "out.igvm"], 0)).unwrap();
    assert_eq!(
        shown["platforms"][0]["measurement"]["launch_digest"],
        digest
    );

    // The steps lead to the digest, in the order of the launch.
    let explained: Value = serde_json::from_str(&ends(
        &place,
        &["measure", "--explain", "--json", "out.igvm"],
        0,
    ))
    .unwrap();
    let steps = explained[0]["steps"].as_array().unwrap();
    assert_eq!(steps.last().unwrap()["after"], digest);
    assert_eq!(steps.last().unwrap()["kind"], "VMSA");
    assert_eq!(steps[0]["kind"], "UNMEASURED");
    let text = ends(&place, &["measure", "--explain", "out.igvm"], 0);
    assert_eq!(text.lines().count(), steps.len() + 1);

    // KVM measures each processor; those without a state need to be known.
    ends(&place, &["measure", "--vcpus", "4", "out.igvm"], 3);
    let more = [
        "measure",
        "--vcpus",
        "4",
        "--vcpu-type",
        "EPYC-Milan",
        "out.igvm",
    ];
    let four = ends(&place, &more, 0);
    assert_ne!(value(&four, "launch digest"), digest);
    ends(&place, &["measure", "--platform", "tdx", "out.igvm"], 3);
    ends(&place, &["measure", "--vcpus", "0", "out.igvm"], 2);
    // Natively nothing is measured, in whatever form one asks.
    fs::write(place.join("native.igvm"), Raw::native().natively(0, 0)).unwrap();
    ends(&place, &["measure", "native.igvm"], 3);
    assert_eq!(ends(&place, &["measure", "--json", "native.igvm"], 3), "");
    ends(&place, &["measure", "svsm.elf"], 3);
}

#[test]
fn check_and_diff_answer_by_their_status() {
    let place = directory("check");
    let good = Raw::snp();
    fs::write(place.join("good.igvm"), good.bytes()).unwrap();
    fs::write(place.join("same.igvm"), good.bytes()).unwrap();
    let other = good.clone().with(raw::kind::PAGE, 12, &[0; 4]);
    fs::write(place.join("other.igvm"), other.bytes()).unwrap();
    fs::write(place.join("tdx.igvm"), Raw::tdx().bytes()).unwrap();
    let warned = good.with(raw::kind::MEMORY_MAP, 4, &[8]);
    fs::write(place.join("warned.igvm"), warned.bytes()).unwrap();

    assert_eq!(
        ends(&place, &["check", "good.igvm"], 0),
        "no rule is broken\n"
    );
    assert!(ends(&place, &["check", "warned.igvm"], 0).starts_with("warning: at offset 0x"));
    let text = ends(&place, &["check", "tdx.igvm"], 1);
    assert!(
        text.starts_with("error: at offset 0x18: qemu-platform: "),
        "{text}"
    );
    ends(&place, &["check", "--loader", "any", "tdx.igvm"], 0);
    let json: Value =
        serde_json::from_str(&ends(&place, &["check", "--json", "tdx.igvm"], 1)).unwrap();
    assert_eq!(json[0]["rule"], "qemu-platform");
    assert_eq!(json[0]["offset"], 24);
    assert!(ends(&place, &["check", "--rules"], 0).contains("qemu-vmsa-field"));
    ends(&place, &["check", "nothing.igvm"], 4);
    ends(&place, &["check"], 2);

    assert_eq!(ends(&place, &["diff", "good.igvm", "same.igvm"], 0), "");
    let text = ends(&place, &["diff", "good.igvm", "other.igvm"], 1);
    for expected in [
        "SEV-SNP: launch digest",
        "pages 0x8000000..0x8001000 (1)",
        "from byte 0x0 on: ab",
    ] {
        assert!(text.contains(expected), "{text}");
    }
    let text = ends(&place, &["diff", "good.igvm", "tdx.igvm"], 1);
    assert_eq!(
        text,
        "SEV-SNP: the platform\n    < there\n    > none\nTDX: the platform\n    < none\n    > there\n"
    );
    let json: Value = serde_json::from_str(&ends(
        &place,
        &["diff", "--json", "good.igvm", "other.igvm"],
        1,
    ))
    .unwrap();
    assert_eq!(json[0]["platform"], "SEV-SNP");
}

#[test]
fn a_signed_image_is_the_same_guest() {
    let place = directory("sign");
    inputs(&place);
    let digest = ends(&place, &["build", "--recipe", "recipe.toml"], 0);
    let id = write_key(&place, "id.pem", 1);
    write_key(&place, "author.pem", 2);
    let sec1 = id.to_sec1_pem(LineEnding::LF).unwrap();
    let sec1 = format!(
        "-----BEGIN EC PARAMETERS-----\nBgUrgQQAIg==\n-----END EC PARAMETERS-----\n{}",
        *sec1
    );
    fs::write(place.join("sec1.pem"), sec1).unwrap();
    let sign = |key: &str, out: &str| {
        let arguments = [
            "sign",
            "out.igvm",
            "--id-key",
            key,
            "--author-key",
            "author.pem",
            "--family-id",
            "f00d",
            "--guest-svn",
            "3",
            "--out",
            out,
            "--id-block",
            "block",
            "--id-auth",
            "auth",
        ];
        ends(&place, &arguments, 0)
    };
    let said = sign("id.pem", "signed.igvm");
    assert!(said.starts_with(&digest), "{said}");
    // The same key in another form gives the same signature, every time.
    assert_eq!(sign("sec1.pem", "again.igvm"), said);
    let [first, second] =
        ["signed.igvm", "again.igvm"].map(|name| fs::read(place.join(name)).unwrap());
    assert!(first == second);
    assert_eq!(fs::read(place.join("block")).unwrap().len(), 128);
    assert_eq!(
        fs::read(place.join("auth")).unwrap().len(),
        4096_usize.div_ceil(3) * 4
    );

    assert_eq!(ends(&place, &["measure", "signed.igvm"], 0), digest);
    assert_eq!(
        ends(&place, &["check", "signed.igvm"], 0),
        "no rule is broken\n"
    );
    let differences = ends(&place, &["diff", "out.igvm", "signed.igvm"], 1);
    assert!(
        differences.starts_with("SEV-SNP: ID block\n    < none\n"),
        "{differences}"
    );
    assert_eq!(differences.lines().count(), 3);
    let shown = ends(&place, &["show", "signed.igvm"], 0);
    assert!(
        shown.contains("version 1, SVN 3, with author key"),
        "{shown}"
    );
    // Signed again, there is still one block.
    ends(
        &place,
        &[
            "sign",
            "signed.igvm",
            "--id-key",
            "id.pem",
            "--out",
            "twice.igvm",
        ],
        0,
    );
    ends(&place, &["check", "twice.igvm"], 0);

    // For a launch by KVM with four processors, of which the file has a state for one.
    let four = ["--vcpus", "4", "--vcpu-type", "EPYC-Milan"];
    let sign = |options: &[&str], status| {
        let sign = ["sign", "out.igvm", "--id-key", "id.pem"];
        ends(&place, &[&sign, options].concat(), status)
    };
    sign(&[&four[..], &["--out", "four.igvm"]].concat(), 0);
    let check = |file, options: &[&str], status| {
        ends(&place, &[&["check", file], options].concat(), status)
    };
    assert_eq!(check("four.igvm", &four, 0), "no rule is broken\n");
    for (file, options) in [
        ("signed.igvm", &four[..]),
        ("signed.igvm", &four[..2]),
        ("four.igvm", &four[..2]),
        ("four.igvm", &[]),
    ] {
        let text = check(file, options, 1);
        assert!(text.contains("id-block-digest"), "{options:?}: {text}");
    }

    fs::write(place.join("no.pem"), "nothing").unwrap();
    let out = &["--out", "o.igvm"][..];
    sign(&[out, &["--vcpus", "4"]].concat(), 3);
    sign(&[out, &["--image-id", "xy"]].concat(), 2);
    // Nowhere to write is no way to sign, and one place is enough.
    sign(&[], 2);
    sign(&["--id-auth", "auth"], 0);
    for (key, status) in [("no.pem", 3), ("none.pem", 4)] {
        let arguments = ["sign", "out.igvm", "--id-key", key, "--id-block", "block"];
        ends(&place, &arguments, status);
    }
}

#[test]
fn an_igvm_file_can_be_the_firmware() {
    let place = directory("firmware");
    inputs(&place);
    let recipe = ["build", "--recipe", "recipe.toml"];
    ends(&place, &recipe, 0);
    fs::rename(place.join("out.igvm"), place.join("first.igvm")).unwrap();
    // Our own image has the firmware where it lies.
    ends(
        &place,
        &[&recipe[..], &["--firmware", "first.igvm"]].concat(),
        0,
    );
    assert_eq!(ends(&place, &["diff", "first.igvm", "out.igvm"], 0), "");
    fs::write(place.join("none.igvm"), Raw::snp().bytes()).unwrap();
    ends(
        &place,
        &[&recipe[..], &["--firmware", "none.igvm"]].concat(),
        3,
    );
}

#[test]
fn images_for_other_loaders_keep_to_their_tables() {
    let place = directory("targets");
    inputs(&place);
    let mut digests = Vec::new();
    for target in ["qemu", "hyper-v", "vanadium"] {
        let arguments = ["build", "--recipe", "recipe.toml", "--target", target];
        let built = ends(&place, &arguments, 0);
        let measured = ends(&place, &["measure", "--loader", target, "out.igvm"], 0);
        assert_eq!(measured, built, "{target}");
        digests.push(built);
        ends(&place, &["check", "--loader", "any", "out.igvm"], 0);
        // An ID block is for the loader it was signed for.
        write_key(&place, "id.pem", 1);
        let arguments = [
            "sign",
            "out.igvm",
            "--id-key",
            "id.pem",
            "--loader",
            target,
            "--out",
            "signed.igvm",
        ];
        ends(&place, &arguments, 0);
        ends(&place, &["check", "--loader", "any", "signed.igvm"], 0);
        let on_qemu = i32::from(target != "qemu");
        let text = ends(&place, &["check", "signed.igvm"], on_qemu);
        assert_eq!(text.contains("id-block-digest"), target != "qemu", "{text}");
        let shown = ends(&place, &["show", "out.igvm"], 0);
        let (boundary, vmsa) = match target {
            "hyper-v" => ("0x400000000000", "0x301ff000"),
            _ => ("0x0", "0xfffffffff000"),
        };
        assert!(
            shown.contains(&format!("shared from {boundary},")),
            "{shown}"
        );
        assert!(shown.contains(&format!("VMSA at {vmsa},")), "{shown}");
        assert_eq!(shown.contains("native"), target == "qemu", "{shown}");
        let vtl = if target == "qemu" { 0 } else { 2 };
        assert!(shown.contains(&format!("highest VTL {vtl}")), "{shown}");
    }
    digests.sort();
    digests.dedup();
    assert_eq!(digests.len(), 3);
    // QEMU takes no VMSA elsewhere, and says so before it is started.
    let arguments = ["build", "--recipe", "recipe.toml", "--target", "hyper-v"];
    ends(&place, &arguments, 0);
    assert!(ends(&place, &["check", "out.igvm"], 1).contains("qemu-vmsa-address"));
}

#[test]
fn shells_are_told_all_commands() {
    let place = directory("shells");
    for shell in ["bash", "zsh", "fish"] {
        let script = ends(&place, &["completions", shell], 0);
        for command in ["build", "show", "measure", "check", "sign", "diff"] {
            assert!(script.contains(command), "{shell}: {command}");
        }
    }
    ends(&place, &["completions", "tcsh"], 2);
}
