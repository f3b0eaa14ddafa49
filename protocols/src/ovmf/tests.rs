//! The parser on good images, on hostile ones, and on noise.

use std::vec;
use std::vec::Vec;

use proptest::prelude::*;
use zerocopy::IntoBytes;

use super::*;

const SIZE: usize = 0x1000;

/// One entry of the table, in stored order.
fn entry(guid: Guid, data: &[u8]) -> Vec<u8> {
    let length = (data.len() + size_of::<TableEntryTail>()) as u16;
    let tail = TableEntryTail {
        length: length.into(),
        guid,
    };
    [data, tail.as_bytes()].concat()
}

/// A list of areas with its head.
fn list(signature: [u8; 4], areas: &[Area]) -> Vec<u8> {
    let size = (size_of::<MetadataHeader>() + size_of_val(areas)) as u32;
    let header = MetadataHeader {
        signature,
        size: size.into(),
        version: METADATA_VERSION.into(),
        count: (areas.len() as u32).into(),
    };
    [header.as_bytes(), areas.as_bytes()].concat()
}

fn area(gpa: u32, size: u32, kind: u32) -> Area {
    Area {
        gpa: gpa.into(),
        size: size.into(),
        kind: kind.into(),
    }
}

/// An image of [`SIZE`] bytes whose table has these entries.
fn image(entries: &[Vec<u8>]) -> Vec<u8> {
    let entries = entries.concat();
    let length = (entries.len() + size_of::<TableEntryTail>()) as u16;
    let footer = TableEntryTail {
        length: length.into(),
        guid: FOOTER_GUID,
    };
    let table = [entries.as_slice(), footer.as_bytes()].concat();
    let mut image = vec![0; SIZE];
    image[SIZE - FOOTER_END - table.len()..SIZE - FOOTER_END].copy_from_slice(&table);
    image
}

/// A good image, and where its SEV metadata begin.
fn good_image() -> (Vec<u8>, usize) {
    let sections = [
        area(0x80_0000, 0x9000, 1),
        area(0x80_D000, 0x1000, 2),
        area(0x80_F000, 0x1000, 4),
    ];
    let igvm = [
        area(0x81_2000, 0x1000, 0x100),
        area(0x81_3000, 0x1000, 0x200),
    ];
    let mut image = image(&[
        entry(IGVM_METADATA_GUID, &0x700u32.to_le_bytes()),
        entry(
            Guid::from_text("00000000-0000-0000-0000-000000000001"),
            b"odd",
        ),
        entry(SEV_METADATA_GUID, &0x800u32.to_le_bytes()),
        entry(RESET_BLOCK_GUID, &0x80_B004u32.to_le_bytes()),
    ]);
    for (from_end, list) in [
        (0x800, list(SEV_SIGNATURE, &sections)),
        (0x700, list(IGVM_SIGNATURE, &igvm)),
    ] {
        image[SIZE - from_end..SIZE - from_end + list.len()].copy_from_slice(&list);
    }
    (image, SIZE - 0x800)
}

