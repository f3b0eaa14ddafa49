//! The TDX platform beside the others: what is launched on it, and that it costs SEV-SNP nothing.

mod support;

use igvm::{IgvmDirectiveHeader as Directive, IgvmFile, IgvmPlatformHeader};
use igvm_build::elf::Program;
use igvm_build::error::Error;
use igvm_build::firmware::Firmware;
use igvm_build::image::{Image, Options, build};
use igvm_build::td;
use igvm_build::td_firmware::{TdFirmware, with_variables};
use igvm_build::tdx::TDX_MASK;
use igvm_defs::IgvmPlatformType;
use protocols::guid::Guid;
use protocols::launch::{Acceptance, LaunchParams, PlatformKind, REGION_GPA, ResetPage, Touch};
use protocols::ovmf::FOOTER_GUID;
use protocols::tdvf::{
    Attributes, Descriptor, METADATA_GUID, SIGNATURE, Section, SectionKind, VERSION,
};
use sha2::{Digest, Sha384};
use support::{AREAS, ENTRY, elf, loads, ovmf, paravisor};
use zerocopy::{FromBytes, IntoBytes};

const SIZE: usize = 0x4000;

/// An image of four pages, filled with its own numbers, with this list of sections.
fn tdvf(sections: &[Section]) -> Vec<u8> {
    let mut image: Vec<u8> = (0..SIZE).map(|at| (at >> 12) as u8 + 1).collect();
    let head = Descriptor {
        signature: SIGNATURE,
        length: (16 + 32 * sections.len() as u32).into(),
        version: VERSION.into(),
        count: (sections.len() as u32).into(),
    };
    let list = [head.as_bytes(), sections.as_bytes()].concat();
    let at = SIZE - 0x800;
    image[at..at + list.len()].copy_from_slice(&list);
    let entry = |data: &[u8], length: u16, guid: Guid| {
        [data, &length.to_le_bytes(), guid.as_bytes()].concat()
    };
    let table = [
        entry(&0x800_u32.to_le_bytes(), 22, METADATA_GUID),
        entry(&[], 40, FOOTER_GUID),
    ]
    .concat();
    let end = SIZE - 32;
    image[end - table.len()..end].copy_from_slice(&table);
    image
}

fn section(kind: SectionKind, gpa: u64, size: u64, data: u32) -> Section {
    Section {
        data_offset: 0.into(),
        data_size: data.into(),
        gpa: gpa.into(),
        size: size.into(),
        kind: kind.0.into(),
        attributes: 0.into(),
    }
}

fn good() -> Vec<Section> {
    vec![
        section(
            SectionKind::BFV,
            (1 << 32) - SIZE as u64,
            SIZE as u64,
            SIZE as u32,
        ),
        section(SectionKind::TD_HOB, 0x80_9000, 0x2000, 0),
        section(SectionKind::TEMP_MEM, 0x81_0000, 0x1_0000, 0),
    ]
}

fn program() -> Vec<u8> {
    elf(ENTRY, &loads(), (ResetPage::SYMBOL, REGION_GPA + 0x80))
}

fn image(td: bool) -> Image {
    let (elf, firmware, td_bytes) = (program(), ovmf(Some(&AREAS)), tdvf(&good()));
    let firmware = Firmware::parse(&firmware).unwrap();
    let td_firmware = TdFirmware::parse(&td_bytes).unwrap();
    let options = Options {
        c_bit: 47,
        ..Options::default()
    };
    let program = Program::parse(&elf).unwrap();
    build(
        &program,
        Some(&firmware),
        td.then_some(&td_firmware),
        &options,
    )
    .unwrap()
}

/// What applies to TDX, in the order of the file.
fn directives(image: &Image) -> Vec<Directive> {
    let file = IgvmFile::new_from_binary(&image.bytes, None).unwrap();
    let all = file.directives().iter();
    all.filter(|d| {
        d.compatibility_mask()
            .is_none_or(|mask| mask & TDX_MASK != 0)
    })
    .cloned()
    .collect()
}

fn page(image: &Image, at: u64) -> Vec<u8> {
    directives(image)
        .into_iter()
        .find_map(|directive| match directive {
            Directive::PageData { gpa, mut data, .. } if gpa == at => {
                data.resize(4096, 0);
                Some(data)
            }
            _ => None,
        })
        .unwrap()
}

#[test]
fn sev_snp_is_measured_as_if_tdx_were_not_there() {
    let (with, without) = (image(true), image(false));
    assert_eq!(with.digest, without.digest);
    assert!(without.mrtd.is_none());
    let kinds = |image: &Image| -> Vec<_> {
        let file = IgvmFile::new_from_binary(&image.bytes, None).unwrap();
        let platforms = file.platforms().iter();
        platforms
            .map(|IgvmPlatformHeader::SupportedPlatform(platform)| platform.platform_type)
            .collect()
    };
    let both = [IgvmPlatformType::SEV_SNP, IgvmPlatformType::NATIVE];
    assert_eq!(kinds(&without), both);
    assert_eq!(kinds(&with), [both[0], both[1], IgvmPlatformType::TDX]);
}

