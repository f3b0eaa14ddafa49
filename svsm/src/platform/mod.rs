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
/// One call is one instruction (or one fill). Implementations keep no books.
pub trait Platform {
    /// Validates a page that is not validated.
    ///
    /// # Errors
    ///
    /// [`ValidateError`]; nothing changed.
    fn validate(&self, block: MappedBlock) -> Result<(), ValidateError>;

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

    /// Fills the page with zeros.
    ///
    /// # Errors
    ///
    /// The fault; the page may be filled in part.
    fn scrub(&self, block: MappedBlock) -> Result<(), AccessFault>;

    /// Drops every translation this processor holds for the guest, at any privilege level.
    fn flush_local(&self);
}
