//! A built image is parsed again and judged by what is in it.

mod support;

use igvm::{
    IgvmDirectiveHeader as Directive, IgvmFile, IgvmInitializationHeader, IgvmPlatformHeader,
    IsolationType,
};
use igvm_build::elf::Program;
use igvm_build::firmware::Firmware;
use igvm_build::image::{Image, Options, build};
use igvm_build::show::show;
use igvm_build::sidecar::Sidecar;
use igvm_defs::{IgvmPageDataType, IgvmPlatformType};
use protocols::launch::{Fault, LaunchParams, REGION_GPA, REGION_SIZE, SectionKind};
use sha2::{Digest, Sha384};
use support::{AREAS, ENTRY, FIRMWARE_SIZE, MAP_DESCRIPTOR, ovmf, paravisor};
use zerocopy::FromBytes;

const OPTIONS: fn() -> Options = || Options {
    c_bit: 47,
    ..Options::default()
};

fn image(options: &Options) -> Image {
    let (elf, firmware) = (paravisor(), ovmf(Some(&AREAS)));
    let firmware = Firmware::parse(&firmware).unwrap();
    build(
        &Program::parse(&elf).unwrap(),
        Some(&firmware),
        None,
        options,
    )
    .unwrap()
}

fn directives(bytes: &[u8]) -> Vec<Directive> {
    IgvmFile::new_from_binary(bytes, Some(IsolationType::Snp))
        .unwrap()
        .directives()
        .to_vec()
}

/// (address, data) of all pages.
fn pages(bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
    directives(bytes)
        .into_iter()
        .filter_map(|directive| match directive {
            Directive::PageData { gpa, mut data, .. } => {
                data.resize(4096, 0);
                Some((gpa, data))
            }
            _ => None,
        })
        .collect()
}

fn page(bytes: &[u8], gpa: u64) -> Vec<u8> {
    pages(bytes)
        .into_iter()
        .find(|page| page.0 == gpa)
        .unwrap()
        .1
}

#[test]
fn the_same_inputs_give_the_same_bytes() {
    let first = image(&OPTIONS());
    let second = image(&OPTIONS());
    assert!(first.bytes == second.bytes);
    assert_eq!(first.digest, second.digest);
    let other = image(&Options {
        fault: Fault::SKIP_SCRUB,
        ..OPTIONS()
    });
    assert_ne!(first.digest, other.digest);
}

/// Written apart from `igvm_build::measure`, over the parsed file, with its own record.
#[test]
fn the_digest_is_that_of_the_file() {
    let image = image(&OPTIONS());
    let mut digest = [0u8; 48];
    let mut add = |kind: u8, gpa: u64, contents: Option<&[u8]>| {
        let contents = contents.map_or([0; 48], |data| Sha384::digest(data).into());
        let mut record = Vec::new();
        record.extend(digest);
        record.extend(contents);
        record.extend([0x70, 0, kind, 0, 0, 0, 0, 0]);
        record.extend(gpa.to_le_bytes());
        assert_eq!(record.len(), 0x70);
        digest = Sha384::digest(&record).into();
    };
    let mut sizes = [0; 2];
    for directive in directives(&image.bytes) {
        match directive {
            Directive::ParameterArea {
                number_of_bytes,
                parameter_area_index,
                ..
            } => {
                sizes[parameter_area_index as usize] = number_of_bytes;
            }
            Directive::ParameterInsert(insert) => {
                let size = sizes[insert.parameter_area_index as usize];
                (insert.gpa..insert.gpa + size)
                    .step_by(4096)
                    .for_each(|gpa| add(4, gpa, None));
            }
            Directive::PageData {
                gpa,
                data_type,
                mut data,
                ..
            } => match data_type {
                IgvmPageDataType::SECRETS => add(5, gpa, None),
                IgvmPageDataType::CPUID_DATA => add(6, gpa, None),
                _ => {
                    data.resize(4096, 0);
                    add(1, gpa, Some(&data));
                }
            },
            Directive::SnpVpContext { gpa, vmsa, .. } => {
                add(2, gpa, Some(zerocopy::IntoBytes::as_bytes(&*vmsa)));
            }
            _ => {}
        }
    }
    assert_eq!(image.digest, digest);
}

