//! A host that wants a page accepted twice (design.md I2, I5, I6), played by the machine on request.
//!
//! What the guest asks again is answered from the paravisor's map, whatever the host has done to the
//! page: no validating instruction is executed, though it would succeed. When the paravisor itself
//! meets a page that is not valid any more although nobody gave it back, it ends the guest; so the
//! last case of each table is not survived.

use guest::harness::{Case, Finding, Verdict, case, expect};
use guest::insn;
use guest::memory::{self, page_of};
use guest::oracle::{self, host_act};
use guest::trap::Trap;
use protocols::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE, PageSize};
use protocols::oracle::{HostAct, PageFlags};
use protocols::svsm::{PvalidateEntry, ResultCode};

use crate::setup::{
    accepted_page, accepted_region, done, expect_guests, expect_zero_page, ignoring,
    pages_unchanged, refused, rescind, unchanged, validate,
};
use crate::team::{Member, Team};

/// With `hostile=remap`: other memory under the address.
pub const REMAP: &[Case] = &[
    case("remap_page_and_ask_again", "design.md I2", remap_page),
    case(
        "remap_in_region_and_ask_again",
        "design.md I2",
        remap_in_region,
    ),
    case(
        "remap_and_ask_on_all_processors",
        "design.md I2",
        remap_for_all,
    ),
    case(
        "remap_what_was_given_back",
        "design.md I2",
        remap_given_back,
    ),
];

/// The end of a run with `hostile=remap`.
pub const REMAP_ENDS: &[Case] = &[case("remap_and_rescind", "design.md I6", remap_and_rescind)];

/// With `hostile=re-add`: the page is removed from the RMP and added again.
pub const RE_ADD: &[Case] = &[case(
    "re_add_what_was_given_back",
    "design.md I2",
    re_add_given_back,
)];

/// The end of a run with `hostile=re-add`: map and RMP disagree from the re-adding on, which every
/// later case would be blamed for.
pub const RE_ADD_ENDS: &[Case] = &[case(
    "re_add_and_ask_again_and_rescind",
    "design.md I2, I6",
    re_add_and_rescind,
)];

const SMALL: PageSize = PageSize::Size4K;
const LARGE: PageSize = PageSize::Size2M;
const NO_CHANGE: ResultCode = ResultCode::FAIL_NO_CHANGE;
/// A page in the middle of a region.
const INSIDE: u64 = 7;

/// Whether the host does such things in this run.
pub fn is_host(act: HostAct) -> bool {
    oracle::host_would(act)
}

/// Asks for `entries` in a list that starts with each of them, each twice in a list, and each with
/// "was so already" ignored: nothing is executed and nothing changes.
fn ask_again(entries: &[PvalidateEntry], pages: &[Gpa]) -> Verdict {
    for &entry in entries {
        refused(&[entry], NO_CHANGE, 0, pages)?;
        refused(&[entry, entry], NO_CHANGE, 0, pages)?;
        for &second in entries {
            refused(&[ignoring(entry), second], NO_CHANGE, 1, pages)?;
        }
        unchanged(pages, || done(&[ignoring(entry), ignoring(entry)]))?;
    }
    Ok(())
}

/// Demands that the host's page is there: not validated, so that the guest's own use of it faults.
fn expect_hosts(page: Gpa) -> Verdict {
    oracle::expect_flags(
        page,
        PageFlags::ASSIGNED | PageFlags::VALIDATED,
        PageFlags::ASSIGNED,
    )?;
    expect(
        "the guest's own read",
        insn::load(page.get()),
        Err(Trap::not_validated(page.get())),
    )
}

fn remap_page() -> Verdict {
    let page = accepted_page()?;
    let region = page.align_down(LARGE);
    memory::fill(page.get(), PAGE_SIZE, 0x1111)?;
    host_act(page, HostAct::EXCHANGE)?;
    expect_hosts(page)?;
    ask_again(&[validate(page, SMALL)], &[page])?;
    // The region as a whole would take the page in.
    refused(&[validate(region, LARGE)], NO_CHANGE, 0, &[page, region])?;
    expect_hosts(page)?;
    host_act(page, HostAct::EXCHANGE)?;
    expect_guests(page)?;
    memory::expect_filled(page.get(), PAGE_SIZE, 0x1111)
}

