//! `l2_counts`: what the guest of a trust domain pays for its TDCALLs, in instructions of the
//! paravisor's and TDCALLs that it makes in turn.
//!
//! The counterpart of `svsm_counts`; one line per piece of work goes to the second serial port:
//!
//! ```text
//! count NAME entries=N pages=N calls=N instructions=N switches=N accepts=N attributes=N tdcalls=N
//! check NAME got=N want=N
//! ```
//!
//! All figures are L1's; `switches` are entries of the L2 VM and exits from it, `accepts` and
//! `attributes` its TDG.MEM.PAGE.ACCEPT and TDG.MEM.PAGE.ATTR.WR, `tdcalls` all of its TDCALLs. There
//! are no lists here: of `entries` pages each is a call of its own. The machine must be run with
//! `oracle=on` and one processor; instructions are 0 without `icount=on`.

#![cfg_attr(target_os = "none", no_std, no_main)]
#![cfg_attr(
    target_os = "none",
    expect(
        clippy::result_large_err,
        reason = "there is no heap for findings, and one ends the run: its size costs nothing"
    )
)]

#[cfg(target_os = "none")]
mod counts;
// The way from the reset vector to `main` is the same for every guest of a trust domain.
#[cfg(target_os = "none")]
#[path = "../l2_cases/reset.rs"]
mod reset;

#[cfg(target_os = "none")]
extern "C" fn main() -> ! {
    use guest::console::{self, Console};
    use guest::{tdcall, trap};

    trap::install();
    console::attach(tdcall::port_out);
    // What the first processor found is for the cases.
    let _ = reset::first();
    console::exit_with(counts::all(&mut Console))
}

/// A second processor has nothing to do.
#[cfg(target_os = "none")]
extern "C" fn second_start(_: u64) -> ! {
    guest::tdcall::sleep()
}

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("l2_counts runs on the emulated machine only: see `cargo xtask bench`");
}
