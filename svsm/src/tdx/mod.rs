//! The paravisor as L1 of an Intel TDX trust domain; its guest is an L2 VM (decision 023).
//!
//! ```text
//! reset vector, all processors -> long mode -> processor 0:
//!   launch parameters -> what the module says -> own memory -> the map
//!   -> the firmware's pages and areas -> the others go on -> the guest runs on each of them
//! ```
//!
//! Engine, map, page tables and the checks on the host's words are those of SEV-SNP. What differs is
//! how pages are accepted and given to the guest ([`crate::platform::tdx`]), how the host is asked
//! ([`crate::hypervisor::tdx`]), and what the guest asks for: it is an ordinary trust domain, and its
//! TDCALLs come here.
//!
//! | module | owns |
//! |---|---|
//! | `entry` | the first instructions, and the wait of the other processors |
//! | `run` | the loop of entries and exits on one processor |
//! | `apic` | L1's interrupt controller: switched on, and how another processor is called out |
//! | [`vectors`] | the interrupts that a processor has taken |
//! | [`runners`] | who is in the guest, who owes a flush, and who is called out for one |
//! | [`hob`] | the list of hand-off blocks the firmware finds |
//! | [`l2`] | the guest in its L2 VM |

#[cfg(target_os = "none")]
mod apic;
#[cfg(target_os = "none")]
mod bare;
#[cfg(target_os = "none")]
mod entry;
pub mod hob;
pub mod l2;
#[cfg(target_os = "none")]
mod run;
pub mod runners;
pub mod vectors;
