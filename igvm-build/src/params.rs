//! The launch parameters: what the paravisor is told about its own image.

use protocols::launch::{
    Acceptance, LaunchParams, MEMORY_MAP_SIZE, PlatformKind, REGION_GPA, REGION_SIZE, Touch,
};

use crate::firmware::Firmware;
use crate::image::Options;
use crate::layout::Layout;

/// Fills the launch parameter page of SEV-SNP.
pub fn build(layout: &Layout, firmware: Option<&Firmware<'_>>, options: &Options) -> LaunchParams {
    let mut params = LaunchParams::new();
    params.c_bit = options.c_bit;
    params.region_gpa = REGION_GPA;
    params.region_size = REGION_SIZE;
    params.image_end = layout.image_end;
    params.page_table_root = layout.page_tables;
    params.secrets_gpa = layout.secrets;
    params.cpuid_gpa = layout.cpuid;
    params.memory_map_gpa = layout.memory_map;
    params.memory_map_size = MEMORY_MAP_SIZE;
    params.general_gpa = layout.general;
    // Only in a trust domain does a touch come to the paravisor.
    params.set_acceptance(Acceptance {
        touch: Touch::FAULT,
        ..options.acceptance
    });
    params.fault = options.fault;
    if let Some(firmware) = firmware {
        params.firmware_gpa = firmware.gpa();
        params.firmware_size = firmware.bytes().len() as u64;
        params.firmware_reset_eip = firmware.reset_eip();
        params.igvm_parameter_gpa = firmware.igvm_parameter_gpa();
        params.igvm_hob_gpa = firmware.igvm_hob_gpa();
        for section in firmware.sections() {
            // `Firmware::parse` refuses more sections than there is room for.
            let added = params.push_section(*section);
            debug_assert!(added);
        }
    }
    params
}

/// The page of the native platform: that of SEV-SNP without what only SEV-SNP has.
pub fn native(snp: &LaunchParams) -> LaunchParams {
    LaunchParams {
        platform: PlatformKind::NATIVE,
        c_bit: 0,
        secrets_gpa: 0,
        cpuid_gpa: 0,
        data_gpa: 0,
        data_size: 0,
        ..snp.clone()
    }
}
