//! What a verifier does with a report, written from its side: all that docs/trust.md lists, but for revocation.
//!
//! Report, chain and signature are read and checked by the crate `sev`, which shares no line with the machine
//! or the paravisor. On top of it: the root is the one that is trusted, the chip and the versions in the
//! report are those that its key was certified for, and what the report says is what was [demanded](Demands).

use anyhow::{Context, Result, bail, ensure};
use igvm_build::id_block::Identity;
use igvm_build::sidecar::hex;
use protocols::amd_sp::certificates::{ARK, ASK, CertificateEntry, VCEK};
use protocols::guid::Guid;
use protocols::launch::AcceptPolicy;
use protocols::svsm::attestation::ServicesManifest;
use sev::certs::snp::{Certificate, Chain, Verifiable};
use sev::firmware::guest::AttestationReport;
use sev::parser::ByteParser;
use sha2::{Digest, Sha512};
use x509_cert::der::{Decode, Encode};
use zerocopy::{FromBytes, IntoBytes};

use crate::attestation::NONCE_SIZE;
use crate::chip::{AMD, CHIP_ID_EXTENSION, TCB_EXTENSIONS};

/// The level of the paravisor, and that of its guest.
const PARAVISOR: u32 = 0;
const GUEST: u32 = 1;
/// Bits of a guest policy that give the guest away, and what they allow (SNP ABI, guest policy).
const GIVES_AWAY: [(u64, &str); 2] = [(1 << 18, "a migration agent"), (1 << 19, "debugging")];

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

/// What a verifier knows before it is shown anything.
#[derive(Clone, Debug)]
pub struct Demands {
    /// The root that is trusted: a certificate, DER.
    pub root: Vec<u8>,
    /// The oldest versions that are accepted, byte by byte of a TCB_VERSION.
    pub least_tcb: [u8; 8],
    /// MEASUREMENT, hexadecimal.
    pub measurement: String,
    /// POLICY. It is refused if it [gives the guest away](GIVES_AWAY), also if it is this one.
    pub policy: u64,
    /// Who vouches for the guest.
    pub identity: ReportedIdentity,
    /// When the paravisor accepts memory.
    pub acceptance: AcceptPolicy,
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
    /// Verifies a report of the paravisor's: it speaks for VMPL0, and is about `nonce` and the manifest, which
    /// is returned.
    pub fn verify_services(
        &self,
        demands: &Demands,
        nonce: &[u8; NONCE_SIZE],
    ) -> Result<ServicesManifest> {
        let data = Sha512::new()
            .chain_update(nonce)
            .chain_update(&self.manifest)
            .finalize();
        self.verify(demands, PARAVISOR, &data)?;
        let Ok(manifest) = ServicesManifest::read_from_bytes(&self.manifest) else {
            bail!("{} bytes are no manifest of services", self.manifest.len());
        };
        let known = ServicesManifest::new(manifest.turnstile);
        ensure!(
            manifest.header == known.header && manifest.entry == known.entry,
            "the manifest's table is not the paravisor's"
        );
        let told = manifest.turnstile;
        ensure!(
            AcceptPolicy(told.policy) == demands.acceptance,
            "memory is accepted by the policy {:?}, not {:?}",
            AcceptPolicy(told.policy),
            demands.acceptance
        );
        ensure!(
            told.host_lies == 0,
            "the paravisor has noticed {} lies of its host",
            told.host_lies
        );
        Ok(manifest)
    }

    /// Verifies a report that the guest itself has asked for, about `nonce`.
    pub fn verify_own(&self, demands: &Demands, nonce: &[u8; NONCE_SIZE]) -> Result<()> {
        self.verify(demands, GUEST, nonce)
    }

    /// Everything but the manifest.
    fn verify(&self, demands: &Demands, vmpl: u32, data: &[u8]) -> Result<()> {
        let ark = self.certificate(ARK)?;
        ensure!(
            ark == demands.root,
            "the chain ends at another root than the one that is trusted"
        );
        let (ask, vcek) = (self.certificate(ASK)?, self.certificate(VCEK)?);
        let chain = Chain::from_der(ark, ask, vcek).context("certificates")?;
        let report = AttestationReport::from_bytes(&self.report).context("the report")?;
        (&chain, &report).verify().context("signatures")?;
        certified(&chain.vek, &report)?;
        demands.hold(&report)?;
        ensure!(
            report.vmpl == vmpl,
            "the report speaks for VMPL{}, not for VMPL{vmpl}",
            report.vmpl
        );
        ensure!(
            report.report_data[..] == *data,
            "the report is not about this nonce and this manifest"
        );
        Ok(())
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

impl Demands {
    /// Whether the report says all of it.
    fn hold(&self, report: &AttestationReport) -> Result<()> {
        for (byte, (found, least)) in reported_tcb(report)?.iter().zip(self.least_tcb).enumerate() {
            ensure!(
                *found >= least,
                "byte {byte} of the reported versions is {found}, older than {least}"
            );
        }
        let measurement = hex(&report.measurement[..]);
        ensure!(
            measurement == self.measurement,
            "MEASUREMENT is {measurement}, not {}",
            self.measurement
        );
        let policy = u64::from(report.policy);
        for (bit, what) in GIVES_AWAY {
            ensure!(policy & bit == 0, "POLICY {policy:#x} allows {what}");
        }
        ensure!(
            policy == self.policy,
            "POLICY is {policy:#x}, not {:#x}",
            self.policy
        );
        let identity = ReportedIdentity {
            identity: Identity {
                family_id: report.family_id,
                image_id: report.image_id,
                guest_svn: report.guest_svn,
            },
            id_key_digest: hex(&report.id_key_digest),
            author_key: report.key_info.author_key_en(),
            author_key_digest: hex(&report.author_key_digest),
        };
        ensure!(
            identity == self.identity,
            "the ID block was another: {identity:?}, not {:?}",
            self.identity
        );
        Ok(())
    }
}

/// REPORTED_TCB, as it lies in the report.
fn reported_tcb(report: &AttestationReport) -> Result<[u8; 8]> {
    let raw = report.to_bytes()?;
    Ok(raw[0x180..0x188].try_into()?)
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
    let reported = reported_tcb(report)?;
    for (number, byte) in TCB_EXTENSIONS {
        ensure!(
            value(number)? == reported[byte].to_der()?,
            "byte {byte} of the reported versions is not what the key was made for"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests;
