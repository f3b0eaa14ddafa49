//! Which processors are in the guest, and the flush that each of them owes before it goes there again.
//!
//! An entry and an exit each count a processor's word up by one, so it is odd while the guest runs. Who
//! wants a flush first says so to each processor and then looks at its word: a processor that was seen
//! outside meets the wish before its next entry, and one that was inside has met it once its word has
//! changed. Both sides use sequentially consistent operations; with less, each could miss the other's.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use accept::NotFlushed;
use protocols::tdx::l2::Flush;

use crate::platform::tdx::FlushOthers;

/// How often a flush looks at one processor before it gives up (I12).
const FLUSH_LOOKS: u32 = 1 << 16;

/// One processor.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct Runner {
    passages: AtomicU64,
    flush: AtomicBool,
}

impl Runner {
    /// Outside, owing nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            passages: AtomicU64::new(0),
            flush: AtomicBool::new(false),
        }
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

    /// It has left the guest.
    pub fn leave(&self) {
        self.passages.fetch_add(1, Ordering::SeqCst);
    }

    fn wish(&self) {
        self.flush.store(true, Ordering::SeqCst);
    }

    /// Waits until it has been outside since the wish.
    fn await_outside(&self) -> Result<(), NotFlushed> {
        let seen = self.passages.load(Ordering::SeqCst);
        if seen.is_multiple_of(2) {
            return Ok(());
        }
        for _ in 0..FLUSH_LOOKS {
            if self.passages.load(Ordering::SeqCst) != seen {
                return Ok(());
            }
            core::hint::spin_loop();
        }
        Err(NotFlushed)
    }
}

impl FlushOthers for &[Runner] {
    fn flush_others(&self) -> Result<(), NotFlushed> {
        self.iter().for_each(Runner::wish);
        self.iter().try_for_each(Runner::await_outside)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_is_met_by_the_next_entry_and_by_that_alone() {
        let runners = [Runner::new(), Runner::new()];
        let all: &[Runner] = &runners;
        assert_eq!(runners[0].enter(), Flush::None);
        runners[0].leave();
        assert_eq!(all.flush_others(), Ok(()));
        assert_eq!(runners[0].enter(), Flush::Ept);
        runners[0].leave();
        assert_eq!(runners[0].enter(), Flush::None);
        assert_eq!(runners[1].enter(), Flush::Ept);
    }

    /// I12: who stays in the guest is waited for so long and no longer.
    #[test]
    fn a_processor_that_stays_inside_is_no_flush() {
        let runners = [Runner::new(), Runner::new()];
        let all: &[Runner] = &runners;
        let _ = runners[1].enter();
        assert_eq!(all.flush_others(), Err(NotFlushed));
        runners[1].leave();
        assert_eq!(all.flush_others(), Ok(()));
        assert_eq!(runners[1].enter(), Flush::Ept);
    }
}
