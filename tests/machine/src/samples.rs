//! Accepted memory over time, in a bounded number of samples.
//!
//! Invariant: the samples span everything since the first one, at a distance that doubles each
//! time they fill their room.

use alloc::vec::Vec;

use protocols::report::Sample;

/// Samples kept at most.
pub const MAX_SAMPLES: usize = 512;

/// Ticks between two samples at first: less than an instruction takes in the machine.
const FIRST_DISTANCE: u64 = 1 << 12;

/// The samples.
pub struct Samples {
    kept: Vec<Sample>,
    distance: u64,
}

impl Default for Samples {
    fn default() -> Self {
        Self {
            kept: Vec::new(),
            distance: FIRST_DISTANCE,
        }
    }
}

impl Samples {
    /// Takes a sample unless the last one is too recent. `tsc` may come from another processor
    /// and lie a little behind.
    pub fn offer(&mut self, sample: Sample) {
        let due = self
            .kept
            .last()
            .is_none_or(|last| sample.tsc.saturating_sub(last.tsc) >= self.distance);
        if !due {
            return;
        }
        if self.kept.len() == MAX_SAMPLES {
            let mut index = 0;
            self.kept.retain(|_| {
                index += 1;
                index % 2 == 1
            });
            self.distance *= 2;
        }
        self.kept.push(sample);
    }

    /// The samples and one more for the end, oldest first.
    pub fn report(&self, end: Sample) -> Vec<Sample> {
        let mut samples = self.kept.clone();
        if samples.len() == MAX_SAMPLES {
            samples.pop();
        }
        if samples.last().is_none_or(|last| last.tsc < end.tsc) {
            samples.push(end);
        }
        samples
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample(tsc: u64) -> Sample {
        Sample {
            tsc,
            validated_bytes: tsc / 2,
        }
    }

    proptest! {
        #[test]
        fn samples_are_bounded_ordered_and_span_the_run(
            steps in prop::collection::vec(0u64..40_000, 1..3000),
        ) {
            let mut samples = Samples::default();
            let mut tsc = 7;
            for step in steps {
                tsc += step;
                samples.offer(sample(tsc));
            }
            let kept = samples.report(sample(tsc + 1));
            prop_assert!(kept.len() <= MAX_SAMPLES);
            prop_assert!(kept.is_sorted_by(|a, b| a.tsc < b.tsc));
            prop_assert_eq!(kept.last(), Some(&sample(tsc + 1)));
            // A gap is at most one distance and one step long, and doubles with the distance; the
            // sample that made room for the end leaves one that is twice as long.
            let widest = kept.windows(2).map(|pair| pair[1].tsc - pair[0].tsc).max();
            let doubled = samples.distance / FIRST_DISTANCE;
            prop_assert!(widest.unwrap_or(0) <= 2 * doubled * (FIRST_DISTANCE + 40_000));
            for kept in kept {
                prop_assert_eq!(kept.validated_bytes, kept.tsc / 2);
            }
        }
    }

    #[test]
    fn a_long_run_thins_its_samples_out() {
        let mut samples = Samples::default();
        for n in 0..100_000 {
            samples.offer(sample(n * FIRST_DISTANCE));
        }
        let kept = samples.report(sample(u64::MAX));
        assert!(kept.len() > MAX_SAMPLES / 4 && kept.len() <= MAX_SAMPLES);
        assert_eq!(kept[0], sample(0));
    }
}
