//! What does an unmodified Linux guest do whose host lies about messages to the security processor?
//!
//! The host is honest once, and from then on has a lie for every message that cannot be got over: it changes the
//! answer, brings an earlier one, or none. The first report on the paravisor is as good as ever. Every later one
//! fails for the guest, by an error of the read: those that the paravisor asks for, and the one that Linux asks for
//! itself, which then gives its key up. Everything else goes on. What the paravisor says to hosts whose lie can be
//! got over is shown with test guests (`hostile/messages-…`).

use anyhow::Result;
use protocols::launch::{AcceptPolicy, Fault};
use protocols::report::Outcome;
use protocols::svsm::ResultCode;
use protocols::svsm::attestation::AttestationCall;

use super::boot::{unaccepted_shrinks, use_memory};
use crate::attestation::{LIED_ABOUT, command_after_lies, evidence, fresh_nonce, guest_files};
use crate::guests::Kernel;
use crate::prediction::{Prediction, Signers};
use crate::scenario::{BOOT_LIMIT, Context, Findings, Scenario};
use crate::vm::{Backing, Settings, Vc};

const KERNEL: Kernel = Kernel::Cloud6_12;
/// MiB that the guest writes afterwards: more than is accepted by then.
const USED_MIB: u32 = 1536;

pub fn scenarios() -> Vec<Scenario> {
    let scenario = |lie: &'static str| {
        let name = format!("attest/{}-{}-{lie}", KERNEL.name(), Backing::Large.name());
        Scenario::new(name, move |context| run(context, lie))
            .booting(KERNEL)
            .with_modules()
    };
    vec![
        scenario("messages-tampered"),
        scenario("messages-replayed").only_in_full(),
        scenario("messages-lost").only_in_full(),
    ]
}

fn run(context: &Context, lie: &str) -> Result<Findings> {
    let artefacts = &context.artefacts;
    let (image, sidecar) =
        context.image(&artefacts.paravisor, Some(&artefacts.ovmf), Fault::NONE)?;
    let prediction = Prediction::of(&image, Signers::Nobody)?;
    let settings = Settings {
        backing: Backing::Large,
        vc: Vc::Strict,
        hostile: Some(lie.to_owned()),
        ..Settings::default()
    };
    let mut config = context.machine(image, &sidecar, settings);
    let nonce = fresh_nonce();
    let files = guest_files(context, KERNEL, &nonce)?;
    let command = format!("{}{}", command_after_lies(), use_memory(USED_MIB));
    config.linux = Some(context.linux_with(KERNEL, &command, &files)?);
    let finished = config.run(BOOT_LIMIT, |_| {})?;

    let mut findings = Findings::default();
    findings.ended(&finished, Outcome::PowerOff)?;
    findings.good_run(&finished, &sidecar)?;
    findings.only_expected_exits(&finished)?;
    findings.equal(
        "what the guest does afterwards succeeds",
        finished.exec_status,
        Some(0),
    );
    let output = String::from_utf8_lossy(&finished.output).replace('\r', "");
    unaccepted_shrinks(&mut findings, &output);

    let demands = prediction.demands(&artefacts.chip, AcceptPolicy::LAZY)?;
    let before = evidence(&output, "services")?.verify_services(&demands, &nonce);
    findings.check("the report from before is believed", before.is_ok(), || {
        format!("{:#}", before.expect_err("looked at"))
    });
    for entry in LIED_ABOUT {
        let failed = output.contains(&format!("{entry} failed: "));
        findings.check(format!("{entry}: reading fails"), failed, || output.clone());
        let nothing = output
            .lines()
            .any(|line| line.trim() == format!("{entry} outblob"));
        findings.check(format!("{entry}: nothing is handed over"), nothing, || {
            output.clone()
        });
    }
    let told = "to prevent IV reuse";
    findings.check("Linux gives up its own key", output.contains(told), || {
        output.clone()
    });

    // By the machine's own record: what the paravisor has answered.
    let calls = &finished.report()?.calls;
    let asked = AttestationCall::SERVICES.id();
    let call = calls
        .iter()
        .find(|call| call.protocol == asked.protocol.0 && call.call == asked.call);
    let counted = |code: ResultCode| {
        let name = code.name().unwrap_or_default();
        call.and_then(|call| call.results.get(name)).copied()
    };
    findings.equal(
        "answers with a report",
        counted(ResultCode::SUCCESS),
        Some(1),
    );
    findings.equal(
        "answers that there is none",
        counted(ResultCode::INVALID_REQUEST),
        Some(2),
    );
    Ok(findings)
}
