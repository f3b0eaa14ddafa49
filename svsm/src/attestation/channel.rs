//! The order of messages: what may be sealed when.
//!
//! The sequence number of a message is its IV. Two different messages under one number would give the key
//! away, and the host decides which answers come back. So:
//!
//! 1. A new message is sealed only when the answer to the one before has come back and has authenticated with
//!    the number that follows. That alone moves the numbers on.
//! 2. Until then the one message that was sealed is all that is ever sent, byte for byte, however often.
//! 3. Nothing the host says moves anything: "busy", "failed", an answer from before or one that was changed
//!    leave the channel as it is.
//!
//! A host that loses an answer for good has ended attestation, which it can do in any case. It cannot have a
//! number used twice.

use protocols::amd_sp::message::{MessageHeader, MessageType};
use protocols::amd_sp::report::{AttestationReport, KeySelect, ReportRequest, ReportResponse};
use protocols::amd_sp::{FirmwareStatus, GuestRequestOutcome, HostStatus};
use protocols::terminate::TurnstileReason;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};
use zeroize::Zeroize;

use super::seal::{Key, open, seal};

/// Number of the level that speaks here, and of its key.
const VMPL0: u8 = 0;
/// No message has a number beyond: guests keep them in 32 bits (Linux, `sev-guest`), and so does the secrets
/// page.
const LAST_SEQUENCE: u64 = u32::MAX as u64;

/// A request for a report, as it goes to the host.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SealedRequest {
    header: MessageHeader,
    payload: ReportRequest,
}

/// The answer, as it comes from the host.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SealedAnswer {
    header: MessageHeader,
    payload: ReportResponse,
}

/// What the host is asked to do with a message.
pub trait Carrier {
    /// Carries the request to the security processor, and its answer back. With `certificates` the host is
    /// asked for those as well. The outcome is the host's word, and so is every byte of the answer; each is
    /// read once.
    ///
    /// # Errors
    ///
    /// The host broke the rules of the carrying itself.
    fn carry(
        &self,
        request: &SealedRequest,
        certificates: bool,
        answer: &mut SealedAnswer,
    ) -> Result<GuestRequestOutcome, TurnstileReason>;

    /// Copies the certificates that came with the last answer, as many bytes as there are in `into`.
    fn certificates(&self, into: &mut [u8]);
}

/// Why there is no report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Ask again: another processor is at it, or the host puts us off.
    Busy,
    /// The host or the firmware refuses, or the key is used up.
    Failed,
    /// An answer in the firmware's name that is not the firmware's.
    HostLied,
}

/// What came with a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Certificates {
    /// The host's table, for [`Carrier::certificates`].
    Given,
    /// None: not wanted, or the host wants more room for them than there is.
    None,
}

/// The message that has no answer yet.
struct Unanswered {
    sealed: SealedRequest,
    /// What it asks a report about.
    data: [u8; 64],
}

/// The channel.
pub struct Channel {
    key: Key,
    /// There is a key, and it is not used up.
    usable: bool,
    /// Of the last answer; 0 before the first.
    sequence: u64,
    unanswered: Option<Unanswered>,
    answer: SealedAnswer,
}

impl Default for Channel {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}

impl Channel {
    /// A channel without a key, on which nothing can be said.
    #[must_use]
    pub fn new() -> Self {
        Self {
            key: [0; 32],
            usable: false,
            sequence: 0,
            unanswered: None,
            answer: SealedAnswer::new_zeroed(),
        }
    }

    /// Gives the channel its key, with which nobody has said anything yet, and wipes it where it was. The
    /// channel does not move any more, so there is one copy. Only the first call counts.
    pub fn take_key(&mut self, key: &mut Key) {
        if !self.usable && self.sequence == 0 {
            self.key.copy_from_slice(key);
            self.usable = true;
        }
        key.zeroize();
    }

    /// Has the security processor report on VMPL0 with `data`.
    ///
    /// # Errors
    ///
    /// [`Refusal`]. The same call may be repeated, and so may another.
    pub fn report(
        &mut self,
        carrier: &impl Carrier,
        data: &[u8; 64],
        certificates: bool,
    ) -> Result<(&AttestationReport, Certificates), Refusal> {
        if let Some(waiting) = &self.unanswered {
            let same = waiting.data == *data;
            let came = self.exchange(carrier, certificates && same)?;
            if same {
                return self.reported(came);
            }
        }
        self.seal(data)?;
        let came = self.exchange(carrier, certificates)?;
        self.reported(came)
    }

