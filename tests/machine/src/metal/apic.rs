//! Interrupt commands of guests: INIT and start-up are the machine's, the rest is the APIC's.
//!
//! A real INIT would reset a CPU that runs the machine (facts: tcg-svm.md §6), so none is ever
//! sent; a real start-up IPI would be ignored.

use machine::types::VcpuId;

use super::cpu::{self, msr};
use super::smp;

/// Delivery modes (APM 16.5, figure 16-18).
mod delivery {
    pub const INIT: u64 = 5;
    pub const STARTUP: u64 = 6;
}

/// A guest writes its x2APIC interrupt command register.
pub fn write_icr(from: VcpuId, value: u64) {
    match value >> 8 & 7 {
        // The second, level-triggered de-assert of an INIT says nothing.
        delivery::INIT if value & 1 << 15 != 0 && value & 1 << 14 == 0 => {}
        delivery::INIT => smp::for_each_target(from, value, smp::init),
        delivery::STARTUP => smp::for_each_target(from, value, smp::startup),
        _ => cpu::wrmsr(msr::X2APIC_ICR, value),
    }
}

/// Turns the APIC of this CPU on in x2APIC mode. The guest finds it so (facts: tcg-svm.md §8).
pub fn enable_x2apic() {
    const ENABLE: u64 = 1 << 11;
    let base = cpu::rdmsr(msr::APIC_BASE);
    // First on, then x2APIC: the direct way is #GP (APM 16.9).
    cpu::wrmsr(msr::APIC_BASE, base | ENABLE);
    cpu::wrmsr(msr::APIC_BASE, base | cpu::APIC_ENABLED);
}

/// Task priority, processor priority, spurious vector with the switch, and the requested vectors in eight
/// registers.
const TPR: u32 = 0x808;
const PPR: u32 = 0x80A;
const SPURIOUS: u32 = 0x80F;
const IRR: u32 = 0x820;

/// Has the APIC of this CPU look again whether it has an interrupt for it. QEMU may forget that: VMRUN with
/// a virtual interrupt changes the CPU's word of requests without a lock, and the request of an APIC that
/// comes at that moment from another core is lost (docs/machine.md). Writing the priority makes it again.
pub fn look_again() {
    cpu::wrmsr(TPR, cpu::rdmsr(TPR));
}

/// Whether an interrupt waits in the APIC of this CPU that its processor priority lets through.
pub fn is_interrupted() -> bool {
    const ON: u64 = 1 << 8;
    // One that is off keeps what it has, and hands out nothing.
    if cpu::rdmsr(SPURIOUS) & ON == 0 {
        return false;
    }
    let highest = (0..8_u32).rev().find_map(|index| {
        let word = cpu::rdmsr(IRR + index) as u32;
        word.checked_ilog2().map(|bit| index * 32 + bit)
    });
    highest.is_some_and(|vector| vector >> 4 > cpu::rdmsr(PPR) as u32 >> 4)
}
