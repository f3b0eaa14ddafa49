//! MapGPA as a conversation: what is left to convert, and what an answer of the host means.
//!
//! Invariants of a [`Conversion`]: whole pages, no wrap, and it never grows. An answer moves its start
//! forward or is counted; so many without progress end it (I7).

use protocols::addr::PAGE_SIZE;
use protocols::tdx::vmcall::Status;

/// Answers without progress that are accepted. The host says RETRY when it has something else to do;
/// one that does nothing else is not waited for.
pub const ANSWERS_WITHOUT_PROGRESS: u32 = 1000;

/// A range that the host is to convert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conversion {
    start: u64,
    end: u64,
    to_shared: bool,
    idle: u32,
}

/// What an answer means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// All is converted.
    Done,
    /// To be asked again for what is left.
    Again,
    /// The host does not convert it.
    Refused(Status),
    /// The host makes no progress, or answers about something else.
    Stuck,
}

impl Conversion {
    /// `bytes` bytes from `start`, addresses without the shared bit; none unless whole pages.
    #[must_use]
    pub const fn to_shared(start: u64, bytes: u64) -> Option<Self> {
        Self::new(start, bytes, true)
    }

    /// The same, to become private.
    #[must_use]
    pub const fn to_private(start: u64, bytes: u64) -> Option<Self> {
        Self::new(start, bytes, false)
    }

    const fn new(start: u64, bytes: u64, to_shared: bool) -> Option<Self> {
        if !start.is_multiple_of(PAGE_SIZE) || !bytes.is_multiple_of(PAGE_SIZE) || bytes == 0 {
            return None;
        }
        match start.checked_add(bytes) {
            Some(end) => Some(Self {
                start,
                end,
                to_shared,
                idle: 0,
            }),
            None => None,
        }
    }

    /// Where what is left begins.
    #[must_use]
    pub const fn start(&self) -> u64 {
        self.start
    }

    /// Bytes that are left.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.end - self.start
    }

    /// The shared bit, if addresses of this conversion have it.
    #[must_use]
    pub const fn alias_bit(&self, shared: u64) -> u64 {
        if self.to_shared { shared } else { 0 }
    }

    /// Takes the host's answer: R10 and R11.
    pub fn take_answer(&mut self, status: Status, next: u64, shared: u64) -> Answer {
        match status {
            Status::SUCCESS => {
                self.start = self.end;
                Answer::Done
            }
            Status::RETRY => {
                // KVM gives the address as it was asked, others may leave the bit out.
                let next = next & !shared;
                if next < self.start || next >= self.end || !next.is_multiple_of(PAGE_SIZE) {
                    return Answer::Stuck;
                }
                self.idle = if next == self.start { self.idle + 1 } else { 0 };
                self.start = next;
                if self.idle > ANSWERS_WITHOUT_PROGRESS {
                    Answer::Stuck
                } else {
                    Answer::Again
                }
            }
            other => Answer::Refused(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARED: u64 = 1 << 47;

    #[test]
    fn only_whole_pages_are_converted() {
        assert!(Conversion::to_shared(0x1000, 0x2000).is_some());
        for (start, bytes) in [(1, 0x1000), (0x1000, 1), (0, 0), (u64::MAX - 0xFFF, 0x1000)] {
            assert_eq!(Conversion::to_private(start, bytes), None, "{start:#x}");
        }
    }

    #[test]
    fn a_retry_moves_the_start() {
        let mut left = Conversion::to_shared(0x1000, 0x4000).unwrap();
        assert_eq!(left.alias_bit(SHARED), SHARED);
        assert_eq!(
            left.take_answer(Status::RETRY, SHARED | 0x3000, SHARED),
            Answer::Again
        );
        assert_eq!((left.start(), left.bytes()), (0x3000, 0x2000));
        assert_eq!(left.take_answer(Status::SUCCESS, 0, SHARED), Answer::Done);
        assert_eq!(left.bytes(), 0);
    }

    #[test]
    fn an_answer_about_something_else_ends_it() {
        for next in [0, 0x5000, u64::MAX, 0x1001] {
            let mut left = Conversion::to_private(0x1000, 0x4000).unwrap();
            assert_eq!(
                left.take_answer(Status::RETRY, next, SHARED),
                Answer::Stuck,
                "{next:#x}"
            );
        }
        let mut left = Conversion::to_private(0x1000, 0x4000).unwrap();
        let refused = Answer::Refused(Status::GPA_IN_USE);
        assert_eq!(
            left.take_answer(Status::GPA_IN_USE, 0x1000, SHARED),
            refused
        );
    }

    /// I7: a host that says RETRY for ever is not asked for ever.
    #[test]
    fn no_progress_is_bounded() {
        let mut left = Conversion::to_private(0x1000, 0x4000).unwrap();
        let asked = (1..).find(|_| left.take_answer(Status::RETRY, 0x1000, 0) == Answer::Stuck);
        assert_eq!(asked, Some(ANSWERS_WITHOUT_PROGRESS + 1));
    }
}
