//! Memory that was accepted before anybody asked: under the policies eager and ahead.
//!
//! The first case starts the second processor while that is at work for the paravisor (ahead), again
//! and again; the last one ends it.

use guest::ghcb::change_page_state;
use guest::harness::{Case, Finding, Verdict, case, expect, expect_not};
use guest::memory::{self, page_of};
use guest::oracle;
use guest::reader;
use protocols::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE, PageSize};
use protocols::ghcb::PageOperation;
use protocols::launch::AcceptPolicy;
use protocols::oracle::{Counter, PageFlags};
use protocols::svsm::ResultCode;
use protocols::svsm::turnstile::{TurnstileCall, TurnstileCounter};

use crate::running_vcpu;
use crate::setup::{self, done, expect_guests, expect_pvalidate, rescind, validate};
use crate::team::{Team, breathe};
use crate::turnstile::{ask_well, census, counter};

/// The table.
pub const CASES: &[Case] = &[
    case("policy_processor_starts", "issue 4 §3", processor_starts),
    case(
        "policy_memory_is_ahead",
        "design.md §4, §8",
        memory_is_ahead,
    ),
    case("policy_ahead_is_nobody_s", "design.md §4", ahead_is_nobodys),
    case("policy_claim_2m", "design.md §4, issue 4 §3", claim_large),
    case("policy_claim_4k", "design.md §4, issue 4 §3", claim_small),
    case(
        "policy_claim_behind_a_page_state_change",
        "issue 4 (the guest repeats it)",
        claim_after_change,
    ),
    case(
        "policy_given_back_stays_so",
        "issue 4 (shared pages), design.md I3",
        given_back,
    ),
    case("policy_processor_ends", "svsm.md §4.3", running_vcpu::ends),
];

const SMALL: PageSize = PageSize::Size4K;
const LARGE: PageSize = PageSize::Size2M;
/// Where claims look for memory: above everything that the guest and the firmware use low down.
const SEARCH_START: u64 = 32 << 20;
/// Below the paravisor.
const SEARCH_END: u64 = 512 << 20;
/// Memory that has to be ready before the second processor is wanted.
const HEAD_START: u64 = 64 << 20;
/// Turns of the wait for it; each takes the time of some calls.
const PATIENCE: u32 = 1 << 20;
/// How often the second processor is started, at most, until it was in a step.
const STARTS: u32 = 64;

/// The policy that the image was built with.
pub fn policy() -> Result<AcceptPolicy, Finding> {
    let said = ask_well(TurnstileCall::CONFIGURATION, 0, 0)?;
    Ok(AcceptPolicy(said.rcx as u32))
}

/// Unaccepted and ahead, in bytes, in all of memory.
fn everywhere() -> Result<[u64; 2], Finding> {
    let low = census(Gpa::new(0), 4 << 30)?;
    let high = census(Gpa::new(4 << 30), 60 << 30)?;
    Ok([low[0] + high[0], low[1] + high[1]])
}

/// A region that is ready and that nobody has claimed.
fn ahead_region() -> Result<Gpa, Finding> {
    for gpa in (SEARCH_START..SEARCH_END).step_by(LARGE_PAGE_SIZE as usize) {
        let gpa = Gpa::new(gpa);
        if census(gpa, LARGE_PAGE_SIZE)?[1] == LARGE_PAGE_SIZE {
            return Ok(gpa);
        }
    }
    Err(Finding::new(format_args!("no region is ready")))
}

/// The second processor has accepted memory, under eager before this program began. Under ahead it
/// is in the middle of its work when it is wanted: it starts after one step.
fn processor_starts() -> Verdict {
    let is_ahead = policy()? == AcceptPolicy::AHEAD;
    if is_ahead {
        for _ in 0..PATIENCE {
            if everywhere()?[1] >= HEAD_START {
                break;
            }
            breathe();
        }
        Team::with(taken_from_a_step)?;
        let [unaccepted, _] = everywhere()?;
        expect("there is work left", unaccepted > HEAD_START, true)?;
    }
    // The paravisor counts those of processors that have nothing to run, not the boot processor's.
    expect_not("steps", counter(TurnstileCounter::STEPS)?, 0)?;
    running_vcpu::starts()?;
    // Under eager nothing was left to do, so nobody waited.
    let waited = u64::from(is_ahead);
    let longest = counter(TurnstileCounter::LONGEST_WAIT)?;
    expect("longest wait in steps", longest, waited)?;
    // It serves the guest now and does nothing else.
    let executed = (counter(TurnstileCounter::STEPS)?, oracle::pvalidates());
    reader::wait_for_reads()?;
    reader::wait_for_reads()?;
    let now = (counter(TurnstileCounter::STEPS)?, oracle::pvalidates());
    expect("steps and PVALIDATEs", now, executed)
}

