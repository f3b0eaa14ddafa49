//! Images of trust domains: a program whose every page is added and measured where it is linked.
//!
//! The file has the TDX platform alone. There is no processor state in it: a trust domain's
//! processors start at the reset vector, so the program has to bring the last page below 4 GiB
//! itself. Pages are in ascending order, which is the order they are measured in.

use igvm::{
    IgvmDirectiveHeader as Directive, IgvmFile, IgvmInitializationHeader, IgvmPlatformHeader,
    IgvmRevision,
};
use igvm_defs::{
    IGVM_TDX_PLATFORM_VERSION, IGVM_VHS_SUPPORTED_PLATFORM, IgvmPageDataFlags, IgvmPageDataType,
    IgvmPlatformType,
};
use protocols::addr::PAGE_SIZE;
use protocols::measure::{Digest, Mrtd};
use protocols::tdx::shared_bit;

use crate::elf::Program;
use crate::error::Error;

/// TDX, as bit of every compatibility mask.
const TDX_MASK: u32 = 4;

/// Bits of guest-physical addresses: the machine's, and the smaller of the two that TDX has.
const GPA_WIDTH: u32 = 48;

/// No debugging, no migration, #VE for pages that are not accepted.
const POLICY: u64 = 0;

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
        bytes: serialize(directives)?,
        mrtd: mrtd.value(),
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

fn serialize(directives: Vec<Directive>) -> Result<Vec<u8>, Error> {
    let platform = IgvmPlatformHeader::SupportedPlatform(IGVM_VHS_SUPPORTED_PLATFORM {
        compatibility_mask: TDX_MASK,
        highest_vtl: 0,
        platform_type: IgvmPlatformType::TDX,
        platform_version: IGVM_TDX_PLATFORM_VERSION,
        shared_gpa_boundary: shared_bit(GPA_WIDTH),
    });
    let policy = IgvmInitializationHeader::GuestPolicy {
        policy: POLICY,
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
