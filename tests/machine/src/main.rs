//! The machine: the bare-metal half of the emulated SEV-SNP platform.
//!
//! Loaded by QEMU as `-bios`, it copies itself to the top of low memory, loads an IGVM image
//! through fw_cfg and runs the guest's VMSAs with AMD-V. What the platform *means* (RMP,
//! launch, instructions, GHCB) is the library's; this binary owns the CPU: boot, world
//! switches, nested paging, exits and event delivery.

#![cfg_attr(target_os = "none", no_std)]
#![cfg_attr(target_os = "none", no_main)]

#[cfg(target_os = "none")]
extern crate alloc;

#[cfg(target_os = "none")]
mod metal;

/// The machine exists only on bare metal; a host build of the workspace gets this instead.
#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("machine: build this with --target x86_64-unknown-none (cargo xtask build)");
}
