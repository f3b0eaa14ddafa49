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
    (Type::IGVM_VHT_CORIM_DOCUMENT, "CoRIM document", false),
    (Type::IGVM_VHT_CORIM_SIGNATURE, "CoRIM signature", false),
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

/// Bytes of the header that every table of ACPI begins with.
const ACPI_HEADER: u64 = 36;
/// Bytes of the header that every device tree begins with.
const DEVICE_TREE_HEADER: u64 = 40;

/// Types whose body says where in a parameter area the host writes something, and how many bytes it writes
/// at least.
const PARAMETERS: [(Type, u64); 10] = [
    (Type::IGVM_VHT_VP_COUNT_PARAMETER, 4),
    (Type::IGVM_VHT_SRAT, ACPI_HEADER),
    (Type::IGVM_VHT_MADT, ACPI_HEADER),
    // Two ranges.
    (Type::IGVM_VHT_MMIO_RANGES, 32),
    // One entry.
    (Type::IGVM_VHT_MEMORY_MAP, 24),
    (Type::IGVM_VHT_COMMAND_LINE, 1),
    (Type::IGVM_VHT_SLIT, ACPI_HEADER),
    (Type::IGVM_VHT_PPTT, ACPI_HEADER),
    (Type::IGVM_VHT_DEVICE_TREE, DEVICE_TREE_HEADER),
    (Type::IGVM_VHT_ENVIRONMENT_INFO_PARAMETER, 4),
];

/// Whether headers of this type are parameters.
#[must_use]
pub fn is_parameter(kind: Type) -> bool {
    least_bytes(kind).is_some()
}

/// How many bytes the host writes at least for a parameter of this type.
#[must_use]
pub fn least_bytes(kind: Type) -> Option<u64> {
    let known = PARAMETERS.iter().find(|(own, _)| *own == kind);
    known.map(|&(_, bytes)| bytes)
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
