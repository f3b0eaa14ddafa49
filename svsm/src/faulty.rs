//! Deliberate faults (docs/decisions/005): one wrapper that misbehaves in one way, so that it can
//! be shown that the machine and the referee notice.
//!
//! Only in test builds (feature `faults`). The engine and the protocols below and above it are the
//! code that ships; the fault is in how the wrapper passes on what they ask for.

use accept::{
    AdjustFault, Backend, Block, Fault as ScrubFault, Frame, Map, NotFlushed, PageState,
    ValidateFault,
};
use protocols::addr::Gpa;
use protocols::launch::Fault;

use crate::protocol::{GuestMemory, Unreachable};

pub mod control;

use control::READY;

/// Below this address everything works: the firmware's own areas lie there, and a guest that
/// cannot even start shows nothing. 16 MiB.
const FIRST_FAULTY_GPA: u64 = 16 << 20;

/// What RMPADJUST says of a VMSA that runs.
const IN_USE: AdjustFault = AdjustFault::Failed(3);

/// The first half of a flush: each processor is told, none is waited for.
pub trait OweFlush {
    /// Makes every processor drop its translations before it runs guest code again.
    fn owe_flush(&self);
}

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

    /// Makes the control's memory ready, if this is the control.
    ///
    /// # Errors
    ///
    /// What the platform failed with.
    pub fn prepare_control(
        &self,
        map: &Map<'_>,
        state: impl Fn(Frame) -> Option<PageState>,
    ) -> Result<(), ValidateFault>
    where
        B: Backend,
    {
        match self.fault {
            Fault::PRE_ACCEPTED => READY.fill(&self.inner, map, state),
            _ => Ok(()),
        }
    }

    fn commits(&self, fault: Fault, block: Block) -> bool {
        self.fault == fault && block.gpa() >= FIRST_FAULTY_GPA
    }
}

impl<B: Backend + OweFlush> Backend for Faulty<B> {
    fn validate(&self, block: Block) -> Result<(), ValidateFault> {
        if self.fault == Fault::PRE_ACCEPTED {
            return READY.validate(&self.inner, block);
        }
        if self.commits(Fault::SKIP_VALIDATE, block) {
            return Ok(());
        }
        assert!(
            !self.commits(Fault::PANIC, block),
            "a deliberate panic at {:#x}",
            block.gpa()
        );
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
        let skipped = [
            Fault::WRONG_ORDER,
            Fault::SKIP_VALIDATE,
            Fault::SKIP_RESCIND,
        ]
        .into_iter()
        .any(|fault| self.commits(fault, block));
        if skipped {
            Ok(())
        } else {
            self.inner.rescind(block)
        }
    }

    fn scrub(&self, block: Block) -> Result<(), ScrubFault> {
        if self.fault == Fault::PRE_ACCEPTED {
            return READY.scrub(&self.inner, block);
        }
        let skipped =
            self.commits(Fault::SKIP_SCRUB, block) || self.commits(Fault::SKIP_VALIDATE, block);
        if skipped {
            Ok(())
        } else {
            self.inner.scrub(block)
        }
    }

