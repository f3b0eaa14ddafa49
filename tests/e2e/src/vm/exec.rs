//! The output of the guest's command on the second serial port, between what the firmware wrote
//! there and the command's exit status.

use crate::initramfs::{EXIT_TRAILER, OUTPUT_BEGINS};

/// Takes the command's output out of what arrives at the port: it stands between NUL,
/// [`OUTPUT_BEGINS`], LF and NUL, [`EXIT_TRAILER`], the status, LF.
#[derive(Debug, Default)]
pub struct ExecStream {
    held: Vec<u8>,
    /// Whether the output has yet to begin.
    waiting: bool,
    status: Option<i32>,
}

impl ExecStream {
    /// The port of a guest with an operating system. Its firmware takes the port for a terminal and
    /// clears the screen of it, so nothing counts before the command begins.
    pub fn behind_firmware() -> ExecStream {
        ExecStream {
            waiting: true,
            ..ExecStream::default()
        }
    }

    /// Takes the next bytes of the port and returns what certainly is output. Bytes that may be the
    /// begin of the trailer are held until it is known.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.held.extend_from_slice(bytes);
        if self.waiting {
            let begin = [b"\0", OUTPUT_BEGINS.as_bytes(), b"\n"].concat();
            let Some(at) = self
                .held
                .windows(begin.len())
                .position(|bytes| bytes == begin)
            else {
                return Vec::new();
            };
            self.held.drain(..at + begin.len());
            self.waiting = false;
        }
        let mut output = Vec::new();
        while let Some(nul) = self.held.iter().position(|&byte| byte == 0) {
            output.extend(self.held.drain(..nul));
            // `held` now begins with the NUL.
            let tail = self.held.get(1..).unwrap_or_default();
            let may_begin = |mark: &[u8]| {
                let known = tail.len().min(mark.len());
                tail.get(..known) == mark.get(..known)
            };
            let again = [OUTPUT_BEGINS.as_bytes(), b"\n"].concat();
            if may_begin(&again) {
                if tail.len() < again.len() {
                    return output;
                }
                // Another kernel runs the same command once more.
                self.held.drain(..1 + again.len());
                continue;
            }
            if !may_begin(EXIT_TRAILER.as_bytes()) {
                output.extend(self.held.drain(..1));
                continue;
            }
            let line_end = tail.iter().position(|&byte| byte == b'\n');
            if let Some(digits) = line_end.and_then(|end| tail.get(EXIT_TRAILER.len()..end)) {
                self.status = std::str::from_utf8(digits)
                    .ok()
                    .and_then(|text| text.trim().parse().ok());
                self.held.clear();
            }
            return output;
        }
        output.append(&mut self.held);
        output
    }

    /// The command's exit status, once the trailer has been seen.
    pub fn status(&self) -> Option<i32> {
        self.status
    }
}

#[cfg(test)]
mod tests {
    use super::{EXIT_TRAILER, ExecStream, OUTPUT_BEGINS};

    /// Whatever the cuts between the pieces, output and status come out the same.
    #[test]
    fn the_trailer_is_found_across_any_cut() {
        let whole = [b"a\0b\n", format!("\0{EXIT_TRAILER}42\n").as_bytes()].concat();
        for cut in 0..=whole.len() {
            let mut stream = ExecStream::default();
            let mut output = stream.push(&whole[..cut]);
            output.extend(stream.push(&whole[cut..]));
            assert_eq!(output, b"a\0b\n", "cut at {cut}");
            assert_eq!(stream.status(), Some(42), "cut at {cut}");
        }
    }

    /// Whatever the cut, the firmware's words are left out.
    #[test]
    fn what_stands_before_the_begin_is_no_output() {
        let whole =
            format!("\x1b[2J\0turn\0{OUTPUT_BEGINS}\nhello\n\0{EXIT_TRAILER}0\n").into_bytes();
        for cut in 0..=whole.len() {
            let mut stream = ExecStream::behind_firmware();
            let mut output = stream.push(&whole[..cut]);
            output.extend(stream.push(&whole[cut..]));
            assert_eq!(output, b"hello\n", "cut at {cut}");
            assert_eq!(stream.status(), Some(0), "cut at {cut}");
        }
    }

    /// A command that starts another kernel is begun again by that one, and only then ends.
    #[test]
    fn a_second_begin_is_no_output() {
        let whole = format!("\0{OUTPUT_BEGINS}\none\n\0{OUTPUT_BEGINS}\ntwo\n\0{EXIT_TRAILER}7\n")
            .into_bytes();
        for cut in 0..=whole.len() {
            let mut stream = ExecStream::behind_firmware();
            let mut output = stream.push(&whole[..cut]);
            output.extend(stream.push(&whole[cut..]));
            assert_eq!(output, b"one\ntwo\n", "cut at {cut}");
            assert_eq!(stream.status(), Some(7), "cut at {cut}");
        }
    }

    #[test]
    fn without_a_trailer_there_is_no_status() {
        let mut stream = ExecStream::default();
        assert_eq!(stream.push(b"text"), b"text");
        assert_eq!(stream.status(), None);
    }
}
