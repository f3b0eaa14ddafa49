//! Turnstile's own protocol, [`super::Protocol::TURNSTILE`] (docs/protocol.md).
//!
//! All calls but one pass everything in registers: RCX, RDX, R8 and R9.

use super::CallId;
use super::Protocol;

/// The newest version: it has [`TurnstileCall::UNACCEPTED_TABLE`] besides what was there before.
pub const VERSION: u32 = 2;
/// The oldest version whose calls are all there still.
pub const LOWEST_VERSION: u32 = 1;

/// The largest range that a call may look at: it bounds the call's work.
pub const LARGEST_LOOK: u64 = 64 << 30;

open_enum! {
    /// Calls, lower half of RAX.
    pub struct TurnstileCall(u32) {
        /// Accept a range. RCX = GPA, RDX = bytes; both are moved on by what was done.
        ACCEPT = 0,
        /// How much of a range is in which state? RCX = GPA, RDX = bytes. Out: bytes that are
        /// unaccepted (RCX), ahead (RDX), accepted (R8), owned (R9).
        CENSUS = 1,
        /// One counter. RCX = [`TurnstileCounter`]; out: RCX = value.
        COUNTER = 2,
        /// Is any byte of a range unaccepted? RCX = GPA, RDX = bytes; out: RCX = 1 or 0.
        CONTAINS_UNACCEPTED = 3,
        /// What the image says about accepting memory. Out: policy (RCX), budget in bytes (RDX),
        /// order (R8), read-ahead (R9); the numbers are those of [`crate::launch`].
        CONFIGURATION = 4,
        /// EFI's table of what is unaccepted in a range ([`crate::efi::UnacceptedTable`]). RCX = GPA,
        /// RDX = bytes, R8 = GPA of the guest's buffer, R9 = its bytes; out: RCX = bytes of the table.
        /// From version 2 on.
        UNACCEPTED_TABLE = 5,
    }
}

open_enum! {
    /// What is counted, since the start of the VM.
    pub struct TurnstileCounter(u64) {
        /// Requests for 4 KiB that were accepted.
        ACCEPTED_4K = 0,
        /// Requests for 2 MiB that were accepted.
        ACCEPTED_2M = 1,
        /// Bytes that became the guest's.
        ACCEPTED_BYTES = 2,
        /// Of these, bytes that no validating instruction was executed for: they were ready.
        CLAIMED_BYTES = 3,
        /// Bytes that were made ready before the guest asked.
        PREPARED_BYTES = 4,
        /// Bytes that ceased to be the guest's.
        RESCINDED_BYTES = 5,
        /// Requests that found their pages accepted: refused, or nothing to do.
        NO_CHANGE = 6,
        /// Large operations that the platform could do in small pages only.
        SPLITS = 7,
        /// Requests that failed in an instruction.
        FAILURES = 8,
        /// Locks that were taken after a wait.
        CONTENDED = 9,
        /// Waits for a lock that were given up.
        BUSY = 10,
        /// Steps of 2 MiB that processors took before the guest started them.
        STEPS = 11,
        /// The most such steps the guest ever waited for one of its processors.
        LONGEST_WAIT = 12,
        /// Steps that an instruction failed in; the region is left to requests.
        FAILED_STEPS = 13,
    }
}

impl TurnstileCall {
    /// RAX.
    #[must_use]
    pub const fn id(self) -> CallId {
        CallId {
            protocol: Protocol::TURNSTILE,
            call: self.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_is_outside_what_the_specification_reserves() {
        let Protocol(number) = Protocol::TURNSTILE;
        assert!(number > 0x8000_FFFF);
        assert_eq!(TurnstileCall::CENSUS.id().encode(), 0x8001_5453_0000_0001);
    }
}
