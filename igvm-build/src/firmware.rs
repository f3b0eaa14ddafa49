//! The firmware: what an OVMF image says about itself, checked for use behind the paravisor.
//!
//! Invariants of a [`Firmware`]:
//!
//! 1. the image is whole pages and ends at 4 GiB;
//! 2. it names a secrets page, a CPUID page and a calling area: without them the guest could
//!    not find its paravisor;
//! 3. all areas it names are whole pages below the image, and none lies in the paravisor's
//!    region;
//! 4. no two areas of the SEV metadata overlap, so that none is prepared twice. (The areas for
//!    IGVM parameters lie inside of them.)

use std::collections::BTreeMap;

use igvm_defs::IgvmPlatformType;
use protocols::addr::PAGE_SIZE;
use protocols::launch::{LaunchParams, REGION_GPA, Section, SectionKind};
use protocols::ovmf::{Area, IgvmAreaKind, Metadata, MetadataError, RESET_VECTOR};

use crate::error::Error;
use crate::file::{Content, File};
use crate::flat::FLAT_END;
use crate::layout::REGION_END;

/// Largest firmware, in bytes: the ROM window of a PC below 4 GiB.
pub const MAX_SIZE: u64 = 16 << 20;

/// A parsed firmware image.
#[derive(Debug, Clone)]
pub struct Firmware<'a> {
    bytes: &'a [u8],
    sections: Vec<Section>,
    igvm_parameter_gpa: u64,
    igvm_hob_gpa: u64,
}

impl<'a> Firmware<'a> {
    /// Parses `bytes` and checks the invariants of the type.
    ///
    /// # Errors
    ///
    /// Says which of them does not hold.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Error> {
        let size = check_size(bytes)?;
        let metadata = metadata(bytes)?;
        for (kind, missing) in [
            (SectionKind::SECRETS, "secrets page"),
            (SectionKind::CPUID, "CPUID page"),
            (SectionKind::SVSM_CAA, "SVSM calling area"),
        ] {
            if metadata.section(kind).is_none() {
                return Err(Error::NoSevMetadata { missing });
            }
        }
        if metadata.sections.len() > LaunchParams::MAX_SECTIONS {
            let reason = format!(
                "{} areas, at most {}",
                metadata.sections.len(),
                LaunchParams::MAX_SECTIONS
            );
            return Err(Error::BadSevMetadata { reason });
        }
        let start = FLAT_END - size;
        let section = |area: &Area| {
            check_area(area, start)?;
            Ok::<_, Error>(Section {
                gpa: area.gpa.get().into(),
                size: area.size.get().into(),
                kind: area.section_kind(),
                reserved: 0,
            })
        };
        let igvm_area = |kind| {
            metadata.igvm_area(kind).map_or(Ok(0), |area| {
                check_area(area, start)?;
                Ok::<_, Error>(area.gpa.get().into())
            })
        };
        let sections: Vec<Section> = metadata
            .sections
            .iter()
            .map(section)
            .collect::<Result<_, _>>()?;
        check_disjoint(&sections)?;
        Ok(Self {
            bytes,
            sections,
            igvm_parameter_gpa: igvm_area(IgvmAreaKind::PARAMETER_AREA)?,
            igvm_hob_gpa: igvm_area(IgvmAreaKind::HOB_AREA)?,
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

    /// Linear address the first processor starts at. (The address in the image's table is that
    /// of further processors.)
    pub fn reset_eip(&self) -> u32 {
        RESET_VECTOR
    }

    /// The areas to be prepared for it, in its order.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// Where it looks for a memory map; 0 if it does not.
    pub fn igvm_parameter_gpa(&self) -> u64 {
        self.igvm_parameter_gpa
    }

    /// Where it looks for data of the image; 0 if it does not.
    pub fn igvm_hob_gpa(&self) -> u64 {
        self.igvm_hob_gpa
    }
}

/// Checks invariant 1; the size.
pub(crate) fn check_size(bytes: &[u8]) -> Result<u64, Error> {
    let size = bytes.len() as u64;
    if size == 0 || size > MAX_SIZE || !size.is_multiple_of(PAGE_SIZE) {
        return Err(Error::FirmwareSize { size });
    }
    Ok(size)
}

/// The metadata of an image.
pub(crate) fn metadata(bytes: &[u8]) -> Result<Metadata<'_>, Error> {
    Metadata::parse(bytes).map_err(|error| match error {
        MetadataError::NoSevMetadata => Error::NoSevMetadata {
            missing: "SEV metadata",
        },
        MetadataError::NoFooter => Error::NotOvmf {
            reason: error.to_string(),
        },
        other => Error::BadSevMetadata {
            reason: other.to_string(),
        },
    })
}

/// Checks invariant 3 for one area of a firmware that begins at `start`.
fn check_area(area: &Area, start: u64) -> Result<(), Error> {
    let (gpa, size) = (u64::from(area.gpa.get()), u64::from(area.size.get()));
    let end = gpa + size;
    let problem = if size == 0 || (gpa | size) & (PAGE_SIZE - 1) != 0 {
        "is not whole pages"
    } else if end > start {
        "reaches into the firmware itself"
    } else if gpa < REGION_END && end > REGION_GPA {
        "lies in the paravisor's region"
    } else {
        return Ok(());
    };
    Err(Error::BadSevMetadata {
        reason: format!("area {gpa:#x}..{end:#x} {problem}"),
    })
}

/// Checks invariant 4.
fn check_disjoint(sections: &[Section]) -> Result<(), Error> {
    let mut sorted: Vec<_> = sections.iter().collect();
    sorted.sort_by_key(|section| section.gpa);
    for pair in sorted.windows(2) {
        if let [first, second] = pair
            && second.gpa < first.gpa + first.size
        {
            let reason = format!("two areas share the page at {:#x}", second.gpa);
            return Err(Error::BadSevMetadata { reason });
        }
    }
    Ok(())
}

/// The firmware in an IGVM file that has one where OVMF lies, such as `igvm-wrap` makes of an image: all
/// pages that end at 4 GiB without a gap. Its processor state and its other pages are not used: behind a
/// paravisor the firmware starts as it would from a ROM, and says itself what it needs.
///
/// # Errors
///
/// When the file cannot be read, is not for SEV-SNP, or has no page that ends at 4 GiB.
pub fn of_igvm(bytes: &[u8]) -> Result<Vec<u8>, Error> {
    let file = File::read(bytes)?;
    let mask = file
        .mask_of(IgvmPlatformType::SEV_SNP)
        .ok_or(Error::NoPlatform {
            platform: "SEV-SNP",
        })?;
    let mut pages = BTreeMap::new();
    for header in file.of_platform(mask) {
        if let Content::Page(page) = &header.content
            && (FLAT_END - MAX_SIZE..FLAT_END).contains(&page.gpa)
        {
            pages.insert(page.gpa, file.page_data(header, page)?.unwrap_or_default());
        }
    }
    let mut start = FLAT_END;
    while pages.contains_key(&(start - PAGE_SIZE)) {
        start -= PAGE_SIZE;
    }
    if start == FLAT_END {
        return Err(Error::NoFirmware);
    }
    let mut image = vec![0; (FLAT_END - start) as usize];
    let chunks = image.chunks_mut(PAGE_SIZE as usize);
    for (to, (_, from)) in chunks.zip(pages.range(start..)) {
        to.iter_mut().zip(*from).for_each(|(to, from)| *to = *from);
    }
    Ok(image)
}
