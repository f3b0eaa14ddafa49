//! The image: all directives in the order QEMU's loader needs.
//!
//! QEMU (≥ 10.1, `backends/igvm.c`) acts on parameter inserts, required memory and processor
//! contexts at once, but collects pages into runs that it emits late. Only one order makes
//! what it launches, and hence measures, the order of the file:
//!
//! 1. parameter areas, what fills them, their inserts, and required memory;
//! 2. pages, ascending;
//! 3. the processor context, which KVM measures last in any case.
//!
//! It also refuses files with any type of header it does not know, so nothing else is used.

use igvm::{
    IgvmDirectiveHeader as Directive, IgvmFile, IgvmInitializationHeader, IgvmPlatformHeader,
    IgvmRevision,
};
use igvm_defs::{
    IGVM_VHS_PARAMETER, IGVM_VHS_PARAMETER_INSERT, IGVM_VHS_SUPPORTED_PLATFORM, IgvmPageDataFlags,
    IgvmPageDataType, IgvmPlatformType,
};
use protocols::addr::PAGE_SIZE;
use protocols::launch::{Acceptance, Fault, GENERAL_VP_COUNT_OFFSET, MEMORY_MAP_SIZE, REGION_GPA};
use protocols::measure::Digest;
use zerocopy::IntoBytes;

use crate::digest::launch_digest;
use crate::elf::Program;
use crate::error::Error;
use crate::firmware::Firmware;
use crate::layout::{Layout, REGION_END, page_behind, program_pages};
use crate::{page_tables, params, vmsa};

/// The one platform of the file, as bit of every compatibility mask.
pub const SNP_MASK: u32 = 1;

/// Launch policy (SNP ABI, table "Guest Policy Structure"): SMT allowed, and bit 17, which
/// must be one.
pub const POLICY: u64 = 1 << 16 | 1 << 17;

/// Parameter areas of the file.
mod area {
    pub const MEMORY_MAP: u32 = 0;
    pub const GENERAL: u32 = 1;
}

/// What can be chosen when an image is built.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Position of the C-bit: 51 on EPYC, 47 on the emulated machine.
    pub c_bit: u32,
    /// When the paravisor accepts memory.
    pub acceptance: Acceptance,
    /// A deliberate fault, for test builds of the paravisor.
    pub fault: Fault,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            c_bit: 51,
            acceptance: Acceptance::LAZY,
            fault: Fault::NONE,
        }
    }
}

/// A finished image.
#[derive(Debug, Clone)]
pub struct Image {
    /// The IGVM file.
    pub bytes: Vec<u8>,
    /// Its launch digest.
    pub digest: Digest,
    /// Where the pieces of the region lie.
    pub layout: Layout,
    /// Guest-physical address of the paravisor's map descriptor, if it has one.
    pub map_descriptor: Option<u64>,
    /// Where the host has to end the memory below 4 GiB that it tells the firmware about, if the
    /// firmware takes no memory map from the paravisor.
    pub low_end: Option<u64>,
}

/// Builds the image of a paravisor with or without a firmware.
///
/// The result depends on nothing but the arguments: no time, no path, no random order.
///
/// # Errors
///
/// When the program does not fit its region or the rules for segments, when the C-bit is not
/// a bit of an address, when the paravisor would refuse how memory is to be accepted, or when the firmware's areas lie in the paravisor's region.
pub fn build(
    program: &Program<'_>,
    firmware: Option<&Firmware<'_>>,
    options: &Options,
) -> Result<Image, Error> {
    if !(32..=51).contains(&options.c_bit) {
        return Err(Error::CBit {
            c_bit: options.c_bit,
        });
    }
    options.acceptance.check().map_err(Error::Acceptance)?;
    let program_pages = program_pages(program)?;
    let layout = Layout::behind(page_behind(&program_pages))?;

    let mut directives = parameter_directives(&layout);
    directives.extend(
        program_pages
            .iter()
            .map(|page| normal(page.gpa, &page.data)),
    );
    let tables = page_tables::build(&layout, &program_pages, options.c_bit);
    directives.extend(
        (layout.page_tables..)
            .step_by(PAGE_SIZE as usize)
            .zip(&tables)
            .map(|(gpa, table)| normal(gpa, table.as_bytes())),
    );
    let params = params::build(&layout, firmware, options);
    directives.push(normal(layout.params, params.as_bytes()));
    directives.push(page(layout.secrets, IgvmPageDataType::SECRETS, &[]));
    directives.push(page(layout.cpuid, IgvmPageDataType::CPUID_DATA, &[]));
    if let Some(firmware) = firmware {
        directives.extend(
            (firmware.gpa()..)
                .step_by(PAGE_SIZE as usize)
                .zip(firmware.bytes().chunks(PAGE_SIZE as usize))
                .map(|(gpa, data)| normal(gpa, data)),
        );
    }
    let vmsa = vmsa::build(&vmsa::Start {
        page_table_root: layout.page_tables,
        c_bit: options.c_bit,
        entry: program.entry(),
        params: layout.params,
    });
    directives.push(Directive::SnpVpContext {
        gpa: protocols::vmsa::LAUNCH_GPA,
        compatibility_mask: SNP_MASK,
        vp_index: 0,
        // The same page in the words of the igvm crate.
        vmsa: Box::new(zerocopy::transmute!(vmsa)),
    });

    let digest = launch_digest(&directives, SNP_MASK)?;
    Ok(Image {
        bytes: serialize(directives)?,
        digest,
        layout,
        map_descriptor: program.symbol(protocols::map::SYMBOL),
        low_end: firmware
            .filter(|firmware| firmware.igvm_parameter_gpa() == 0)
            .map(|_| REGION_GPA),
    })
}

