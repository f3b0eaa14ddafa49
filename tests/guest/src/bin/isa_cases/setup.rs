//! What several tables of cases need: the GHCB page, port output, pages in a wanted state.

use guest::ghcb::{self, Page};
use guest::harness::{Finding, Verdict, expect};
use guest::insn::{self, Pvalidated, SIZE_2M, SIZE_4K, pvalidate};
use guest::{memory, oracle};
use protocols::addr::Gpa;
use protocols::ghcb::PageOperation;
use protocols::oracle::{HostAct, PageFlags};
use protocols::snp::{Permissions, ReturnCode};
use spin::Once;

/// PVALIDATE's EDX: validate.
pub const VALIDATE: u64 = 1;
/// PVALIDATE's EDX: rescind.
pub const RESCIND: u64 = 0;

/// Return code FAIL_INPUT (snp-isa.md §2).
pub const FAIL_INPUT: u32 = ReturnCode::FAIL_INPUT.0;
/// Return code FAIL_PERMISSION.
pub const FAIL_PERMISSION: u32 = ReturnCode::FAIL_PERMISSION.0;
/// Return code FAIL_SIZEMISMATCH.
pub const FAIL_SIZEMISMATCH: u32 = ReturnCode::FAIL_SIZE_MISMATCH.0;

/// All permissions there are without shadow stacks.
pub const FULL: u64 = Permissions::FULL.bits() as u64;

static GHCB: Once<Page> = Once::new();

/// The registered GHCB page of VMPL0.
pub fn ghcb_page() -> Page {
    *GHCB.get().expect("opened before the first case")
}

/// Makes a page shared, registers it as GHCB and keeps it.
pub fn open_ghcb() -> Verdict {
    let page = shared_page()?;
    Page::at(page).register()?;
    GHCB.call_once(|| Page::at(page));
    Ok(())
}

/// A page that the host has made shared.
pub fn shared_page() -> Result<Gpa, Finding> {
    let page = memory::fresh_page();
    ghcb::change_page_state(page, PageOperation::SHARED)?;
    Ok(page)
}

/// PVALIDATE that must end like `want`.
pub fn expect_pvalidate(address: u64, size: u64, action: u64, want: Pvalidated) -> Verdict {
    expect("PVALIDATE", pvalidate(address, size, action), Ok(want))
}

/// RMPADJUST that must end with the code `want`.
pub fn expect_rmpadjust(address: u64, size: u64, attributes: u64, want: u32) -> Verdict {
    expect(
        "RMPADJUST",
        insn::rmpadjust(address, size, attributes),
        Ok(want),
    )
}

/// A validated 4 KiB page.
pub fn valid_page() -> Result<Gpa, Finding> {
    let page = memory::fresh_page();
    expect_pvalidate(page.get(), SIZE_4K, VALIDATE, Pvalidated::DONE)?;
    Ok(page)
}

/// A 2 MiB region whose RMP entry has 2 MiB, validated.
pub fn valid_large_region() -> Result<Gpa, Finding> {
    let region = memory::fresh_region();
    oracle::host_act(region, HostAct::BACK_BY_2M)?;
    expect_pvalidate(region.get(), SIZE_2M, VALIDATE, Pvalidated::DONE)?;
    oracle::expect_flags(region, PageFlags::SIZE_2M, PageFlags::SIZE_2M)?;
    Ok(region)
}

/// A 2 MiB region whose RMP entries have 4 KiB, whatever the backing: page 0 is validated,
/// the others are not.
pub fn small_region() -> Result<Gpa, Finding> {
    let region = memory::fresh_region();
    expect_pvalidate(region.get(), SIZE_4K, VALIDATE, Pvalidated::DONE)?;
    oracle::expect_flags(region, PageFlags::SIZE_2M, PageFlags::empty())?;
    Ok(region)
}
