//! The AMD-SP's guest messages: reports, derived keys, the time stamp counter (`snp-launch.md` §7, §8).
//!
//! [`SecurityProcessor`] is what the firmware knows of the one guest, from its launch on.
//! [`SecurityProcessor::answer`] takes the page that the host has carried and gives the page that it is to
//! carry back. Checks come in the firmware's order: the header, the seal, the sequence number, version and
//! type; a message that fails one of them counts for nothing. What is wrong inside a good message is told in
//! its answer, and the message counts.
//!
//! The host's part (pages, certificates, lies) is `crate::ghcb::guest_request`.

mod key;
mod report;
mod seal;
#[cfg(test)]
mod tests;

use alloc::vec;
use alloc::vec::Vec;

use p384::ecdsa::SigningKey;
use protocols::amd_sp::FirmwareStatus;
use protocols::amd_sp::endorsement::Endorsement;
use protocols::amd_sp::key::{KeyRequest, TSC_INFO_REQUEST_SIZE, TscInfoResponse};
use protocols::amd_sp::message::{MessageHeader, MessageType};
use protocols::amd_sp::report::ReportRequest;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::launch::digest::Digest;
use crate::types::{Gpa, PAGE_SIZE};

/// The firmware that this is.
pub(crate) const FIRMWARE: Firmware = Firmware {
    major: 1,
    minor: 55,
    build: 21,
};

/// A version of the firmware; major and minor are also those of its ABI.
pub(crate) struct Firmware {
    pub major: u8,
    pub minor: u8,
    build: u8,
}

impl Firmware {
    /// As reports tell it.
    const fn reported(&self) -> [u8; 4] {
        [self.build, self.minor, self.major, 0]
    }
}

/// Answer of the firmware, or the status of the command.
pub type Answer = Result<Vec<u8>, FirmwareStatus>;

/// What a good ID block says of the guest ([`crate::launch::id_block`]): it goes into every report.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    /// FAMILY_ID.
    pub family_id: [u8; 16],
    /// IMAGE_ID.
    pub image_id: [u8; 16],
    /// GUEST_SVN.
    pub guest_svn: u32,
    /// SHA-384 of the ID key.
    pub id_key_digest: Digest,
    /// SHA-384 of the author key, if there is one.
    pub author_key_digest: Option<Digest>,
}

impl Default for Identity {
    /// Of a guest without an ID block.
    fn default() -> Self {
        Self {
            family_id: [0; 16],
            image_id: [0; 16],
            guest_svn: 0,
            id_key_digest: [0; 48],
            author_key_digest: None,
        }
    }
}

/// What is known of a guest when its launch is over.
#[derive(Clone, Copy)]
pub struct Guest {
    /// Launch digest.
    pub measurement: Digest,
    /// Guest policy.
    pub policy: u64,
    /// From its ID block.
    pub identity: Identity,
    /// The keys in its secrets page.
    pub vmpck: [[u8; 32]; 4],
    /// Where that page is, if it has one.
    pub secrets_page: Option<Gpa>,
    /// Family, model and stepping of the processor.
    pub cpuid_fms: [u8; 3],
}

/// The identity of the chip.
#[derive(Clone)]
pub struct Chip {
    vcek: SigningKey,
    id: [u8; 64],
    tcb: u64,
}

impl Chip {
    /// Reads the identity from its file; `None` if that has another length, or its key is none.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let file = Endorsement::read_from_bytes(bytes).ok()?;
        Some(Self {
            vcek: SigningKey::from_slice(&file.vcek).ok()?,
            id: file.chip_id,
            tcb: file.tcb,
        })
    }
}

/// The firmware and what it knows of its guest.
pub struct SecurityProcessor {
    guest: Guest,
    /// Without one there is no VCEK.
    chip: Option<Chip>,
    /// Of each key, how many messages went back and forth.
    counts: [u64; 4],
    report_id: [u8; 32],
    /// Root of derived keys that die with the guest.
    vmrk: [u8; 32],
}

