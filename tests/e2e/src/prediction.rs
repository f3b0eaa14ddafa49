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
use protocols::measure::Digest;
use protocols::svsm::attestation::ServicesManifest;

use crate::attestation::{NONCE_SIZE, evidence};
use crate::chip::Chip;
use crate::scenario::Findings;
use crate::verify::{Evidence, ReportedIdentity, Verified};

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

    /// Verifies both reports in the guest's `output`, and demands of each that it says all of it. What has come
    /// out of the guest, and the manifest of its paravisor.
    pub fn demand_both(
        &self,
        findings: &mut Findings,
        output: &str,
        chip: &Chip,
        nonce: &[u8; NONCE_SIZE],
    ) -> Result<Both> {
        let services = evidence(output, "services")?;
        let (verified, manifest) = services.verify_services(chip, nonce)?;
        self.demand(findings, "the paravisor's", &verified);
        let own = evidence(output, "own")?;
        let verified = own.verify(chip)?;
        self.demand(findings, "the guest's own", &verified);
        findings.equal("the guest's own report speaks for", verified.vmpl, 1);
        findings.check(
            "the guest's own report is about the nonce",
            verified.report_data == *nonce,
            || format!("{:x?}", verified.report_data),
        );
        Ok(Both {
            services,
            own,
            manifest,
        })
    }

    /// Demands that the report says all of it.
    fn demand(&self, findings: &mut Findings, whose: &str, verified: &Verified) {
        let Prediction {
            digest,
            policy,
            identity,
        } = self;
        findings.equal(
            &format!("MEASUREMENT in {whose} report is what `measure` said"),
            &verified.measurement,
            digest,
        );
        findings.equal(
            &format!("POLICY in {whose} report is the image's"),
            verified.policy,
            *policy,
        );
        findings.equal(
            &format!("{whose} report tells of the ID block what `sign` put there"),
            &verified.identity,
            identity,
        );
    }
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
    use igvm_build::id_block::sign;
    use igvm_build::image::POLICY;

    use super::*;

    /// Of an image that both keys sign.
    fn prediction() -> Prediction {
        let digest = [0xD1; 48];
        let keys = Signers::IdAndAuthorKey.keys().unwrap().unwrap();
        let signed = sign(&digest, POLICY, SNP_MASK, &IDENTITY, &keys);
        Prediction {
            digest: hex(&digest),
            policy: POLICY,
            identity: reported(Some(&signed)),
        }
    }

    fn failed(prediction: &Prediction, verified: &Verified) -> usize {
        let mut findings = Findings::default();
        prediction.demand(&mut findings, "a", verified);
        let failed = findings.checks.iter().filter(|c| c.failure.is_some());
        failed.count()
    }

    #[test]
    fn a_report_that_differs_in_one_field_is_not_the_predicted_one() {
        let prediction = prediction();
        let good = Verified {
            measurement: prediction.digest.clone(),
            vmpl: 0,
            report_data: [0; 64],
            policy: prediction.policy,
            identity: prediction.identity.clone(),
        };
        assert_eq!(failed(&prediction, &good), 0);
        let spoils: [fn(&mut Verified); 8] = [
            |report| report.measurement.replace_range(..1, "0"),
            |report| report.policy ^= 1 << 19,
            |report| report.identity.identity.family_id[15] ^= 1,
            |report| report.identity.identity.image_id[0] ^= 1,
            |report| report.identity.identity.guest_svn += 1,
            |report| report.identity.id_key_digest = hex(&[0; 48]),
            |report| report.identity.author_key = false,
            |report| report.identity.author_key_digest = hex(&[0; 48]),
        ];
        for (number, spoil) in spoils.into_iter().enumerate() {
            let mut report = good.clone();
            spoil(&mut report);
            assert_eq!(failed(&prediction, &report), 1, "spoilt in way {number}");
        }
    }

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
