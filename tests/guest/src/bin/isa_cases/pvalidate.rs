//! PVALIDATE: every row of its check table, and what it does not do.

use guest::harness::{Case, Verdict, case, expect, expect_not};
use guest::insn::{Pvalidated, SIZE_2M, SIZE_4K, pvalidate};
use guest::memory::{self, page_of};
use guest::oracle::{self, expect_flags, expect_validated};
use guest::trap::PAGE_FAULT;
use protocols::addr::{PAGE_SIZE, PAGES_PER_LARGE_PAGE};
use protocols::oracle::{Counter, HostAct, PageFlags};

use crate::setup::{
    FAIL_INPUT, FAIL_SIZEMISMATCH, RESCIND, VALIDATE, expect_pvalidate, small_region,
    valid_large_region, valid_page,
};

/// The table.
pub const CASES: &[Case] = &[
    case("pvalidate_new_page", "snp-isa.md §3 rows 6, 10", new_page),
    case("pvalidate_twice", "snp-isa.md §3 row 9", twice),
    case("pvalidate_rescind", "snp-isa.md §3 row 10", rescind),
    case(
        "pvalidate_rescind_twice",
        "snp-isa.md §3 row 9",
        rescind_twice,
    ),
    case(
        "pvalidate_rescind_new_page",
        "snp-isa.md §3 row 9",
        rescind_new,
    ),
    case("pvalidate_after_rescind", "snp-isa.md §8.1", after_rescind),
    case(
        "pvalidate_ignores_low_bits",
        "snp-isa.md §3 operands",
        low_bits,
    ),
    case("pvalidate_2m_misaligned", "snp-isa.md §3 row 3", misaligned),
    case(
        "pvalidate_2m_misaligned_before_walk",
        "snp-isa.md §3 rows 3, 4",
        misaligned_unmapped,
    ),
    case("pvalidate_not_mapped", "snp-isa.md §3 row 4", not_mapped),
    case("pvalidate_2m_new_region", "snp-isa.md §3 row 10", large),
    case("pvalidate_2m_twice", "snp-isa.md §3 row 9", large_twice),
    case(
        "pvalidate_2m_rescind",
        "snp-isa.md §3 row 10",
        large_rescind,
    ),
    case("pvalidate_2m_on_4k", "snp-isa.md §3 row 8", size_mismatch),
    case(
        "pvalidate_2m_on_valid_4k",
        "snp-isa.md §3 rows 8, 9",
        mismatch_before_no_change,
    ),
    case(
        "pvalidate_2m_rescind_on_4k",
        "snp-isa.md §3 row 8",
        rescind_mismatch,
    ),
    case(
        "pvalidate_4k_rescind_on_2m",
        "snp-isa.md §3 row 7, §7",
        smash_by_rescind,
    ),
    case(
        "pvalidate_4k_on_invalid_2m",
        "snp-isa.md §3 row 7, §7",
        smash_by_validate,
    ),
    case(
        "pvalidate_4k_on_valid_2m",
        "snp-isa.md §3 rows 7, 9",
        smash_no_change,
    ),
    case("pvalidate_2m_with_hole", "snp-isa.md §3 row 8", hole),
    case(
        "pvalidate_after_host_replaced_page",
        "snp-isa.md §6, §17.2",
        replaced,
    ),
    case("pvalidate_does_not_clear", "snp-isa.md §3", does_not_clear),
    case("pvalidate_keeps_content", "snp-isa.md §3", keeps_content),
    case(
        "pvalidate_keeps_permissions",
        "snp-isa.md §17.4",
        keeps_permissions,
    ),
];

const FLAGS: PageFlags = PageFlags::ASSIGNED.union(PageFlags::VALIDATED);

fn new_page() -> Verdict {
    let page = memory::fresh_page();
    expect_flags(page, FLAGS, PageFlags::empty())?;
    expect_pvalidate(page.get(), SIZE_4K, VALIDATE, Pvalidated::DONE)?;
    expect_flags(page, FLAGS, FLAGS)?;
    expect_validated(page_of(page, 1), false)
}

fn twice() -> Verdict {
    let page = valid_page()?;
    expect_pvalidate(page.get(), SIZE_4K, VALIDATE, Pvalidated::NO_CHANGE)?;
    expect_validated(page, true)
}

