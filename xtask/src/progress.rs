//! Progress on standard error: what is being done now and how long each step took.
//!
//! Owns the look of every step of `xtask`. On a terminal a step is a spinner (or a bar when its size
//! is known) that is replaced by one line with its time; elsewhere (CI, a pipe) each step is one
//! plain line when it ends, so that a log holds no control characters. Standard output is never
//! touched: it belongs to the command's result (`run --exec`).

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// How often a spinner turns.
const TICK: Duration = Duration::from_millis(100);

/// One step under way. Dropped without [`Step::done`] it vanishes silently: the error that ended it
/// is printed by `main`.
#[must_use]
pub struct Step {
    title: String,
    started: Instant,
    bar: Option<ProgressBar>,
}

/// Begins a step of unknown size.
pub fn step(title: impl Into<String>) -> Step {
    let title = title.into();
    let bar = std::io::stderr().is_terminal().then(|| {
        let bar =
            ProgressBar::new_spinner().with_style(style("{spinner} {prefix} {msg} ({elapsed})"));
        bar.set_prefix(title.clone());
        bar.enable_steady_tick(TICK);
        bar
    });
    Step {
        title,
        started: Instant::now(),
        bar,
    }
}

/// Begins a step that moves `bytes` bytes.
pub fn transfer(title: impl Into<String>, bytes: u64) -> Step {
    let step = step(title);
    if let Some(bar) = &step.bar {
        bar.set_length(bytes);
        bar.set_style(style(
            "{spinner} {prefix} [{bar:24}] {bytes}/{total_bytes} ({elapsed})",
        ));
    }
    step
}

impl Step {
    /// Shows what the step is doing at the moment; on a terminal only.
    pub fn note(&self, detail: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(detail.to_owned());
        }
    }

    /// Prints a line above the spinner.
    pub fn line(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None => eprintln!("{line}"),
        }
    }

    /// Shows how many bytes have been moved; on a terminal only.
    pub fn at(&self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(bytes);
        }
    }

    /// Ends the step: one line with `outcome` and the time it took.
    pub fn done(self, outcome: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let seconds = self.started.elapsed().as_secs_f64();
        let gap = if outcome.is_empty() { "" } else { ": " };
        eprintln!("  {}{gap}{outcome} ({seconds:.1} s)", self.title);
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A style from a template that is part of this file; the default style if indicatif disagrees.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
