//! Which processors are in the guest, the flush that each of them owes before it goes there again, and how
//! one that is in the guest is called out.
//!
//! An entry and an exit each count a processor's word up by one, so it is odd while the guest runs. Who
//! wants a flush first says so to each processor and then looks at its word: a processor that was seen
//! outside meets the wish before its next entry, and one that was inside has met it once its word has
//! changed. Both sides use sequentially consistent operations; with less, each could miss the other's.
//! An entry that the module refuses has flushed nothing: the processor wishes again what it was to meet.
//!
//! Who is inside is called out by an interrupt. Interrupts of L1 and of the guest share the vectors of one
//! APIC, and one that waits there is one whether it was sent once or twice. So the call has the vector that
//! carries no message: the one that the guest has chosen for spurious interrupts, which may come at any
//! time and say nothing. It is the guest's unless the mark says that it is a call; the mark is set before
//! the interrupt is sent, by one sender alone, and taken back by the processor that takes it, so each
//! call is taken for one call. A processor that has been outside since may be called anew, so a call that
//! the host loses has no effect on later ones (decision 026).

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use accept::NotFlushed;
use protocols::tdx::l2::Flush;

use super::l2::interrupts::FIRST_VECTOR;
use crate::platform::tdx::FlushOthers;

/// How often a flush looks at one processor before it gives up (I12).
const FLUSH_LOOKS: u32 = 1 << 20;

/// The spurious-interrupt vector register: the APIC is on. The vector is in bits 7:0.
pub const APIC_ON: u32 = 1 << 8;

/// Sends interrupts.
pub trait CallOut {
    /// Sends an interrupt to a processor. It may get lost.
    fn call_out(&self, apic_id: u32, vector: u8);
}

/// One processor.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct Runner {
    passages: AtomicU64,
    flush: AtomicBool,
    apic_id: AtomicU32,
    /// The spurious-interrupt vector register of its APIC; off until it is known.
    spurious: AtomicU32,
    /// The call that is on its way to it, as [`call_mark`] makes it; 0 if there is none.
    called: AtomicU64,
}

/// A call of a processor by this vector, and the stay that it is to end.
const fn call_mark(vector: u8, passages: u64) -> u64 {
    passages << PASSAGES_SHIFT | APIC_ON as u64 | vector as u64
}

/// The vector, with [`APIC_ON`], is below.
const PASSAGES_SHIFT: u32 = 9;

impl Runner {
    /// Outside, owing nothing, not to be called.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            passages: AtomicU64::new(0),
            flush: AtomicBool::new(false),
            apic_id: AtomicU32::new(0),
            spurious: AtomicU32::new(0),
            called: AtomicU64::new(0),
        }
    }

    /// How it can be called: the identifier of its APIC.
    pub fn set_apic_id(&self, id: u32) {
        self.apic_id.store(id, Ordering::SeqCst);
    }

    /// What its spurious-interrupt vector register holds now.
    pub fn set_spurious(&self, register: u32) {
        self.spurious.store(register, Ordering::SeqCst);
    }

    /// The processor is about to enter the guest: with this flush.
    pub fn enter(&self) -> Flush {
        self.passages.fetch_add(1, Ordering::SeqCst);
        if self.flush.swap(false, Ordering::SeqCst) {
            Flush::Ept
        } else {
            Flush::None
        }
    }

    /// The module has not entered the guest after all, and has not carried out the flush: the processor
    /// owes it still. Before [`Runner::leave`], from which on the wish counts as met.
    pub fn not_entered(&self, flush: Flush) {
        if flush == Flush::Ept {
            self.wish();
        }
    }

    /// It has left the guest.
    pub fn leave(&self) {
        self.passages.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether an interrupt that the processor has taken was a call, which is answered with this; if not
    /// it is the guest's.
    #[must_use]
    pub fn is_call(&self, vector: u8) -> bool {
        let without_stay = |mark: u64| mark & ((1 << PASSAGES_SHIFT) - 1);
        let taken = |mark| (without_stay(mark) == call_mark(vector, 0)).then_some(0);
        self.called
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, taken)
            .is_ok()
    }

    fn wish(&self) {
        self.flush.store(true, Ordering::SeqCst);
    }

    /// Calls the processor out, if it is inside, can be called, and no call is on its way that this stay
    /// is to end with.
    fn call_out(&self, sender: &impl CallOut) {
        let passages = self.passages.load(Ordering::SeqCst);
        let register = self.spurious.load(Ordering::SeqCst);
        let vector = register as u8;
        let is_inside = !passages.is_multiple_of(2);
        // Below are exceptions, which never arrive (decision 026).
        let can_be_called = register & APIC_ON != 0 && vector >= FIRST_VECTOR;
        if !is_inside || !can_be_called {
            return;
        }
        let before = self.called.load(Ordering::SeqCst);
        if before >> PASSAGES_SHIFT == passages {
            return;
        }
        let mark = call_mark(vector, passages);
        let marked = self
            .called
            .compare_exchange(before, mark, Ordering::SeqCst, Ordering::SeqCst);
        if marked.is_ok() {
            sender.call_out(self.apic_id.load(Ordering::SeqCst), vector);
        }
    }

    /// Waits until it has been outside since the wish, or has met it.
    fn await_outside(&self) -> Result<(), NotFlushed> {
        let seen = self.passages.load(Ordering::SeqCst);
        let is_met = || {
            let now = self.passages.load(Ordering::SeqCst);
            now.is_multiple_of(2) || now != seen || !self.flush.load(Ordering::SeqCst)
        };
        for _ in 0..FLUSH_LOOKS {
            if is_met() {
                return Ok(());
            }
            core::hint::spin_loop();
        }
        Err(NotFlushed)
    }
}

