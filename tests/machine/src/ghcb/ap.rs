//! AP creation (`ghcb.md` §7): which VMSA a vCPU runs at which VMPL.

use alloc::format;
use alloc::string::String;

use protocols::ghcb::event::{ApCreation, ApRequest};

use super::{ApAction, ApKind, Reply};
use crate::access::owner_fault;
use crate::memory::PhysicalMemory;
use crate::platform::Platform;
use crate::types::{Alias, Gpa, PageSize, VcpuId, Vmpl};
use crate::vcpu::SEV_FEATURES;

impl<P: PhysicalMemory> Platform<P> {
    /// Serves the event; `Err` says why it is malformed.
    pub(super) fn create_ap(
        &mut self,
        from: Vmpl,
        info_1: u64,
        vmsa: u64,
        features: u64,
    ) -> Result<Reply, String> {
        let creation = ApCreation::decode(info_1)
            .ok_or_else(|| format!("AP creation with exit info 1 = {info_1:#x}"))?;
        let ApCreation {
            request,
            vmpl,
            apic_id,
        } = creation;
        let target = VcpuId(apic_id);
        if target.0 >= self.vcpu_count() {
            return Err(format!(
                "AP creation for APIC id {apic_id:#x}: no such vCPU"
            ));
        }
        // A level decides about itself and those below it, never about one above.
        if vmpl.is_more_privileged_than(from) {
            return Err(format!("{from} asks for AP creation at {vmpl}"));
        }
        match request {
            ApRequest::CREATE | ApRequest::CREATE_ON_INIT => {
                self.check_new_vmsa(Gpa::new(vmsa), features)?;
                self.set_vmsa(target, vmpl, Some(Gpa::new(vmsa)));
                Ok(if request == ApRequest::CREATE {
                    Reply::Ap(ApAction {
                        target,
                        vmpl,
                        kind: ApKind::Start,
                    })
                } else {
                    Reply::Resume
                })
            }
            ApRequest::DESTROY => {
                self.set_vmsa(target, vmpl, None);
                Ok(Reply::Ap(ApAction {
                    target,
                    vmpl,
                    kind: ApKind::Stop,
                }))
            }
            ApRequest(other) => Err(format!("AP creation request {other:#x}")),
        }
    }

    /// What KVM checks, and that the page is a VMSA already: without it VMRUN would fail later
    /// and farther from the cause.
    fn check_new_vmsa(&self, gpa: Gpa, features: u64) -> Result<(), String> {
        if features != SEV_FEATURES {
            return Err(format!("AP creation with SEV features {features:#x}"));
        }
        if !gpa.is_aligned(PageSize::Size4K) || gpa.is_aligned(PageSize::Size2M) {
            return Err(format!(
                "VMSA at {gpa}: must be 4 KiB but not 2 MiB aligned"
            ));
        }
        let place = self
            .host
            .layout()
            .place(gpa)
            .ok_or_else(|| format!("VMSA at {gpa}: no memory"))?;
        let entry = self.host.rmp().entry(&place);
        let private = self.host.attribute(&place) == Alias::Private;
        if !private || owner_fault(&entry, gpa).is_some() || !entry.is_vmsa() {
            return Err(format!("VMSA at {gpa}: the RMP says it is none"));
        }
        Ok(())
    }
}
