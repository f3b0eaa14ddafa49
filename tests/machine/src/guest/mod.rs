//! What the guest's CPU does by itself on hardware and the machine has to do for it here: walk
//! page tables, know the length of an instruction, deliver #VC.
//!
//! TCG reports neither instruction bytes nor lengths nor linear addresses, and cannot inject
//! #VC with its error code (facts: tcg-svm.md §2, §3). Everything here is computed from
//! registers and guest memory, so it is tested on the host.

pub mod decode;
pub mod deliver;
pub mod event;
pub mod locate;
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

#[cfg(test)]
pub(crate) mod testing {
    //! Guest memory for the unit tests.
    use std::collections::BTreeMap;

    use super::GuestMemory;
    use crate::types::{Gpa, PAGE_SIZE};

    /// Pages that exist; the rest is no memory.
    #[derive(Default)]
    pub(crate) struct Pages(BTreeMap<u64, [u8; PAGE_SIZE as usize]>);

    impl Pages {
        /// Writes a 64-bit word, making its page.
        pub(crate) fn put(&mut self, at: u64, value: u64) {
            let page = self
                .0
                .entry(at / PAGE_SIZE)
                .or_insert([0; PAGE_SIZE as usize]);
            let offset = (at % PAGE_SIZE) as usize;
            page[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
        }

        /// Reads a 64-bit word.
        pub(crate) fn get(&self, at: u64) -> u64 {
            let mut bytes = [0; 8];
            assert!(self.read(Gpa::new(at), &mut bytes));
            u64::from_le_bytes(bytes)
        }
    }

    impl GuestMemory for Pages {
        fn read(&self, gpa: Gpa, out: &mut [u8]) -> bool {
            let Some(page) = self.0.get(&(gpa.get() / PAGE_SIZE)) else {
                return false;
            };
            let offset = gpa.offset_in_page() as usize;
            out.copy_from_slice(&page[offset..offset + out.len()]);
            true
        }

        fn write(&mut self, gpa: Gpa, data: &[u8]) -> bool {
            let Some(page) = self.0.get_mut(&(gpa.get() / PAGE_SIZE)) else {
                return false;
            };
            let offset = gpa.offset_in_page() as usize;
            page[offset..offset + data.len()].copy_from_slice(data);
            true
        }
    }
}
