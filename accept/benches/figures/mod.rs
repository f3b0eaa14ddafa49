//! How the benches measure and tell: one line per figure, which people can read and
//! `cargo xtask bench` does.
//!
//! ```text
//! figure | NAME | VALUE | UNIT | at most LIMIT
//! ```

#![allow(dead_code, reason = "each bench uses some of it")]

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// What a figure has to be.
#[derive(Clone, Copy)]
pub enum Limit {
    /// It is told for its own sake.
    None,
    /// This or less.
    AtMost(f64),
    /// This or more.
    AtLeast(f64),
}

/// Tells a figure.
pub fn figure(name: &str, value: f64, unit: &str, limit: Limit) {
    let limit = match limit {
        Limit::None => String::new(),
        Limit::AtMost(limit) => format!("at most {limit}"),
        Limit::AtLeast(limit) => format!("at least {limit}"),
    };
    println!("figure | {name:<44} | {value:>12.4} | {unit:<8} | {limit}");
}

/// The value that a share `q` (0 to 1) of the values lies below.
pub fn quantile(values: &[f64], q: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    values
        .get((last as f64 * q).round() as usize)
        .copied()
        .unwrap_or(f64::NAN)
}

/// The middle one.
pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// How long the calling thread was on a processor. On a machine that others use, too, this counts
/// what the work takes, and not how long it had to wait for a processor.
pub fn thread_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// The value behind an option on the command line.
pub fn option(name: &str) -> Option<String> {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    arguments.nth(1)
}
