//! Sets of interrupt vectors: what a processor's handlers have taken and its loop has not asked for yet.

use core::sync::atomic::{AtomicU64, Ordering};

/// Words of a set.
const WORDS: usize = 4;

/// A set of vectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vectors([u64; WORDS]);

impl Vectors {
    /// Its vectors, lowest first.
    pub fn iter(self) -> impl Iterator<Item = u8> {
        (0..=u8::MAX)
            .filter(move |&vector| self.0[usize::from(vector / 64)] >> (vector % 64) & 1 != 0)
    }
}

/// A set that an interrupt handler adds to and the interrupted loop empties. Both are on one processor.
#[derive(Debug, Default)]
pub struct Taken([AtomicU64; WORDS]);

impl Taken {
    /// Nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self([const { AtomicU64::new(0) }; WORDS])
    }

    /// Adds a vector.
    pub fn insert(&self, vector: u8) {
        self.0[usize::from(vector / 64)].fetch_or(1 << (vector % 64), Ordering::Relaxed);
    }

    /// What there is; nothing afterwards.
    pub fn empty(&self) -> Vectors {
        Vectors(core::array::from_fn(|word| {
            self.0[word].swap(0, Ordering::Relaxed)
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    #[test]
    fn what_was_taken_is_told_once() {
        let taken = Taken::new();
        for vector in [255, 32, 63, 64, 32, 200] {
            taken.insert(vector);
        }
        let vectors: Vec<u8> = taken.empty().iter().collect();
        assert_eq!(vectors, [32, 63, 64, 200, 255]);
        assert_eq!(taken.empty(), Vectors::default());
    }
}
