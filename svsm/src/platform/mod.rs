//! What the processor gives: page validation, permissions, and the means to fill memory.
//!
//! [`Platform`] is the border: above it nobody knows an instruction. It works on blocks that
//! the caller has mapped ([`MappedBlock`]); who may pass which block is the caller's rule (the
//! engine's backend for the guest's memory, boot code for the paravisor's own).

use protocols::addr::{PageSize, Vmpl};

pub mod native;
#[cfg(target_os = "none")]
pub mod snp;
pub mod tdx;

/// A page of either size that is mapped privately (C=1) at a virtual address.
///
/// Proves alignment, not that anything is mapped: an access may still fault, and every
/// operation of [`Platform`] reports that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedBlock {
    address: u64,
    size: PageSize,
}

impl MappedBlock {
    /// The block at a virtual address; none if the address is not a multiple of the size.
    #[must_use]
    pub const fn try_new(address: u64, size: PageSize) -> Option<Self> {
        if address.is_multiple_of(size.bytes()) {
            Some(Self { address, size })
        } else {
            None
        }
    }

    /// Virtual address of the first byte.
    #[must_use]
    pub const fn address(self) -> u64 {
        self.address
    }

    /// Its size.
    #[must_use]
    pub const fn size(self) -> PageSize {
        self.size
    }
}

/// Consecutive 4 KiB pages within one 2 MiB block, mapped like a [`MappedBlock`]. At least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedRun {
    address: u64,
    pages: u64,
}

impl MappedRun {
    /// The run at a virtual address; none if that is not aligned, or the pages are none or not all
    /// in one 2 MiB block.
    #[must_use]
    pub const fn try_new(address: u64, pages: u64) -> Option<Self> {
        let (page, block) = (PageSize::Size4K.bytes(), PageSize::Size2M.bytes());
        let room = (block - address % block) / page;
        if address.is_multiple_of(page) && pages != 0 && pages <= room {
            Some(Self { address, pages })
        } else {
            None
        }
    }

    /// Virtual address of the first byte.
    #[must_use]
    pub const fn address(self) -> u64 {
        self.address
    }

    /// Virtual address behind the last byte, less one page: the last page.
    #[must_use]
    pub const fn last(self) -> u64 {
        self.address + (self.pages - 1) * PageSize::Size4K.bytes()
    }

    /// Which page of the run is at a virtual address.
    #[must_use]
    pub const fn index_of(self, address: u64) -> u64 {
        address.saturating_sub(self.address) / PageSize::Size4K.bytes()
    }

    /// The pages.
    pub fn blocks(self) -> impl Iterator<Item = MappedBlock> {
        (0..self.pages).filter_map(move |index| {
            let address = self.address + index * PageSize::Size4K.bytes();
            MappedBlock::try_new(address, PageSize::Size4K)
        })
    }
}

/// The page of a [`MappedRun`] at which an instruction failed, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailedAt<E> {
    /// Its number in the run: those before it are done.
    pub index: u64,
    /// Why.
    pub error: E,
}

/// Does the pages of a run one by one.
fn one_by_one<E>(
    run: MappedRun,
    instruction: impl Fn(MappedBlock) -> Result<(), E>,
) -> Result<(), FailedAt<E>> {
    (0..).zip(run.blocks()).try_for_each(|(index, block)| {
        instruction(block).map_err(|error| FailedAt { index, error })
    })
}

/// A processor fault that an instruction with a landing pad ran into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccessFault {
    /// Exception vector.
    pub vector: u8,
    /// Its error code, 0 if it has none.
    pub code: u32,
}

impl AccessFault {
    /// Whether the processor said that the page is not validated (#VC 0x404, APM 15.36.10).
    #[must_use]
    pub const fn is_not_validated(self) -> bool {
        self.vector == 29 && self.code == 0x404
    }
}

/// Why a page could not be validated or rescinded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValidateError {
    /// The RMP holds the 2 MiB as 4 KiB pages.
    SizeMismatch,
    /// The page was already as asked (CF = 1).
    NoChange,
    /// Any other status (EAX), unknown ones included.
    Status(u32),
    /// The instruction itself faulted.
    Fault(AccessFault),
}

