//! `l2_cases`: judges the paravisor as the guest of a trust domain sees it.
//!
//! The guest runs in an L2 VM and is an ordinary trust domain to itself: it starts at the reset vector,
//! its TDCALLs and exceptions are those of `tdx.md`. Who answers them is the paravisor.
//!
//! The machine must be run with `oracle=on` and two processors; either `backing` will do.

#![cfg_attr(target_os = "none", no_std, no_main)]
#![cfg_attr(
    target_os = "none",
    expect(
        clippy::result_large_err,
        reason = "there is no heap for findings, and one ends its case: its size costs nothing"
    )
)]

#[cfg(target_os = "none")]
mod reset;
#[cfg(target_os = "none")]
mod start;

#[cfg(target_os = "none")]
extern "C" fn main() -> ! {
    use guest::console::{self, Console, Exit};
    use guest::{harness, tdcall, trap};

    trap::install();
    console::attach(tdcall::port_out);
    let tally = harness::run(&[start::CASES], || Ok(()), &mut Console);
    console::exit(if tally.failed == 0 {
        Exit::Passed
    } else {
        Exit::Failed
    })
}

/// Where the second processor ends up. It says who it is and sleeps.
#[cfg(target_os = "none")]
extern "C" fn second(index: u64) -> ! {
    start::second(index);
    guest::tdcall::sleep()
}

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("l2_cases runs on the emulated machine only: see `cargo xtask test`");
}
