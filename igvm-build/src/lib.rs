//! Builds the IGVM images of Turnstile, and reads anybody's: shows, measures, checks, signs and compares them.
//!
//! An image is one file: the paravisor, optionally a firmware, the page tables and the
//! processor state the paravisor starts with, and the launch digest that follows from them.
//! It is the same bit for bit whenever and wherever it is built from the same inputs.
//!
//! | module | owns |
//! |---|---|
//! | | **what an image is made of** |
//! | [`elf`] | what an ELF file says: segments, entry point, symbols |
//! | [`firmware`], [`td_firmware`] | what an OVMF image says about itself |
//! | [`layout`] | where everything in the paravisor's region lies |
//! | [`page_tables`] | the tables the paravisor starts on |
//! | [`vmsa`], [`native`] | the first processor's state, on each platform that has one |
//! | [`tdx`] | what is launched on TDX, where it has none |
//! | [`params`] | the page of launch parameters |
//! | [`handover`], [`efi`] | what the firmware is handed: keys of secure boot, a kernel |
//! | [`target`] | whose loader the image is for |
//! | [`image`], [`td`] | the file: all directives, in the order a loader needs |
//! | | **what a file says** |
//! | [`mod@file`] | any IGVM file, header by header, with the rules it may break |
//! | [`measure`] | launch digest and MRTD, step by step |
//! | [`check`] | which rules a file breaks |
//! | [`id_block`] | who vouches for a digest |
//! | [`show`], [`diff`], [`sidecar`] | descriptions for people and for tools |
//! | | **words and messages** |
//! | [`recipe`], [`accept`], [`cpu`] | what command lines and recipes say |
//! | [`error`] | every message about a wrong input |
//! | [`flat`] | ROMs made of ELF files |
//!
//! The functions work on bytes; only the command opens files. How the command is used: docs/images.md.

#![forbid(unsafe_code)]

pub mod accept;
pub mod check;
pub mod cpu;
pub mod diff;
pub mod efi;
pub mod elf;
pub mod error;
pub mod file;
pub mod firmware;
pub mod flat;
pub mod handover;
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