/// Written apart from `igvm_build::measure`.
#[test]
fn mrtd_is_that_of_the_file() {
    let image = image(true);
    let mut mrtd = Sha384::new();
    let mut sizes = [0; 2];
    let mut record = |what: &[u8], gpa: u64, data: &[u8]| {
        let mut block = [0; 128];
        block[..what.len()].copy_from_slice(what);
        block[16..24].copy_from_slice(&gpa.to_le_bytes());
        mrtd.update(block);
        mrtd.update(data);
    };
    for directive in directives(&image) {
        match directive {
            Directive::ParameterArea {
                number_of_bytes,
                parameter_area_index,
                ..
            } => sizes[parameter_area_index as usize] = number_of_bytes,
            Directive::ParameterInsert(insert) => {
                let size = sizes[insert.parameter_area_index as usize];
                for gpa in (insert.gpa..insert.gpa + size).step_by(4096) {
                    record(b"MEM.PAGE.ADD", gpa, &[]);
                }
            }
            Directive::PageData { gpa, mut data, .. } => {
                data.resize(4096, 0);
                record(b"MEM.PAGE.ADD", gpa, &[]);
                for (at, chunk) in (gpa..).step_by(256).zip(data.chunks(256)) {
                    record(b"MR.EXTEND", at, chunk);
                }
            }
            _ => {}
        }
    }
    assert_eq!(image.mrtd.unwrap().as_slice(), mrtd.finalize().as_slice());
}

#[test]
fn the_reset_page_leads_to_the_paravisor_and_the_firmwares_waits() {
    let image = image(true);
    let reset = ResetPage::read_from_bytes(&page(&image, ResetPage::GPA)).unwrap();
    assert_eq!(u64::from(reset.page_table_root), image.layout.page_tables);
    assert_eq!(u64::from(reset.params), image.layout.params);
    let expected = ResetPage::new(0, 0, (REGION_GPA + 0x80) as u32);
    assert_eq!(reset.jump, expected.jump);

    let params = LaunchParams::read_from_bytes(&page(&image, image.layout.params)).unwrap();
    assert_eq!(params.platform, PlatformKind::TDX);
    assert_eq!((params.c_bit, params.secrets_gpa), (0, 0));
    let kinds: Vec<_> = params
        .sections()
        .iter()
        .map(|section| section.kind.0)
        .collect();
    assert_eq!(kinds, [SectionKind::TD_HOB.0, SectionKind::TEMP_MEM.0]);
    // The last page of the firmware has its number, 4, in its first byte.
    assert_eq!(page(&image, params.firmware_last_page)[0], 4);
    assert_eq!(page(&image, params.firmware_gpa)[0], 1);
}

#[test]
fn firmware_that_cannot_be_prepared_is_refused() {
    let base = (1_u64 << 32) - SIZE as u64;
    let spoil: [fn(&mut Vec<Section>); 8] = [
        |list| list.retain(|section| section.section_kind() != SectionKind::TD_HOB),
        |list| list.push(section(SectionKind::TD_HOB, 0x90_0000, 0x1000, 0)),
        |list| list.push(section(SectionKind::TEMP_MEM, 0x80_A000, 0x1000, 0)),
        |list| list.push(section(SectionKind::TEMP_MEM, REGION_GPA, 0x1000, 0)),
        |list| list.push(section(SectionKind::TEMP_MEM, 0x90_0001, 0x1000, 0)),
        |list| list.push(section(SectionKind::TEMP_MEM, u64::MAX - 0xFFF, 0x1000, 0)),
        |list| list.push(section(SectionKind::CFV, 0x90_0000, 0x1000, 0x1000)),
        |list| list.push(section(SectionKind::TEMP_MEM, 0x90_0000, 0, 0)),
    ];
    assert!(TdFirmware::parse(&tdvf(&good())).is_ok_and(|td| td.gpa() == base));
    for (index, change) in spoil.into_iter().enumerate() {
        let mut list = good();
        change(&mut list);
        let error = TdFirmware::parse(&tdvf(&list)).unwrap_err();
        assert!(matches!(error, Error::TdFirmware { .. }), "change {index}");
    }
    let error = TdFirmware::parse(&ovmf(Some(&AREAS))).unwrap_err();
    assert!(matches!(error, Error::TdFirmware { .. }));
}