/// Starts the second processor, and sends it back to its work, until it was in a step when it was
/// wanted, for the paravisor and for the machine. Both count each time how long it was waited for.
///
/// Once need not do: the processor may be between two steps, or find its VMSA before the host is
/// told of it, and give itself back. With small pages a step takes longer than all that by far.
fn taken_from_a_step(team: &mut Team) -> Verdict {
    const SECOND: usize = 1;
    for _ in 0..STARTS {
        let waited = counter(TurnstileCounter::LONGEST_WAIT)?;
        let awaited = oracle::counter(Counter::AWAITED_STARTS);
        let steps = counter(TurnstileCounter::STEPS)?;
        team.send_home(SECOND);
        if waited > 0 && awaited > 0 {
            return Ok(());
        }
        for _ in 0..PATIENCE {
            if counter(TurnstileCounter::STEPS)? > steps {
                break;
            }
            breathe();
        }
        team.revive(SECOND, |_| Ok(()))?;
    }
    Err(Finding::new(format_args!(
        "{STARTS} starts, and none of them was awaited"
    )))
}

fn memory_is_ahead() -> Verdict {
    let [unaccepted, ahead] = everywhere()?;
    match policy()? {
        // Only what is less than a region, and where the firmware has its areas.
        AcceptPolicy::EAGER => {
            expect(
                "rest",
                (unaccepted, unaccepted <= 16 << 20),
                (unaccepted, true),
            )?;
            expect("ahead", (ahead, ahead >= 1 << 30), (ahead, true))?;
        }
        _ => expect("ahead", (ahead, ahead >= HEAD_START), (ahead, true))?,
    }
    let prepared = counter(TurnstileCounter::PREPARED_BYTES)?;
    let claimed = counter(TurnstileCounter::CLAIMED_BYTES)?;
    let left = prepared - claimed - setup::ready_given_back();
    expect("prepared and neither claimed nor given back", left, ahead)
}

/// Valid, but the guest may do nothing with it.
fn ahead_is_nobodys() -> Verdict {
    let region = ahead_region()?;
    for index in [0, 1, 511] {
        let page = oracle::page(page_of(region, index));
        let mask = PageFlags::ASSIGNED | PageFlags::VALIDATED | PageFlags::VMSA;
        let want = PageFlags::ASSIGNED | PageFlags::VALIDATED;
        expect("RMP flags", page.flags & mask, want)?;
        expect("permissions", page.permissions, [0xF, 0, 0, 0])?;
    }
    Ok(())
}

/// Claims that must execute no PVALIDATE, and RMPADJUST.
fn claim(request: impl FnOnce() -> Verdict, bytes: u64) -> Verdict {
    let executed = oracle::pvalidates();
    let adjusted = oracle::counter(Counter::RMPADJUST);
    let claimed = counter(TurnstileCounter::CLAIMED_BYTES)?;
    request()?;
    expect("PVALIDATEs executed", oracle::pvalidates(), executed)?;
    expect_not("RMPADJUSTs", oracle::counter(Counter::RMPADJUST), adjusted)?;
    let now = counter(TurnstileCounter::CLAIMED_BYTES)?;
    expect("bytes claimed", now - claimed, bytes)
}

fn claim_large() -> Verdict {
    let region = ahead_region()?;
    claim(|| done(&[validate(region, LARGE)]), LARGE_PAGE_SIZE)?;
    expect_guests(region)?;
    expect_guests(page_of(region, 511))?;
    memory::expect_zero(region.get(), LARGE_PAGE_SIZE)?;
    // To the guest it is as accepted as any other.
    expect_pvalidate(&[validate(region, LARGE)], ResultCode::FAIL_NO_CHANGE, 0)
}

fn claim_small() -> Verdict {
    let region = ahead_region()?;
    let (first, other) = (page_of(region, 7), page_of(region, 300));
    claim(
        || done(&[validate(first, SMALL), validate(other, SMALL)]),
        2 * PAGE_SIZE,
    )?;
    for page in [first, other] {
        expect_guests(page)?;
        memory::expect_zero(page.get(), PAGE_SIZE)?;
    }
    expect(
        "its neighbour",
        oracle::page(page_of(region, 8)).permissions[1],
        0,
    )
}

/// The paravisor has told the host already; the guest does not know and tells it again.
fn claim_after_change() -> Verdict {
    let region = ahead_region()?;
    change_page_state(region, PageOperation::PRIVATE)?;
    claim(|| done(&[validate(region, LARGE)]), LARGE_PAGE_SIZE)?;
    memory::expect_zero(region.get(), LARGE_PAGE_SIZE)
}

/// A page that was given back and shared is not made private by anybody but the guest.
fn given_back() -> Verdict {
    let region = ahead_region()?;
    let page = page_of(region, 9);
    done(&[validate(region, LARGE), rescind(page, SMALL)])?;
    change_page_state(page, PageOperation::SHARED)?;
    memory::fill(memory::shared(page), PAGE_SIZE, 0x5A4E)?;
    reader::wait_for_reads()?;
    memory::expect_filled(memory::shared(page), PAGE_SIZE, 0x5A4E)?;
    let [unaccepted, ahead, ..] = census(region, LARGE_PAGE_SIZE)?;
    expect("unaccepted and ahead", (unaccepted, ahead), (PAGE_SIZE, 0))
}