fn rescind() -> Verdict {
    let page = valid_page()?;
    expect_pvalidate(page.get(), SIZE_4K, RESCIND, Pvalidated::DONE)?;
    // The page stays the guest's: rescinding is not giving back.
    expect_flags(page, FLAGS, PageFlags::ASSIGNED)
}

fn rescind_twice() -> Verdict {
    let page = valid_page()?;
    expect_pvalidate(page.get(), SIZE_4K, RESCIND, Pvalidated::DONE)?;
    expect_pvalidate(page.get(), SIZE_4K, RESCIND, Pvalidated::NO_CHANGE)?;
    expect_validated(page, false)
}

fn rescind_new() -> Verdict {
    let page = memory::fresh_page();
    expect_pvalidate(page.get(), SIZE_4K, RESCIND, Pvalidated::NO_CHANGE)?;
    expect_validated(page, false)
}

fn after_rescind() -> Verdict {
    let page = valid_page()?;
    expect_pvalidate(page.get(), SIZE_4K, RESCIND, Pvalidated::DONE)?;
    expect_pvalidate(page.get(), SIZE_4K, VALIDATE, Pvalidated::DONE)?;
    expect_validated(page, true)
}

fn low_bits() -> Verdict {
    let page = memory::fresh_page();
    expect_pvalidate(page.get() + 0xABC, SIZE_4K, VALIDATE, Pvalidated::DONE)?;
    expect_validated(page, true)?;
    expect_validated(page_of(page, 1), false)
}

fn misaligned() -> Verdict {
    let region = valid_large_region()?;
    let inside = page_of(region, 1).get();
    expect_pvalidate(inside, SIZE_2M, RESCIND, Pvalidated::failed(FAIL_INPUT))?;
    expect_validated(region, true)
}

/// An address no page table maps.
const NOT_MAPPED: u64 = 2 << 39;

fn misaligned_unmapped() -> Verdict {
    let address = NOT_MAPPED + PAGE_SIZE;
    expect_pvalidate(address, SIZE_2M, VALIDATE, Pvalidated::failed(FAIL_INPUT))
}

fn not_mapped() -> Verdict {
    for size in [SIZE_4K, SIZE_2M] {
        let result = pvalidate(NOT_MAPPED, size, VALIDATE).map_err(|t| (t.vector, t.address));
        expect("PVALIDATE", result, Err((PAGE_FAULT, NOT_MAPPED)))?;
    }
    Ok(())
}

fn large() -> Verdict {
    let region = memory::fresh_region();
    oracle::host_act(region, HostAct::BACK_BY_2M)?;
    expect_pvalidate(region.get(), SIZE_2M, VALIDATE, Pvalidated::DONE)?;
    for index in [0, 1, PAGES_PER_LARGE_PAGE - 1] {
        let want = FLAGS | PageFlags::SIZE_2M;
        expect_flags(page_of(region, index), want, want)?;
    }
    expect_validated(page_of(region, PAGES_PER_LARGE_PAGE), false)
}

fn large_twice() -> Verdict {
    let region = valid_large_region()?;
    expect_pvalidate(region.get(), SIZE_2M, VALIDATE, Pvalidated::NO_CHANGE)?;
    expect_validated(page_of(region, 100), true)
}

fn large_rescind() -> Verdict {
    let region = valid_large_region()?;
    expect_pvalidate(region.get(), SIZE_2M, RESCIND, Pvalidated::DONE)?;
    for index in [0, PAGES_PER_LARGE_PAGE - 1] {
        expect_flags(page_of(region, index), FLAGS, PageFlags::ASSIGNED)?;
    }
    Ok(())
}

fn size_mismatch() -> Verdict {
    let region = small_region()?;
    expect_pvalidate(region.get(), SIZE_4K, RESCIND, Pvalidated::DONE)?;
    expect_pvalidate(
        region.get(),
        SIZE_2M,
        VALIDATE,
        Pvalidated::failed(FAIL_SIZEMISMATCH),
    )?;
    for index in [0, 1, PAGES_PER_LARGE_PAGE - 1] {
        expect_validated(page_of(region, index), false)?;
    }
    Ok(())
}

fn mismatch_before_no_change() -> Verdict {
    let region = small_region()?;
    for index in 1..PAGES_PER_LARGE_PAGE {
        let page = page_of(region, index).get();
        expect_pvalidate(page, SIZE_4K, VALIDATE, Pvalidated::DONE)?;
    }
    expect_pvalidate(
        region.get(),
        SIZE_2M,
        VALIDATE,
        Pvalidated::failed(FAIL_SIZEMISMATCH),
    )
}

