//! Rules of the file alone, whatever it is loaded for.

use igvm_defs::{
    IGVM_VHT_OPTIONAL_BIT, IGVM_VHT_RANGE_DIRECTIVE, IGVM_VHT_RANGE_INIT, IGVM_VHT_RANGE_PLATFORM,
    IgvmArchitecture, IgvmPlatformType,
};
use protocols::addr::PAGE_SIZE;

use super::Found;
use crate::file::{Content, File, Header, Rule, names};

/// Sections of the variable headers, in their order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Section {
    Platform,
    Initialization,
    Directive,
}

impl Section {
    /// The section of a type, optional or not.
    fn of(kind: u32) -> Option<Self> {
        let kind = kind & !IGVM_VHT_OPTIONAL_BIT;
        if IGVM_VHT_RANGE_PLATFORM.contains(&kind) {
            Some(Self::Platform)
        } else if IGVM_VHT_RANGE_INIT.contains(&kind) {
            Some(Self::Initialization)
        } else if IGVM_VHT_RANGE_DIRECTIVE.contains(&kind) {
            Some(Self::Directive)
        } else {
            None
        }
    }
}

pub(super) fn check(file: &File<'_>, found: &mut Found) {
    check_fixed(file, found);
    check_platforms(file, found);
    let declared = file
        .platforms()
        .fold(0, |all, (_, platform)| all | platform.compatibility_mask);
    let mut section = Section::Platform;
    for header in &file.headers {
        check_header(file, header, declared, found);
        match Section::of(header.kind.0) {
            Some(next) if next < section => {
                let name = names::header(header.kind);
                found.at(
                    header,
                    Rule::Order,
                    format!("{name} behind a later section"),
                );
            }
            Some(next) => section = next,
            None => {}
        }
    }
}

fn check_fixed(file: &File<'_>, found: &mut Found) {
    let fixed = &file.fixed;
    if fixed.file_size as usize != file.bytes().len() {
        let text = format!("{} of {} bytes", fixed.file_size, file.bytes().len());
        found.offset(16, Rule::FileLength, text);
    }
    if fixed.checksum != fixed.computed_checksum {
        let text = format!(
            "{:#010x}, computed {:#010x}",
            fixed.checksum, fixed.computed_checksum
        );
        found.offset(20, Rule::Checksum, text);
    }
    if let Some((architecture, page_size)) = fixed.machine {
        if architecture != IgvmArchitecture::X64.0 {
            let text = format!("architecture {architecture}");
            found.offset(24, Rule::Architecture, text);
        }
        if u64::from(page_size) != PAGE_SIZE {
            found.offset(28, Rule::PageSizeField, format!("{page_size}"));
        }
    }
    if fixed.headers.1 >= file.bytes().len() {
        let text = format!("headers up to {:#x}, the end", fixed.headers.1);
        found.offset(fixed.headers.1, Rule::NoData, text);
    }
}

fn check_platforms(file: &File<'_>, found: &mut Found) {
    let mut masks = 0;
    let mut kinds: Vec<IgvmPlatformType> = Vec::new();
    for (header, platform) in file.platforms() {
        let (mask, kind) = (platform.compatibility_mask, platform.platform_type);
        if mask.count_ones() != 1 || masks & mask != 0 {
            found.at(header, Rule::PlatformMask, format!("mask {mask:#x}"));
        }
        masks |= mask;
        if kinds.contains(&kind) {
            found.at(header, Rule::PlatformTwice, names::platform(kind));
        }
        kinds.push(kind);
        if !names::is_platform(kind) {
            found.at(header, Rule::PlatformType, names::platform(kind));
        }
        if !matches!(platform.highest_vtl, 0 | 2) {
            let text = format!("highest VTL {}", platform.highest_vtl);
            found.at(header, Rule::HighestVtl, text);
        }
        if [IgvmPlatformType::NATIVE, IgvmPlatformType::VSM_ISOLATION].contains(&kind)
            && platform.shared_gpa_boundary != 0
        {
            let text = format!("boundary {:#x}", platform.shared_gpa_boundary);
            found.at(header, Rule::Boundary, text);
        }
        if platform.platform_version != 1 {
            let text = format!("version {}", platform.platform_version);
            found.at(header, Rule::PlatformVersion, text);
        }
    }
    if kinds.is_empty() {
        found.offset(file.fixed.headers.0, Rule::NoPlatform, "no platform header");
    }
}

fn check_header(file: &File<'_>, header: &Header<'_>, declared: u32, found: &mut Found) {
    let padding = file.bytes().get(header.padding()).unwrap_or_default();
    if padding.iter().any(|&byte| byte != 0) {
        found.at(header, Rule::Padding, format!("{padding:02x?}"));
    }
    let optional =
        header.kind.0 & IGVM_VHT_OPTIONAL_BIT != 0 && Section::of(header.kind.0).is_some();
    if !names::is_defined(header.kind) && !optional {
        let text = names::header(header.kind);
        found.at(header, Rule::UnknownType, text);
    }
    if let Some(mask) = header.content.mask()
        && (mask == 0 || mask & !declared != 0)
        && declared != 0
    {
        let text = format!("mask {mask:#x}, the platforms have {declared:#x}");
        found.at(header, Rule::StrayMask, text);
    }
    if let Some(value) = reserved(&header.content).filter(|&value| value != 0) {
        let text = format!("{value:#x} in {}", names::header(header.kind));
        found.at(header, Rule::Reserved, text);
    }
}

/// All reserved fields of a header, or-ed.
fn reserved(content: &Content) -> Option<u64> {
    Some(match content {
        Content::Policy(header) => header.reserved.into(),
        Content::Page(header) => u64::from(header.reserved) | u64::from(header.flags.reserved()),
        Content::Context(header) => header.reserved.into(),
        Content::RequiredMemory(header) => {
            u64::from(header.reserved) | u64::from(header.flags.reserved())
        }
        Content::TableRelocation(header) => header.reserved.into(),
        Content::Manifest(header) => header.reserved.into(),
        Content::IdBlock(block) => {
            let bytes = block.reserved.iter().map(|&byte| u64::from(byte));
            bytes.fold(
                u64::from(block.id_public_key.reserved | block.author_public_key.reserved),
                |all, byte| all | byte,
            )
        }
        _ => return None,
    })
}
