//! Reads what a bare-metal test guest writes to the second serial port.
//!
//! ```text
//! case NAME ... ok
//! case NAME ... FAIL: WHAT: got GOT, want WANT (ROW)
//! N passed, N failed
//! ```
//!
//! The name is written before the case runs, so a case that ends the machine is known by its line
//! without a verdict. Lines of any other form (a panic of the guest) count as failures: nothing that
//! the guest says is lost.

use anyhow::Result;
use protocols::report::Outcome;

use crate::scenario::{Check, Findings};
use crate::vm::Finished;

/// What the guest wrote.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Transcript {
    /// One per case.
    pub checks: Vec<Check>,
    /// The guest's own totals, if it came to its end.
    pub totals: Option<(usize, usize)>,
    /// Lines that are neither.
    pub other: Vec<String>,
}

impl Transcript {
    /// Reads the text of the port.
    pub fn parse(text: &str) -> Transcript {
        let mut transcript = Transcript::default();
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
            if let Some(case) = line.strip_prefix("case ") {
                let (name, verdict) = case.split_once(" ...").unwrap_or((case, ""));
                let failure = match verdict.trim() {
                    "ok" => None,
                    "" => Some("the machine ended before the case did".to_owned()),
                    verdict => Some(verdict.trim_start_matches("FAIL: ").to_owned()),
                };
                transcript.checks.push(Check {
                    name: name.to_owned(),
                    failure,
                });
            } else if let Some(totals) = totals(line) {
                transcript.totals = Some(totals);
            } else {
                transcript.other.push(line.to_owned());
            }
        }
        transcript
    }

    /// Names of the cases that failed.
    pub fn failed(&self) -> Vec<&str> {
        self.checks
            .iter()
            .filter(|c| c.failure.is_some())
            .map(|c| c.name.as_str())
            .collect()
    }
}

/// Adds the guest's cases to `findings` and checks that the table was gone through to its end: the
/// guest ended by itself, with the exit code for "all passed", and at least `least` cases.
pub fn judge(findings: &mut Findings, finished: &Finished, least: usize) -> Result<()> {
    let transcript = Transcript::parse(&String::from_utf8_lossy(&finished.output));
    let report = finished.report()?;
    let count = transcript.checks.len();
    let failed = transcript.failed().len();
    findings.ended(finished, Outcome::GuestExit)?;
    findings.equal("the guest's exit code", report.code, 0);
    findings.check(format!("at least {least} cases"), count >= least, || {
        count.to_string()
    });
    findings.equal(
        "the guest counts the same",
        transcript.totals,
        Some((count - failed, failed)),
    );
    findings.equal("nothing else was said", transcript.other, Vec::new());
    findings.checks.extend(transcript.checks);
    Ok(())
}

fn totals(line: &str) -> Option<(usize, usize)> {
    let (passed, failed) = line.strip_suffix(" failed")?.split_once(" passed, ")?;
    Some((passed.parse().ok()?, failed.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::Transcript;

    #[test]
    fn a_whole_transcript() {
        let text =
            "case a ... ok\r\ncase b ... FAIL: EAX: got 6, want 0 (x §1)\r\n1 passed, 1 failed\r\n";
        let transcript = Transcript::parse(text);
        assert_eq!(transcript.failed(), ["b"]);
        assert_eq!(
            transcript.checks[1].failure.as_deref(),
            Some("EAX: got 6, want 0 (x §1)")
        );
        assert_eq!(transcript.totals, Some((1, 1)));
        assert!(transcript.other.is_empty());
    }

    #[test]
    fn a_case_that_ended_the_machine_and_a_panic() {
        let transcript = Transcript::parse("case a ... ok\ncase b ... ");
        assert_eq!(transcript.failed(), ["b"]);
        assert_eq!(transcript.totals, None);
        let transcript = Transcript::parse("case a ... panic at x.rs:1\nmore words\n");
        assert_eq!(transcript.failed(), ["a"]);
        assert_eq!(transcript.other, ["more words"]);
    }
}
