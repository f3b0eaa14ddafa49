//! The guest's side of a guest message, sealed here and not by the paravisor's code.

use aes_gcm::aead::AeadInPlace;
use aes_gcm::{Aes256Gcm, KeyInit};
use protocols::amd_sp::message::MessageHeader;

/// A key of a privilege level (VMPCK).
pub type Key = [u8; 32];

/// Seals `payload` in place; the header with its tag.
#[must_use]
pub fn seal(key: &Key, mut header: MessageHeader, payload: &mut [u8]) -> MessageHeader {
    let tag = Aes256Gcm::new(key.into())
        .encrypt_in_place_detached(&header.iv().into(), header.authenticated(), payload)
        .unwrap_or_default();
    header.tag[..MessageHeader::TAG_SIZE].copy_from_slice(&tag);
    header
}

/// Opens `payload` in place; whether it was sealed with this key and header.
#[must_use]
pub fn open(key: &Key, header: &MessageHeader, payload: &mut [u8]) -> bool {
    let Some(tag) = header.tag.first_chunk::<{ MessageHeader::TAG_SIZE }>() else {
        return false;
    };
    Aes256Gcm::new(key.into())
        .decrypt_in_place_detached(
            &header.iv().into(),
            header.authenticated(),
            payload,
            tag.into(),
        )
        .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocols::amd_sp::message::MessageType;

    #[test]
    fn what_was_sealed_opens_with_the_same_key_and_header_only() {
        let header = MessageHeader::new(MessageType::KEY_REQUEST, 32, 1, 1);
        let mut payload = [7; 32];
        let sealed = seal(&[1; 32], header, &mut payload);
        assert_ne!(payload, [7; 32]);
        assert!(!open(&[2; 32], &sealed, &mut payload.clone()));
        let other = MessageHeader {
            sequence: 3,
            ..sealed
        };
        assert!(!open(&[1; 32], &other, &mut payload.clone()));
        assert!(open(&[1; 32], &sealed, &mut payload));
        assert_eq!(payload, [7; 32]);
    }
}
