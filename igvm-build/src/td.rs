//! Images of trust domains without a paravisor: a program, or a firmware that is L1 itself.
//!
//! The file has the TDX platform alone. There is no processor state in it: a trust domain's
//! processors start at the reset vector, so the last page below 4 GiB has to be among its pages. The
//! order of pages is the order they are measured in: for a program ascending, every one of them
//! measured; for a firmware as its sections are listed, measured where it asks for that, which is what
//! QEMU does with the same firmware.
//!
//! Where the firmware looks for the host's list of hand-off blocks the image has a parameter area that
//! no parameter of IGVM fills; the machine does ([`Firmware::hob`]).

use igvm::{
    IgvmDirectiveHeader as Directive, IgvmFile, IgvmInitializationHeader, IgvmPlatformHeader,
    IgvmRevision,
};
use igvm_defs::{
    IGVM_TDX_PLATFORM_VERSION, IGVM_VHS_PARAMETER_INSERT, IGVM_VHS_SUPPORTED_PLATFORM,
    IgvmPageDataFlags, IgvmPageDataType, IgvmPlatformType,
};
use protocols::addr::PAGE_SIZE;
use protocols::measure::{Digest, Mrtd};
use protocols::tdvf::{self, Attributes, SectionKind};
use protocols::tdx::shared_bit;

use crate::elf::Program;
use crate::error::Error;
use crate::file::File;
use crate::measure::{self, quietly};
use crate::td_firmware::TdFirmware;

/// TDX, as bit of every compatibility mask.
const TDX_MASK: u32 = 4;

/// Bits of guest-physical addresses: the machine's, and the smaller of the two that TDX has.
const GPA_WIDTH: u32 = 48;

/// No debugging, no migration, #VE for pages that are not accepted.
const POLICY: u64 = 0;

/// The same without that #VE, as QEMU launches firmware: an operating system must not have its own
/// memory turned into exceptions.
const POLICY_FIRMWARE: u64 = 1 << 1;

/// The page with the reset vector.
const RESET_PAGE: u64 = (1 << 32) - PAGE_SIZE;

/// A finished image.
#[derive(Debug, Clone)]
pub struct Image {
    /// The IGVM file.
    pub bytes: Vec<u8>,
    /// MRTD: the measurement of the launch.
    pub mrtd: Digest,
}

/// Builds the image of `program`.
///
/// # Errors
///
/// When two segments share a page, or none covers the reset vector.
pub fn build(program: &Program<'_>) -> Result<Image, Error> {
    let pages = pages(program)?;
    if pages.last().is_none_or(|(gpa, _)| *gpa != RESET_PAGE) {
        return Err(Error::NoResetVector);
    }
    let mut mrtd = Mrtd::new();
    let directives = pages
        .into_iter()
        .map(|(gpa, page)| {
            mrtd.add_page(gpa, Some(&page));
            let zero = page.iter().all(|&byte| byte == 0);
            Directive::PageData {
                gpa,
                compatibility_mask: TDX_MASK,
                flags: IgvmPageDataFlags::new(),
                data_type: IgvmPageDataType::NORMAL,
                data: if zero { Vec::new() } else { page.to_vec() },
            }
        })
        .collect();
    Ok(Image {
        bytes: serialize(POLICY, directives)?,
        mrtd: mrtd.value(),
    })
}

/// The image of a firmware.
#[derive(Debug, Clone)]
pub struct Firmware {
    /// The image itself.
    pub image: Image,
    /// Where the host has to put the list of hand-off blocks.
    pub hob: u64,
}

