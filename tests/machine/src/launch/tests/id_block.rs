//! ID blocks: a good one, and each way in which one is not.

use igvm_defs::{IGVM_VHS_SNP_ID_BLOCK, IGVM_VHS_SNP_ID_BLOCK_SIGNATURE};
use p384::ecdsa::signature::Signer;
use p384::ecdsa::{Signature, SigningKey};
use sha2::{Digest as _, Sha384};
use zerocopy::FromZeros;

use super::super::id_block::Refusal;
use super::*;
use crate::amd_sp::Identity;

const POLICY: u64 = 0x3_0000;

fn signing_key(seed: u8) -> SigningKey {
    SigningKey::from_slice(&[seed; 48]).unwrap()
}

fn field(number: &[u8]) -> [u8; 72] {
    let mut field = [0; 72];
    field[..48].copy_from_slice(number);
    field[..48].reverse();
    field
}

fn signature(key: &SigningKey, message: &[u8]) -> IGVM_VHS_SNP_ID_BLOCK_SIGNATURE {
    let signature: Signature = key.sign(message);
    let (r, s) = signature.split_bytes();
    IGVM_VHS_SNP_ID_BLOCK_SIGNATURE {
        r_comp: field(&r),
        s_comp: field(&s),
    }
}

/// The public key as it is hashed.
fn public(key: &SigningKey) -> Vec<u8> {
    let point = key.verifying_key().to_encoded_point(false);
    let mut bytes = 2u32.to_le_bytes().to_vec();
    bytes.extend(field(point.x().unwrap()));
    bytes.extend(field(point.y().unwrap()));
    bytes.resize(0x404, 0);
    bytes
}

/// A block for `digest`, signed by key 1 and, if `author`, by key 2.
fn signed(digest: &[u8; 48], author: bool) -> IGVM_VHS_SNP_ID_BLOCK {
    let mut block = IGVM_VHS_SNP_ID_BLOCK::new_zeroed();
    block.compatibility_mask = 1;
    block.ld = *digest;
    block.family_id = [0xFA; 16];
    block.image_id = [0x1D; 16];
    block.version = 1;
    block.guest_svn = 7;
    let message = [
        &digest[..],
        &[0xFA; 16],
        &[0x1D; 16],
        &1u32.to_le_bytes(),
        &7u32.to_le_bytes(),
        &POLICY.to_le_bytes(),
    ]
    .concat();
    assert_eq!(message.len(), 0x60);
    let id = signing_key(1);
    block.id_key_algorithm = 1;
    block.id_key_signature = signature(&id, &message);
    let bytes = public(&id);
    block.id_public_key.curve = 2;
    block.id_public_key.qx.copy_from_slice(&bytes[4..76]);
    block.id_public_key.qy.copy_from_slice(&bytes[76..148]);
    if author {
        let key = signing_key(2);
        block.author_key_enabled = 1;
        block.author_key_algorithm = 1;
        block.author_key_signature = signature(&key, &bytes);
        let bytes = public(&key);
        block.author_public_key.curve = 2;
        block.author_public_key.qx.copy_from_slice(&bytes[4..76]);
        block.author_public_key.qy.copy_from_slice(&bytes[76..148]);
    }
    block
}

/// Launches the usual image with these blocks.
fn launch(blocks: &[IGVM_VHS_SNP_ID_BLOCK]) -> Result<Launched, LaunchError> {
    let mut headers = headers();
    for block in blocks {
        headers.push((0x30B, block.as_bytes().to_vec()));
    }
    run("", &file(&headers)).1
}

fn digest() -> [u8; 48] {
    launch(&[]).unwrap().digest
}

#[test]
fn a_good_block_is_taken_and_measures_nothing() {
    let digest = digest();
    for author in [false, true] {
        let launched = launch(&[signed(&digest, author)]).unwrap();
        assert_eq!(launched.digest, digest);
        let expected = Identity {
            family_id: [0xFA; 16],
            image_id: [0x1D; 16],
            guest_svn: 7,
            id_key_digest: Sha384::digest(public(&signing_key(1))).into(),
            author_key_digest: author.then(|| Sha384::digest(public(&signing_key(2))).into()),
        };
        assert_eq!(launched.identity, Some(expected));
    }
    assert_eq!(launch(&[]).unwrap().identity, None);
}

