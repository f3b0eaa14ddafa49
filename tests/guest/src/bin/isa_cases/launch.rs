//! What the AMD-SP left behind: states of launched pages, secrets and CPUID page.

use core::mem::offset_of;

use guest::harness::{Case, Verdict, case, expect, expect_not};
use guest::memory;
use guest::oracle::{self, expect_flags, expect_validated};
use protocols::addr::{Gpa, PAGE_SIZE};
use protocols::cpuid::{CpuidEntry, CpuidPage};
use protocols::oracle::{Counter, PageFlags};
use protocols::secrets::SecretsPage;
use protocols::snp::{CPUID_SEV_LEAF, SevCpuidEbx};

use crate::start;

/// The table.
pub const CASES: &[Case] = &[
    case(
        "launch_image_is_valid",
        "snp-launch.md §1, snp-isa.md §8.1",
        image,
    ),
    case("launch_rest_is_not_valid", "snp-isa.md §8.1", rest),
    case(
        "launch_unloaded_memory_is_not_valid",
        "snp-isa.md §8.1",
        elsewhere,
    ),
    case("launch_secrets_page", "snp-launch.md §6", secrets),
    case("launch_cpuid_page", "snp-launch.md §5", cpuid),
    case("launch_vp_count", "igvm.md (VP count parameter)", vp_count),
];

const LAUNCHED: PageFlags = PageFlags::ASSIGNED
    .union(PageFlags::VALIDATED)
    .union(PageFlags::VMSA)
    .union(PageFlags::IMMUTABLE);

fn image() -> Verdict {
    let params = start::launch();
    let want = PageFlags::ASSIGNED | PageFlags::VALIDATED;
    for gpa in (params.region_gpa..params.image_end).step_by(PAGE_SIZE as usize) {
        expect_flags(Gpa::new(gpa), LAUNCHED, want)?;
        expect(
            "permissions",
            oracle::page(Gpa::new(gpa)).permissions,
            [0xF, 0, 0, 0],
        )?;
    }
    Ok(())
}

fn rest() -> Verdict {
    let params = start::launch();
    let end = params.region_gpa + params.region_size;
    for gpa in (params.image_end..end).step_by(PAGE_SIZE as usize) {
        expect_validated(Gpa::new(gpa), false)?;
    }
    Ok(())
}

fn elsewhere() -> Verdict {
    let params = start::launch();
    expect_validated(Gpa::new(params.region_gpa - PAGE_SIZE), false)?;
    expect_validated(Gpa::new(params.region_gpa + params.region_size), false)?;
    expect_validated(Gpa::new(0), false)
}

fn secrets() -> Verdict {
    const VMPCK0: u64 = offset_of!(SecretsPage, vmpck) as u64;
    const VMPCK_SIZE: u64 = 32;
    const SVSM_FIELDS: u64 = offset_of!(SecretsPage, svsm_base) as u64;
    let page = start::launch().secrets_gpa;
    expect("version >= 2", memory::read(page)? as u32 >= 2, true)?;
    let key = |level: u64| memory::read(page + VMPCK0 + level * VMPCK_SIZE);
    for level in 0..4 {
        expect_not("first bytes of the VMPCK", key(level)?, 0)?;
        for other in 0..level {
            expect_not("first bytes of the VMPCK", key(level)?, key(other)?)?;
        }
    }
    let left = oracle::counter(Counter::KEYS_IN_LAUNCH_PAGE);
    expect("keys that the machine finds there", left, 4)?;
    // The paravisor's fields: nobody has filled them yet.
    for field in 0..4 {
        expect(
            "SVSM field",
            memory::read(page + SVSM_FIELDS + field * 8)?,
            0,
        )?;
    }
    Ok(())
}

fn cpuid() -> Verdict {
    const ENTRIES: u64 = offset_of!(CpuidPage, entries) as u64;
    const ENTRY_SIZE: u64 = size_of::<CpuidEntry>() as u64;
    const EAX: u64 = offset_of!(CpuidEntry, eax) as u64;
    let page = start::launch().cpuid_gpa;
    let count = memory::read(page)? as u32;
    expect("count in 1..=64", (1..=64).contains(&count), true)?;
    expect("reserved", memory::read(page + 8)?, 0)?;
    for index in 0..u64::from(count) {
        let entry = page + ENTRIES + index * ENTRY_SIZE;
        if memory::read(entry)? as u32 == CPUID_SEV_LEAF {
            // EBX follows EAX.
            let ebx = SevCpuidEbx((memory::read(entry + EAX)? >> 32) as u32);
            expect("C-bit", ebx.c_bit(), start::launch().c_bit)?;
            return expect("VMPLs", ebx.vmpl_count(), 4);
        }
    }
    expect("leaf 0x8000001F in the table", false, true)
}

fn vp_count() -> Verdict {
    expect_not(
        "VP count",
        memory::read(start::launch().general_gpa)? as u32,
        0,
    )
}
