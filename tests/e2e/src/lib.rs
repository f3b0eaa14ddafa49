//! Starts the emulated machine in QEMU, and the end-to-end scenarios that do so.
//!
//! Owns everything between an image on disk and a verdict about a run:
//!
//! - [`vm`]: one run of the machine, also used by `xtask run`;
//! - [`attestation`]: how a guest gathers its evidence, and in which lines it comes out;
//! - [`chip`]: the chip of the emulated security processor, and its certificates;
//! - [`prediction`]: what reports must say, known before the launch;
//! - [`verify`]: what a verifier does with a report;
//! - [`image`]: the images that are run;
//! - [`guests`]: the kernels and firmware that are booted, by name;
//! - [`initramfs`]: the guest's userspace;
//! - [`uki`]: kernels as EFI programs;
//! - [`stress`]: the stress program's place in it;
//! - [`bench`]: what is measured in the machine;
//! - [`report_laws`]: what is true of every report;
//! - [`scenario`]: what a scenario is given and what it returns;
//! - [`scenarios`]: the scenarios, one module per intent.
//!
//! Nothing here builds or fetches: `xtask` does, and hands over [`scenario::Artefacts`]. The library
//! writes only into the directory it is given for a run.

#![forbid(unsafe_code)]

pub mod attestation;
pub mod bench;
pub mod chip;
pub mod guests;
pub mod image;
pub mod initramfs;
pub mod prediction;
pub mod report_laws;
pub mod scenario;
pub mod scenarios;
pub mod stress;
pub mod uki;
pub mod verify;
pub mod vm;
