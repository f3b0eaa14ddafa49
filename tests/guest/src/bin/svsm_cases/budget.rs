//! How much memory is accepted ahead of the guest, and which: budget, order and read-ahead of an image.
//!
//! [`WALK`] needs a second processor, which walks, and a budget that is more than there is above 4 GiB;
//! [`READ_AHEAD`] needs that there is none, so that only requests prepare anything. Which of them an image
//! is for shows in its order ([`cases`]).

use guest::harness::{Case, Finding, Verdict, case, expect, expect_not};
use guest::memory::{self, page_of};
use guest::oracle;
use guest::svsm::Registers;
use protocols::addr::{Gpa, LARGE_PAGE_SIZE, PageSize};
use protocols::launch::{AcceptOrder, AcceptPolicy, REGION_SIZE};
use protocols::map::BYTES_PER_REGION;
use protocols::oracle::PageFlags;
use protocols::svsm::turnstile::{TurnstileCall, TurnstileCounter};

use crate::setup::{done, expect_guests, validate};
use crate::team::breathe;
use crate::turnstile::{ask_well, census, counter};

const WALK: &[Case] = &[
    case("budget_walk", "issue 4 (budget, zones)", walk),
    case("budget_is_spent_once", "issue 4 (budget)", spent_once),
];

const READ_AHEAD: &[Case] = &[
    case("budget_is_a_share", "issue 4 (share of memory)", is_a_share),
    case(
        "budget_paravisor_memory",
        "design.md §10 (memory of the paravisor)",
        paravisor_memory,
    ),
    case("budget_read_ahead", "issue 4 (read-ahead)", reads_ahead),
    case(
        "budget_of_read_ahead",
        "issue 4 (read-ahead, budget)",
        spends_it,
    ),
];

const LARGE: PageSize = PageSize::Size2M;
const FOUR_GIB: u64 = 4 << 30;
/// As far as any machine's memory goes that this is run on.
const ABOVE: u64 = 60 << 30;
/// Turns of the wait for the end of the walk; each takes the time of some calls.
const PATIENCE: u32 = 1 << 20;
/// What the tests' images say; the scenarios `policy/budget` and `policy/read-ahead` build them.
const WALK_BUDGET: u64 = 512 << 20;
const SHARE_PER_CENT: u64 = 6;
const REGIONS_READ_AHEAD: u64 = 2;
/// What the paravisor may take, with one processor and without its map (design.md §10).
const OWN_MEMORY: u64 = (4 << 20) + (128 << 10);
/// What it certainly takes: the region but for shared pages, and a carve-out of one large page.
const OWN_MEMORY_LEAST: u64 = REGION_SIZE / 2 + LARGE_PAGE_SIZE;

/// The tables for this image, if it is one whose budget and read-ahead are looked at.
pub fn cases() -> Option<&'static [Case]> {
    let said = ask_well(TurnstileCall::CONFIGURATION, 0, 0).ok()?;
    match (said.r9, AcceptOrder(said.r8 as u32)) {
        (0, _) => None,
        (_, AcceptOrder::HIGH_FIRST) => Some(WALK),
        _ => Some(READ_AHEAD),
    }
}

fn low() -> Result<[u64; 4], Finding> {
    census(Gpa::new(0), FOUR_GIB)
}

fn high() -> Result<[u64; 4], Finding> {
    census(Gpa::new(FOUR_GIB), ABOVE)
}

fn prepared() -> Result<u64, Finding> {
    counter(TurnstileCounter::PREPARED_BYTES)
}

fn request(region: Gpa) -> Verdict {
    done(&[validate(region, LARGE)])?;
    expect_guests(region)
}

fn expect_configuration(order: AcceptOrder, budget: u64) -> Verdict {
    let said = ask_well(TurnstileCall::CONFIGURATION, 0, 0)?;
    let want = Registers {
        rcx: AcceptPolicy::AHEAD.0.into(),
        rdx: budget,
        r8: order.0.into(),
        r9: REGIONS_READ_AHEAD,
    };
    expect("configuration", said, want)
}

/// Memory above 4 GiB first, all of it; below only then; and no more than the budget at any time.
fn walk() -> Verdict {
    expect_configuration(AcceptOrder::HIGH_FIRST, WALK_BUDGET)?;
    for _ in 0..PATIENCE {
        // Low memory is looked at first: what is ready there was begun after the last of the high.
        let low = low()?[1];
        let high = high()?[0];
        if low > 0 {
            expect("left above 4 GiB when there is some ready below", high, 0)?;
        }
        let prepared = prepared()?;
        expect(
            "prepared within the budget",
            (prepared, prepared <= WALK_BUDGET),
            (prepared, true),
        )?;
        // Recorded, not only counted: the machine compares RMP and map behind each case.
        if low + self::high()?[1] == WALK_BUDGET {
            break;
        }
        breathe();
    }
    let ([_, low, ..], [unaccepted, high, ..]) = (low()?, high()?);
    expect_not("ready above 4 GiB", high, 0)?;
    expect("left above 4 GiB", unaccepted, 0)?;
    expect("ready below 4 GiB", low, WALK_BUDGET - high)?;
    expect("prepared", prepared()?, WALK_BUDGET)?;
    // From address 0 up.
    expect_not("ready at the lower end", low, 0)?;
    let upper = memory::POOL_START;
    expect(
        "ready far up in low memory",
        census(Gpa::new(upper), FOUR_GIB - upper)?[1],
        0,
    )
}

