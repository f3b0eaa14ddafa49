//! The GHCB MSR protocol: every request, and what is answered to nonsense.

use guest::ghcb::{self, change_page_state, msr_call, request};
use guest::harness::{Case, Finding, Verdict, case, expect, expect_not};
use guest::memory;
use guest::oracle::{self, expect_flags};
use protocols::addr::Gpa;
use protocols::ghcb::msr::{CpuidRegister, Info, NO_FRAME, Request, Response};
use protocols::ghcb::{HypervisorFeatures, PageOperation};
use protocols::oracle::PageFlags;
use protocols::snp::{CPUID_SEV_LEAF, SevCpuidEbx};

use crate::setup::{ghcb_page, shared_page, valid_page};
use crate::start;

/// The table.
pub const CASES: &[Case] = &[
    case("msr_reset_value", "ghcb.md §11.5", reset_value),
    case("msr_sev_info", "ghcb.md §3 codes 0x002, 0x001", sev_info),
    case("msr_cpuid", "ghcb.md §3 codes 0x004, 0x005", cpuid),
    case(
        "msr_cpuid_sev_leaf",
        "ghcb.md §3 code 0x004, guests.md §8.2",
        cpuid_sev,
    ),
    case("msr_features", "ghcb.md §4, guests.md §5.3", features),
    case(
        "msr_preferred_ghcb",
        "ghcb.md §3 codes 0x010, 0x011",
        preferred,
    ),
    case("msr_register", "ghcb.md §3 codes 0x012, 0x013", register),
    case("msr_psc_shared", "ghcb.md §3 code 0x014, §6", to_shared),
    case("msr_psc_private", "ghcb.md §3 code 0x014, §6", to_private),
    case(
        "msr_psc_takes_valid_page",
        "ghcb.md §6, snp-isa.md §8.1",
        takes_valid,
    ),
    case("msr_psc_repeated", "ghcb.md §6", repeated),
    case(
        "msr_psc_unknown_operation",
        "ghcb.md §3 code 0x015",
        unknown_operation,
    ),
    case("msr_psc_no_memory", "ghcb.md §3 code 0x015", no_memory),
    case(
        "msr_run_vmpl_without_vmsa",
        "ghcb.md §3 codes 0x016, 0x017",
        no_vmsa,
    ),
    case(
        "msr_run_vmpl_that_does_not_exist",
        "ghcb.md §3 codes 0x016, 0x017",
        no_vmpl,
    ),
    case("msr_unknown_code", "ghcb.md §3 (unknown code)", unknown),
    case(
        "msr_reply_sent_as_request",
        "ghcb.md §3 (unknown code)",
        reply_as_request,
    ),
];

fn reset_value() -> Verdict {
    let want = msr_call(Request::SevInfo.encode());
    expect(
        "the MSR before its first use",
        start::first_ghcb_msr(),
        want,
    )
}

fn sev_info() -> Verdict {
    match request(Request::SevInfo) {
        Response::SevInfo {
            min_version,
            max_version,
            c_bit,
        } => {
            let has_version_2 = min_version <= 2 && 2 <= max_version;
            expect("version 2 offered", has_version_2, true)?;
            expect("C-bit", u32::from(c_bit), start::launch().c_bit)
        }
        other => Err(Finding::new(format_args!(
            "reply {other:x?}, want SEV_INFO"
        ))),
    }
}

fn cpuid_value(function: u32, register: CpuidRegister) -> Result<u32, Finding> {
    match request(Request::Cpuid { function, register }) {
        Response::Cpuid {
            value,
            register: echo,
        } if echo == register => Ok(value),
        other => Err(Finding::new(format_args!("reply {other:x?}, want CPUID"))),
    }
}

fn cpuid() -> Verdict {
    // "AuthenticAMD" in EBX, EDX, ECX (guests.md §8.2).
    let name = |register| cpuid_value(0, register).map(u32::to_le_bytes);
    expect("EBX", name(CpuidRegister::Ebx)?, *b"Auth")?;
    expect("EDX", name(CpuidRegister::Edx)?, *b"enti")?;
    expect("ECX", name(CpuidRegister::Ecx)?, *b"cAMD")
}

