//! The virtual APIC of one of the guest's processors: how an interrupt that L1 has taken becomes the
//! guest's.
//!
//! L1 posts: it sets the vector in IRR and raises RVI, the part of the interrupt status that the enter
//! state carries. The processor does the rest by itself when the guest runs (virtual-interrupt delivery,
//! SDM volume 3, chapter 31): delivery by priority, TPR, EOI, self-IPI. So between two stays of the guest
//! IRR, ISR, RVI and SVI are as the processor left them, and only [`VirtualApic::post`] and
//! [`VirtualApic::take_back`] change them.
//!
//! All interrupts are edges: TMR and the EOI-exit bitmap stay 0 (decision 026).

use core::sync::atomic::{AtomicU32, Ordering};

use protocols::addr::PAGE_SIZE;
use protocols::tdx::vmcs::apic;

/// The first vector that is an interrupt's; those below are exceptions.
pub const FIRST_VECTOR: u8 = 32;

/// A vector below [`FIRST_VECTOR`], which nobody may post.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IsException;

/// Guest interrupt status: the highest vector that is requested (RVI) and that is in service (SVI); 0 for
/// none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct InterruptStatus {
    requested: u8,
    in_service: u8,
}

impl InterruptStatus {
    const fn decode(field: u16) -> Self {
        let [requested, in_service] = field.to_le_bytes();
        Self {
            requested,
            in_service,
        }
    }

    const fn encode(self) -> u16 {
        u16::from_le_bytes([self.requested, self.in_service])
    }
}

/// A virtual-APIC page. The processor changes it while the guest runs, L1 in between; both on the
/// processor that it belongs to, so no order is asked of the accesses.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct VirtualApic {
    words: [AtomicU32; PAGE_SIZE as usize / size_of::<u32>()],
}

const _: () = assert!(size_of::<VirtualApic>() == PAGE_SIZE as usize);

impl VirtualApic {
    /// An APIC without any interrupt, as after a reset.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            words: [const { AtomicU32::new(0) }; PAGE_SIZE as usize / size_of::<u32>()],
        }
    }

    /// Requests an interrupt; the new interrupt status.
    ///
    /// # Errors
    ///
    /// [`IsException`]: nothing has changed.
    pub fn post(&self, status: u16, vector: u8) -> Result<u16, IsException> {
        if vector < FIRST_VECTOR {
            return Err(IsException);
        }
        self.change(apic::IRR, vector, true);
        Ok(self.status_with(status, |status| {
            status.requested = status.requested.max(vector);
        }))
    }

    /// Makes an interrupt that was delivered, but has not reached its handler, a requested one again; the
    /// new interrupt status.
    #[must_use]
    pub fn take_back(&self, status: u16, vector: u8) -> u16 {
        self.change(apic::ISR, vector, false);
        self.change(apic::IRR, vector, true);
        self.status_with(status, |status| {
            status.requested = status.requested.max(vector);
            status.in_service = self.highest(apic::ISR);
        })
    }

    /// Whether an interrupt waits that task priority and service in progress let through. RFLAGS.IF is
    /// the guest's own affair.
    #[must_use]
    pub fn is_deliverable(&self, status: u16) -> bool {
        const fn class(priority: u8) -> u8 {
            priority >> 4
        }
        let status = InterruptStatus::decode(status);
        // PPR in the page is as old as the guest's last stay.
        let priority = class(self.task_priority()).max(class(status.in_service));
        class(status.requested) > priority
    }

    fn status_with(&self, status: u16, change: impl FnOnce(&mut InterruptStatus)) -> u16 {
        let mut status = InterruptStatus::decode(status);
        change(&mut status);
        status.encode()
    }

    fn task_priority(&self) -> u8 {
        self.word(apic::TPR)
            .map_or(0, |word| word.load(Ordering::Relaxed) as u8)
    }

    /// The word at an offset; there is one for every offset that this module makes.
    fn word(&self, offset: u64) -> Option<&AtomicU32> {
        self.words.get(offset as usize / size_of::<u32>())
    }

    fn change(&self, base: u64, vector: u8, set: bool) {
        let (offset, bit) = apic::bit(vector);
        let Some(word) = self.word(base + offset) else {
            return;
        };
        if set {
            word.fetch_or(1 << bit, Ordering::Relaxed);
        } else {
            word.fetch_and(!(1 << bit), Ordering::Relaxed);
        }
    }

    /// The highest vector of ISR or IRR; 0 if there is none.
    fn highest(&self, base: u64) -> u8 {
        (0..=u8::MAX)
            .rev()
            .find(|&vector| {
                let (offset, bit) = apic::bit(vector);
                self.word(base + offset)
                    .is_some_and(|word| word.load(Ordering::Relaxed) >> bit & 1 != 0)
            })
            .unwrap_or(0)
    }
}

