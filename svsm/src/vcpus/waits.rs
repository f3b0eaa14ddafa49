//! How long the guest waits for a processor that works at VMPL0.
//!
//! A processor without a VMSA prepares memory in steps. When the guest makes a VMSA for it, the
//! step it is in the middle of is the last one: the guest waits for at most that one. Here this is
//! counted, not believed.

use core::sync::atomic::{AtomicU64, Ordering};

/// Nobody waits.
const NOBODY: u64 = u64::MAX;

/// The steps of one processor.
#[derive(Debug)]
pub(super) struct Waits {
    /// Steps that have ended.
    taken: AtomicU64,
    /// How many had ended when the guest made a VMSA for the processor, which had none.
    asked: AtomicU64,
}

impl Waits {
    /// No steps, nobody waits.
    pub(super) const fn new() -> Self {
        Self {
            taken: AtomicU64::new(0),
            asked: AtomicU64::new(NOBODY),
        }
    }

    /// The processor has ended a step.
    pub(super) fn count(&self) {
        self.taken.fetch_add(1, Ordering::SeqCst);
    }

    /// Steps that have ended.
    pub(super) fn taken(&self) -> u64 {
        self.taken.load(Ordering::SeqCst)
    }

    /// The guest is about to have a VMSA on record for the processor, which has none.
    pub(super) fn ask(&self) {
        let _ =
            self.asked
                .compare_exchange(NOBODY, self.taken(), Ordering::SeqCst, Ordering::SeqCst);
    }

    /// The VMSA is on record: from now on the processor finds it. A step that ended before is none
    /// that the guest has waited for. Nothing, if the processor has answered already.
    pub(super) fn found_waiting(&self) {
        let asked = self.asked.load(Ordering::SeqCst);
        if asked != NOBODY {
            let _ = self.asked.compare_exchange(
                asked,
                self.taken(),
                Ordering::SeqCst,
                Ordering::SeqCst,
            );
        }
    }

    /// The processor goes to run the guest: how many steps have ended since it was asked to; none
    /// if nobody has waited.
    pub(super) fn answer(&self) -> Option<u64> {
        let asked = self.asked.swap(NOBODY, Ordering::SeqCst);
        (asked != NOBODY).then(|| self.taken().saturating_sub(asked))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_after_the_question_count_once() {
        let waits = Waits::new();
        waits.count();
        assert_eq!(waits.answer(), None);
        waits.ask();
        waits.count();
        // A second VMSA changes nothing: the guest waits since the first.
        waits.ask();
        waits.count();
        assert_eq!((waits.answer(), waits.answer()), (Some(2), None));
        assert_eq!(waits.taken(), 3);
    }

    #[test]
    fn steps_before_the_vmsa_is_on_record_do_not_count() {
        let waits = Waits::new();
        waits.found_waiting();
        assert_eq!(waits.answer(), None);
        waits.ask();
        waits.count();
        waits.found_waiting();
        waits.count();
        assert_eq!(waits.answer(), Some(1));
    }
}
