//! A table of what is in an IGVM file, and its launch digest.
//!
//! Any IGVM file with an SEV-SNP platform can be shown, not only those built here. What is
//! shown is parsed from the file, never remembered from building it.

use std::fmt::{self, Write as _};

use igvm::snp_defs::SevVmsa;
use igvm::{
    IgvmDirectiveHeader as Directive, IgvmFile, IgvmInitializationHeader, IgvmPlatformHeader,
    IsolationType,
};
use igvm_defs::{IgvmPageDataFlags, IgvmPageDataType, IgvmPlatformType};
use protocols::addr::PAGE_SIZE;
use protocols::launch::LaunchParams;
use zerocopy::FromBytes;

use crate::accept;
use crate::digest::launch_digest;
use crate::error::Error;
use crate::sidecar::hex;

/// Describes the IGVM file in `bytes`, one line per run of like pages.
///
/// # Errors
///
/// When the bytes are no valid IGVM file or the file is not for SEV-SNP.
pub fn show(bytes: &[u8]) -> Result<String, Error> {
    let file = IgvmFile::new_from_binary(bytes, Some(IsolationType::Snp)).map_err(|error| {
        Error::NotIgvm {
            reason: error.to_string(),
        }
    })?;
    let IgvmPlatformHeader::SupportedPlatform(platform) = file
        .platforms()
        .iter()
        .find(|IgvmPlatformHeader::SupportedPlatform(p)| {
            p.platform_type == IgvmPlatformType::SEV_SNP
        })
        .ok_or(Error::NoSnpPlatform)?;
    let digest = launch_digest(file.directives(), platform.compatibility_mask)?;
    let others = other_platforms(bytes);
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "file               {} bytes, platform SEV-SNP{others}",
        bytes.len()
    );
    let _ = write_all(&mut text, &file);
    let _ = writeln!(text, "launch digest      {}", hex(&digest));
    Ok(text)
}

/// The platforms the file is for besides SEV-SNP, which is all that is shown further.
fn other_platforms(bytes: &[u8]) -> String {
    let Ok(file) = IgvmFile::new_from_binary(bytes, None) else {
        return String::new();
    };
    file.platforms()
        .iter()
        .map(|IgvmPlatformHeader::SupportedPlatform(platform)| platform.platform_type)
        .filter(|&platform| platform != IgvmPlatformType::SEV_SNP)
        .map(|platform| match platform {
            IgvmPlatformType::NATIVE => ", also native".to_owned(),
            other => format!(", also {other:?}"),
        })
        .collect()
}

fn write_all(text: &mut String, file: &IgvmFile) -> fmt::Result {
    for header in file.initializations() {
        if let IgvmInitializationHeader::GuestPolicy { policy, .. } = header {
            writeln!(text, "policy             {policy:#x}")?;
        }
    }
    let mut run: Option<Run> = None;
    for directive in file.directives() {
        let next = Run::of(directive);
        if let (Some(run), Some(next)) = (&mut run, &next)
            && run.absorb(next)
        {
            continue;
        }
        if let Some(run) = run.take() {
            run.write(text)?;
        }
        match next {
            Some(next) => run = Some(next),
            None => write_directive(text, directive)?,
        }
    }
    if let Some(run) = run {
        run.write(text)?;
    }
    if let Some(params) = find_params(file) {
        write_params(text, &params)?;
    }
    Ok(())
}

/// Adjacent pages of one kind.
struct Run {
    start: u64,
    end: u64,
    kind: &'static str,
    /// Whether the pages are stored without data.
    zero: bool,
}

impl Run {
    /// The run of one page, if `directive` is a page.
    fn of(directive: &Directive) -> Option<Self> {
        let Directive::PageData {
            gpa,
            flags,
            data_type,
            data,
            ..
        } = directive
        else {
            return None;
        };
        Some(Self {
            start: *gpa,
            end: gpa.saturating_add(PAGE_SIZE),
            kind: page_kind(*data_type, flags),
            zero: data.is_empty(),
        })
    }

    /// Takes in the pages of `next` if they continue this run.
    fn absorb(&mut self, next: &Self) -> bool {
        let continues = self.end == next.start && self.kind == next.kind && self.zero == next.zero;
        if continues {
            self.end = next.end;
        }
        continues
    }

    fn write(&self, text: &mut String) -> fmt::Result {
        let pages = (self.end - self.start) / PAGE_SIZE;
        let zero = if self.zero && self.kind == "measured" {
            ", zero"
        } else {
            ""
        };
        writeln!(
            text,
            "pages              {:#014x}..{:#014x} {pages:>6} × 4 KiB  {}{zero}",
            self.start, self.end, self.kind
        )
    }
}

