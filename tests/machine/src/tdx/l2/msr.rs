//! Model-specific registers of the L2 VM that runs: L1's, the virtual APIC's, or the processor's.

use protocols::tdx::vmcs::{SecondaryControls, msr_bitmaps};

use super::super::ve::{MsrClass, msr_class};
use crate::memory::PhysicalMemory;
use crate::platform::Platform;
use crate::types::VcpuId;

/// What becomes of an access of an L2 VM to a model-specific register.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MsrAccess {
    /// L1 gets it.
    Exit,
    /// The processor does it.
    Native,
    /// Done; a read gives this.
    Done(u64),
    /// #GP(0).
    GeneralProtection,
    /// L1 hears that the service of this vector has ended.
    EndOfInterrupt(u8),
    /// L1 hears that the task priority is below its threshold.
    BelowThreshold,
}

/// Numbers of x2APIC registers that are virtualized.
mod x2apic {
    pub const FIRST: u32 = 0x800;
    pub const LAST: u32 = 0x8FF;
    pub const TPR: u32 = 0x808;
    pub const EOI: u32 = 0x80B;
    pub const SELF_IPI: u32 = 0x83F;
}

impl<P: PhysicalMemory> Platform<P> {
    /// An access of the VM that runs to a model-specific register (`value` is what it writes).
    pub fn l2_msr(&mut self, vcpu: VcpuId, number: u32, write: Option<u64>) -> MsrAccess {
        let is_write = write.is_some();
        let Some((_, l2)) = self.td().and_then(|td| td.inside(vcpu)) else {
            return MsrAccess::Exit;
        };
        let exits = msr_bitmaps::place(number, is_write)
            .is_none_or(|(word, bit)| l2.bitmaps[word] >> bit & 1 != 0);
        if exits {
            return MsrAccess::Exit;
        }
        let secondary = l2.controls.secondary;
        let eoi_exit = l2.controls.eoi_exit;
        if (x2apic::FIRST..=x2apic::LAST).contains(&number) {
            let virtualized = secondary.contains(SecondaryControls::VIRTUALIZE_X2APIC);
            let delivers = secondary.contains(SecondaryControls::VIRTUAL_INTERRUPTS);
            return match (number, write) {
                (x2apic::TPR, None) if virtualized => self.read_apic(vcpu, number),
                (_, None)
                    if virtualized && secondary.contains(SecondaryControls::APIC_REGISTERS) =>
                {
                    self.read_apic(vcpu, number)
                }
                (x2apic::TPR, Some(value)) if virtualized => match u8::try_from(value) {
                    Ok(value) if self.set_virtual_tpr(vcpu, value) => MsrAccess::BelowThreshold,
                    Ok(_) => MsrAccess::Done(0),
                    Err(_) => MsrAccess::GeneralProtection,
                },
                (x2apic::EOI, Some(0)) if virtualized && delivers => {
                    match self.with_apic(vcpu, |apic| apic.end_of_interrupt()) {
                        Some(vector)
                            if eoi_exit[usize::from(vector / 64)] >> (vector % 64) & 1 != 0 =>
                        {
                            MsrAccess::EndOfInterrupt(vector)
                        }
                        _ => MsrAccess::Done(0),
                    }
                }
                (x2apic::SELF_IPI, Some(vector @ 16..=255)) if virtualized && delivers => {
                    let _ = self.with_apic(vcpu, |apic| apic.request(vector as u8));
                    MsrAccess::Done(0)
                }
                (x2apic::EOI | x2apic::SELF_IPI, Some(_)) if virtualized && delivers => {
                    MsrAccess::GeneralProtection
                }
                // The APIC of the processor is L1's.
                _ => MsrAccess::Exit,
            };
        }
        // L1 cannot give what it does not have itself.
        match msr_class(number, is_write) {
            MsrClass::Native => MsrAccess::Native,
            MsrClass::Fixed(value) => MsrAccess::Done(value),
            MsrClass::Host | MsrClass::None => MsrAccess::Exit,
        }
    }

    fn read_apic(&mut self, vcpu: VcpuId, number: u32) -> MsrAccess {
        match self.with_apic(vcpu, |apic| apic.read(number)) {
            Some(value) => MsrAccess::Done(value),
            None => MsrAccess::Exit,
        }
    }

    /// Whether an access of the VM that runs to a register exits to the machine's part of L1: it
    /// does if L1 wants it, or if it is none that the processor does by itself.
    pub fn catches_l2_msr(&self, vcpu: VcpuId, number: u32, write: bool) -> bool {
        let Some((_, l2)) = self.td().and_then(|td| td.inside(vcpu)) else {
            return true;
        };
        msr_class(number, write) != MsrClass::Native
            || msr_bitmaps::place(number, write)
                .is_none_or(|(word, bit)| l2.bitmaps[word] >> bit & 1 != 0)
    }
}