/// The host's memory map and the number of processors, and the memory behind the image.
fn parameter_directives(layout: &Layout) -> Vec<Directive> {
    let areas = [
        (area::MEMORY_MAP, layout.memory_map, MEMORY_MAP_SIZE),
        (area::GENERAL, layout.general, PAGE_SIZE),
    ];
    let mut directives: Vec<_> = areas
        .iter()
        .map(
            |&(parameter_area_index, _, number_of_bytes)| Directive::ParameterArea {
                number_of_bytes,
                parameter_area_index,
                initial_data: Vec::new(),
            },
        )
        .collect();
    directives.push(Directive::MemoryMap(IGVM_VHS_PARAMETER {
        parameter_area_index: area::MEMORY_MAP,
        byte_offset: 0,
    }));
    directives.push(Directive::VpCount(IGVM_VHS_PARAMETER {
        parameter_area_index: area::GENERAL,
        byte_offset: GENERAL_VP_COUNT_OFFSET as u32,
    }));
    directives.extend(areas.iter().map(|&(parameter_area_index, gpa, _)| {
        Directive::ParameterInsert(IGVM_VHS_PARAMETER_INSERT {
            gpa,
            compatibility_mask: SNP_MASK,
            parameter_area_index,
        })
    }));
    if layout.image_end < REGION_END {
        directives.push(Directive::RequiredMemory {
            gpa: layout.image_end,
            compatibility_mask: SNP_MASK,
            number_of_bytes: (REGION_END - layout.image_end) as u32,
            vtl2_protectable: false,
        });
    }
    directives
}

/// A measured page. A page of zeroes is stored without data: the format gives it the same
/// meaning and the same measurement.
fn normal(gpa: u64, data: &[u8]) -> Directive {
    let data = if data.iter().all(|&byte| byte == 0) {
        &[]
    } else {
        data
    };
    page(gpa, IgvmPageDataType::NORMAL, data)
}

/// A page of any type.
fn page(gpa: u64, data_type: IgvmPageDataType, data: &[u8]) -> Directive {
    Directive::PageData {
        gpa,
        compatibility_mask: SNP_MASK,
        flags: IgvmPageDataFlags::new(),
        data_type,
        data: data.to_vec(),
    }
}

/// Puts the headers around the directives and writes the file.
fn serialize(directives: Vec<Directive>) -> Result<Vec<u8>, Error> {
    let platform = IgvmPlatformHeader::SupportedPlatform(IGVM_VHS_SUPPORTED_PLATFORM {
        compatibility_mask: SNP_MASK,
        highest_vtl: 0,
        platform_type: IgvmPlatformType::SEV_SNP,
        platform_version: igvm_defs::IGVM_SEV_SNP_PLATFORM_VERSION,
        shared_gpa_boundary: 0,
    });
    let policy = IgvmInitializationHeader::GuestPolicy {
        policy: POLICY,
        compatibility_mask: SNP_MASK,
    };
    let invalid = |error: igvm::Error| Error::NotIgvm {
        reason: error.to_string(),
    };
    let file = IgvmFile::new(IgvmRevision::V1, vec![platform], vec![policy], directives)
        .map_err(invalid)?;
    let mut bytes = Vec::new();
    file.serialize(&mut bytes).map_err(invalid)?;
    Ok(bytes)
}
