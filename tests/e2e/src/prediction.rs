//! What is known of an image before anybody launches it: what every report on its guest must say.
//!
//! Known by `igvm-build` alone, from the file: `sign` puts in an ID block, `measure` tells the digest.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use igvm_build::file::File;
use igvm_build::id_block::{Identity, Keys, Signed, SigningKey, sign_image};
use igvm_build::image::SNP_MASK;
use igvm_build::measure::quietly;
use igvm_build::measure::snp::launch_digest;
use igvm_build::sidecar::hex;
use igvm_build::target::Target;
use protocols::launch::AcceptPolicy;
use protocols::measure::Digest;
use protocols::svsm::attestation::ServicesManifest;

use crate::attestation::{NONCE_SIZE, evidence};
use crate::chip::Chip;
use crate::scenario::Findings;
use crate::verify::{Demands, Evidence, ReportedIdentity};

/// The oldest versions that the verifiers here accept. The test chip is newer.
const LEAST_TCB: [u8; 8] = [3, 0, 0, 0, 0, 0, 20, 209];

/// What the ID blocks here say.
pub const IDENTITY: Identity = Identity {
    family_id: *b"turnstile family",
    image_id: *b"turnstile  image",
    guest_svn: 3,
};

/// Who signs an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signers {
    /// Nobody: it has no ID block.
    Nobody,
    /// The ID key.
    IdKey,
    /// The ID key, and the author key vouches for that.
    IdAndAuthorKey,
}

impl Signers {
    /// Their keys, which anybody knows; none if nobody signs.
    pub fn keys(self) -> Result<Option<Keys>> {
        let key = |seed| SigningKey::from_slice(&[seed; 48]).map_err(|error| anyhow!("{error}"));
        let author = match self {
            Signers::Nobody => return Ok(None),
            Signers::IdKey => None,
            Signers::IdAndAuthorKey => Some(key(2)?),
        };
        Ok(Some(Keys {
            id: key(1)?,
            author,
        }))
    }
}

/// Evidence that has been verified.
#[derive(Clone, Debug)]
pub struct Both {
    /// On the paravisor.
    pub services: Evidence,
    /// Of the guest's own asking.
    pub own: Evidence,
    /// What the paravisor tells of itself.
    pub manifest: ServicesManifest,
}

/// What reports must say.
#[derive(Clone, Debug)]
pub struct Prediction {
    /// MEASUREMENT, hexadecimal.
    pub digest: String,
    /// POLICY.
    pub policy: u64,
    /// What the ID block puts there.
    pub identity: ReportedIdentity,
}

impl Prediction {
    /// Has the image in `file` signed, in its place, and predicts its guest's reports.
    pub fn of(file: &Path, signers: Signers) -> Result<Prediction> {
        let mut bytes = fs::read(file).with_context(|| format!("{}", file.display()))?;
        let mut signed = None;
        if let Some(keys) = signers.keys()? {
            let (image, block) = sign_image(&bytes, Target::Qemu.loader(), &IDENTITY, &keys)?;
            fs::write(file, &image).with_context(|| format!("{}", file.display()))?;
            (bytes, signed) = (image, Some(block));
        }
        let image = File::read(&bytes)?;
        let digest = launch_digest(&image, Target::Qemu.loader(), &mut quietly)?;
        Ok(Prediction {
            digest: hex(&digest),
            policy: image.policy(SNP_MASK).context("an image without policy")?,
            identity: reported(signed.as_ref()),
        })
    }

    /// What a verifier who knows this demands of a guest on `chip` whose paravisor accepts memory so.
    pub fn demands(&self, chip: &Chip, acceptance: AcceptPolicy) -> Result<Demands> {
        Ok(Demands {
            root: fs::read(&chip.ark).with_context(|| format!("{}", chip.ark.display()))?,
            least_tcb: LEAST_TCB,
            measurement: self.digest.clone(),
            policy: self.policy,
            identity: self.identity.clone(),
            acceptance,
        })
    }
}

/// Verifies both reports in the guest's `output`. What has come out of the guest, and the manifest of its
/// paravisor.
pub fn demand_both(
    findings: &mut Findings,
    output: &str,
    demands: &Demands,
    nonce: &[u8; NONCE_SIZE],
) -> Result<Both> {
    let services = evidence(output, "services")?;
    let manifest = services.verify_services(demands, nonce);
    believed(findings, "the paravisor's", manifest.as_ref().err());
    let own = evidence(output, "own")?;
    let verified = own.verify_own(demands, nonce);
    believed(findings, "the guest's own", verified.as_ref().err());
    Ok(Both {
        services,
        own,
        manifest: manifest?,
    })
}

fn believed(findings: &mut Findings, whose: &str, refused: Option<&anyhow::Error>) {
    let name = format!("{whose} report holds, and says what was told before the launch");
    findings.check(name, refused.is_none(), || {
        refused
            .map(|error| format!("{error:#}"))
            .unwrap_or_default()
    });
}

/// What a report tells of this ID block, or of none.
fn reported(signed: Option<&Signed>) -> ReportedIdentity {
    const NONE: Digest = [0; 48];
    let (id_key, author_key) = signed.map_or((NONE, None), Signed::key_digests);
    ReportedIdentity {
        identity: signed.map_or_else(Identity::default, |_| IDENTITY),
        id_key_digest: hex(&id_key),
        author_key: author_key.is_some(),
        author_key_digest: hex(&author_key.unwrap_or(NONE)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_an_id_block_all_of_it_is_zero() {
        let zero = ReportedIdentity {
            identity: Identity::default(),
            id_key_digest: "0".repeat(96),
            author_key: false,
            author_key_digest: "0".repeat(96),
        };
        assert_eq!(reported(None), zero);
    }
}
