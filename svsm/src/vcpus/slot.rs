//! One place for a VMSA on record, and who may do what to it at this moment.
//!
//! A slot is one word, changed by single atomic operations; nobody waits for anybody here.
//!
//! | word | means | who may touch the VMSA page |
//! |---|---|---|
//! | 0 | free | nobody |
//! | claimed | being filled in, or emptied | who has claimed it |
//! | live | on record; the host may run it | whoever has a pin, for a moment |
//! | live, serving | its call is worked on, on its processor | that processor, and pins |
//! | live, deleting | on its way back to the guest | who deletes it, alone |
//!
//! A live one may be *offered* besides: its processor has left it to the host to run this VMSA,
//! and has not come back.
//!
//! Invariants: pins exist only while live; deleting begins only without pins, and not under a
//! call of somebody else; what is not live is not the paravisor's to touch.

use core::sync::atomic::{AtomicU32, Ordering};

/// On record.
const LIVE: u32 = 1 << 0;
/// Its processor works on a call of it.
const SERVING: u32 = 1 << 1;
/// Somebody gives its pages back.
const DELETING: u32 = 1 << 2;
/// Somebody fills the slot in, or empties it.
const CLAIMED: u32 = 1 << 3;
/// Its processor has gone to run it, for the first time perhaps, and has not come back.
const OFFERED: u32 = 1 << 4;
/// One pin. The bits below are the flags; there are never more pins than processors.
const PIN: u32 = 1 << 8;

const _: () = assert!(crate::memory::layout::MAX_VCPUS < (u32::MAX / PIN) as usize);

/// The state of one slot.
#[derive(Debug, Default)]
pub struct Slot(AtomicU32);

/// What a look at a slot found.
#[derive(Debug, PartialEq, Eq)]
pub enum Look<T> {
    /// Nothing on record, or not yet.
    Absent,
    /// A VMSA that is being deleted: it goes soon, or it stays.
    Leaving,
    /// A VMSA on record.
    Here(T),
}

/// Why a deletion cannot begin now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// Nothing on record.
    Absent,
    /// A call of it is worked on.
    Serving,
    /// Somebody else deletes it.
    Deleting,
    /// Somebody looks at it.
    Pinned,
}

/// A live VMSA that cannot be deleted while this lives.
#[derive(Debug)]
pub struct Pin<'s>(&'s Slot);

impl PartialEq for Pin<'_> {
    fn eq(&self, other: &Self) -> bool {
        core::ptr::eq(self.0, other.0)
    }
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(PIN, Ordering::SeqCst);
    }
}

impl Slot {
    /// A free slot.
    #[must_use]
    pub const fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// Claims a free slot; false if it is not.
    pub fn claim(&self) -> bool {
        self.change(|word| if word == 0 { Ok(CLAIMED) } else { Err(()) })
            .is_ok()
    }

    /// Puts a claimed slot on record. Until [`Slot::open`] its processor takes no call from it.
    pub fn publish(&self) {
        self.0.store(LIVE | CLAIMED, Ordering::SeqCst);
    }

    /// Ends the claim of a slot on record.
    pub fn open(&self) {
        self.0.fetch_and(!CLAIMED, Ordering::SeqCst);
    }

    /// What is there at this moment.
    pub fn glance(&self) -> Look<()> {
        Look::of(self.0.load(Ordering::SeqCst))
    }

    /// Leaves it to the host to run the VMSA, until [`Slot::withdraw`]; only its own processor
    /// does. One that is on record but not open yet cannot be run yet: it counts as leaving.
    pub fn offer(&self) -> Look<()> {
        let offered = self.change(|word| match Look::of(word) {
            Look::Here(()) if word & CLAIMED != 0 => Err(Look::Leaving),
            Look::Here(()) => Ok(word | OFFERED),
            nothing => Err(nothing),
        });
        offered.map_or_else(|found| found, Look::Here)
    }

    /// The processor has come back.
    pub fn withdraw(&self) {
        self.0.fetch_and(!OFFERED, Ordering::SeqCst);
    }

    /// Whether the host may be about to run it because its processor asked for that.
    pub fn is_offered(&self) -> bool {
        self.0.load(Ordering::SeqCst) & OFFERED != 0
    }

    /// Whether it is on record, and not on its way out.
    pub fn is_live(&self) -> bool {
        self.glance() == Look::Here(())
    }

