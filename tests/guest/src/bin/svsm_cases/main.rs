//! `svsm_cases`: judges the paravisor from VMPL1, in the place of the firmware.
//!
//! Packed as a firmware image, started by the paravisor as it would start OVMF. The tables hold
//! every SVSM call a guest can get right and every way to get one wrong: the exact result code,
//! the exact `next`, and the proof that a refused request changed nothing, which comes from
//! the machine (RMP entries, counted instructions) and not from the paravisor.
//!
//! After every case the machine compares its RMP with the paravisor's map, page by page, and
//! must not have seen the paravisor break a rule (a double validation, a grant of a page that
//! was not scrubbed, a rescind of a page in use).
//!
//! Where the host is one that wants pages accepted twice (`hostile=remap`, `hostile=re-add`), only
//! the cases about that are run; the last of them ends the guest.
//!
//! Where it is one that lies about guest messages (`hostile=messages-…`), only the cases about attestation.
//!
//! Under a policy that accepts memory ahead of the guest another set of tables is gone through:
//! `policies` and those that hold under every policy; where the image has a read-ahead, only the cases of
//! `budget`.
//!
//! The machine must be run with `oracle=on`, `referee=` and two processors or more (`budget` says when
//! one); any
//! `backing` and `vc` will do. The cases of `smp` use up to four.

#![cfg_attr(target_os = "none", no_std, no_main)]
#![cfg_attr(
    target_os = "none",
    expect(
        clippy::result_large_err,
        reason = "there is no heap for findings, and one ends its case: its size costs nothing"
    )
)]

#[cfg(target_os = "none")]
mod accept;
#[cfg(target_os = "none")]
mod attestation;
#[cfg(target_os = "none")]
mod bad_entries;
#[cfg(target_os = "none")]
mod bad_lists;
#[cfg(target_os = "none")]
mod budget;
#[cfg(target_os = "none")]
mod double_validation;
#[cfg(target_os = "none")]
mod policies;
#[cfg(target_os = "none")]
mod protocols_and_calls;
#[cfg(target_os = "none")]
mod remap_ca;
#[cfg(target_os = "none")]
mod reset;
#[cfg(target_os = "none")]
mod running_vcpu;
#[cfg(target_os = "none")]
mod setup;
#[cfg(target_os = "none")]
mod smp;
#[cfg(target_os = "none")]
mod team;
#[cfg(target_os = "none")]
mod turnstile;
#[cfg(target_os = "none")]
mod vcpus;

#[cfg(target_os = "none")]
extern "C" fn main() -> ! {
    use guest::console::{self, Console, Exit};
    use guest::harness::{self, Case};
    use guest::{svsm, trap};
    use protocols::launch::AcceptPolicy;
    use protocols::oracle::HostAct;

    trap::install();
    svsm::use_calling_area(setup::first_calling_area());
    // May have to ask the paravisor for a page.
    setup::open_console();
    let tables: &[&[Case]] = if double_validation::is_host(HostAct::EXCHANGE) {
        &[
            double_validation::REMAP,
            bad_entries::CASES,
            smp::MEMORY,
            double_validation::REMAP_ENDS,
        ]
    } else if double_validation::is_host(HostAct::RE_ADD) {
        &[
            double_validation::RE_ADD,
            bad_entries::CASES,
            smp::MEMORY,
            double_validation::RE_ADD_ENDS,
        ]
    } else if attestation::lies::is_host() {
        &[
            attestation::CASES,
            attestation::lies::LIES,
            attestation::lies::LAST_LIE,
        ]
    } else if let Some(cases) = budget::cases() {
        &[cases]
    } else {
        match policies::policy() {
            // Where memory is accepted ahead, many a case of the others counts what is not
            // executed.
            Ok(AcceptPolicy::EAGER | AcceptPolicy::AHEAD) => &[
                policies::CASES,
                turnstile::CASES,
                protocols_and_calls::CASES,
            ],
            // A paravisor that does not say so shows in the cases.
            _ => &[
                protocols_and_calls::CASES,
                accept::CASES,
                bad_lists::CASES,
                bad_entries::CASES,
                turnstile::CASES,
                attestation::CASES,
                remap_ca::CASES,
                vcpus::CASES,
                running_vcpu::CASES,
                smp::MEMORY,
                smp::PROCESSORS,
            ],
        }
    };
    let tally = harness::run(tables, setup::audit, &mut Console);
    console::exit(if tally.failed == 0 {
        Exit::Passed
    } else {
        Exit::Failed
    })
}

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("svsm_cases runs on the emulated machine only: see `cargo xtask test`");
}