/// What the guest claims, or asks for besides, leaves nothing to be prepared.
fn spent_once() -> Verdict {
    let steps = counter(TurnstileCounter::STEPS)?;
    expect_not("steps", steps, 0)?;
    let validated = oracle::pvalidates();
    request(Gpa::new(FOUR_GIB))?;
    expect("PVALIDATEs of a claim", oracle::pvalidates(), validated)?;
    let region = memory::fresh_regions(1 + REGIONS_READ_AHEAD);
    request(region)?;
    let behind = Gpa::new(region.get() + LARGE_PAGE_SIZE);
    expect(
        "unaccepted behind it",
        census(behind, REGIONS_READ_AHEAD * LARGE_PAGE_SIZE)?[0],
        REGIONS_READ_AHEAD * LARGE_PAGE_SIZE,
    )?;
    for _ in 0..1000 {
        breathe();
    }
    expect("prepared", prepared()?, WALK_BUDGET)?;
    expect("steps", counter(TurnstileCounter::STEPS)?, steps)
}

fn share_of_memory() -> Result<u64, Finding> {
    let memory = low()?.iter().chain(&high()?).sum::<u64>();
    Ok(memory * SHARE_PER_CENT / 100 / LARGE_PAGE_SIZE * LARGE_PAGE_SIZE)
}

fn is_a_share() -> Verdict {
    expect_configuration(AcceptOrder::LOW_FIRST, share_of_memory()?)?;
    expect("prepared by nobody", prepared()?, 0)
}

/// What the guest may never have, VMSA and calling area included, is in the budget.
fn paravisor_memory() -> Verdict {
    let (low, high) = (low()?, high()?);
    let memory = low.iter().chain(&high).sum::<u64>();
    let map = memory / LARGE_PAGE_SIZE * BYTES_PER_REGION;
    let owned = low[3] + high[3];
    let least_and_most = (owned >= OWN_MEMORY_LEAST, owned - map <= OWN_MEMORY);
    expect("bytes", (owned, least_and_most), (owned, (true, true)))
}

/// The regions behind a request are ready when it is answered, and no others.
fn reads_ahead() -> Verdict {
    let first = memory::fresh_regions(2 + REGIONS_READ_AHEAD);
    let region = |number: u64| page_of(first, number * LARGE.pages());
    let states = |number: u64| census(region(number), LARGE_PAGE_SIZE);
    request(region(0))?;
    for number in 1..=REGIONS_READ_AHEAD {
        expect("read ahead", states(number)?, [0, LARGE_PAGE_SIZE, 0, 0])?;
        let page = oracle::page(region(number));
        let want = PageFlags::ASSIGNED | PageFlags::VALIDATED;
        expect("RMP flags", page.flags & want, want)?;
        expect("permissions", page.permissions, [0xF, 0, 0, 0])?;
    }
    let next = 1 + REGIONS_READ_AHEAD;
    expect("beyond", states(next)?, [LARGE_PAGE_SIZE, 0, 0, 0])?;
    let ready = REGIONS_READ_AHEAD * LARGE_PAGE_SIZE;
    expect("prepared", prepared()?, ready)?;
    // A claim: what is validated is the one region that comes into reach.
    request(region(1))?;
    memory::expect_zero(region(1).get(), LARGE_PAGE_SIZE)?;
    expect("then", states(next)?, [0, LARGE_PAGE_SIZE, 0, 0])?;
    expect("prepared", prepared()?, ready + LARGE_PAGE_SIZE)?;
    let claimed = counter(TurnstileCounter::CLAIMED_BYTES)?;
    expect("claimed", claimed, LARGE_PAGE_SIZE)
}

/// Requests prepare as long as there is budget, to the last region of it.
fn spends_it() -> Verdict {
    let budget = share_of_memory()?;
    let mut before = prepared()?;
    while before < budget {
        request(memory::fresh_regions(1 + REGIONS_READ_AHEAD))?;
        let most = (before + REGIONS_READ_AHEAD * LARGE_PAGE_SIZE).min(budget);
        let now = prepared()?;
        expect("prepared", now, most)?;
        before = now;
    }
    let region = memory::fresh_regions(1 + REGIONS_READ_AHEAD);
    request(region)?;
    let behind = Gpa::new(region.get() + LARGE_PAGE_SIZE);
    expect("ready behind", census(behind, LARGE_PAGE_SIZE)?[1], 0)?;
    expect("prepared", prepared()?, budget)
}