    /// Makes the next message. There is no unanswered one.
    fn seal(&mut self, data: &[u8; 64]) -> Result<(), Refusal> {
        let next = self.sequence + 1;
        if next >= LAST_SEQUENCE {
            self.key.zeroize();
            self.usable = false;
        }
        if !self.usable {
            return Err(Refusal::Failed);
        }
        let mut payload = ReportRequest {
            report_data: *data,
            vmpl: VMPL0.into(),
            key_select: KeySelect::ANY,
            reserved: [0; 24],
        };
        let size = size_of::<ReportRequest>() as u16;
        let mut header = MessageHeader::new(MessageType::REPORT_REQUEST, size, VMPL0, next);
        if !seal(&self.key, &mut header, payload.as_mut_bytes()) {
            return Err(Refusal::Failed);
        }
        self.unanswered = Some(Unanswered {
            sealed: SealedRequest { header, payload },
            data: *data,
        });
        Ok(())
    }

    /// Sends the unanswered message. When this succeeds its answer is open, and the numbers have moved on.
    fn exchange(
        &mut self,
        carrier: &impl Carrier,
        certificates: bool,
    ) -> Result<Certificates, Refusal> {
        let Some(Unanswered { sealed, .. }) = &self.unanswered else {
            return Err(Refusal::Failed);
        };
        let mut came = if certificates {
            Certificates::Given
        } else {
            Certificates::None
        };
        // What an earlier exchange left must not pass for an answer.
        self.answer.zero();
        let mut outcome = carrier
            .carry(sealed, certificates, &mut self.answer)
            .map_err(|_| Refusal::Failed)?;
        if certificates && outcome.host == HostStatus::INVALID_LENGTH {
            // Nobody has more room for them. The report is worth having without.
            came = Certificates::None;
            outcome = carrier
                .carry(sealed, false, &mut self.answer)
                .map_err(|_| Refusal::Failed)?;
        }
        match outcome {
            GuestRequestOutcome::OK => {}
            GuestRequestOutcome {
                host: HostStatus::BUSY,
                ..
            } => return Err(Refusal::Busy),
            GuestRequestOutcome { host, firmware } => {
                log::warn!("a report was refused: {host:?}, {firmware:?}");
                return Err(Refusal::Failed);
            }
        }
        let SealedAnswer { header, payload } = &mut self.answer;
        if !answers(header, &sealed.header) || !open(&self.key, header, payload.as_mut_bytes()) {
            log::error!("an answer that is not the security processor's: the host lied");
            return Err(Refusal::HostLied);
        }
        self.sequence = header.sequence;
        self.unanswered = None;
        Ok(came)
    }

    /// The report in the answer that was opened.
    fn reported(&self, came: Certificates) -> Result<(&AttestationReport, Certificates), Refusal> {
        let ReportResponse { header, report } = &self.answer.payload;
        if header.status != FirmwareStatus::SUCCESS
            || header.report_size as usize != AttestationReport::SIZE
        {
            log::warn!(
                "the firmware makes no report: {:?}, {} bytes",
                header.status,
                header.report_size
            );
            return Err(Refusal::Failed);
        }
        Ok((report, came))
    }
}

/// Whether a header claims to be that of the answer to `request`. The seal covers every field that is looked
/// at here but the number, which is its IV.
fn answers(header: &MessageHeader, request: &MessageHeader) -> bool {
    header.sequence == request.sequence + 1
        && header.algorithm == MessageHeader::AES_256_GCM
        && header.header_version == MessageHeader::VERSION
        && usize::from(header.header_size) == MessageHeader::SIZE
        && header.message_type == request.message_type.answer()
        && header.message_version == request.message_version
        && usize::from(header.message_size) == size_of::<ReportResponse>()
        && header.vmpck == request.vmpck
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host that must not be asked.
    struct Nobody;

    impl Carrier for Nobody {
        fn carry(
            &self,
            request: &SealedRequest,
            _: bool,
            _: &mut SealedAnswer,
        ) -> Result<GuestRequestOutcome, TurnstileReason> {
            panic!("message {:#x} was sent", request.header.sequence)
        }

        fn certificates(&self, _: &mut [u8]) {}
    }

    #[test]
    fn when_the_numbers_are_used_up_the_key_is_wiped_and_nothing_is_sent() {
        let mut channel = Channel::new();
        channel.take_key(&mut [1; 32]);
        channel.sequence = LAST_SEQUENCE - 1;
        for _ in 0..2 {
            let refused = channel.report(&Nobody, &[0; 64], false).map(|_| ());
            assert_eq!(refused, Err(Refusal::Failed));
            assert_eq!(channel.key, [0; 32]);
        }
        // Nor does another key come after it.
        channel.take_key(&mut [2; 32]);
        assert_eq!(channel.key, [0; 32]);
    }
}