/// `snp-launch.md` §4 and §9.
#[test]
fn what_does_not_hold_is_refused_with_its_status() {
    type Spoil = fn(&mut IGVM_VHS_SNP_ID_BLOCK);
    let rows: [(&str, Spoil, Refusal); 14] = [
        ("digest", |b| b.ld[0] ^= 1, Refusal::BadMeasurement),
        ("family", |b| b.family_id[0] ^= 1, Refusal::BadSignature),
        ("image", |b| b.image_id[15] ^= 1, Refusal::BadSignature),
        ("SVN", |b| b.guest_svn += 1, Refusal::BadSignature),
        ("version", |b| b.version = 2, Refusal::InvalidParam),
        (
            "r",
            |b| b.id_key_signature.r_comp[0] ^= 1,
            Refusal::BadSignature,
        ),
        (
            "r zero",
            |b| b.id_key_signature.r_comp.fill(0),
            Refusal::BadSignature,
        ),
        (
            "s too large",
            |b| b.id_key_signature.s_comp[71] = 1,
            Refusal::BadSignature,
        ),
        (
            "algorithm",
            |b| b.id_key_algorithm = 2,
            Refusal::InvalidParam,
        ),
        (
            "curve",
            |b| b.id_public_key.curve = 1,
            Refusal::InvalidParam,
        ),
        (
            "no point",
            |b| b.id_public_key.qx[0] ^= 1,
            Refusal::InvalidParam,
        ),
        (
            "author's s",
            |b| b.author_key_signature.s_comp[0] ^= 1,
            Refusal::BadSignature,
        ),
        (
            "author's algorithm",
            |b| b.author_key_algorithm = 0,
            Refusal::InvalidParam,
        ),
        (
            "enabled how",
            |b| b.author_key_enabled = 2,
            Refusal::InvalidParam,
        ),
    ];
    let good = signed(&digest(), true);
    for (name, spoil, refusal) in rows {
        let mut block = good;
        spoil(&mut block);
        assert_eq!(
            launch(&[block]),
            Err(LaunchError::IdBlock(refusal)),
            "{name}"
        );
    }
    let text = LaunchError::IdBlock(Refusal::BadMeasurement).to_string();
    assert!(text.contains("BAD_MEASUREMENT (0x0b)"), "{text}");
}

/// The key signs the policy as well.
#[test]
fn a_block_for_another_policy_is_refused() {
    let mut headers = headers();
    headers[1] = policy(POLICY | 1 << 19);
    headers.push((0x30B, signed(&digest(), false).as_bytes().to_vec()));
    let launched = run("", &file(&headers)).1;
    assert_eq!(launched, Err(LaunchError::IdBlock(Refusal::BadSignature)));
}

#[test]
fn a_file_has_one_block_with_nothing_in_its_gaps() {
    let block = signed(&digest(), false);
    let refused = |blocks: &[_]| match launch(blocks) {
        Err(LaunchError::File(error)) => error,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(&[block, block]), FileError::IdBlockTwice);
    let mut gap = block;
    gap.id_public_key.reserved = 1;
    assert_eq!(refused(&[gap]), FileError::Reserved(0x30B));
    let mut gap = block;
    gap.reserved[2] = 1;
    assert_eq!(refused(&[gap]), FileError::Reserved(0x30B));
    // For another platform it says nothing.
    let mut other = block;
    other.compatibility_mask = 2;
    other.ld[0] ^= 1;
    assert_eq!(launch(&[other]).unwrap().identity, None);
}

#[test]
fn policies_with_bits_that_mean_nothing_are_refused() {
    for value in [POLICY | 1 << 26, POLICY | 1 << 63, 1 << 16] {
        let mut headers = headers();
        headers[1] = policy(value);
        assert_eq!(run("", &file(&headers)).1, Err(LaunchError::Policy(value)));
    }
}
