//! Rules of QEMU's loader and of KVM (`backends/igvm.c`, `target/i386/sev.c`; QEMU 11.0.1).

use std::ops::Range;

use igvm_defs::{
    IGVM_VHS_VP_CONTEXT, IgvmNativeVpContextX64, IgvmPlatformType, IgvmVariableHeaderType as Type,
};
use protocols::addr::PAGE_SIZE;
use protocols::vmsa::{LAUNCH_GPA, SevFeatures};
use zerocopy::{FromBytes, IntoBytes};

use super::Found;
use crate::file::{Content, File, Header, Rule, names};
use crate::id_block;
use crate::show::vmsa;

/// Platforms in the order of QEMU's preference.
const PREFERENCE: [IgvmPlatformType; 4] = [
    IgvmPlatformType::SEV_SNP,
    names::SEV_ES,
    names::SEV,
    IgvmPlatformType::NATIVE,
];

/// Bytes of a VMSA that QEMU passes on (APM volume 2, table B-4; QEMU `check_vmsa_supported`). Ascending.
const PASSED_ON: [Range<usize>; 13] = [
    0x000..0x0A0, // ES CS SS DS FS GS GDTR LDTR IDTR TR
    0x0D0..0x0D8, // EFER
    0x148..0x160, // CR4 CR3 CR0
    0x160..0x180, // DR7 DR6 RFLAGS RIP
    0x1D8..0x1E0, // RSP
    0x1F8..0x200, // RAX
    0x268..0x270, // G_PAT
    0x308..0x320, // RCX RDX RBX
    0x328..0x380, // RBP RSI RDI R8 to R15
    0x3B0..0x3B8, // SEV_FEATURES
    0x3E8..0x3F0, // XCR0
    0x408..0x40C, // MXCSR
    0x410..0x412, // x87 FCW
];

/// Features that upstream KVM lets a guest have (Linux 7.2, `KVM_X86_SEV_VMSA_FEATURES`).
const KVM_FEATURES: u64 = 1 << 5 | 1 << 9;

pub(super) fn check(file: &File<'_>, processors: u16, found: &mut Found) {
    for header in &file.headers {
        if names::is_defined(header.kind) && !names::is_known_to_qemu(header.kind)
            || header.kind.0 >> 31 != 0
        {
            found.at(header, Rule::QemuType, names::header(header.kind));
        }
        check_ignored(header, found);
    }
    let chosen = PREFERENCE
        .iter()
        .filter_map(|kind| Some((*kind, file.mask_of(*kind)?)));
    let mut any = false;
    for (kind, mask) in chosen {
        any = true;
        check_contexts(file, kind, mask, processors, found);
        check_order(file, mask, kind == IgvmPlatformType::SEV_SNP, found);
    }
    if !any && let Some((header, platform)) = file.platforms().next() {
        let text = format!(
            "only {} and the like",
            names::platform(platform.platform_type)
        );
        found.at(header, Rule::QemuPlatform, text);
    }
}

/// What QEMU reads and does not do.
fn check_ignored(header: &Header<'_>, found: &mut Found) {
    match &header.content {
        Content::Platform(platform)
            // Natively there is none for anybody.
            if platform.platform_type != IgvmPlatformType::NATIVE
                && PREFERENCE.contains(&platform.platform_type)
                && platform.shared_gpa_boundary != 0 =>
        {
            let text = format!("boundary {:#x}", platform.shared_gpa_boundary);
            found.at(header, Rule::QemuBoundary, text);
        }
        Content::Page(page) if page.flags.shared() => {
            found.at(header, Rule::QemuShared, format!("page {:#x}", page.gpa));
        }
        Content::Area(area) if area.file_offset != 0 => {
            let text = format!("area {}", area.parameter_area_index);
            found.at(header, Rule::QemuAreaData, text);
        }
        Content::Parameter(parameter)
            if matches!(header.kind, Type::IGVM_VHT_MEMORY_MAP | Type::IGVM_VHT_MADT)
                && parameter.byte_offset != 0 =>
        {
            let name = names::header(header.kind);
            let text = format!("{name} at offset {:#x}", parameter.byte_offset);
            found.at(header, Rule::QemuOffset, text);
        }
        Content::IdBlock(block) => {
            if block.version != 1 {
                let text = format!("version {}", block.version);
                found.at(header, Rule::QemuIdVersion, text);
            }
            let read = id_block::as_qemu_reads(block).author_key_enabled != 0;
            if read != (block.author_key_enabled != 0) {
                let (flag, curve) = (block.author_key_enabled, block.author_public_key.curve);
                let text = format!("flag {flag}, and a key that begins with {curve:#010x}");
                found.at(header, Rule::QemuAuthorKey, text);
            }
        }
        _ => {}
    }
}

