//! `tdx_cases`: judges the emulated machine as L1 of a trust domain, without the paravisor.
//!
//! An IGVM image for TDX adds and measures every page of it; the processors start at the reset
//! vector. Every rule of `tdx.md` that a paravisor or a guest may lean on has a case here: the first
//! state, TDCALL and its operands, the states of the secure EPT, #VE, measurements, and what the host
//! answers.
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
mod accept;
#[cfg(target_os = "none")]
mod attributes;
#[cfg(target_os = "none")]
mod host;
#[cfg(target_os = "none")]
mod l2;
#[cfg(target_os = "none")]
mod launch;
#[cfg(target_os = "none")]
mod metadata;
#[cfg(target_os = "none")]
mod reset;
#[cfg(target_os = "none")]
mod ve;

#[cfg(target_os = "none")]
extern "C" fn main() -> ! {
    use guest::console::{self, Console, Exit};
    use guest::{harness, tdcall, trap};

    trap::install();
    console::attach(tdcall::port_out);
    let tally = harness::run(
        &[
            launch::CASES,
            accept::CASES,
            attributes::CASES,
            ve::CASES,
            metadata::CASES,
            host::CASES,
            l2::fields::CASES,
            l2::enter::CASES,
            l2::exits::CASES,
            l2::memory::CASES,
            l2::apic::CASES,
            l2::two::CASES,
        ],
        || Ok(()),
        &mut Console,
    );
    console::exit(if tally.failed == 0 {
        Exit::Passed
    } else {
        Exit::Failed
    })
}

/// Where the second processor ends up. It says who it is and waits for work.
#[cfg(target_os = "none")]
extern "C" fn second(index: u64) -> ! {
    launch::second(index);
    l2::two::serve()
}

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("tdx_cases runs on the emulated machine only: see `cargo xtask test`");
}
