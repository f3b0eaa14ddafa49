//! What a guest and the security processor (AMD-SP) say to each other (SNP ABI, guest messages).
//!
//! A guest seals a request with the key of its privilege level, the host carries it to the security
//! processor and carries the answer back (GHCB, SNP guest request). The host reads and writes what it
//! carries; only what the seal covers can be relied on.
//!
//! - [`message`]: the frame around every request and answer;
//! - [`report`]: attestation reports;
//! - [`key`]: derived keys and the time stamp counter;
//! - [`certificates`]: the table of certificates that the host adds to a report;
//! - [`endorsement`]: what the emulated one is given of a chip's identity.

pub mod certificates;
pub mod endorsement;
pub mod key;
pub mod message;
pub mod report;

open_enum! {
    /// What the firmware says to a command, or in the first word of an answer (SNP ABI, status codes;
    /// Linux `psp-sev.h`).
    pub struct FirmwareStatus(u32) {
        /// Done.
        SUCCESS = 0,
        /// The message does not authenticate.
        BAD_MEASUREMENT = 0x0B,
        /// Not supported.
        UNSUPPORTED = 0x15,
        /// A parameter is wrong.
        INVALID_PARAM = 0x16,
        /// The sequence number is not the one that is due, or there is none left.
        AEAD_OFLOW = 0x1D,
        /// There is no key such as the one that was selected.
        INVALID_KEY = 0x27,
    }
}

open_enum! {
    /// What the host itself says to a guest request; upper half of SW_EXITINFO2 (GHCB, SNP guest
    /// request).
    pub struct HostStatus(u32) {
        /// The firmware was asked.
        OK = 0,
        /// There is less room for certificates than RBX says is needed.
        INVALID_LENGTH = 1,
        /// Ask again, with the same message.
        BUSY = 2,
        /// Anything else.
        GENERIC = 0xFFFF_FFFF,
    }
}

/// SW_EXITINFO2 after a guest request (GHCB, SNP guest request). The host's word, both halves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestRequestOutcome {
    /// Bits 31:0.
    pub firmware: FirmwareStatus,
    /// Bits 63:32.
    pub host: HostStatus,
}

impl GuestRequestOutcome {
    /// The firmware has answered.
    pub const OK: Self = Self::of_firmware(FirmwareStatus::SUCCESS);

    /// What the firmware said.
    #[must_use]
    pub const fn of_firmware(firmware: FirmwareStatus) -> Self {
        Self {
            firmware,
            host: HostStatus::OK,
        }
    }

    /// What the host said without asking the firmware.
    #[must_use]
    pub const fn of_host(host: HostStatus) -> Self {
        Self {
            firmware: FirmwareStatus::SUCCESS,
            host,
        }
    }

    /// SW_EXITINFO2.
    #[must_use]
    pub const fn encode(self) -> u64 {
        (self.host.0 as u64) << 32 | self.firmware.0 as u64
    }

    /// Reads SW_EXITINFO2.
    #[must_use]
    pub const fn decode(info_2: u64) -> Self {
        Self {
            firmware: FirmwareStatus(info_2 as u32),
            host: HostStatus((info_2 >> 32) as u32),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_halves_of_the_outcome_are_kept() {
        let busy = GuestRequestOutcome::of_host(HostStatus::BUSY);
        assert_eq!(busy.encode(), 2 << 32);
        let unclear = GuestRequestOutcome::decode(0xFFFF_FFFF_0000_0016);
        assert_eq!(unclear.host, HostStatus::GENERIC);
        assert_eq!(unclear.firmware, FirmwareStatus::INVALID_PARAM);
        assert_eq!(GuestRequestOutcome::decode(0), GuestRequestOutcome::OK);
    }
}