fn cpuid_sev() -> Verdict {
    let ebx = SevCpuidEbx(cpuid_value(CPUID_SEV_LEAF, CpuidRegister::Ebx)?);
    expect("C-bit", ebx.c_bit(), start::launch().c_bit)?;
    expect("VMPLs", ebx.vmpl_count(), 4)
}

fn features() -> Verdict {
    let want = HypervisorFeatures::NEEDED_BY_PARAVISOR | HypervisorFeatures::APIC_ID_LIST;
    expect(
        "reply",
        request(Request::Features),
        Response::Features(want),
    )
}

fn preferred() -> Verdict {
    let want = Response::PreferredGhcb { frame: NO_FRAME };
    expect("reply", request(Request::PreferredGhcb), want)
}

fn register() -> Verdict {
    let frame = shared_page()?.frame();
    let reply = request(Request::RegisterGhcb { frame });
    let verdict = expect("reply", reply, Response::RegisterGhcb { frame });
    // The console needs its own page registered again, whatever came out.
    ghcb_page().register()?;
    verdict
}

const HOST: PageFlags = PageFlags::HOST_PRIVATE.union(PageFlags::ASSIGNED);

fn to_shared() -> Verdict {
    let page = memory::fresh_page();
    expect_flags(page, PageFlags::HOST_PRIVATE, PageFlags::HOST_PRIVATE)?;
    change_page_state(page, PageOperation::SHARED)?;
    expect_flags(page, HOST, PageFlags::empty())
}

fn to_private() -> Verdict {
    let page = shared_page()?;
    change_page_state(page, PageOperation::PRIVATE)?;
    let mask = PageFlags::HOST_PRIVATE | PageFlags::VALIDATED;
    expect_flags(page, mask, PageFlags::HOST_PRIVATE)
}

fn takes_valid() -> Verdict {
    let page = valid_page()?;
    change_page_state(page, PageOperation::SHARED)?;
    expect_flags(page, HOST | PageFlags::VALIDATED, PageFlags::empty())?;
    expect("permissions", oracle::page(page).permissions, [0; 4])
}

fn repeated() -> Verdict {
    let page = shared_page()?;
    memory::fill(memory::shared(page), 4096, 0x6666)?;
    change_page_state(page, PageOperation::SHARED)?;
    memory::expect_filled(memory::shared(page), 4096, 0x6666)
}

fn expect_psc_error(page: Gpa, operation: PageOperation) -> Verdict {
    match request(Request::PageState {
        frame: page.frame(),
        operation,
    }) {
        Response::PageState { error } => expect_not("error", error, 0),
        other => Err(Finding::new(format_args!(
            "reply {other:x?}, want PAGE_STATE"
        ))),
    }
}

fn unknown_operation() -> Verdict {
    let page = memory::fresh_page();
    for operation in [0, 5, 15] {
        expect_psc_error(page, PageOperation(operation))?;
    }
    expect_flags(page, PageFlags::HOST_PRIVATE, PageFlags::HOST_PRIVATE)
}

fn no_memory() -> Verdict {
    // Below the flash window and above all RAM.
    for gpa in [0xFE00_0000, 0x3FFF_FFFF_F000] {
        expect_psc_error(Gpa::new(gpa), PageOperation::PRIVATE)?;
    }
    Ok(())
}

fn expect_run_error(vmpl: u8) -> Verdict {
    match ghcb::run_vmpl(vmpl) {
        Response::RunVmpl { error } => expect_not("error", error, 0),
        other => Err(Finding::new(format_args!(
            "reply {other:x?}, want RUN_VMPL"
        ))),
    }
}

fn no_vmsa() -> Verdict {
    expect_run_error(2)?;
    expect_run_error(3)
}

fn no_vmpl() -> Verdict {
    expect_run_error(4)?;
    expect_run_error(0xFF)
}

fn expect_unchanged(value: u64) -> Verdict {
    expect("the MSR after VMGEXIT", msr_call(value), value)
}

fn unknown() -> Verdict {
    expect_unchanged(0xEEE)?;
    expect_unchanged(0x1234_5678_9ABC_D0FE)?;
    expect_unchanged(0x7FF)
}

fn reply_as_request() -> Verdict {
    for info in [
        Info::CPUID_RESPONSE,
        Info::PAGE_STATE_RESPONSE,
        Info::FEATURES_RESPONSE,
    ] {
        expect_unchanged(u64::from(info.0) | 0x5_0000_0000)?;
    }
    Ok(())
}
