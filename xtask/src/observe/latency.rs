//! What a histogram of durations can tell.

use protocols::report::Histogram;

/// First duration behind bucket `index`: a power of two ticks.
pub fn bucket_end(index: usize) -> u64 {
    u32::try_from(index + 1)
        .ok()
        .and_then(|shift| 1_u64.checked_shl(shift))
        .unwrap_or(u64::MAX)
}

/// A number of ticks that the share `part` of all durations did not exceed: the end of their
/// bucket, or the longest duration if that is less. None if there are no durations.
pub fn quantile<'a>(histograms: impl Iterator<Item = &'a Histogram>, part: f64) -> Option<u64> {
    let mut sums: Vec<u64> = Vec::new();
    let (mut count, mut longest) = (0, 0);
    for histogram in histograms {
        count += histogram.count;
        longest = longest.max(histogram.max);
        sums.resize(sums.len().max(histogram.buckets.len()), 0);
        for (sum, bucket) in sums.iter_mut().zip(&histogram.buckets) {
            *sum += bucket;
        }
    }
    if count == 0 {
        return None;
    }
    let wanted = (count as f64 * part).ceil() as u64;
    let mut seen = 0;
    let bucket = sums.iter().position(|sum| {
        seen += sum;
        seen >= wanted
    });
    Some(bucket.map_or(longest, |index| bucket_end(index).min(longest)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_the_end_of_its_bucket() {
        let of = |buckets: &[u64], max| Histogram {
            count: buckets.iter().sum(),
            max,
            buckets: buckets.to_vec(),
            ..Histogram::default()
        };
        let (low, high) = (of(&[0, 50, 49], 7), of(&[0, 0, 0, 0, 0, 0, 1], 100));
        let quantile = |part| quantile([&low, &high].into_iter(), part);
        assert_eq!(quantile(0.5), Some(4));
        assert_eq!(quantile(0.99), Some(8));
        assert_eq!(quantile(1.0), Some(100));
        assert_eq!(super::quantile([&of(&[], 0)].into_iter(), 0.5), None);
        assert_eq!(bucket_end(0), 2);
        assert_eq!(bucket_end(63), u64::MAX);
    }
}
