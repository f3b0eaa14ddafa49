//! AP creation: every argument the host has to refuse. (What it accepts is used by
//! [`crate::vmpl1`].)

use guest::ghcb::Reply;
use guest::harness::{Case, Verdict, case, expect};
use guest::insn::{Pvalidated, SIZE_4K, attributes};
use guest::memory;
use protocols::addr::{Gpa, Vmpl};
use protocols::exit_code::ExitCode;
use protocols::ghcb::event::{ApCreation, ApRequest};
use protocols::ghcb::page::{Field, MalformedReason};
use protocols::vmsa::SevFeatures;

use crate::setup::{
    VALIDATE, expect_pvalidate, expect_rmpadjust, ghcb_page, shared_page, valid_page,
};

/// The table.
pub const CASES: &[Case] = &[
    case("ap_without_rax", "ghcb.md §7, §11.4, reason 4", no_features),
    case("ap_vmsa_misaligned", "ghcb.md §7, reason 5", misaligned),
    case(
        "ap_vmsa_2m_aligned",
        "ghcb.md §7, snp-isa.md §11 erratum",
        large_aligned,
    ),
    case(
        "ap_vmsa_not_marked",
        "snp-isa.md §11 (APM table 15-41)",
        not_marked,
    ),
    case("ap_vmsa_shared", "snp-isa.md §11 (APM table 15-41)", shared),
    case("ap_vmsa_no_memory", "ghcb.md §7, reason 5", no_memory),
    case(
        "ap_unknown_request",
        "ghcb.md §7, reason 5",
        unknown_request,
    ),
    case(
        "ap_unknown_apic_id",
        "ghcb.md §7, reason 5",
        unknown_apic_id,
    ),
    case("ap_unknown_vmpl", "ghcb.md §7, reason 5", unknown_vmpl),
    case("ap_other_features", "ghcb.md §7, reason 5", other_features),
];

/// A VMSA by its mark; nobody will run it.
fn marked_page() -> Result<Gpa, guest::harness::Finding> {
    let page = valid_page()?;
    expect_rmpadjust(page.get(), SIZE_4K, attributes(1, 0, true), 0)?;
    Ok(page)
}

fn info(request: u16, vmpl: Vmpl, apic_id: u32) -> u64 {
    ApCreation {
        request: ApRequest(request),
        vmpl,
        apic_id,
    }
    .encode()
}

/// CREATE_ON_INIT for VMPL2 of this processor, which nobody runs: only the argument under test
/// can be what is refused.
fn good_info() -> u64 {
    info(ApRequest::CREATE_ON_INIT.0, Vmpl::VMPL2, 0)
}

const FEATURES: u64 = SevFeatures::SNP_ACTIVE.0;

fn expect_refused(infos: [u64; 2], fields: &[(Field, u64)], reason: MalformedReason) -> Verdict {
    let reply = ghcb_page().call(ExitCode::AP_CREATION, infos, fields);
    expect("reply", reply, Reply::malformed(reason))
}

fn expect_invalid(info_1: u64, vmsa: u64, features: u64) -> Verdict {
    expect_refused(
        [info_1, vmsa],
        &[(Field::RAX, features)],
        MalformedReason::INVALID_INPUT,
    )
}

fn no_features() -> Verdict {
    let vmsa = marked_page()?;
    expect_refused(
        [good_info(), vmsa.get()],
        &[],
        MalformedReason::MISSING_INPUT,
    )
}

fn misaligned() -> Verdict {
    expect_invalid(good_info(), marked_page()?.get() + 0x10, FEATURES)
}

fn large_aligned() -> Verdict {
    let region = memory::fresh_region();
    expect_pvalidate(region.get(), SIZE_4K, VALIDATE, Pvalidated::DONE)?;
    expect_rmpadjust(region.get(), SIZE_4K, attributes(1, 0, true), 0)?;
    expect_invalid(good_info(), region.get(), FEATURES)
}

fn not_marked() -> Verdict {
    expect_invalid(good_info(), valid_page()?.get(), FEATURES)
}

fn shared() -> Verdict {
    expect_invalid(good_info(), shared_page()?.get(), FEATURES)
}

fn no_memory() -> Verdict {
    expect_invalid(good_info(), 0xFE00_1000, FEATURES)?;
    expect_invalid(good_info(), !0xFFF, FEATURES)
}

fn unknown_request() -> Verdict {
    let vmsa = marked_page()?.get();
    for request in [3, 0x100, u16::MAX] {
        expect_invalid(info(request, Vmpl::VMPL2, 0), vmsa, FEATURES)?;
    }
    Ok(())
}

fn unknown_apic_id() -> Verdict {
    let vmsa = marked_page()?.get();
    for apic_id in [0x1000, u32::MAX] {
        expect_invalid(info(0, Vmpl::VMPL2, apic_id), vmsa, FEATURES)?;
    }
    Ok(())
}

fn unknown_vmpl() -> Verdict {
    let vmsa = marked_page()?.get();
    for level in [4, 15] {
        expect_invalid(level << 16, vmsa, FEATURES)?;
    }
    Ok(())
}

fn other_features() -> Verdict {
    let vmsa = marked_page()?.get();
    for features in [0, 0b11, 1 << 63 | 1] {
        expect_invalid(good_info(), vmsa, features)?;
    }
    Ok(())
}