impl SecurityProcessor {
    /// Takes charge of a guest that was launched.
    pub fn new(guest: Guest, chip: Option<Chip>, random: &mut dyn FnMut() -> u64) -> Self {
        let mut bytes = || {
            let mut bytes = [0; 32];
            for word in bytes.chunks_exact_mut(8) {
                word.copy_from_slice(&random().to_le_bytes());
            }
            bytes
        };
        Self {
            guest,
            chip,
            counts: [0; 4],
            report_id: bytes(),
            vmrk: bytes(),
        }
    }

    /// Where the launch put the keys.
    pub(crate) const fn secrets_page(&self) -> Option<Gpa> {
        self.guest.secrets_page
    }

    /// The keys.
    pub(crate) const fn keys(&self) -> &[[u8; 32]; 4] {
        &self.guest.vmpck
    }

    /// Executes SNP_GUEST_REQUEST on a request page.
    pub fn answer(&mut self, page: &[u8; PAGE_SIZE as usize]) -> Answer {
        const INVALID: FirmwareStatus = FirmwareStatus::INVALID_PARAM;
        let (header, rest) = MessageHeader::read_from_prefix(page).map_err(|_| INVALID)?;
        let size = usize::from(header.message_size);
        let sound = header.header_version == MessageHeader::VERSION
            && usize::from(header.header_size) == MessageHeader::SIZE
            && header.algorithm == MessageHeader::AES_256_GCM
            && size != 0
            && size.is_multiple_of(16);
        if !sound {
            return Err(INVALID);
        }
        let sealed = rest.get(..size).ok_or(INVALID)?;
        let level = usize::from(header.vmpck);
        let key = *self.guest.vmpck.get(level).ok_or(INVALID)?;
        let payload = seal::open(&key, &header, sealed).ok_or(FirmwareStatus::BAD_MEASUREMENT)?;

        let count = *self.counts.get(level).ok_or(INVALID)?;
        if count == u64::MAX - 1 || header.sequence != count + 1 {
            return Err(FirmwareStatus::AEAD_OFLOW);
        }
        // Every message exists in one version.
        if header.message_version != 1 {
            return Err(INVALID);
        }
        let answer = match header.message_type {
            MessageType::REPORT_REQUEST => {
                let (request, _) =
                    ReportRequest::read_from_prefix(&payload).map_err(|_| INVALID)?;
                self.report(header.vmpck, &request).as_bytes().to_vec()
            }
            MessageType::KEY_REQUEST => {
                let (request, _) = KeyRequest::read_from_prefix(&payload).map_err(|_| INVALID)?;
                self.key(header.vmpck, &request).as_bytes().to_vec()
            }
            MessageType::TSC_INFO_REQUEST => {
                let zeros = payload.get(..TSC_INFO_REQUEST_SIZE).ok_or(INVALID)?;
                tsc_info(zeros).as_bytes().to_vec()
            }
            _ => return Err(INVALID),
        };
        let size = u16::try_from(answer.len()).map_err(|_| INVALID)?;
        let header = MessageHeader::new(
            header.message_type.answer(),
            size,
            header.vmpck,
            header.sequence + 1,
        );
        if let Some(count) = self.counts.get_mut(level) {
            *count += 2;
        }
        let mut sealed = seal::seal(&key, header, &answer);
        let mut response = vec![0; PAGE_SIZE as usize];
        sealed.truncate(response.len());
        for (to, from) in response.iter_mut().zip(sealed) {
            *to = from;
        }
        Ok(response)
    }
}

/// No guest here has a secure time stamp counter: scale and offset are those of its VMSAs, zero.
fn tsc_info(zeros: &[u8]) -> TscInfoResponse {
    let mut answer = TscInfoResponse::new_zeroed();
    if zeros.iter().any(|&byte| byte != 0) {
        answer.status = FirmwareStatus::INVALID_PARAM;
    }
    answer
}
