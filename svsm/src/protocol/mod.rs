//! The SVSM calls of the guest: what is asked, whether it may be, and what the answer is.
//!
//! The module is generic over what it needs from outside ([`GuestMemory`], [`Vcpus`],
//! [`VmsaPages`], the acceptance engine), so that the code that ships is the code that is tested
//! on the host. The request loop stops the guest's processor, reads its registers once, calls
//! [`Service::handle`], does what the [`Answer`] says, and runs the guest again.
//!
//! | module | what it owns |
//! |---|---|
//! | this one | the way from a stopped processor to an answer; which protocols exist |
//! | `environment` | the traits towards the rest of the paravisor |
//! | `argument` | access to the pages that arguments lie in |
//! | `core_calls` | the core protocol: which calls exist; the calls that need no memory |
//! | `pvalidate` | accepting and rescinding by list |
//! | `vcpu` | calling areas and VMSAs |
//! | `attestation` | reports on the paravisor |
//! | `turnstile` | our own protocol: accepting by range, statistics |
//!
//! Rules:
//!
//! * Every guest word is read once, after the address was checked, and checked after it was read
//!   (I7). No value of the guest is an index.
//! * A mistake of the guest is answered with a code and changes nothing. Only two things end the
//!   machine: a lie of the host, and the loss of a page that is on record as ours.
//! * No call works without bound (I8): long lists are answered INCOMPLETE.
//! * One direction: request loop → protocol → engine → backend.

mod argument;
mod attestation;
mod core_calls;
mod environment;
mod pvalidate;
mod turnstile;
mod vcpu;

#[cfg(test)]
mod tests;

use accept::{Backend, Engine, Frame};
use protocols::addr::Gpa;
use protocols::exit_code::ExitCode;
use protocols::svsm::{CallId, CallingArea, Protocol, ResultCode};
use protocols::terminate::TurnstileReason;

use crate::ahead::{Ahead, HostLied};
use crate::attestation::{Carrier, Line};

pub use environment::{
    Debt, DeleteRefusal, Deletion, GuestMemory, Inherited, NoRoom, NotPassedOn, Place, Replaced,
    Steps, Unreachable, VcpuIndex, VcpuPages, Vcpus, VmsaClaims, VmsaPages,
};

/// The registers of a call (SVSM 5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    /// Call in, result out.
    pub rax: u64,
    /// First argument, first output.
    pub rcx: u64,
    /// Second argument, second output.
    pub rdx: u64,
    /// Third argument, third output.
    pub r8: u64,
    /// Fourth argument, fourth output.
    pub r9: u64,
}

/// What the request loop has to do with the stopped processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Answer {
    /// Nobody called: release the processor as it is.
    Resume,
    /// Write these registers, then release the processor.
    Return(Registers),
    /// The processor has deleted itself: there is nothing to release, and its VMSA page is the
    /// guest's again.
    Gone,
    /// End the machine.
    Terminate(TurnstileReason),
}

/// Why a call ends early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// The guest is told.
    Result(ResultCode),
    /// The host lied, or a page on record is lost: nothing may go on.
    Machine(TurnstileReason),
}

impl From<ResultCode> for Stop {
    fn from(code: ResultCode) -> Self {
        Self::Result(code)
    }
}

/// How a call that was carried out ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Finished {
    /// The caller gets its answer.
    Returns,
    /// The caller is no more.
    CallerGone,
}

/// The SVSM service of one VM. Shared by all processors.
pub struct Service<'a, B, M, V, P, C> {
    engine: &'a Engine<'a, B>,
    memory: M,
    vcpus: V,
    vmsa_pages: P,
    ahead: &'a Ahead,
    line: &'a Line<C>,
}

