//! The platform half of the machine: what SEV-SNP *means*, without the CPU that runs it.
//!
//! The binary of this package is a thin AMD-V hypervisor that runs inside stock QEMU. Whenever
//! it has to know what real hardware, a real host or the AMD-SP would do, it asks this
//! library, which owns the RMP, the host's view of memory, the GHCB protocol, the launch and
//! the referee. Nothing here touches hardware, so all of it is tested on the host.
//!
//! ```text
//!  exits, worlds (bin) ──► guest (walk, decode, deliver #VC)
//!                      ──► Platform ──► access · isa · ghcb · launch · referee · oracle
//!                                    │             └────────────┬───────────┘
//!                                    │                    host_memory ──► rmp
//!                                    ├── counters, calls, samples   └── layout, memory (bytes)
//!                                    └── settings
//! ```
//!
//! Rules of the house:
//!
//! * No logic is shared with the paravisor; only wire formats, by the crate `protocols`.
//! * Where a source is unsure the machine is stricter than KVM. `docs/machine.md` lists where
//!   it is stricter, where looser, and what it cannot check.
//! * Every refusal is a line with values ([`platform::Platform::take_events`]).
//! * Rules are cited as the document they come from (APM, GHCB, …) or as the fact sheet that
//!   collects it (`snp-isa.md` §9, `ghcb.md` §5, `tcg-svm.md` §4, …).
//! * After every call the caller zaps what [`platform::Platform::take_invalidations`] names.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod access;
pub mod amd_sp;
pub mod calls;
pub mod counters;
pub mod cpuid;
pub mod describe;
pub mod fwcfg_filter;
pub mod ghcb;
pub mod guest;
pub mod host_memory;
pub mod isa;
pub mod launch;
pub mod layout;
pub mod memory;
pub mod oracle;
pub mod platform;
pub mod power;
pub mod referee;
pub mod rmp;
pub mod samples;
pub mod settings;
pub mod stale;
pub mod tdx;
#[cfg(test)]
mod testing;
pub mod types;
pub mod vcpu;

pub use access::{Mapping, Region, Verdict};
pub use memory::PhysicalMemory;
pub use platform::{Invalidation, Platform};
pub use types::{Alias, Gpa, Kind, PAGE_SIZE, PageSize, Spa, VcpuId, Vmpl};