/// What QEMU ≥ 10.1 takes, in the order that makes its launch order that of the file.
#[test]
fn directives_are_qemus_in_qemus_order() {
    let bytes = image(&OPTIONS()).bytes;
    let file = IgvmFile::new_from_binary(&bytes, None).unwrap();
    let platforms: Vec<_> = file
        .platforms()
        .iter()
        .map(|IgvmPlatformHeader::SupportedPlatform(platform)| {
            assert_eq!(platform.shared_gpa_boundary, 0);
            platform.platform_type
        })
        .collect();
    assert_eq!(
        platforms,
        [IgvmPlatformType::SEV_SNP, IgvmPlatformType::NATIVE]
    );
    let [IgvmInitializationHeader::GuestPolicy { policy, .. }] = file.initializations() else {
        panic!("one policy expected");
    };
    assert_eq!(*policy, 0x3_0000);

    // 0: at once; 1: pages; 2: processors.
    let rank = |directive: &Directive| match directive {
        Directive::ParameterArea { .. }
        | Directive::MemoryMap(_)
        | Directive::VpCount(_)
        | Directive::ParameterInsert(_)
        | Directive::RequiredMemory { .. } => 0,
        Directive::PageData { .. } => 1,
        Directive::SnpVpContext { .. } | Directive::X64NativeVpContext { .. } => 2,
        other => panic!("QEMU does not know {other}"),
    };
    assert!(file.directives().is_sorted_by_key(rank));
    assert_eq!(file.directives().iter().filter(|d| rank(d) == 2).count(), 2);
    let pages = pages(&bytes);
    assert!(pages.is_sorted_by(|a, b| a.0 < b.0));
    assert_eq!(pages.last().unwrap().0, (1 << 32) - 4096);
}

#[test]
fn the_whole_region_is_launched_or_required() {
    let image = image(&OPTIONS());
    let mut next = REGION_GPA;
    let mut covered: Vec<(u64, u64)> = pages(&image.bytes)
        .into_iter()
        .map(|(gpa, _)| (gpa, 4096))
        .filter(|page| page.0 < REGION_GPA + REGION_SIZE)
        .collect();
    for directive in directives(&image.bytes) {
        match directive {
            Directive::RequiredMemory {
                gpa,
                number_of_bytes,
                ..
            } => {
                assert_eq!(gpa, image.layout.image_end);
                covered.push((gpa, number_of_bytes.into()));
            }
            Directive::ParameterInsert(insert) => {
                let bytes = if insert.parameter_area_index == 0 {
                    0x4000
                } else {
                    0x1000
                };
                covered.push((insert.gpa, bytes));
            }
            _ => {}
        }
    }
    covered.sort_unstable();
    for (gpa, bytes) in covered {
        assert_eq!(gpa, next);
        next += bytes;
    }
    assert_eq!(next, REGION_GPA + REGION_SIZE);
}

#[test]
fn the_paravisor_is_told_where_everything_is() {
    let image = image(&OPTIONS());
    let layout = image.layout;
    let params = LaunchParams::read_from_bytes(&page(&image.bytes, layout.params)).unwrap();
    assert!(params.is_understood());
    assert_eq!((params.c_bit, params.image_end), (47, layout.image_end));
    assert_eq!(
        (params.region_gpa, params.region_size),
        (REGION_GPA, REGION_SIZE)
    );
    assert_eq!(params.page_table_root, layout.page_tables);
    assert_eq!(
        (params.secrets_gpa, params.cpuid_gpa),
        (layout.secrets, layout.cpuid)
    );
    assert_eq!(
        (params.memory_map_gpa, params.memory_map_size),
        (layout.memory_map, 0x4000)
    );
    assert_eq!(params.general_gpa, layout.general);
    assert_eq!(params.firmware_gpa, (1 << 32) - FIRMWARE_SIZE as u64);
    assert_eq!(params.firmware_size, FIRMWARE_SIZE as u64);
    assert_eq!(params.firmware_reset_eip, 0xFFFF_FFF0);
    assert_eq!(params.sections().len(), AREAS.len());
    assert_eq!(params.sections()[4].kind, SectionKind::SVSM_CAA);
    assert_eq!(params.sections()[4].gpa, 0x80_F000);
    assert_eq!(params.fault, Fault::NONE);
}

