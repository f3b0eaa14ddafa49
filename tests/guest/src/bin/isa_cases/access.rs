//! Accesses: what the RMP lets through, what becomes #VC 0x404, and what happens to contents
//! when a page changes hands.

#![expect(
    unsafe_code,
    reason = "calls into pages to see whether they can be executed"
)]

use guest::ghcb::change_page_state;
use guest::harness::{Case, Verdict, case, expect, expect_not};
use guest::insn::{self, Pvalidated, SIZE_2M, SIZE_4K};
use guest::memory::{self, page_of};
use guest::oracle::{self, expect_flags, expect_validated};
use guest::trap::Trap;
use protocols::addr::{Gpa, PAGE_SIZE, PAGES_PER_LARGE_PAGE};
use protocols::exit_code::ExitCode;
use protocols::ghcb::PageOperation;
use protocols::oracle::{Counter, HostAct, PageFlags};
use protocols::snp::msr;

use crate::setup::{
    RESCIND, VALIDATE, expect_pvalidate, shared_page, small_region, valid_large_region, valid_page,
};

/// The table.
pub const CASES: &[Case] = &[
    case(
        "access_read_not_validated",
        "snp-isa.md §9",
        read_not_validated,
    ),
    case(
        "access_write_not_validated",
        "snp-isa.md §9",
        write_not_validated,
    ),
    case(
        "access_fetch_not_validated",
        "snp-isa.md §9",
        fetch_not_validated,
    ),
    case("access_never_assigned", "snp-isa.md §9", never_assigned),
    case("access_after_rescind", "snp-isa.md §9", after_rescind),
    case(
        "access_after_2m_rescind",
        "snp-isa.md §9",
        after_large_rescind,
    ),
    case(
        "access_after_host_took_page",
        "snp-isa.md §17.1",
        after_take_away,
    ),
    case("access_fault_address", "snp-isa.md §9 (CR2)", fault_address),
    case("access_valid_page", "snp-isa.md §9", valid),
    case("access_fetch_valid_page", "snp-isa.md §9", fetch_valid),
    case("access_shared_needs_no_validation", "snp-isa.md §9", shared),
    case(
        "access_private_to_shared_scrambles",
        "design.md §9",
        to_shared_scrambles,
    ),
    case(
        "access_shared_to_private_scrambles",
        "design.md §9",
        to_private_scrambles,
    ),
    case(
        "access_wrong_alias_of_private",
        "snp-isa.md §9, docs/machine.md (violations)",
        shared_access_to_private,
    ),
    case(
        "access_wrong_alias_of_shared",
        "snp-isa.md §9, docs/machine.md (violations)",
        private_access_to_shared,
    ),
    case(
        "access_fetch_ignores_c_bit",
        "snp-isa.md §9 (APM table 15-39)",
        fetch_is_private,
    ),
    case("vc_for_cpuid", "snp-isa.md §15", vc_cpuid),
    case("vc_for_out", "snp-isa.md §15", vc_out),
    case("vc_for_rdmsr", "snp-isa.md §15", vc_rdmsr),
    case("vc_for_wrmsr", "snp-isa.md §15", vc_wrmsr),
    case("no_vc_for_sev_status", "guests.md §5.5, §7", sev_status),
    case("invalid_opcode_stays_one", "tcg-svm.md §2", invalid_opcode),
];

fn read_not_validated() -> Verdict {
    let page = page_of(small_region()?, 1).get();
    expect("read", insn::load(page), Err(Trap::not_validated(page)))
}

fn write_not_validated() -> Verdict {
    let page = page_of(small_region()?, 1);
    let result = insn::store(page.get(), 1);
    expect("write", result, Err(Trap::not_validated(page.get())))?;
    expect_validated(page, false)
}

fn fetch_not_validated() -> Verdict {
    let page = page_of(small_region()?, 1).get();
    // SAFETY: the page cannot be fetched from; were it, its content could not return and the
    // run would end with an exception report.
    let result = unsafe { insn::call(page) };
    expect("fetch", result, Err(Trap::not_validated(page)))
}

fn never_assigned() -> Verdict {
    let page = memory::fresh_page().get();
    expect("read", insn::load(page), Err(Trap::not_validated(page)))
}

fn after_rescind() -> Verdict {
    let page = valid_page()?.get();
    memory::write(page, 1)?;
    expect_pvalidate(page, SIZE_4K, RESCIND, Pvalidated::DONE)?;
    expect("read", insn::load(page), Err(Trap::not_validated(page)))
}

fn after_large_rescind() -> Verdict {
    let region = valid_large_region()?;
    let last = page_of(region, PAGES_PER_LARGE_PAGE - 1).get();
    memory::write(last, 1)?;
    expect_pvalidate(region.get(), SIZE_2M, RESCIND, Pvalidated::DONE)?;
    expect("read", insn::load(last), Err(Trap::not_validated(last)))
}

fn after_take_away() -> Verdict {
    let page = valid_page()?;
    memory::write(page.get(), 1)?;
    oracle::host_act(page, HostAct::TAKE_AWAY)?;
    expect(
        "read",
        insn::load(page.get()),
        Err(Trap::not_validated(page.get())),
    )
}

fn fault_address() -> Verdict {
    let address = page_of(small_region()?, 3).get() + 0x7F8;
    expect(
        "read",
        insn::load(address),
        Err(Trap::not_validated(address)),
    )
}

