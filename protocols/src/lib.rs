//! Wire formats and constants: every format that crosses a border of Turnstile is written
//! here once, and only here.
//!
//! Borders are those between guest and paravisor (SVSM calls), guest and host (GHCB), launch
//! tool and paravisor, firmware and paravisor, emulated machine and its observers. Types in
//! this crate say how bytes are laid out and what values mean. They hold no policy: what is
//! allowed is decided by the crates above.
//!
//! Rules of the crate:
//!
//! - Wire structs are plain `repr(C)` data with zerocopy derives. Each has, directly beside
//!   it, constant assertions of its size and of every offset in use.
//! - Addresses inside wire structs stay plain `u64`: they are claims by whoever wrote them.
//!   [`addr::Gpa`] is the type to carry an address on once it has been read.
//! - Values that another party chooses are open enums (a newtype with constants): an unknown
//!   value is kept, compared and printed, never undefined and never a panic.
//! - Every constant names the document and the section it comes from.
//!
//! Documents cited, by short name:
//!
//! | Name | Document |
//! |---|---|
//! | SVSM | AMD 58019, Secure VM Service Module, rev 1.00 |
//! | GHCB | AMD 56421, SEV-ES Guest-Hypervisor Communication Block, protocol version 2 |
//! | APM | AMD64 Architecture Programmer's Manual volume 2, 24593 (appendix B: rev 3.44) |
//! | SNP ABI | AMD 56860, SEV-SNP Firmware ABI |
//! | IGVM | `igvm_defs` 0.4, the public definition of the IGVM file format |
//! | OVMF | EDK II, `OvmfPkg` (firmware metadata), stable202605 |
//! | UEFI | UEFI specification 2.10 and Linux' configuration tables |
//! | TDVF | Intel TDX Virtual Firmware Design Guide; EDK II, `OvmfPkg/IntelTdx` |
//! | Turnstile | this project: ARCHITECTURE.md and `docs/` |

#![no_std]
#![forbid(unsafe_code)]

#[cfg(feature = "report")]
extern crate alloc;
#[cfg(test)]
extern crate std;

// Multi-byte fields are native integers, which is only right where native means little endian.
const _: () = assert!(cfg!(target_endian = "little"));

#[macro_use]
mod open_enum;

pub mod acceptance;
pub mod addr;
pub mod amd_sp;
pub mod cpuid;
pub mod efi;
pub mod exit_code;
pub mod ghcb;
pub mod guid;
pub mod hob;
pub mod igvm_map;
pub mod launch;
pub mod map;
pub mod measure;
pub mod oracle;
pub mod ovmf;
#[cfg(feature = "report")]
pub mod report;
pub mod secrets;
pub mod snp;
pub mod stack_trace;
pub mod svsm;
pub mod tdvf;
pub mod tdx;
pub mod terminate;
pub mod vmsa;
