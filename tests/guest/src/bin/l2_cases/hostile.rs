//! A host that keeps entries busy, or removes pages and adds others (design.md I2, I5, I6, I12), played
//! by the machine on request.
//!
//! When the paravisor meets a page on record that is pending, it ends the machine. So each of the ways
//! to meet one is the end of a run of its own; which one says the number of processors.

use guest::harness::{Case, Verdict, case, expect};
use guest::insn;
use guest::memory::{self, page_of, private};
use guest::oracle::{self, host_act};
use guest::tdcall::{accept, call, expect_accept, map_gpa};
use guest::trap::Trap;
use protocols::addr::{LARGE_PAGE_SIZE, PAGE_SIZE, PageSize};
use protocols::oracle::{Counter, HostAct};
use protocols::tdx::vmcall::register::{R8, RAX};
use protocols::tdx::{Leaf, Operand, Status};

use crate::ve::take_info;

/// Under every host.
pub const CASES: &[Case] = &[case(
    "a_busy_entry_is_told",
    "tdx.md §2 row 5, design.md I12",
    busy,
)];

/// With `hostile=re-add`, before the end.
pub const RE_ADD: &[Case] = &[case(
    "re_added_before_it_was_accepted",
    "design.md I2",
    re_added_pending,
)];

const SHARED: u64 = 1 << 47;
const SMALL: PageSize = PageSize::Size4K;
const LARGE: PageSize = PageSize::Size2M;

/// The end of a run with `hostile=re-add`, by the number of processors.
pub fn end() -> &'static [Case] {
    const ENDS: [&[Case]; 3] = [
        &[case(
            "re_added_and_asked_for_again",
            "design.md I2, I6",
            asked_again,
        )],
        &[case("re_added_page_is_used", "design.md I6", used)],
        &[case("re_added_and_shared", "design.md I6", shared)],
    ];
    let processors = call(Leaf::VP_INFO, &[]).map_or(0, |after| after[R8] as u32 as usize);
    ENDS.get(processors.wrapping_sub(1)).copied().unwrap_or(&[])
}

/// The host works on the entry for ever: the paravisor asks so often and no more, and the guest hears
/// the module's own answer. Nothing has changed, so that it may ask again.
fn busy() -> Verdict {
    let region = memory::fresh_region();
    let page = page_of(region, 7);
    host_act(page, HostAct::HOLD)?;
    let before = oracle::counter(Counter::ACCEPT_4K);
    let answer = accept(page, SMALL)?;
    let asked = oracle::counter(Counter::ACCEPT_4K) - before;
    let wanted = Status::OPERAND_BUSY.with(Operand::RCX.0);
    expect("RAX", answer, wanted)?;
    expect(
        "asked often, not for ever",
        (2..20_000).contains(&asked),
        true,
    )?;
    // Others of the region are not held up.
    expect_accept(page_of(region, 8), SMALL, 0)?;
    host_act(page, HostAct::HOLD)?;
    expect_accept(page, SMALL, 0)?;
    memory::expect_zero(private(page), PAGE_SIZE)
}

/// The host exchanges a page that nobody has accepted: it is accepted once.
fn re_added_pending() -> Verdict {
    let page = memory::fresh_page();
    // The first touch has the host give one.
    expect("read", insn::load(private(page)), Err(Trap::VE))?;
    take_info()?;
    host_act(page, HostAct::RE_ADD)?;
    expect_accept(page, SMALL, 0)?;
    memory::expect_zero(private(page), PAGE_SIZE)?;
    let already = Status::PAGE_ALREADY_ACCEPTED.with(0);
    expect_accept(page, SMALL, already)?;
    expect(
        "double accepts",
        oracle::counter(Counter::DOUBLE_VALIDATION),
        0,
    )
}

/// A page of the guest's is exchanged: the guest's next use of it ends the machine.
fn used() -> Verdict {
    let page = memory::fresh_page();
    expect_accept(page, SMALL, 0)?;
    memory::write(private(page), 5)?;
    host_act(page, HostAct::RE_ADD)?;
    expect("read", insn::load(private(page)), Ok(5))
}

/// It asks for the page again, as the host wants it to, although it has it: the accept would succeed.
fn asked_again() -> Verdict {
    let region = memory::fresh_region();
    expect_accept(region, LARGE, 0)?;
    host_act(region, HostAct::RE_ADD)?;
    expect("RAX", accept(region, SMALL)?, Operand::RCX.invalid())
}

/// It has the page shared: the paravisor takes the access to it away and meets another page.
fn shared() -> Verdict {
    let region = memory::fresh_region();
    expect_accept(region, LARGE, 0)?;
    host_act(page_of(region, 511), HostAct::RE_ADD)?;
    let answer = map_gpa(SHARED | region.get(), LARGE_PAGE_SIZE)?;
    expect("R10", answer.0, 0)?;
    expect("RAX", call(Leaf::VP_INFO, &[])?[RAX], u64::MAX)
}
