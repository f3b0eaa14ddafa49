//! Wrong files: every message is one line that says what was expected and what to do.

mod support;

use std::path::Path;
use std::process::Command;

use igvm_build::elf::Program;
use igvm_build::error::Error;
use igvm_build::firmware::Firmware;
use igvm_build::flat::elf_to_flat;
use igvm_build::image::{Options, build};
use igvm_build::show::show;
use protocols::launch::{REGION_GPA, REGION_SIZE};
use support::{ALL, AREAS, DATA, ENTRY, Load, RODATA, TEXT, elf, loads, ovmf, paravisor};

const NO_SYMBOL: (&str, u64) = ("nothing", 0);

/// Builds an image of the segments, with its entry at the start of the first one.
fn build_loads(loads: &[Load]) -> Result<(), Error> {
    let bytes = elf(loads[0].address, loads, NO_SYMBOL);
    build(&Program::parse(&bytes)?, None, None, &Options::default()).map(drop)
}

fn text(address: u64) -> Load {
    Load::new(address, TEXT, vec![0x90; 0x1000], 0x1000)
}

/// One line, without a stutter, that says what to do.
fn assert_helpful(error: &Error) {
    let message = error.to_string();
    assert!(!message.contains('\n'), "{message}");
    assert!(message.contains("; "), "{message}");
}

