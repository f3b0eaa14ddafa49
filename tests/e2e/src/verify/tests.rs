//! Evidence that is right in all but one thing, and signed as it should be: each is refused, and for that.

use std::sync::LazyLock;

use p384::ecdsa::signature::Signer;
use p384::ecdsa::{Signature as EcdsaSignature, SigningKey};
use protocols::amd_sp::report::{AttestationReport as Report, Signature};
use protocols::svsm::attestation::TurnstileManifest;
use zerocopy::FromZeros;

use super::*;
use crate::chip::Made;

const NONCE: [u8; NONCE_SIZE] = [0x4E; NONCE_SIZE];
const POLICY: u64 = 0x3_0000;
/// Small keys are found soon; nothing here depends on their size.
const RSA_BITS: usize = 2048;

/// The chip whose root is trusted.
static CHIP: LazyLock<Made> = LazyLock::new(|| Made::new(RSA_BITS).unwrap());
/// Another, as good in itself.
static OTHER: LazyLock<Made> = LazyLock::new(|| Made::new(RSA_BITS).unwrap());

fn demands() -> Demands {
    let digest = |byte| hex(&[byte; 48]);
    Demands {
        root: CHIP.ark.clone(),
        least_tcb: CHIP.endorsement.tcb.to_le_bytes(),
        measurement: digest(0x4D),
        policy: POLICY,
        identity: ReportedIdentity {
            identity: Identity {
                family_id: [0xFA; 16],
                image_id: [0x1D; 16],
                guest_svn: 3,
            },
            id_key_digest: digest(0x1D),
            author_key: true,
            author_key_digest: digest(0xA0),
        },
        acceptance: AcceptPolicy::AHEAD,
    }
}

fn manifest() -> ServicesManifest {
    ServicesManifest::new(TurnstileManifest {
        policy: AcceptPolicy::AHEAD.0,
        ..TurnstileManifest::new_zeroed()
    })
}

/// What [`demands`] wants, of `chip`, for `vmpl` and about `data`.
fn report(chip: &Made, vmpl: u32, data: [u8; 64]) -> Report {
    Report {
        version: Report::VERSION,
        guest_svn: 3,
        policy: POLICY,
        family_id: [0xFA; 16],
        image_id: [0x1D; 16],
        vmpl,
        signature_algorithm: Report::ECDSA_P384_SHA384,
        key_info: 1,
        report_data: data,
        measurement: [0x4D; 48],
        id_key_digest: [0x1D; 48],
        author_key_digest: [0xA0; 48],
        reported_tcb: chip.endorsement.tcb,
        cpuid_fms: [0x19, 1, 1],
        chip_id: chip.endorsement.chip_id,
        ..Report::new_zeroed()
    }
}

/// What is handed over with a report that the VCEK of `signer` signs.
fn evidence(signer: &Made, mut report: Report, manifest: &[u8]) -> Evidence {
    let key = SigningKey::from_slice(&signer.endorsement.vcek).unwrap();
    let signature: EcdsaSignature = key.sign(report.signed());
    let (r, s) = signature.split_bytes();
    let number = |big_endian: &[u8]| {
        let mut bytes = [0; 72];
        bytes[..48].copy_from_slice(big_endian);
        bytes[..48].reverse();
        bytes
    };
    report.signature = Signature {
        r: number(&r),
        s: number(&s),
        reserved: [0; 368],
    };
    Evidence {
        report: report.as_bytes().to_vec(),
        manifest: manifest.to_vec(),
        certificates: signer.table(),
    }
}

/// A report on the paravisor of `chip` with this manifest, changed before it is signed.
fn services(
    chip: &Made,
    manifest: &ServicesManifest,
    change: impl FnOnce(&mut Report),
) -> Evidence {
    let data = Sha512::new()
        .chain_update(NONCE)
        .chain_update(manifest.as_bytes())
        .finalize();
    let mut report = report(chip, 0, data.into());
    change(&mut report);
    evidence(chip, report, manifest.as_bytes())
}

/// It must be refused, with these words.
fn refused(demands: &Demands, evidence: &Evidence, words: &str) {
    let Err(error) = evidence.verify_services(demands, &NONCE) else {
        panic!("believed, and should be refused with {words:?}");
    };
    let text = format!("{error:#}");
    assert!(text.contains(words), "{text:?} instead of {words:?}");
}

#[test]
fn what_is_as_demanded_is_believed() {
    let manifest = manifest();
    let good = services(&CHIP, &manifest, |_| {});
    assert_eq!(good.verify_services(&demands(), &NONCE).unwrap(), manifest);
    let own = evidence(&CHIP, report(&CHIP, 1, NONCE), &[]);
    own.verify_own(&demands(), &NONCE).unwrap();
}

#[test]
fn a_root_that_is_not_the_trusted_one_is_refused() {
    // In itself everything fits.
    let other = services(&OTHER, &manifest(), |_| {});
    let trusting = Demands {
        root: OTHER.ark.clone(),
        ..demands()
    };
    other.verify_services(&trusting, &NONCE).unwrap();
    refused(&demands(), &other, "another root");
}

