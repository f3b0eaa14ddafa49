//! Flushing the guest: every processor drops its translations before it runs guest code again.

use accept::NotFlushed;

use super::slot::Look;
use super::{Registry, VmsaControl};

/// How often a flush looks at one VMSA before it gives up (I12). A look costs two locked
/// operations and a load, so all of them take milliseconds, in which the host's timer interrupts
/// whoever runs. Looks are counted and not timed: the host can make the time stamp counter
/// stand still.
const FLUSH_LOOKS: u32 = 1 << 16;
/// At least at every so many looks the processor is asked whether the VMSA runs; that costs
/// hundreds of cycles, or a trip to the host. In the beginning it is asked more often: at each
/// power of two.
const LOOKS_PER_QUESTION: u32 = 1 << 12;

impl<C: VmsaControl> Registry<'_, C> {
    /// Makes every processor drop its translations before it runs guest code again, and waits
    /// for those that run just now.
    ///
    /// A processor does this by itself when it is about to run a VMSA whose PCPU_ID is 0
    /// (APM 15.36.15). So a VMSA is done with when its PCPU_ID has been set since, or when it is
    /// seen not to run: it then passes there first. All VMSAs on record count, also replaced ones
    /// and those of processors at VMPL0: which of them run is the host's choice.
    ///
    /// # Errors
    /// [`NotFlushed`] when one ran for longer than the bound. The tempting shortcut, to go on all
    /// the same, lets a guest write to a page through a translation that is as old as the page's
    /// former life, after the page was found to be a good VMSA.
    pub fn flush_all(&self) -> Result<(), NotFlushed> {
        self.owe_flush();
        (0..self.slots.len()).try_for_each(|index| self.await_flush(index))
    }

    /// The first half of [`Registry::flush_all`]: nobody is waited for.
    pub(crate) fn owe_flush(&self) {
        for index in 0..self.slots.len() {
            // One that is being deleted cannot be touched; it owes a flush if it stays. One that
            // is new meanwhile owes one from its making.
            if let Look::Here((_pin, vmsa)) = self.look(index) {
                self.control.owe_flush(vmsa);
            }
        }
    }

    /// Waits until the VMSA in a slot has dropped its translations or does not run.
    fn await_flush(&self, index: usize) -> Result<(), NotFlushed> {
        for look in 0..FLUSH_LOOKS {
            match self.look(index) {
                Look::Absent => return Ok(()),
                // It is not known to rest before its deletion is done; the end is near.
                Look::Leaving => {}
                Look::Here((_pin, vmsa)) => {
                    let ask = look == 0
                        || look.is_power_of_two()
                        || look.is_multiple_of(LOOKS_PER_QUESTION);
                    let flushed = self.control.has_flushed(vmsa);
                    if flushed || ask && !self.control.is_running(vmsa) {
                        return Ok(());
                    }
                }
            }
            core::hint::spin_loop();
        }
        Err(NotFlushed)
    }
}
