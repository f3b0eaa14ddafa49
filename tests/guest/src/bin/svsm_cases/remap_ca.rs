//! REMAP_CA: moving the calling area, and where it may not go.

use guest::harness::{Case, Finding, Verdict, case, expect};
use guest::memory;
use guest::oracle;
use guest::svsm::{self, Answer, Registers, call_with_pending};
use protocols::addr::{Gpa, PAGE_SIZE, PageSize};
use protocols::svsm::{CallId, CoreCall, ResultCode};

use crate::setup::{
    NO_MEMORY, accepted_page, done, expect_guests, paravisor, refused, rescind, unchanged, validate,
};
use crate::vcpus;

/// The table.
pub const CASES: &[Case] = &[
    case("remap_moves_the_area", "svsm.md §4.0", moves),
    case(
        "remap_clears_pending_in_both",
        "svsm.md §4.0",
        clears_pending,
    ),
    case("remap_frees_the_old_area", "svsm.md §4.0", frees_old),
    case("remap_to_the_same", "svsm.md §4.0", same),
    case("remap_misaligned", "svsm.md §3, §4.0", misaligned),
    case("remap_to_unaccepted_page", "svsm.md §3, §4.0", unaccepted),
    case(
        "remap_into_paravisor",
        "svsm.md §4.0, design.md I4",
        into_paravisor,
    ),
    case("remap_into_vmsa", "svsm.md §4.0, design.md I4", into_vmsa),
    case(
        "remap_into_other_calling_area",
        "svsm.md §4.0, design.md I4",
        into_calling_area,
    ),
    case(
        "remap_where_no_memory_is",
        "svsm.md §3, design.md I7",
        no_memory,
    ),
];

const SMALL: PageSize = PageSize::Size4K;

fn remap_raw(target: u64) -> Result<Answer, Finding> {
    call_with_pending(
        1,
        CallId::core(CoreCall::REMAP_CA).encode(),
        Registers::rcx(target),
    )
}

/// Moves the calling area, which must succeed.
fn remap(target: Gpa) -> Verdict {
    let answer = remap_raw(target.get())?;
    expect("result", answer.result(), ResultCode::SUCCESS)?;
    expect("call_pending of the old area", answer.pending, 0)?;
    svsm::use_calling_area(target);
    Ok(())
}

fn moves() -> Verdict {
    let area = accepted_page()?;
    remap(area)?;
    // The next call goes through the new area.
    let page = memory::fresh_page();
    done(&[validate(page, SMALL)])?;
    expect_guests(page)
}

fn clears_pending() -> Verdict {
    let old = svsm::calling_area();
    let area = accepted_page()?;
    memory::write(area.get(), 0xFF)?;
    let answer = remap_raw(area.get())?;
    expect("call_pending of the old area", answer.pending, 0)?;
    expect("result", answer.result(), ResultCode::SUCCESS)?;
    svsm::use_calling_area(area);
    expect(
        "call_pending of the new area",
        memory::read(area.get())? & 0xFF,
        0,
    )?;
    // A call announced in the old area is none.
    memory::write(old.get(), 1)?;
    let rax = CallId::core(CoreCall::QUERY_PROTOCOL).encode();
    let answer = call_with_pending(0, rax, Registers::rcx(1))?;
    expect(
        "registers",
        (answer.rax, answer.registers),
        (rax, Registers::rcx(1)),
    )?;
    expect(
        "call_pending of the old area",
        memory::read(old.get())? & 0xFF,
        1,
    )
}

fn frees_old() -> Verdict {
    let old = svsm::calling_area();
    refused(
        &[rescind(old, SMALL)],
        ResultCode::INVALID_ADDRESS,
        0,
        &[old],
    )?;
    remap(accepted_page()?)?;
    expect_guests(old)?;
    done(&[rescind(old, SMALL)])?;
    oracle::expect_validated(old, false)?;
    done(&[validate(old, SMALL)])
}

fn same() -> Verdict {
    let area = svsm::calling_area();
    unchanged(&[area], || remap(area))?;
    done(&[validate(memory::fresh_page(), SMALL)])
}

/// A remap that must fail, after which the old area still serves.
fn refused_target(target: u64, result: ResultCode, watched: &[Gpa]) -> Verdict {
    unchanged(watched, || {
        let answer = remap_raw(target)?;
        expect("result", answer.result(), result)?;
        expect("call_pending", answer.pending, 0)
    })?;
    done(&[validate(memory::fresh_page(), SMALL)])
}

fn misaligned() -> Verdict {
    let page = accepted_page()?;
    for offset in [1, 8, 0x800] {
        refused_target(page.get() + offset, ResultCode::INVALID_PARAMETER, &[page])?;
    }
    Ok(())
}

fn unaccepted() -> Verdict {
    let page = memory::fresh_page();
    refused_target(page.get(), ResultCode::INVALID_ADDRESS, &[page])
}

fn into_paravisor() -> Verdict {
    let (base, size) = paravisor();
    for gpa in [base, Gpa::new(base.get() + size - PAGE_SIZE)] {
        refused_target(gpa.get(), ResultCode::INVALID_ADDRESS, &[gpa])?;
    }
    Ok(())
}

fn into_vmsa() -> Verdict {
    vcpus::with_vcpu(|vmsa, _| refused_target(vmsa.get(), ResultCode::INVALID_ADDRESS, &[vmsa]))
}

fn into_calling_area() -> Verdict {
    vcpus::with_vcpu(|_, area| refused_target(area.get(), ResultCode::INVALID_ADDRESS, &[area]))
}

fn no_memory() -> Verdict {
    let area = svsm::calling_area().get();
    for target in [
        NO_MEMORY.get(),
        1 << 45,
        area | 1 << 47,
        area | 1 << 63,
        !0xFFF,
    ] {
        refused_target(target, ResultCode::INVALID_ADDRESS, &[])?;
    }
    Ok(())
}