    /// Keeps the VMSA on record for a moment.
    pub fn pin(&self) -> Look<Pin<'_>> {
        self.look(|word| Ok(word + PIN)).map(|()| Pin(self))
    }

    /// Begins to work on a call; only its own processor asks.
    pub fn serve(&self) -> Look<()> {
        self.look(|word| match word & (SERVING | CLAIMED) {
            0 => Ok(word | SERVING),
            _ => Err(()),
        })
    }

    /// Ends the work on a call.
    pub fn end_service(&self) {
        self.0.fetch_and(!SERVING, Ordering::SeqCst);
    }

    /// Begins a deletion; `own` says that the deleter is the processor that serves its call.
    ///
    /// # Errors
    /// [`Kept`]; nothing changed.
    pub fn begin_delete(&self, own: bool) -> Result<(), Kept> {
        self.change(|word| {
            let has = |flag: u32| word & flag != 0;
            if !has(LIVE) {
                Err(Kept::Absent)
            } else if has(DELETING) {
                Err(Kept::Deleting)
            } else if has(SERVING) != own {
                Err(Kept::Serving)
            } else if has(CLAIMED) || word >= PIN {
                Err(Kept::Pinned)
            } else {
                Ok(word | DELETING)
            }
        })
    }

    /// Takes a deletion back.
    pub fn undo_delete(&self) {
        self.0.fetch_and(!DELETING, Ordering::SeqCst);
    }

    /// Ends a deletion: nothing is on record, and the slot is claimed until [`Slot::free`].
    pub fn retire(&self) {
        self.0.store(CLAIMED, Ordering::SeqCst);
    }

    /// Frees a claimed slot.
    pub fn free(&self) {
        self.0.store(0, Ordering::SeqCst);
    }

    fn look(&self, next: impl Fn(u32) -> Result<u32, ()>) -> Look<()> {
        let changed = self.change(|word| match Look::of(word) {
            Look::Here(()) => next(word).map_err(|()| Look::Absent),
            nothing => Err(nothing),
        });
        match changed {
            Ok(()) => Look::Here(()),
            Err(found) => found,
        }
    }

    /// One atomic step. It is repeated only when another step came between.
    fn change<E>(&self, next: impl Fn(u32) -> Result<u32, E>) -> Result<(), E> {
        let mut word = self.0.load(Ordering::SeqCst);
        loop {
            let wanted = next(word)?;
            match self
                .0
                .compare_exchange_weak(word, wanted, Ordering::SeqCst, Ordering::SeqCst)
            {
                Ok(_) => return Ok(()),
                Err(now) => word = now,
            }
        }
    }
}

impl Look<()> {
    /// What a slot's word says.
    const fn of(word: u32) -> Self {
        match word & (LIVE | DELETING) {
            LIVE => Self::Here(()),
            0 | DELETING => Self::Absent,
            _ => Self::Leaving,
        }
    }
}

impl<T> Look<T> {
    fn map<U>(self, then: impl FnOnce(T) -> U) -> Look<U> {
        match self {
            Self::Absent => Look::Absent,
            Self::Leaving => Look::Leaving,
            Self::Here(found) => Look::Here(then(found)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live() -> Slot {
        let slot = Slot::new();
        assert!(slot.claim());
        slot.publish();
        slot.open();
        slot
    }

    #[test]
    fn a_slot_is_claimed_by_one() {
        let slot = Slot::new();
        assert!(slot.claim() && !slot.claim());
        assert_eq!(slot.pin(), Look::Absent, "not on record yet");
        slot.publish();
        assert!(
            matches!(slot.pin(), Look::Here(_)),
            "what can run can be flushed"
        );
        assert_eq!(slot.serve(), Look::Absent, "but serves nobody yet");
        assert_eq!(slot.begin_delete(false), Err(Kept::Pinned));
        assert_eq!(
            slot.offer(),
            Look::Leaving,
            "what the host cannot run yet is not offered"
        );
        slot.open();
        assert_eq!(slot.serve(), Look::Here(()));
        assert!(!slot.claim());
        assert!(slot.offer() == Look::Here(()) && slot.is_offered());
        slot.withdraw();
        assert!(!slot.is_offered() && slot.is_live());
    }

    #[test]
    fn nobody_deletes_what_somebody_looks_at() {
        let slot = live();
        let pin = slot.pin();
        assert_eq!(slot.begin_delete(false), Err(Kept::Pinned));
        drop(pin);
        assert_eq!(slot.begin_delete(false), Ok(()));
        assert_eq!(slot.begin_delete(false), Err(Kept::Deleting));
        assert_eq!(slot.pin(), Look::Leaving);
        assert_eq!(slot.serve(), Look::Leaving);
        slot.undo_delete();
        assert!(matches!(slot.pin(), Look::Here(_)));
    }

    #[test]
    fn nobody_deletes_the_state_under_a_call_but_its_caller() {
        let slot = live();
        assert_eq!(slot.begin_delete(true), Err(Kept::Serving));
        assert_eq!(slot.serve(), Look::Here(()));
        assert_eq!(slot.serve(), Look::Absent, "one call at a time");
        assert_eq!(slot.begin_delete(false), Err(Kept::Serving));
        assert!(
            matches!(slot.pin(), Look::Here(_)),
            "a flush reaches it all the same"
        );
        assert_eq!(slot.begin_delete(true), Ok(()));
        slot.retire();
        assert_eq!(slot.pin(), Look::Absent);
        assert_eq!(slot.begin_delete(false), Err(Kept::Absent));
        slot.free();
        assert!(slot.claim());
    }
}
