//! Rules of what one platform is launched with.

use std::collections::BTreeSet;
use std::mem::offset_of;
use std::ops::Range;

use igvm_defs::{
    IGVM_VHS_SUPPORTED_PLATFORM, IGVM_VHS_VP_CONTEXT, IgvmNativeVpContextX64, IgvmPageDataType,
    IgvmPlatformType, VbsVpContextHeader,
};
use protocols::addr::PAGE_SIZE;
use zerocopy::FromBytes;

use super::Found;
use crate::file::{Content, File, Header, Rule, names};
use crate::measure::areas::Areas;

pub(super) fn check(file: &File<'_>, platform: &IGVM_VHS_SUPPORTED_PLATFORM, found: &mut Found) {
    let mut areas = Areas::default();
    let mut launched: Vec<(Range<u64>, &Header<'_>)> = Vec::new();
    let mut contexts = BTreeSet::new();
    let mut policies = 0;
    let is_td = platform.platform_type == IgvmPlatformType::TDX;
    for header in file.of_platform(platform.compatibility_mask) {
        match &header.content {
            Content::Policy(_) => {
                policies += 1;
                if policies == 2 {
                    let text = format!("a second policy for {}", name(platform));
                    found.at(header, Rule::PolicyTwice, text);
                }
            }
            Content::Manifest(manifest) if manifest.file_offset != 0 => {
                let bytes = manifest.size_bytes.into();
                found.take(file.data(header, manifest.file_offset, bytes));
            }
            Content::Area(area) => {
                found.take(areas.declare(header, area));
                if area.file_offset != 0 {
                    found.take(file.data(header, area.file_offset, area.number_of_bytes));
                }
            }
            Content::Parameter(parameter) => {
                found.take(areas.write(header, parameter));
            }
            Content::Insert(insert) => {
                let bytes = found.take(areas.insert(header, insert.parameter_area_index));
                let range = found.take(header.range(insert.gpa, bytes.unwrap_or(0)));
                launched.extend(range.map(|range| (range, header)));
            }
            Content::Page(page) => {
                found.take(file.page_data(header, page));
                let known = [
                    IgvmPageDataType::NORMAL,
                    IgvmPageDataType::SECRETS,
                    IgvmPageDataType::CPUID_DATA,
                    IgvmPageDataType::CPUID_XF,
                ];
                if !known.contains(&page.data_type) {
                    let text = format!("{} at {:#x}", names::page(page.data_type), page.gpa);
                    found.at(header, Rule::PageType, text);
                } else if page.data_type != IgvmPageDataType::NORMAL
                    && platform.platform_type != IgvmPlatformType::SEV_SNP
                {
                    let text = format!(
                        "{} at {:#x} for {}",
                        names::page(page.data_type),
                        page.gpa,
                        name(platform)
                    );
                    found.at(header, Rule::SecretsOutsideSnp, text);
                }
                let range = found.take(header.range(page.gpa, PAGE_SIZE));
                launched.extend(range.map(|range| (range, header)));
            }
            Content::RequiredMemory(memory) => {
                let bytes = u64::from(memory.number_of_bytes);
                found.take(header.range(memory.gpa, bytes));
                if !bytes.is_multiple_of(PAGE_SIZE) {
                    let text = format!("{bytes:#x} bytes");
                    found.at(header, Rule::PageAlignment, text);
                }
            }
            Content::Context(context) if is_td => {
                let text = format!("context of processor {}", context.vp_index);
                found.at(header, Rule::ContextForTdx, text);
            }
            Content::Context(context) => {
                found.take(header.range(context.gpa.get(), PAGE_SIZE));
                check_context_data(file, header, context, platform, found);
                // On VSM each VTL of a processor has one.
                if !contexts.insert(context.vp_index)
                    && platform.platform_type != IgvmPlatformType::VSM_ISOLATION
                {
                    let text = format!("processor {} a second time", context.vp_index);
                    found.at(header, Rule::ContextTwice, text);
                }
            }
            _ => {}
        }
    }
    check_overlaps(launched, found);
}

fn name(platform: &IGVM_VHS_SUPPORTED_PLATFORM) -> String {
    names::platform(platform.platform_type)
}

/// What a context points to. A VSM context is a list of registers; all others are a page.
fn check_context_data(
    file: &File<'_>,
    header: &Header<'_>,
    context: &IGVM_VHS_VP_CONTEXT,
    platform: &IGVM_VHS_SUPPORTED_PLATFORM,
    found: &mut Found,
) {
    let kind = platform.platform_type;
    let bytes = if kind == IgvmPlatformType::VSM_ISOLATION {
        size_of::<VbsVpContextHeader>() as u64
    } else {
        PAGE_SIZE
    };
    let data = found.take(file.data(header, context.file_offset, bytes));
    if context.compatibility_mask != platform.compatibility_mask {
        let text = format!("mask {:#x}", context.compatibility_mask);
        found.at(header, Rule::ContextMask, text);
    } else if [IgvmPlatformType::NATIVE, names::SEV].contains(&kind)
        && let Some(page) = data
    {
        check_native(header, page, found);
    }
}

/// The page of a native context: registers, and nothing behind them.
fn check_native(header: &Header<'_>, page: &[u8], found: &mut Found) {
    /// Bits 11:8 of segment attributes.
    const UNUSED: u16 = 0xF00;
    let Ok((registers, rest)) = IgvmNativeVpContextX64::read_from_prefix(page) else {
        return;
    };
    if let Some(at) = rest.iter().position(|&byte| byte != 0) {
        let at = at + size_of::<IgvmNativeVpContextX64>();
        found.at(header, Rule::NativeContext, format!("byte {at:#x} is set"));
    }
    if registers.reserved != [0; 2] {
        let at = offset_of!(IgvmNativeVpContextX64, reserved);
        let text = format!("{:x?} at {at:#x} of a native context", registers.reserved);
        found.at(header, Rule::Reserved, text);
    }
    let (code, data) = (registers.code_attributes, registers.data_attributes);
    if (code | data) & UNUSED != 0 {
        let text = format!("attributes {code:#x} of code, {data:#x} of data");
        found.at(header, Rule::NativeAttributes, text);
    }
}

/// Reports each range that begins before all earlier ones have ended.
fn check_overlaps(mut launched: Vec<(Range<u64>, &Header<'_>)>, found: &mut Found) {
    launched.sort_by_key(|(range, header)| (range.start, header.offset));
    let mut end = 0;
    for (range, header) in launched {
        if range.start < end && !range.is_empty() {
            let text = format!("page {:#x} again", range.start);
            found.at(header, Rule::Overlap, text);
        }
        end = end.max(range.end);
    }
}
