//! A chip for the emulated security processor, with the certificates that a verifier follows.
//!
//! The chain has the form of AMD's: a root (ARK) and an intermediate (ASK) with RSA keys of 4096 bits that sign
//! with PSS and SHA-384, and below them the certificate of the chip's P-384 key (VCEK), whose extensions say
//! which chip and which versions it is for. The keys are made at random, once per checkout: RSA keys take
//! their time. They vouch for nothing but the tests; the private keys of ARK and ASK are not even kept.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use p384::ecdsa::SigningKey;
use p384::pkcs8::EncodePublicKey;
use protocols::amd_sp::certificates::{ARK, ASK, CertificateEntry, VCEK};
use protocols::amd_sp::endorsement::Endorsement;
use rand_core::{OsRng, RngCore};
use rsa::RsaPrivateKey;
use rsa::pss::BlindedSigningKey;
use rsa::signature::Keypair;
use sha2::Sha384;
use x509_cert::builder::{Builder, CertificateBuilder, Profile};
use x509_cert::certificate::Certificate;
use x509_cert::der::Encode;
use x509_cert::der::asn1::ObjectIdentifier;
use x509_cert::der::oid::AssociatedOid;
use x509_cert::ext::{AsExtension, Extension};
use x509_cert::name::Name;
use x509_cert::serial_number::SerialNumber;
use x509_cert::spki::SubjectPublicKeyInfoOwned;
use x509_cert::time::Validity;
use zerocopy::{FromBytes, IntoBytes};

use crate::image;
use crate::vm::option;

/// Size of AMD's RSA keys.
const RSA_BITS: usize = 4096;
/// How long the certificates are good.
const LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Versions of boot loader, TEE, SNP firmware and microcode, at their places in a TCB_VERSION of Milan.
const TCB: [u8; 8] = [4, 0, 0, 0, 0, 0, 24, 219];

/// The files of a chip.
#[derive(Clone, Debug)]
pub struct Chip {
    /// What the security processor is given: [`Endorsement`].
    pub endorsement: PathBuf,
    /// The host's table of certificates.
    pub certificates: PathBuf,
    /// The root certificate, DER: what a verifier trusts.
    pub ark: PathBuf,
}

impl Chip {
    /// The files below `dir`.
    fn within(dir: &Path) -> Chip {
        Chip {
            endorsement: dir.join("endorsement"),
            certificates: dir.join("certificates"),
            ark: dir.join("ark.der"),
        }
    }

    /// QEMU's options that hand it to the machine.
    pub(crate) fn options(&self) -> impl Iterator<Item = OsString> {
        [
            ("endorsement", &self.endorsement),
            ("certificates", &self.certificates),
        ]
        .into_iter()
        .flat_map(|(name, file)| {
            let head = format!("name=opt/turnstile/{name},file=");
            ["-fw_cfg".into(), option(&head, file)]
        })
    }

    /// The chip in `dir`, made if there is none.
    pub fn obtain(dir: &Path) -> Result<Chip> {
        let chip = Chip::within(dir);
        let there = fs::read(&chip.endorsement)
            .is_ok_and(|bytes| Endorsement::read_from_bytes(&bytes).is_ok());
        if there {
            return Ok(chip);
        }
        fs::create_dir_all(dir).with_context(|| format!("{}", dir.display()))?;
        let made = Made::new(RSA_BITS).context("a chip for the emulated security processor")?;
        image::write(&chip.ark, &made.ark)?;
        image::write(&chip.certificates, &made.table())?;
        // Written last: it says that the rest is complete.
        image::write(&chip.endorsement, made.endorsement.as_bytes())?;
        Ok(chip)
    }
}

/// A chip and its certificates, DER.
pub(crate) struct Made {
    pub endorsement: Endorsement,
    pub ark: Vec<u8>,
    pub ask: Vec<u8>,
    pub vcek: Vec<u8>,
}

impl Made {
    /// A chip at random, below RSA keys of so many bits.
    pub fn new(rsa_bits: usize) -> Result<Made> {
        // Side by side: each is a search for two primes.
        let other = std::thread::spawn(move || rsa_key(rsa_bits));
        let ark_key = rsa_key(rsa_bits)?;
        let ask_key = other.join().map_err(|_| anyhow!("no RSA key"))??;
        let (ark_name, ask_name) = (name("ARK-Test")?, name("SEV-Test")?);
        let ark = certify(Profile::Root, &ark_name, spki(&ark_key)?, &ark_key, &[])?;
        let sub = Profile::SubCA {
            issuer: ark_name,
            path_len_constraint: Some(0),
        };
        let ask = certify(sub, &ask_name, spki(&ask_key)?, &ark_key, &[])?;

        let vcek_key = SigningKey::random(&mut OsRng);
        let mut chip_id = [0; 64];
        OsRng.fill_bytes(&mut chip_id);
        let leaf = Profile::Leaf {
            issuer: ask_name,
            enable_key_agreement: false,
            enable_key_encipherment: false,
        };
        let public = vcek_key.verifying_key().to_public_key_der()?;
        let public = SubjectPublicKeyInfoOwned::try_from(public.as_bytes())?;
        let extensions = claims(&chip_id)?;
        let vcek = certify(leaf, &name("SEV-VCEK")?, public, &ask_key, &extensions)?;
        let endorsement = Endorsement {
            vcek: vcek_key.to_bytes().into(),
            chip_id,
            tcb: u64::from_le_bytes(TCB),
        };
        Ok(Made {
            endorsement,
            ark,
            ask,
            vcek,
        })
    }

