//! Native: a processor without confidential hardware, and acceptance simulated (decision 019).
//!
//! What the processor would keep is kept in a [`table`] instead; fills are real. Everything above
//! [`Platform`](super::Platform) is what runs on SEV-SNP.

pub mod table;

#[cfg(target_os = "none")]
pub use bare::Native;

/// The half that touches memory.
#[cfg(target_os = "none")]
mod bare {
    use protocols::addr::{Gpa, Vmpl};
    use x86_64::instructions::tlb;

    use super::table::Table;
    use crate::memory::access;
    use crate::memory::guest_map;
    use crate::platform::{AccessFault, AdjustError, MappedBlock, Platform, Rights, ValidateError};

    /// Status of a block that is not guest memory (the processor's FAIL_INPUT).
    const FAIL_INPUT: u32 = 1;

    /// The simulated processor.
    #[derive(Clone, Copy)]
    pub struct Native {
        /// What it keeps about pages.
        pub table: &'static Table<'static>,
    }

    /// Where a block of the guest window is.
    fn gpa_of(block: MappedBlock) -> Option<Gpa> {
        guest_map::gpa(block.address(), block.size().bytes())
    }

    impl Platform for Native {
        fn validate(&self, block: MappedBlock) -> Result<(), ValidateError> {
            let gpa = gpa_of(block).ok_or(ValidateError::Status(FAIL_INPUT))?;
            self.table.validate(gpa, block.size())
        }

        fn rescind(&self, block: MappedBlock) -> Result<(), ValidateError> {
            let gpa = gpa_of(block).ok_or(ValidateError::Status(FAIL_INPUT))?;
            self.table.rescind(gpa, block.size())
        }

        fn adjust(
            &self,
            block: MappedBlock,
            vmpl: Vmpl,
            rights: Rights,
        ) -> Result<(), AdjustError> {
            let gpa = gpa_of(block).ok_or(AdjustError::Status(FAIL_INPUT))?;
            self.table.adjust(gpa, block.size(), vmpl, rights)
        }

        fn scrub(&self, block: MappedBlock) -> Result<(), AccessFault> {
            let gpa = gpa_of(block).ok_or(guest_map::OUTSIDE)?;
            self.table.may_scrub(gpa, block.size())?;
            access::zero_page(block.address(), block.size())
        }

        fn flush_local(&self) {
            // No translation is global.
            tlb::flush_all();
        }
    }
}
