//! The host of a trust domain: TDG.VP.VMCALL.
//!
//! The host chooses every answer. A status that is not success is an error, an address outside of what
//! was asked for is one, too, and a host that makes no progress is asked a bounded number of times.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use protocols::addr::{Gpa, LARGE_PAGE_SIZE, Vmpl};
use protocols::tdx::vmcall::{Direction, Status, SubFunction};
use protocols::terminate::{Reason, TurnstileReason};
use x86_64::instructions::hlt;

use super::{Hypervisor, VcpuRequest};
use crate::platform::tdx::map_gpa::{Answer, Conversion};
use crate::platform::tdx::module::{self, HostRegisters};

/// Whether this is the platform we are on.
static HERE: AtomicBool = AtomicBool::new(false);
/// The bit of an address that says "shared", once it is known.
static SHARED: AtomicU64 = AtomicU64::new(0);

/// Notes that this is a trust domain: the measured launch parameters say so.
pub fn arrive() {
    HERE.store(true, Ordering::Relaxed);
}

/// Whether this is a trust domain.
#[must_use]
pub fn is_here() -> bool {
    HERE.load(Ordering::Relaxed)
}

/// Notes which bit of addresses makes them shared.
pub fn set_shared_bit(bit: u64) {
    SHARED.store(bit, Ordering::Relaxed);
}

/// The bit of addresses that makes them shared; 0 until it is known.
#[must_use]
pub fn shared_bit() -> u64 {
    SHARED.load(Ordering::Relaxed)
}

/// The host, by the processor's module.
#[derive(Clone, Copy, Debug)]
pub struct TdHost;

/// A request of the standard interface; R10 to R15 of the answer.
fn ask(function: SubFunction, operands: [u64; 4]) -> Result<HostRegisters, TurnstileReason> {
    let [r12, r13, r14, r15] = operands;
    module::vmcall([0, function.0, r12, r13, r14, r15]).map_err(|_| TurnstileReason::TD_VMCALL)
}

impl TdHost {
    /// MapGPA of all of a range, in as many requests as the host wants as long as each makes progress.
    ///
    /// # Errors
    ///
    /// [`TurnstileReason::TD_MAP_GPA`] if the host refuses, answers with an address that was not asked
    /// for, or makes no progress for too long.
    pub fn convert(&self, conversion: Conversion) -> Result<(), TurnstileReason> {
        let mut left = conversion;
        loop {
            let [status, next, ..] = ask(
                SubFunction::MAP_GPA,
                [
                    left.start() | left.alias_bit(shared_bit()),
                    left.bytes(),
                    0,
                    0,
                ],
            )?;
            match left.take_answer(Status(status), next, shared_bit()) {
                Answer::Done => return Ok(()),
                Answer::Again => {}
                Answer::Refused(_) | Answer::Stuck => return Err(TurnstileReason::TD_MAP_GPA),
            }
        }
    }
}

impl Hypervisor for TdHost {
    fn run_vmpl(&self, _: Vmpl) -> Result<(), TurnstileReason> {
        Err(TurnstileReason::TD_ONLY)
    }

    fn create_vcpu(&self, _: VcpuRequest) -> Result<(), TurnstileReason> {
        Err(TurnstileReason::TD_ONLY)
    }

    fn list_apic_ids(&self, _: Gpa) -> Result<(), TurnstileReason> {
        Err(TurnstileReason::TD_ONLY)
    }

    fn make_private(&self, blocks: &[Gpa]) -> Result<(), TurnstileReason> {
        blocks.iter().try_for_each(|block| {
            let conversion = Conversion::to_private(block.get(), LARGE_PAGE_SIZE)
                .ok_or(TurnstileReason::INTERNAL)?;
            self.convert(conversion)
        })
    }

    fn write_port(&self, port: u16, value: u8) -> Result<(), TurnstileReason> {
        let operands = [1, Direction::WRITE.0, port.into(), value.into()];
        match ask(SubFunction::IO, operands)? {
            [status, ..] if Status(status) == Status::SUCCESS => Ok(()),
            _ => Err(TurnstileReason::TD_VMCALL),
        }
    }
}

/// Ends the machine. A host that does not gets a processor that asks again for ever.
pub fn stop(reason: Reason) -> ! {
    /// Text in R14 and R15: what a host shows of it without knowing our codes.
    const TEXT: [u64; 2] = [
        u64::from_le_bytes(*b"turnstil"),
        u64::from_le_bytes(*b"e\0\0\0\0\0\0\0"),
    ];
    let code = u64::from(reason.set.0) << 8 | u64::from(reason.code);
    loop {
        let _ = ask(SubFunction::REPORT_FATAL_ERROR, [code, 0, TEXT[0], TEXT[1]]);
        hlt();
    }
}
