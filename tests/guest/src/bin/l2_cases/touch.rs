//! Memory that the guest touches without having accepted it, where the image says that it is accepted
//! then.

use guest::harness::{Case, Verdict, case, expect};
use guest::insn;
use guest::memory::{self, page_of, private};
use guest::oracle;
use guest::tdcall::{accept, expect_accept, map_gpa};
use guest::trap::Trap;
use protocols::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE, PageSize};
use protocols::launch::REGION_GPA;
use protocols::oracle::Counter;
use protocols::tdx::Status;

use crate::ve::take_info;

pub const CASES: &[Case] = &[
    case("touch_accepts_the_region", "issue 5 (lazy-fault)", region),
    case("touch_by_a_write", "issue 5 (lazy-fault)", by_write),
    case("touched_page_is_already_accepted", "design.md I2", already),
    case("touch_takes_no_shared_page", "decision 033", beside_shared),
    case("touch_of_the_region", "design.md I4", own_region),
];

const SHARED: u64 = 1 << 47;

fn accepts() -> u64 {
    oracle::counter(Counter::ACCEPT_4K) + oracle::counter(Counter::ACCEPT_2M)
}

fn region() -> Verdict {
    let region = memory::fresh_region();
    oracle::expect_validated(region, false)?;
    expect("read", insn::load(private(page_of(region, 300))), Ok(0))?;
    let executed = accepts();
    memory::expect_zero(private(region), LARGE_PAGE_SIZE)?;
    expect("accepts for the rest", accepts(), executed)
}

fn by_write() -> Verdict {
    let page = memory::fresh_page();
    memory::write(private(page), 0x70)?;
    expect("content", memory::read(private(page))?, 0x70)?;
    memory::expect_zero(private(page) + 64, PAGE_SIZE - 64)
}

/// A guest that asks after all loses nothing.
fn already() -> Verdict {
    let region = memory::fresh_region();
    memory::write(private(region), 0x71)?;
    let executed = accepts();
    for page in [region, page_of(region, 9)] {
        let status = accept(page, PageSize::Size4K)?;
        let wanted = Status::PAGE_ALREADY_ACCEPTED.with(0) >> 32;
        expect("RAX", status >> 32, wanted)?;
    }
    expect("accepts executed", accepts(), executed)?;
    expect("content", memory::read(private(region))?, 0x71)
}

/// What guest and host share stays shared when the guest touches what lies beside it.
fn beside_shared() -> Verdict {
    let region = memory::fresh_region();
    let page = page_of(region, 5);
    expect("to shared", map_gpa(SHARED | page.get(), PAGE_SIZE)?.0, 0)?;
    memory::fill(memory::shared(page), PAGE_SIZE, 0x5A50)?;
    memory::write(private(page_of(region, 6)), 0x72)?;
    oracle::expect_validated(page_of(region, 6), true)?;
    oracle::expect_validated(page_of(region, 7), false)?;
    memory::expect_filled(memory::shared(page), PAGE_SIZE, 0x5A50)?;
    expect("to private", map_gpa(page.get(), PAGE_SIZE)?.0, 0)?;
    expect_accept(page, PageSize::Size4K, 0)?;
    memory::expect_zero(private(page), PAGE_SIZE)
}

/// What is the paravisor's is not accepted by being touched.
fn own_region() -> Verdict {
    let gpa = Gpa::new(REGION_GPA);
    expect("read", insn::load(private(gpa)), Err(Trap::VE))?;
    let [_, _, _, at, _] = take_info()?;
    expect("address", at & !(PAGE_SIZE - 1), REGION_GPA)
}
