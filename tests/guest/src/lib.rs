//! What the bare-metal test guests have in common.
//!
//! - `isa_cases` takes the place of the paravisor (VMPL0, straight from an IGVM image) and
//!   judges the emulated machine: instructions, RMP, GHCB.
//! - `svsm_cases` takes the place of the firmware (VMPL1) and judges the paravisor: every
//!   SVSM call, good and bad.
//! - `tdx_cases` is L1 of a trust domain and judges the emulated machine there: TDCALL, the
//!   secure EPT, #VE, the host's answers.
//! - `l2_cases` is the guest of the paravisor there, an ordinary trust domain to itself.
//!
//! These are tables of [`harness::Case`]s; `svsm_counts` and `l2_counts` count what calls cost in the
//! places of the second and the last, and `svsm_evidence`, in the second's place too, asks for reports that a
//! verifier outside judges. A case makes something happen and compares what *others* say
//! about it (results of instructions, replies, the oracle, memory that others filled) with what the
//! fact sheets promise; it never compares with a value it wrote itself unless the point is that the
//! value survived. One line per case goes to the second serial port, then a summary; a write to port
//! 0xF4 ends the run.
//!
//! A guest runs its cases on one virtual processor with interrupts off. Everything here relies
//! on that: the modules keep their state in plain atomics and are not meant for more processors.
//! What a second processor does is in [`reader`] and uses nothing else.

#![cfg_attr(not(test), no_std)]
#![expect(
    clippy::result_large_err,
    reason = "there is no heap for findings, and one ends its case: its size costs nothing"
)]

pub mod amd_sp;
#[cfg(target_os = "none")]
pub mod console;
#[cfg(target_os = "none")]
pub mod counting;
#[cfg(target_os = "none")]
pub mod ghcb;
pub mod harness;
#[cfg(target_os = "none")]
pub mod insn;
#[cfg(target_os = "none")]
pub mod memory;
#[cfg(target_os = "none")]
pub mod oracle;
#[cfg(target_os = "none")]
mod panic;
#[cfg(target_os = "none")]
pub mod reader;
#[cfg(target_os = "none")]
pub mod svsm;
pub mod td_start;
#[cfg(target_os = "none")]
pub mod tdcall;
pub mod text;
#[cfg(target_os = "none")]
pub mod trap;
