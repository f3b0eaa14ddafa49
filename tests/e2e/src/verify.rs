//! What a verifier does with a report, written from its side (docs/trust.md).
//!
//! Report, chain and signature are read and checked by the crate `sev`, which shares no line with the machine
//! or the paravisor. On top of it: the root is the one that is trusted, the chip and the versions in the
//! report are those that its key was certified for, and the report is about what was asked.

use std::fs;

use anyhow::{Context, Result, bail, ensure};
use igvm_build::id_block::Identity;
use igvm_build::sidecar::hex;
use protocols::amd_sp::certificates::{ARK, ASK, CertificateEntry, VCEK};
use protocols::guid::Guid;
use protocols::svsm::attestation::ServicesManifest;
use sev::certs::snp::{Certificate, Chain, Verifiable};
use sev::firmware::guest::AttestationReport;
use sev::parser::ByteParser;
use sha2::{Digest, Sha512};
use x509_cert::der::{Decode, Encode};
use zerocopy::{FromBytes, IntoBytes};

use crate::chip::{AMD, CHIP_ID_EXTENSION, Chip, TCB_EXTENSIONS};

/// What a guest hands to its verifier.
#[derive(Clone, Debug)]
pub struct Evidence {
    /// The report.
    pub report: Vec<u8>,
    /// The manifest of the services, or of one; empty if the guest itself asked for the report.
    pub manifest: Vec<u8>,
    /// The table of certificates.
    pub certificates: Vec<u8>,
}

/// A report that holds.
#[derive(Clone, Debug)]
pub struct Verified {
    /// The launch digest, in hexadecimal.
    pub measurement: String,
    /// The level that it speaks for.
    pub vmpl: u32,
    /// The data that it was made with.
    pub report_data: [u8; 64],
    /// The guest's policy.
    pub policy: u64,
    /// Who vouches for the guest.
    pub identity: ReportedIdentity,
}

/// What a report tells of the ID block: all of it zero for a guest without one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReportedIdentity {
    /// FAMILY_ID, IMAGE_ID, GUEST_SVN.
    pub identity: Identity,
    /// ID_KEY_DIGEST, in hexadecimal.
    pub id_key_digest: String,
    /// AUTHOR_KEY_EN: whether there is an author key.
    pub author_key: bool,
    /// AUTHOR_KEY_DIGEST, in hexadecimal.
    pub author_key_digest: String,
}

impl Evidence {
    /// Checks signature and chain up to the root that is trusted, `chip.ark`, and that the chip is the one the
    /// key belongs to.
    pub fn verify(&self, chip: &Chip) -> Result<Verified> {
        let trusted = fs::read(&chip.ark).with_context(|| format!("{}", chip.ark.display()))?;
        let ark = self.certificate(ARK)?;
        ensure!(
            ark == trusted.as_slice(),
            "the chain ends at another root than the one that is trusted"
        );
        let (ask, vcek) = (self.certificate(ASK)?, self.certificate(VCEK)?);
        let chain = Chain::from_der(ark, ask, vcek).context("certificates")?;
        let report = AttestationReport::from_bytes(&self.report).context("the report")?;
        (&chain, &report).verify().context("signatures")?;
        certified(&chain.vek, &report)?;
        Ok(Verified {
            measurement: hex(&report.measurement[..]),
            vmpl: report.vmpl,
            report_data: report.report_data[..].try_into()?,
            policy: u64::from(report.policy),
            identity: ReportedIdentity {
                identity: Identity {
                    family_id: report.family_id,
                    image_id: report.image_id,
                    guest_svn: report.guest_svn,
                },
                id_key_digest: hex(&report.id_key_digest),
                author_key: report.key_info.author_key_en(),
                author_key_digest: hex(&report.author_key_digest),
            },
        })
    }

    /// The same for a report of the paravisor's: it speaks for VMPL0, and is about `nonce` and the manifest.
    /// Returns that as well.
    pub fn verify_services(
        &self,
        chip: &Chip,
        nonce: &[u8; 64],
    ) -> Result<(Verified, ServicesManifest)> {
        let verified = self.verify(chip)?;
        ensure!(
            verified.vmpl == 0,
            "the report speaks for VMPL{}, not for the paravisor",
            verified.vmpl
        );
        let expected = Sha512::new()
            .chain_update(nonce)
            .chain_update(&self.manifest)
            .finalize();
        ensure!(
            verified.report_data[..] == expected[..],
            "the report is not about this nonce and this manifest"
        );
        let Ok(manifest) = ServicesManifest::read_from_bytes(&self.manifest) else {
            bail!("{} bytes are no manifest of services", self.manifest.len());
        };
        let known = ServicesManifest::new(manifest.turnstile);
        ensure!(
            manifest.header == known.header && manifest.entry == known.entry,
            "the manifest's table is not the paravisor's"
        );
        Ok((verified, manifest))
    }

    /// The certificate with this GUID in the table.
    fn certificate(&self, wanted: Guid) -> Result<&[u8]> {
        for entry in self
            .certificates
            .chunks_exact(size_of::<CertificateEntry>())
        {
            let entry = CertificateEntry::read_from_bytes(entry)
                .map_err(|_| anyhow::anyhow!("the table of certificates"))?;
            if entry.as_bytes().iter().all(|byte| *byte == 0) {
                break;
            }
            if entry.guid == wanted {
                let start = entry.offset as usize;
                return self
                    .certificates
                    .get(start..)
                    .and_then(|rest| rest.get(..entry.length as usize))
                    .with_context(|| format!("certificate {wanted} lies outside of its table"));
            }
        }
        bail!("there is no certificate {wanted}")
    }
}

/// The key was certified for this chip and for these versions.
fn certified(vcek: &Certificate, report: &AttestationReport) -> Result<()> {
    let certificate = x509_cert::Certificate::from_der(&vcek.to_der()?)?;
    let extensions = certificate.tbs_certificate.extensions.unwrap_or_default();
    let value = |number: &str| {
        let oid = format!("{AMD}.{number}");
        extensions
            .iter()
            .find(|extension| extension.extn_id.to_string() == oid)
            .map(|extension| extension.extn_value.as_bytes())
            .with_context(|| format!("the VCEK's certificate lacks extension {oid}"))
    };
    ensure!(
        value(CHIP_ID_EXTENSION)? == &report.chip_id[..],
        "the report names another chip than the key's"
    );
    let raw = report.to_bytes()?;
    let reported = &raw[0x180..0x188];
    for (number, byte) in TCB_EXTENSIONS {
        ensure!(
            value(number)? == reported[byte].to_der()?,
            "byte {byte} of the reported versions is not what the key was made for"
        );
    }
    Ok(())
}