fn check_contexts(
    file: &File<'_>,
    kind: IgvmPlatformType,
    mask: u32,
    processors: u16,
    found: &mut Found,
) {
    let native = kind == IgvmPlatformType::NATIVE;
    let limit = if native { 1 } else { processors };
    let mut first = false;
    for header in file.of_platform(mask) {
        let Content::Context(context) = &header.content else {
            continue;
        };
        first |= context.vp_index == 0;
        if context.vp_index >= limit {
            let text = format!("processor {} of {limit}", context.vp_index);
            found.at(header, Rule::QemuProcessor, text);
        }
        if kind == IgvmPlatformType::SEV_SNP {
            check_vmsa(file, header, context.gpa.get(), found);
        }
        if native {
            check_gs_base(file, header, context, found);
        }
    }
    if !first {
        let text = format!("no context of processor 0 for {}", names::platform(kind));
        found.offset(file.fixed.headers.0, Rule::QemuNoContext, text);
    }
}

fn check_gs_base(
    file: &File<'_>,
    header: &Header<'_>,
    context: &IGVM_VHS_VP_CONTEXT,
    found: &mut Found,
) {
    // Data that is not there was reported with the platform's rules.
    let data = file.data(header, context.file_offset, PAGE_SIZE);
    let registers = data
        .ok()
        .and_then(|page| IgvmNativeVpContextX64::read_from_prefix(page).ok());
    if let Some((registers, _)) = registers
        && registers.gs_base != 0
    {
        let text = format!("gs_base {:#x}", registers.gs_base);
        found.at(header, Rule::QemuGsBase, text);
    }
}

fn check_vmsa(file: &File<'_>, header: &Header<'_>, gpa: u64, found: &mut Found) {
    if gpa != LAUNCH_GPA && gpa.is_multiple_of(PAGE_SIZE) {
        found.at(header, Rule::QemuVmsaAddress, format!("VMSA at {gpa:#x}"));
    }
    let Some(vmsa) = vmsa(file, header) else {
        return;
    };
    let bytes = vmsa.as_bytes();
    let mut next = 0;
    for range in PASSED_ON
        .into_iter()
        .chain(std::iter::once(bytes.len()..bytes.len()))
    {
        let refused = bytes.get(next..range.start).unwrap_or_default();
        if let Some(at) = refused.iter().position(|&byte| byte != 0) {
            let text = format!("byte {:#x} of the VMSA is set", next + at);
            found.at(header, Rule::QemuVmsaField, text);
            break;
        }
        next = range.end;
    }
    let features = vmsa.sev_features;
    if !features.contains(SevFeatures::SNP_ACTIVE)
        || features.bits() & !(KVM_FEATURES | SevFeatures::SNP_ACTIVE.bits()) != 0
    {
        let text = format!("SEV_FEATURES {:#x}", features.bits());
        found.at(header, Rule::QemuSevFeatures, text);
    }
}

/// Finds inserts behind pages, and pages behind VMSAs.
fn check_order(file: &File<'_>, mask: u32, measured: bool, found: &mut Found) {
    let mut pages = false;
    let mut context: Option<&Header<'_>> = None;
    for header in file.of_platform(mask) {
        match &header.content {
            Content::Page(_) | Content::Insert(_) if measured && context.is_some() => {
                if let Some(context) = context.take() {
                    found.at(context, Rule::KvmVmsaOrder, "a VMSA before pages");
                }
                pages = true;
            }
            Content::Page(_) => pages = true,
            Content::Insert(insert) if pages && measured => {
                let text = format!("an insert at {:#x} behind pages", insert.gpa);
                found.at(header, Rule::QemuInsertOrder, text);
            }
            Content::Context(_) => context = Some(header),
            _ => {}
        }
    }
}
