//! Builds, inspects and measures the IGVM images of Turnstile.
//!
//! An image is one file: the paravisor, optionally a firmware, the page tables and the
//! processor state the paravisor starts with, and the launch digest that follows from them.
//! It is the same bit for bit whenever and wherever it is built from the same inputs.
//!
//! | module | owns |
//! |---|---|
//! | [`elf`] | what an ELF file says: segments, entry point, symbols |
//! | [`layout`] | where everything in the paravisor's region lies |
//! | [`page_tables`] | the tables the paravisor starts on |
//! | [`vmsa`], [`native`] | the first processor's state, on each platform that has one |
//! | [`tdx`] | what is launched on TDX, where it has none |
//! | [`firmware`], [`td_firmware`] | what an OVMF image says about itself |
//! | [`params`] | the page of launch parameters |
//! | [`image`] | the file: all directives, in the order a loader needs |
//! | [`digest`] | the launch digest of a list of directives |
//! | [`td`] | the file of a trust domain |
//! | [`show`], [`sidecar`] | descriptions for people and for tools |
//! | [`flat`] | ROMs made of ELF files |
//! | [`accept`] | when memory is accepted, in the words of a command line |
//! | [`error`] | every message about a wrong file |
//!
//! The functions work on bytes; only the command opens files.

#![forbid(unsafe_code)]

pub mod accept;
pub mod check;
pub mod cpu;
pub mod diff;
pub mod elf;
pub mod error;
pub mod file;
pub mod firmware;
pub mod flat;
pub mod id_block;
pub mod image;
pub mod layout;
pub mod measure;
pub mod native;
pub mod page_tables;
pub mod params;
pub mod recipe;
pub mod show;
pub mod sidecar;
pub mod target;
pub mod td;
pub mod td_firmware;
pub mod tdx;
pub mod vmsa;