/// Without a paravisor: sections in their order, measured where they ask for it (`tdx.md` §10, §11).
#[test]
fn a_firmware_of_its_own_is_launched_as_it_lists_itself() {
    let base = (1 << 32) - SIZE as u64;
    let mut code = section(SectionKind::BFV, base + 0x1000, 0x3000, 0x3000);
    code.data_offset = 0x1000.into();
    code.attributes = Attributes::EXTEND.bits().into();
    let mut later = section(SectionKind::PERM_MEM, 0x100_0000, 0x1000, 0);
    later.attributes = Attributes::AUGMENT.bits().into();
    let list = [
        code,
        section(SectionKind::CFV, base, 0x1000, 0x1000),
        section(SectionKind::TEMP_MEM, 0x81_0000, 0x2000, 0),
        section(SectionKind::TD_HOB, 0x80_9000, 0x1000, 0),
        later,
    ];
    let bytes = tdvf(&list);
    let built = td::build_firmware(&TdFirmware::parse(&bytes).unwrap()).unwrap();
    assert_eq!(built.hob, 0x80_9000);
    let file = IgvmFile::new_from_binary(&built.image.bytes, None).unwrap();
    let mut mrtd = protocols::measure::Mrtd::new();
    let mut seen = Vec::new();
    for directive in file.directives() {
        match directive {
            Directive::PageData {
                gpa, flags, data, ..
            } => {
                let mut page = data.clone();
                page.resize(4096, 0);
                let page: &[u8; 4096] = page.as_slice().try_into().unwrap();
                mrtd.add_page(*gpa, (!flags.unmeasured()).then_some(page));
                seen.push((*gpa, !flags.unmeasured(), page[0]));
            }
            Directive::ParameterInsert(insert) => {
                mrtd.add_page(insert.gpa, None);
                seen.push((insert.gpa, false, 0));
            }
            _ => {}
        }
    }
    let wanted = [
        (base + 0x1000, true, 2),
        (base + 0x2000, true, 3),
        (base + 0x3000, true, 4),
        (base, false, 1),
        (0x81_0000, false, 0),
        (0x81_1000, false, 0),
        (0x80_9000, false, 0),
    ];
    assert_eq!(seen, wanted);
    assert_eq!(built.image.mrtd, mrtd.value());
    // Nothing is at the reset vector without the code.
    let bytes = tdvf(&list[1..]);
    let error = td::build_firmware(&TdFirmware::parse(&bytes).unwrap()).unwrap_err();
    assert!(matches!(error, Error::NoResetVector), "{error}");
}

/// Variables can be changed for others of the same size, and nothing else with them.
#[test]
fn variables_come_from_a_store_of_their_size() {
    let base = (1 << 32) - SIZE as u64;
    let mut list = good();
    list[0] = section(SectionKind::CFV, base, 0x1000, 0x1000);
    let image = tdvf(&list);
    let store = |bytes: u64| {
        let mut store = vec![0xFF; 0x1800];
        store[0x20..0x28].copy_from_slice(&bytes.to_le_bytes());
        store[0x28..0x2C].copy_from_slice(b"_FVH");
        store
    };
    let changed = with_variables(&image, &store(0x1000)).unwrap();
    assert_eq!(changed[..0x1000], store(0x1000)[..0x1000]);
    assert_eq!(changed[0x1000..], image[0x1000..]);
    let mut unmarked = store(0x1000);
    unmarked[0x28] = 0;
    let short = store(0x1000)[..0xFFF].to_vec();
    for bad in [store(0x2000), unmarked, short, Vec::new()] {
        let error = with_variables(&image, &bad).unwrap_err();
        assert!(matches!(error, Error::TdFirmware { .. }), "{error}");
    }
    let error = with_variables(&tdvf(&good()), &store(0x1000)).unwrap_err();
    assert!(matches!(error, Error::TdFirmware { .. }), "{error}");
}

/// What a touch leads to is told to the paravisor of a trust domain alone: no other hears of one.
#[test]
fn memory_is_accepted_on_touch_in_trust_domains_only() {
    let (elf, td_bytes) = (program(), tdvf(&good()));
    let td_firmware = TdFirmware::parse(&td_bytes).unwrap();
    let program = Program::parse(&elf).unwrap();
    let options = Options {
        acceptance: Acceptance {
            touch: Touch::ACCEPT,
            ..Acceptance::LAZY
        },
        ..Options::default()
    };
    let error = build(&program, None, None, &options).unwrap_err();
    assert!(matches!(error, Error::TouchWithoutTd));
    let image = build(&program, None, Some(&td_firmware), &options).unwrap();
    let bytes = page(&image, image.layout.params);
    let params = LaunchParams::read_from_bytes(&bytes).unwrap();
    assert_eq!(params.touch, Touch::ACCEPT);
    // To SEV-SNP the image is what it was.
    let plain = build(&program, None, Some(&td_firmware), &Options::default()).unwrap();
    assert_eq!(image.digest, plain.digest);
    assert_ne!(image.mrtd, plain.mrtd);
}

#[test]
fn a_paravisor_without_a_start_for_it_is_refused() {
    let (elf, td_bytes) = (paravisor(), tdvf(&good()));
    let td_firmware = TdFirmware::parse(&td_bytes).unwrap();
    let program = Program::parse(&elf).unwrap();
    let error = build(&program, None, Some(&td_firmware), &Options::default()).unwrap_err();
    assert!(matches!(error, Error::NoTdStart { .. }));
}
