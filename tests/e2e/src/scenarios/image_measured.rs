//! Do `measure`, the launch and the reports on the guest say the same of an image?
//!
//! The guest is one that does nothing but ask for reports (`svsm_evidence`). Where there is none, or it is a
//! firmware that finds nothing to start, the run ends behind the launch; what Linux above that firmware is
//! told is in `attest`.

use anyhow::Result;
use igvm_build::check::{self, check};
use protocols::launch::{AcceptPolicy, Acceptance, Fault};
use protocols::report::Outcome;

use crate::attestation::NONCE_SIZE;
use crate::image::Recipe;
use crate::prediction::{Prediction, Signers, demand_both};
use crate::scenario::{Context, Findings, GUEST_LIMIT, Scenario};
use crate::vm::{Backing, Config, Cores, Finished, Settings};

/// An image to be measured before and by the launch.
struct Image {
    name: &'static str,
    above: Above,
    vcpus: u32,
    signers: Signers,
    acceptance: Acceptance,
    /// Whether it is one for TDX, too.
    tdx: bool,
}

/// What is in the image besides the paravisor.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Above {
    Nothing,
    Firmware,
    /// The guest that asks for reports.
    Reporter,
}

const IMAGES: [Image; 9] = [
    image("bare", Above::Nothing, 1, Signers::Nobody),
    image("firmware", Above::Firmware, 1, Signers::Nobody),
    image("firmware-4cpu", Above::Firmware, 4, Signers::Nobody),
    image("guest", Above::Reporter, 1, Signers::Nobody),
    image("guest-4cpu", Above::Reporter, 4, Signers::Nobody),
    image("id-block", Above::Reporter, 1, Signers::IdKey),
    image("author", Above::Reporter, 4, Signers::IdAndAuthorKey),
    Image {
        acceptance: Acceptance {
            policy: AcceptPolicy::EAGER,
            ..Acceptance::LAZY
        },
        ..image("eager", Above::Reporter, 1, Signers::Nobody)
    },
    Image {
        tdx: true,
        ..image("and-tdx", Above::Reporter, 1, Signers::IdKey)
    },
];

const fn image(name: &'static str, above: Above, vcpus: u32, signers: Signers) -> Image {
    Image {
        name,
        above,
        vcpus,
        signers,
        acceptance: Acceptance::LAZY,
        tdx: false,
    }
}

pub fn scenarios() -> Vec<Scenario> {
    let scenario = |image: &'static Image| {
        let name = format!("image/measured/{}", image.name);
        Scenario::new(name, |context| run(context, image))
    };
    IMAGES.iter().map(scenario).collect()
}

fn run(context: &Context, image: &Image) -> Result<Findings> {
    let artefacts = &context.artefacts;
    let (file, sidecar) = context.image_of(Recipe {
        paravisor: &artefacts.paravisor,
        firmware: match image.above {
            Above::Nothing => None,
            Above::Firmware => Some(&artefacts.ovmf),
            Above::Reporter => Some(&artefacts.svsm_evidence),
        },
        td_firmware: image.tdx.then_some(&artefacts.l2_cases),
        fault: Fault::NONE,
        acceptance: image.acceptance,
    })?;
    let prediction = Prediction::of(&file, image.signers)?;
    let broken = check(&std::fs::read(&file)?, check::Target::default());
    let reports = image.above == Above::Reporter;
    let settings = Settings {
        backing: Backing::Large,
        hostile: (!reports).then(|| super::ENDS_BEHIND_THE_LAUNCH.into()),
        ..Settings::default()
    };
    let config = Config {
        vcpus: image.vcpus,
        memory: "1G".into(),
        // Nobody there uses FXRSTOR.
        cores: Cores::All,
        ..context.machine(file, &sidecar, settings)
    };
    let finished = config.run(GUEST_LIMIT, |_| {})?;

    let mut findings = Findings::default();
    findings.equal("rules that the file breaks", broken, Vec::new());
    findings.equal("measured as built", &prediction.digest, &sidecar.digest);
    findings.measured(&finished, &sidecar);
    let pages = finished.launch.as_ref().map(|launch| launch.pages);
    let pages = pages.unwrap_or_default();
    findings.equal(
        "one VMSA, secrets and CPUID page",
        (pages.vmsa, pages.secrets, pages.cpuid),
        (1, 1, 1),
    );
    if reports {
        findings.ended(&finished, Outcome::GuestExit)?;
        findings.good_run(&finished, &sidecar)?;
        reported(context, &finished, &prediction, image, &mut findings)?;
    } else {
        findings.ended(&finished, Outcome::Terminated)?;
    }
    Ok(findings)
}

/// What a verifier makes of the guest's evidence.
fn reported(
    context: &Context,
    finished: &Finished,
    prediction: &Prediction,
    image: &Image,
    findings: &mut Findings,
) -> Result<()> {
    // The guest's own: it can be told none.
    let nonce: [u8; NONCE_SIZE] = std::array::from_fn(|index| index as u8);
    let output = String::from_utf8_lossy(&finished.output).replace('\r', "");
    findings.equal("the guest's exit code", finished.report()?.code, 0);

    let demands = prediction.demands(&context.artefacts.chip, image.acceptance.policy)?;
    demand_both(findings, &output, &demands, &nonce)?;
    Ok(())
}
