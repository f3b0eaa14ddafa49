//! The IGVM file, read as a host that trusts nothing in it.
//!
//! This reader shares no code with `igvm-build`: what the one writes, the other checks. It
//! takes what QEMU's loader takes for an SEV-SNP guest, or for an ordinary one in plain mode (QEMU
//! `backends/igvm.c`), or the same for a TDX guest (which QEMU has no loader for; `igvm.md` §7), and
//! refuses the rest by name. Stricter than QEMU: overlapping pages, reserved fields, shared and 2 MiB
//! pages, and initial contents of parameter areas (which QEMU ignores) are errors.
//!
//! Invariants of a [`File`]:
//!
//! 1. every reference into the file's data lies in it, and data is one page long;
//! 2. addresses are page aligned, no range wraps, and no two of the pages launched overlap;
//! 3. a parameter area is declared before it is used, used inside its bounds, and not used
//!    after it was inserted;
//! 4. headers that are for other platforms only were checked for form and left out.

mod error;
mod reader;

use alloc::boxed::Box;
use alloc::vec::Vec;

use igvm_defs::{
    IGVM_FIXED_HEADER, IGVM_FORMAT_VERSION_1, IGVM_MAGIC_VALUE, IGVM_VHS_SNP_ID_BLOCK,
};
use zerocopy::{FromBytes, IntoBytes};

use super::crc32::Crc32;
use crate::settings::PlatformKind;
use crate::types::Gpa;

pub use error::FileError;
use reader::{Reader, split_header};

/// A parameter that the host fills in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Parameter {
    /// The memory map.
    MemoryMap,
    /// The number of virtual processors.
    VpCount,
}

/// What a page of data is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PageKind<'a> {
    /// Measured; no data means zeroes.
    Normal(Option<&'a [u8]>),
    /// Not measured; no data means zeroes.
    Unmeasured(Option<&'a [u8]>),
    /// The secrets page.
    Secrets,
    /// The CPUID page.
    Cpuid,
}

/// One thing to be done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Directive<'a> {
    /// Make a parameter area of so many bytes, zeroed.
    Area {
        /// Its number.
        index: u32,
        /// Whole pages.
        bytes: u64,
    },
    /// Write a parameter into an area.
    Fill {
        /// Number of the area.
        index: u32,
        /// Where in the area.
        offset: u32,
        /// What.
        parameter: Parameter,
    },
    /// Launch an area as unmeasured pages.
    Insert {
        /// Where.
        gpa: Gpa,
        /// Number of the area.
        index: u32,
    },
    /// There must be memory, private and not launched.
    RequiredMemory {
        /// Where.
        gpa: Gpa,
        /// Whole pages.
        bytes: u64,
    },
    /// Launch a page.
    Page {
        /// Where.
        gpa: Gpa,
        /// What.
        kind: PageKind<'a>,
    },
    /// Launch a VMSA; natively, start from a context.
    Context {
        /// Where; on SNP by convention, natively nowhere.
        gpa: Gpa,
        /// Which virtual processor.
        vp_index: u16,
        /// One page.
        vmsa: &'a [u8],
    },
}

/// A checked IGVM file.
#[derive(Clone, Debug)]
pub struct File<'a> {
    /// The platform it was read for.
    pub platform: PlatformKind,
    /// The launch policy, if the file has one.
    pub policy: Option<u64>,
    /// The ID block, if the file has one.
    pub id_block: Option<Box<IGVM_VHS_SNP_ID_BLOCK>>,
    /// What is to be done for that platform, in the order of the file.
    pub directives: Vec<Directive<'a>>,
}

impl<'a> File<'a> {
    /// Reads and checks a file for the `wanted` platform. If none is wanted: for SEV-SNP if the file
    /// has it, else for TDX.
    pub fn parse(bytes: &'a [u8], wanted: Option<PlatformKind>) -> Result<Self, FileError> {
        let header = fixed_header(bytes)?;
        let start = header.variable_header_offset as usize;
        let end = start + header.variable_header_size as usize;
        // `fixed_header` checked that the section lies in the file.
        let section = bytes.get(start..end).ok_or(FileError::Truncated)?;
        let mut reader = Reader::new(bytes, end, wanted);
        let mut rest = section;
        while !rest.is_empty() {
            let (kind, body, next) = split_header(rest)?;
            reader.header(kind, body)?;
            rest = next;
        }
        reader.finish()
    }
}

/// Checks the fixed header and the checksum.
fn fixed_header(bytes: &[u8]) -> Result<IGVM_FIXED_HEADER, FileError> {
    const SIZE: usize = size_of::<IGVM_FIXED_HEADER>();
    let (header, _) = IGVM_FIXED_HEADER::read_from_prefix(bytes)
        .map_err(|_| FileError::Header("the file is too short"))?;
    if header.magic != IGVM_MAGIC_VALUE {
        return Err(FileError::Header("no IGVM magic"));
    }
    if header.format_version != IGVM_FORMAT_VERSION_1 {
        return Err(FileError::Header("version is not 1"));
    }
    if header.total_file_size as usize != bytes.len() {
        return Err(FileError::Header("file size differs from the header's"));
    }
    let start = header.variable_header_offset as usize;
    if start < SIZE || !start.is_multiple_of(8) {
        return Err(FileError::Header("variable headers at a wrong offset"));
    }
    // Both are 32 bits wide: the sum does not wrap.
    let end = start + header.variable_header_size as usize;
    let section = bytes
        .get(start..end)
        .ok_or(FileError::Header("variable headers leave the file"))?;
    let mut crc = Crc32::new();
    crc.update(
        IGVM_FIXED_HEADER {
            checksum: 0,
            ..header
        }
        .as_bytes(),
    );
    crc.update(section);
    let computed = crc.finish();
    if computed != header.checksum {
        return Err(FileError::Checksum {
            stored: header.checksum,
            computed,
        });
    }
    Ok(header)
}
