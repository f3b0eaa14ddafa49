//! What headers, platforms and pages are called in messages.

use igvm_defs::{IgvmPageDataType, IgvmPlatformType, IgvmVariableHeaderType as Type};

/// SEV without encrypted registers. (The `igvm_defs` crate calls these three unstable.)
pub const SEV: IgvmPlatformType = IgvmPlatformType(4);
/// SEV-ES.
pub const SEV_ES: IgvmPlatformType = IgvmPlatformType(5);
/// Arm CCA.
pub const CCA: IgvmPlatformType = IgvmPlatformType(6);

/// All types of headers that are defined: their names, and whether QEMU 11.0.1 knows them
/// (`backends/igvm.c`).
const HEADERS: [(Type, &str, bool); 26] = [
    (Type::IGVM_VHT_SUPPORTED_PLATFORM, "platform", true),
    (Type::IGVM_VHT_GUEST_POLICY, "policy", true),
    (
        Type::IGVM_VHT_RELOCATABLE_REGION,
        "relocatable region",
        false,
    ),
    (
        Type::IGVM_VHT_PAGE_TABLE_RELOCATION_REGION,
        "page table relocation",
        false,
    ),
    (Type(0x104), "CoRIM document", false),
    (Type(0x105), "CoRIM signature", false),
    (Type(0x106), "CCA policy", false),
    (Type(0x107), "version string", false),
    (Type::IGVM_VHT_PARAMETER_AREA, "parameter area", true),
    (Type::IGVM_VHT_PAGE_DATA, "page", true),
    (Type::IGVM_VHT_PARAMETER_INSERT, "parameter insert", true),
    (Type::IGVM_VHT_VP_CONTEXT, "processor context", true),
    (Type::IGVM_VHT_REQUIRED_MEMORY, "required memory", true),
    (
        Type::IGVM_VHT_VP_COUNT_PARAMETER,
        "number of processors",
        true,
    ),
    (Type::IGVM_VHT_SRAT, "SRAT", false),
    (Type::IGVM_VHT_MADT, "MADT", true),
    (Type::IGVM_VHT_MMIO_RANGES, "MMIO ranges", false),
    (Type::IGVM_VHT_SNP_ID_BLOCK, "ID block", true),
    (Type::IGVM_VHT_MEMORY_MAP, "memory map", true),
    (Type::IGVM_VHT_ERROR_RANGE, "error range", false),
    (Type::IGVM_VHT_COMMAND_LINE, "command line", false),
    (Type::IGVM_VHT_SLIT, "SLIT", false),
    (Type::IGVM_VHT_PPTT, "PPTT", false),
    (Type::IGVM_VHT_VBS_MEASUREMENT, "VBS measurement", false),
    (Type::IGVM_VHT_DEVICE_TREE, "device tree", false),
    (
        Type::IGVM_VHT_ENVIRONMENT_INFO_PARAMETER,
        "environment",
        true,
    ),
];

/// Types whose body says where in a parameter area the host writes something.
const PARAMETERS: [Type; 10] = [
    Type::IGVM_VHT_VP_COUNT_PARAMETER,
    Type::IGVM_VHT_SRAT,
    Type::IGVM_VHT_MADT,
    Type::IGVM_VHT_MMIO_RANGES,
    Type::IGVM_VHT_MEMORY_MAP,
    Type::IGVM_VHT_COMMAND_LINE,
    Type::IGVM_VHT_SLIT,
    Type::IGVM_VHT_PPTT,
    Type::IGVM_VHT_DEVICE_TREE,
    Type::IGVM_VHT_ENVIRONMENT_INFO_PARAMETER,
];

/// Whether headers of this type are parameters.
#[must_use]
pub fn is_parameter(kind: Type) -> bool {
    PARAMETERS.contains(&kind)
}

/// Whether the format defines this type.
#[must_use]
pub fn is_defined(kind: Type) -> bool {
    known(kind).is_some()
}

/// Whether QEMU 11.0.1 knows this type.
#[must_use]
pub fn is_known_to_qemu(kind: Type) -> bool {
    known(kind).is_some_and(|(_, _, qemu)| *qemu)
}

fn known(kind: Type) -> Option<&'static (Type, &'static str, bool)> {
    HEADERS.iter().find(|(own, _, _)| *own == kind)
}

/// Name of a type of header, with its number if it has none.
#[must_use]
pub fn header(kind: Type) -> String {
    known(kind).map_or_else(
        || format!("header of type {:#x}", kind.0),
        |(_, name, _)| (*name).to_owned(),
    )
}

/// Name of a platform, with its number if it has none.
#[must_use]
pub fn platform(kind: IgvmPlatformType) -> String {
    match kind {
        IgvmPlatformType::NATIVE => "native".to_owned(),
        IgvmPlatformType::VSM_ISOLATION => "VSM".to_owned(),
        IgvmPlatformType::SEV_SNP => "SEV-SNP".to_owned(),
        IgvmPlatformType::TDX => "TDX".to_owned(),
        SEV => "SEV".to_owned(),
        SEV_ES => "SEV-ES".to_owned(),
        CCA => "CCA".to_owned(),
        other => format!("platform {}", other.0),
    }
}

/// Whether the format defines this platform.
#[must_use]
pub const fn is_platform(kind: IgvmPlatformType) -> bool {
    kind.0 <= CCA.0
}

/// Name of the type of a page's data, with its number if it has none.
#[must_use]
pub fn page(kind: IgvmPageDataType) -> String {
    match kind {
        IgvmPageDataType::NORMAL => "normal".to_owned(),
        IgvmPageDataType::SECRETS => "secrets".to_owned(),
        IgvmPageDataType::CPUID_DATA => "CPUID".to_owned(),
        IgvmPageDataType::CPUID_XF => "CPUID_XF".to_owned(),
        other => format!("type {}", other.0),
    }
}