fn remap_in_region() -> Verdict {
    let region = accepted_region()?;
    let page = page_of(region, INSIDE);
    memory::fill(region.get(), LARGE_PAGE_SIZE, 0x2222)?;
    host_act(page, HostAct::EXCHANGE)?;
    expect_hosts(page)?;
    let watched = [region, page, page_of(region, 511)];
    ask_again(&[validate(region, LARGE), validate(page, SMALL)], &watched)?;
    expect_hosts(page)?;
    host_act(page, HostAct::EXCHANGE)?;
    for index in [INSIDE - 1, INSIDE, INSIDE + 1] {
        expect_guests(page_of(region, index))?;
    }
    memory::expect_filled(region.get(), LARGE_PAGE_SIZE, 0x2222)
}

/// Every member asks again and again, half of them for the region and half for the page.
fn all_ask_again(page: Gpa) -> Verdict {
    use core::sync::atomic::{AtomicU64, Ordering};
    static PAGE: AtomicU64 = AtomicU64::new(0);

    let region = page.align_down(LARGE);
    PAGE.store(page.get(), Ordering::SeqCst);
    Team::with(|team| {
        pages_unchanged(&[page, region], || {
            team.all(|Member { number, caller }| {
                let page = Gpa::new(PAGE.load(Ordering::SeqCst));
                let entry = match number % 2 {
                    0 => validate(page.align_down(LARGE), LARGE),
                    _ => validate(page, SMALL),
                };
                (0..20).try_for_each(|_| {
                    expect("PVALIDATE", caller.pvalidate(&[entry])?, NO_CHANGE)?;
                    let ignored = caller.pvalidate(&[ignoring(entry)])?;
                    expect("PVALIDATE ignoring", ignored, ResultCode::SUCCESS)
                })
            })
        })
    })
}

fn remap_for_all() -> Verdict {
    let region = accepted_region()?;
    let page = page_of(region, INSIDE);
    host_act(page, HostAct::EXCHANGE)?;
    all_ask_again(page)?;
    host_act(page, HostAct::EXCHANGE)?;
    expect_guests(page)
}

/// Of two pages at one address only the one that was validated last is ever accepted.
fn remap_given_back() -> Verdict {
    let page = accepted_page()?;
    done(&[rescind(page, SMALL)])?;
    host_act(page, HostAct::EXCHANGE)?;
    done(&[validate(page, SMALL)])?;
    expect_zero_page(page)?;
    memory::fill(page.get(), PAGE_SIZE, 0x3333)?;
    host_act(page, HostAct::EXCHANGE)?;
    ask_again(&[validate(page, SMALL)], &[page])?;
    expect_hosts(page)?;
    host_act(page, HostAct::EXCHANGE)?;
    memory::expect_filled(page.get(), PAGE_SIZE, 0x3333)
}

fn must_have_ended(entry: PvalidateEntry) -> Verdict {
    done(&[entry])?;
    Err(Finding::new(format_args!(
        "the paravisor went on although a page was gone"
    )))
}

fn remap_and_rescind() -> Verdict {
    let page = accepted_page()?;
    host_act(page, HostAct::EXCHANGE)?;
    must_have_ended(rescind(page, SMALL))
}

/// Nothing is wrong with this: a page that nobody has accepted is the host's.
fn re_add_given_back() -> Verdict {
    let page = accepted_page()?;
    let region = accepted_region()?;
    done(&[rescind(page, SMALL), rescind(region, LARGE)])?;
    host_act(page, HostAct::RE_ADD)?;
    host_act(region, HostAct::RE_ADD_2M)?;
    done(&[validate(page, SMALL), validate(region, LARGE)])?;
    expect_guests(page)?;
    expect_guests(page_of(region, 511))?;
    expect_zero_page(page)?;
    memory::expect_zero(region.get(), LARGE_PAGE_SIZE)
}

fn re_add_and_rescind() -> Verdict {
    let region = accepted_region()?;
    let page = page_of(region, INSIDE);
    let entries = [validate(region, LARGE), validate(page, SMALL)];
    let watched = [region, page, page_of(region, 511)];
    for (act, at) in [(HostAct::RE_ADD, page), (HostAct::RE_ADD_2M, region)] {
        host_act(at, act)?;
        expect_hosts(page)?;
        ask_again(&entries, &watched)?;
        all_ask_again(page)?;
        expect_hosts(page)?;
    }
    must_have_ended(rescind(region, LARGE))
}
