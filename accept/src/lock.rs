//! The hashed region locks.
//!
//! Invariants:
//! * A block lies in one 2 MiB region, and a region has one lock, so a flow holds exactly one lock
//!   and deadlock is impossible.
//! * Waiting is bounded. The holder may be a vCPU that the host has stopped running; the waiter
//!   then answers "busy" and the guest decides what to do.
//! * The counters of a lock are changed by whoever holds it; that of the waits given up is the
//!   exception and says so.
//!
//! The caller has interrupts off while it is in the engine, so the holder is never interrupted by
//! a waiter on the same vCPU.

use crate::block::Frame;
use crate::counters::Tally;
use crate::sync::{AtomicBool, Ordering, spin_loop};

/// One lock and the counters of the work done under it, in a pair of cache lines of its own.
///
/// The counters of most requests are in the lock's line. Who waits reads that line in a loop, but the
/// holder counts last: it takes the line back for the counter, and then has it for the release.
#[derive(Default)]
#[repr(C, align(128))]
pub struct RegionLock {
    held: AtomicBool,
    /// See [`Guard::distrust`].
    distrusted: AtomicBool,
    tally: Tally,
}

const _: () = assert!(cfg!(loom) || size_of::<RegionLock>() == 128);

impl RegionLock {
    /// A lock that nobody holds.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            held: AtomicBool::new(false),
            distrusted: AtomicBool::new(false),
            tally: Tally::new(),
        }
    }

    /// Takes the lock if nobody holds it.
    #[inline]
    fn try_lock(&self) -> bool {
        // The plain read first: a failed exchange would take the line from the holder.
        !self.held.load(Ordering::Relaxed)
            && self
                .held
                .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
    }
}

/// The array of locks that all regions share.
#[derive(Clone, Copy)]
pub struct RegionLocks<'m> {
    locks: &'m [RegionLock],
    /// What is left of a hash after shifting by this is an index of a lock.
    shift: u32,
    spin_limit: u32,
}

/// The number of locks given to [`RegionLocks::try_new`] is not a power of two of at least
/// [`RegionLocks::MINIMUM`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadLockCount(pub usize);

impl<'m> RegionLocks<'m> {
    /// The fewest locks.
    pub const MINIMUM: usize = 64;

    /// How often a waiter looks at a held lock before it gives up. Several times what a 2 MiB
    /// block costs when each of its pages is a trip to the host.
    pub const SPIN_LIMIT: u32 = 0x10_0000;

    /// How many locks suit a VM of `vcpus`: a power of two, at least four per vCPU, so that two
    /// vCPUs at work on different regions seldom meet.
    #[must_use]
    pub fn count_for(vcpus: usize) -> usize {
        vcpus
            .saturating_mul(4)
            .max(Self::MINIMUM)
            .checked_next_power_of_two()
            .unwrap_or(1 << 20)
    }

    /// Uses `locks` as the array.
    ///
    /// # Errors
    /// [`BadLockCount`] unless their number is a power of two, [`Self::MINIMUM`] or more.
    pub fn try_new(locks: &'m [RegionLock]) -> Result<Self, BadLockCount> {
        if locks.len() < Self::MINIMUM || !locks.len().is_power_of_two() {
            return Err(BadLockCount(locks.len()));
        }
        Ok(Self {
            locks,
            shift: u64::BITS - locks.len().trailing_zeros(),
            spin_limit: Self::SPIN_LIMIT,
        })
    }

    /// The same locks with another bound on waiting.
    #[must_use]
    pub const fn with_spin_limit(mut self, looks: u32) -> Self {
        self.spin_limit = looks;
        self
    }

    /// All locks, to sum up their counters.
    pub(crate) fn tallies(&self) -> impl Iterator<Item = &'m Tally> + use<'m> {
        self.locks.iter().map(|lock| &lock.tally)
    }

