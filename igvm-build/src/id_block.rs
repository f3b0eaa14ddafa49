//! The ID block of SEV-SNP: who vouches for a launch digest and a policy, and with which keys.
//!
//! The security processor compares digest and policy with those of the launch, and checks two signatures:
//! the ID key's over the block, and, if there is an author, the author key's over the ID key. The digests of
//! both public keys are in every attestation report. In an IGVM file all of it is one header
//! (`IGVM_VHS_SNP_ID_BLOCK`); QEMU also takes block and signatures by themselves, as base64 in the properties
//! `id-block` and `id-auth` of `sev-snp-guest` ([`Signed::for_qemu`]).
//!
//! All numbers are little endian (SNP ABI, "ID Block", "ID Authentication Information Structure",
//! "Format for an ECDSA P-384 Public Key"). Signatures are deterministic (RFC 6979): the same key and image
//! give the same file.

use igvm_defs::{
    IGVM_VHS_SNP_ID_BLOCK, IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY, IGVM_VHS_SNP_ID_BLOCK_SIGNATURE,
    IgvmPlatformType, IgvmVariableHeaderType as Type,
};
pub use p384::ecdsa::SigningKey;
use p384::ecdsa::signature::{Signer, Verifier};
use p384::ecdsa::{Signature, VerifyingKey};
use p384::pkcs8::DecodePrivateKey;
use protocols::measure::Digest;
use sha2::{Digest as _, Sha384};
use zerocopy::{FromZeros, Immutable, IntoBytes};

use crate::error::Error;
use crate::file::{File, edit};
use crate::measure::quietly;
use crate::measure::snp::{Loader, launch_digest};

/// ECDSA on P-384 with SHA-384, as algorithm of a signature.
const ALGORITHM: u32 = 1;
/// P-384, as curve of a key.
const CURVE: u32 = 2;
/// The only version of the block.
const VERSION: u32 = 1;
/// Bytes of a number on the curve.
const NUMBER: usize = 48;

/// The block that is signed.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Block {
    launch_digest: Digest,
    family_id: [u8; 16],
    image_id: [u8; 16],
    version: u32,
    guest_svn: u32,
    policy: u64,
}

/// A public key as the security processor has it.
#[derive(Clone, FromZeros, IntoBytes, Immutable)]
#[repr(C)]
struct Key {
    curve: u32,
    x: [u8; 72],
    y: [u8; 72],
    reserved: [u8; 0x370],
}

/// A signature as the security processor has it.
#[derive(Clone, FromZeros, IntoBytes, Immutable)]
#[repr(C)]
struct LongSignature {
    r: [u8; 72],
    s: [u8; 72],
    reserved: [u8; 0x170],
}

/// What authenticates a block: one page.
#[derive(FromZeros, IntoBytes, Immutable)]
#[repr(C)]
struct Auth {
    id_key_algorithm: u32,
    author_key_algorithm: u32,
    reserved: [u8; 0x38],
    block_signature: LongSignature,
    id_key: Key,
    reserved2: [u8; 0x3C],
    id_key_signature: LongSignature,
    author_key: Key,
    reserved3: [u8; 0x37C],
}

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<Block>() == 0x60);
    assert!(size_of::<Key>() == 0x404);
    assert!(size_of::<LongSignature>() == 0x200);
    assert!(offset_of!(Auth, block_signature) == 0x40);
    assert!(offset_of!(Auth, id_key) == 0x240);
    assert!(offset_of!(Auth, id_key_signature) == 0x680);
    assert!(offset_of!(Auth, author_key) == 0x880);
    assert!(size_of::<Auth>() == 0x1000);
};

/// What an ID block says besides digest and policy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Identity {
    /// A family of images; free to choose.
    pub family_id: [u8; 16],
    /// An image of the family; free to choose.
    pub image_id: [u8; 16],
    /// Security version of the guest.
    pub guest_svn: u32,
}

/// The keys that sign.
pub struct Keys {
    /// Signs the block.
    pub id: SigningKey,
    /// Signs the ID key.
    pub author: Option<SigningKey>,
}

/// A signed ID block.
#[derive(Debug, Clone, Copy)]
pub struct Signed {
    /// The header for an IGVM file.
    pub header: IGVM_VHS_SNP_ID_BLOCK,
    /// The policy that is signed with it.
    pub policy: u64,
}

