//! Where everything in the paravisor's region lies, and what the pages of the program hold.
//!
//! From the start of the region: the program's segments at their linked addresses, then, each
//! on a page of its own: page tables, launch parameters, secrets, CPUID, memory map, general
//! parameters. Behind them lies memory that the paravisor validates itself.
//!
//! Invariants of a [`Layout`]:
//!
//! 1. all addresses are page aligned, ascend in the order above and lie in the region;
//! 2. every page from the region's start to `image_end` is launched: one number tells the
//!    paravisor which of its pages are validated already. Pages that no segment covers are
//!    launched as zeroes, and nothing but the program's own code is executable.

use protocols::addr::PAGE_SIZE;
use protocols::launch::{MEMORY_MAP_SIZE, REGION_GPA, REGION_SIZE};

use crate::elf::{Access, Program};
use crate::error::Error;
use crate::page_tables;

/// Address behind the paravisor's region.
pub const REGION_END: u64 = REGION_GPA + REGION_SIZE;

/// Access of everything in the region that is no code and no constant.
const DATA: Access = Access {
    read: true,
    write: true,
    execute: false,
};

/// Guest-physical addresses of the pieces, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// First page table, the root; the others follow it.
    pub page_tables: u64,
    /// The launch parameters.
    pub params: u64,
    /// The secrets page.
    pub secrets: u64,
    /// The CPUID page.
    pub cpuid: u64,
    /// The host's memory map, [`MEMORY_MAP_SIZE`] bytes.
    pub memory_map: u64,
    /// The general parameters, one page.
    pub general: u64,
    /// Address behind the last launched page.
    pub image_end: u64,
}

/// One page of the program as it is launched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramPage {
    /// Guest-physical address.
    pub gpa: u64,
    /// What the page may be used for.
    pub access: Access,
    /// Its bytes; always a whole page.
    pub data: Vec<u8>,
}

impl Layout {
    /// Places everything behind a program whose last page ends at `program_end`.
    ///
    /// # Errors
    ///
    /// [`Error::RegionTooSmall`] when the region has no room for it.
    pub fn behind(program_end: u64) -> Result<Self, Error> {
        let page_tables = program_end;
        let params = page_tables + page_tables::BYTES;
        let secrets = params + PAGE_SIZE;
        let cpuid = secrets + PAGE_SIZE;
        let memory_map = cpuid + PAGE_SIZE;
        let general = memory_map + MEMORY_MAP_SIZE;
        let image_end = general + PAGE_SIZE;
        if image_end > REGION_END {
            return Err(Error::RegionTooSmall {
                needed: image_end - REGION_GPA,
                available: REGION_SIZE,
            });
        }
        Ok(Self {
            page_tables,
            params,
            secrets,
            cpuid,
            memory_map,
            general,
            image_end,
        })
    }
}

/// The pages of `program`, ascending and without a gap from the region's start.
///
/// # Errors
///
/// When a segment leaves the region, is writable and executable, shares a page with another
/// one, or the entry point is not in code.
pub fn program_pages(program: &Program<'_>) -> Result<Vec<ProgramPage>, Error> {
    let mut pages: Vec<ProgramPage> = Vec::new();
    for segment in program.segments() {
        let (start, end) = (segment.address, segment.end());
        if start < REGION_GPA || end > REGION_END {
            return Err(Error::SegmentOutsideRegion {
                start,
                end,
                region_start: REGION_GPA,
                region_end: REGION_END,
            });
        }
        if segment.access.write && segment.access.execute {
            return Err(Error::WritableCode { start, end });
        }
        let first = start & !(PAGE_SIZE - 1);
        let next = page_behind(&pages);
        if first < next {
            return Err(Error::SegmentsOverlap { page: first });
        }
        extend_to(&mut pages, first, DATA);
        extend_to(&mut pages, end.next_multiple_of(PAGE_SIZE), segment.access);
        copy_into(&mut pages, start, segment.data);
    }
    let entry = program.entry();
    let entry_page = entry & !(PAGE_SIZE - 1);
    if !pages
        .iter()
        .any(|page| page.gpa == entry_page && page.access.execute)
    {
        return Err(Error::EntryNotExecutable { entry });
    }
    Ok(pages)
}

/// Address behind the last page.
pub fn page_behind(pages: &[ProgramPage]) -> u64 {
    REGION_GPA + pages.len() as u64 * PAGE_SIZE
}

/// Appends zero pages up to `end`.
fn extend_to(pages: &mut Vec<ProgramPage>, end: u64, access: Access) {
    while page_behind(pages) < end {
        let gpa = page_behind(pages);
        pages.push(ProgramPage {
            gpa,
            access,
            data: vec![0; PAGE_SIZE as usize],
        });
    }
}

/// Copies `data` to the address `start`; the pages are there.
fn copy_into(pages: &mut [ProgramPage], start: u64, data: &[u8]) {
    for (address, byte) in (start..).zip(data) {
        let offset = address - REGION_GPA;
        pages[(offset / PAGE_SIZE) as usize].data[(offset % PAGE_SIZE) as usize] = *byte;
    }
}
