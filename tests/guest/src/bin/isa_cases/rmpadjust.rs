//! RMPADJUST and RMPQUERY: permissions of lower VMPLs, the VMSA mark, and the check table.

use guest::harness::{Case, Verdict, case, expect};
use guest::insn::{Pvalidated, Queried, SIZE_2M, SIZE_4K, attributes, rmpadjust, rmpquery};
use guest::memory::page_of;
use guest::oracle::{self, expect_flags, expect_validated};
use guest::trap::{PAGE_FAULT, Trap};
use protocols::addr::{PAGE_SIZE, PAGES_PER_LARGE_PAGE};
use protocols::oracle::{HostAct, PageFlags};

use crate::setup::{
    FAIL_INPUT, FAIL_PERMISSION, FAIL_SIZEMISMATCH, FULL, RESCIND, VALIDATE, expect_pvalidate,
    expect_rmpadjust, small_region, valid_large_region, valid_page,
};

/// The table.
pub const CASES: &[Case] = &[
    case("rmpadjust_grant", "snp-isa.md §4 row 11", grant),
    case("rmpadjust_levels_are_apart", "snp-isa.md §4 row 11", levels),
    case("rmpadjust_revoke", "snp-isa.md §4 row 11", revoke),
    case(
        "rmpadjust_fresh_page_gives_nothing",
        "snp-isa.md §6, §10",
        fresh_permissions,
    ),
    case(
        "rmpadjust_vmsa_mark",
        "snp-isa.md §4 row 11, §11",
        vmsa_mark,
    ),
    case("rmpadjust_2m_misaligned", "snp-isa.md §4 row 2", misaligned),
    case("rmpadjust_vmpl_4", "snp-isa.md §4 row 3", no_such_level),
    case("rmpadjust_own_level", "snp-isa.md §4 row 4", own_level),
    case("rmpadjust_not_mapped", "snp-isa.md §4 row 5", not_mapped),
    case("rmpadjust_4k_on_2m", "snp-isa.md §4 row 7, §7", smash),
    case(
        "rmpadjust_not_validated",
        "snp-isa.md §4 row 8",
        not_validated,
    ),
    case(
        "rmpadjust_after_rescind",
        "snp-isa.md §4 row 8",
        after_rescind,
    ),
    case("rmpadjust_2m_on_4k", "snp-isa.md §4 row 9", size_mismatch),
    case("rmpadjust_2m", "snp-isa.md §4 row 11", large),
    case(
        "rmpadjust_survives_psmash",
        "snp-isa.md §7",
        smash_keeps_permissions,
    ),
    case("rmpadjust_lost_with_the_page", "snp-isa.md §6", replaced),
    case("rmpquery_permissions", "snp-isa.md §5", query),
    case("rmpquery_vmsa", "snp-isa.md §5", query_vmsa),
    case("rmpquery_2m", "snp-isa.md §5", query_large),
];

const R: u64 = 1;
const W: u64 = 2;

fn permissions(page: protocols::addr::Gpa) -> [u8; 4] {
    oracle::page(page).permissions
}

fn grant() -> Verdict {
    let page = valid_page()?;
    expect_rmpadjust(page.get(), SIZE_4K, attributes(1, FULL, false), 0)?;
    expect("permissions", permissions(page), [0xF, 0xF, 0, 0])?;
    expect(
        "permissions of the next page",
        permissions(page_of(page, 1))[1],
        0,
    )
}

fn levels() -> Verdict {
    let page = valid_page()?;
    expect_rmpadjust(page.get(), SIZE_4K, attributes(3, R, false), 0)?;
    expect_rmpadjust(page.get(), SIZE_4K, attributes(2, R | W, false), 0)?;
    expect("permissions", permissions(page), [0xF, 0, 3, 1])
}

fn revoke() -> Verdict {
    let page = valid_page()?;
    expect_rmpadjust(page.get(), SIZE_4K, attributes(1, FULL, false), 0)?;
    expect_rmpadjust(page.get(), SIZE_4K, attributes(1, 0, false), 0)?;
    expect("permissions", permissions(page), [0xF, 0, 0, 0])?;
    expect_validated(page, true)
}

fn fresh_permissions() -> Verdict {
    expect("permissions", permissions(valid_page()?), [0xF, 0, 0, 0])
}

fn vmsa_mark() -> Verdict {
    let page = valid_page()?;
    expect_rmpadjust(page.get(), SIZE_4K, attributes(1, 0, true), 0)?;
    expect_flags(page, PageFlags::VMSA, PageFlags::VMSA)?;
    expect_rmpadjust(page.get(), SIZE_4K, attributes(1, 0, false), 0)?;
    expect_flags(page, PageFlags::VMSA, PageFlags::empty())
}

fn misaligned() -> Verdict {
    let region = valid_large_region()?;
    let inside = page_of(region, 1).get();
    expect_rmpadjust(inside, SIZE_2M, attributes(1, FULL, false), FAIL_INPUT)?;
    expect("permissions", permissions(region), [0xF, 0, 0, 0])
}

fn no_such_level() -> Verdict {
    let page = valid_page()?;
    for level in [4, 0xFF] {
        expect_rmpadjust(
            page.get(),
            SIZE_4K,
            attributes(level, FULL, false),
            FAIL_INPUT,
        )?;
    }
    expect("permissions", permissions(page), [0xF, 0, 0, 0])
}

fn own_level() -> Verdict {
    let page = valid_page()?;
    expect_rmpadjust(
        page.get(),
        SIZE_4K,
        attributes(0, R, false),
        FAIL_PERMISSION,
    )?;
    expect("permissions", permissions(page), [0xF, 0, 0, 0])
}

