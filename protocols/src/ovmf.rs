//! What an OVMF firmware image says about itself (OVMF, `ResetVector/`).
//!
//! An image ends at 4 GiB. Near its end lies a table of GUIDed entries, read backwards from a
//! footer; two entries lead to lists of memory areas: the SEV metadata (what must be prepared
//! before the firmware runs) and the IGVM metadata (where the firmware looks for a memory map
//! and for data). [`Metadata::parse`] reads them from any bytes: it never panics and never
//! looks outside the image.
//!
//! The boot processor starts at [`RESET_VECTOR`]. The image's reset block says where *further*
//! processors start under SEV-ES ([`Metadata::ap_reset_eip`]).

use core::fmt;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::guid::Guid;
use crate::igvm_map;

/// Where the boot processor starts: 16 bytes below 4 GiB (APM 14.1.5).
pub const RESET_VECTOR: u32 = 0xFFFF_FFF0;

/// GUID of the footer; it ends [`FOOTER_END`] bytes before the end of the image.
pub const FOOTER_GUID: Guid = Guid::from_text("96b582de-1fb2-45f7-baea-a366c55a082d");
/// Bytes between the end of the footer and the end of the image.
pub const FOOTER_END: usize = 32;
/// GUID of the entry with the start address of further processors (u32).
pub const RESET_BLOCK_GUID: Guid = Guid::from_text("00f771de-1a7e-4fcb-890e-68c77e2fb44e");
/// GUID of the entry that leads to the SEV metadata (u32 distance from the end of the image).
pub const SEV_METADATA_GUID: Guid = Guid::from_text("dc886566-984a-4798-a75e-5585a7bf67cc");
/// GUID of the entry that leads to the IGVM metadata (u32 distance from the end of the image).
pub const IGVM_METADATA_GUID: Guid = Guid::from_text("784fa70e-3176-4677-8a20-04b68699e374");

/// Signature of the SEV metadata.
pub const SEV_SIGNATURE: [u8; 4] = *b"ASEV";
/// Signature of the IGVM metadata.
pub const IGVM_SIGNATURE: [u8; 4] = *b"IGVM";
/// Version of both.
pub const METADATA_VERSION: u32 = 1;

open_enum! {
    /// What an area of the SEV metadata is for (OVMF, `ResetVector/X64/OvmfSevMetadata.asm`).
    pub struct SectionKind(u32) {
        /// Memory that the firmware expects validated and zero before it runs.
        SEC_MEM = 1,
        /// The SNP secrets page.
        SECRETS = 2,
        /// The SNP CPUID page.
        CPUID = 3,
        /// The calling area of the boot processor, zero.
        SVSM_CAA = 4,
        /// Hashes of kernel, initrd and command line; zero when nobody supplies them.
        KERNEL_HASHES = 0x10,
    }
}

open_enum! {
    /// What an area of the IGVM metadata is for (OVMF, `ResetVector/X64/IgvmMetadata.asm`).
    pub struct IgvmAreaKind(u32) {
        /// The parameter area: [`IgvmParameterArea`].
        PARAMETER_AREA = 0x100,
        /// Where in the parameter area the memory map is (offset in place of the address).
        MEMORY_MAP = 0x101,
        /// Where in the parameter area the number of processors is (likewise).
        VP_COUNT = 0x102,
        /// The area for data HOBs.
        HOB_AREA = 0x200,
    }
}

/// Tail of an entry of the GUIDed table. Its data lie before it.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct TableEntryTail {
    /// Bytes of data and tail together; for the footer, bytes of the whole table.
    pub length: zerocopy::little_endian::U16,
    /// What the data are.
    pub guid: Guid,
}

/// Head of a list of areas.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct MetadataHeader {
    /// [`SEV_SIGNATURE`] or [`IGVM_SIGNATURE`].
    pub signature: [u8; 4],
    /// Bytes of head and list together.
    pub size: U32,
    /// [`METADATA_VERSION`].
    pub version: U32,
    /// Number of areas.
    pub count: U32,
}

/// One area of memory below 4 GiB.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Area {
    /// First byte.
    pub gpa: U32,
    /// Bytes.
    pub size: U32,
    /// [`SectionKind`] or [`IgvmAreaKind`].
    pub kind: U32,
}

