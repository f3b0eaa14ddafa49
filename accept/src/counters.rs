//! What happened, for reports. Counting decides nothing, which is why a model checker need not
//! follow it: these are `core`'s atomics even where `crate::sync` has others.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::block::PageSize;

/// One counter of a lock.
#[derive(Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Adds under the lock that the counter belongs to: no atomic read-modify-write is needed.
    #[inline]
    pub(crate) fn add(&self, n: u64) {
        self.0.store(
            self.0.load(Ordering::Relaxed).wrapping_add(n),
            Ordering::Relaxed,
        );
    }

    /// Adds without the lock. A counter is used with this or with [`Count::add`], never both.
    #[inline]
    pub(crate) fn add_unlocked(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])+ $name:ident,)+) => {
        /// The counters of one lock. In this order, so that those of most requests are beside it.
        #[derive(Default)]
        #[repr(C)]
        pub(crate) struct Tally {
            $(pub(crate) $name: Count,)+
        }

        impl Tally {
            pub(crate) const fn new() -> Self {
                Self { $($name: Count::new(),)+ }
            }
        }

        /// The engine's counters at one moment. While others are at work the fields need not fit
        /// together exactly.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Counters {
            $($(#[$doc])+ pub $name: u64,)+
        }

        impl Counters {
            /// Bytes that became the guest's. A request for one page need not count them: it is accepted
            /// only if that page changes hands.
            #[must_use]
            pub fn accepted_bytes(&self) -> u64 {
                let small = self.accepted_4k.wrapping_mul(PageSize::Size4K.bytes());
                small.wrapping_add(self.accepted_2m_bytes)
            }

            /// Adds what one lock has counted.
            pub(crate) fn absorb(&mut self, tally: &Tally) {
                $(self.$name = self.$name.wrapping_add(tally.$name.get());)+
            }
        }
    };
}

counters! {
    /// Requests for a 4 KiB page that were accepted.
    accepted_4k,
    /// Requests for a 2 MiB block that were accepted.
    accepted_2m,
    /// Bytes that became the guest's by these: pages of a block that already were are not counted.
    accepted_2m_bytes,
    /// Bytes that became the guest's, by requests of either size, and had been made ready before the guest asked.
    claimed_bytes,
    /// Bytes that were made ready before the guest asked.
    prepared_bytes,
    /// Requests for a 4 KiB page that were rescinded.
    rescinded_4k,
    /// Requests for a 2 MiB block that were rescinded.
    rescinded_2m,
    /// Bytes that ceased to be the guest's.
    rescinded_bytes,
    /// Large operations that the platform could only do in small pages.
    splits,
    /// Contradictions between map and hardware: the host lied.
    host_lies,
    /// Requests that failed in an instruction.
    failures,
    /// Locks that were taken only after a wait.
    contended,
    /// Waits given up.
    busy,
}
