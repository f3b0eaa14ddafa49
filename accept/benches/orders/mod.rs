//! In which order candidates are measured, and where their stacks lie, so that none has a place of its own.
//!
//! What ran before has a part in how long the next takes: caches, memory, the place of the last stores. A
//! rotation would give each candidate the same predecessor for ever, and places at a fixed distance would
//! have the one before the other more often than behind it. So all that there are are gone through, each
//! once, in a shuffled sequence; then again in another.

use fastrand::Rng;

/// Always the same, so that a run can be repeated.
const SEED: u64 = 0x7475_726E_7374_696C;

/// The same items again and again, shuffled anew each time.
pub struct Shuffled<T> {
    generator: Rng,
    all: Vec<T>,
    /// How many were taken since they were shuffled.
    taken: usize,
}

impl<T> Shuffled<T> {
    /// Of two with the same items, two `number`s are two sequences.
    pub fn new(number: usize, all: Vec<T>) -> Self {
        Self {
            generator: Rng::with_seed(SEED + number as u64),
            taken: all.len(),
            all,
        }
    }
}

impl<T: Copy> Iterator for Shuffled<T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        if self.taken == self.all.len() {
            self.generator.shuffle(&mut self.all);
            self.taken = 0;
        }
        let item = self.all.get(self.taken).copied();
        self.taken += 1;
        item
    }
}

/// All orders of `N` candidates.
pub fn orders<const N: usize>() -> Vec<[usize; N]> {
    (0..(1..=N).product()).map(nth).collect()
}

/// Order number `number` of `N!`: its digits, to the bases `N` to 1, say which of those left comes next.
fn nth<const N: usize>(mut number: usize) -> [usize; N] {
    let mut left: Vec<usize> = (0..N).collect();
    std::array::from_fn(|_| {
        let digit = number % left.len();
        number /= left.len();
        left.remove(digit)
    })
}
