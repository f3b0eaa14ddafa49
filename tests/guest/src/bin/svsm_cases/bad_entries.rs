//! PVALIDATE entries that are wrong: `next` names the entry, all before it are done, it and all
//! behind it are as they were.

use guest::ghcb::change_page_state;
use guest::harness::{Case, Verdict, case, expect};
use guest::memory::{self, page_of};
use guest::oracle;
use guest::svsm;
use protocols::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE, PageSize};
use protocols::ghcb::PageOperation;
use protocols::oracle::Counter;
use protocols::svsm::{PvalidateEntry, ResultCode};

use crate::setup::{
    NO_MEMORY, accepted_page, accepted_region, done, expect_guests, expect_not_accepted,
    expect_pvalidate, ignoring, paravisor, refused, rescind, unchanged, validate,
};
use crate::vcpus;

/// The table.
pub const CASES: &[Case] = &[
    case(
        "entry_size_2_and_3",
        "svsm.md §4.1 entry bits 1:0",
        bad_size,
    ),
    case(
        "entry_reserved_bits",
        "svsm.md §4.1 entry bits 11:4",
        reserved_bits,
    ),
    case(
        "entry_2m_misaligned",
        "svsm.md §4.1 entry bits 63:12",
        misaligned,
    ),
    case("entry_validated_twice", "issue 2, design.md I2", twice),
    case(
        "entry_2m_validated_twice",
        "issue 2, design.md I2",
        large_twice,
    ),
    case(
        "entry_4k_in_accepted_2m",
        "issue 2, design.md I2",
        small_in_large,
    ),
    case(
        "entry_2m_over_accepted_4k",
        "issue 2, design.md I2",
        large_over_small,
    ),
    case(
        "entry_twice_in_one_list",
        "svsm.md §4.1, design.md I9",
        twice_in_list,
    ),
    case("entry_rescinded_twice", "svsm.md §4.1", rescinded_twice),
    case(
        "entry_rescinds_unaccepted",
        "svsm.md §4.1",
        rescinds_unaccepted,
    ),
    case(
        "entry_2m_rescinds_partly_accepted",
        "svsm.md §4.1",
        rescinds_partly,
    ),
    case(
        "entry_in_paravisor",
        "svsm.md §4.1, design.md I4",
        in_paravisor,
    ),
    case(
        "entry_in_paravisor_ignoring",
        "svsm.md §4.1, design.md I4",
        in_paravisor_ignoring,
    ),
    case(
        "entry_2m_over_paravisor",
        "svsm.md §4.1, pitfalls.md §4",
        large_over_paravisor,
    ),
    case("entry_vmsa", "svsm.md §4.1, design.md I4", vmsa),
    case(
        "entry_2m_over_vmsa",
        "svsm.md §4.1, pitfalls.md §4",
        large_over_vmsa,
    ),
    case(
        "entry_calling_area",
        "svsm.md §4.1, design.md I4",
        calling_area,
    ),
    case(
        "entry_2m_over_calling_area",
        "svsm.md §4.1, pitfalls.md §4",
        large_over_calling_area,
    ),
    case(
        "entry_where_no_memory_is",
        "svsm.md §4.1, design.md I7",
        no_memory,
    ),
    case(
        "entry_above_all_memory",
        "svsm.md §4.1, design.md I7",
        above_memory,
    ),
    case(
        "entry_2m_over_end_of_memory",
        "svsm.md §4.1, pitfalls.md §4",
        over_end,
    ),
    case(
        "entry_in_the_middle",
        "svsm.md §4.1, design.md I9",
        in_the_middle,
    ),
    case(
        "entry_behind_preset_next",
        "svsm.md §4.1, design.md I9",
        behind_preset_next,
    ),
    case("entry_before_next_is_not_read", "svsm.md §4.1", before_next),
    case(
        "entry_rescinds_the_list",
        "svsm.md §4.1, pitfalls.md §4",
        rescinds_list,
    ),
    case(
        "entry_shared_page_stays_shared",
        "svsm.md §4.1",
        shared_page,
    ),
];

const SMALL: PageSize = PageSize::Size4K;
const LARGE: PageSize = PageSize::Size2M;

const PARAMETER: ResultCode = ResultCode::INVALID_PARAMETER;
const ADDRESS: ResultCode = ResultCode::INVALID_ADDRESS;
const NO_CHANGE: ResultCode = ResultCode::FAIL_NO_CHANGE;

fn bad_size() -> Verdict {
    let region = memory::fresh_region();
    for size in [2, 3] {
        for entry in [validate(region, SMALL), rescind(region, SMALL)] {
            refused(&[PvalidateEntry(entry.0 | size)], PARAMETER, 0, &[region])?;
        }
    }
    Ok(())
}

fn reserved_bits() -> Verdict {
    let page = memory::fresh_page();
    for bit in 4..12 {
        let entry = PvalidateEntry(validate(page, SMALL).0 | 1 << bit);
        refused(&[entry], PARAMETER, 0, &[page])?;
    }
    Ok(())
}