    /// Locks the region around `frame`; `None` when the wait became too long.
    #[inline]
    pub(crate) fn lock(&self, frame: Frame) -> Option<Guard<'m>> {
        self.take(self.of(frame))
    }

    /// Takes a lock; `None` when the wait became too long.
    #[inline]
    pub(crate) fn take(&self, lock: &'m RegionLock) -> Option<Guard<'m>> {
        if lock.try_lock() {
            return Some(Guard { lock });
        }
        for _ in 0..self.spin_limit {
            spin_loop();
            if lock.try_lock() {
                lock.tally.contended.add(1);
                return Some(Guard { lock });
            }
        }
        lock.tally.busy.add_unlocked(1);
        None
    }

    /// The lock of the region around `frame`.
    #[inline]
    pub(crate) fn of(&self, frame: Frame) -> &'m RegionLock {
        &self.locks[(hash(frame.region_number()) >> self.shift) as usize]
    }
}

/// Spreads neighbours as well as regions a large stride apart over the top bits: a product with
/// 2^64 / golden ratio.
#[inline]
const fn hash(region_number: u64) -> u64 {
    region_number.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// A held lock; dropping it releases the lock.
#[must_use = "the region is only locked while the guard lives"]
pub(crate) struct Guard<'m> {
    lock: &'m RegionLock,
}

impl<'m> Guard<'m> {
    /// The counters that this lock protects.
    #[inline]
    pub(crate) fn tally(&self) -> &'m Tally {
        &self.lock.tally
    }

    /// Remembers, for ever, that a flow failed after it had taken pages from the guest, so that
    /// nobody may conclude from the map alone that they are out of everybody's reach.
    pub(crate) fn distrust(&self) {
        self.lock.distrusted.store(true, Ordering::Relaxed);
    }

    /// Whether that has happened under this lock.
    pub(crate) fn is_distrusted(&self) -> bool {
        self.lock.distrusted.load(Ordering::Relaxed)
    }
}

impl Drop for Guard<'_> {
    #[inline]
    fn drop(&mut self) {
        self.lock.held.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(gpa: u64) -> Frame {
        Frame::containing(gpa)
    }

    #[test]
    fn only_a_power_of_two_from_64_up_is_taken() {
        let locks = [const { RegionLock::new() }; 130];
        for (count, good) in [
            (0, false),
            (32, false),
            (64, true),
            (96, false),
            (128, true),
        ] {
            assert_eq!(
                RegionLocks::try_new(&locks[..count]).is_ok(),
                good,
                "{count}"
            );
        }
        assert_eq!(RegionLocks::count_for(1), 64);
        assert_eq!(RegionLocks::count_for(17), 128);
        assert_eq!(RegionLocks::count_for(usize::MAX), 1 << 20);
    }

    #[test]
    fn i12_waiting_is_bounded_and_counted() {
        let locks = [const { RegionLock::new() }; 64];
        let locks = RegionLocks::try_new(&locks)
            .expect("good")
            .with_spin_limit(10);
        let guard = locks.lock(frame(0x20_0000)).expect("free");
        assert!(
            locks.lock(frame(0x3f_f000)).is_none(),
            "same region, same lock"
        );
        assert!(
            locks.lock(frame(0x40_0000)).is_some(),
            "a neighbour has another lock"
        );
        drop(guard);
        assert!(locks.lock(frame(0x20_0000)).is_some());
        assert_eq!(locks.of(frame(0x20_0000)).tally.busy.get(), 1);
    }

    #[test]
    fn neighbours_and_strides_spread_over_the_locks() {
        for stride in [1, 64, 512, 1 << 18] {
            let mut used = [false; 64];
            for n in 0..256 {
                used[(hash(n * stride) >> (u64::BITS - 6)) as usize] = true;
            }
            let spread = used.iter().filter(|used| **used).count();
            assert!(spread >= 48, "stride {stride}: {spread} of 64 locks");
        }
    }
}
