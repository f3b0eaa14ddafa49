//! Memory of the paravisor and its view of the guest's.
//!
//! | module | what it owns |
//! |---|---|
//! | [`layout`] | page ranges and the virtual address space |
//! | [`plan`] | which memory gets a state, where the acceptance map lies |
//! | `page_tables` | the live page tables |
//! | `pool` | memory that the paravisor gives to itself, once |
//! | `access` | the few instructions that touch memory others control |
//! | `guest_map` | the window onto guest memory |

pub mod layout;
pub mod plan;

#[cfg(target_os = "none")]
pub mod access;
#[cfg(target_os = "none")]
pub mod guest_map;
#[cfg(target_os = "none")]
pub mod page_tables;
#[cfg(target_os = "none")]
pub mod pool;