    /// The table as the host hands it out.
    pub fn table(&self) -> Vec<u8> {
        let all = [(VCEK, &self.vcek), (ASK, &self.ask), (ARK, &self.ark)];
        let head = (all.len() + 1) * size_of::<CertificateEntry>();
        let mut table = Vec::new();
        let mut offset = head;
        for (guid, certificate) in all {
            let entry = CertificateEntry {
                guid,
                offset: offset as u32,
                length: certificate.len() as u32,
            };
            table.extend_from_slice(entry.as_bytes());
            offset += certificate.len();
        }
        table.resize(head, 0);
        for (_, certificate) in all {
            table.extend_from_slice(certificate);
        }
        table
    }
}

type RsaSigner = BlindedSigningKey<Sha384>;

fn rsa_key(bits: usize) -> Result<RsaSigner> {
    Ok(RsaSigner::new(RsaPrivateKey::new(&mut OsRng, bits)?))
}

fn spki(key: &RsaSigner) -> Result<SubjectPublicKeyInfoOwned> {
    let der = rsa::pkcs8::EncodePublicKey::to_public_key_der(&key.verifying_key())?;
    Ok(SubjectPublicKeyInfoOwned::try_from(der.as_bytes())?)
}

fn name(common: &str) -> Result<Name> {
    let text = format!("CN={common},O=Turnstile test chip,OU=Engineering,C=US");
    Ok(Name::from_str(&text)?)
}

fn certify(
    profile: Profile,
    subject: &Name,
    public: SubjectPublicKeyInfoOwned,
    signer: &RsaSigner,
    extensions: &[Claim],
) -> Result<Vec<u8>> {
    let mut serial = [0; 16];
    OsRng.fill_bytes(&mut serial);
    // A positive number of this length.
    serial[0] = serial[0] & 0x7F | 0x40;
    let mut builder = CertificateBuilder::new(
        profile,
        SerialNumber::new(&serial)?,
        Validity::from_now(LIFE)?,
        subject.clone(),
        public,
        signer,
    )?;
    for extension in extensions {
        builder.add_extension(extension)?;
    }
    let certificate: Certificate = builder.build_with_rng(&mut OsRng)?;
    Ok(certificate.to_der()?)
}

/// Below this are AMD's extensions (AMD 57230, VCEK certificate).
pub(crate) const AMD: &str = "1.3.6.1.4.1.3704.1";
/// Which byte of a TCB_VERSION of Milan each extension tells.
pub(crate) const TCB_EXTENSIONS: [(&str, usize); 8] = [
    ("3.1", 0),
    ("3.2", 1),
    ("3.4", 2),
    ("3.5", 3),
    ("3.6", 4),
    ("3.7", 5),
    ("3.3", 6),
    ("3.8", 7),
];
/// The extension with the chip's id.
pub(crate) const CHIP_ID_EXTENSION: &str = "4";

/// What a VCEK's certificate says about its chip: one extension.
struct Claim {
    oid: ObjectIdentifier,
    value: Vec<u8>,
}

/// All that is said about a chip.
fn claims(chip_id: &[u8; 64]) -> Result<Vec<Claim>> {
    let claim = |number: &str, value: Vec<u8>| -> Result<Claim> {
        let oid = ObjectIdentifier::new(&format!("{AMD}.{number}"))
            .map_err(|error| anyhow!("{error}"))?;
        Ok(Claim { oid, value })
    };
    TCB_EXTENSIONS
        .iter()
        .map(|&(number, byte)| claim(number, TCB[byte].to_der()?))
        .chain([claim(CHIP_ID_EXTENSION, chip_id.to_vec())])
        .collect()
}

impl AssociatedOid for Claim {
    // Never asked for: `to_extension` says which it is.
    const OID: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1");
}

impl Encode for Claim {
    fn encoded_len(&self) -> x509_cert::der::Result<x509_cert::der::Length> {
        self.value.len().try_into()
    }

    fn encode(&self, writer: &mut impl x509_cert::der::Writer) -> x509_cert::der::Result<()> {
        writer.write(&self.value)
    }
}

impl AsExtension for Claim {
    fn critical(&self, _: &Name, _: &[Extension]) -> bool {
        false
    }

    fn to_extension(&self, _: &Name, _: &[Extension]) -> Result<Extension, x509_cert::der::Error> {
        Ok(Extension {
            extn_id: self.oid,
            critical: false,
            extn_value: x509_cert::der::asn1::OctetString::new(self.value.as_slice())?,
        })
    }
}
