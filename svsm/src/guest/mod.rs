//! The guest: what it is given before it starts, and the state it runs from.
//!
//! | module | what it owns |
//! |---|---|
//! | `prepare` | the firmware's pages and areas, in the order they are filled |
//! | [`secrets`] | the guest's copy of the secrets page |
//! | [`parameters`] | the memory map the firmware is shown |
//! | `vmsa` | reading and changing the state of a stopped processor |

use protocols::addr::Vmpl;

pub mod parameters;
pub mod secrets;

#[cfg(target_os = "none")]
pub mod prepare;
#[cfg(target_os = "none")]
pub mod vmsa;

/// The guest's privilege level (design §7: a build-time constant).
pub const GUEST_VMPL: Vmpl = Vmpl::VMPL1;

const _: () = assert!(Vmpl::VMPL0.is_more_privileged_than(GUEST_VMPL));
