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
use support::{
    AREAS, CERTIFICATE, FIRMWARE_SIZE, SHA256, X509, certificate_list, efi_program, ovmf,
    paravisor, signature_list,
};
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
        .map(|&(kind, bytes)| Item::new(kind, bytes))
        .collect::<Result<_, _>>()?;
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
    let (key, kernel) = (certificate_list(), efi_program(0x1001, 0x4B));
    let items: [(_, &[u8]); 2] = [(IgvmDataKind::PK, &key), (IgvmDataKind::KERNEL, &kernel)];
    let image = build(&with_hob_area(), &items).unwrap();
    assert_eq!(DATA_GPA, REGION_GPA + REGION_SIZE);

    let list = page(&image, DATA_GPA).unwrap();
    let (first, rest) = IgvmData::read_from_prefix(&list).unwrap();
    let (second, rest) = IgvmData::read_from_prefix(rest).unwrap();
    let (end, _) = Header::read_from_prefix(rest).unwrap();
    let bytes = key.len() as u64;
    assert_eq!(
        first,
        IgvmData::new(IgvmDataKind::PK, DATA_GPA + 0x1000, bytes)
    );
    assert_eq!(
        second,
        IgvmData::new(IgvmDataKind::KERNEL, DATA_GPA + 0x2000, 0x1001)
    );
    assert_eq!((end.kind, end.length), (HobType::END.0, 8));
    // As the firmware reads it: type and length, then a GUID (UEFI PI, GUID extension).
    assert_eq!(list[..8], [4, 0, 48, 0, 0, 0, 0, 0]);
    let guid = Guid::from_text("3dd177ff-b632-4e25-bef3-065063d55fc4");
    assert_eq!(&list[8..24], guid.as_bytes());

    let keys = page(&image, DATA_GPA + 0x1000).unwrap();
    assert!(keys.starts_with(&key) && keys[key.len()] == 0);
    assert_eq!(page(&image, DATA_GPA + 0x2000).unwrap(), kernel[..0x1000]);
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
    let (one, other) = (with(&efi_program(0x400, 1)), with(&efi_program(0x400, 2)));
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
    let program = efi_program(0x400, 0);
    let kernel: (_, &[u8]) = (IgvmDataKind::KERNEL, &program);
    let old = build(&ovmf(Some(&AREAS)), &[kernel]).unwrap_err();
    assert!(matches!(old, Error::NoDataArea), "{old}");
    let large = efi_program((128 << 20) + 1, 0);
    let two_keys = certificate_list().repeat(2);
    for (items, expected) in [
        (&[kernel, kernel][..], "KERNEL comes twice"),
        (&[(IgvmDataKind::PK, &two_keys)], "2 platform keys"),
        (&[(IgvmDataKind::KERNEL, &large)], "at most 134217728"),
    ] {
        let error = build(&with_hob_area(), items).unwrap_err();
        assert!(matches!(error, Error::BadData { .. }), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    }
}

/// A copy with other bytes at an offset.
fn changed(bytes: &[u8], at: usize, to: &[u8]) -> Vec<u8> {
    let mut changed = bytes.to_vec();
    changed[at..at + to.len()].copy_from_slice(to);
    changed
}

