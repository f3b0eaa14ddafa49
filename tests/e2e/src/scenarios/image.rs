//! Is the image reproducible, measured as told, and refused with a wrong ID block?

use std::fs;
use std::path::PathBuf;

use anyhow::{Result, anyhow};
use igvm_build::check::{self, check};
use igvm_build::file::{File, Rule};
use igvm_build::id_block::{Identity, Keys, Signed, SigningKey, put_into, sign, sign_image};
use igvm_build::image::{POLICY, SNP_MASK};
use igvm_build::measure::quietly;
use igvm_build::measure::snp::launch_digest;
use igvm_build::sidecar::{Sidecar, hex};
use igvm_build::target::Target;
use protocols::launch::{AcceptPolicy, Acceptance, Fault};
use protocols::measure::Digest;
use protocols::report::Outcome;

use crate::image::Recipe;
use crate::scenario::{Context, Findings, GUEST_LIMIT, Scenario};
use crate::vm::{Config, Finished, Settings};

/// Largest image without firmware, in bytes (design budget).
const LARGEST_IMAGE: u64 = 512 << 10;

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
            Ok(findings)
        }),
    ];
    scenarios.extend(IMAGES.iter().map(|image| {
        Scenario::new(format!("image/measured/{}", image.name), |context| {
            measured(context, image)
        })
    }));
    scenarios.extend(REFUSED.iter().map(|refused| {
        Scenario::new(format!("image/refused/{}", refused.name), |context| {
            refuses(context, refused)
        })
    }));
    scenarios
}

/// An image to be measured before and by the launch.
struct Image {
    name: &'static str,
    firmware: bool,
    vcpus: u32,
    /// How many keys vouch for it: ID key, author key.
    keys: u8,
    acceptance: Acceptance,
}

const IMAGES: [Image; 7] = [
    image("bare", false, 1, 0),
    image("bare-4cpu", false, 4, 0),
    image("firmware", true, 1, 0),
    image("firmware-4cpu", true, 4, 0),
    image("id-block", true, 1, 1),
    image("author", true, 4, 2),
    Image {
        acceptance: Acceptance {
            policy: AcceptPolicy::EAGER,
            ..Acceptance::LAZY
        },
        ..image("eager", true, 1, 0)
    },
];

const fn image(name: &'static str, firmware: bool, vcpus: u32, keys: u8) -> Image {
    Image {
        name,
        firmware,
        vcpus,
        keys,
        acceptance: Acceptance::LAZY,
    }
}

/// `igvm-build measure`, the builder and the launch say the same.
fn measured(context: &Context, image: &Image) -> Result<Findings> {
    let artefacts = &context.artefacts;
    let (file, sidecar) = context.image_of(Recipe {
        paravisor: &artefacts.paravisor,
        firmware: image.firmware.then_some(artefacts.ovmf.as_path()),
        td_firmware: None,
        fault: Fault::NONE,
        acceptance: image.acceptance,
    })?;
    if image.keys > 0 {
        let bytes = fs::read(&file)?;
        let (signed, _) = sign_image(&bytes, Target::Qemu.loader(), &IDENTITY, &keys(image.keys)?)?;
        fs::write(&file, signed)?;
    }
    let bytes = fs::read(&file)?;
    let broken = check(&bytes, check::Target::default());
    let digest = launch_digest(&File::read(&bytes)?, Target::Qemu.loader(), &mut quietly)?;
    let finished = launch(context, file, &sidecar, image.vcpus)?;

    let mut findings = Findings::default();
    findings.equal("rules that the file breaks", broken, Vec::new());
    findings.equal("measured as built", hex(&digest), sidecar.digest.clone());
    findings.measured(&finished, &sidecar);
    findings.ended(&finished, Outcome::Terminated)?;
    let pages = finished.launch.unwrap_or_default().pages;
    findings.equal(
        "one VMSA, secrets and CPUID page",
        (pages.vmsa, pages.secrets, pages.cpuid),
        (1, 1, 1),
    );
    Ok(findings)
}

/// Starts the machine and ends it behind the launch, which is all that is wanted: by a host that says it
/// has no processors.
fn launch(context: &Context, file: PathBuf, sidecar: &Sidecar, vcpus: u32) -> Result<Finished> {
    let settings = Settings {
        hostile: Some("vp-count-zero".into()),
        ..Settings::default()
    };
    let config = Config {
        vcpus,
        ..context.machine(file, sidecar, settings)
    };
    config.run(GUEST_LIMIT, |_| {})
}

/// What the ID blocks here say.
const IDENTITY: Identity = Identity {
    family_id: *b"turnstile family",
    image_id: *b"turnstile  image",
    guest_svn: 3,
};

/// Keys that anybody knows: an ID key, and an author key if there shall be two.
fn keys(count: u8) -> Result<Keys> {
    let key = |seed| SigningKey::from_slice(&[seed; 48]).map_err(|error| anyhow!("{error}"));
    Ok(Keys {
        id: key(1)?,
        author: (count > 1).then(|| key(2)).transpose()?,
    })
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
    let mut signed = sign(
        &(refused.digest)(digest),
        refused.policy,
        SNP_MASK,
        &IDENTITY,
        &keys(2)?,
    );
    (refused.spoil)(&mut signed);
    let bytes = put_into(&parsed, &signed.header)?;
    fs::write(&file, &bytes)?;
    let finished = launch(context, file, &sidecar, 1)?;

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
