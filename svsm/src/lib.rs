//! The paravisor: the code at VMPL0 that owns the record of which page of a confidential VM is
//! accepted, does the accepting, and refuses what would accept a page twice.
//!
//! It boots from an IGVM image, prepares firmware at a lower privilege level, and from then on
//! serves that guest's SVSM calls. Start reading at `boot` (the start-up, narrated) and
//! `requests` (the loop after it).
//!
//! | room | what it owns |
//! |---|---|
//! | `entry` | the first instructions and the boot stack |
//! | `boot`, `secondary` | the order of the start-up; the other processors |
//! | [`ahead`] | acceptance before the guest asks |
//! | [`attestation`] | the line to the security processor, and its key |
//! | [`launch`], [`host_map`], [`apic_ids`], [`cpuid`] | checks on what image and host hand over |
//! | [`memory`] | address space, page tables, the guest window |
//! | `exceptions`, `percpu` | descriptor tables, #VC, faults that are allowed |
//! | [`platform`] | what the processor gives: PVALIDATE, RMPADJUST, or a simulation of them |
//! | [`hypervisor`] | what the host gives: GHCB, or devices |
//! | [`native`] | the start-up where nothing is confidential |
//! | [`tdx`] | L1 of a trust domain: its start-up, and the guest in an L2 VM |
//! | `console`, `panic`, `terminate` | the log, where a bug was met, and the end |
//! | [`guest`] | what the guest finds and the state it runs from |
//! | `vcpus`, `system`, `backend` | the registry, the shared parts, the engine's hands |
//! | `protocol` | the SVSM calls |
//! | [`unaccepted`] | the map as EFI's table of unaccepted memory |
//! | `descriptor` | the page states as shown to the referee |
//!
//! Rules of the crate: what can be decided without hardware is decided in modules that are also
//! built and tested on the host; nothing from guest or host is indexed with, unwrapped or
//! believed; a lie of the host ends the machine with a reason
//! ([`protocols::terminate::TurnstileReason`]), a mistake of the guest is answered with a code.

#![cfg_attr(not(test), no_std)]

pub mod ahead;
pub mod apic_ids;
pub mod attestation;
pub mod cpuid;
#[cfg(feature = "faults")]
pub mod faulty;
pub mod guest;
pub mod host_map;
pub mod hypervisor;
pub mod launch;
pub mod memory;
pub mod native;
#[cfg(any(target_os = "none", test))]
pub mod panic;
pub mod platform;
pub mod protocol;
pub mod tdx;
#[cfg(test)]
mod testing;
pub mod unaccepted;
pub mod vcpus;

#[cfg(target_os = "none")]
pub mod backend;
#[cfg(target_os = "none")]
pub mod boot;
#[cfg(target_os = "none")]
pub mod console;
#[cfg(target_os = "none")]
pub mod descriptor;
#[cfg(target_os = "none")]
pub mod entry;
#[cfg(target_os = "none")]
pub mod exceptions;
#[cfg(target_os = "none")]
pub mod percpu;
#[cfg(target_os = "none")]
pub mod requests;
#[cfg(target_os = "none")]
pub mod secondary;
#[cfg(target_os = "none")]
pub mod system;
#[cfg(target_os = "none")]
pub mod terminate;
