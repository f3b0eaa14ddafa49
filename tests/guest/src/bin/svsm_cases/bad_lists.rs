//! PVALIDATE lists that are wrong as a whole: nothing of them is done, the head stays as it is.

use guest::ghcb::change_page_state;
use guest::harness::{Case, Verdict, case, expect};
use guest::memory::{self, page_of};
use guest::svsm::{self, List, Outcome, Registers, call};
use protocols::addr::{Gpa, PAGE_SIZE, PageSize};
use protocols::ghcb::PageOperation;
use protocols::svsm::{CallId, CoreCall, MAX_ENTRIES_IN_CALLING_AREA, ResultCode};

use crate::setup::{
    NO_MEMORY, accepted_page, done, expect_not_accepted, paravisor, rescind, unchanged, validate,
};
use crate::vcpus;

/// The table.
pub const CASES: &[Case] = &[
    case("list_without_entries", "svsm.md §4.1", no_entries),
    case("list_with_one_entry_too_many", "svsm.md §4.1", too_many),
    case("list_with_65535_entries", "svsm.md §4.1", far_too_many),
    case("list_next_is_entries", "svsm.md §4.1", next_is_entries),
    case("list_next_beyond_entries", "svsm.md §4.1", next_beyond),
    case("list_already_done", "svsm.md §4.1", already_done),
    case("list_misaligned", "svsm.md §3, §4.1", misaligned),
    case("list_crosses_page", "svsm.md §4.1", crosses_page),
    case("list_with_room_for_no_entry", "svsm.md §4.1", head_only),
    case(
        "list_on_unaccepted_page",
        "svsm.md §3, design.md I6",
        unaccepted,
    ),
    case(
        "list_on_rescinded_page",
        "svsm.md §3, design.md I6",
        rescinded,
    ),
    case("list_on_shared_page", "svsm.md §3, design.md I6", shared),
    case(
        "list_in_paravisor",
        "svsm.md §3, §10, design.md I4",
        in_paravisor,
    ),
    case("list_in_vmsa", "svsm.md §3, §10, design.md I4", in_vmsa),
    case(
        "list_where_no_memory_is",
        "svsm.md §3, design.md I7",
        no_memory,
    ),
    case(
        "list_above_all_memory",
        "svsm.md §3, design.md I7",
        above_memory,
    ),
    case("list_with_c_bit", "svsm.md §3, design.md I7", with_c_bit),
    case("list_wraps", "svsm.md §3, design.md I7", wraps),
];

const SMALL: PageSize = PageSize::Size4K;

/// Submits the list in the calling area with this head; it must be refused, untouched.
fn refused_head(entries: u16, next: u16) -> Verdict {
    let page = memory::fresh_page();
    let list = List::in_calling_area();
    list.put_entries(&[validate(page, SMALL), validate(page_of(page, 1), SMALL)])?;
    list.put_head(entries, next)?;
    unchanged(&[page, page_of(page, 1)], || {
        expect("result", list.submit()?, ResultCode::INVALID_PARAMETER)?;
        expect("head of the list", list.head()?, (entries, next))
    })
}

fn no_entries() -> Verdict {
    refused_head(0, 0)
}

fn too_many() -> Verdict {
    refused_head(MAX_ENTRIES_IN_CALLING_AREA as u16 + 1, 0)
}

fn far_too_many() -> Verdict {
    refused_head(u16::MAX, 0)
}

fn next_is_entries() -> Verdict {
    refused_head(2, 2)
}

fn next_beyond() -> Verdict {
    refused_head(2, 3)?;
    refused_head(1, u16::MAX)
}

/// The same list again without resetting `next`.
fn already_done() -> Verdict {
    let page = memory::fresh_page();
    done(&[validate(page, SMALL)])?;
    let list = List::in_calling_area();
    unchanged(&[page], || {
        expect("result", list.submit()?, ResultCode::INVALID_PARAMETER)?;
        expect("head of the list", list.head()?, (1, 1))
    })
}

/// Calls PVALIDATE with a list address that must be refused.
fn refused_address(address: u64, result: ResultCode, watched: &[Gpa]) -> Verdict {
    unchanged(watched, || {
        let answer = call(CallId::core(CoreCall::PVALIDATE), Registers::rcx(address))?;
        expect("result", answer.result(), result)
    })
}

