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
//!
//! A file with a firmware is for two platforms: SEV-SNP, and native (decision 019), which a loader
//! takes where there is nothing confidential. Program and firmware are the same pages for both. What
//! differs (page tables, launch parameters, secrets and CPUID pages, processor state) lies at the
//! same addresses in two forms, each with its platform's mask, so SEV-SNP is launched and measured as
//! if the other platforms were not there. With a firmware for trust domains the file is for TDX, too
//! ([`crate::tdx`]); that platform shares the program and what the host fills in, and has pages of its
//! own for all else.

use igvm::{
    IgvmDirectiveHeader as Directive, IgvmFile, IgvmInitializationHeader, IgvmPlatformHeader,
    IgvmRevision,
};
use igvm_defs::{
    IGVM_NATIVE_PLATFORM_VERSION, IGVM_SEV_SNP_PLATFORM_VERSION, IGVM_VHS_PARAMETER,
    IGVM_VHS_PARAMETER_INSERT, IGVM_VHS_SUPPORTED_PLATFORM, IgvmPageDataFlags, IgvmPageDataType,
    IgvmPlatformType,
};
use protocols::addr::PAGE_SIZE;
use protocols::launch::{
    Acceptance, Fault, GENERAL_VP_COUNT_OFFSET, LaunchParams, MEMORY_MAP_SIZE, REGION_GPA, Touch,
};
use protocols::measure::Digest;
use zerocopy::IntoBytes;

use crate::elf::Program;
use crate::error::Error;
use crate::file::File;
use crate::firmware::Firmware;
use crate::handover::{self, Item};
use crate::layout::{Layout, page_behind, program_pages};
use crate::measure::{self, quietly};
use crate::target::Target;
use crate::td_firmware::TdFirmware;
use crate::tdx::{self, TDX_MASK};
use crate::{native, page_tables, params, vmsa};

/// SEV-SNP, as bit of compatibility masks.
pub const SNP_MASK: u32 = 1;
/// The native platform, as bit of compatibility masks.
pub const NATIVE_MASK: u32 = 2;

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
    /// Whether an image with a firmware is for the native platform as well, where its loader can be.
    pub native: bool,
    /// Whose loader it is for.
    pub target: Target,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            c_bit: 51,
            acceptance: Acceptance::LAZY,
            fault: Fault::NONE,
            native: true,
            target: Target::Qemu,
        }
    }
}

/// A finished image.
#[derive(Debug, Clone)]
pub struct Image {
    /// The IGVM file.
    pub bytes: Vec<u8>,
    /// Its launch digest on SEV-SNP.
    pub digest: Digest,
    /// Its measurement as a trust domain, if it is for TDX.
    pub mrtd: Option<Digest>,
    /// Where the pieces of the region lie.
    pub layout: Layout,
    /// Guest-physical address of the paravisor's map descriptor, if it has one.
    pub map_descriptor: Option<u64>,
    /// Where the host has to end the memory below 4 GiB that it tells the firmware about, if the
    /// firmware takes no memory map from the paravisor.
    pub low_end: Option<u64>,
}

/// Builds the image of a paravisor with or without a firmware, and with or without one for trust
/// domains.
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
    td_firmware: Option<&TdFirmware<'_>>,
    options: &Options,
) -> Result<Image, Error> {
    build_with_data(program, firmware, td_firmware, &[], options)
}