#[test]
fn lists_of_signatures_are_walked_to_their_end() {
    let hashes = signature_list(SHA256, &[&[1; 32], &[2; 32], &[3; 32]]);
    let several = [certificate_list(), hashes.clone(), certificate_list()].concat();
    for good in [&hashes, &several] {
        for kind in [IgvmDataKind::KEK, IgvmDataKind::DB, IgvmDataKind::DBX] {
            Item::new(kind, good).unwrap();
        }
    }
    let one = certificate_list();
    let second = one.len();
    let words = |words: [u32; 3]| words.map(u32::to_le_bytes).concat();
    let update = [&[0; 20][..], &[0x00, 0x02, 0xF1, 0x0E], &one].concat();
    for (bytes, offset, reason) in [
        (Vec::new(), 0, "0 bytes"),
        (b"-----BEGIN CERTIFICATE-----\n".to_vec(), 0, "PEM"),
        (CERTIFICATE.to_vec(), 0, "a certificate by itself"),
        (update, 0, "a signed update"),
        (
            b"these are no keys, but a note about them".to_vec(),
            0,
            "unknown kind",
        ),
        (one[..27].to_vec(), 0, "27 bytes"),
        (changed(&several, second, &[0]), second, "unknown kind"),
        // Sizes: of the list, of the header, of a signature.
        (
            changed(&one, 16, &words([57, 0, 28])),
            16,
            "a list of 57 bytes, 56 are left",
        ),
        (
            changed(&one, 16, &words([27, 0, 28])),
            16,
            "a list of 27 bytes",
        ),
        (
            changed(&one, 16, &words([u32::MAX, 0, 28])),
            16,
            "a list of 4294967295",
        ),
        (
            changed(&one, 16, &words([28, 0, 28])),
            24,
            "signatures of 28 bytes in 0",
        ),
        (
            changed(&one, 16, &words([56, 4, 24])),
            20,
            "a header of 4 bytes",
        ),
        (
            changed(&one, 16, &words([56, 0, 27])),
            24,
            "signatures of 27 bytes in 28",
        ),
        (
            changed(&one, 16, &words([56, 0, 14])),
            24,
            "signatures of 14 bytes",
        ),
        (
            changed(&one, 16, &words([56, 0, 0])),
            24,
            "signatures of 0 bytes",
        ),
        (
            signature_list(SHA256, &[&[1; 31]]),
            24,
            "signatures of 47 bytes",
        ),
        (
            signature_list(X509, &[&CERTIFICATE, b"-----BEGIN C"]),
            28 + 28 + 16,
            "not in DER",
        ),
        ([one.clone(), vec![0; 3]].concat(), second, "3 bytes"),
    ] {
        let error = Item::new(IgvmDataKind::DB, &bytes).unwrap_err();
        let text = error.to_string();
        assert!(
            matches!(error, Error::NotSignatures { offset: at, .. } if at == offset),
            "{text}"
        );
        for expected in [
            reason,
            &format!("offset {offset:#x}:"),
            "cert-to-efi-sig-list",
        ] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
    }
}

/// Every length, and every byte changed in turn: an error or none, but an answer.
#[test]
fn spoiled_lists_and_programs_bring_nothing_down() {
    let lists = [
        certificate_list(),
        signature_list(SHA256, &[&[1; 32], &[2; 32]]),
    ];
    for (kind, good) in [
        (IgvmDataKind::DB, lists.concat()),
        (IgvmDataKind::KERNEL, efi_program(0x190, 0)),
    ] {
        for at in 0..good.len() {
            let _ = Item::new(kind, &good[..at]);
            for value in [0, 1, 0x7F, 0x80, 0xFF, good[at] ^ 4] {
                let _ = Item::new(kind, &changed(&good, at, &[value]));
            }
        }
    }
}

#[test]
fn programs_are_for_this_processor_and_a_firmware() {
    let good = efi_program(0x400, 0);
    Item::new(IgvmDataKind::KERNEL, &good).unwrap();
    for (bytes, offset, reason) in [
        (Vec::new(), 0, "MZ"),
        (b"this is no UKI".to_vec(), 0, "MZ"),
        (paravisor(), 0, "MZ"),
        (good[..0x81].to_vec(), 0x80, ""),
        (good[..0x100].to_vec(), 0x80, ""),
        (changed(&good, 0x3C, &[0xFF; 4]), u32::MAX as usize, ""),
        (changed(&good, 0x80, b"NE"), 0x80, "PE"),
        // Of 32 bits.
        (changed(&good, 0x98, &[0x0B, 0x01]), 0x80, "optional header"),
        (changed(&good, 0x84, &[0x64, 0xAA]), 0x84, "0xaa64"),
        (changed(&good, 0x98 + 68, &[3]), 0x98 + 68, "subsystem 3"),
    ] {
        let error = Item::new(IgvmDataKind::KERNEL, &bytes).unwrap_err();
        let text = error.to_string();
        assert!(
            matches!(error, Error::NotEfiProgram { offset: at, .. } if at == offset),
            "{text}"
        );
        assert!(
            text.contains(reason) && text.contains("x86-64") && text.contains("ukify"),
            "{text}"
        );
    }
}
