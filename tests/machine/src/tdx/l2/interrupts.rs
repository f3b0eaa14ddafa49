//! Interrupts of the L2 VM that runs: what its virtual APIC wants, and its task priority.

use protocols::tdx::vmcs::{PrimaryControls, SecondaryControls};

use super::apic::VirtualApic;
use super::vmcs::Controls;
use crate::memory::PhysicalMemory;
use crate::platform::Platform;
use crate::types::{Gpa, VcpuId};

/// What an interrupt of the virtual APIC makes the CPU do at an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Virtual {
    /// Nothing.
    None,
    /// Deliver this vector now.
    Deliver(u8),
    /// Come back as soon as interrupts can be taken.
    Wait,
}

/// Whether the VM exits where an interrupt can be taken.
pub const fn waits_for_interrupts(controls: &Controls) -> bool {
    controls.primary.contains(PrimaryControls::INTERRUPT_WINDOW)
}

impl<P: PhysicalMemory> Platform<P> {
    /// Calls `act` on the virtual APIC of the VM that runs.
    pub(super) fn with_apic<R>(
        &mut self,
        vcpu: VcpuId,
        act: impl FnOnce(&mut VirtualApic<'_, P>) -> R,
    ) -> Option<R> {
        let (_, l2) = self.td()?.inside(vcpu)?;
        let (page, status) = (l2.controls.virtual_apic?, l2.status);
        let at = self.need_mapped(Gpa::new(page)).ok()?;
        let mut apic = VirtualApic::new(&self.memory, at, status);
        let result = act(&mut apic);
        let status = apic.status;
        self.td_mut()?.inside_mut(vcpu)?.1.status = status;
        Some(result)
    }

    /// The interrupts of the virtual APIC, before the VM goes on. `open` says that it can take one.
    /// `None` if the page is not there any more.
    pub fn virtual_interrupt(&mut self, vcpu: VcpuId, open: bool) -> Option<Virtual> {
        let running = self.running_l2(vcpu)?;
        let delivers = SecondaryControls::VIRTUAL_INTERRUPTS;
        if !running.controls.secondary.contains(delivers) {
            return Some(Virtual::None);
        }
        self.with_apic(vcpu, |apic| {
            apic.update_ppr();
            match apic.pending() {
                Some(vector) if open => {
                    apic.deliver(vector);
                    Virtual::Deliver(vector)
                }
                Some(_) => Virtual::Wait,
                None => Virtual::None,
            }
        })
    }

    /// The task priority of the virtual APIC.
    pub fn virtual_tpr(&mut self, vcpu: VcpuId) -> u8 {
        self.with_apic(vcpu, |apic| apic.tpr()).unwrap_or(0)
    }

    /// The VM has set its task priority by CR8 or its register; true if L1 is to hear of it.
    pub fn set_virtual_tpr(&mut self, vcpu: VcpuId, value: u8) -> bool {
        let Some(running) = self.running_l2(vcpu) else {
            return false;
        };
        let _ = self.with_apic(vcpu, |apic| {
            apic.set_tpr(value);
            apic.update_ppr();
        });
        let delivers = SecondaryControls::VIRTUAL_INTERRUPTS;
        !running.controls.secondary.contains(delivers)
            && value >> 4 < running.controls.tpr_threshold
    }
}
