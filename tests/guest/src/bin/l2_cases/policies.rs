//! Memory that was accepted before anybody asked: under the policies eager and ahead.
//!
//! Under ahead the second processor is at work for the paravisor whenever it sleeps, and map and secure
//! EPT differ by the step that it is in. So the first case wakes it, and it stays awake, but for a while in
//! the last.

use core::hint;

use guest::harness::{Case, Finding, Verdict, case, expect};
use guest::insn;
use guest::memory::{self, page_of, private};
use guest::oracle;
use guest::tdcall::{expect_accept, map_gpa, read_attributes};
use guest::trap::Trap;
use protocols::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE, PageSize};
use protocols::oracle::{Counter, HostAct, PageFlags, Table};
use protocols::tdx::{MAPPING_PENDING, Status};

use crate::second::{self, LOOKS, work};
use crate::ve::take_info;

pub const CASES: &[Case] = &[
    case(
        "policy_processor_wakes",
        "issue 4 §3, decision 033",
        processor_wakes,
    ),
    case("policy_memory_is_ahead", "design.md §4, §8", is_ahead),
    case("policy_ahead_is_pending", "design.md §4", is_pending),
    case("policy_claim_2m", "design.md §4, issue 4 §3", claim_large),
    case("policy_claim_4k", "design.md §4, issue 4 §3", claim_small),
    case(
        "policy_claim_behind_a_conversion",
        "issue 4 (the guest repeats it)",
        claim_after_conversion,
    ),
    case(
        "policy_shared_stays_so",
        "issue 4 (shared pages), design.md I3",
        shared_stays,
    ),
];

/// The end of a run with `hostile=re-add`.
pub const ENDS: &[Case] = &[case(
    "re_added_page_is_claimed",
    "design.md I5, I6",
    re_added,
)];

const SMALL: PageSize = PageSize::Size4K;
const LARGE: PageSize = PageSize::Size2M;
const SHARED: u64 = 1 << 47;
/// How often the second processor is woken from its work.
const WAKES: u32 = 8;

/// The memory that the cases use. Any machine has it.
const START: u64 = memory::POOL_START;
const END: u64 = START + (128 << 20);
/// What has to be ready before the second processor is wanted.
const HEAD_START: Gpa = Gpa::new(START + (64 << 20));
const LAST: Gpa = Gpa::new(END - LARGE_PAGE_SIZE);
/// What comes long after all that, in a machine with 2 GiB.
const FAR: Gpa = Gpa::new(0x6000_0000);

fn is_valid(page: Gpa) -> bool {
    oracle::page(page).flags.contains(PageFlags::VALIDATED)
}

/// Waits until a page is accepted by whoever is at work.
fn await_valid(page: Gpa) -> Verdict {
    for _ in 0..LOOKS {
        if is_valid(page) {
            return Ok(());
        }
        hint::spin_loop();
    }
    Err(Finding::new(format_args!("{page:?} is never accepted")))
}

/// Accepts that L1 has executed, of any size and result.
fn accepts() -> u64 {
    oracle::counter(Counter::ACCEPT_4K) + oracle::counter(Counter::ACCEPT_2M)
}

/// The second processor runs on, in the guest.
fn keep_awake() -> Verdict {
    second::ask(work::SPIN)?;
    for _ in 0..LOOKS {
        if second::result() == work::RUNNING {
            return Ok(());
        }
        hint::spin_loop();
    }
    Err(Finding::new(format_args!("the second processor is silent")))
}

fn let_sleep() -> Verdict {
    second::stop();
    second::await_answer()
}

/// Whenever the guest wants the second processor it gets it, whatever that is doing, again and again as long as
/// there is work; how much it does meanwhile is the machine's to count. Then it serves the guest and does
/// nothing else.
fn processor_wakes() -> Verdict {
    if oracle::table() == Table::AHEAD {
        await_valid(HEAD_START)?;
    }
    for _ in 0..WAKES {
        keep_awake()?;
        let executed = accepts();
        for _ in 0..1000 {
            hint::spin_loop();
        }
        expect("accepts executed", accepts(), executed)?;
        // Whether there is work left is the scheduler's choice: a guest that is held up comes late.
        if is_valid(FAR) {
            return Ok(());
        }
        let_sleep()?;
    }
    keep_awake()
}

