//! What a firmware for trust domains says about itself: TDVF metadata (TDVF design guide; OVMF,
//! `ResetVector/X64/IntelTdxMetadata.asm`).
//!
//! The table of GUIDs at the image's end ([`crate::ovmf`]) leads to a list of sections: which bytes of
//! the image go where, and which memory must be there before the firmware runs. [`sections`] reads it
//! from any bytes: it never panics and never looks outside the image.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::guid::Guid;
use crate::ovmf::{self, MetadataError};

/// GUID of the entry that leads to the list (u32 distance from the end of the image). The list itself
/// stands behind another GUID, e9eaf9f3-168e-44d5-a8eb-7f4d8738f6ae, which no entry has.
pub const METADATA_GUID: Guid = Guid::from_text("e47a6535-984a-4798-865e-4685a7bf8ec2");
/// First bytes of the list.
pub const SIGNATURE: [u8; 4] = *b"TDVF";
/// Version of its layout.
pub const VERSION: u32 = 1;

open_enum! {
    /// What a section is.
    pub struct SectionKind(u32) {
        /// The firmware's code: bytes of the image, measured by the launch.
        BFV = 0,
        /// Its variables: bytes of the image.
        CFV = 1,
        /// Where it looks for the list of hand-off blocks.
        TD_HOB = 2,
        /// Memory for its start, zero.
        TEMP_MEM = 3,
        /// Memory that it accepts itself.
        PERM_MEM = 4,
        /// A payload such as a kernel: bytes of the image.
        PAYLOAD = 5,
        /// What the payload is told.
        PAYLOAD_PARAM = 6,
    }
}

bitflags::bitflags! {
    /// What the host does with a section.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Attributes: u32 {
        /// Its pages are measured.
        const EXTEND = 1 << 0;
        /// Its pages are not part of the launch.
        const AUGMENT = 1 << 1;
    }
}

/// Head of the list.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Descriptor {
    /// [`SIGNATURE`].
    pub signature: [u8; 4],
    /// Bytes of head and list together.
    pub length: U32,
    /// [`VERSION`].
    pub version: U32,
    /// Number of sections.
    pub count: U32,
}

/// One section.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Section {
    /// Where its bytes begin in the image.
    pub data_offset: U32,
    /// How many bytes it has there; 0 if it has none.
    pub data_size: U32,
    /// Guest-physical address of its first byte.
    pub gpa: U64,
    /// Bytes of memory.
    pub size: U64,
    /// [`SectionKind`].
    pub kind: U32,
    /// [`Attributes`].
    pub attributes: U32,
}

const _: () = {
    assert!(size_of::<Descriptor>() == 16);
    assert!(size_of::<Section>() == 32);
};

impl Section {
    /// What it is.
    #[must_use]
    pub const fn section_kind(&self) -> SectionKind {
        SectionKind(self.kind.get())
    }
}

/// The sections of a whole image (the bytes that end at 4 GiB), in its order; none if the image is not
/// for trust domains.
///
/// # Errors
///
/// [`MetadataError`] says what is malformed.
pub fn sections(image: &[u8]) -> Result<Option<&[Section]>, MetadataError> {
    let Some(from_end) = ovmf::entry_value(image, METADATA_GUID)? else {
        return Ok(None);
    };
    let read = || {
        let start = image.len().checked_sub(usize::try_from(from_end).ok()?)?;
        let (head, rest) = Descriptor::read_from_prefix(image.get(start..)?).ok()?;
        let count = usize::try_from(head.count.get()).ok()?;
        let size = count.checked_mul(size_of::<Section>())?;
        let whole = size.checked_add(size_of::<Descriptor>())?;
        let fits = head.signature == SIGNATURE
            && head.version.get() == VERSION
            && usize::try_from(head.length.get()).ok()? >= whole;
        if !fits {
            return None;
        }
        <[Section]>::ref_from_bytes_with_elems(rest.get(..size)?, count).ok()
    };
    read().map(Some).ok_or(MetadataError::BadList {
        guid: METADATA_GUID,
        from_end,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ovmf::{FOOTER_END, FOOTER_GUID, TableEntryTail};
    use std::vec;
    use std::vec::Vec;

    const LIST: usize = 0x100;

    fn section(kind: SectionKind) -> Section {
        Section {
            data_offset: 0.into(),
            data_size: 0.into(),
            gpa: 0x80_9000.into(),
            size: 0x2000.into(),
            kind: kind.0.into(),
            attributes: 0.into(),
        }
    }

    fn image(change: impl FnOnce(&mut Descriptor)) -> Vec<u8> {
        let list = [section(SectionKind::TD_HOB), section(SectionKind(77))];
        let mut head = Descriptor {
            signature: SIGNATURE,
            length: 80.into(),
            version: 1.into(),
            count: 2.into(),
        };
        change(&mut head);
        let mut image = vec![0; 0x1000];
        let bytes = [head.as_bytes(), list.as_bytes()].concat();
        image[LIST..][..bytes.len()].copy_from_slice(&bytes);
        let tail = |length: u16, guid| TableEntryTail {
            length: length.into(),
            guid,
        };
        let distance = (0x1000 - LIST as u32).to_le_bytes();
        let table = [
            distance.as_slice(),
            tail(22, METADATA_GUID).as_bytes(),
            tail(40, FOOTER_GUID).as_bytes(),
        ]
        .concat();
        let end = image.len() - FOOTER_END;
        image[end - table.len()..end].copy_from_slice(&table);
        image
    }

    #[test]
    fn sections_are_found_in_their_order() {
        let image = image(|_| {});
        let found = sections(&image).unwrap().unwrap();
        let kinds: Vec<_> = found.iter().map(Section::section_kind).collect();
        assert_eq!(kinds, [SectionKind::TD_HOB, SectionKind(77)]);
        assert_eq!(found[0].gpa.get(), 0x80_9000);
    }

    /// As Debian's OVMF.inteltdx.ms.fd 2026.08 has it: the entry's GUID is not the list's own.
    #[test]
    fn the_entry_is_the_one_that_ovmf_has() {
        let bytes = METADATA_GUID.to_bytes();
        assert_eq!(bytes[..4], [0x35, 0x65, 0x7A, 0xE4]);
        assert_eq!(bytes[14..], [0x8E, 0xC2]);
    }

    #[test]
    fn lists_that_do_not_fit_are_refused() {
        let spoil: [fn(&mut Descriptor); 5] = [
            |head| head.signature[0] ^= 1,
            |head| head.version = 2.into(),
            |head| head.length = 79.into(),
            |head| (head.count, head.length) = (u32::MAX.into(), u32::MAX.into()),
            |head| (head.count, head.length) = (0x100.into(), u32::MAX.into()),
        ];
        for change in spoil {
            assert!(matches!(
                sections(&image(change)),
                Err(MetadataError::BadList { .. })
            ));
        }
    }

    #[test]
    fn an_image_for_others_has_none() {
        let mut image = image(|_| {});
        let at = image.len() - FOOTER_END - 18 - 16;
        image[at] ^= 1;
        assert_eq!(sections(&image), Ok(None));
        assert_eq!(sections(&[]), Err(MetadataError::NoFooter));
    }
}
