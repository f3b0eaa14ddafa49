//! What the guest's CPU does by itself on hardware and the machine has to do for it here: walk
//! page tables, know the length of an instruction, deliver #VC.
//!
//! TCG reports neither instruction bytes nor lengths nor linear addresses, and cannot inject
//! #VC with its error code (facts: tcg-svm.md §2, §3). Everything here is computed from
//! registers and guest memory, so it is tested on the host.

pub mod decode;
pub mod deliver;
pub mod operand;
pub mod walk;

use crate::types::Gpa;

/// Guest-physical memory as the guest's CPU would reach it.
pub trait GuestMemory {
    /// Reads bytes of one page; false if there is no memory.
    fn read(&self, gpa: Gpa, out: &mut [u8]) -> bool;
    /// Writes bytes of one page; false if there is no memory or it is not the guest's to write.
    fn write(&mut self, gpa: Gpa, data: &[u8]) -> bool;
}
