//! In which order candidates are measured, so that none has a place of its own.
//!
//! What ran before has a part in how long the next takes: caches, memory, the place of the last stores. A
//! rotation would give each candidate the same predecessor for ever. So all orders are gone through, each
//! once, themselves in a shuffled order; then again in another.

use fastrand::Rng;

/// Always the same, so that a run can be repeated.
const SEED: u64 = 0x7475_726E_7374_696C;

/// All orders of `N` candidates, again and again.
pub struct Orders<const N: usize> {
    generator: Rng,
    all: Vec<[usize; N]>,
    /// How many were taken since they were shuffled.
    taken: usize,
}

impl<const N: usize> Orders<N> {
    pub fn new() -> Self {
        let all: Vec<_> = (0..(1..=N).product()).map(nth).collect();
        Self {
            generator: Rng::with_seed(SEED),
            taken: all.len(),
            all,
        }
    }
}

impl<const N: usize> Iterator for Orders<N> {
    type Item = [usize; N];

    fn next(&mut self) -> Option<[usize; N]> {
        if self.taken == self.all.len() {
            self.generator.shuffle(&mut self.all);
            self.taken = 0;
        }
        let order = self.all.get(self.taken).copied();
        self.taken += 1;
        order
    }
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