fn set_u32(image: &mut [u8], at: usize, value: u32) {
    image[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

#[test]
fn a_good_image_is_read_in_order() {
    let (image, _) = good_image();
    let metadata = Metadata::parse(&image).unwrap();
    assert_eq!(metadata.ap_reset_eip, Some(0x80_B004));
    assert_eq!(metadata.sections.len(), 3);
    assert_eq!(metadata.sections[0], area(0x80_0000, 0x9000, 1));
    assert_eq!(
        metadata.section(SectionKind::SVSM_CAA).unwrap().gpa.get(),
        0x80_F000
    );
    assert_eq!(metadata.section(SectionKind::KERNEL_HASHES), None);
    let hob = metadata.igvm_area(IgvmAreaKind::HOB_AREA).unwrap();
    assert_eq!(hob.gpa.get(), 0x81_3000);
}

#[test]
fn an_image_without_igvm_metadata_is_good_too() {
    let mut image = image(&[entry(SEV_METADATA_GUID, &0x800u32.to_le_bytes())]);
    let list = list(SEV_SIGNATURE, &[]);
    image[SIZE - 0x800..SIZE - 0x800 + list.len()].copy_from_slice(&list);
    let metadata = Metadata::parse(&image).unwrap();
    assert_eq!((metadata.sections.len(), metadata.igvm_areas.len()), (0, 0));
    assert_eq!(metadata.ap_reset_eip, None);
}

#[test]
fn images_without_a_table_are_refused() {
    assert_eq!(Metadata::parse(&[]), Err(MetadataError::NoFooter));
    assert_eq!(Metadata::parse(&[0; 49]), Err(MetadataError::NoFooter));
    assert_eq!(Metadata::parse(&[0; SIZE]), Err(MetadataError::NoFooter));
}

#[test]
fn images_without_sev_metadata_are_refused() {
    let image = image(&[entry(RESET_BLOCK_GUID, &0u32.to_le_bytes())]);
    assert_eq!(Metadata::parse(&image), Err(MetadataError::NoSevMetadata));
}

#[test]
fn every_truncation_is_an_error() {
    let (image, _) = good_image();
    for start in 1..SIZE {
        let cut = &image[start..];
        // Cut from the front: good until the cut reaches the metadata.
        match Metadata::parse(cut) {
            Ok(_) => assert!(cut.len() >= 0x800),
            Err(_) => assert!(cut.len() < 0x800),
        }
        assert!(Metadata::parse(&image[..start]).is_err());
    }
}

#[test]
fn lengths_of_the_table_are_checked() {
    let (good, _) = good_image();
    let length_at = SIZE - FOOTER_END - size_of::<TableEntryTail>();
    for length in [0u16, 17, u16::MAX] {
        let mut image = good.clone();
        image[length_at..length_at + 2].copy_from_slice(&length.to_le_bytes());
        assert_eq!(
            Metadata::parse(&image),
            Err(MetadataError::TableLength(length.into()))
        );
    }
    let last_entry_at = length_at - size_of::<TableEntryTail>();
    for length in [0u16, 17, 0x1000, u16::MAX] {
        let mut image = good.clone();
        image[last_entry_at..last_entry_at + 2].copy_from_slice(&length.to_le_bytes());
        let error = MetadataError::EntryLength {
            guid: RESET_BLOCK_GUID,
            length: length.into(),
        };
        assert_eq!(Metadata::parse(&image), Err(error));
    }
}

#[test]
fn the_list_of_areas_stays_inside_the_image() {
    let (good, list_at) = good_image();
    let bad = MetadataError::BadList {
        guid: SEV_METADATA_GUID,
        from_end: 0x800,
    };
    // Counts that wrap when multiplied, that leave the image, and that leave the list.
    for count in [u32::MAX, 0x1555_5556, 0x1000, 4] {
        let mut image = good.clone();
        set_u32(&mut image, list_at + 12, count);
        assert_eq!(Metadata::parse(&image), Err(bad), "count {count:#x}");
    }
    for (offset, value) in [(0, 0), (4, 15), (8, 2)] {
        let mut image = good.clone();
        set_u32(&mut image, list_at + offset, value);
        assert_eq!(Metadata::parse(&image), Err(bad), "offset {offset}");
    }
    // A huge size does no harm: the count decides.
    let mut image = good.clone();
    set_u32(&mut image, list_at + 4, u32::MAX);
    assert!(Metadata::parse(&image).is_ok());
}

#[test]
fn lists_outside_the_image_are_refused() {
    for from_end in [0, 1, 15, SIZE as u32 + 1, u32::MAX] {
        let image = image(&[entry(SEV_METADATA_GUID, &from_end.to_le_bytes())]);
        let error = MetadataError::BadList {
            guid: SEV_METADATA_GUID,
            from_end,
        };
        assert_eq!(Metadata::parse(&image), Err(error));
    }
}

proptest! {
    #[test]
    fn noise_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        let _ = Metadata::parse(&bytes);
    }

    #[test]
    fn damaged_images_never_panic(
        damage in proptest::collection::vec((0usize..SIZE, any::<u8>()), 1..8),
        near_end in proptest::collection::vec((SIZE - 200..SIZE, any::<u8>()), 0..8),
        from in 0usize..SIZE,
    ) {
        let (mut image, _) = good_image();
        for (at, value) in damage.into_iter().chain(near_end) {
            image[at] = value;
        }
        let _ = Metadata::parse(&image);
        let _ = Metadata::parse(&image[from..]);
    }
}