/// All processors, and how they are called.
pub struct Others<'a, S> {
    /// The processors.
    pub runners: &'a [Runner],
    /// Sends the calls.
    pub sender: S,
}

impl<S: CallOut> FlushOthers for Others<'_, S> {
    fn flush_others(&self) -> Result<(), NotFlushed> {
        self.runners.iter().for_each(Runner::wish);
        self.runners
            .iter()
            .for_each(|runner| runner.call_out(&self.sender));
        self.runners.iter().try_for_each(Runner::await_outside)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::vec::Vec;

    use super::*;

    /// Notes what it is to send.
    #[derive(Default)]
    struct Sent(RefCell<Vec<(u32, u8)>>);

    impl CallOut for &Sent {
        fn call_out(&self, apic_id: u32, vector: u8) {
            self.0.borrow_mut().push((apic_id, vector));
        }
    }

    /// Two processors that can be called by 0xFF and 0xEF.
    fn runners() -> [Runner; 2] {
        let runners = [Runner::new(), Runner::new()];
        for (runner, (id, register)) in runners.iter().zip([(0, 0x1FF), (7, 0x1EF)]) {
            runner.set_apic_id(id);
            runner.set_spurious(register);
        }
        runners
    }

    #[test]
    fn a_wish_is_met_by_the_next_entry_and_by_that_alone() {
        let runners = runners();
        let sent = Sent::default();
        let all = Others {
            runners: &runners,
            sender: &sent,
        };
        assert_eq!(runners[0].enter(), Flush::None);
        runners[0].leave();
        assert_eq!(all.flush_others(), Ok(()));
        assert_eq!(runners[0].enter(), Flush::Ept);
        runners[0].leave();
        assert_eq!(runners[0].enter(), Flush::None);
        assert_eq!(runners[1].enter(), Flush::Ept);
        assert!(sent.0.borrow().is_empty(), "nobody was inside");
    }

    /// I12: who stays in the guest is waited for so long and no longer.
    #[test]
    fn a_processor_that_stays_inside_is_no_flush() {
        let runners = runners();
        let sent = Sent::default();
        let all = Others {
            runners: &runners,
            sender: &sent,
        };
        let _ = runners[1].enter();
        assert_eq!(all.flush_others(), Err(NotFlushed));
        assert_eq!(*sent.0.borrow(), [(7, 0xEF)], "it was called by its vector");
        // The call is on its way: no second one, which could be taken for the guest's.
        assert_eq!(all.flush_others(), Err(NotFlushed));
        assert_eq!(sent.0.borrow().len(), 1);
        runners[1].leave();
        assert!(runners[1].is_call(0xEF));
        assert_eq!(all.flush_others(), Ok(()));
        assert_eq!(runners[1].enter(), Flush::Ept);
        assert_eq!(sent.0.borrow().len(), 1);
    }

    #[test]
    fn a_call_is_taken_once_and_by_its_vector_alone() {
        let [_, runner] = runners();
        let sent = Sent::default();
        assert!(!runner.is_call(0xEF), "nobody called");
        let _ = runner.enter();
        runner.call_out(&&sent);
        assert!(!runner.is_call(0x30));
        // The guest chooses another vector while the call is on its way.
        runner.set_spurious(APIC_ON | 0x30);
        assert!(!runner.is_call(0x30));
        assert!(runner.is_call(0xEF));
        assert!(!runner.is_call(0xEF));
    }

    #[test]
    fn who_has_switched_the_apic_off_is_not_called() {
        let [_, runner] = runners();
        let sent = Sent::default();
        let _ = runner.enter();
        runner.set_spurious(0xFF);
        runner.call_out(&&sent);
        assert!(sent.0.borrow().is_empty());
        // No mark is left that would swallow an interrupt of the guest's.
        assert!(!runner.is_call(0xFF));
    }

    /// The module answers PENDING_INTERRUPT before it flushes: whoever waits may take the wish for met, as
    /// the guest does not run, and the entry that succeeds has to meet it.
    #[test]
    fn an_entry_that_is_refused_owes_its_flush_still() {
        let runner = Runner::new();
        runner.wish();
        for _ in 0..2 {
            let flush = runner.enter();
            assert_eq!(flush, Flush::Ept);
            runner.not_entered(flush);
            runner.leave();
            assert_eq!(runner.await_outside(), Ok(()));
        }
        assert_eq!(runner.enter(), Flush::Ept);
        runner.leave();
        let flush = runner.enter();
        assert_eq!(flush, Flush::None);
        runner.not_entered(flush);
        runner.leave();
        assert_eq!(runner.enter(), Flush::None);
    }

    /// Vectors below 32 are not sent on, as edk2's 0x0F: nobody would take the mark back.
    #[test]
    fn who_has_an_exceptions_vector_for_it_is_not_called() {
        let [_, runner] = runners();
        let sent = Sent::default();
        runner.set_spurious(APIC_ON | 0x0F);
        let _ = runner.enter();
        runner.call_out(&&sent);
        assert!(sent.0.borrow().is_empty());
        assert!(!runner.is_call(0x0F));
        runner.set_spurious(APIC_ON | 0xFF);
        runner.call_out(&&sent);
        assert_eq!(*sent.0.borrow(), [(7, 0xFF)]);
        assert!(runner.is_call(0xFF));
    }

    /// The host loses a call: who has been outside since is called anew, and a call that was late only
    /// is still no interrupt of the guest's.
    #[test]
    fn a_lost_call_keeps_nobody_from_the_next() {
        let [_, runner] = runners();
        let sent = Sent::default();
        let _ = runner.enter();
        runner.call_out(&&sent);
        runner.call_out(&&sent);
        assert_eq!(sent.0.borrow().len(), 1);
        runner.leave();
        let _ = runner.enter();
        runner.call_out(&&sent);
        assert_eq!(*sent.0.borrow(), [(7, 0xEF); 2]);
        assert!(runner.is_call(0xEF));
        assert!(!runner.is_call(0xEF));
        // Again, by another vector.
        runner.call_out(&&sent);
        runner.leave();
        runner.set_spurious(APIC_ON | 0x30);
        let _ = runner.enter();
        runner.call_out(&&sent);
        assert_eq!(sent.0.borrow().last(), Some(&(7, 0x30)));
        assert!(runner.is_call(0x30));
    }

    /// A processor that comes back inside at once has met the wish, and is not waited for.
    #[test]
    fn an_entry_meets_the_wish_while_somebody_waits() {
        let runner = Runner::new();
        let _ = runner.enter();
        runner.wish();
        runner.leave();
        assert_eq!(runner.enter(), Flush::Ept);
        assert_eq!(runner.await_outside(), Ok(()));
    }
}
