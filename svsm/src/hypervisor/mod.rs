//! What the host gives: running privilege levels, starting processors, pages to share, a port
//! to log to, and an end.
//!
//! The host is not trusted. A reply that is unknown, malformed or not the one asked for is an
//! error with the reason to terminate with; no reply is ever interpreted generously. Success
//! proves nothing either: what the paravisor relies on it checks with the processor.

use protocols::addr::{Gpa, Vmpl};
use protocols::terminate::TurnstileReason;

#[cfg(target_os = "none")]
pub mod ghcb;
#[cfg(target_os = "none")]
pub mod msr;
#[cfg(target_os = "none")]
pub mod native;
#[cfg(target_os = "none")]
pub mod tdx;

/// When a processor starts to run a VMSA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// When the host is asked to run its privilege level.
    Later,
    /// At once.
    Now,
}

/// A request to use a page as the VMSA of a processor's privilege level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuRequest {
    /// APIC id of the processor.
    pub apic_id: u32,
    /// Privilege level of the VMSA.
    pub vmpl: Vmpl,
    /// The VMSA, not at a multiple of 2 MiB (processor erratum).
    pub vmsa: Gpa,
    /// The VMSA's SEV features.
    pub sev_features: u64,
    /// When it runs.
    pub start: Start,
}

/// The host's side of a confidential VM, as one processor talks to it.
pub trait Hypervisor {
    /// Lets the host run `vmpl` on this processor; returns when this level runs again.
    ///
    /// # Errors
    ///
    /// [`TurnstileReason::RUN_VMPL`] or one of the GHCB reasons.
    fn run_vmpl(&self, vmpl: Vmpl) -> Result<(), TurnstileReason>;

    /// Tells the host about a VMSA.
    ///
    /// # Errors
    ///
    /// [`TurnstileReason::AP_CREATION`] or one of the GHCB reasons.
    fn create_vcpu(&self, request: VcpuRequest) -> Result<(), TurnstileReason>;

    /// Has the host write the APIC ids of all processors to the shared page `list`: their number,
    /// then the ids, 32 bits each.
    ///
    /// # Errors
    ///
    /// [`TurnstileReason::APIC_IDS`] if a page is not enough, or one of the GHCB reasons.
    fn list_apic_ids(&self, list: Gpa) -> Result<(), TurnstileReason>;

    /// Has the host make the 2 MiB blocks at these addresses private; those that are stay so. As
    /// many as a list has room for ([`protocols::ghcb::psc::MAX_ENTRIES`]); more are refused.
    ///
    /// # Errors
    ///
    /// [`TurnstileReason::GHCB_PAGE_STATE`] if the host refuses, or makes no progress; one of the
    /// GHCB reasons.
    fn make_private(&self, blocks: &[Gpa]) -> Result<(), TurnstileReason>;

    /// Writes a byte to an I/O port.
    ///
    /// # Errors
    ///
    /// One of the GHCB reasons.
    fn write_port(&self, port: u16, value: u8) -> Result<(), TurnstileReason>;
}
