//! L1's interrupt controller. The host emulates it; the guest uses the same one, by L1.

use protocols::tdx::vmcall::{Status as HostStatus, SubFunction};
use protocols::terminate::TurnstileReason;

use super::l2::msr::x2apic;
use super::runners::{APIC_ON, CallOut};
use crate::platform::tdx::module;

/// The spurious-interrupt vector register as L1 sets it: switched on.
pub const SPURIOUS: u32 = APIC_ON | 0xFF;

/// Switches this processor's APIC on; its identifier. Off, as it is after the reset, it takes no
/// interrupt.
///
/// # Errors
///
/// [`TurnstileReason::TD_VMCALL`] if the host does not do it.
pub fn switch_on() -> Result<u32, TurnstileReason> {
    ask(SubFunction::WRMSR, x2apic::SPURIOUS, SPURIOUS.into())?;
    // A wrong answer sends an interrupt to a processor that did not need one.
    Ok(ask(SubFunction::RDMSR, x2apic::ID, 0)? as u32)
}

/// An interrupt by the host.
#[derive(Clone, Copy, Debug)]
pub struct Ipi;

impl CallOut for Ipi {
    fn call_out(&self, apic_id: u32, vector: u8) {
        let command = u64::from(apic_id) << 32 | u64::from(vector);
        // Who called waits for a bounded time, whether it was sent or not.
        let _ = ask(SubFunction::WRMSR, x2apic::ICR, command);
    }
}

/// A request about a model-specific register; R11 of the answer.
fn ask(function: SubFunction, number: u32, value: u64) -> Result<u64, TurnstileReason> {
    match module::vmcall([0, function.0, number.into(), value, 0, 0]) {
        Ok([status, answer, ..]) if HostStatus(status) == HostStatus::SUCCESS => Ok(answer),
        _ => Err(TurnstileReason::TD_VMCALL),
    }
}