fn rescind_mismatch() -> Verdict {
    let region = small_region()?;
    expect_pvalidate(
        region.get(),
        SIZE_2M,
        RESCIND,
        Pvalidated::failed(FAIL_SIZEMISMATCH),
    )?;
    expect_validated(region, true)
}

fn smash_by_rescind() -> Verdict {
    let region = valid_large_region()?;
    expect_pvalidate(page_of(region, 7).get(), SIZE_4K, RESCIND, Pvalidated::DONE)?;
    for index in 0..PAGES_PER_LARGE_PAGE {
        let valid = if index == 7 {
            PageFlags::empty()
        } else {
            PageFlags::VALIDATED
        };
        let want = PageFlags::ASSIGNED | valid;
        expect_flags(page_of(region, index), FLAGS | PageFlags::SIZE_2M, want)?;
    }
    Ok(())
}

fn smash_by_validate() -> Verdict {
    let region = valid_large_region()?;
    expect_pvalidate(region.get(), SIZE_2M, RESCIND, Pvalidated::DONE)?;
    expect_pvalidate(
        page_of(region, 9).get(),
        SIZE_4K,
        VALIDATE,
        Pvalidated::DONE,
    )?;
    expect_validated(page_of(region, 9), true)?;
    expect_validated(page_of(region, 8), false)?;
    expect_validated(page_of(region, 10), false)
}

fn smash_no_change() -> Verdict {
    let region = valid_large_region()?;
    expect_pvalidate(
        page_of(region, 3).get(),
        SIZE_4K,
        VALIDATE,
        Pvalidated::NO_CHANGE,
    )?;
    expect_validated(page_of(region, 3), true)
}

fn hole() -> Verdict {
    let region = valid_large_region()?;
    expect_pvalidate(region.get(), SIZE_2M, RESCIND, Pvalidated::DONE)?;
    oracle::host_act(page_of(region, 42), HostAct::TAKE_AWAY)?;
    expect_pvalidate(
        region.get(),
        SIZE_2M,
        VALIDATE,
        Pvalidated::failed(FAIL_SIZEMISMATCH),
    )?;
    expect_validated(page_of(region, 41), false)
}

/// The attack a paravisor's record exists for: CF does not tell that the host put another page
/// under a validated address.
fn replaced() -> Verdict {
    let page = valid_page()?;
    oracle::host_act(page, HostAct::TAKE_AWAY)?;
    let seen = oracle::counter(Counter::DOUBLE_VALIDATION);
    expect_pvalidate(page.get(), SIZE_4K, VALIDATE, Pvalidated::DONE)?;
    // The machine knows better than CF.
    let now = oracle::counter(Counter::DOUBLE_VALIDATION);
    expect("double validations", now - seen, 1)
}

fn does_not_clear() -> Verdict {
    let page = valid_page()?;
    for line in (0..PAGE_SIZE).step_by(64) {
        expect_not("content of a new line", memory::read(page.get() + line)?, 0)?;
    }
    let last = memory::read(page.get() + PAGE_SIZE - 64)?;
    expect_not("content of two lines", memory::read(page.get())?, last)
}

fn keeps_content() -> Verdict {
    let page = valid_page()?;
    memory::fill(page.get(), PAGE_SIZE, 0x1111)?;
    expect_pvalidate(page.get(), SIZE_4K, RESCIND, Pvalidated::DONE)?;
    expect_pvalidate(page.get(), SIZE_4K, VALIDATE, Pvalidated::DONE)?;
    memory::expect_filled(page.get(), PAGE_SIZE, 0x1111)
}

/// Why a rescind has to revoke first: the permissions of lower VMPLs outlive it.
fn keeps_permissions() -> Verdict {
    let page = valid_page()?;
    let grant = guest::insn::attributes(1, crate::setup::FULL, false);
    crate::setup::expect_rmpadjust(page.get(), SIZE_4K, grant, 0)?;
    expect_pvalidate(page.get(), SIZE_4K, RESCIND, Pvalidated::DONE)?;
    expect(
        "permissions of VMPL1",
        oracle::page(page).permissions[1],
        0xF,
    )
}
