//! Deliberate faults (docs/decisions/005): one wrapper that misbehaves in one way, so that it can
//! be shown that the machine and the referee notice.
//!
//! Only in test builds (feature `faults`). The engine and the protocols below and above it are the
//! code that ships; the fault is in how the wrapper passes on what they ask for.

use accept::{AdjustFault, Backend, Block, Fault as ScrubFault, ValidateFault};
use protocols::addr::Gpa;
use protocols::launch::Fault;

use crate::protocol::{GuestMemory, Unreachable};

/// Below this address everything works: the firmware's own areas lie there, and a guest that
/// cannot even start shows nothing. 16 MiB.
const FIRST_FAULTY_GPA: u64 = 16 << 20;

/// A backend that commits `fault` on every block from [`FIRST_FAULTY_GPA`] up.
pub struct Faulty<B> {
    inner: B,
    fault: Fault,
}

impl<B> Faulty<B> {
    /// Wraps `inner`. [`Fault::NONE`] and faults that are not the backend's change nothing.
    #[must_use]
    pub const fn new(inner: B, fault: Fault) -> Self {
        Self { inner, fault }
    }

    /// The wrapped backend.
    #[must_use]
    pub const fn inner(&self) -> &B {
        &self.inner
    }

    fn commits(&self, fault: Fault, block: Block) -> bool {
        self.fault == fault && block.gpa() >= FIRST_FAULTY_GPA
    }
}

impl<B: Backend> Backend for Faulty<B> {
    fn validate(&self, block: Block) -> Result<(), ValidateFault> {
        if self.commits(Fault::SKIP_VALIDATE, block) {
            return Ok(());
        }
        self.inner.validate(block)?;
        if self.commits(Fault::VALIDATE_TWICE, block) {
            // "Already done" is what an honest caller would stop at.
            let _ = self.inner.validate(block);
        }
        if self.commits(Fault::GRANT_BEFORE_SCRUB, block) {
            // If it fails, the engine's own grant follows anyway.
            let _ = self.inner.grant(block);
        }
        Ok(())
    }

    fn rescind(&self, block: Block) -> Result<(), ValidateFault> {
        let done_before = self.commits(Fault::WRONG_ORDER, block)
            || self.commits(Fault::SKIP_VALIDATE, block);
        if done_before { Ok(()) } else { self.inner.rescind(block) }
    }

    fn scrub(&self, block: Block) -> Result<(), ScrubFault> {
        let skipped = self.commits(Fault::SKIP_SCRUB, block)
            || self.commits(Fault::SKIP_VALIDATE, block);
        if skipped { Ok(()) } else { self.inner.scrub(block) }
    }

    fn grant(&self, block: Block) -> Result<(), AdjustFault> {
        let skipped = self.commits(Fault::SKIP_GRANT, block)
            || self.commits(Fault::SKIP_VALIDATE, block);
        if skipped { Ok(()) } else { self.inner.grant(block) }
    }

    fn revoke(&self, block: Block) -> Result<(), AdjustFault> {
        if self.commits(Fault::SKIP_VALIDATE, block) {
            return Ok(());
        }
        if self.commits(Fault::WRONG_ORDER, block) {
            // The page goes while the guest still has it; there is nothing to revoke afterwards.
            return match self.inner.rescind(block) {
                Ok(()) => Ok(()),
                Err(ValidateFault::SizeMismatch) => Err(AdjustFault::SizeMismatch),
                Err(ValidateFault::AlreadyDone) => Err(AdjustFault::NotValidated),
                Err(ValidateFault::Failed(status)) => Err(AdjustFault::Failed(status)),
            };
        }
        self.inner.revoke(block)
    }

    fn flush(&self) {
        self.inner.flush();
    }
}

/// Guest memory into which a wrong index is written with [`Fault::WRONG_NEXT`].
pub struct FaultyMemory<M> {
    inner: M,
    fault: Fault,
}

impl<M> FaultyMemory<M> {
    /// Wraps `inner`. Faults other than [`Fault::WRONG_NEXT`] change nothing.
    #[must_use]
    pub const fn new(inner: M, fault: Fault) -> Self {
        Self { inner, fault }
    }
}

impl<M: GuestMemory> GuestMemory for FaultyMemory<M> {
    fn read_u8(&self, gpa: Gpa) -> Result<u8, Unreachable> {
        self.inner.read_u8(gpa)
    }

    fn read_u64(&self, gpa: Gpa) -> Result<u64, Unreachable> {
        self.inner.read_u64(gpa)
    }

    fn write_u8(&self, gpa: Gpa, value: u8) -> Result<(), Unreachable> {
        self.inner.write_u8(gpa, value)
    }

    fn write_u16(&self, gpa: Gpa, value: u16) -> Result<(), Unreachable> {
        let off_by_one = u16::from(self.fault == Fault::WRONG_NEXT);
        self.inner.write_u16(gpa, value.wrapping_add(off_by_one))
    }
}
