//! Which regions the guest gave pages of back to the host.
//!
//! To the map a page that was given back is Unaccepted like one that nobody asked for yet. To who
//! accepts ahead of the guest the two differ: behind the first, the host may have put a page that
//! guest and host share, and to make that private again would take it from them. So a region of
//! which the guest ever gave a page back is left to the guest.
//!
//! Invariant: a flag is set and read under its region's lock, and never cleared. The 64 flags of
//! one word have different locks, so they are set by an atomic read-modify-write.

use crate::sync::{AtomicU64, Ordering};

/// The flags of 64 regions. All bytes zero is a valid value: nothing was given back.
#[derive(Default)]
#[repr(transparent)]
pub struct GivenBack(AtomicU64);

impl GivenBack {
    /// Flags that are not set.
    #[must_use]
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// How many are needed for so many regions.
    #[must_use]
    pub const fn needed(regions: usize) -> usize {
        regions.div_ceil(u64::BITS as usize)
    }

    /// The flag of the region at `index`, if there are flags.
    pub(crate) fn flag(flags: &[Self], index: usize) -> Option<Flag<'_>> {
        Some(Flag {
            word: &flags.get(index / u64::BITS as usize)?.0,
            bit: 1 << (index % u64::BITS as usize),
        })
    }
}

/// The flag of one region.
pub(crate) struct Flag<'m> {
    word: &'m AtomicU64,
    bit: u64,
}

impl Flag<'_> {
    /// Remembers that the guest gave back a page. The caller holds the region's lock.
    pub(crate) fn set(&self) {
        // The plain read first: regions are given back many times, and 64 share the line.
        if !self.is_set() {
            self.word.fetch_or(self.bit, Ordering::Relaxed);
        }
    }

    /// Whether the guest ever gave back a page. The caller holds the region's lock.
    pub(crate) fn is_set(&self) -> bool {
        self.word.load(Ordering::Relaxed) & self.bit != 0
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn every_region_has_a_flag_of_its_own() {
        let flags = [const { GivenBack::new() }; 2];
        let set = |index| GivenBack::flag(&flags, index).expect("in range").is_set();
        for index in 0..128 {
            assert!(!set(index));
            GivenBack::flag(&flags, index).expect("in range").set();
            assert!(set(index));
        }
        assert!(GivenBack::flag(&flags, 128).is_none());
        assert_eq!((GivenBack::needed(64), GivenBack::needed(65)), (1, 2));
    }
}