fn misaligned() -> Verdict {
    let inside = page_of(memory::fresh_region(), 1);
    refused(&[validate(inside, LARGE)], PARAMETER, 0, &[inside])?;
    let accepted = page_of(accepted_region()?, 256);
    refused(&[rescind(accepted, LARGE)], PARAMETER, 0, &[accepted])
}

fn twice() -> Verdict {
    let page = accepted_page()?;
    memory::fill(page.get(), PAGE_SIZE, 0x1111)?;
    refused(&[validate(page, SMALL)], NO_CHANGE, 0, &[page])?;
    memory::expect_filled(page.get(), PAGE_SIZE, 0x1111)?;
    expect(
        "double validations",
        oracle::counter(Counter::DOUBLE_VALIDATION),
        0,
    )
}

fn large_twice() -> Verdict {
    let region = accepted_region()?;
    memory::fill(region.get(), LARGE_PAGE_SIZE, 0x2222)?;
    refused(
        &[validate(region, LARGE)],
        NO_CHANGE,
        0,
        &[region, page_of(region, 511)],
    )?;
    memory::expect_filled(region.get(), LARGE_PAGE_SIZE, 0x2222)
}

fn small_in_large() -> Verdict {
    let page = page_of(accepted_region()?, 44);
    memory::fill(page.get(), PAGE_SIZE, 0x3333)?;
    refused(&[validate(page, SMALL)], NO_CHANGE, 0, &[page])?;
    memory::expect_filled(page.get(), PAGE_SIZE, 0x3333)
}

fn large_over_small() -> Verdict {
    let region = memory::fresh_region();
    let last = page_of(region, 511);
    done(&[validate(last, SMALL)])?;
    memory::fill(last.get(), PAGE_SIZE, 0x4444)?;
    refused(
        &[validate(region, LARGE)],
        NO_CHANGE,
        0,
        &[region, page_of(region, 510), last],
    )?;
    memory::expect_filled(last.get(), PAGE_SIZE, 0x4444)
}

fn twice_in_list() -> Verdict {
    let page = memory::fresh_page();
    let next = page_of(page, 1);
    let list = [
        validate(page, SMALL),
        validate(page, SMALL),
        validate(next, SMALL),
    ];
    expect_pvalidate(&list, NO_CHANGE, 1)?;
    expect_guests(page)?;
    expect_not_accepted(next)
}

fn rescinded_twice() -> Verdict {
    let page = accepted_page()?;
    expect_pvalidate(&[rescind(page, SMALL), rescind(page, SMALL)], NO_CHANGE, 1)?;
    expect_not_accepted(page)
}

fn rescinds_unaccepted() -> Verdict {
    let page = memory::fresh_page();
    refused(&[rescind(page, SMALL)], NO_CHANGE, 0, &[page])?;
    let region = memory::fresh_region();
    refused(&[rescind(region, LARGE)], NO_CHANGE, 0, &[region])
}

fn rescinds_partly() -> Verdict {
    let region = memory::fresh_region();
    done(&[validate(page_of(region, 9), SMALL)])?;
    let watched = [page_of(region, 8), page_of(region, 9)];
    refused(&[rescind(region, LARGE)], NO_CHANGE, 0, &watched)
}

fn paravisor_pages() -> [Gpa; 3] {
    let (base, size) = paravisor();
    [0, PAGE_SIZE * 3, size - PAGE_SIZE].map(|offset| Gpa::new(base.get() + offset))
}

fn in_paravisor() -> Verdict {
    for page in paravisor_pages() {
        refused(&[validate(page, SMALL)], ADDRESS, 0, &[page])?;
        refused(&[rescind(page, SMALL)], ADDRESS, 0, &[page])?;
    }
    Ok(())
}

fn in_paravisor_ignoring() -> Verdict {
    for page in paravisor_pages() {
        refused(&[ignoring(validate(page, SMALL))], ADDRESS, 0, &[page])?;
        refused(&[ignoring(rescind(page, SMALL))], ADDRESS, 0, &[page])?;
    }
    Ok(())
}

fn large_over_paravisor() -> Verdict {
    let (base, size) = paravisor();
    for region in [
        base.align_down(LARGE),
        Gpa::new(base.get() + size - 1).align_down(LARGE),
    ] {
        refused(&[validate(region, LARGE)], ADDRESS, 0, &[region, base])?;
        refused(&[rescind(region, LARGE)], ADDRESS, 0, &[region, base])?;
    }
    Ok(())
}

fn vmsa() -> Verdict {
    vcpus::with_vcpu(|vmsa, _| {
        for entry in [validate(vmsa, SMALL), rescind(vmsa, SMALL)] {
            refused(&[entry], ADDRESS, 0, &[vmsa])?;
            refused(&[ignoring(entry)], ADDRESS, 0, &[vmsa])?;
        }
        Ok(())
    })
}

fn large_over_vmsa() -> Verdict {
    vcpus::with_vcpu(|vmsa, _| {
        let region = vmsa.align_down(LARGE);
        for entry in [validate(region, LARGE), rescind(region, LARGE)] {
            refused(&[entry], ADDRESS, 0, &[vmsa, region])?;
            refused(&[ignoring(entry)], ADDRESS, 0, &[vmsa, region])?;
        }
        Ok(())
    })
}

