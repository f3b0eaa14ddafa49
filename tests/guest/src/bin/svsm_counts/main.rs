//! `svsm_counts`: what the paravisor's calls cost, in instructions and world switches.
//!
//! Packed as a firmware image like `svsm_cases`. Makes a few good calls and reads the machine's
//! counters before and after each; one line per call goes to the second serial port:
//!
//! ```text
//! count NAME entries=N pages=N calls=N instructions=N switches=N pvalidates=N rmpadjusts=N
//! check NAME got=N want=N
//! ```
//!
//! Instructions, PVALIDATEs and RMPADJUSTs are VMPL0's; `pages` are the 4 KiB pages that changed.
//! The lines `check` say whether the machine counts right, by code of known length. The machine
//! must be run with `oracle=on` and `vc=direct`; instructions are 0 without `icount=on`. With
//! `backing=2m` a request is one PVALIDATE, with `backing=4k` the paravisor has to split it.

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
// The way from the reset vector to `main` is the same for every firmware.
#[cfg(target_os = "none")]
#[path = "../svsm_cases/reset.rs"]
mod reset;

#[cfg(target_os = "none")]
extern "C" fn main() -> ! {
    use guest::console::{self, Console};
    use guest::{insn, svsm, trap};
    use protocols::addr::Gpa;
    use protocols::ghcb::event::IoWidth;

    trap::install();
    console::attach(|port, width, value| {
        // There is no other way to complain.
        let _ = match width {
            IoWidth::Byte => insn::out8(port, value as u8),
            _ => insn::out32(port, value),
        };
    });
    svsm::use_calling_area(Gpa::new(reset::CALLING_AREA));
    // The secrets page is where a firmware would look first; nothing here needs it.
    let _ = reset::SECRETS;
    console::exit_with(counts::all(&mut Console))
}

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("svsm_counts runs on the emulated machine only: see `cargo xtask bench`");
}
