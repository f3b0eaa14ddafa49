//! Trying again: a mirror that is away for a moment costs time and not the run.

use std::thread::sleep;
use std::time::Duration;

use anyhow::Result;

/// How long to wait before the second and the third try. apt itself repeats within seconds.
const PAUSES: [Duration; 2] = [Duration::from_secs(10), Duration::from_secs(30)];

/// Does what needs the mirror; if it fails, says why and does it again after a pause.
pub fn patiently<T>(attempt: impl FnMut() -> Result<T>) -> Result<T> {
    with_pauses(&PAUSES, attempt)
}

fn with_pauses<T>(pauses: &[Duration], mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    for pause in pauses {
        match attempt() {
            Ok(done) => return Ok(done),
            Err(error) => eprintln!("  {error:#}; again in {} s", pause.as_secs()),
        }
        sleep(*pause);
    }
    attempt()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use anyhow::{Result, bail};

    use super::with_pauses;

    #[test]
    fn what_fails_is_done_again_and_the_last_error_is_told() {
        let pauses = [Duration::ZERO; 2];
        let mut tries = 0;
        let third = with_pauses(&pauses, || {
            tries += 1;
            if tries < 3 {
                bail!("no answer");
            }
            Ok(tries)
        });
        assert_eq!(third.ok(), Some(3));
        let never: Result<()> = with_pauses(&pauses, || {
            tries += 1;
            bail!("try {tries}")
        });
        assert_eq!(never.unwrap_err().to_string(), "try 6");
    }
}
