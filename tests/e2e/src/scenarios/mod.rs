//! The scenarios, one module per intent.
//!
//! | module | question |
//! |---|---|
//! | [`isa`] | does the machine behave as the architecture says, without any paravisor? |
//! | [`tdx`] | does it behave as TDX says when it is a trust domain? |
//! | [`tdx_l2`] | does the paravisor serve the guest of a trust domain? |
//! | [`tdx_boot`] | does an unmodified Debian boot in a trust domain? |
//! | [`svsm_calls`] | does the paravisor answer good and bad calls as it must? |
//! | [`bench`] | does a call cost what it may? |
//! | [`boot`] | does an unmodified Debian boot, its memory accepted by the paravisor? |
//! | [`boot_memory`] | is all of memory accepted when the guest wants all of it? |
//! | [`ends`] | does the exit status tell how a run ended? |
//! | [`native`] | does the same image start where nothing is confidential? |
//! | [`matrix`] | do all guests boot, on any number of processors and both backings? |
//! | [`policy`] | is memory accepted before the guest asks, unnoticed? |
//! | [`stress`] | is nothing lost when memory and processors change all the time? |
//! | [`attest`] | can a verifier believe what a Linux guest hands to it? |
//! | [`attest_lies`] | what does a Linux guest do whose host lies about messages? |
//! | [`disk`] | does a Debian on a disk boot, with devices that work by DMA? |
//! | [`hostile`] | does a lying host meet a termination with a reason? |
//! | [`faults`] | do the checks catch a paravisor that misbehaves? |
//! | [`image`] | is the image reproducible and small, and refused with a wrong ID block? |
//! | [`image_measured`] | do `measure`, the launch and the reports on the guest say the same of it? |
//! | [`image_tools`] | do other people's tools say the same of it? |
//! | [`handover`] | does the firmware take what the image hands it? |
//! | [`double_validation`] | is no page ever validated twice, whatever host and guest try? |
//! | [`observe`] | does a run show what it is asked to show? |
//! | [`tools`] | what do the tools say to bad input? |

mod attest;
mod attest_lies;
mod bench;
mod boot;
mod boot_memory;
mod cases;
mod disk;
mod double_validation;
mod ends;
mod faults;
mod handover;
mod hostile;
mod image;
mod image_measured;
mod image_tools;
mod isa;
mod matrix;
mod native;
mod observe;
mod policy;
mod stress;
mod svsm_calls;
mod tdx;
mod tdx_boot;
mod tdx_l2;
mod tools;

use crate::scenario::Scenario;

/// A host that says it has no processors: the paravisor ends the run where the launch alone is of interest.
const ENDS_BEHIND_THE_LAUNCH: &str = "vp-count-zero";

/// All scenarios, in the order in which a failure says most.
pub fn all() -> Vec<Scenario> {
    [
        tools::scenarios(),
        image::scenarios(),
        image_measured::scenarios(),
        image_tools::scenarios(),
        handover::scenarios(),
        isa::scenarios(),
        tdx::scenarios(),
        tdx_l2::scenarios(),
        svsm_calls::scenarios(),
        bench::scenarios(),
        hostile::scenarios(),
        double_validation::scenarios(),
        observe::scenarios(),
        faults::scenarios(),
        boot::scenarios(),
        tdx_boot::scenarios(),
        boot_memory::scenarios(),
        policy::scenarios(),
        ends::scenarios(),
        native::scenarios(),
        matrix::scenarios(),
        stress::scenarios(),
        attest::scenarios(),
        attest_lies::scenarios(),
        disk::scenarios(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
