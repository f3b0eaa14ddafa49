//! Sealing what goes to the security processor, and opening what comes back (SNP ABI, guest messages).
//!
//! The key is expanded for each message and forgotten with it (`zeroize` of the cipher crates). AES and GHASH
//! are computed without tables, so they take the same time whatever the key is, and tags are compared in
//! constant time.

use aes_gcm::aead::AeadInPlace;
use aes_gcm::{Aes256Gcm, KeyInit};
use protocols::amd_sp::message::MessageHeader;

/// A key of a privilege level (VMPCK).
pub type Key = [u8; 32];

/// Seals `payload` in place and gives the header with its tag; none if the payload is too long for the cipher,
/// which no message is.
pub fn seal(key: &Key, mut header: MessageHeader, payload: &mut [u8]) -> Option<MessageHeader> {
    let tag = Aes256Gcm::new(key.into())
        .encrypt_in_place_detached(&header.iv().into(), header.authenticated(), payload)
        .ok()?;
    for (to, from) in header.tag.iter_mut().zip(tag) {
        *to = from;
    }
    Some(header)
}

/// Opens `payload` in place; false if header and payload were not sealed with this key. Then the payload is
/// as it was.
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
