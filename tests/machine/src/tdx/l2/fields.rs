//! What TDG.VP.RD and TDG.VP.WR know of L2 VMs: VMCS, MSR bitmaps, L2_CTLS.

use protocols::tdx::metadata::{FieldId, L2Controls};
use protocols::tdx::vmcs::{Field, msr_bitmaps};
use protocols::tdx::{L2Vm, Status};
use zerocopy::IntoBytes;

use super::super::page::vmpl_of;
use super::vmcs::{self, Refusal};
use crate::memory::PhysicalMemory;
use crate::platform::Platform;
use crate::types::VcpuId;

impl<P: PhysicalMemory> Platform<P> {
    /// TDG.VP.RD of a field of an L2 VM: VMCS, MSR bitmaps, L2_CTLS.
    pub(in crate::tdx) fn l2_field(&self, vcpu: VcpuId, id: FieldId) -> Option<u64> {
        if !id.is_single() {
            return None;
        }
        if let Some((vm, field)) = Field::of(id) {
            let mut state = self.l2_state(vcpu, vm)?;
            return vmcs::read(&self.l2(vcpu, vm)?.controls, &mut state, field);
        }
        if let Some((vm, word)) = msr_bitmaps::of(id) {
            return self.l2(vcpu, vm)?.bitmaps.get(word).copied();
        }
        let vm = L2Vm::ALL
            .into_iter()
            .find(|&vm| FieldId::l2_ctls(vm).is(id))?;
        Some(self.l2(vcpu, vm)?.ctls.bits())
    }

    /// TDG.VP.WR of such a field.
    pub(in crate::tdx) fn set_l2_field(&mut self, vcpu: VcpuId, id: FieldId, value: u64) -> Status {
        const UNKNOWN: Status = Status::METADATA_FIELD_ID_INCORRECT;
        if let Some((vm, field)) = Field::of(id) {
            let (Some(at), Some(mut state)) =
                (self.state_at(vcpu, vmpl_of(vm)), self.l2_state(vcpu, vm))
            else {
                return UNKNOWN;
            };
            let Some(l2) = self.l2_mut(vcpu, vm) else {
                return UNKNOWN;
            };
            return match vmcs::write(&mut l2.controls, &mut state, field, value) {
                Ok(()) => {
                    self.memory.write(at, state.as_bytes());
                    Status::SUCCESS
                }
                Err(Refusal::Value) => Status::METADATA_FIELD_VALUE_NOT_VALID,
                Err(Refusal::Unknown) => UNKNOWN,
            };
        }
        if let Some((vm, word)) = msr_bitmaps::of(id) {
            let Some(place) = self
                .l2_mut(vcpu, vm)
                .and_then(|l2| l2.bitmaps.get_mut(word))
            else {
                return UNKNOWN;
            };
            *place = value;
            return Status::SUCCESS;
        }
        let found = L2Vm::ALL
            .into_iter()
            .find(|&vm| FieldId::l2_ctls(vm).is(id));
        let Some(l2) = found.and_then(|vm| self.l2_mut(vcpu, vm)) else {
            return UNKNOWN;
        };
        // #VE without L1 is not modelled, so nobody is to think that it works.
        match L2Controls::from_bits(value) {
            Some(ctls) if !ctls.contains(L2Controls::ENABLE_EXTENDED_VE) => {
                l2.ctls = ctls;
                Status::SUCCESS
            }
            _ => Status::METADATA_FIELD_VALUE_NOT_VALID,
        }
    }
}