fn calling_area() -> Verdict {
    let area = svsm::calling_area();
    refused(&[rescind(area, SMALL)], ADDRESS, 0, &[area])?;
    refused(&[ignoring(rescind(area, SMALL))], ADDRESS, 0, &[area])?;
    refused(&[validate(area, SMALL)], ADDRESS, 0, &[area])?;
    vcpus::with_vcpu(|_, area| refused(&[rescind(area, SMALL)], ADDRESS, 0, &[area]))
}

fn large_over_calling_area() -> Verdict {
    let area = svsm::calling_area();
    let region = area.align_down(LARGE);
    refused(&[rescind(region, LARGE)], ADDRESS, 0, &[area, region])?;
    refused(
        &[ignoring(validate(region, LARGE))],
        ADDRESS,
        0,
        &[area, region],
    )
}

fn no_memory() -> Verdict {
    refused(&[validate(NO_MEMORY, SMALL)], ADDRESS, 0, &[])?;
    refused(&[validate(NO_MEMORY, LARGE)], ADDRESS, 0, &[])?;
    refused(&[rescind(NO_MEMORY, SMALL)], ADDRESS, 0, &[])
}

fn above_memory() -> Verdict {
    let page = accepted_page()?;
    for address in [1 << 45, 1 << 47, 1 << 51, 1 << 52, 1 << 63] {
        // An alias of a good page, should the bit be dropped.
        let entry = rescind(Gpa::new(page.get() | address), SMALL);
        refused(&[entry], ADDRESS, 0, &[page])?;
    }
    refused(&[validate(Gpa::new(!0xFFF), SMALL)], ADDRESS, 0, &[])?;
    refused(&[validate(Gpa::new(!0x1F_FFFF), LARGE)], ADDRESS, 0, &[])
}

/// The legacy hole below 1 MiB: the first 2 MiB begin and end with memory, but are not all
/// memory.
fn over_end() -> Verdict {
    let start = Gpa::new(0);
    refused(
        &[validate(start, LARGE)],
        ADDRESS,
        0,
        &[start, page_of(start, 511)],
    )
}

fn in_the_middle() -> Verdict {
    let region = memory::fresh_region();
    let list = [
        validate(page_of(region, 0), SMALL),
        validate(page_of(region, 1), SMALL),
        validate(NO_MEMORY, SMALL),
        validate(page_of(region, 3), SMALL),
    ];
    expect_pvalidate(&list, ADDRESS, 2)?;
    expect_guests(page_of(region, 0))?;
    expect_guests(page_of(region, 1))?;
    expect_not_accepted(page_of(region, 2))?;
    expect_not_accepted(page_of(region, 3))
}

fn behind_preset_next() -> Verdict {
    let region = memory::fresh_region();
    let list = [
        validate(page_of(region, 0), SMALL),
        validate(page_of(region, 1), SMALL),
        PvalidateEntry(validate(page_of(region, 2), SMALL).0 | 1 << 7),
    ];
    let want = svsm::Outcome {
        result: PARAMETER,
        next: 2,
    };
    expect("PVALIDATE", svsm::pvalidate_from(1, &list)?, want)?;
    expect_not_accepted(page_of(region, 0))?;
    expect_guests(page_of(region, 1))?;
    expect_not_accepted(page_of(region, 2))
}

fn before_next() -> Verdict {
    let page = memory::fresh_page();
    let list = [PvalidateEntry(u64::MAX), validate(page, SMALL)];
    let want = svsm::Outcome {
        result: ResultCode::SUCCESS,
        next: 2,
    };
    expect("PVALIDATE", svsm::pvalidate_from(1, &list)?, want)?;
    expect_guests(page)
}

/// The page of the list goes away with its own entry: neither the next entry nor `next` can be
/// reached any more, and VMPL0 does not touch the page.
fn rescinds_list() -> Verdict {
    for entries in [1, 2] {
        let page = accepted_page()?;
        let behind = page_of(page, 1);
        let list = svsm::List::at(page);
        list.put_entries(&[rescind(page, SMALL), validate(behind, SMALL)])?;
        list.put_head(entries, 0)?;
        expect("result", list.submit()?, ADDRESS)?;
        expect_not_accepted(page)?;
        expect_not_accepted(behind)?;
    }
    done(&[validate(memory::fresh_page(), SMALL)])
}

/// Rescinding is the guest's task before it shares a page; validating a page the host has as
/// shared makes the host convert it, which the guest asked for.
fn shared_page() -> Verdict {
    let page = memory::fresh_page();
    change_page_state(page, PageOperation::SHARED)?;
    memory::fill(memory::shared(page), PAGE_SIZE, 0x5555)?;
    unchanged(&[page], || {
        expect_pvalidate(&[rescind(page, SMALL)], NO_CHANGE, 0)
    })?;
    memory::expect_filled(memory::shared(page), PAGE_SIZE, 0x5555)
}
