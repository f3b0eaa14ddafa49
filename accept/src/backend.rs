//! What the engine needs from the platform: one method per instruction, and the ways it may fail.
//!
//! The engine is the only caller, and it calls under the lock of the block's region, `flush`
//! excepted. An implementation does no book-keeping of its own and never calls the engine.
//!
//! An implementation must report what the hardware said and nothing else: "already done" is not
//! success, and an unknown status is a failure, not a panic.

use crate::block::{Block, Frame};

/// The platform's instructions. One call is one instruction on one page of the block's size (or
/// one fill of memory).
pub trait Backend {
    /// Whether a valid page stays valid until the host removes it, and is zero when it becomes
    /// valid (TDX). [`Backend::rescind`] is then never called: pages leave by
    /// [`Engine::withdraw`], the host removes them when it is asked to, and one that does not is
    /// found out by the next [`Backend::validate`].
    ///
    /// [`Engine::withdraw`]: crate::Engine::withdraw
    const HOST_REMOVES: bool = false;

    /// Makes the block valid for the guest (SNP: PVALIDATE with validate = 1).
    ///
    /// # Errors
    /// As the instruction reported; on any error nothing has changed.
    fn validate(&self, block: Block) -> Result<(), ValidateFault>;

    /// As [`Backend::validate`] for each page of a run, up to the first that fails. For platforms
    /// that can do this faster than page by page.
    ///
    /// # Errors
    /// As the instruction reported for that page, and how many came before it.
    fn validate_run(&self, run: Run) -> Result<(), Broken<ValidateFault>> {
        run.page_by_page(|page| self.validate(page))
    }

    /// Makes the block invalid again (SNP: PVALIDATE with validate = 0).
    ///
    /// # Errors
    /// As the instruction reported; on any error nothing has changed.
    fn rescind(&self, block: Block) -> Result<(), ValidateFault>;

    /// Fills the block with zeros, seen through the private mapping.
    ///
    /// # Errors
    /// When the access faulted. The block may be partly filled.
    fn scrub(&self, block: Block) -> Result<(), Fault>;

    /// Gives the guest's privilege level full permissions and clears the VMSA attribute (SNP:
    /// RMPADJUST).
    ///
    /// # Errors
    /// As the instruction reported; on any error nothing has changed.
    fn grant(&self, block: Block) -> Result<(), AdjustFault>;

    /// As [`Backend::grant`] for each page of a run, up to the first that fails.
    ///
    /// # Errors
    /// As the instruction reported for that page, and how many came before it.
    fn grant_run(&self, run: Run) -> Result<(), Broken<AdjustFault>> {
        run.page_by_page(|page| self.grant(page))
    }

    /// Takes all permissions from every less privileged level (SNP: RMPADJUST for each). To the
    /// engine this is one step: on an error of the second instruction the implementation restores
    /// what the first has taken.
    ///
    /// # Errors
    /// As the instruction reported.
    fn revoke(&self, block: Block) -> Result<(), AdjustFault>;

    /// Drops every cached translation of the guest on all of its vCPUs, and returns when that is
    /// certain. Called without any lock held.
    ///
    /// # Errors
    /// [`NotFlushed`] when it is not certain within the platform's bound on waiting (I12).
    fn flush(&self) -> Result<(), NotFlushed>;
}

/// Small pages of one region without a gap, to be done one after the other. At least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    first: Frame,
    pages: usize,
}

impl Run {
    /// `pages` pages from `first` on, which the caller knows to lie in one region.
    pub(crate) const fn new(first: Frame, pages: usize) -> Self {
        Self { first, pages }
    }

    /// The first page.
    #[must_use]
    pub const fn first(self) -> Frame {
        self.first
    }

    /// The number of pages: 1 to 512.
    #[must_use]
    pub const fn pages(self) -> usize {
        self.pages
    }

    /// Does the pages one by one.
    ///
    /// # Errors
    /// That of the first page that fails.
    #[inline]
    pub fn page_by_page<F>(
        self,
        instruction: impl Fn(Block) -> Result<(), F>,
    ) -> Result<(), Broken<F>> {
        for done in 0..self.pages {
            // Frames of one region: the sum is one, too.
            let page = self.first.checked_add(done as u64).unwrap_or(self.first);
            instruction(Block::page(page)).map_err(|fault| Broken { done, fault })?;
        }
        Ok(())
    }
}

/// A [`Run`] that ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken<F> {
    /// Pages that were done before the one that failed.
    pub done: usize,
    /// Why that one failed.
    pub fault: F,
}

/// A vCPU went on running for so long that it may still hold translations which the RMP would not
/// give any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotFlushed;

/// Why [`Backend::validate`] or [`Backend::rescind`] did not change the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValidateFault {
    /// The block is 2 MiB but the platform holds it as smaller pages (SNP: EAX = 6).
    SizeMismatch,
    /// The block already was what it should become (SNP: EAX = 0 with CF = 1).
    AlreadyDone,
    /// Any other status, as the instruction gave it (SNP: EAX).
    Failed(u32),
}

/// Why [`Backend::grant`] or [`Backend::revoke`] did not change the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdjustFault {
    /// The block is 2 MiB but the platform holds it as smaller pages (SNP: EAX = 6).
    SizeMismatch,
    /// The page is not valid (SNP: #VC with error code 0x404).
    NotValidated,
    /// Any other status, as the instruction gave it (SNP: EAX).
    Failed(u32),
}

/// Why [`Backend::scrub`] could not write the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The page is not valid (SNP: #VC with error code 0x404).
    NotValidated,
    /// The paravisor has no mapping of the block.
    NotMapped,
}

/// Which method of the [`Backend`] failed, for error reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// [`Backend::validate`].
    Validate,
    /// [`Backend::rescind`].
    Rescind,
    /// [`Backend::scrub`].
    Scrub,
    /// [`Backend::grant`].
    Grant,
    /// [`Backend::revoke`].
    Revoke,
}

/// What a fault means to the flows, whichever instruction raised it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// Try again with small pages.
    SizeMismatch,
    /// The hardware contradicts the map, so the host changed a page behind the guest's back.
    Contradiction,
    /// A failure with the platform's own number.
    Failed(u32),
}

/// The status of SNP instructions for a size mismatch, which is what a small page that
/// "mismatches" is reported as: a platform should never say so.
pub(crate) const STATUS_SIZE_MISMATCH: u32 = 6;

/// The status reported for memory that the paravisor cannot reach (SNP: FAIL_INPUT).
const STATUS_NOT_MAPPED: u32 = 1;

impl From<ValidateFault> for Trouble {
    fn from(fault: ValidateFault) -> Self {
        match fault {
            ValidateFault::SizeMismatch => Self::SizeMismatch,
            ValidateFault::AlreadyDone => Self::Contradiction,
            ValidateFault::Failed(status) => Self::Failed(status),
        }
    }
}

impl From<AdjustFault> for Trouble {
    fn from(fault: AdjustFault) -> Self {
        match fault {
            AdjustFault::SizeMismatch => Self::SizeMismatch,
            AdjustFault::NotValidated => Self::Contradiction,
            AdjustFault::Failed(status) => Self::Failed(status),
        }
    }
}

impl From<Fault> for Trouble {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::NotValidated => Self::Contradiction,
            Fault::NotMapped => Self::Failed(STATUS_NOT_MAPPED),
        }
    }
}
