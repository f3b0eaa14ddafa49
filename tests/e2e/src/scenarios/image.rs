//! Is the image reproducible and small, and refused with a wrong ID block?

use std::fs;

use anyhow::{Context as _, Result};
use igvm_build::check::{self, check};
use igvm_build::file::{File, Rule};
use igvm_build::id_block::{Signed, put_into, sign};
use igvm_build::image::{POLICY, SNP_MASK};
use igvm_build::measure::quietly;
use igvm_build::measure::snp::launch_digest;
use igvm_build::target::Target;
use protocols::addr::PAGE_SIZE;
use protocols::launch::{Acceptance, Fault};
use protocols::measure::Digest;
use protocols::report::Outcome;

use crate::image::Recipe;
use crate::prediction::{IDENTITY, Signers};
use crate::scenario::{Context, Findings, GUEST_LIMIT, Scenario};
use crate::vm::Settings;

/// Largest image without firmware, in bytes (design budget).
const LARGEST_IMAGE: u64 = 512 << 10;

/// Bytes of the region that are shared with the host, at most: a page for each of 256 processors
/// (`svsm::memory::layout::MAX_VCPUS`), those for guest messages, and some for tables.
const LARGEST_SHARED: u64 = (256 + 64) * PAGE_SIZE;

pub fn scenarios() -> Vec<Scenario> {
    let mut scenarios = vec![
        Scenario::new("image/reproducible", |context| {
            let artefacts = &context.artefacts;
            let recipe = Recipe {
                paravisor: &artefacts.paravisor,
                firmware: Some(&artefacts.ovmf),
                td_firmware: None,
                fault: Fault::NONE,
                acceptance: Acceptance::LAZY,
            };
            let (first, first_told) = recipe.build()?;
            let (second, second_told) = recipe.build()?;
            let mut findings = Findings::default();
            findings.check("the same bytes twice", first.bytes == second.bytes, || {
                "the images differ".into()
            });
            findings.equal("the same description twice", first_told, second_told);
            let (faulty, _) = Recipe {
                fault: Fault::SKIP_SCRUB,
                ..recipe
            }
            .build()?;
            findings.check(
                "another content has another digest",
                faulty.digest != first.digest,
                || "the digest is the same".into(),
            );
            Ok(findings)
        }),
        Scenario::new("image/budget", |context| {
            let recipe = Recipe {
                paravisor: &context.artefacts.paravisor,
                firmware: None,
                td_firmware: None,
                fault: Fault::NONE,
                acceptance: Acceptance::LAZY,
            };
            let (_, sidecar) = recipe.build()?;
            let mut findings = Findings::default();
            let size = sidecar.image_bytes;
            findings.check(
                format!("at most {LARGEST_IMAGE} bytes without firmware"),
                size <= LARGEST_IMAGE,
                || format!("{size} bytes"),
            );
            let left = sidecar.region_size.saturating_sub(sidecar.launched_size);
            findings.check(
                "the region has room for the pages that the most processors share with the host",
                left >= LARGEST_SHARED,
                || format!("{left} bytes left, {LARGEST_SHARED} needed"),
            );
            Ok(findings)
        }),
    ];
    scenarios.extend(REFUSED.iter().map(|refused| {
        Scenario::new(format!("image/refused/{}", refused.name), |context| {
            refuses(context, refused)
        })
    }));
    scenarios
}

/// An ID block that the launch must not take.
struct Refused {
    name: &'static str,
    /// What is signed in place of digest and policy of the image.
    digest: fn(Digest) -> Digest,
    policy: u64,
    /// What is done to the block after it was signed.
    spoil: fn(&mut Signed),
    status: &'static str,
    rule: Rule,
}

const REFUSED: [Refused; 4] = [
    Refused {
        name: "wrong-digest",
        digest: |digest| digest.map(|byte| !byte),
        policy: POLICY,
        spoil: |_| {},
        status: "BAD_MEASUREMENT (0x0b)",
        rule: Rule::IdBlockDigest,
    },
    Refused {
        name: "wrong-signature",
        digest: |digest| digest,
        policy: POLICY,
        spoil: |signed| signed.header.guest_svn += 1,
        status: "BAD_SIGNATURE (0x0a)",
        rule: Rule::IdBlockSignature,
    },
    Refused {
        name: "wrong-author",
        digest: |digest| digest,
        policy: POLICY,
        spoil: |signed| {
            let signature = signed.header.id_key_signature;
            signed.header.author_key_signature = signature;
        },
        status: "BAD_SIGNATURE (0x0a)",
        rule: Rule::IdBlockSignature,
    },
    Refused {
        name: "other-policy",
        digest: |digest| digest,
        // Debugging allowed.
        policy: POLICY | 1 << 19,
        spoil: |_| {},
        status: "BAD_SIGNATURE (0x0a)",
        rule: Rule::IdBlockSignature,
    },
];

/// The launch ends with the status, and `igvm-build check` has said so.
fn refuses(context: &Context, refused: &Refused) -> Result<Findings> {
    let artefacts = &context.artefacts;
    let (file, sidecar) = context.image(&artefacts.paravisor, None, Fault::NONE)?;
    let bytes = fs::read(&file)?;
    let parsed = File::read(&bytes)?;
    let digest = launch_digest(&parsed, Target::Qemu.loader(), &mut quietly)?;
    let keys = Signers::IdAndAuthorKey.keys()?.context("keys")?;
    let mut signed = sign(
        &(refused.digest)(digest),
        refused.policy,
        SNP_MASK,
        &IDENTITY,
        &keys,
    );
    (refused.spoil)(&mut signed);
    let bytes = put_into(&parsed, &signed.header)?;
    fs::write(&file, &bytes)?;
    // A launch that is not refused ends there, too.
    let settings = Settings {
        hostile: Some(super::ENDS_BEHIND_THE_LAUNCH.into()),
        ..Settings::default()
    };
    let config = context.machine(file, &sidecar, settings);
    let finished = config.run(GUEST_LIMIT, |_| {})?;

    let mut findings = Findings::default();
    findings.ended(&finished, Outcome::LaunchFailed)?;
    let reason = &finished.report()?.reason;
    findings.check(
        format!("the launch gives {}", refused.status),
        reason.contains(refused.status),
        || reason.clone(),
    );
    let broken = check(&bytes, check::Target::default());
    let rules: Vec<Rule> = broken.iter().map(|problem| problem.rule).collect();
    findings.equal("rules that the file breaks", rules, vec![refused.rule]);
    Ok(findings)
}
