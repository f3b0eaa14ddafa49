//! The synchronisation primitives the crate is built on, in one place, so that a model checker's
//! own atomics can stand in for `core`'s without touching the code under test.
//!
//! With `--cfg loom` the [loom] model checker takes the processor's place: it runs the engine's
//! real code through every interleaving, and lets a load return every value that the memory model
//! allows. See `tests/interleavings`.
//!
//! [loom]: https://docs.rs/loom

#[cfg(not(loom))]
pub(crate) use core::{
    hint::spin_loop,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

#[cfg(loom)]
pub(crate) use checked::{AtomicBool, AtomicU64, Ordering, spin_loop};

#[cfg(loom)]
mod checked {
    use std::sync::OnceLock;

    pub(crate) use loom::sync::atomic::Ordering;

    /// Who waits lets the others go on: only they can end the wait.
    pub(crate) fn spin_loop() {
        loom::thread::yield_now();
    }

    /// One of loom's atomics, made at its first use: loom's own cannot be made in a constant, as
    /// the engine makes its regions and locks.
    ///
    /// Beside it lies a second one, which each load touches first. Loom decides what may be swapped by
    /// the last access to an atomic alone, and a load does not count against another load. Where a
    /// thread looks without the lock, and the other loads the word once more before it stores to it,
    /// the store would be held against that load, and the look would never be tried after the store.
    macro_rules! atomic {
        ($name:ident, $value:ty) => {
            pub(crate) struct $name {
                initial: $value,
                cell: OnceLock<(loom::sync::atomic::$name, loom::sync::atomic::AtomicBool)>,
            }

            impl $name {
                pub(crate) const fn new(initial: $value) -> Self {
                    Self {
                        initial,
                        cell: OnceLock::new(),
                    }
                }

                fn cells(&self) -> &(loom::sync::atomic::$name, loom::sync::atomic::AtomicBool) {
                    self.cell.get_or_init(|| {
                        (
                            loom::sync::atomic::$name::new(self.initial),
                            loom::sync::atomic::AtomicBool::new(false),
                        )
                    })
                }

                fn cell(&self) -> &loom::sync::atomic::$name {
                    &self.cells().0
                }

                #[track_caller]
                pub(crate) fn load(&self, order: Ordering) -> $value {
                    let (cell, looked) = self.cells();
                    if order == Ordering::Acquire {
                        looked.swap(true, Ordering::Relaxed);
                    }
                    cell.load(order)
                }

                #[track_caller]
                pub(crate) fn store(&self, value: $value, order: Ordering) {
                    self.cell().store(value, order);
                }
            }

            impl Default for $name {
                fn default() -> Self {
                    Self::new(<$value>::default())
                }
            }
        };
    }

    atomic!(AtomicBool, bool);
    atomic!(AtomicU64, u64);

    impl AtomicU64 {
        #[track_caller]
        pub(crate) fn fetch_or(&self, bits: u64, order: Ordering) -> u64 {
            self.cell().fetch_or(bits, order)
        }

        #[track_caller]
        pub(crate) fn fetch_add(&self, n: u64, order: Ordering) -> u64 {
            self.cell().fetch_add(n, order)
        }

        #[track_caller]
        pub(crate) fn fetch_update(
            &self,
            set: Ordering,
            fetch: Ordering,
            change: impl FnMut(u64) -> Option<u64>,
        ) -> Result<u64, u64> {
            self.cell().fetch_update(set, fetch, change)
        }
    }

    impl AtomicBool {
        #[track_caller]
        pub(crate) fn compare_exchange(
            &self,
            current: bool,
            new: bool,
            success: Ordering,
            failure: Ordering,
        ) -> Result<bool, bool> {
            self.cell().compare_exchange(current, new, success, failure)
        }
    }
}
