//! The image of a trust domain is parsed again and judged by what is in it.

mod support;

use igvm::{IgvmDirectiveHeader as Directive, IgvmFile, IgvmPlatformHeader, IsolationType};
use igvm_build::elf::Program;
use igvm_build::error::Error;
use igvm_build::td::build;
use igvm_defs::IgvmPlatformType;
use sha2::{Digest, Sha384};
use support::{DATA, Load, TEXT, elf};

const RESET: u64 = 0xFFFF_F000;

/// Code that begins inside a page, data with .bss behind it, and the page with the reset vector.
fn loads() -> Vec<Load> {
    vec![
        Load::new(0x80_0010, TEXT, vec![0x90; 0x1000], 0x1000),
        Load::new(0x80_2000, DATA, vec![0x22; 0x10], 0x1800),
        Load::new(RESET, TEXT, vec![0xEB; 0x1000], 0x1000),
    ]
}

fn program(loads: &[Load]) -> Vec<u8> {
    elf(0xFFFF_FFF0, loads, ("unused", 0))
}

#[test]
fn every_page_is_there_and_measured() {
    let elf = program(&loads());
    let image = build(&Program::parse(&elf).unwrap()).unwrap();
    let file = IgvmFile::new_from_binary(&image.bytes, Some(IsolationType::Tdx)).unwrap();
    let [IgvmPlatformHeader::SupportedPlatform(platform)] = file.platforms() else {
        panic!("{:?}", file.platforms());
    };
    assert_eq!(platform.platform_type, IgvmPlatformType::TDX);
    assert_eq!(platform.shared_gpa_boundary, 1 << 47);
    let mut mrtd = Sha384::new();
    let mut seen = Vec::new();
    for directive in file.directives() {
        let Directive::PageData {
            gpa, flags, data, ..
        } = directive
        else {
            panic!("{directive:?}");
        };
        assert!(!flags.unmeasured() && !flags.shared());
        let mut page = data.clone();
        page.resize(0x1000, 0);
        let record = |name: &[u8], at: u64| {
            let mut block = [0; 128];
            block[..name.len()].copy_from_slice(name);
            block[16..24].copy_from_slice(&at.to_le_bytes());
            block
        };
        mrtd.update(record(b"MEM.PAGE.ADD", *gpa));
        for (chunk, at) in page.chunks(256).zip((*gpa..).step_by(256)) {
            mrtd.update(record(b"MR.EXTEND", at));
            mrtd.update(chunk);
        }
        seen.push((*gpa, page[0], page[0xFFF]));
    }
    let wanted = [
        (0x80_0000, 0, 0x90),
        (0x80_1000, 0x90, 0),
        (0x80_2000, 0x22, 0),
        (0x80_3000, 0, 0),
        (RESET, 0xEB, 0xEB),
    ];
    assert_eq!(seen, wanted);
    assert_eq!(image.mrtd[..], mrtd.finalize()[..]);
}

#[test]
fn programs_that_cannot_start_are_refused() {
    let mut without = loads();
    without.truncate(2);
    let elf = program(&without);
    let error = build(&Program::parse(&elf).unwrap()).unwrap_err();
    assert!(matches!(error, Error::NoResetVector), "{error}");
    let mut twice = loads();
    twice[1] = Load::new(0x80_1800, DATA, vec![1; 0x10], 0x10);
    let elf = program(&twice);
    let error = build(&Program::parse(&elf).unwrap()).unwrap_err();
    assert!(
        matches!(error, Error::SegmentsOverlap { page: 0x80_1000 }),
        "{error}"
    );
}
