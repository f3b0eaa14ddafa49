//! Reads a file that another process is still writing.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// The reading end of a growing file.
#[derive(Debug)]
pub struct Tail {
    path: PathBuf,
    file: Option<File>,
}

impl Tail {
    /// Begins at the start of `path`, which need not exist yet.
    pub fn new(path: &Path) -> Tail {
        Tail {
            path: path.to_owned(),
            file: None,
        }
    }

    /// Everything written since the last call; empty if nothing was.
    pub fn read(&mut self) -> Vec<u8> {
        if self.file.is_none() {
            self.file = File::open(&self.path).ok();
        }
        let mut bytes = Vec::new();
        if let Some(file) = &mut self.file {
            // What was read before an error still counts; the next call tries again.
            let _ = file.read_to_end(&mut bytes);
        }
        bytes
    }
}

/// Cuts a stream of bytes into lines; an unfinished line is kept for the next piece.
#[derive(Debug, Default)]
pub struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    /// The lines that `bytes` completes, without their ends.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        self.rest.extend_from_slice(bytes);
        let Some(end) = self.rest.iter().rposition(|&byte| byte == b'\n') else {
            return Vec::new();
        };
        let whole: Vec<u8> = self.rest.drain(..=end).collect();
        String::from_utf8_lossy(&whole)
            .lines()
            .map(str::to_owned)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::Lines;

    #[test]
    fn lines_are_completed_by_later_pieces() {
        let mut lines = Lines::default();
        assert_eq!(lines.push(b"one\r\ntw"), ["one"]);
        assert_eq!(lines.push(b"o\nthree\n"), ["two", "three"]);
        assert!(lines.push(b"").is_empty());
    }
}