/// Reads a private key from PEM, as PKCS #8 or as SEC 1.
///
/// # Errors
///
/// [`Error::Key`] when it is no unencrypted private key on P-384.
pub fn read_key(pem: &str) -> Result<SigningKey, Error> {
    let bad = |reason: String| Error::Key { reason };
    // OpenSSL puts the parameters of the curve in front of a key in SEC 1.
    const SEC1: &str = "-----BEGIN EC PRIVATE KEY-----";
    let key = match pem.find(SEC1) {
        Some(at) => p384::SecretKey::from_sec1_pem(pem.get(at..).unwrap_or_default())
            .map_err(|error| bad(error.to_string()))?,
        None if pem.contains("ENCRYPTED") => return Err(bad("it is encrypted".to_owned())),
        None => p384::SecretKey::from_pkcs8_pem(pem).map_err(|error| bad(error.to_string()))?,
    };
    Ok(SigningKey::from(key))
}

/// Puts a signed ID block into the image `bytes`, in place of one that may be there, for the launch digest
/// that `loader` makes of it and for its policy.
///
/// # Errors
///
/// When the image cannot be measured, or has no policy for SEV-SNP.
pub fn sign_image(
    bytes: &[u8],
    loader: Loader,
    identity: &Identity,
    keys: &Keys,
) -> Result<(Vec<u8>, Signed), Error> {
    let file = File::read(bytes)?;
    let digest = launch_digest(&file, loader, &mut quietly)?;
    let platform = "SEV-SNP";
    let mask = file
        .mask_of(IgvmPlatformType::SEV_SNP)
        .ok_or(Error::NoPlatform { platform })?;
    let policy = file.policy(mask).ok_or(Error::NoPolicy)?;
    let signed = sign(&digest, policy, mask, identity, keys);
    let image = put_into(&file, &signed.header)?;
    Ok((image, signed))
}

/// The file with this ID block in place of one that may be there.
///
/// # Errors
///
/// When the file has headers that cannot be moved.
pub fn put_into(file: &File<'_>, header: &IGVM_VHS_SNP_ID_BLOCK) -> Result<Vec<u8>, Error> {
    let kind = Type::IGVM_VHT_SNP_ID_BLOCK;
    let added = Some((kind, header.as_bytes()));
    Ok(edit::replace(file, |old| old.kind == kind, added)?)
}

/// Signs a launch digest and a policy for the platform with the bit `mask`.
#[must_use]
pub fn sign(
    launch_digest: &Digest,
    policy: u64,
    mask: u32,
    identity: &Identity,
    keys: &Keys,
) -> Signed {
    let block = Block {
        launch_digest: *launch_digest,
        family_id: identity.family_id,
        image_id: identity.image_id,
        version: VERSION,
        guest_svn: identity.guest_svn,
        policy,
    };
    let mut header = IGVM_VHS_SNP_ID_BLOCK::new_zeroed();
    header.compatibility_mask = mask;
    header.ld = block.launch_digest;
    header.family_id = block.family_id;
    header.image_id = block.image_id;
    header.version = block.version;
    header.guest_svn = block.guest_svn;
    header.id_key_algorithm = ALGORITHM;
    header.id_key_signature = signature(&keys.id, block.as_bytes());
    header.id_public_key = public(keys.id.verifying_key());
    if let Some(author) = &keys.author {
        header.author_key_enabled = 1;
        header.author_key_algorithm = ALGORITHM;
        header.author_key_signature = signature(author, key(&header.id_public_key).as_bytes());
        header.author_public_key = public(author.verifying_key());
    }
    Signed { header, policy }
}

impl Signed {
    /// Block and authentication as QEMU's `sev-snp-guest` takes them, before base64.
    #[must_use]
    pub fn for_qemu(&self) -> (Vec<u8>, Vec<u8>) {
        let header = &self.header;
        let mut auth = Auth::new_zeroed();
        auth.id_key_algorithm = header.id_key_algorithm;
        auth.author_key_algorithm = header.author_key_algorithm;
        auth.block_signature = long(&header.id_key_signature);
        auth.id_key = key(&header.id_public_key);
        if header.author_key_enabled != 0 {
            auth.id_key_signature = long(&header.author_key_signature);
            auth.author_key = key(&header.author_public_key);
        }
        let block = block(header, self.policy);
        (block.as_bytes().to_vec(), auth.as_bytes().to_vec())
    }

    /// The digests of the ID key and, if there is one, of the author key: what reports show.
    #[must_use]
    pub fn key_digests(&self) -> (Digest, Option<Digest>) {
        let digest = |public| Sha384::digest(key(public).as_bytes()).into();
        let author =
            (self.header.author_key_enabled != 0).then(|| digest(&self.header.author_public_key));
        (digest(&self.header.id_public_key), author)
    }
}

/// Why an ID block is not good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// An algorithm or curve other than the one there is.
    Algorithm,
    /// A key that is not on the curve.
    Key,
    /// The signature of the block.
    Signature,
    /// The author's signature.
    AuthorSignature,
}

