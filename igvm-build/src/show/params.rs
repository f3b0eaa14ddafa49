//! The launch parameters of Turnstile's paravisor, where a file has them.

use igvm_defs::{IGVM_VHS_SUPPORTED_PLATFORM, IgvmNativeVpContextX64, IgvmPlatformType};
use protocols::addr::PAGE_SIZE;
use protocols::launch::{PlatformKind, ResetPage, SectionKind};
use protocols::tdvf;
use serde::Serialize;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::{LaunchParams, as_hex};
use crate::accept;
use crate::file::{Content, File, names};

/// What the paravisor is told on one platform.
#[derive(Debug, Clone, Serialize)]
pub struct Parameters {
    /// The platform.
    pub platform: String,
    /// Position of the C-bit; 0 if there is none.
    pub c_bit: u32,
    /// First byte of its region.
    #[serde(serialize_with = "as_hex")]
    pub region_gpa: u64,
    /// Bytes of its region.
    #[serde(serialize_with = "as_hex")]
    pub region_size: u64,
    /// Address behind what is launched of it.
    #[serde(serialize_with = "as_hex")]
    pub image_end: u64,
    /// When it accepts memory, in words.
    pub accepts: String,
    /// The deliberate fault that a test build commits.
    pub fault: String,
    /// The firmware.
    pub firmware: Option<Firmware>,
}

/// The firmware it starts.
#[derive(Debug, Clone, Serialize)]
pub struct Firmware {
    /// First byte.
    #[serde(serialize_with = "as_hex")]
    pub gpa: u64,
    /// Bytes.
    #[serde(serialize_with = "as_hex")]
    pub size: u64,
    /// Where it starts.
    #[serde(serialize_with = "as_hex")]
    pub reset_vector: u64,
    /// Where the host's memory map goes; 0 if nowhere.
    #[serde(serialize_with = "as_hex")]
    pub memory_map: u64,
    /// What is prepared for it.
    pub sections: Vec<Section>,
}

/// Memory that is prepared for the firmware.
#[derive(Debug, Clone, Serialize)]
pub struct Section {
    /// First byte.
    #[serde(serialize_with = "as_hex")]
    pub gpa: u64,
    /// Bytes.
    #[serde(serialize_with = "as_hex")]
    pub size: u64,
    /// What for.
    pub kind: String,
}

impl Parameters {
    /// Finds the page that the first processor has the address of.
    pub fn find(file: &File<'_>, platform: &IGVM_VHS_SUPPORTED_PLATFORM) -> Option<Self> {
        let mask = platform.compatibility_mask;
        let gpa = match platform.platform_type {
            IgvmPlatformType::TDX => {
                let page = ResetPage::read_from_bytes(&page(file, mask, ResetPage::GPA)?).ok()?;
                page.params.into()
            }
            _ => first_rdi(file, mask)?,
        };
        let params = LaunchParams::read_from_bytes(&page(file, mask, gpa)?).ok()?;
        params
            .is_understood()
            .then(|| Self::of(names::platform(platform.platform_type), &params))
    }

    fn of(platform: String, params: &LaunchParams) -> Self {
        let firmware = (params.firmware_size != 0).then(|| Firmware {
            gpa: params.firmware_gpa,
            size: params.firmware_size,
            reset_vector: params.firmware_reset_eip.into(),
            memory_map: params.igvm_parameter_gpa,
            sections: params
                .sections()
                .iter()
                .map(|section| Section {
                    gpa: section.gpa,
                    size: section.size,
                    kind: kind_name(params, section.kind),
                })
                .collect(),
        });
        Self {
            platform,
            c_bit: params.c_bit,
            region_gpa: params.region_gpa,
            region_size: params.region_size,
            image_end: params.image_end,
            accepts: accept::describe(&params.acceptance()),
            fault: params.fault.name().unwrap_or("unknown").to_owned(),
            firmware,
        }
    }
}

/// What a section is for. Trust domains have kinds of their own.
fn kind_name(params: &LaunchParams, kind: SectionKind) -> String {
    let name = if params.platform == PlatformKind::TDX {
        tdvf::SectionKind(kind.0).name()
    } else {
        kind.name()
    };
    name.unwrap_or("unknown").to_owned()
}

/// RDI of the first processor, whose context is a VMSA or a native one.
fn first_rdi(file: &File<'_>, mask: u32) -> Option<u64> {
    file.of_platform(mask)
        .find_map(|header| match &header.content {
            Content::Context(context) if context.vp_index == 0 => {
                if let Some(vmsa) = super::vmsa(file, header) {
                    return Some(vmsa.rdi);
                }
                let page = file.data(header, context.file_offset, PAGE_SIZE).ok()?;
                let (context, _) = IgvmNativeVpContextX64::read_from_prefix(page).ok()?;
                Some(context.rdi)
            }
            _ => None,
        })
}

/// The contents of the page at `gpa`.
fn page(file: &File<'_>, mask: u32, gpa: u64) -> Option<[u8; PAGE_SIZE as usize]> {
    file.of_platform(mask)
        .find_map(|header| match &header.content {
            Content::Page(page) if page.gpa == gpa => {
                let data = file.page_data(header, page).ok()?.unwrap_or_default();
                let mut whole = <[u8; PAGE_SIZE as usize]>::new_zeroed();
                whole
                    .as_mut_bytes()
                    .iter_mut()
                    .zip(data)
                    .for_each(|(to, from)| *to = *from);
                Some(whole)
            }
            _ => None,
        })
}