const _: () = {
    assert!(size_of::<TableEntryTail>() == 18);
    assert!(size_of::<MetadataHeader>() == 16);
    assert!(size_of::<Area>() == 12);
};

impl fmt::Debug for Area {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Area({:#x}+{:#x}, kind {:#x})",
            self.gpa, self.size, self.kind
        )
    }
}

impl Area {
    /// Its purpose, if it comes from the SEV metadata.
    #[must_use]
    pub const fn section_kind(&self) -> SectionKind {
        SectionKind(self.kind.get())
    }

    /// Its purpose, if it comes from the IGVM metadata.
    #[must_use]
    pub const fn igvm_kind(&self) -> IgvmAreaKind {
        IgvmAreaKind(self.kind.get())
    }
}

/// The firmware's area for IGVM parameters (OVMF, `PlatformInitLib/Igvm.c`).
///
/// The firmware uses this map in place of the host's if the first entry has pages. It stops at
/// an entry without pages; a map of all eight entries is ended by the zeroes after `vp_count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IgvmParameterArea {
    /// The memory map.
    pub memory_map: [igvm_map::MemoryMapEntry; IgvmParameterArea::MAX_ENTRIES],
    /// Number of processors, at most 0xFFFF; 0 if it is to be found out otherwise.
    pub vp_count: u32,
    /// Zero: ends a full map.
    pub reserved: [u32; 3],
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<IgvmParameterArea>() == 0xD0);
    assert!(offset_of!(IgvmParameterArea, vp_count) == 0xC0);
};

impl IgvmParameterArea {
    /// Room for entries of the memory map.
    pub const MAX_ENTRIES: usize = 8;
}

/// What was found in an image; borrows the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metadata<'a> {
    /// Start address of further processors under SEV-ES, if the image names one.
    pub ap_reset_eip: Option<u32>,
    /// Areas of the SEV metadata, in the image's order.
    pub sections: &'a [Area],
    /// Areas of the IGVM metadata; empty if the image has none.
    pub igvm_areas: &'a [Area],
}

/// Why an image could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetadataError {
    /// There is no footer: not an OVMF image, or a very old one.
    NoFooter,
    /// The table's length, in bytes, is impossible.
    TableLength(usize),
    /// An entry's length, in bytes, is impossible.
    EntryLength {
        /// Which entry.
        guid: Guid,
        /// What it claims.
        length: usize,
    },
    /// The image has no SEV metadata: built without SEV-SNP.
    NoSevMetadata,
    /// A list of areas does not lie inside the image or has an impossible head.
    BadList {
        /// Which list: [`SEV_METADATA_GUID`] or [`IGVM_METADATA_GUID`].
        guid: Guid,
        /// Its distance from the end of the image in bytes.
        from_end: u32,
    },
}

impl fmt::Display for MetadataError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoFooter => write!(f, "no OVMF table (GUID {FOOTER_GUID}) at the image's end"),
            Self::TableLength(length) => {
                write!(
                    f,
                    "the OVMF table claims an impossible length of {length} bytes"
                )
            }
            Self::EntryLength { guid, length } => {
                write!(f, "entry {guid} of the OVMF table claims {length} bytes")
            }
            Self::NoSevMetadata => f.write_str("no SEV metadata: built without SEV-SNP"),
            Self::BadList { guid, from_end } => {
                write!(
                    f,
                    "metadata {guid}, {from_end:#x} bytes before the end, is malformed"
                )
            }
        }
    }
}

impl core::error::Error for MetadataError {}

impl<'a> Metadata<'a> {
    /// Reads the metadata of a whole image (the bytes that end at 4 GiB).
    ///
    /// # Errors
    ///
    /// [`MetadataError`] says what is missing or malformed. An image without IGVM metadata is
    /// no error.
    pub fn parse(image: &'a [u8]) -> Result<Self, MetadataError> {
        let mut ap_reset_eip = None;
        let mut sections = None;
        let mut igvm_areas = None;
        for entry in table(image)? {
            let (guid, data) = entry?;
            let Some(value) = trailing_u32(data) else {
                continue;
            };
            match guid {
                RESET_BLOCK_GUID => ap_reset_eip = Some(value),
                SEV_METADATA_GUID => sections = Some(areas(image, guid, SEV_SIGNATURE, value)?),
                IGVM_METADATA_GUID => igvm_areas = Some(areas(image, guid, IGVM_SIGNATURE, value)?),
                _ => {}
            }
        }
        Ok(Self {
            ap_reset_eip,
            sections: sections.ok_or(MetadataError::NoSevMetadata)?,
            igvm_areas: igvm_areas.unwrap_or_default(),
        })
    }