impl Default for VirtualApic {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    /// The processor's part of virtual-interrupt delivery, as far as the tests need it.
    impl VirtualApic {
        fn set_task_priority(&self, value: u8) {
            self.word(apic::TPR)
                .unwrap()
                .store(value.into(), Ordering::Relaxed);
        }

        /// Delivers what RVI says, if it may.
        fn deliver(&self, status: u16) -> Option<(u8, u16)> {
            if !self.is_deliverable(status) {
                return None;
            }
            let vector = InterruptStatus::decode(status).requested;
            self.change(apic::IRR, vector, false);
            self.change(apic::ISR, vector, true);
            let status = InterruptStatus {
                requested: self.highest(apic::IRR),
                in_service: vector,
            };
            Some((vector, status.encode()))
        }

        fn end(&self, status: u16) -> u16 {
            let vector = InterruptStatus::decode(status).in_service;
            self.change(apic::ISR, vector, false);
            self.status_with(status, |status| {
                status.in_service = self.highest(apic::ISR);
            })
        }
    }

    #[test]
    fn what_is_posted_is_delivered_by_priority() {
        let apic = VirtualApic::new();
        let mut status = 0;
        assert!(!apic.is_deliverable(status));
        for vector in [0x31, 0x61, 0x45, 0x61] {
            status = apic.post(status, vector).unwrap();
        }
        assert_eq!(status, 0x0061);
        let mut seen = Vec::new();
        while let Some((vector, after)) = apic.deliver(status) {
            seen.push(vector);
            // Of a lower class: it waits for the end of the service.
            assert!(!apic.is_deliverable(after));
            status = apic.end(after);
        }
        assert_eq!(seen, [0x61, 0x45, 0x31]);
        assert_eq!(status, 0);
    }

    #[test]
    fn a_higher_class_interrupts_a_service_and_an_equal_one_does_not() {
        let apic = VirtualApic::new();
        let status = apic.post(0, 0x52).unwrap();
        let (_, status) = apic.deliver(status).unwrap();
        let status = apic.post(status, 0x5F).unwrap();
        assert_eq!(status, 0x525F);
        assert!(!apic.is_deliverable(status));
        let status = apic.post(status, 0x60).unwrap();
        let (vector, status) = apic.deliver(status).unwrap();
        assert_eq!((vector, status), (0x60, 0x605F));
        let status = apic.end(status);
        assert_eq!(status, 0x525F);
        assert_eq!(apic.deliver(apic.end(status)), Some((0x5F, 0x5F00)));
    }

    #[test]
    fn the_task_priority_holds_back() {
        let apic = VirtualApic::new();
        let status = apic.post(0, 0x4F).unwrap();
        apic.set_task_priority(0x40);
        assert!(!apic.is_deliverable(status));
        apic.set_task_priority(0x3F);
        assert!(apic.is_deliverable(status));
    }

    /// Exceptions are the processor's: no interrupt can pretend to be one.
    #[test]
    fn exceptions_are_refused() {
        let apic = VirtualApic::new();
        for vector in 0..FIRST_VECTOR {
            assert_eq!(apic.post(0, vector), Err(IsException));
        }
        assert_eq!(apic.highest(apic::IRR), 0);
        for vector in FIRST_VECTOR..=u8::MAX {
            assert_eq!(apic.post(0, vector), Ok(vector.into()));
        }
    }

    #[test]
    fn a_delivery_that_did_not_happen_is_taken_back() {
        let apic = VirtualApic::new();
        let status = apic.post(0, 0x35).unwrap();
        let (_, status) = apic.deliver(status).unwrap();
        let status = apic.post(status, 0x81).unwrap();
        let (vector, status) = apic.deliver(status).unwrap();
        let status = apic.take_back(status, vector);
        assert_eq!(status, 0x3581);
        assert_eq!(apic.deliver(status), Some((0x81, 0x8100)));
    }
}