    fn grant(&self, block: Block) -> Result<(), AdjustFault> {
        if self.fault == Fault::PRE_ACCEPTED {
            return READY.grant(&self.inner, block);
        }
        let skipped =
            self.commits(Fault::SKIP_GRANT, block) || self.commits(Fault::SKIP_VALIDATE, block);
        if skipped {
            return Ok(());
        }
        match self.inner.grant(block) {
            Err(IN_USE) if self.fault == Fault::IN_USE_VMSA => Ok(()),
            granted => granted,
        }
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

    fn flush(&self) -> Result<(), NotFlushed> {
        match self.fault {
            Fault::MISSING_FLUSH => Ok(()),
            Fault::REMOTE_STALE_TRANSLATION => {
                self.inner.owe_flush();
                Ok(())
            }
            _ => self.inner.flush(),
        }
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

    fn read_bytes(&self, gpa: Gpa, bytes: &mut [u8]) -> Result<(), Unreachable> {
        self.inner.read_bytes(gpa, bytes)
    }

    fn write_bytes(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), Unreachable> {
        self.inner.write_bytes(gpa, bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use accept::Operation;

    use super::*;

    /// Notes what arrives.
    #[derive(Default)]
    struct Witness(RefCell<Vec<Operation>>, RefCell<Vec<&'static str>>);

    impl Witness {
        fn note(&self, operation: Operation) {
            self.0.borrow_mut().push(operation);
        }
    }

    impl Backend for Witness {
        fn validate(&self, _: Block) -> Result<(), ValidateFault> {
            self.note(Operation::Validate);
            Ok(())
        }
        fn rescind(&self, _: Block) -> Result<(), ValidateFault> {
            self.note(Operation::Rescind);
            Ok(())
        }
        fn scrub(&self, _: Block) -> Result<(), ScrubFault> {
            self.note(Operation::Scrub);
            Ok(())
        }
        fn grant(&self, block: Block) -> Result<(), AdjustFault> {
            self.note(Operation::Grant);
            if block.gpa() == RUNNING_VMSA {
                return Err(IN_USE);
            }
            Ok(())
        }
        fn revoke(&self, _: Block) -> Result<(), AdjustFault> {
            self.note(Operation::Revoke);
            Ok(())
        }
        fn flush(&self) -> Result<(), NotFlushed> {
            self.1.borrow_mut().extend(["owe", "wait"]);
            Ok(())
        }
    }

    impl OweFlush for Witness {
        fn owe_flush(&self) {
            self.1.borrow_mut().push("owe");
        }
    }

    /// A VMSA that the processor says is in use.
    const RUNNING_VMSA: u64 = 0x1234_5000;

    /// What arrives at the platform when the engine accepts and rescinds a page properly.
    fn arrives(fault: Fault, gpa: u64) -> Vec<Operation> {
        let backend = Faulty::new(Witness::default(), fault);
        let block = Block::page(Frame::containing(gpa));
        assert_eq!(backend.validate(block), Ok(()));
        assert_eq!(backend.scrub(block), Ok(()));
        assert_eq!(backend.grant(block), Ok(()));
        assert_eq!(backend.revoke(block), Ok(()));
        assert_eq!(backend.rescind(block), Ok(()));
        backend.inner().0.take()
    }

    #[test]
    fn each_fault_is_one_misbehaviour() {
        use Operation::{Grant, Rescind, Revoke, Scrub, Validate};
        for (fault, expected) in [
            (Fault::NONE, &[Validate, Scrub, Grant, Revoke, Rescind][..]),
            (
                Fault::WRONG_NEXT,
                &[Validate, Scrub, Grant, Revoke, Rescind],
            ),
            (Fault::SKIP_SCRUB, &[Validate, Grant, Revoke, Rescind]),
            (Fault::SKIP_GRANT, &[Validate, Scrub, Revoke, Rescind]),
            (
                Fault::VALIDATE_TWICE,
                &[Validate, Validate, Scrub, Grant, Revoke, Rescind],
            ),
            (
                Fault::GRANT_BEFORE_SCRUB,
                &[Validate, Grant, Scrub, Grant, Revoke, Rescind],
            ),
            (Fault::WRONG_ORDER, &[Validate, Scrub, Grant, Rescind]),
            (Fault::SKIP_VALIDATE, &[]),
            (Fault::SKIP_RESCIND, &[Validate, Scrub, Grant, Revoke]),
        ] {
            assert_eq!(arrives(fault, FIRST_FAULTY_GPA), expected, "{fault:?}");
        }
    }

    #[test]
    fn a_flush_is_missing_or_only_half_done() {
        for (fault, expected) in [
            (Fault::NONE, &["owe", "wait"][..]),
            (Fault::MISSING_FLUSH, &[]),
            (Fault::REMOTE_STALE_TRANSLATION, &["owe"]),
        ] {
            let backend = Faulty::new(Witness::default(), fault);
            assert_eq!(backend.flush(), Ok(()));
            assert_eq!(backend.inner().1.take(), expected, "{fault:?}");
        }
    }

    #[test]
    fn a_vmsa_that_runs_is_given_back_as_if_it_did_not() {
        let vmsa = Block::page(Frame::containing(RUNNING_VMSA));
        let grant = |fault| Faulty::new(Witness::default(), fault).grant(vmsa);
        assert_eq!(grant(Fault::NONE), Err(IN_USE));
        assert_eq!(grant(Fault::IN_USE_VMSA), Ok(()));
    }

    #[test]
    #[should_panic(expected = "a deliberate panic at 0x1000000")]
    fn a_panic_is_a_misbehaviour_too() {
        arrives(Fault::PANIC, FIRST_FAULTY_GPA);
    }

    #[test]
    fn low_memory_is_left_in_peace() {
        for fault in [
            Fault::SKIP_SCRUB,
            Fault::SKIP_VALIDATE,
            Fault::WRONG_ORDER,
            Fault::PANIC,
        ] {
            assert_eq!(
                arrives(fault, FIRST_FAULTY_GPA - 0x1000),
                arrives(Fault::NONE, 0)
            );
        }
    }
}
