//! The TDX platform of an image: what is launched where no processor state can be.
//!
//! A trust domain's processors start at the reset vector, all at once. Its page says where in the
//! region the first code, the page tables and the launch parameters are. The firmware's own last page
//! belongs at the same address; it waits in the region, on the page that holds the secrets on SEV-SNP,
//! until every processor has left the reset vector.
//!
//! The page tables have no C-bit: a private address is one without the shared bit.

use igvm::{IgvmDirectiveHeader as Directive, IgvmInitializationHeader, IgvmPlatformHeader};
use igvm_defs::{IGVM_TDX_PLATFORM_VERSION, IGVM_VHS_SUPPORTED_PLATFORM, IgvmPlatformType};
use protocols::addr::PAGE_SIZE;
use protocols::launch::{LaunchParams, PlatformKind, ResetPage};
use protocols::ovmf::RESET_VECTOR;
use zerocopy::IntoBytes;

use crate::elf::Program;
use crate::error::Error;
use crate::image::normal;
use crate::layout::Layout;
use crate::page_tables::Table;
use crate::td_firmware::TdFirmware;

/// TDX, as bit of compatibility masks.
pub const TDX_MASK: u32 = 4;

/// Bits of guest-physical addresses: the machine's, and the smaller of the two that TDX has.
const GPA_WIDTH: u32 = 48;

/// No debugging, no migration, #VE for pages that are not accepted.
const POLICY: u64 = 0;

/// The highest of the VMs: the paravisor is L1, the guest the first L2 VM.
const HIGHEST_VM: u8 = 2;

/// What only this platform launches, in ascending order of addresses.
///
/// # Errors
///
/// [`Error::NoTdStart`] when the paravisor has no code for it.
pub fn directives(
    program: &Program<'_>,
    firmware: &TdFirmware<'_>,
    layout: &Layout,
    tables: &[Table],
    shared: &LaunchParams,
) -> Result<Vec<Directive>, Error> {
    let no_start = Error::NoTdStart {
        symbol: ResetPage::SYMBOL,
    };
    let start = program.symbol(ResetPage::SYMBOL).ok_or(no_start)?;
    let params = params(firmware, layout, shared);
    // All in the region, which is below 4 GiB.
    let reset = ResetPage::new(
        layout.page_tables as u32,
        layout.params as u32,
        start as u32,
    );
    let (image, last_page) = firmware
        .bytes()
        .split_at(firmware.bytes().len() - PAGE_SIZE as usize);

    let mut directives: Vec<_> = (layout.page_tables..)
        .step_by(PAGE_SIZE as usize)
        .zip(tables)
        .map(|(gpa, table)| normal(gpa, table.as_bytes(), TDX_MASK))
        .collect();
    directives.push(normal(layout.params, params.as_bytes(), TDX_MASK));
    directives.push(normal(layout.secrets, last_page, TDX_MASK));
    // The launched part of the region has no holes.
    directives.push(normal(layout.cpuid, &[], TDX_MASK));
    directives.extend(
        (firmware.gpa()..)
            .step_by(PAGE_SIZE as usize)
            .zip(image.chunks(PAGE_SIZE as usize))
            .map(|(gpa, data)| normal(gpa, data, TDX_MASK)),
    );
    directives.push(normal(ResetPage::GPA, reset.as_bytes(), TDX_MASK));
    Ok(directives)
}

/// The launch parameters: those of SEV-SNP with this platform's firmware and without what only SEV-SNP
/// has.
fn params(firmware: &TdFirmware<'_>, layout: &Layout, snp: &LaunchParams) -> LaunchParams {
    let mut params = LaunchParams {
        platform: PlatformKind::TDX,
        c_bit: 0,
        secrets_gpa: 0,
        cpuid_gpa: 0,
        firmware_gpa: firmware.gpa(),
        firmware_size: firmware.bytes().len() as u64,
        firmware_reset_eip: RESET_VECTOR,
        firmware_last_page: layout.secrets,
        igvm_parameter_gpa: 0,
        igvm_hob_gpa: 0,
        data_gpa: 0,
        data_size: 0,
        section_count: 0,
        sections: LaunchParams::new().sections,
        ..snp.clone()
    };
    for section in firmware.sections() {
        // `TdFirmware::parse` refuses more sections than there is room for.
        let added = params.push_section(*section);
        debug_assert!(added);
    }
    params
}

/// The platform's header.
pub fn platform() -> IgvmPlatformHeader {
    IgvmPlatformHeader::SupportedPlatform(IGVM_VHS_SUPPORTED_PLATFORM {
        compatibility_mask: TDX_MASK,
        highest_vtl: HIGHEST_VM,
        platform_type: IgvmPlatformType::TDX,
        platform_version: IGVM_TDX_PLATFORM_VERSION,
        shared_gpa_boundary: 1 << (GPA_WIDTH - 1),
    })
}

/// The platform's launch policy.
pub fn policy() -> IgvmInitializationHeader {
    IgvmInitializationHeader::GuestPolicy {
        policy: POLICY,
        compatibility_mask: TDX_MASK,
    }
}
