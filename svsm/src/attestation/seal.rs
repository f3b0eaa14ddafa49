//! Sealing what goes to the security processor, and opening what comes back (SNP ABI, guest messages).
//!
//! The key is expanded for each message and forgotten with it. The cipher crates wipe what they hold when it is
//! dropped; what they have moved about before, and what the compiler has kept beside it, lies on the stack, and
//! that is wiped behind them. Registers are not. AES and GHASH are computed without tables, so they take the
//! same time whatever the key is, and tags are compared in constant time.

use aes_gcm::aead::AeadInPlace;
use aes_gcm::{Aes256Gcm, KeyInit};
use protocols::amd_sp::message::MessageHeader;
use zeroize::{ZeroizeOnDrop, zeroize_stack};

/// A key of a privilege level (VMPCK).
pub type Key = [u8; 32];

/// Bytes of stack that the ciphers use at most, and some more. Without optimisation everything is copied again
/// and again.
const STACK: usize = if cfg!(debug_assertions) {
    64 << 10
} else {
    6 << 10
};

/// The round keys are wiped, and so is GHASH's key.
const _: () = {
    const fn wipes_itself<T: ZeroizeOnDrop>() {}
    wipes_itself::<aes::Aes256>();
    // It does not say so by the trait. The other implementation, of hosts, does not wipe itself.
    #[cfg(target_os = "none")]
    assert!(core::mem::needs_drop::<ghash::GHash>());
};

/// Seals `payload` in place and puts the tag into the header; false if the payload is too long for the cipher,
/// which no message is.
#[must_use]
pub fn seal(key: &Key, header: &mut MessageHeader, payload: &mut [u8]) -> bool {
    let sealed = sealed(key, header, payload);
    zeroize_stack::<STACK>();
    sealed
}

/// Opens `payload` in place; false if header and payload were not sealed with this key. Then the payload is
/// as it was.
#[must_use]
pub fn open(key: &Key, header: &MessageHeader, payload: &mut [u8]) -> bool {
    let opened = opened(key, header, payload);
    zeroize_stack::<STACK>();
    opened
}

/// [`seal`] in a frame of its own, below which everything is to be wiped.
#[inline(never)]
fn sealed(key: &Key, header: &mut MessageHeader, payload: &mut [u8]) -> bool {
    let tag = Aes256Gcm::new(key.into()).encrypt_in_place_detached(
        &header.iv().into(),
        header.authenticated(),
        payload,
    );
    let Ok(tag) = tag else {
        return false;
    };
    for (to, from) in header.tag.iter_mut().zip(tag) {
        *to = from;
    }
    true
}

/// The same of [`open`].
#[inline(never)]
fn opened(key: &Key, header: &MessageHeader, payload: &mut [u8]) -> bool {
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
mod tests;
