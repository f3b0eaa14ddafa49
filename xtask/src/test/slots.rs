//! How many scenarios run at the same time.
//!
//! A machine keeps one thread of QEMU busy for each of its virtual processors. Scenarios begin in
//! their order, each as soon as there are enough free processors for it; one that wants more than
//! there are gets them all.

use std::sync::{Condvar, Mutex, MutexGuard};
use std::thread;

/// More machines at a time would not fit into memory.
const MOST: u32 = 8;

/// The processors of this machine, to be given to scenarios.
pub struct Slots {
    all: u32,
    free: Mutex<u32>,
    given_back: Condvar,
}

/// Processors given to a scenario, until dropped.
#[must_use]
pub struct Held<'a> {
    slots: &'a Slots,
    count: u32,
}

impl Slots {
    /// As many as this machine has processors.
    pub fn of_this_machine() -> Slots {
        let count = thread::available_parallelism().map_or(1, |count| count.get());
        Slots::new(u32::try_from(count).unwrap_or(MOST).clamp(1, MOST))
    }

    fn new(all: u32) -> Slots {
        Slots {
            all,
            free: Mutex::new(all),
            given_back: Condvar::new(),
        }
    }

    /// Waits until `weight` processors are free, or all if there are fewer.
    pub fn take(&self, weight: u32) -> Held<'_> {
        let count = weight.clamp(1, self.all);
        let mut free = self.free();
        while *free < count {
            free = self
                .given_back
                .wait(free)
                .unwrap_or_else(|poison| poison.into_inner());
        }
        *free -= count;
        Held { slots: self, count }
    }

    fn free(&self) -> MutexGuard<'_, u32> {
        // The number is right at any time: a panic of another thread does not spoil it.
        self.free
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        *self.slots.free() += self.count;
        self.slots.given_back.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::thread;

    use super::Slots;

    #[test]
    fn what_is_held_at_any_time_is_no_more_than_there_is() {
        let slots = Slots::new(3);
        let busy = AtomicU32::new(0);
        thread::scope(|scope| {
            for weight in [1, 2, 8, 1, 3, 2, 1, 0, 4] {
                let held = slots.take(weight);
                let weight = weight.clamp(1, 3);
                let now = busy.fetch_add(weight, Ordering::SeqCst) + weight;
                assert!(now <= 3, "{now}");
                let busy = &busy;
                scope.spawn(move || {
                    thread::yield_now();
                    busy.fetch_sub(weight, Ordering::SeqCst);
                    drop(held);
                });
            }
        });
        assert_eq!(*slots.free(), 3);
    }
}