#[test]
fn programs_that_break_the_rules_are_refused() {
    type Row = (&'static str, fn() -> Vec<Load>, fn(&Error) -> bool);
    let end = REGION_GPA + REGION_SIZE;
    assert_eq!(end, 0x3020_0000);
    let rows: [Row; 7] = [
        (
            "below the region",
            || vec![text(REGION_GPA - 0x1000)],
            |e| matches!(e, Error::SegmentOutsideRegion { .. }),
        ),
        (
            "beyond the region",
            || {
                vec![
                    text(REGION_GPA),
                    Load::new(0x83F_F000, DATA, vec![], 0x1001),
                ]
            },
            |e| {
                matches!(
                    e,
                    Error::SegmentOutsideRegion {
                        end: 0x840_0001,
                        ..
                    }
                )
            },
        ),
        (
            "no room behind it",
            || {
                vec![
                    text(REGION_GPA),
                    Load::new(REGION_GPA + 0x1000, DATA, vec![], REGION_SIZE - 0x1000),
                ]
            },
            |e| matches!(e, Error::RegionTooSmall { .. }),
        ),
        (
            "writable code",
            || vec![Load::new(REGION_GPA, ALL, vec![0; 16], 16)],
            |e| matches!(e, Error::WritableCode { .. }),
        ),
        (
            "two segments in a page",
            || {
                vec![
                    text(REGION_GPA),
                    Load::new(REGION_GPA + 0xFFF, RODATA, vec![1], 1),
                ]
            },
            |e| matches!(e, Error::SegmentsOverlap { page: REGION_GPA }),
        ),
        (
            "entry in data",
            || vec![Load::new(REGION_GPA, DATA, vec![0; 16], 16)],
            |e| matches!(e, Error::EntryNotExecutable { .. }),
        ),
        (
            "a segment that wraps",
            || vec![text(REGION_GPA), Load::new(!0xFFF, DATA, vec![], 0x1000)],
            |e| matches!(e, Error::NotAnElf { .. }),
        ),
    ];
    for (name, loads, is_expected) in rows {
        let error = build_loads(&loads()).unwrap_err();
        assert!(is_expected(&error), "{name}: {error}");
        assert_helpful(&error);
    }
}

#[test]
fn files_that_are_no_programs_are_refused() {
    let good = paravisor();
    let spoilt = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    let rows = [
        ("empty", Vec::new()),
        ("text", b"#!/bin/sh\n".to_vec()),
        ("cut off", good[..80].to_vec()),
        ("32 bits", spoilt(4, 1)),
        ("big endian", spoilt(5, 2)),
        ("a library", spoilt(16, 3)),
        ("for another processor", spoilt(18, 183)),
        ("a segment outside the file", spoilt(64 + 8 + 3, 0xFF)),
        (
            "more bytes in the file than in memory",
            spoilt(64 + 40 + 1, 0x10),
        ),
        ("no segment", elf(ENTRY, &[], NO_SYMBOL)),
    ];
    for (name, bytes) in rows {
        let error = Program::parse(&bytes).map(drop).unwrap_err();
        assert!(matches!(error, Error::NotAnElf { .. }), "{name}: {error}");
        assert_helpful(&error);
    }
}

#[test]
fn files_that_are_no_firmware_are_refused() {
    let areas = |change: fn(&mut Vec<(u32, u32, u32)>)| {
        let mut areas = AREAS.to_vec();
        change(&mut areas);
        ovmf(Some(&areas))
    };
    type Expected = fn(&Error) -> bool;
    let bad_metadata: Expected = |e| matches!(e, Error::BadSevMetadata { .. });
    let rows: [(&str, Vec<u8>, Expected); 12] = [
        ("empty", vec![], |e| {
            matches!(e, Error::FirmwareSize { size: 0 })
        }),
        ("odd size", vec![0; 4097], |e| {
            matches!(e, Error::FirmwareSize { .. })
        }),
        ("too large", vec![0; 17 << 20], |e| {
            matches!(e, Error::FirmwareSize { .. })
        }),
        ("no table", vec![0; 4096], |e| {
            matches!(e, Error::NotOvmf { .. })
        }),
        ("no SEV", ovmf(None), |e| {
            matches!(
                e,
                Error::NoSevMetadata {
                    missing: "SEV metadata"
                }
            )
        }),
        (
            "no secrets page",
            areas(|a| a.retain(|area| area.2 != 2)),
            |e| {
                matches!(
                    e,
                    Error::NoSevMetadata {
                        missing: "secrets page"
                    }
                )
            },
        ),
        (
            "older than SVSM",
            areas(|a| a.retain(|area| area.2 != 4)),
            |e| {
                matches!(
                    e,
                    Error::NoSevMetadata {
                        missing: "SVSM calling area"
                    }
                )
            },
        ),
        (
            "in our region",
            areas(|a| a[0] = (0x2FFF_F000, 0x2000, 1)),
            bad_metadata,
        ),
        (
            "in itself",
            areas(|a| a[0] = (0xFFFE_F000, 0x2000, 1)),
            bad_metadata,
        ),
        ("half a page", areas(|a| a[0].1 = 0x800), bad_metadata),
        (
            "twice the same page",
            areas(|a| a[0].1 = 0xB000),
            bad_metadata,
        ),
        (
            "too many",
            areas(|a| a.extend((0..40).map(|i| (i << 12, 0x1000, 1)))),
            bad_metadata,
        ),
    ];
    for (name, bytes, is_expected) in rows {
        let error = Firmware::parse(&bytes).map(drop).unwrap_err();
        assert!(is_expected(&error), "{name}: {error}");
        assert_helpful(&error);
    }
}

#[test]
fn impossible_c_bits_are_refused() {
    let bytes = paravisor();
    let program = Program::parse(&bytes).unwrap();
    for c_bit in [0, 31, 52, 63, 64, u32::MAX] {
        let error = build(
            &program,
            None,
            None,
            &Options {
                c_bit,
                ..Options::default()
            },
        )
        .unwrap_err();
        assert!(matches!(error, Error::CBit { .. }));
        assert_helpful(&error);
    }
}

#[test]
fn files_that_are_no_images_are_not_shown() {
    let elf = paravisor();
    let mut image = build(
        &Program::parse(&elf).unwrap(),
        None,
        None,
        &Options::default(),
    )
    .unwrap()
    .bytes;
    assert!(!show(&image).unwrap().contains("wrong checksum"));
    image[40] ^= 1;
    // What can be told apart is shown.
    assert!(show(&image).unwrap().contains("wrong checksum"));
    image[0] ^= 1;
    for bytes in [&b""[..], b"IGVM", &image] {
        let error = show(bytes).unwrap_err();
        assert!(matches!(error, Error::Igvm(_)), "{error}");
        assert_helpful(&error);
    }
}

#[test]
fn flat_images_end_at_4_gib() {
    let rom = |loads: &[Load]| elf_to_flat(&elf(ENTRY, loads, NO_SYMBOL), 0x2000);
    let at = |load_address, data: &[u8]| Load {
        load_address,
        ..Load::new(0xFFFF_FFFF_8000_0000, TEXT, data.to_vec(), 0x4000)
    };
    let image = rom(&[at(0xFFFF_E000, b"first"), at(0xFFFF_FFF0, b"reset")]).unwrap();
    assert_eq!(image.len(), 0x2000);
    assert_eq!(image[..5], *b"first");
    assert_eq!(image[0x1FF0..0x1FF5], *b"reset");
    assert!(image[5..0x1FF0].iter().all(|&byte| byte == 0));
    // .bss takes no room; bytes outside do.
    assert!(rom(&[at(0xFFFF_E000, b"x"), at(0x1000, b"")]).is_ok());
    for outside in [0xFFFF_DFFF, 0xFFFF_FFFC, 0x1_0000_0000, 0] {
        let error = rom(&[at(outside, b"12345")]).unwrap_err();
        assert!(matches!(error, Error::SegmentOutsideRegion { .. }));
        assert_helpful(&error);
    }
    for size in [0, 4095, 1 << 33] {
        let error = elf_to_flat(&paravisor(), size).unwrap_err();
        assert!(matches!(error, Error::FlatSize { .. }));
        assert_helpful(&error);
    }
}

/// The command names the file, in one line.
#[test]
fn the_command_names_the_file() {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let good = directory.join("good.elf");
    std::fs::write(&good, elf(ENTRY, &loads(), NO_SYMBOL)).unwrap();
    let bad = directory.join("bad.fd");
    std::fs::write(&bad, vec![0; 4096]).unwrap();
    let missing = directory.join("missing");
    let out = directory.join("out.igvm");
    let run = |arguments: &[&Path]| {
        let output = Command::new(env!("CARGO_BIN_EXE_igvm-build"))
            .args(arguments)
            .output();
        let output = output.unwrap();
        (
            output.status.success(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (build, paravisor) = (Path::new("build"), Path::new("--paravisor"));
    let (firmware, to) = (Path::new("--firmware"), Path::new("--out"));
    for (arguments, named) in [
        (&[build, paravisor, &missing, to, &out][..], &missing),
        (&[build, paravisor, &bad, to, &out], &bad),
        (&[build, paravisor, &good, firmware, &bad, to, &out], &bad),
        (
            &[build, paravisor, &good, firmware, &missing, to, &out],
            &missing,
        ),
        (
            &[build, paravisor, &good, to, directory],
            &directory.to_path_buf(),
        ),
        (&[Path::new("show"), &bad], &bad),
    ] {
        let (success, message) = run(arguments);
        assert!(!success);
        assert_eq!(message.lines().count(), 1, "{message}");
        assert!(message.contains(&*named.to_string_lossy()), "{message}");
    }
    assert!(run(&[build, paravisor, &good, to, &out]).0);
    assert!(out.exists() && directory.join("out.igvm.json").exists());
}