impl<'a, B: Backend, M: GuestMemory, V: Vcpus, P: VmsaPages, C: Carrier>
    Service<'a, B, M, V, P, C>
{
    /// A service on the given parts.
    pub const fn new(
        engine: &'a Engine<'a, B>,
        memory: M,
        vcpus: V,
        vmsa_pages: P,
        ahead: &'a Ahead,
        line: &'a Line<C>,
    ) -> Self {
        Self {
            engine,
            memory,
            vcpus,
            vmsa_pages,
            ahead,
            line,
        }
    }

    /// Handles the return of a processor from the guest to VMPL0 (SVSM 5).
    ///
    /// The processor is stopped: its VMSA cannot run, so `exit` and `registers`, each read once,
    /// are what the guest left. The host may have come here for no reason at all; then nobody
    /// called, and nothing happens.
    ///
    /// When this returns [`Answer::Return`], `call_pending` is cleared already. The guest cannot
    /// see that before its registers are written, because its processor is still stopped.
    pub fn handle(&self, caller: VcpuIndex, exit: ExitCode, registers: &Registers) -> Answer {
        if exit != ExitCode::VMGEXIT {
            return Answer::Resume;
        }
        let Some(area) = self.vcpus.calling_area(caller) else {
            return Answer::Resume;
        };
        let mut answer = *registers;
        let ended = match self.memory.read_u8(pending_flag(area)) {
            Ok(0) => return Answer::Resume,
            Ok(1) => self.dispatch(caller, &mut answer),
            Ok(_) => Err(ResultCode::INVALID_FORMAT.into()),
            Err(Unreachable) => Err(LOST),
        };
        let code = match ended {
            Ok(Finished::Returns) => ResultCode::SUCCESS,
            Ok(Finished::CallerGone) => return Answer::Gone,
            Err(Stop::Result(code)) => code,
            Err(Stop::Machine(reason)) => return Answer::Terminate(reason),
        };
        answer.rax = code.encode();
        match self.clear_pending(caller) {
            Ok(()) => Answer::Return(answer),
            Err(Unreachable) => Answer::Terminate(TurnstileReason::NOT_VALIDATED),
        }
    }

    fn dispatch(&self, caller: VcpuIndex, registers: &mut Registers) -> Result<Finished, Stop> {
        let id = CallId::decode(registers.rax);
        match id.protocol {
            Protocol::CORE => self.core(caller, id.call, registers),
            Protocol::ATTESTATION => self.attestation(caller, id.call, registers),
            Protocol::TURNSTILE => self.turnstile(caller, id.call, registers),
            // Linux asks every SVSM for a vTPM and takes this for "none".
            _ => Err(ResultCode::UNSUPPORTED_PROTOCOL.into()),
        }
    }

    /// Clears `call_pending` in the caller's calling area, which the call may have moved.
    fn clear_pending(&self, caller: VcpuIndex) -> Result<(), Unreachable> {
        match self.vcpus.calling_area(caller) {
            Some(area) => self.memory.write_u8(pending_flag(area), 0),
            None => Ok(()),
        }
    }
}

impl From<HostLied> for Stop {
    fn from(HostLied: HostLied) -> Self {
        log::error!("a page that nobody has accepted is valid: the host lied");
        Self::Machine(TurnstileReason::ALREADY_VALID)
    }
}

/// Bytes that one call changes at most before it answers INCOMPLETE (design §10). Every changed
/// page costs at least an instruction, so this bounds rescinds and claims as well as scrubbing.
const WORK_BUDGET: u64 = 32 << 20;

/// The end after a fault on a page that the map says is valid and ours (I6).
const LOST: Stop = Stop::Machine(TurnstileReason::NOT_VALIDATED);

/// Where a calling area's `call_pending` is.
fn pending_flag(area: Frame) -> Gpa {
    Gpa::new(area.gpa() + CallingArea::CALL_PENDING_OFFSET as u64)
}

/// What a caller is told about an error of the engine. `on_lie` is the reason to end the machine
/// with when the hardware contradicts the map.
fn stop_for(error: accept::Error, on_lie: TurnstileReason) -> Stop {
    use accept::Error;
    match error {
        Error::OutOfRange | Error::Owned | Error::NotAccepted => ResultCode::INVALID_ADDRESS.into(),
        Error::NoChange => ResultCode::FAIL_NO_CHANGE.into(),
        Error::Busy => ResultCode::BUSY.into(),
        Error::Backend { operation, status } => {
            log::warn!("{operation:?} failed with status {status:#x}");
            ResultCode::of_instruction(status).into()
        }
        Error::HostLied => {
            log::error!("the hardware contradicts the map: the host changed a page");
            Stop::Machine(on_lie)
        }
    }
}
