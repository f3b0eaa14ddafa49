//! TDG.VP.VMCALL of the guest: what is passed on to the host, and what becomes of the answer.
//!
//! The host is the guest's adversary as much as ours, and the guest checks its answers itself. So
//! requests are passed on as they are where they touch nothing of the paravisor's: port and device
//! accesses, MSRs and CPUID that are the host's. MapGPA goes through the map first. What the interface
//! does not know is not passed on.

use accept::Backend;
use protocols::tdx::vmcall::register::{R10, R11, R12, R13, R14, R15, RAX, RCX};
use protocols::tdx::vmcall::{FATAL_ERROR_TEXT, PASSABLE, Status as HostStatus, SubFunction};
use protocols::tdx::{Operand, Status};
use protocols::terminate::TurnstileReason;

use super::msr::x2apic;
use super::vp::Vp;
use super::{Domain, HostRegisters, Next, Service};

/// R10 where there is no such hypercall (Linux, KVM_ENOSYS).
const NO_HYPERCALL: u64 = 1000_i64.wrapping_neg().cast_unsigned();

/// The registers of a request and its answer.
const REGISTERS: [usize; 6] = [R10, R11, R12, R13, R14, R15];

impl<B: Backend, D: Domain> Service<'_, B, D> {
    /// Answers TDG.VP.VMCALL, an instruction of `length` bytes.
    pub(super) fn vmcall(&self, vp: &mut Vp, length: u32) -> Next {
        let passed = vp.gprs()[RCX];
        if passed & !PASSABLE != 0 {
            vp.gprs()[RAX] = Operand::RCX.invalid();
            vp.skip(length);
            return Next::Resume;
        }
        let is_passed = |register: usize| passed >> register & 1 != 0;
        // What the guest does not pass the host sees as zero.
        let request = REGISTERS.map(|register| match is_passed(register) {
            true => vp.gprs()[register],
            false => 0,
        });
        let [r10, r11, r12, r13, ..] = request;
        let mut next = Next::Resume;
        let mut answer = request;
        if r10 != 0 {
            // A hypercall of one hypervisor or another, which would work on the host's idea of us.
            answer[0] = NO_HYPERCALL;
        } else {
            match SubFunction(r11) {
                SubFunction::HLT => {
                    next = Next::Wait { blocked: r12 != 0 };
                    answer[0] = HostStatus::SUCCESS.0;
                }
                SubFunction::MAP_GPA => match self.map_gpa(vp, r12, r13) {
                    Ok((status, at)) => {
                        answer[0] = status.0;
                        answer[1] = at;
                    }
                    Err(reason) => return Next::End(reason),
                },
                SubFunction::CPUID
                | SubFunction::IO
                | SubFunction::RDMSR
                | SubFunction::WRMSR
                | SubFunction::MMIO
                | SubFunction::GET_TD_VMCALL_INFO
                | SubFunction::GET_QUOTE => match self.domain.ask_host(request) {
                    Ok(registers) => {
                        answer = registers;
                        note_spurious_vector(vp, request, answer);
                    }
                    Err(_) => return Next::End(TurnstileReason::TD_VMCALL),
                },
                SubFunction::REPORT_FATAL_ERROR => {
                    let text = FATAL_ERROR_TEXT.map(|register| match is_passed(register) {
                        true => vp.gprs()[register],
                        false => 0,
                    });
                    // If the host goes on, the guest has to see for itself that it does not.
                    self.domain.report_fatal_error([r12, r13], text);
                }
                _ => answer[0] = HostStatus::SUBFUNCTION_UNSUPPORTED.0,
            }
        }
        for (register, value) in REGISTERS.into_iter().zip(answer) {
            if is_passed(register) {
                vp.gprs()[register] = value;
            }
        }
        vp.gprs()[RAX] = Status::SUCCESS.with(0);
        vp.skip(length);
        next
    }
}

/// What the guest writes to the spurious-interrupt vector register of L1's APIC, which is its own, too:
/// the vector that means nothing to it is the one that calls its processors out (decision 026).
fn note_spurious_vector(vp: &mut Vp, request: HostRegisters, answer: HostRegisters) {
    let [_, function, number, value, ..] = request;
    let [status, ..] = answer;
    if SubFunction(function) == SubFunction::WRMSR
        && number == u64::from(x2apic::SPURIOUS)
        && HostStatus(status) == HostStatus::SUCCESS
    {
        vp.spurious = value as u32;
    }
}