/// Checks the signatures of an ID block; `policy` is that of the file.
///
/// # Errors
///
/// The first thing that does not hold.
pub fn verify(header: &IGVM_VHS_SNP_ID_BLOCK, policy: u64) -> Result<(), Refusal> {
    let checked = |algorithm, public, signed: &[u8], signature, refusal| {
        let verifying = verifying_key(algorithm, public)?;
        let signature = parse_signature(signature).ok_or(refusal)?;
        verifying.verify(signed, &signature).map_err(|_| refusal)
    };
    checked(
        header.id_key_algorithm,
        &header.id_public_key,
        block(header, policy).as_bytes(),
        &header.id_key_signature,
        Refusal::Signature,
    )?;
    if header.author_key_enabled == 0 {
        return Ok(());
    }
    checked(
        header.author_key_algorithm,
        &header.author_public_key,
        key(&header.id_public_key).as_bytes(),
        &header.author_key_signature,
        Refusal::AuthorSignature,
    )
}

/// The header as QEMU takes it: whether there is an author key says the first byte of the key, which is that
/// of its curve (`target/i386/sev.c`).
#[must_use]
pub fn as_qemu_reads(header: &IGVM_VHS_SNP_ID_BLOCK) -> IGVM_VHS_SNP_ID_BLOCK {
    let [first, ..] = header.author_public_key.curve.to_le_bytes();
    IGVM_VHS_SNP_ID_BLOCK {
        author_key_enabled: u8::from(first != 0),
        ..*header
    }
}

/// The block that the signature of a header covers.
fn block(header: &IGVM_VHS_SNP_ID_BLOCK, policy: u64) -> Block {
    Block {
        launch_digest: header.ld,
        family_id: header.family_id,
        image_id: header.image_id,
        version: header.version,
        guest_svn: header.guest_svn,
        policy,
    }
}

fn verifying_key(
    algorithm: u32,
    public: &IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY,
) -> Result<VerifyingKey, Refusal> {
    if algorithm != ALGORITHM || public.curve != CURVE {
        return Err(Refusal::Algorithm);
    }
    let (x, y) = big_endian(&public.qx)
        .zip(big_endian(&public.qy))
        .ok_or(Refusal::Key)?;
    let point = p384::EncodedPoint::from_affine_coordinates(&x.into(), &y.into(), false);
    VerifyingKey::from_encoded_point(&point).map_err(|_| Refusal::Key)
}

fn parse_signature(signature: &IGVM_VHS_SNP_ID_BLOCK_SIGNATURE) -> Option<Signature> {
    let (r, s) = big_endian(&signature.r_comp).zip(big_endian(&signature.s_comp))?;
    Signature::from_scalars(r, s).ok()
}

fn signature(key: &SigningKey, message: &[u8]) -> IGVM_VHS_SNP_ID_BLOCK_SIGNATURE {
    let signature: Signature = key.sign(message);
    let (r, s) = signature.split_bytes();
    IGVM_VHS_SNP_ID_BLOCK_SIGNATURE {
        r_comp: little_endian(&r),
        s_comp: little_endian(&s),
    }
}

fn public(verifying: &VerifyingKey) -> IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY {
    let point = verifying.to_encoded_point(false);
    // A point that is not compressed has both, and a key is not the point at infinity.
    let number = |bytes: Option<&p384::FieldBytes>| little_endian(bytes.map_or(&[], |b| b));
    IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY {
        curve: CURVE,
        reserved: 0,
        qx: number(point.x()),
        qy: number(point.y()),
    }
}

/// The key as it is hashed and signed: without the reserved word that the IGVM format has.
fn key(public: &IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY) -> Key {
    Key {
        curve: public.curve,
        x: public.qx,
        y: public.qy,
        ..Key::new_zeroed()
    }
}

fn long(signature: &IGVM_VHS_SNP_ID_BLOCK_SIGNATURE) -> LongSignature {
    LongSignature {
        r: signature.r_comp,
        s: signature.s_comp,
        ..LongSignature::new_zeroed()
    }
}

/// The other way round, in 72 bytes.
fn little_endian(number: &[u8]) -> [u8; 72] {
    let mut field = [0; 72];
    let reversed = number.iter().rev();
    field
        .iter_mut()
        .zip(reversed)
        .for_each(|(to, from)| *to = *from);
    field
}

/// The number in a field, if it is not longer than the curve's.
fn big_endian(field: &[u8; 72]) -> Option<[u8; NUMBER]> {
    let (low, high) = field.split_at(NUMBER);
    if high.iter().any(|&byte| byte != 0) {
        return None;
    }
    let mut number = [0; NUMBER];
    let reversed = low.iter().rev();
    number
        .iter_mut()
        .zip(reversed)
        .for_each(|(to, from)| *to = *from);
    Some(number)
}
