//! `l2_cases`: judges the paravisor as the guest of a trust domain sees it.
//!
//! The guest runs in an L2 VM and is an ordinary trust domain to itself: it starts at the reset vector,
//! its TDCALLs and exceptions are those of `tdx.md`. Who answers them is the paravisor.
//!
//! The machine must be run with `oracle=on` and two processors; either `backing` will do. Where memory is
//! accepted before the guest asks for it, by a policy or on touch, another table is gone through: many a
//! case of the usual one looks at memory that is not accepted. Which, the oracle says (`table`).

#![cfg_attr(target_os = "none", no_std, no_main)]
#![cfg_attr(
    target_os = "none",
    expect(
        clippy::result_large_err,
        reason = "there is no heap for findings, and one ends its case: its size costs nothing"
    )
)]

// The cases of an ordinary trust domain, as L1 runs them on the machine alone.
#[cfg(target_os = "none")]
#[path = "../tdx_cases/accept.rs"]
mod accept;
#[cfg(target_os = "none")]
#[path = "../tdx_cases/host.rs"]
mod host;
#[cfg(target_os = "none")]
mod hostile;
#[cfg(target_os = "none")]
mod interrupts;
#[cfg(target_os = "none")]
mod launch;
#[cfg(target_os = "none")]
#[path = "../tdx_cases/metadata.rs"]
mod metadata;
#[cfg(target_os = "none")]
mod pair;
#[cfg(target_os = "none")]
mod paravisor;
#[cfg(target_os = "none")]
mod policies;
#[cfg(target_os = "none")]
mod reset;
#[cfg(target_os = "none")]
mod second;
#[cfg(target_os = "none")]
mod start;
#[cfg(target_os = "none")]
mod touch;
#[cfg(target_os = "none")]
mod translated;
#[cfg(target_os = "none")]
#[path = "../tdx_cases/ve.rs"]
mod ve;

/// Room for cases.
#[cfg(target_os = "none")]
const MOST_CASES: usize = 160;

/// Cases that are L1's: they need L2 VMs of their own, or a host that does what makes the paravisor
/// end the machine (the scenarios `tdx_l2/hostile` are about that).
#[cfg(target_os = "none")]
const LEFT_OUT: &[&str] = &[
    // The host takes accepted pages: see `hostile` for how such runs end.
    "removed_page_is_pending_again",
    "second_accept_zeroes_silently",
    "removed_page_splits_its_block",
    "the_machine_counts_double_accepts",
    // The paravisor asks again and again: see `hostile`.
    "accept_of_a_busy_entry",
    "the_walk_comes_before_the_lock",
    // No NMI reaches the guest (docs/known-limits.md).
    "nmi_waits_for_ve_info",
    // Something else to the guest: see `translated`.
    "accept_2m",
    "vm_rd",
    "vm_wr_by_mask",
    "vm_wr_not_writable",
    "vp_l2_ctls",
    "sys_rd",
    // Only private memory: L1 maps nothing of the guest's that is shared.
    "report_to_shared_memory",
];

#[cfg(target_os = "none")]
extern "C" fn main() -> ! {
    use guest::console::{self, Console};
    use guest::{harness, oracle, tdcall, trap};
    use protocols::oracle::{HostAct, Table};

    trap::install();
    console::attach(tdcall::port_out);
    let mut tables: [&[harness::Case]; MOST_CASES] = [&[]; MOST_CASES];
    let is_ended = oracle::host_would(HostAct::RE_ADD);
    let usual = [
        start::CASES,
        pair::CASES,
        hostile::CASES,
        translated::CASES,
        paravisor::CASES,
        accept::CASES,
        ve::CASES,
        metadata::CASES,
        host::CASES,
        interrupts::CASES,
    ];
    // A host that exchanges pages is met by the cases that it ends, and by few others.
    let ahead_ends = if is_ended { policies::ENDS } else { &[] };
    let ahead = [policies::CASES, ahead_ends];
    let re_added = [hostile::RE_ADD, hostile::end()];
    let is_left_out = |case: &&harness::Case| LEFT_OUT.contains(&case.name);
    let left_out = usual.into_iter().flatten().filter(is_left_out).count();
    assert_eq!(left_out, LEFT_OUT.len(), "a name that no case has");
    let all: &[&[harness::Case]] = match oracle::table() {
        Table::EAGER | Table::AHEAD => &ahead,
        Table::TOUCH => &[touch::CASES],
        _ if is_ended => &re_added,
        _ => &usual,
    };
    let chosen = all
        .iter()
        .copied()
        .flatten()
        .filter(|case| !is_left_out(case));
    assert!(chosen.clone().count() <= MOST_CASES, "more cases than room");
    for (slot, case) in tables.iter_mut().zip(chosen) {
        *slot = core::slice::from_ref(case);
    }
    finish(harness::run(
        &tables,
        paravisor::map_and_sept_agree,
        &mut Console,
    ))
}

#[cfg(target_os = "none")]
fn finish(tally: guest::harness::Tally) -> ! {
    use guest::console::{self, Exit};

    console::exit(if tally.failed == 0 {
        Exit::Passed
    } else {
        Exit::Failed
    })
}

/// Where the second processor ends up. It says who it is and waits for work.
#[cfg(target_os = "none")]
extern "C" fn second_start(index: u64) -> ! {
    start::second(index);
    second::serve()
}

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("l2_cases runs on the emulated machine only: see `cargo xtask test`");
}
