//! The table of cases and how a run is told to the outside.
//!
//! Output, one line each, read by `tests/e2e`:
//!
//! ```text
//! case NAME ... ok
//! case NAME ... FAIL: WHAT: got GOT, want WANT (ROW)
//! N passed, N failed
//! ```
//!
//! Numbers in GOT and WANT are hexadecimal. ROW names the row of the fact sheet that the case
//! checks, so that a failure can be judged without reading the case.

use core::fmt::{self, Debug, Write};

use crate::text::Text;

/// One thing to check.
#[derive(Clone, Copy)]
pub struct Case {
    /// Unique name, `snake_case`.
    pub name: &'static str,
    /// Sheet, section and row of the rule checked.
    pub row: &'static str,
    /// The check.
    pub run: fn() -> Verdict,
}

/// A line of a table.
#[must_use]
pub const fn case(name: &'static str, row: &'static str, run: fn() -> Verdict) -> Case {
    Case { name, row, run }
}

/// How a case, or a step of it, ended.
pub type Verdict = Result<(), Finding>;

/// What was not as it should be.
#[derive(Clone, Copy, Debug)]
pub struct Finding(Text<240>);

impl Finding {
    /// A finding that is not a comparison.
    #[must_use]
    pub fn new(arguments: fmt::Arguments<'_>) -> Self {
        Self(Text::format(arguments))
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Compares what happened with what should have happened.
///
/// # Errors
///
/// A finding with both values when they differ.
pub fn expect<T: PartialEq + Debug>(what: &str, got: T, want: T) -> Verdict {
    if got == want {
        Ok(())
    } else {
        Err(Finding::new(format_args!(
            "{what}: got {got:x?}, want {want:x?}"
        )))
    }
}

/// Demands that two values differ, where the exact value is not promised.
///
/// # Errors
///
/// A finding with the value when they are equal.
pub fn expect_not<T: PartialEq + Debug>(what: &str, got: T, unwanted: T) -> Verdict {
    if got == unwanted {
        Err(Finding::new(format_args!(
            "{what}: got {got:x?}, want anything else"
        )))
    } else {
        Ok(())
    }
}

/// How many cases passed and failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Cases without a finding.
    pub passed: u32,
    /// Cases with a finding.
    pub failed: u32,
}

/// Runs all cases of all `tables` in order and writes the lines. After each case that passed
/// `audit` is asked whether the world is still in order; its finding is the case's.
pub fn run(tables: &[&[Case]], audit: fn() -> Verdict, out: &mut dyn Write) -> Tally {
    let mut tally = Tally::default();
    for case in tables.iter().copied().flatten() {
        // Before the case runs, so that a case that ends the machine is known by name.
        let _ = write!(out, "case {} ... ", case.name);
        let result = match (case.run)().and_then(|()| audit()) {
            Ok(()) => {
                tally.passed += 1;
                writeln!(out, "ok")
            }
            Err(finding) => {
                tally.failed += 1;
                writeln!(out, "FAIL: {finding} ({})", case.row)
            }
        };
        // The port cannot fail; a writer that can would have no other place to say so.
        let _ = result;
    }
    let _ = writeln!(out, "{} passed, {} failed", tally.passed, tally.failed);
    tally
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Verdict {
        Ok(())
    }

    fn bad() -> Verdict {
        expect("EAX", 6_u32, 0)
    }

    fn unbalanced() -> Verdict {
        Err(Finding::new(format_args!("2 disagreements")))
    }

    const TABLE: &[Case] = &[
        case("a", "x.md §1", good),
        Case {
            name: "b",
            row: "x.md §2",
            run: bad,
        },
    ];

    #[test]
    fn lines_and_tally_tell_the_same() {
        let mut lines = String::new();
        let tally = run(&[TABLE], good, &mut lines);
        assert_eq!(
            tally,
            Tally {
                passed: 1,
                failed: 1
            }
        );
        assert_eq!(
            lines,
            "case a ... ok\ncase b ... FAIL: EAX: got 6, want 0 (x.md §2)\n1 passed, 1 failed\n"
        );
    }

    #[test]
    fn a_failing_audit_fails_the_case() {
        let mut lines = String::new();
        let tally = run(&[&TABLE[..1]], unbalanced, &mut lines);
        assert_eq!(
            tally,
            Tally {
                passed: 0,
                failed: 1
            }
        );
        assert!(lines.contains("case a ... FAIL: 2 disagreements (x.md §1)"));
    }
}
