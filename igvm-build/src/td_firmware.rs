//! The firmware of a trust domain, or of the guest in one: what a TDVF image says about itself, checked.
//!
//! Invariants of a [`TdFirmware`]:
//!
//! 1. the image is whole pages and ends at 4 GiB;
//! 2. sections with bytes are whole pages at the place of their bytes: the image is loaded as it is;
//! 3. sections without bytes are whole pages below the image, none in the paravisor's region, and no
//!    two of them overlap;
//! 4. there is one for the list of hand-off blocks.

use protocols::addr::PAGE_SIZE;
use protocols::launch::{LaunchParams, REGION_GPA, Section, SectionKind as AnyKind};
use protocols::tdvf::{self, SectionKind};

use crate::error::Error;
use crate::firmware::MAX_SIZE;
use crate::flat::FLAT_END;
use crate::layout::REGION_END;

/// A parsed image.
#[derive(Debug, Clone)]
pub struct TdFirmware<'a> {
    bytes: &'a [u8],
    listed: &'a [tdvf::Section],
    sections: Vec<Section>,
}

impl<'a> TdFirmware<'a> {
    /// Parses `bytes` and checks the invariants of the type.
    ///
    /// # Errors
    ///
    /// [`Error::FirmwareSize`], or [`Error::TdFirmware`] with what does not hold.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Error> {
        let size = bytes.len() as u64;
        if size == 0 || size > MAX_SIZE || !size.is_multiple_of(PAGE_SIZE) {
            return Err(Error::FirmwareSize { size });
        }
        let start = FLAT_END - size;
        let listed = tdvf::sections(bytes)
            .map_err(|error| fail(error.to_string()))?
            .ok_or_else(|| fail("no TDX metadata".to_owned()))?;
        let mut sections: Vec<Section> = Vec::new();
        for section in listed {
            let (gpa, size) = (section.gpa.get(), section.size.get());
            let name = || format!("section {gpa:#x}+{size:#x} of kind {}", section.kind.get());
            if section.data_size.get() != 0 {
                let offset = gpa.checked_sub(start);
                if offset != Some(section.data_offset.get().into())
                    || u64::from(section.data_size.get()) > size
                    || !(gpa | size).is_multiple_of(PAGE_SIZE)
                    || gpa.checked_add(size).is_none_or(|end| end > FLAT_END)
                {
                    return Err(fail(format!("{} is not where its bytes are", name())));
                }
                continue;
            }
            let end = gpa.checked_add(size).filter(|&end| {
                size != 0
                    && (gpa | size).is_multiple_of(PAGE_SIZE)
                    && end <= start
                    && (end <= REGION_GPA || gpa >= REGION_END)
            });
            let Some(end) = end else {
                return Err(fail(format!("{} cannot be there", name())));
            };
            if sections
                .iter()
                .any(|other| gpa < other.gpa + other.size && other.gpa < end)
            {
                return Err(fail(format!("{} overlaps another", name())));
            }
            sections.push(Section {
                gpa,
                size,
                kind: AnyKind(section.kind.get()),
                reserved: 0,
            });
        }
        if sections.len() > LaunchParams::MAX_SECTIONS {
            return Err(fail(format!("{} sections", sections.len())));
        }
        let hobs = sections
            .iter()
            .filter(|section| section.kind.0 == SectionKind::TD_HOB.0);
        if hobs.count() != 1 {
            return Err(fail("not one section for hand-off blocks".to_owned()));
        }
        Ok(Self {
            bytes,
            listed,
            sections,
        })
    }

    /// The image.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Guest-physical address of the image's first byte.
    pub fn gpa(&self) -> u64 {
        FLAT_END - self.bytes.len() as u64
    }

    /// All its sections as it lists them.
    pub fn listed(&self) -> &'a [tdvf::Section] {
        self.listed
    }

    /// The bytes of a listed section, less than its size if the rest is zero.
    pub fn bytes_of(&self, section: &tdvf::Section) -> &'a [u8] {
        let start = section.data_offset.get() as usize;
        let end = start + section.data_size.get() as usize;
        // Invariant 2: they lie in the image.
        self.bytes.get(start..end).unwrap_or_default()
    }

    /// The memory to be prepared for it, in its order; kinds are those of [`tdvf::SectionKind`].
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }
}

/// The firmware `image` with the variables at the beginning of `store`: another build of it, or a variable
/// store alone. Variables are the host's to choose: they are not measured by the launch but by the
/// firmware itself.
///
/// # Errors
///
/// [`Error::TdFirmware`] if `image` has no section for variables, or `store` none of its size.
pub fn with_variables(image: &[u8], store: &[u8]) -> Result<Vec<u8>, Error> {
    /// Where a firmware volume tells its bytes (PI, volume 3, EFI_FIRMWARE_VOLUME_HEADER).
    const LENGTH: core::ops::Range<usize> = 0x20..0x28;
    /// Where it has its mark, and the mark.
    const MARK: (core::ops::Range<usize>, &[u8]) = (0x28..0x2C, b"_FVH");
    let section = TdFirmware::parse(image)?
        .listed()
        .iter()
        .find(|section| section.section_kind() == SectionKind::CFV)
        .copied()
        .ok_or_else(|| fail("no section for variables".to_owned()))?;
    let (start, size) = (
        section.data_offset.get() as usize,
        section.data_size.get() as usize,
    );
    let told = store
        .get(LENGTH)
        .and_then(|bytes| bytes.try_into().ok())
        .map(u64::from_le_bytes);
    let volume = store
        .get(..size)
        .filter(|_| store.get(MARK.0) == Some(MARK.1) && told == Some(size as u64))
        .ok_or_else(|| fail(format!("the variable store has not {size:#x} bytes")))?;
    let mut image = image.to_vec();
    // Invariant 2 of the type: the section lies in the image.
    if let Some(place) = image.get_mut(start..start + size) {
        place.copy_from_slice(volume);
    }
    Ok(image)
}

fn fail(reason: String) -> Error {
    Error::TdFirmware { reason }
}
