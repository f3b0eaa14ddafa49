//! The host's side of the GHCB protocol, version 2 (`ghcb.md`, `guests.md` §5).
//!
//! [`Platform::vmgexit`] is the one door: it reads the GHCB MSR of the context and speaks the
//! MSR protocol (`msr`) or the page protocol (`page`). What needs the CPU or a device
//! goes through [`Cpu`]; what changes who runs comes back as a [`Reply`].
//!
//! The host trusts nothing in the page: it is copied once, required fields are checked
//! against the valid bitmap, and only documented outputs are marked valid on return.

mod ap;
pub mod guest_request;
mod instructions;
mod msr;
mod page;
mod psc;

use alloc::string::String;

use protocols::ghcb::HypervisorFeatures;
use protocols::ghcb::msr::{Info, Response};

use crate::memory::PhysicalMemory;
use crate::platform::Platform;
use crate::settings::Hostile;
use crate::types::{Gpa, VcpuId, Vmpl};

/// What the CPU side does for the host: everything that is not the platform's.
///
/// Values are those of the vCPU that exited. Register values never pass through here; the
/// GHCB carries them.
pub trait Cpu {
    /// CPUID as the guest is to see it: `[eax, ebx, ecx, edx]`.
    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4];
    /// Reads a port; `bytes` is 1, 2 or 4.
    fn io_in(&mut self, port: u16, bytes: u8) -> u32;
    /// Writes a port; `bytes` is 1, 2 or 4. May end the run.
    fn io_out(&mut self, port: u16, bytes: u8, value: u32);
    /// RDMSR; `None` asks for #GP(0).
    fn rdmsr(&mut self, msr: u32) -> Option<u64>;
    /// WRMSR; false asks for #GP(0).
    fn wrmsr(&mut self, msr: u32, value: u64) -> bool;
    /// Reads a device register where there is no memory; `bytes` is 1, 2, 4 or 8.
    fn mmio_read(&mut self, gpa: Gpa, bytes: u8) -> u64;
    /// Writes a device register where there is no memory.
    fn mmio_write(&mut self, gpa: Gpa, bytes: u8, value: u64);
    /// RDTSC.
    fn rdtsc(&mut self) -> u64;
    /// TSC_AUX, for RDTSCP.
    fn tsc_aux(&mut self) -> u32;
    /// RDPMC; `None` asks for #GP(0).
    fn rdpmc(&mut self, counter: u32) -> Option<u64>;
    /// Reads DR7 of the context that exited.
    fn dr7(&mut self) -> u64;
    /// Writes DR7.
    fn set_dr7(&mut self, value: u64);
    /// WBINVD.
    fn wbinvd(&mut self);
    /// Whether an interrupt waits that the task priority lets through.
    fn is_interrupted(&mut self) -> bool;
}

/// What AP creation asks the CPU side to do. The platform has recorded the VMSA already.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ApAction {
    /// The vCPU to start or stop.
    pub target: VcpuId,
    /// Which of its contexts.
    pub vmpl: Vmpl,
    /// What to do.
    pub kind: ApKind,
}

/// See [`ApAction`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ApKind {
    /// Run the context's VMSA now, replacing what the vCPU runs at this or a lower level.
    Start,
    /// Stop running the context and forget its VMSA.
    Stop,
}

/// What happens after a VMGEXIT. Except where said, the response is in place already, so the
/// caller sees it when it runs again.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reply {
    /// Resume the caller.
    Resume,
    /// Run another VMPL of the same vCPU; it has a VMSA.
    Run(Vmpl),
    /// Resume the caller, and start or stop a context of some vCPU.
    Ap(ApAction),
    /// Do not run the caller until a start-up IPI arrives and
    /// [`Platform::release_hold`] was called.
    Hold,
    /// The caller ended the guest.
    Terminate {
        /// Reason set.
        set: u8,
        /// Reason code.
        code: u8,
    },
    /// The host does not go on.
    Refused(String),
}

/// GHCB protocol versions this host speaks.
const VERSION_MIN: u16 = 1;
const VERSION_MAX: u16 = 2;

/// What this host offers (`guests.md` §5.3).
const FEATURES: HypervisorFeatures = HypervisorFeatures::SNP
    .union(HypervisorFeatures::AP_CREATION)
    .union(HypervisorFeatures::APIC_ID_LIST)
    .union(HypervisorFeatures::MULTI_VMPL);

impl<P: PhysicalMemory> Platform<P> {
    /// Serves a VMGEXIT of `vmpl` on `vcpu`.
    pub fn vmgexit(&mut self, vcpu: VcpuId, vmpl: Vmpl, cpu: &mut dyn Cpu) -> Reply {
        self.serve(vcpu);
        let asked = (self.clock)();
        let value = self.ghcb_msr(vcpu, vmpl);
        let reply = if Info::of(value) == Info::GHCB_GPA {
            self.page_request(vcpu, vmpl, Gpa::new(value), cpu)
        } else {
            self.msr_request(vcpu, vmpl, value, cpu)
        };
        if reply == Reply::Run(Vmpl::VMPL0) && vmpl != Vmpl::VMPL0 {
            self.counters.calls.ask(vcpu, vmpl, asked);
        }
        reply
    }

    /// The SEV_INFO response, which is also the reset value of the MSR.
    pub(crate) fn sev_info(&self) -> u64 {
        let (min_version, max_version) = if self.settings.is_hostile(Hostile::GhcbVersion) {
            (VERSION_MAX + 1, VERSION_MAX + 1)
        } else {
            (VERSION_MIN, VERSION_MAX)
        };
        Response::SevInfo {
            min_version,
            max_version,
            c_bit: crate::vcpu::C_BIT,
        }
        .encode()
    }

    /// The features this host admits to.
    pub(crate) fn hypervisor_features(&self) -> HypervisorFeatures {
        if self.settings.is_hostile(Hostile::GhcbFeatures) {
            FEATURES.difference(HypervisorFeatures::MULTI_VMPL)
        } else {
            FEATURES
        }
    }

    /// Whether `vcpu` has a VMSA for `target` that VMPL `from` may ask to run.
    pub(crate) fn can_run(&self, vcpu: VcpuId, target: u64) -> Option<Vmpl> {
        let vmpl = Vmpl::try_new(target)?;
        self.context(vcpu, vmpl)?.vmsa?;
        Some(vmpl)
    }
}

#[cfg(test)]
mod tests;