/// The same, with data that the firmware is handed on SEV-SNP.
///
/// # Errors
///
/// As [`build`]; and when the firmware has no area for the list of the data, or there is too much of it.
pub fn build_with_data(
    program: &Program<'_>,
    firmware: Option<&Firmware<'_>>,
    td_firmware: Option<&TdFirmware<'_>>,
    items: &[Item<'_>],
    options: &Options,
) -> Result<Image, Error> {
    if !(32..=51).contains(&options.c_bit) {
        return Err(Error::CBit {
            c_bit: options.c_bit,
        });
    }
    options.acceptance.check().map_err(Error::Acceptance)?;
    if options.acceptance.touch != Touch::FAULT && td_firmware.is_none() {
        return Err(Error::TouchWithoutTd);
    }
    let program_pages = program_pages(program)?;
    let layout = Layout::behind(page_behind(&program_pages))?;

    // Natively the paravisor's last act is to start a firmware.
    let with_native = options.native && options.target.has_native() && firmware.is_some();
    let untrusting = SNP_MASK | if with_native { NATIVE_MASK } else { 0 };
    let all = untrusting | td_firmware.map_or(0, |_| TDX_MASK);
    let mut directives = parameter_directives(&layout, options.target, all);
    directives.extend(
        program_pages
            .iter()
            .map(|page| normal(page.gpa, &page.data, all)),
    );
    let mut params = params::build(&layout, firmware, options);
    let data = handover::pages(items, firmware)?;
    if !data.is_empty() {
        params.data_gpa = handover::DATA_GPA;
        params.data_size = (data.len() as u64) * PAGE_SIZE;
    }
    let tables = page_tables::build(&layout, &program_pages, Some(options.c_bit));
    directives.extend(table_pages(&layout, &tables, SNP_MASK));
    directives.push(normal(layout.params, params.as_bytes(), SNP_MASK));
    directives.push(page(
        layout.secrets,
        IgvmPageDataType::SECRETS,
        &[],
        SNP_MASK,
    ));
    directives.push(page(
        layout.cpuid,
        IgvmPageDataType::CPUID_DATA,
        &[],
        SNP_MASK,
    ));
    if with_native {
        let tables = page_tables::build(&layout, &program_pages, None);
        directives.extend(table_pages(&layout, &tables, NATIVE_MASK));
        let params = params::native(&params);
        directives.push(normal(layout.params, params.as_bytes(), NATIVE_MASK));
        // The launched part of the region has no holes.
        directives.push(normal(layout.secrets, &[], NATIVE_MASK));
        directives.push(normal(layout.cpuid, &[], NATIVE_MASK));
    }
    directives.extend(
        (handover::DATA_GPA..)
            .step_by(PAGE_SIZE as usize)
            .zip(&data)
            .map(|(gpa, page)| normal(gpa, page, SNP_MASK)),
    );
    if let Some(firmware) = firmware {
        directives.extend(
            (firmware.gpa()..)
                .step_by(PAGE_SIZE as usize)
                .zip(firmware.bytes().chunks(PAGE_SIZE as usize))
                .map(|(gpa, data)| normal(gpa, data, untrusting)),
        );
    }
    if let Some(td_firmware) = td_firmware {
        let tables = page_tables::build(&layout, &program_pages, None);
        directives.extend(tdx::directives(
            program,
            td_firmware,
            &layout,
            &tables,
            &LaunchParams {
                touch: options.acceptance.touch,
                ..params
            },
        )?);
    }
    if with_native {
        directives.push(Directive::X64NativeVpContext {
            compatibility_mask: NATIVE_MASK,
            vp_index: 0,
            context: Box::new(native::context(
                layout.page_tables,
                program.entry(),
                layout.params,
            )),
        });
    }
    let mut vmsa = vmsa::build(&vmsa::Start {
        page_table_root: layout.page_tables,
        c_bit: options.c_bit,
        entry: program.entry(),
        params: layout.params,
    });
    options.target.adjust(&mut vmsa);
    directives.push(Directive::SnpVpContext {
        gpa: options.target.vmsa_gpa(),
        compatibility_mask: SNP_MASK,
        vp_index: 0,
        // The same page in the words of the igvm crate.
        vmsa: Box::new(zerocopy::transmute!(vmsa)),
    });

    let highest_vtl = options.target.highest_vtl(firmware.is_some());
    let bytes = serialize(directives, options.target, highest_vtl, all)?;
    // What was written is read again, as anybody who measures the image does.
    let file = File::read(&bytes)?;
    let digest = measure::snp::launch_digest(&file, options.target.loader(), &mut quietly)?;
    let mrtd = td_firmware
        .map(|_| measure::tdx::mrtd(&file, &mut quietly))
        .transpose()?;
    Ok(Image {
        bytes,
        digest,
        mrtd,
        layout,
        map_descriptor: program.symbol(protocols::map::SYMBOL),
        low_end: firmware
            .filter(|firmware| firmware.igvm_parameter_gpa() == 0)
            .map(|_| REGION_GPA),
    })
}

/// The host's memory map and the number of processors, and the memory behind the image.
fn parameter_directives(layout: &Layout, target: Target, mask: u32) -> Vec<Directive> {
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
            compatibility_mask: mask,
            parameter_area_index,
        })
    }));
    let end = target.region_end();
    if layout.image_end < end {
        directives.push(Directive::RequiredMemory {
            gpa: layout.image_end,
            compatibility_mask: mask,
            number_of_bytes: (end - layout.image_end) as u32,
            vtl2_protectable: false,
        });
    }
    directives
}