#[test]
fn a_chain_that_does_not_lead_to_the_root_is_refused() {
    let mut grafted = services(&OTHER, &manifest(), |_| {});
    grafted.certificates = Made {
        endorsement: OTHER.endorsement,
        ark: CHIP.ark.clone(),
        ask: OTHER.ask.clone(),
        vcek: OTHER.vcek.clone(),
    }
    .table();
    refused(&demands(), &grafted, "signatures");
    // The key of another chip in the chain of this one.
    let mut grafted = services(&OTHER, &manifest(), |_| {});
    grafted.certificates = CHIP.table();
    refused(&demands(), &grafted, "signatures");
    let without = Evidence {
        certificates: Vec::new(),
        ..services(&CHIP, &manifest(), |_| {})
    };
    refused(&demands(), &without, "there is no certificate");
}

#[test]
fn a_report_that_was_changed_after_it_was_signed_is_refused() {
    let good = services(&CHIP, &manifest(), |_| {});
    // The last one of all that is signed, and one of each half of the signature.
    for at in [0x008, 0x090, 0x1A0, 0x29F, 0x2A0, 0x2E8] {
        let mut spoilt = good.clone();
        spoilt.report[at] ^= 1;
        let refused = spoilt.verify_services(&demands(), &NONCE);
        assert!(refused.is_err(), "byte {at:#x}");
    }
}

#[test]
fn another_chip_than_the_keys_is_refused_though_the_key_signs_it() {
    let other = services(&CHIP, &manifest(), |report| report.chip_id[63] ^= 1);
    refused(&demands(), &other, "another chip than the key's");
}

#[test]
fn other_versions_than_the_keys_are_refused_though_the_key_signs_them() {
    for (_, byte) in TCB_EXTENSIONS {
        // Newer, so that they are not refused for their age.
        let other = services(&CHIP, &manifest(), |report| {
            report.reported_tcb += 1 << (8 * byte);
        });
        // Milan has no parts there: `sev` takes them for zero, which is not what was signed.
        let words = match byte {
            2..=5 => "signatures".to_owned(),
            _ => format!("byte {byte} of the reported versions is not what"),
        };
        refused(&demands(), &other, &words);
    }
}

#[test]
fn versions_older_than_accepted_are_refused_each_by_itself() {
    let good = services(&CHIP, &manifest(), |_| {});
    for byte in 0..8 {
        let mut demands = demands();
        demands.least_tcb[byte] += 1;
        let words = format!(
            "byte {byte} of the reported versions is {}",
            demands.least_tcb[byte] - 1
        );
        refused(&demands, &good, &words);
    }
}

#[test]
fn a_report_that_is_not_as_demanded_in_one_field_is_refused() {
    type Change = fn(&mut Report);
    let changes: [(&str, Change); 10] = [
        ("VMPL1", |report| report.vmpl = 1),
        ("nonce", |report| report.report_data[63] ^= 1),
        ("MEASUREMENT", |report| report.measurement[47] ^= 1),
        ("POLICY is", |report| report.policy &= !(1 << 16)),
        ("ID block", |report| report.family_id[15] ^= 1),
        ("ID block", |report| report.image_id[0] ^= 1),
        ("ID block", |report| report.guest_svn -= 1),
        ("ID block", |report| report.id_key_digest = [0; 48]),
        ("ID block", |report| report.key_info = 0),
        ("ID block", |report| report.author_key_digest[0] ^= 1),
    ];
    for (words, change) in changes {
        refused(&demands(), &services(&CHIP, &manifest(), change), words);
    }
}

#[test]
fn a_policy_that_gives_the_guest_away_is_refused_even_if_it_is_the_images() {
    for (bit, words) in [(18, "a migration agent"), (19, "debugging")] {
        let policy = POLICY | 1 << bit;
        let demands = Demands {
            policy,
            ..demands()
        };
        let other = services(&CHIP, &manifest(), |report| report.policy = policy);
        refused(&demands, &other, words);
    }
}

#[test]
fn a_manifest_that_is_not_as_demanded_is_refused_though_the_report_is_about_it() {
    type Change = fn(&mut ServicesManifest);
    let changes: [(&str, Change); 4] = [
        ("policy", |it| it.turnstile.policy = AcceptPolicy::LAZY.0),
        ("1 lies", |it| it.turnstile.host_lies = 1),
        ("table", |it| it.header.entries = 2),
        ("table", |it| it.entry.offset += 8),
    ];
    for (words, change) in changes {
        let mut manifest = manifest();
        change(&mut manifest);
        refused(&demands(), &services(&CHIP, &manifest, |_| {}), words);
    }
    let whole = manifest();
    let mut swapped = services(&CHIP, &whole, |_| {});
    swapped.manifest[60] ^= 1;
    refused(&demands(), &swapped, "nonce");
    let short = &whole.as_bytes()[..40];
    let data = Sha512::new()
        .chain_update(NONCE)
        .chain_update(short)
        .finalize();
    let short = evidence(&CHIP, report(&CHIP, 0, data.into()), short);
    refused(&demands(), &short, "40 bytes are no manifest");
}

#[test]
fn the_guests_own_report_speaks_for_the_guest_and_is_about_the_nonce() {
    let own = |vmpl, data| {
        let own = evidence(&CHIP, report(&CHIP, vmpl, data), &[]);
        own.verify_own(&demands(), &NONCE)
            .map_err(|e| e.to_string())
    };
    for vmpl in [0, 2] {
        assert!(own(vmpl, NONCE).unwrap_err().contains("VMPL"));
    }
    assert!(own(1, [0x4F; 64]).unwrap_err().contains("nonce"));
}
