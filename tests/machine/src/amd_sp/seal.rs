//! Sealing and opening guest messages (`snp-launch.md` §7).

use alloc::vec::Vec;

use aes_gcm::aead::AeadInPlace;
use aes_gcm::{Aes256Gcm, KeyInit};
use protocols::amd_sp::message::MessageHeader;
use zerocopy::IntoBytes;

/// The payload of `header` in clear, if it was sealed with `key`.
pub(super) fn open(key: &[u8; 32], header: &MessageHeader, sealed: &[u8]) -> Option<Vec<u8>> {
    let tag = header.tag.first_chunk::<{ MessageHeader::TAG_SIZE }>()?;
    let mut payload = sealed.to_vec();
    Aes256Gcm::new(key.into())
        .decrypt_in_place_detached(
            &header.iv().into(),
            header.authenticated(),
            &mut payload,
            tag.into(),
        )
        .ok()?;
    Some(payload)
}

/// Header and payload, sealed with `key`.
pub(super) fn seal(key: &[u8; 32], mut header: MessageHeader, payload: &[u8]) -> Vec<u8> {
    let mut sealed = payload.to_vec();
    // Fails only for payloads of gigabytes.
    let tag = Aes256Gcm::new(key.into()).encrypt_in_place_detached(
        &header.iv().into(),
        header.authenticated(),
        &mut sealed,
    );
    for (to, from) in header.tag.iter_mut().zip(tag.unwrap_or_default()) {
        *to = from;
    }
    [header.as_bytes(), &sealed].concat()
}