/// A measured page. A page of zeroes is stored without data: the format gives it the same
/// meaning and the same measurement.
pub(crate) fn normal(gpa: u64, data: &[u8], mask: u32) -> Directive {
    let data = if data.iter().all(|&byte| byte == 0) {
        &[]
    } else {
        data
    };
    page(gpa, IgvmPageDataType::NORMAL, data, mask)
}

/// The page tables of one platform.
fn table_pages(
    layout: &Layout,
    tables: &[page_tables::Table],
    mask: u32,
) -> impl Iterator<Item = Directive> {
    (layout.page_tables..)
        .step_by(PAGE_SIZE as usize)
        .zip(tables)
        .map(move |(gpa, table)| normal(gpa, table.as_bytes(), mask))
}

/// A page of any type.
fn page(gpa: u64, data_type: IgvmPageDataType, data: &[u8], mask: u32) -> Directive {
    Directive::PageData {
        gpa,
        compatibility_mask: mask,
        flags: IgvmPageDataFlags::new(),
        data_type,
        data: data.to_vec(),
    }
}

/// Puts the headers around the directives and writes the file.
fn serialize(
    directives: Vec<Directive>,
    target: Target,
    highest_vtl: u8,
    all: u32,
) -> Result<Vec<u8>, Error> {
    let mut platforms = vec![IgvmPlatformHeader::SupportedPlatform(
        IGVM_VHS_SUPPORTED_PLATFORM {
            compatibility_mask: SNP_MASK,
            highest_vtl,
            platform_type: IgvmPlatformType::SEV_SNP,
            platform_version: IGVM_SEV_SNP_PLATFORM_VERSION,
            shared_gpa_boundary: target.shared_boundary(),
        },
    )];
    if all & NATIVE_MASK != 0 {
        platforms.push(IgvmPlatformHeader::SupportedPlatform(
            IGVM_VHS_SUPPORTED_PLATFORM {
                compatibility_mask: NATIVE_MASK,
                highest_vtl: 0,
                platform_type: IgvmPlatformType::NATIVE,
                platform_version: IGVM_NATIVE_PLATFORM_VERSION,
                shared_gpa_boundary: 0,
            },
        ));
    }
    let mut policies = vec![IgvmInitializationHeader::GuestPolicy {
        policy: POLICY,
        compatibility_mask: SNP_MASK,
    }];
    if all & TDX_MASK != 0 {
        platforms.push(tdx::platform());
        policies.push(tdx::policy());
    }
    let invalid = |error: igvm::Error| Error::Unwritable {
        reason: error.to_string(),
    };
    let file = IgvmFile::new(IgvmRevision::V1, platforms, policies, directives).map_err(invalid)?;
    let mut bytes = Vec::new();
    file.serialize(&mut bytes).map_err(invalid)?;
    Ok(bytes)
}
