//! `svsm_evidence`: gives a verifier outside what a Linux guest would give it, without a firmware or a kernel.
//!
//! Packed as a firmware image like `svsm_cases`. Asks the paravisor for a report on its services, then the
//! security processor for one on the guest itself, both about the nonce 0, 1, 2 … 63, and writes them whole
//! to the second serial port, in the lines of a Linux guest's (`e2e::attestation`):
//!
//! ```text
//! services outblob BASE64
//! services auxblob BASE64
//! services manifestblob BASE64
//! own outblob BASE64
//! own auxblob BASE64
//! ```
//!
//! What the reports say is not looked at here: that is the verifier's affair. Any `backing`, `vc` and policy
//! of acceptance will do.

#![cfg_attr(target_os = "none", no_std, no_main)]
#![cfg_attr(
    target_os = "none",
    expect(
        clippy::result_large_err,
        reason = "there is no heap for findings, and one ends the run: its size costs nothing"
    )
)]

#[cfg(target_os = "none")]
mod evidence;
// The way from the reset vector to `main` is the same for every firmware.
#[cfg(target_os = "none")]
#[path = "../svsm_cases/reset.rs"]
mod reset;

#[cfg(target_os = "none")]
extern "C" fn main() -> ! {
    use guest::console::{self, Console};
    use guest::{svsm, trap};
    use protocols::addr::Gpa;

    trap::install();
    svsm::use_calling_area(Gpa::new(reset::CALLING_AREA));
    console::exit_with(evidence::all(&mut Console))
}

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("svsm_evidence runs on the emulated machine only: see `cargo xtask test`");
}