#[test]
fn the_first_processor_starts_in_the_program() {
    let image = image(&OPTIONS());
    let vmsa = directives(&image.bytes)
        .into_iter()
        .find_map(|directive| match directive {
            Directive::SnpVpContext {
                gpa,
                vp_index,
                vmsa,
                ..
            } => {
                assert_eq!((gpa, vp_index), (0xFFFF_FFFF_F000, 0));
                Some(vmsa)
            }
            _ => None,
        })
        .unwrap();
    assert_eq!(
        (vmsa.rip, vmsa.rdi, vmsa.rsp),
        (ENTRY, image.layout.params, 0)
    );
    assert_eq!(vmsa.cr3, image.layout.page_tables | 1 << 47);
    assert_eq!((vmsa.cr0, vmsa.cr4, vmsa.efer), (0x8001_0031, 0x20, 0x1D00));
    assert_eq!((vmsa.vmpl, vmsa.rflags), (0, 2));
    assert_eq!(u64::from(vmsa.sev_features), 1);
    assert_eq!((vmsa.cs.attrib, vmsa.ss.attrib), (0xA9B, 0xC93));
}

#[test]
fn an_image_needs_no_firmware() {
    let elf = paravisor();
    let image = build(&Program::parse(&elf).unwrap(), None, None, &OPTIONS()).unwrap();
    assert!(
        pages(&image.bytes)
            .iter()
            .all(|page| page.0 < REGION_GPA + REGION_SIZE)
    );
    let params = LaunchParams::read_from_bytes(&page(&image.bytes, image.layout.params)).unwrap();
    assert_eq!((params.firmware_size, params.section_count), (0, 0));
}

#[test]
fn descriptions_say_what_is_in_the_file() {
    let image = image(&OPTIONS());
    let text = show(&image.bytes).unwrap();
    let sidecar = Sidecar::new(&image, 47, Some("OVMF.fd".to_owned()));
    assert_eq!(sidecar.digest.len(), 96);
    for expected in [
        &*sidecar.digest,
        "secrets",
        "CPUID",
        "SVSM_CAA",
        "0xfffffffff000",
        "zero",
    ] {
        assert!(text.contains(expected), "{expected} in\n{text}");
    }
    assert_eq!(sidecar.map_descriptor, Some(MAP_DESCRIPTOR));
    assert_eq!(sidecar.image_bytes, image.bytes.len() as u64);
    let json = serde_json::to_string(&sidecar).unwrap();
    assert_eq!(serde_json::from_str::<Sidecar>(&json).unwrap(), sidecar);
}

mod page_tables {
    use super::*;

    const C_BIT: u64 = 1 << 47;

    /// Walks the tables of the image from CR3 as the processor does: (leaf, all levels'
    /// writable and no-execute bits combined).
    fn walk(bytes: &[u8], root: u64, address: u64) -> Option<u64> {
        let mut table = root;
        for shift in [39, 30, 21, 12] {
            let index = (address >> shift & 511) as usize;
            let page = page(bytes, table);
            let entry = u64::from_le_bytes(page[index * 8..][..8].try_into().unwrap());
            if entry & 1 == 0 {
                return None;
            }
            assert_ne!(entry & C_BIT, 0, "{address:#x} is shared at level {shift}");
            assert_eq!(entry & 1 << 2, 0, "{address:#x} is a user page");
            if shift == 12 {
                return Some(entry);
            }
            table = entry & 0x000F_FFFF_FFFF_F000 & !C_BIT;
        }
        None
    }

    #[test]
    fn the_region_is_mapped_private_and_nothing_is_writable_code() {
        let image = image(&OPTIONS());
        let root = image.layout.page_tables;
        for gpa in (REGION_GPA..REGION_GPA + REGION_SIZE).step_by(4096) {
            let leaf = walk(&image.bytes, root, gpa).unwrap();
            assert_eq!(leaf & 0x0007_FFFF_FFFF_F000 & !C_BIT, gpa);
            let (writable, executable) = (leaf & 2 != 0, leaf >> 63 == 0);
            // As the segments of `support::loads` are: two pages of code, one of constants.
            let expected = match (gpa - REGION_GPA) / 4096 {
                0 | 1 => (false, true),
                2 => (false, false),
                _ => (true, false),
            };
            assert_eq!((writable, executable), expected, "{gpa:#x}");
        }
    }

    #[test]
    fn nothing_else_is_mapped() {
        let image = image(&OPTIONS());
        let root = image.layout.page_tables;
        for address in [
            0,
            REGION_GPA - 4096,
            REGION_GPA + REGION_SIZE,
            REGION_GPA + (1 << 30),
            (1 << 32) - 4096,
            REGION_GPA | 1 << 47,
        ] {
            assert_eq!(walk(&image.bytes, root, address), None, "{address:#x}");
        }
    }
}