/// All that is ready is valid, and no VM of the guest's has any right to it.
fn is_ahead() -> Verdict {
    let first = memory::fresh_region();
    let end = match oracle::table() {
        Table::EAGER => END,
        _ => HEAD_START.get(),
    };
    for region in (first.get()..end).step_by(LARGE_PAGE_SIZE as usize) {
        for index in [0, 1, 511] {
            let page = oracle::page(page_of(Gpa::new(region), index));
            let want = PageFlags::ASSIGNED | PageFlags::VALIDATED;
            expect("flags", page.flags & want, want)?;
            let [_, guest, others @ ..] = page.permissions;
            expect("permissions", (guest, others), (0, [0, 0]))?;
        }
    }
    Ok(())
}

/// To the guest it is as memory is that nobody has accepted.
fn is_pending() -> Verdict {
    let page = memory::fresh_page();
    expect("read", insn::load(private(page)), Err(Trap::VE))?;
    let [_, _, _, at, _] = take_info()?;
    expect("address", at & !(PAGE_SIZE - 1), page.get())?;
    let (rax, rcx, rdx) = read_attributes(page.get())?;
    let pending = page.get() | MAPPING_PENDING;
    expect("attributes", (rax, rcx, rdx), (0, pending, 0))?;
    oracle::expect_validated(page, true)
}

/// An accept that must execute none, and gives zeroes.
fn claim(block: Gpa, size: PageSize) -> Verdict {
    let executed = accepts();
    expect_accept(block, size, 0)?;
    expect("accepts executed", accepts(), executed)?;
    memory::expect_zero(private(block), size.bytes())
}

fn claim_large() -> Verdict {
    let region = memory::fresh_region();
    claim(region, LARGE)?;
    memory::write(private(region), 3)?;
    // To the guest it is as accepted as any other.
    let again = guest::tdcall::accept(region, SMALL)? >> 32;
    expect("again", again, Status::PAGE_ALREADY_ACCEPTED.with(0) >> 32)?;
    expect("content", memory::read(private(region))?, 3)
}

fn claim_small() -> Verdict {
    let region = memory::fresh_region();
    claim(page_of(region, 7), SMALL)?;
    claim(page_of(region, 300), SMALL)?;
    let [_, neighbour, ..] = oracle::page(page_of(region, 8)).permissions;
    expect("its neighbour's permissions", neighbour, 0)
}

/// The pages are private; the guest does not know and has them made so.
fn claim_after_conversion() -> Verdict {
    let region = memory::fresh_region();
    expect("to private", map_gpa(region.get(), LARGE_PAGE_SIZE)?.0, 0)?;
    claim(region, LARGE)
}

/// A page that was shared before it was accepted is not made private by anybody but the guest, though
/// it was ready.
fn shared_stays() -> Verdict {
    let page = memory::fresh_page();
    oracle::expect_validated(page, true)?;
    expect("to shared", map_gpa(SHARED | page.get(), PAGE_SIZE)?.0, 0)?;
    memory::fill(memory::shared(page), PAGE_SIZE, 0x5A4E)?;
    // One that nobody has come to yet, under ahead.
    let later = Gpa::new(LAST.get() - LARGE_PAGE_SIZE);
    expect("to shared", map_gpa(SHARED | later.get(), PAGE_SIZE)?.0, 0)?;
    memory::fill(memory::shared(later), PAGE_SIZE, 0x5A4F)?;

    let_sleep()?;
    await_valid(page_of(LAST, 511))?;
    keep_awake()?;
    memory::expect_filled(memory::shared(page), PAGE_SIZE, 0x5A4E)?;
    memory::expect_filled(memory::shared(later), PAGE_SIZE, 0x5A4F)?;
    for page in [page, later] {
        oracle::expect_validated(page, false)?;
        expect("to private", map_gpa(page.get(), PAGE_SIZE)?.0, 0)?;
        expect_accept(page, SMALL, 0)?;
        memory::expect_zero(private(page), PAGE_SIZE)?;
    }
    Ok(())
}

/// The host exchanges a page that is ready: the guest does not get it, and the machine ends.
fn re_added() -> Verdict {
    let page = memory::fresh_page();
    oracle::host_act(page, HostAct::RE_ADD)?;
    let status = guest::tdcall::accept(page, SMALL)?;
    Err(Finding::new(format_args!(
        "it was answered with {status:#x}"
    )))
}
