//! TD partitioning (`tdx.md` §7): this L1 runs tiny L2 VMs and judges what comes back.

pub mod apic;
pub mod enter;
pub mod exits;
pub mod fields;
pub mod memory;
pub mod two;
mod vm;
