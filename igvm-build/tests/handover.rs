//! What the firmware is handed: where it lies, who is told, and what is refused.

mod support;

use igvm_build::elf::Program;
use igvm_build::error::Error;
use igvm_build::file::{Content, File};
use igvm_build::firmware::Firmware;
use igvm_build::handover::{DATA_GPA, Item};
use igvm_build::image::{Image, NATIVE_MASK, Options, SNP_MASK, build_with_data};
use igvm_defs::IgvmPlatformType;
use protocols::guid::Guid;
use protocols::hob::{Header, HobType, IgvmData, IgvmDataKind};
use protocols::launch::{LaunchParams, REGION_GPA, REGION_SIZE};
use protocols::ovmf::{IGVM_METADATA_GUID, IGVM_SIGNATURE};
use support::{AREAS, FIRMWARE_SIZE, ovmf, paravisor};
use zerocopy::{FromBytes, IntoBytes};

/// Where the firmware of these tests looks for the list.
const HOB_AREA: u32 = 0x82_0000;

/// A firmware that says where it looks: its metadata, and an entry of its table before the last one.
fn with_hob_area() -> Vec<u8> {
    const FROM_END: u32 = 1024;
    let mut image = ovmf(Some(&AREAS));
    let words = [28, 1, 1, HOB_AREA, 0x1000, 0x200].map(u32::to_le_bytes);
    let metadata = [&IGVM_SIGNATURE[..], words.as_flattened()].concat();
    let at = FIRMWARE_SIZE - FROM_END as usize;
    image[at..at + metadata.len()].copy_from_slice(&metadata);
    // The table grows downwards from its footer, which has its length: of two entries and itself.
    let end = FIRMWARE_SIZE - 32;
    let length = u16::from_le_bytes([image[end - 18], image[end - 17]]);
    let entry = [
        &FROM_END.to_le_bytes()[..],
        &22u16.to_le_bytes(),
        IGVM_METADATA_GUID.as_bytes(),
    ]
    .concat();
    let start = end - usize::from(length);
    image[start - entry.len()..start].copy_from_slice(&entry);
    let longer = length + entry.len() as u16;
    image[end - 18..end - 16].copy_from_slice(&longer.to_le_bytes());
    image
}

fn build(firmware: &[u8], items: &[(IgvmDataKind, &[u8])]) -> Result<Image, Error> {
    let elf = paravisor();
    let firmware = Firmware::parse(firmware).unwrap();
    let items: Vec<Item<'_>> = items
        .iter()
        .map(|&(kind, bytes)| Item { kind, bytes })
        .collect();
    let program = Program::parse(&elf).unwrap();
    build_with_data(&program, Some(&firmware), None, &items, &Options::default())
}

/// The page at an address, for SEV-SNP.
fn page(image: &Image, gpa: u64) -> Option<Vec<u8>> {
    let file = File::read(&image.bytes).unwrap();
    file.of_platform(SNP_MASK)
        .find_map(|header| match &header.content {
            Content::Page(page) if page.gpa == gpa => {
                let mut data = file
                    .page_data(header, page)
                    .unwrap()
                    .unwrap_or(&[])
                    .to_vec();
                data.resize(4096, 0);
                Some(data)
            }
            _ => None,
        })
}

#[test]
fn each_piece_is_listed_and_lies_on_pages_of_its_own() {
    let kernel = vec![0x4B; 0x1001];
    let items: [(_, &[u8]); 2] = [(IgvmDataKind::PK, b"key"), (IgvmDataKind::KERNEL, &kernel)];
    let image = build(&with_hob_area(), &items).unwrap();
    assert_eq!(DATA_GPA, REGION_GPA + REGION_SIZE);

    let list = page(&image, DATA_GPA).unwrap();
    let (first, rest) = IgvmData::read_from_prefix(&list).unwrap();
    let (second, rest) = IgvmData::read_from_prefix(rest).unwrap();
    let (end, _) = Header::read_from_prefix(rest).unwrap();
    assert_eq!(first, IgvmData::new(IgvmDataKind::PK, DATA_GPA + 0x1000, 3));
    assert_eq!(
        second,
        IgvmData::new(IgvmDataKind::KERNEL, DATA_GPA + 0x2000, 0x1001)
    );
    assert_eq!((end.kind, end.length), (HobType::END.0, 8));
    // As the firmware reads it: type and length, then a GUID (UEFI PI, GUID extension).
    assert_eq!(list[..8], [4, 0, 48, 0, 0, 0, 0, 0]);
    let guid = Guid::from_text("3dd177ff-b632-4e25-bef3-065063d55fc4");
    assert_eq!(&list[8..24], guid.as_bytes());

    assert_eq!(&page(&image, DATA_GPA + 0x1000).unwrap()[..4], b"key\0");
    assert_eq!(page(&image, DATA_GPA + 0x2000).unwrap(), vec![0x4B; 0x1000]);
    assert_eq!(page(&image, DATA_GPA + 0x3000).unwrap()[..2], [0x4B, 0]);
    assert_eq!(page(&image, DATA_GPA + 0x4000), None);

    let params = page(&image, image.layout.params).unwrap();
    let params = LaunchParams::read_from_bytes(&params).unwrap();
    assert_eq!((params.data_gpa, params.data_size), (DATA_GPA, 0x4000));
    assert_eq!(params.igvm_hob_gpa, HOB_AREA.into());
}

#[test]
fn it_is_measured_and_for_sev_snp_alone() {
    let firmware = with_hob_area();
    let with = |bytes: &[u8]| build(&firmware, &[(IgvmDataKind::KERNEL, bytes)]).unwrap();
    let none = build(&firmware, &[]).unwrap();
    let (one, other) = (with(b"one"), with(b"other"));
    assert_ne!(one.digest, other.digest);
    assert_ne!(one.digest, none.digest);
    assert_eq!(page(&none, DATA_GPA), None);
    let file = File::read(&one.bytes).unwrap();
    assert_eq!(file.mask_of(IgvmPlatformType::NATIVE), Some(NATIVE_MASK));
    let natively = file
        .of_platform(NATIVE_MASK)
        .any(|header| matches!(&header.content, Content::Page(page) if page.gpa == DATA_GPA));
    assert!(!natively);
    assert_eq!(igvm_build::check::check(&one.bytes, Default::default()), []);
}

#[test]
fn what_cannot_be_handed_over_is_refused() {
    let kernel: (_, &[u8]) = (IgvmDataKind::KERNEL, b"kernel");
    let old = build(&ovmf(Some(&AREAS)), &[kernel]).unwrap_err();
    assert!(matches!(old, Error::NoDataArea), "{old}");
    let large = vec![0; (128 << 20) + 1];
    for (items, expected) in [
        (&[kernel, kernel][..], "KERNEL comes twice"),
        (&[(IgvmDataKind::DB, &[])], "DB is empty"),
        (&[(IgvmDataKind::KERNEL, &large)], "at most 134217728"),
    ] {
        let error = build(&with_hob_area(), items).unwrap_err();
        assert!(matches!(error, Error::BadData { .. }), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    }
}