/// Builds the image of a firmware that is the only software of the launch.
///
/// # Errors
///
/// When the firmware does not cover the reset vector.
pub fn build_firmware(firmware: &TdFirmware<'_>) -> Result<Firmware, Error> {
    let mut directives = Vec::new();
    let mut hob = 0;
    for section in firmware.listed() {
        let attributes = Attributes::from_bits_retain(section.attributes.get());
        if section.section_kind() == SectionKind::TD_HOB {
            hob = section.gpa.get();
            directives.extend(parameter_area(hob, section.size.get()));
        } else if !attributes.contains(Attributes::AUGMENT) {
            let measured = attributes.contains(Attributes::EXTEND);
            directives.extend(section_pages(section, firmware.bytes_of(section), measured));
        }
    }
    let resets = |d: &Directive| matches!(d, Directive::PageData { gpa, .. } if *gpa == RESET_PAGE);
    if !directives.iter().any(resets) {
        return Err(Error::NoResetVector);
    }
    let bytes = serialize(POLICY_FIRMWARE, directives)?;
    let mrtd = measure::tdx::mrtd(&File::read(&bytes)?, &mut quietly)?;
    let image = Image { bytes, mrtd };
    Ok(Firmware { image, hob })
}

/// A parameter area at `gpa`.
fn parameter_area(gpa: u64, bytes: u64) -> [Directive; 2] {
    [
        Directive::ParameterArea {
            number_of_bytes: bytes,
            parameter_area_index: 0,
            initial_data: Vec::new(),
        },
        Directive::ParameterInsert(IGVM_VHS_PARAMETER_INSERT {
            gpa,
            compatibility_mask: TDX_MASK,
            parameter_area_index: 0,
        }),
    ]
}

/// The pages of a section, zero behind its `data`.
fn section_pages<'a>(
    section: &'a tdvf::Section,
    data: &'a [u8],
    measured: bool,
) -> impl Iterator<Item = Directive> + 'a {
    let (gpa, size) = (section.gpa.get(), section.size.get());
    let pages = (gpa..gpa + size).step_by(PAGE_SIZE as usize);
    let chunks = data.chunks(PAGE_SIZE as usize).map(<[u8]>::to_vec);
    pages
        .zip(chunks.chain(std::iter::repeat_with(Vec::new)))
        .map(move |(gpa, data)| Directive::PageData {
            gpa,
            compatibility_mask: TDX_MASK,
            flags: IgvmPageDataFlags::new().with_unmeasured(!measured),
            data_type: IgvmPageDataType::NORMAL,
            data,
        })
}

/// The pages of the program, ascending.
#[expect(clippy::type_complexity, reason = "addresses and whole pages")]
fn pages(program: &Program<'_>) -> Result<Vec<(u64, Box<[u8; PAGE_SIZE as usize]>)>, Error> {
    let mut pages: Vec<(u64, Box<[u8; PAGE_SIZE as usize]>)> = Vec::new();
    for segment in program.segments() {
        let first = segment.address & !(PAGE_SIZE - 1);
        if pages.last().is_some_and(|(last, _)| *last >= first) {
            return Err(Error::SegmentsOverlap { page: first });
        }
        for gpa in (first..segment.end()).step_by(PAGE_SIZE as usize) {
            let mut page = Box::new([0; PAGE_SIZE as usize]);
            // The part of the segment's bytes that lies in this page.
            for (at, byte) in (segment.address..).zip(segment.data) {
                if at >= gpa + PAGE_SIZE {
                    break;
                }
                if at >= gpa {
                    page[(at - gpa) as usize] = *byte;
                }
            }
            pages.push((gpa, page));
        }
    }
    Ok(pages)
}

fn serialize(policy: u64, directives: Vec<Directive>) -> Result<Vec<u8>, Error> {
    let platform = IgvmPlatformHeader::SupportedPlatform(IGVM_VHS_SUPPORTED_PLATFORM {
        compatibility_mask: TDX_MASK,
        highest_vtl: 0,
        platform_type: IgvmPlatformType::TDX,
        platform_version: IGVM_TDX_PLATFORM_VERSION,
        shared_gpa_boundary: shared_bit(GPA_WIDTH),
    });
    let policy = IgvmInitializationHeader::GuestPolicy {
        policy,
        compatibility_mask: TDX_MASK,
    };
    let invalid = |error: igvm::Error| Error::Unwritable {
        reason: error.to_string(),
    };
    let file = IgvmFile::new(IgvmRevision::V1, vec![platform], vec![policy], directives)
        .map_err(invalid)?;
    let mut bytes = Vec::new();
    file.serialize(&mut bytes).map_err(invalid)?;
    Ok(bytes)
}
