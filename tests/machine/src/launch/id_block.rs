//! The ID block, as the AMD-SP checks it when the launch is finished (`snp-launch.md` §4).
//!
//! Written apart from the one of the image builder, on purpose. The layout is that of the IGVM file; what
//! is hashed and signed is that of the SNP ABI: the block is 0x60 bytes, a key is 0x404 bytes without the
//! reserved word that the file has behind the curve. The policy that the ID key signs is the launch's own, so
//! an ID block for another policy fails by its signature.

use core::fmt;

use igvm_defs::{
    IGVM_VHS_SNP_ID_BLOCK, IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY, IGVM_VHS_SNP_ID_BLOCK_SIGNATURE,
};
use p384::ecdsa::signature::Verifier;
use p384::ecdsa::{Signature, VerifyingKey};
use p384::{EncodedPoint, FieldBytes};
use sha2::{Digest as _, Sha384};

use super::digest::Digest;
use crate::amd_sp::Identity;

/// ECDSA with P-384 and SHA-384 (SNP ABI, "Algorithm identifiers").
const ECDSA_P384_SHA384: u32 = 1;
/// P-384 (SNP ABI, format of a public key).
const P384: u32 = 2;
/// Bytes of a block, and of a key.
const BLOCK: usize = 0x60;
const KEY: usize = 0x404;

/// What the AMD-SP says to a launch that it does not finish (Linux `psp-sev.h`; which of them for what is
/// this machine's reading, `snp-launch.md` §4).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// A signature does not hold.
    BadSignature = 0x0A,
    /// The launch digest is not the block's.
    BadMeasurement = 0x0B,
    /// An algorithm, curve, key or version that does not exist.
    InvalidParam = 0x16,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::BadSignature => "BAD_SIGNATURE",
            Self::BadMeasurement => "BAD_MEASUREMENT",
            Self::InvalidParam => "INVALID_PARAM",
        };
        write!(f, "{name} ({:#04x})", *self as u32)
    }
}

/// Checks a block against what was launched.
pub fn check(
    block: &IGVM_VHS_SNP_ID_BLOCK,
    digest: &Digest,
    policy: u64,
) -> Result<Identity, Refusal> {
    if block.version != 1 || block.author_key_enabled > 1 {
        return Err(Refusal::InvalidParam);
    }
    if block.ld != *digest {
        return Err(Refusal::BadMeasurement);
    }
    let id_key = key(&block.id_public_key);
    verify(
        block.id_key_algorithm,
        &block.id_public_key,
        &signed_block(block, policy),
        &block.id_key_signature,
    )?;
    let author_key_digest = if block.author_key_enabled == 1 {
        verify(
            block.author_key_algorithm,
            &block.author_public_key,
            &id_key,
            &block.author_key_signature,
        )?;
        Some(Sha384::digest(key(&block.author_public_key)).into())
    } else {
        None
    };
    Ok(Identity {
        family_id: block.family_id,
        image_id: block.image_id,
        guest_svn: block.guest_svn,
        id_key_digest: Sha384::digest(id_key).into(),
        author_key_digest,
    })
}

/// LD, FAMILY_ID, IMAGE_ID, VERSION, GUEST_SVN, POLICY.
fn signed_block(block: &IGVM_VHS_SNP_ID_BLOCK, policy: u64) -> [u8; BLOCK] {
    let mut bytes = [0; BLOCK];
    bytes[..0x30].copy_from_slice(&block.ld);
    bytes[0x30..0x40].copy_from_slice(&block.family_id);
    bytes[0x40..0x50].copy_from_slice(&block.image_id);
    bytes[0x50..0x54].copy_from_slice(&block.version.to_le_bytes());
    bytes[0x54..0x58].copy_from_slice(&block.guest_svn.to_le_bytes());
    bytes[0x58..].copy_from_slice(&policy.to_le_bytes());
    bytes
}

/// CURVE, QX, QY, and zeroes.
fn key(public: &IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY) -> [u8; KEY] {
    let mut bytes = [0; KEY];
    bytes[..4].copy_from_slice(&public.curve.to_le_bytes());
    bytes[4..76].copy_from_slice(&public.qx);
    bytes[76..148].copy_from_slice(&public.qy);
    bytes
}

fn verify(
    algorithm: u32,
    public: &IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY,
    message: &[u8],
    signature: &IGVM_VHS_SNP_ID_BLOCK_SIGNATURE,
) -> Result<(), Refusal> {
    if algorithm != ECDSA_P384_SHA384 || public.curve != P384 {
        return Err(Refusal::InvalidParam);
    }
    let coordinate = |field| number(field).ok_or(Refusal::InvalidParam);
    let point = EncodedPoint::from_affine_coordinates(
        &coordinate(&public.qx)?,
        &coordinate(&public.qy)?,
        false,
    );
    let key = VerifyingKey::from_encoded_point(&point).map_err(|_| Refusal::InvalidParam)?;
    let half = |field| number(field).ok_or(Refusal::BadSignature);
    Signature::from_scalars(half(&signature.r_comp)?, half(&signature.s_comp)?)
        .and_then(|signature| key.verify(message, &signature))
        .map_err(|_| Refusal::BadSignature)
}

/// A number of 384 bits from its field of 576, little endian; none if it is larger.
fn number(field: &[u8; 72]) -> Option<FieldBytes> {
    let mut bytes = *field;
    bytes.reverse();
    let (high, low) = bytes.split_at(24);
    high.iter()
        .all(|&byte| byte == 0)
        .then(|| *FieldBytes::from_slice(low))
}
