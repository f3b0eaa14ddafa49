//! What is measured in the machine: exact counts, and virtual time.
//!
//! Used by `cargo xtask bench` and by the scenarios that hold the budgets. All of it runs under a
//! QEMU that counts instructions ([`crate::vm::Settings::icount`]), so that the same run gives the
//! same figures on any computer, however busy.

pub mod boots;
pub mod counts;

/// VMPL0 instructions for a request of one 2 MiB page that the host backs by one, without the
/// scrub (design.md §10).
pub const BUDGET_2M: u64 = 2_000;
/// The same on 4 KiB backing, where each page takes two instructions of its own.
pub const BUDGET_4K: u64 = 512 * 40 + 2_000;
/// How much longer than the control a lazy boot may take to reach userspace.
pub const BUDGET_LAZY: f64 = 1.10;
