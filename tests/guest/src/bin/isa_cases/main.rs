//! `isa_cases`: judges the emulated machine from VMPL0, without the paravisor.
//!
//! An IGVM image starts it where the paravisor would start: long mode on measured page
//! tables, RDI = launch parameters, no stack. Every rule of the fact sheets that the
//! paravisor or a guest may lean on has a case here: instructions, the RMP's checks on
//! accesses, launch state, GHCB protocol, and running a second VMPL.
//!
//! The machine must be run with `oracle=on`; either `backing` will do.

#![cfg_attr(target_os = "none", no_std, no_main)]
#![cfg_attr(
    target_os = "none",
    expect(
        clippy::result_large_err,
        reason = "there is no heap for findings, and one ends its case: its size costs nothing"
    )
)]

#[cfg(target_os = "none")]
mod access;
#[cfg(target_os = "none")]
mod ap_creation;
#[cfg(target_os = "none")]
mod guest_request;
#[cfg(target_os = "none")]
mod launch;
#[cfg(target_os = "none")]
mod modes;
#[cfg(target_os = "none")]
mod msr_protocol;
#[cfg(target_os = "none")]
mod nae;
#[cfg(target_os = "none")]
mod psc;
#[cfg(target_os = "none")]
mod pvalidate;
#[cfg(target_os = "none")]
mod rmpadjust;
#[cfg(target_os = "none")]
mod second_cpu;
#[cfg(target_os = "none")]
mod setup;
#[cfg(target_os = "none")]
mod start;
#[cfg(target_os = "none")]
mod vc_events;
#[cfg(target_os = "none")]
mod vc_memory;
#[cfg(target_os = "none")]
mod vc_modes;
#[cfg(target_os = "none")]
mod vmpl1;

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("isa_cases runs on the emulated machine only: see `cargo xtask test`");
}
