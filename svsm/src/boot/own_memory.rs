//! The paravisor's own memory: the rest of its region, and the carve-out.
//!
//! Neither has ever been validated, so what is "already valid" here is a lie of the host's.
#![expect(unsafe_code, reason = "makes the pools")]

use protocols::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE, PageSize};
use protocols::terminate::TurnstileReason;

use crate::attestation;
use crate::launch::Launch;
use crate::memory::layout::{OWN_WINDOW, PageRange};
use crate::memory::page_tables::{self, Owner};
use crate::memory::plan::Plan;
use crate::memory::pool::Pool;
use crate::platform::snp::Snp;
use crate::platform::{MappedBlock, Platform, ValidateError};

/// The pages at the end of the region that are shared and not validated: a GHCB per processor,
/// those for guest messages, and one for the list of APIC ids.
pub fn shared_pages(launch: &Launch<'_>, vp_count: usize) -> Result<PageRange, TurnstileReason> {
    let end = launch.region().end_frame();
    let count = vp_count as u64 + attestation::shared::PAGES + 1;
    PageRange::try_from_frames(end - count, end)
        .filter(|pages| launch.unlaunched().contains(*pages))
        .ok_or(TurnstileReason::LAUNCH_PARAMS)
}

/// The last of [`shared_pages`].
pub fn list_page(shared: PageRange) -> Result<Gpa, TurnstileReason> {
    shared.frames().next_back().ok_or(TurnstileReason::INTERNAL)
}

/// Validates and zeros the part of the region that was not launched, but for the GHCBs.
pub fn validate_region(
    platform: &Snp,
    launch: &Launch<'_>,
    ghcbs: PageRange,
) -> Result<Pool, TurnstileReason> {
    let (pages, _) = launch.unlaunched().without(ghcbs);
    for page in pages.frames() {
        validate_own(platform, page.get(), PageSize::Size4K)?;
    }
    // SAFETY: the image maps the whole region one to one, writable where it is not launched;
    // the pages were validated and zeroed just now, and nobody else gets them.
    Ok(unsafe { Pool::new(pages, 0) })
}

/// Maps, validates and zeros the carve-out.
pub fn validate_carve_out(
    platform: &Snp,
    plan: &Plan,
    tables: &mut Pool,
) -> Result<Pool, TurnstileReason> {
    let pages = plan.carve_out;
    page_tables::map_large(OWN_WINDOW, pages, Owner::Paravisor, tables)?;
    for gpa in (pages.start().get()..pages.end().get()).step_by(LARGE_PAGE_SIZE as usize) {
        validate_own(platform, OWN_WINDOW + gpa, PageSize::Size2M)?;
    }
    // SAFETY: mapped, validated and zeroed just now; the plan gives it to nobody else.
    Ok(unsafe { Pool::new(pages, OWN_WINDOW) })
}

/// Validates and zeros memory of ours that was never validated; 2 MiB fall back to 4 KiB.
fn validate_own(platform: &Snp, address: u64, size: PageSize) -> Result<(), TurnstileReason> {
    let block = MappedBlock::try_new(address, size).ok_or(TurnstileReason::INTERNAL)?;
    match platform.validate(block) {
        Ok(()) => platform
            .scrub(block)
            .map_err(|_| TurnstileReason::NOT_VALIDATED),
        Err(ValidateError::NoChange) => Err(TurnstileReason::ALREADY_VALID),
        Err(ValidateError::SizeMismatch) if size == PageSize::Size2M => (address
            ..address + size.bytes())
            .step_by(PAGE_SIZE as usize)
            .try_for_each(|page| validate_own(platform, page, PageSize::Size4K)),
        Err(_) => Err(TurnstileReason::PVALIDATE),
    }
}