fn page_kind(data_type: IgvmPageDataType, flags: &IgvmPageDataFlags) -> &'static str {
    match data_type {
        IgvmPageDataType::SECRETS => "secrets",
        IgvmPageDataType::CPUID_DATA | IgvmPageDataType::CPUID_XF => "CPUID",
        _ if flags.shared() => "shared",
        _ if flags.unmeasured() => "unmeasured",
        _ => "measured",
    }
}

fn write_directive(text: &mut String, directive: &Directive) -> fmt::Result {
    match directive {
        Directive::ParameterArea {
            number_of_bytes,
            parameter_area_index,
            ..
        } => writeln!(
            text,
            "parameter area     index {parameter_area_index}, {number_of_bytes} bytes"
        ),
        Directive::VpCount(usage) => writeln!(
            text,
            "parameter          number of processors at area {} + {:#x}",
            usage.parameter_area_index, usage.byte_offset
        ),
        Directive::MemoryMap(usage) => writeln!(
            text,
            "parameter          memory map at area {} + {:#x}",
            usage.parameter_area_index, usage.byte_offset
        ),
        Directive::ParameterInsert(insert) => writeln!(
            text,
            "parameter insert   {:#014x} area {}, unmeasured",
            insert.gpa, insert.parameter_area_index
        ),
        Directive::RequiredMemory {
            gpa,
            number_of_bytes,
            ..
        } => writeln!(
            text,
            "required memory    {gpa:#014x}..{:#014x}, not launched",
            gpa.saturating_add(u64::from(*number_of_bytes))
        ),
        Directive::SnpVpContext {
            gpa,
            vp_index,
            vmsa,
            ..
        } => write_vmsa(text, *gpa, *vp_index, vmsa),
        // A file of another builder; the parser of the igvm crate knows how to print it.
        other => writeln!(text, "other              {other}"),
    }
}

fn write_vmsa(text: &mut String, gpa: u64, vp_index: u16, vmsa: &SevVmsa) -> fmt::Result {
    writeln!(
        text,
        "processor {vp_index}        VMSA at {gpa:#x}, VMPL {}",
        vmsa.vmpl
    )?;
    writeln!(
        text,
        "                   rip {:#x} rdi {:#x} rsp {:#x} rflags {:#x}",
        vmsa.rip, vmsa.rdi, vmsa.rsp, vmsa.rflags
    )?;
    writeln!(
        text,
        "                   cr0 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x} sev features {:#x}",
        vmsa.cr0,
        vmsa.cr3,
        vmsa.cr4,
        vmsa.efer,
        u64::from(vmsa.sev_features)
    )
}

/// Finds Turnstile's launch parameters: the page RDI of the first processor points to.
fn find_params(file: &IgvmFile) -> Option<LaunchParams> {
    let rdi = file
        .directives()
        .iter()
        .find_map(|directive| match directive {
            Directive::SnpVpContext { vmsa, .. } => Some(vmsa.rdi),
            _ => None,
        })?;
    let data = file
        .directives()
        .iter()
        .find_map(|directive| match directive {
            Directive::PageData { gpa, data, .. } if *gpa == rdi => Some(data),
            _ => None,
        })?;
    // The file may leave out trailing zeroes of a page.
    let mut page = data.clone();
    page.resize(PAGE_SIZE as usize, 0);
    LaunchParams::read_from_bytes(&page)
        .ok()
        .filter(LaunchParams::is_understood)
}

fn write_params(text: &mut String, params: &LaunchParams) -> fmt::Result {
    writeln!(
        text,
        "launch parameters  C-bit {}, region {:#x} + {:#x}, launched up to {:#x}",
        params.c_bit, params.region_gpa, params.region_size, params.image_end
    )?;
    writeln!(
        text,
        "                   accepts {}; fault {}",
        accept::describe(&params.acceptance()),
        params.fault.name().unwrap_or("unknown")
    )?;
    if params.firmware_size == 0 {
        return writeln!(text, "firmware           none");
    }
    writeln!(
        text,
        "firmware           {:#x} + {:#x}, reset vector {:#x}",
        params.firmware_gpa, params.firmware_size, params.firmware_reset_eip
    )?;
    if params.igvm_parameter_gpa != 0 {
        writeln!(
            text,
            "                   memory map goes to {:#x}",
            params.igvm_parameter_gpa
        )?;
    }
    for section in params.sections() {
        writeln!(
            text,
            "                   {:#014x} + {:#08x} {}",
            section.gpa,
            section.size,
            section.kind.name().unwrap_or("unknown")
        )?;
    }
    Ok(())
}