    /// First area of the SEV metadata with this purpose.
    #[must_use]
    pub fn section(&self, kind: SectionKind) -> Option<&'a Area> {
        self.sections
            .iter()
            .find(|area| area.section_kind() == kind)
    }

    /// First area of the IGVM metadata with this purpose.
    #[must_use]
    pub fn igvm_area(&self, kind: IgvmAreaKind) -> Option<&'a Area> {
        self.igvm_areas.iter().find(|area| area.igvm_kind() == kind)
    }
}

/// The value of the entry `guid` of an image's table, for entries that end with a u32; none if there is
/// no such entry.
///
/// # Errors
///
/// [`MetadataError`] says what of the table is malformed.
pub fn entry_value(image: &[u8], guid: Guid) -> Result<Option<u32>, MetadataError> {
    for entry in table(image)? {
        let (found, data) = entry?;
        if found == guid {
            return Ok(trailing_u32(data));
        }
    }
    Ok(None)
}

/// The entries of the GUIDed table without the footer, last one first.
fn table(
    image: &[u8],
) -> Result<impl Iterator<Item = Result<(Guid, &[u8]), MetadataError>>, MetadataError> {
    let end = image
        .len()
        .checked_sub(FOOTER_END)
        .ok_or(MetadataError::NoFooter)?;
    let table = image.get(..end).ok_or(MetadataError::NoFooter)?;
    let (before, footer) =
        TableEntryTail::read_from_suffix(table).map_err(|_| MetadataError::NoFooter)?;
    if footer.guid != FOOTER_GUID {
        return Err(MetadataError::NoFooter);
    }
    let length = usize::from(footer.length.get());
    let bad_length = MetadataError::TableLength(length);
    let entries = length
        .checked_sub(size_of::<TableEntryTail>())
        .ok_or(bad_length)?;
    let start = before.len().checked_sub(entries).ok_or(bad_length)?;
    let mut rest = before.get(start..).ok_or(bad_length)?;
    Ok(core::iter::from_fn(move || {
        // Fewer bytes than a tail are padding before the first entry.
        let (_, tail) = TableEntryTail::read_from_suffix(rest).ok()?;
        let length = usize::from(tail.length.get());
        let parts = rest
            .len()
            .checked_sub(length)
            .and_then(|start| rest.split_at_checked(start));
        match parts {
            Some((remaining, entry)) if length >= size_of::<TableEntryTail>() => {
                rest = remaining;
                let data = entry.get(..length - size_of::<TableEntryTail>())?;
                Some(Ok((tail.guid, data)))
            }
            _ => {
                rest = &[];
                Some(Err(MetadataError::EntryLength {
                    guid: tail.guid,
                    length,
                }))
            }
        }
    }))
}

/// The value of entries whose data end with one u32.
fn trailing_u32(data: &[u8]) -> Option<u32> {
    let (_, value) = U32::read_from_suffix(data).ok()?;
    Some(value.get())
}

/// The list of areas that begins `from_end` bytes before the end of the image.
fn areas(
    image: &[u8],
    guid: Guid,
    signature: [u8; 4],
    from_end: u32,
) -> Result<&[Area], MetadataError> {
    let read = || {
        let start = image.len().checked_sub(usize::try_from(from_end).ok()?)?;
        let (header, rest) = MetadataHeader::read_from_prefix(image.get(start..)?).ok()?;
        let count = usize::try_from(header.count.get()).ok()?;
        let size = count.checked_mul(size_of::<Area>())?;
        let whole = size.checked_add(size_of::<MetadataHeader>())?;
        if header.signature != signature
            || header.version.get() != METADATA_VERSION
            || usize::try_from(header.size.get()).ok()? < whole
        {
            return None;
        }
        <[Area]>::ref_from_bytes_with_elems(rest.get(..size)?, count).ok()
    };
    read().ok_or(MetadataError::BadList { guid, from_end })
}

#[cfg(test)]
mod tests;