/// Why permissions of a page could not be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdjustError {
    /// The RMP holds the 2 MiB as 4 KiB pages.
    SizeMismatch,
    /// Any other status (EAX), unknown ones included.
    Status(u32),
    /// The instruction itself faulted (#VC 0x404: the page is not validated).
    Fault(AccessFault),
}

/// What a lower privilege level may do with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Nothing.
    None,
    /// Read, write, execute at any CPL.
    Full,
    /// Nothing, and the page becomes a VMSA.
    Vmsa,
    /// Read, and the page becomes a VMSA.
    ReadableVmsa,
}

/// The processor's side of a confidential VM.
///
/// One call is one instruction (or one fill), or one for each page of a run. Implementations keep
/// no books.
pub trait Platform {
    /// Validates a page that is not validated.
    ///
    /// # Errors
    ///
    /// [`ValidateError`]; nothing changed.
    fn validate(&self, block: MappedBlock) -> Result<(), ValidateError>;

    /// Validates the pages of a run, up to the first that cannot be.
    ///
    /// # Errors
    ///
    /// [`ValidateError`] for that page, which did not change.
    fn validate_run(&self, run: MappedRun) -> Result<(), FailedAt<ValidateError>> {
        one_by_one(run, |block| self.validate(block))
    }

    /// Takes the validation back.
    ///
    /// # Errors
    ///
    /// [`ValidateError`]; nothing changed.
    fn rescind(&self, block: MappedBlock) -> Result<(), ValidateError>;

    /// Sets what `vmpl` may do with a validated page.
    ///
    /// # Errors
    ///
    /// [`AdjustError`]; nothing changed.
    fn adjust(&self, block: MappedBlock, vmpl: Vmpl, rights: Rights) -> Result<(), AdjustError>;

    /// Sets what `vmpl` may do with the pages of a run, up to the first where that fails.
    ///
    /// # Errors
    ///
    /// [`AdjustError`] for that page, which did not change.
    fn adjust_run(
        &self,
        run: MappedRun,
        vmpl: Vmpl,
        rights: Rights,
    ) -> Result<(), FailedAt<AdjustError>> {
        one_by_one(run, |block| self.adjust(block, vmpl, rights))
    }

    /// Fills the page with zeros.
    ///
    /// # Errors
    ///
    /// The fault; the page may be filled in part.
    fn scrub(&self, block: MappedBlock) -> Result<(), AccessFault>;

    /// Drops every translation this processor holds for the guest, at any privilege level.
    fn flush_local(&self);
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: u64 = PageSize::Size2M.bytes();

    #[test]
    fn a_run_lies_in_one_block() {
        assert!(MappedRun::try_new(BLOCK, 512).is_some());
        assert!(MappedRun::try_new(BLOCK, 513).is_none());
        assert!(MappedRun::try_new(BLOCK, 0).is_none());
        assert!(MappedRun::try_new(BLOCK + 8, 1).is_none());
        assert!(MappedRun::try_new(BLOCK + 0x1000, 511).is_some());
        assert!(MappedRun::try_new(BLOCK + 0x1000, 512).is_none());
    }

    #[test]
    fn the_pages_of_a_run_are_told_by_address_and_number() {
        let run = MappedRun::try_new(BLOCK + 0x3000, 2).expect("a run");
        let addresses: Vec<u64> = run.blocks().map(MappedBlock::address).collect();
        assert_eq!(addresses, [BLOCK + 0x3000, BLOCK + 0x4000]);
        assert_eq!(run.last(), BLOCK + 0x4000);
        assert_eq!(run.index_of(BLOCK + 0x4000), 1);
        let failed = one_by_one(run, |block| match block.address() == run.last() {
            true => Err(7),
            false => Ok(()),
        });
        assert_eq!(failed, Err(FailedAt { index: 1, error: 7 }));
    }
}