fn not_mapped() -> Verdict {
    let address = 2 << 39;
    let result = rmpadjust(address, SIZE_4K, attributes(1, FULL, false));
    expect(
        "RMPADJUST",
        result.map_err(|t| (t.vector, t.address)),
        Err((PAGE_FAULT, address)),
    )
}

fn smash() -> Verdict {
    let region = valid_large_region()?;
    expect_rmpadjust(
        page_of(region, 5).get(),
        SIZE_4K,
        attributes(1, R, false),
        0,
    )?;
    expect(
        "permissions of the page",
        permissions(page_of(region, 5)),
        [0xF, 1, 0, 0],
    )?;
    expect(
        "permissions of another",
        permissions(page_of(region, 6)),
        [0xF, 0, 0, 0],
    )?;
    expect_flags(
        page_of(region, 6),
        PageFlags::SIZE_2M | PageFlags::VALIDATED,
        PageFlags::VALIDATED,
    )
}

fn not_validated() -> Verdict {
    let region = small_region()?;
    let address = page_of(region, 2).get() + 0x10;
    let result = rmpadjust(address, SIZE_4K, attributes(1, FULL, false));
    let masked = result.map_err(|trap| Trap {
        address: trap.address & !(PAGE_SIZE - 1),
        ..trap
    });
    expect(
        "RMPADJUST",
        masked,
        Err(Trap::not_validated(page_of(region, 2).get())),
    )
}

fn after_rescind() -> Verdict {
    let page = valid_page()?;
    expect_pvalidate(page.get(), SIZE_4K, RESCIND, Pvalidated::DONE)?;
    let result = rmpadjust(page.get(), SIZE_4K, attributes(1, FULL, false));
    expect("RMPADJUST", result, Err(Trap::not_validated(page.get())))?;
    expect("permissions of VMPL1", permissions(page)[1], 0)
}

fn size_mismatch() -> Verdict {
    let region = small_region()?;
    for index in 1..PAGES_PER_LARGE_PAGE {
        let page = page_of(region, index).get();
        expect_pvalidate(page, SIZE_4K, VALIDATE, Pvalidated::DONE)?;
    }
    expect_rmpadjust(
        region.get(),
        SIZE_2M,
        attributes(1, FULL, false),
        FAIL_SIZEMISMATCH,
    )?;
    expect("permissions", permissions(region), [0xF, 0, 0, 0])
}

fn large() -> Verdict {
    let region = valid_large_region()?;
    expect_rmpadjust(region.get(), SIZE_2M, attributes(1, FULL, false), 0)?;
    for index in [0, PAGES_PER_LARGE_PAGE - 1] {
        expect(
            "permissions",
            permissions(page_of(region, index)),
            [0xF, 0xF, 0, 0],
        )?;
    }
    expect(
        "permissions behind",
        permissions(page_of(region, PAGES_PER_LARGE_PAGE))[1],
        0,
    )
}

fn smash_keeps_permissions() -> Verdict {
    let region = valid_large_region()?;
    expect_rmpadjust(region.get(), SIZE_2M, attributes(1, FULL, false), 0)?;
    expect_rmpadjust(
        page_of(region, 8).get(),
        SIZE_4K,
        attributes(1, 0, false),
        0,
    )?;
    expect(
        "permissions of the page",
        permissions(page_of(region, 8)),
        [0xF, 0, 0, 0],
    )?;
    for index in [0, 7, 9, PAGES_PER_LARGE_PAGE - 1] {
        expect(
            "permissions of another",
            permissions(page_of(region, index)),
            [0xF, 0xF, 0, 0],
        )?;
    }
    Ok(())
}

fn replaced() -> Verdict {
    let page = valid_page()?;
    expect_rmpadjust(page.get(), SIZE_4K, attributes(1, FULL, false), 0)?;
    oracle::host_act(page, HostAct::TAKE_AWAY)?;
    expect_pvalidate(page.get(), SIZE_4K, VALIDATE, Pvalidated::DONE)?;
    expect("permissions", permissions(page), [0xF, 0, 0, 0])
}

fn expect_query(address: u64, vmpl: u64, want: Queried) -> Verdict {
    expect("RMPQUERY", rmpquery(address, vmpl), Ok(want))
}

fn query() -> Verdict {
    let page = valid_page()?;
    expect_rmpadjust(page.get(), SIZE_4K, attributes(1, R | W, false), 0)?;
    let answer = |vmpl, mask| Queried {
        eax: 0,
        attributes: attributes(vmpl, mask, false),
        size: SIZE_4K,
    };
    expect_query(page.get(), 1, answer(1, R | W))?;
    expect_query(page.get(), 2, answer(2, 0))
}

fn query_vmsa() -> Verdict {
    let page = valid_page()?;
    expect_rmpadjust(page.get(), SIZE_4K, attributes(1, 0, true), 0)?;
    let want = Queried {
        eax: 0,
        attributes: attributes(1, 0, true),
        size: SIZE_4K,
    };
    expect_query(page.get(), 1, want)?;
    expect_rmpadjust(page.get(), SIZE_4K, attributes(1, 0, false), 0)
}

fn query_large() -> Verdict {
    let region = valid_large_region()?;
    expect_rmpadjust(region.get(), SIZE_2M, attributes(1, FULL, false), 0)?;
    let want = Queried {
        eax: 0,
        attributes: attributes(1, FULL, false),
        size: SIZE_2M,
    };
    expect_query(region.get(), 1, want)
}
