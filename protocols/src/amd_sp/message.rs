//! The frame around every request and answer (SNP ABI, guest message format).
//!
//! AES-256-GCM with the key of a level (VMPCK). The sequence number is the IV, so two different
//! messages must never have the same one: with it the key stream is the same, and who sees both can
//! forge a third. The guest's numbers are odd, beginning with 1; the answer has the next one.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

open_enum! {
    /// MSG_TYPE: odd ones ask, the next one answers.
    pub struct MessageType(u8) {
        /// Which CPUID values are right?
        CPUID_REQUEST = 1,
        /// A derived key.
        KEY_REQUEST = 3,
        /// The answer to [`Self::KEY_REQUEST`].
        KEY_RESPONSE = 4,
        /// An attestation report.
        REPORT_REQUEST = 5,
        /// The answer to [`Self::REPORT_REQUEST`].
        REPORT_RESPONSE = 6,
        /// The guest's time stamp counter.
        TSC_INFO_REQUEST = 17,
        /// The answer to [`Self::TSC_INFO_REQUEST`].
        TSC_INFO_RESPONSE = 18,
    }
}

impl MessageType {
    /// The type that answers this one.
    #[must_use]
    pub const fn answer(self) -> Self {
        Self(self.0.wrapping_add(1))
    }
}

/// The header. Everything from [`Self::AUTHENTICATED`] on is covered by the tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MessageHeader {
    /// AUTHTAG; the first [`Self::TAG_SIZE`] bytes count.
    pub tag: [u8; 32],
    /// MSG_SEQNO.
    pub sequence: u64,
    /// Reserved.
    pub reserved_28: [u8; 8],
    /// ALGO.
    pub algorithm: u8,
    /// HDR_VERSION.
    pub header_version: u8,
    /// HDR_SIZE in bytes.
    pub header_size: u16,
    /// MSG_TYPE.
    pub message_type: MessageType,
    /// MSG_VERSION.
    pub message_version: u8,
    /// MSG_SIZE: bytes of the payload, which follows the header.
    pub message_size: u16,
    /// Reserved.
    pub reserved_38: [u8; 4],
    /// MSG_VMPCK: number of the key.
    pub vmpck: u8,
    /// Reserved.
    pub reserved_3d: [u8; 35],
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<MessageHeader>() == 0x60);
    assert!(offset_of!(MessageHeader, sequence) == 0x20);
    assert!(offset_of!(MessageHeader, algorithm) == 0x30);
    assert!(offset_of!(MessageHeader, header_version) == 0x31);
    assert!(offset_of!(MessageHeader, header_size) == 0x32);
    assert!(offset_of!(MessageHeader, message_type) == 0x34);
    assert!(offset_of!(MessageHeader, message_version) == 0x35);
    assert!(offset_of!(MessageHeader, message_size) == 0x36);
    assert!(offset_of!(MessageHeader, vmpck) == 0x3C);
};

impl MessageHeader {
    /// AES-256-GCM, the one algorithm there is.
    pub const AES_256_GCM: u8 = 1;
    /// The one version of the header there is.
    pub const VERSION: u8 = 1;
    /// Bytes of the header.
    pub const SIZE: usize = size_of::<Self>();
    /// Offset of the part that is authenticated, up to the end of the header.
    pub const AUTHENTICATED: usize = core::mem::offset_of!(Self, algorithm);
    /// Bytes of the tag.
    pub const TAG_SIZE: usize = 16;
    /// Bytes of the IV.
    pub const IV_SIZE: usize = 12;
    /// The most bytes a payload has: header and payload are in one page.
    pub const MAX_PAYLOAD: usize = 4096 - Self::SIZE;

    /// A header without a tag, of the first version of the message.
    #[must_use]
    pub const fn new(message_type: MessageType, size: u16, vmpck: u8, sequence: u64) -> Self {
        Self {
            tag: [0; 32],
            sequence,
            reserved_28: [0; 8],
            algorithm: Self::AES_256_GCM,
            header_version: Self::VERSION,
            header_size: Self::SIZE as u16,
            message_type,
            message_version: 1,
            message_size: size,
            reserved_38: [0; 4],
            vmpck,
            reserved_3d: [0; 35],
        }
    }

    /// What is authenticated besides the payload.
    #[must_use]
    pub fn authenticated(&self) -> &[u8] {
        self.as_bytes()
            .get(Self::AUTHENTICATED..)
            .unwrap_or_default()
    }

    /// The IV that goes with the sequence number.
    #[must_use]
    pub fn iv(&self) -> [u8; Self::IV_SIZE] {
        let mut iv = [0; Self::IV_SIZE];
        for (to, from) in iv.iter_mut().zip(self.sequence.to_le_bytes()) {
            *to = from;
        }
        iv
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_iv_is_the_sequence_number_and_the_tag_covers_the_rest() {
        let header = MessageHeader::new(MessageType::REPORT_REQUEST, 0x60, 2, 0x0102);
        assert_eq!(header.iv(), [2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let covered = header.authenticated();
        assert_eq!(covered.len(), 48);
        assert_eq!(covered[..8], [1, 1, 0x60, 0, 5, 1, 0x60, 0]);
        assert_eq!(covered[12], 2);
        assert_eq!(
            MessageType::REPORT_REQUEST.answer(),
            MessageType::REPORT_RESPONSE
        );
    }
}