fn valid() -> Verdict {
    let region = small_region()?;
    let page = region.get();
    memory::fill(page, PAGE_SIZE, 0x2222)?;
    // The neighbour does not get valid with it.
    let next = page_of(region, 1).get();
    expect(
        "read of the next page",
        insn::load(next),
        Err(Trap::not_validated(next)),
    )?;
    memory::expect_filled(page, PAGE_SIZE, 0x2222)
}

/// `mov eax, 0x1D1E5A; ret`.
const SUBROUTINE: u64 = u64::from_le_bytes([0xB8, 0x5A, 0x1E, 0x1D, 0x00, 0xC3, 0x90, 0x90]);
/// What it returns.
const SUBROUTINE_RESULT: u64 = 0x1D_1E5A;

fn fetch_valid() -> Verdict {
    let page = valid_page()?.get();
    memory::write(page, SUBROUTINE)?;
    // SAFETY: a whole subroutine was just written there.
    expect("call", unsafe { insn::call(page) }, Ok(SUBROUTINE_RESULT))
}

fn shared() -> Verdict {
    let page = shared_page()?;
    memory::fill(memory::shared(page), PAGE_SIZE, 0x3333)?;
    expect_flags(
        page,
        PageFlags::VALIDATED | PageFlags::HOST_PRIVATE,
        PageFlags::empty(),
    )?;
    memory::expect_filled(memory::shared(page), PAGE_SIZE, 0x3333)
}

/// Demands that no line of the page at `address` still holds what [`memory::fill`] wrote.
fn expect_scrambled(address: u64, filled: u64, seed: u64) -> Verdict {
    for line in (0..PAGE_SIZE).step_by(64) {
        expect_not(
            "content",
            memory::read(address + line)?,
            seed ^ (filled + line),
        )?;
        expect_not("content", memory::read(address + line)?, 0)?;
    }
    Ok(())
}

fn to_shared_scrambles() -> Verdict {
    let page = valid_page()?;
    memory::fill(page.get(), PAGE_SIZE, 0x4444)?;
    expect_pvalidate(page.get(), SIZE_4K, RESCIND, Pvalidated::DONE)?;
    change_page_state(page, PageOperation::SHARED)?;
    expect_scrambled(memory::shared(page), page.get(), 0x4444)
}

fn to_private_scrambles() -> Verdict {
    let page = shared_page()?;
    memory::fill(memory::shared(page), PAGE_SIZE, 0x5555)?;
    change_page_state(page, PageOperation::PRIVATE)?;
    expect_pvalidate(page.get(), SIZE_4K, VALIDATE, Pvalidated::DONE)?;
    expect_scrambled(page.get(), memory::shared(page), 0x5555)
}

fn conversions() -> u64 {
    oracle::counter(Counter::IMPLICIT_CONVERSION)
}

/// Takes the page from the guest for good: the host converts it, its content is gone.
fn shared_access_to_private() -> Verdict {
    let page = valid_page()?;
    let before = conversions();
    memory::read(memory::shared(page))?;
    expect("implicit conversions", conversions(), before + 1)?;
    expect_flags(
        page,
        PageFlags::HOST_PRIVATE | PageFlags::ASSIGNED,
        PageFlags::empty(),
    )?;
    expect(
        "private read",
        insn::load(page.get()),
        Err(Trap::not_validated(page.get())),
    )
}

fn private_access_to_shared() -> Verdict {
    let page = shared_page()?;
    let before = conversions();
    expect(
        "private read",
        insn::load(page.get()),
        Err(Trap::not_validated(page.get())),
    )?;
    expect("implicit conversions", conversions(), before + 1)?;
    expect_flags(page, PageFlags::HOST_PRIVATE, PageFlags::HOST_PRIVATE)
}

fn fetch_is_private() -> Verdict {
    let page: Gpa = valid_page()?;
    memory::write(page.get(), SUBROUTINE)?;
    let before = conversions();
    // SAFETY: the fetch goes to the private page, where a whole subroutine was just written.
    let result = unsafe { insn::call(memory::shared(page)) };
    expect(
        "call through the shared mapping",
        result,
        Ok(SUBROUTINE_RESULT),
    )?;
    expect("implicit conversions", conversions(), before)
}

fn vc_cpuid() -> Verdict {
    expect("CPUID", insn::cpuid(0, 0), Err(Trap::vc(ExitCode::CPUID.0)))
}

fn vc_out() -> Verdict {
    // The scratch register of the second serial port: harmless if it goes through.
    expect("OUT", insn::out8(0x2FF, 0), Err(Trap::vc(ExitCode::IOIO.0)))
}

/// The APIC base register: exists everywhere, not one of those that must not raise #VC.
const APIC_BASE: u32 = 0x1B;

fn vc_rdmsr() -> Verdict {
    expect(
        "RDMSR",
        insn::rdmsr(APIC_BASE),
        Err(Trap::vc(ExitCode::MSR.0)),
    )
}

fn vc_wrmsr() -> Verdict {
    expect(
        "WRMSR",
        insn::wrmsr(APIC_BASE, 0xFEE0_0900),
        Err(Trap::vc(ExitCode::MSR.0)),
    )
}

fn sev_status() -> Verdict {
    // SEV, SEV-ES, SEV-SNP and nothing else (guests.md §8.3).
    expect("SEV_STATUS", insn::rdmsr(msr::SEV_STATUS), Ok(7))
}

fn invalid_opcode() -> Verdict {
    expect("UD2", insn::undefined(), Err(Trap::UD))
}