fn misaligned() -> Verdict {
    let page = memory::fresh_page();
    let list = List::in_calling_area();
    for offset in [1, 4, 7] {
        // A head at the odd place, so that only the alignment is wrong.
        let odd = List::at(Gpa::new(svsm::buffer().get() + offset));
        list.put_head(0, 0)?;
        odd.put_entries(&[validate(page, SMALL)])?;
        odd.put_head(1, 0)?;
        refused_address(
            svsm::buffer().get() + offset,
            ResultCode::INVALID_PARAMETER,
            &[page],
        )?;
        expect("head of the list", odd.head()?, (1, 0))?;
    }
    Ok(())
}

/// Two entries with room for one: the second would lie in the next page, which is the guest's
/// as well.
fn crosses_page() -> Verdict {
    let region = memory::fresh_region();
    done(&[validate(region, SMALL), validate(page_of(region, 1), SMALL)])?;
    let list = List::at(Gpa::new(region.get() + PAGE_SIZE - 16));
    let page = memory::fresh_page();
    list.put_entries(&[validate(page, SMALL), validate(page_of(page, 1), SMALL)])?;
    list.put_head(2, 0)?;
    unchanged(&[page, page_of(page, 1)], || {
        expect("result", list.submit()?, ResultCode::INVALID_PARAMETER)?;
        expect("head of the list", list.head()?, (2, 0))
    })
}

fn head_only() -> Verdict {
    let list = List::at(Gpa::new(accepted_page()?.get() + PAGE_SIZE - 8));
    list.put_head(1, 0)?;
    unchanged(&[], || {
        expect("result", list.submit()?, ResultCode::INVALID_PARAMETER)?;
        expect("head of the list", list.head()?, (1, 0))
    })
}

fn unaccepted() -> Verdict {
    let page = memory::fresh_page();
    refused_address(page.get(), ResultCode::INVALID_ADDRESS, &[page])?;
    expect_not_accepted(page)
}

fn rescinded() -> Verdict {
    let page = accepted_page()?;
    let list = List::at(page);
    list.put_entries(&[validate(page_of(page, 1), SMALL)])?;
    list.put_head(1, 0)?;
    done(&[rescind(page, SMALL)])?;
    refused_address(
        page.get(),
        ResultCode::INVALID_ADDRESS,
        &[page, page_of(page, 1)],
    )
}

fn shared() -> Verdict {
    let page = memory::fresh_page();
    change_page_state(page, PageOperation::SHARED)?;
    refused_address(page.get(), ResultCode::INVALID_ADDRESS, &[page])
}

fn in_paravisor() -> Verdict {
    let (base, size) = paravisor();
    for offset in [0, PAGE_SIZE, size - PAGE_SIZE, size - 16] {
        let inside = Gpa::new(base.get() + offset);
        refused_address(inside.get(), ResultCode::INVALID_ADDRESS, &[inside])?;
    }
    Ok(())
}

fn in_vmsa() -> Verdict {
    vcpus::with_vcpu(|vmsa, _| refused_address(vmsa.get(), ResultCode::INVALID_ADDRESS, &[vmsa]))
}

fn no_memory() -> Verdict {
    refused_address(NO_MEMORY.get(), ResultCode::INVALID_ADDRESS, &[])
}

fn above_memory() -> Verdict {
    for address in [1 << 45, 0x3FFF_FFFF_F000] {
        refused_address(address, ResultCode::INVALID_ADDRESS, &[])?;
    }
    Ok(())
}

fn with_c_bit() -> Verdict {
    let list = svsm::buffer().get();
    for bit in [47, 51, 52, 63] {
        refused_address(list | 1 << bit, ResultCode::INVALID_ADDRESS, &[])?;
    }
    // The same list without the bit is fine: nothing is stuck.
    let page = memory::fresh_page();
    let outcome = svsm::pvalidate(&[validate(page, SMALL)])?;
    expect(
        "PVALIDATE",
        outcome,
        Outcome {
            result: ResultCode::SUCCESS,
            next: 1,
        },
    )
}

fn wraps() -> Verdict {
    for address in [!0xFFF, !0xF] {
        refused_address(address, ResultCode::INVALID_ADDRESS, &[])?;
    }
    Ok(())
}
