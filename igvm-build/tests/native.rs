//! The native platform of an image: complete, and without influence on the other one.

mod support;

use std::collections::BTreeMap;

use igvm::{IgvmDirectiveHeader as Directive, IgvmFile, IgvmPlatformHeader};
use igvm_build::elf::Program;
use igvm_build::firmware::Firmware;
use igvm_build::image::{Image, NATIVE_MASK, Options, SNP_MASK, build};
use igvm_defs::{IgvmPageDataType, IgvmPlatformType};
use protocols::launch::{LaunchParams, PlatformKind, REGION_GPA, REGION_SIZE};
use support::{AREAS, ENTRY, FIRMWARE_SIZE, ovmf, paravisor};
use zerocopy::FromBytes;

const C_BIT: u64 = 1 << 47;

fn image(native: bool) -> Image {
    let (elf, firmware) = (paravisor(), ovmf(Some(&AREAS)));
    let firmware = Firmware::parse(&firmware).unwrap();
    let options = Options {
        c_bit: 47,
        native,
        ..Options::default()
    };
    build(
        &Program::parse(&elf).unwrap(),
        Some(&firmware),
        None,
        &options,
    )
    .unwrap()
}

/// What the platform with the bit `mask` is launched with, in order.
fn of_platform(bytes: &[u8], mask: u32) -> Vec<Directive> {
    let file = IgvmFile::new_from_binary(bytes, None).unwrap();
    file.directives()
        .iter()
        .filter(|directive| {
            directive
                .compatibility_mask()
                .is_none_or(|applies| applies & mask != 0)
        })
        .cloned()
        .collect()
}

fn pages(bytes: &[u8], mask: u32) -> BTreeMap<u64, Vec<u8>> {
    let mut pages = BTreeMap::new();
    for directive in of_platform(bytes, mask) {
        if let Directive::PageData { gpa, mut data, .. } = directive {
            data.resize(4096, 0);
            assert!(pages.insert(gpa, data).is_none(), "{gpa:#x} comes twice");
        }
    }
    pages
}

#[test]
fn sev_snp_is_launched_as_if_there_were_no_other_platform() {
    let (with, without) = (image(true), image(false));
    assert_eq!(with.digest, without.digest);
    assert_eq!(with.layout, without.layout);
    assert_eq!(
        pages(&with.bytes, SNP_MASK),
        pages(&without.bytes, SNP_MASK)
    );
    assert!(with.bytes != without.bytes);
    // What is shown is parsed from the file, by way of a reader that is told the platform.
    let digest_shown = |image: &Image| {
        let text = igvm_build::show::show(&image.bytes).unwrap();
        text.lines()
            .find(|line| line.starts_with("launch digest"))
            .unwrap()
            .to_owned()
    };
    assert_eq!(digest_shown(&with), digest_shown(&without));
}

#[test]
fn without_a_firmware_there_is_no_native_platform() {
    let elf = paravisor();
    let image = build(
        &Program::parse(&elf).unwrap(),
        None,
        None,
        &Options::default(),
    )
    .unwrap();
    let file = IgvmFile::new_from_binary(&image.bytes, None).unwrap();
    assert_eq!(file.platforms().len(), 1);
}

#[test]
fn the_header_is_that_of_an_ordinary_machine() {
    let bytes = image(true).bytes;
    let file = IgvmFile::new_from_binary(&bytes, None).unwrap();
    let IgvmPlatformHeader::SupportedPlatform(native) = &file.platforms()[1];
    assert_eq!(native.platform_type, IgvmPlatformType::NATIVE);
    assert_eq!(native.compatibility_mask, NATIVE_MASK);
    assert_eq!(native.platform_version, 1);
    assert_eq!((native.highest_vtl, native.shared_gpa_boundary), (0, 0));
}

#[test]
fn nothing_of_sev_snp_is_launched_natively() {
    for directive in of_platform(&image(true).bytes, NATIVE_MASK) {
        match directive {
            Directive::PageData { data_type, .. } => {
                assert_eq!(data_type, IgvmPageDataType::NORMAL);
            }
            Directive::SnpVpContext { .. } => panic!("a VMSA"),
            _ => {}
        }
    }
}

#[test]
fn the_same_places_are_filled_on_both_platforms() {
    let image = image(true);
    let (snp, native) = (
        pages(&image.bytes, SNP_MASK),
        pages(&image.bytes, NATIVE_MASK),
    );
    assert!(snp.keys().eq(native.keys()));
    let layout = image.layout;
    let differ: Vec<u64> = snp
        .iter()
        .filter(|(gpa, data)| native[gpa] != **data)
        .map(|(gpa, _)| *gpa)
        .collect();
    // Three upper tables, two lowest ones, the parameters.
    let tables = (layout.page_tables..layout.params).step_by(4096);
    let expected: Vec<u64> = tables.chain([layout.params]).collect();
    assert_eq!(differ, expected);
}

#[test]
fn the_tables_are_those_of_sev_snp_without_the_c_bit() {
    let image = image(true);
    let (snp, native) = (
        pages(&image.bytes, SNP_MASK),
        pages(&image.bytes, NATIVE_MASK),
    );
    let words = |page: &[u8]| -> Vec<u64> {
        page.chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
            .collect()
    };
    let layout = image.layout;
    for table in (layout.page_tables..layout.params).step_by(4096) {
        for (private, plain) in words(&snp[&table]).into_iter().zip(words(&native[&table])) {
            assert_eq!(plain, private & !C_BIT);
        }
    }
}

#[test]
fn the_paravisor_is_told_its_platform() {
    let image = image(true);
    let params = |mask| {
        LaunchParams::read_from_bytes(&pages(&image.bytes, mask)[&image.layout.params]).unwrap()
    };
    let (snp, native) = (params(SNP_MASK), params(NATIVE_MASK));
    assert_eq!(snp.platform, PlatformKind::SEV_SNP);
    assert_eq!(native.platform, PlatformKind::NATIVE);
    assert_eq!(
        (native.c_bit, native.secrets_gpa, native.cpuid_gpa),
        (0, 0, 0)
    );
    assert_eq!(
        (native.region_gpa, native.region_size, native.image_end),
        (REGION_GPA, REGION_SIZE, image.layout.image_end)
    );
    assert_eq!(native.firmware_size, FIRMWARE_SIZE as u64);
    assert_eq!(native.memory_map_gpa, snp.memory_map_gpa);
    assert_eq!(native.general_gpa, snp.general_gpa);
}

#[test]
fn the_first_processor_starts_in_64_bit_mode() {
    let image = image(true);
    let contexts: Vec<_> = of_platform(&image.bytes, NATIVE_MASK)
        .into_iter()
        .filter_map(|directive| match directive {
            Directive::X64NativeVpContext {
                vp_index, context, ..
            } => Some((vp_index, context)),
            _ => None,
        })
        .collect();
    let [(0, context)] = &contexts[..] else {
        panic!("{} contexts", contexts.len());
    };
    assert_eq!((context.rip, context.rdi), (ENTRY, image.layout.params));
    assert_eq!(context.cr3, image.layout.page_tables);
    assert_eq!(
        (context.cr0, context.cr4, context.efer, context.rflags),
        (0x8001_0031, 0x20, 0xD00, 2)
    );
    // Present, accessed; L without D for code, D and writable for data; page granularity.
    assert_eq!(
        (context.code_attributes, context.data_attributes),
        (0xA09B, 0xC093)
    );
    assert_eq!(
        (context.code_limit, context.data_limit),
        (u32::MAX, u32::MAX)
    );
}
