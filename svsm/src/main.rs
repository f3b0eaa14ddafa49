//! The paravisor's ELF. Everything is in the library; this links it for the bare machine.

#![cfg_attr(target_os = "none", no_std)]
#![cfg_attr(target_os = "none", no_main)]

// The entry point `_start` and the panic handler come from here.
#[cfg(target_os = "none")]
extern crate svsm as _;

/// On a host there is nothing to run.
#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("the paravisor runs on bare metal: build it for x86_64-unknown-none");
    std::process::exit(2);
}
