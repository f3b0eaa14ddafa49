//! Can a verifier outside believe what an unmodified Linux guest hands to it?
//!
//! The guest asks by configfs-tsm for a report on the paravisor and for one on itself, under `vc=strict`. The
//! crate `sev`, which shares nothing with the machine or the paravisor, checks signature and chain; measurement,
//! policy and ID block must be told as they were known before the launch. Then the same evidence is spoilt, a
//! byte or a part at a time, and must be refused. What is signed well and should not be believed is made up in the
//! tests of `e2e::verify`. What Linux does with a host that lies is in `attest_lies`.

use anyhow::Result;
use protocols::launch::{AcceptPolicy, Fault};
use protocols::report::Outcome;

use crate::attestation::{NONCE_SIZE, command, evidence, fresh_nonce, guest_files};
use crate::guests::Kernel;
use crate::prediction::{Both, Prediction, Signers, demand_both};
use crate::scenario::{BOOT_LIMIT, Context, Findings, Scenario};
use crate::verify::{Demands, Evidence};
use crate::vm::{Backing, Settings, Vc};

/// A guest, and the image it is started from.
#[derive(Clone, Copy)]
struct Row {
    kernel: Kernel,
    backing: Backing,
    vcpus: u32,
    signers: Signers,
    /// Whether it is for every day.
    every_day: bool,
}

/// Both kernels, each on one processor and on four, from images with an ID block and without.
const ROWS: [Row; 5] = [
    Row {
        every_day: true,
        ..row(Kernel::Cloud6_12, 1, Signers::Nobody)
    },
    row(Kernel::Cloud7_2, 1, Signers::IdKey),
    row(Kernel::Cloud6_12, 4, Signers::IdAndAuthorKey),
    row(Kernel::Cloud7_2, 4, Signers::Nobody),
    Row {
        backing: Backing::Small,
        ..row(Kernel::Cloud6_12, 4, Signers::Nobody)
    },
];

const fn row(kernel: Kernel, vcpus: u32, signers: Signers) -> Row {
    Row {
        kernel,
        backing: Backing::Large,
        vcpus,
        signers,
        every_day: false,
    }
}

impl Row {
    fn name(self) -> String {
        let processors = match self.vcpus {
            1 => String::new(),
            vcpus => format!("-{vcpus}cpu"),
        };
        let signers = match self.signers {
            Signers::Nobody => "",
            Signers::IdKey => "-id-block",
            Signers::IdAndAuthorKey => "-author",
        };
        let (kernel, backing) = (self.kernel.name(), self.backing.name());
        format!("attest/{kernel}-{backing}{processors}{signers}")
    }
}

pub fn scenarios() -> Vec<Scenario> {
    let scenario = |row: Row| {
        let scenario = Scenario::new(row.name(), move |context| run(context, row))
            .booting(row.kernel)
            .with_modules();
        if row.every_day {
            scenario
        } else {
            scenario.only_in_full()
        }
    };
    ROWS.into_iter().map(scenario).collect()
}

fn run(context: &Context, row: Row) -> Result<Findings> {
    let artefacts = &context.artefacts;
    let (image, sidecar) =
        context.image(&artefacts.paravisor, Some(&artefacts.ovmf), Fault::NONE)?;
    let prediction = Prediction::of(&image, row.signers)?;
    let settings = Settings {
        backing: row.backing,
        vc: Vc::Strict,
        ..Settings::default()
    };
    let mut config = context.machine(image, &sidecar, settings);
    config.vcpus = row.vcpus;
    let nonce = fresh_nonce();
    let files = guest_files(context, row.kernel, &nonce)?;
    config.linux = Some(context.linux_with(row.kernel, &command(), &files)?);
    // They share one core of the computer.
    let finished = config.run(BOOT_LIMIT * row.vcpus, |_| {})?;

    let mut findings = Findings::default();
    findings.ended(&finished, Outcome::PowerOff)?;
    findings.good_run(&finished, &sidecar)?;
    findings.only_expected_exits(&finished)?;
    let output = String::from_utf8_lossy(&finished.output).replace('\r', "");
    for entry in ["services", "own", "above"] {
        let told = output.contains(&format!("{entry} provider sev_guest"));
        findings.check(format!("{entry}: asked by sev-guest"), told, || {
            output.clone()
        });
    }

    let demands = prediction.demands(&artefacts.chip, AcceptPolicy::LAZY)?;
    let Both {
        services,
        own,
        manifest,
    } = demand_both(&mut findings, &output, &demands, &nonce)?;
    let told = manifest.turnstile;
    findings.equal(
        "all memory was counted",
        told.counted_bytes,
        told.memory_bytes,
    );
    let sum = told.unaccepted_bytes + told.ahead_bytes + told.accepted_bytes + told.owned_bytes;
    findings.equal("the totals", sum, told.counted_bytes);
    findings.check(
        "some memory is accepted, and some is not yet",
        told.accepted_bytes > 0 && told.unaccepted_bytes > 0,
        || format!("{told:?}"),
    );

    let above = evidence(&output, "above")?;
    findings.equal(
        "bytes of a report on VMPL0 that the guest asks for itself",
        above.report.len(),
        0,
    );
    refuses(&mut findings, &demands, &services, &nonce);
    let as_services = Evidence {
        manifest: services.manifest.clone(),
        ..own
    };
    findings.check(
        "the guest's own report does not pass for the paravisor's",
        as_services.verify_services(&demands, &nonce).is_err(),
        || "it does".into(),
    );
    Ok(findings)
}

/// The verifier can say no: to every part of the evidence that is not as it came.
fn refuses(findings: &mut Findings, demands: &Demands, good: &Evidence, nonce: &[u8; NONCE_SIZE]) {
    let mut spoilt = |what: String, evidence: &Evidence, nonce: &[u8; NONCE_SIZE]| {
        let refused = evidence.verify_services(demands, nonce);
        findings.check(format!("refused: {what}"), refused.is_err(), || {
            "it was believed".into()
        });
    };
    let mut other = *nonce;
    other[0] ^= 1;
    spoilt("another nonce".into(), good, &other);
    // SVN, policy, VMPL, data, measurement, chip, TCB: the signature is over all of them; and itself.
    for at in [0x04, 0x08, 0x30, 0x50, 0x90, 0x1A0, 0x180, 0x2A0, 0x2E8] {
        let mut evidence = good.clone();
        evidence.report[at] ^= 1;
        spoilt(format!("report byte {at:#x}"), &evidence, nonce);
    }
    for at in [16, 48 + 8, 48 + 88] {
        let mut evidence = good.clone();
        evidence.manifest[at] ^= 1;
        spoilt(format!("manifest byte {at:#x}"), &evidence, nonce);
    }
    // The three certificates begin and end with what their signers signed.
    let table = good.certificates.len();
    for at in [96 + 100, table / 2, table - 1] {
        let mut evidence = good.clone();
        evidence.certificates[at] ^= 1;
        spoilt(format!("certificate byte {at:#x}"), &evidence, nonce);
    }
    let mut evidence = good.clone();
    evidence.certificates.clear();
    spoilt("no certificates".into(), &evidence, nonce);
}
