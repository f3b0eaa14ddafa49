//! Exits of an L2 VM: nearly all are L1's (`tdx.md` §7, exit routing), in the form Intel's
//! processors give them.

use alloc::format;

use machine::guest::decode::Opcode;
use machine::platform::End;
use machine::tdx::l2::msr::MsrAccess;
use machine::tdx::tdcall::Outcome;
use machine::tdx::ve;
use machine::types::{Alias, Gpa, Kind};
use protocols::exit_code::ExitCode;
use protocols::tdx::Status;
use protocols::tdx::l2::{Exit, ExtendedType};
use protocols::tdx::ve::ExitReason;
use protocols::tdx::vmcs::interruption;
use protocols::vmsa::Efer;

use crate::metal::cpu::msr;
use crate::metal::smp;
use crate::metal::svm::{self, EXIT_INVALID_LOW};
use crate::metal::vcpu::{Flow, Vcpu};

use super::control::{control_register, debug_register, loads_paging_register};
use super::{instruction, instruction_at_rip, nested, td, vmgexit};

/// First and last exit code of exceptions.
const EXCEPTIONS: core::ops::RangeInclusive<u64> = 0x40..=0x5F;
const PAGE_FAULT: u64 = 14;

/// Handles an exit of an L2 VM.
pub fn exit(vcpu: &mut Vcpu, code: ExitCode) -> Flow {
    if code.0 & 0xFFFF_FFFF == EXIT_INVALID_LOW {
        return invalid(vcpu);
    }
    let simple = |vcpu: &mut Vcpu, reason| {
        let length = instruction_at_rip(vcpu).length;
        vcpu.exit_to_l1(Exit::new(reason), length)
    };
    match code {
        ExitCode::NPF => nested::fault(vcpu),
        ExitCode::EXCEPTION_UD => undefined(vcpu),
        ExitCode::VMMCALL => {
            let found = instruction_at_rip(vcpu);
            let answered = match found.opcode {
                Opcode::Vmmcall => instruction::ask_oracle(vcpu, found.length),
                _ => None,
            };
            answered.unwrap_or_else(|| undefined_opcode(vcpu))
        }
        ExitCode::CPUID => simple(vcpu, ExitReason::CPUID),
        ExitCode::HLT => simple(vcpu, ExitReason::HLT),
        ExitCode::INVD => simple(vcpu, ExitReason::INVD),
        ExitCode::WBINVD => simple(vcpu, ExitReason::WBINVD),
        ExitCode::MONITOR => simple(vcpu, ExitReason::MONITOR),
        ExitCode::MWAIT => simple(vcpu, ExitReason::MWAIT),
        ExitCode::XSETBV => simple(vcpu, ExitReason::XSETBV),
        ExitCode::RDPMC => vcpu.exit_to_l1(Exit::new(ExitReason::RDPMC), 2),
        ExitCode::RDTSC | ExitCode::RDTSCP => match instruction_at_rip(vcpu) {
            found if found.opcode == Opcode::Rdtscp => {
                vcpu.exit_to_l1(Exit::new(ExitReason::RDTSCP), found.length)
            }
            _ => vcpu.exit_to_l1(Exit::new(ExitReason::RDTSC), 2),
        },
        ExitCode::MSR => model_specific(vcpu),
        ExitCode::IOIO => port(vcpu),
        ExitCode::INTR => vcpu.interrupt_for_l1(),
        // The way is free: the next entry delivers what waits.
        ExitCode::VINTR => Flow::Resume,
        ExitCode::IRET => {
            vcpu.unblock_nmi();
            Flow::Resume
        }
        ExitCode::NMI => {
            svm::take_nmi();
            if smp::was_kicked(vcpu.id) {
                return Flow::Resume;
            }
            vcpu.nmi_for_l1();
            vcpu.interrupt_for_l1()
        }
        ExitCode::SHUTDOWN => {
            vcpu.tell_shutdown();
            if super::fetch_fault_is_unfounded(vcpu) {
                return Flow::End(End::EmulatorFault(vcpu.id.0));
            }
            vcpu.exit_to_l1(Exit::new(ExitReason::TRIPLE_FAULT), 0)
        }
        // Reads of all control registers, writes of CR0, CR4 and CR8.
        ExitCode(0x00 | 0x10 | 0x14 | 0x18) => control_register(vcpu),
        ExitCode(0x20..=0x3F) => debug_register(vcpu),
        ExitCode(number) if EXCEPTIONS.contains(&number) => exception(vcpu, number - 0x40),
        // There is no SVM in this processor.
        ExitCode(0x7A | 0x80 | 0x82..=0x86) => undefined_opcode(vcpu),
        other => Flow::End(End::Refused(format!("{} exited with {other:?}", vcpu.vmpl))),
    }
}

/// A state that VMRUN refuses, or a MOV to CR3 with reserved bits (see `super::invalid`).
fn invalid(vcpu: &mut Vcpu) -> Flow {
    if loads_paging_register(vcpu) {
        return vcpu.general_protection();
    }
    vcpu.exit_to_l1(Exit::new(ExitReason::ENTRY_FAILED_STATE), 0)
}

/// #UD: L1's if it wants it.
pub fn undefined_opcode(vcpu: &mut Vcpu) -> Flow {
    const UD: u64 = 6;
    if vcpu.l2.controls.exceptions & 1 << UD != 0 {
        return exception_to_l1(vcpu, UD, None, 0);
    }
    vcpu.undefined_opcode()
}

fn undefined(vcpu: &mut Vcpu) -> Flow {
    let found = instruction_at_rip(vcpu);
    match found.opcode {
        Opcode::Tdcall if vcpu.cpl() != 0 || !vcpu.is_64_bit() => vcpu.general_protection(),
        Opcode::Tdcall => tdcall(vcpu, found.length),
        Opcode::Vmcall => vcpu.exit_to_l1(Exit::new(ExitReason::VMCALL), found.length),
        _ => undefined_opcode(vcpu),
    }
}

/// TDCALL: L1's, unless L1 has let the VM speak with the host.
fn tdcall(vcpu: &mut Vcpu, length: u64) -> Flow {
    let mut gprs = vcpu.general_registers();
    let id = vcpu.id;
    let served = vmgexit::serve(vcpu, |platform, host| {
        platform.l2_vmcall(id, &mut gprs, host)
    });
    vcpu.trace(format_args!("TDCALL of L2 {gprs:x?}: {:?}", served.result));
    match served.result {
        None => vcpu.exit_to_l1(Exit::new(ExitReason::TDCALL), length),
        Some(Outcome::Complete) => {
            vcpu.set_general_registers(&gprs);
            let flow = vcpu.skip(length);
            served.after.carry_out(id).unwrap_or(flow)
        }
        // The host lets L1 decide how to wait.
        Some(Outcome::Halt { .. }) => {
            vcpu.set_general_registers(&gprs);
            vcpu.skip(length);
            let exit = Exit {
                status: Status::L2_EXIT_HOST_ROUTED_TDVMCALL,
                ..Exit::new(ExitReason::TDCALL)
            };
            vcpu.exit_to_l1(exit, 0)
        }
        Some(Outcome::End(end)) => Flow::End(end),
        Some(Outcome::Refused(why)) => Flow::End(End::Refused(why)),
        Some(other) => Flow::End(End::Refused(format!("{} TDCALL: {other:?}", vcpu.vmpl))),
    }
}

fn violation(vcpu: &Vcpu, gpa: Gpa, alias: Alias, kind: Kind) -> Exit {
    let gla = vcpu.faulting_address(gpa, kind);
    let info = ve::ept_violation(gpa, alias, kind, Some(gla));
    let rights = match alias {
        Alias::Private => vcpu.lock().platform.ept_rights(vcpu.vmpl, gpa),
        Alias::Shared => 0,
    };
    Exit {
        qualification: info.qualification | rights,
        gla: info.gla,
        gpa: info.gpa,
        ..Exit::new(ExitReason::EPT_VIOLATION)
    }
}

/// The page is L1's, and L1 has not given it.
pub fn not_given(vcpu: &mut Vcpu, gpa: Gpa, kind: Kind) -> Flow {
    let exit = violation(vcpu, gpa, Alias::Private, kind);
    vcpu.exit_to_l1(exit, 0)
}

/// The page is not accepted.
pub fn pending(vcpu: &mut Vcpu, gpa: Gpa, kind: Kind) -> Flow {
    let exit = Exit {
        extended: ExtendedType::PENDING_EPT_VIOLATION.0,
        ..violation(vcpu, gpa, Alias::Private, kind)
    };
    vcpu.exit_to_l1(exit, 0)
}

/// A device: the exit is the host's, who passes it on, because only L1 can let the VM know.
pub fn device(vcpu: &mut Vcpu, gpa: Gpa, kind: Kind) -> Flow {
    let exit = Exit {
        status: Status::L2_EXIT_HOST_ROUTED_ASYNC,
        ..violation(vcpu, gpa, Alias::Shared, kind)
    };
    vcpu.exit_to_l1(exit, 0)
}

/// Shared memory, which L1 has not switched on: the host can do nothing.
pub fn no_shared_memory(vcpu: &Vcpu, gpa: Gpa, kind: Kind) -> Flow {
    Flow::End(End::Refused(format!(
        "the trust domain exits: {} at RIP {:#x}: {kind:?} of {gpa} in shared memory, which it has not",
        vcpu.vmpl,
        vcpu.rip()
    )))
}

fn model_specific(vcpu: &mut Vcpu) -> Flow {
    let number = vcpu.registers.rcx as u32;
    let is_write = vcpu.vmcb().control.exit_info1 & 1 != 0;
    let length = instruction_at_rip(vcpu).length;
    // The check of privilege comes before the exit.
    if vcpu.cpl() != 0 {
        return vcpu.general_protection();
    }
    let value = vcpu.registers.rdx << 32 | vcpu.save().rax & 0xFFFF_FFFF;
    let write = is_write.then_some(value);
    let access = vcpu.lock().platform.l2_msr(vcpu.id, number, write);
    vcpu.trace(format_args!("MSR {number:#x} {write:x?}: {access:?}"));
    match access {
        MsrAccess::Exit => {
            let reason = if is_write {
                ExitReason::WRMSR
            } else {
                ExitReason::RDMSR
            };
            return vcpu.exit_to_l1(Exit::new(reason), length);
        }
        MsrAccess::GeneralProtection => return vcpu.general_protection(),
        MsrAccess::Done(value) if !is_write => super::msr::set_result(vcpu, value),
        MsrAccess::Done(_) => {}
        // The instruction is complete before the exit.
        MsrAccess::EndOfInterrupt(vector) => {
            vcpu.skip(length);
            let exit = Exit {
                qualification: vector.into(),
                ..Exit::new(ExitReason::VIRTUALIZED_EOI)
            };
            return vcpu.exit_to_l1(exit, 0);
        }
        MsrAccess::BelowThreshold => {
            vcpu.skip(length);
            return vcpu.exit_to_l1(Exit::new(ExitReason::TPR_BELOW_THRESHOLD), 0);
        }
        MsrAccess::Native if number == msr::EFER => {
            if !is_write {
                let value = vcpu.save().efer & !Efer::SVME.0;
                super::msr::set_result(vcpu, value);
            } else if value & Efer::SVME.0 != 0 || !super::msr::write_efer(vcpu, value) {
                return vcpu.general_protection();
            }
        }
        MsrAccess::Native if is_write => {
            if !super::msr::write_for_guest(vcpu, number, value) {
                return vcpu.general_protection();
            }
        }
        MsrAccess::Native => match super::msr::read_for_guest(vcpu, number) {
            Some(value) => super::msr::set_result(vcpu, value),
            None => return vcpu.general_protection(),
        },
    }
    vcpu.skip(length)
}

fn port(vcpu: &mut Vcpu) -> Flow {
    let (access, length) = td::port_access(vcpu);
    let gla = match (access.string, access.input) {
        (false, _) => 0,
        (true, true) => vcpu.registers.rdi,
        (true, false) => vcpu.registers.rsi,
    };
    let exit = Exit {
        qualification: access.encode(),
        gla,
        ..Exit::new(ExitReason::IO)
    };
    vcpu.exit_to_l1(exit, length)
}

fn exception(vcpu: &mut Vcpu, vector: u64) -> Flow {
    let control = &vcpu.vmcb().control;
    let (error, address) = (control.exit_info1 as u32, control.exit_info2);
    if vector == PAGE_FAULT {
        let [mask, matched] = vcpu.l2.controls.page_fault;
        let wanted = vcpu.l2.controls.exceptions & 1 << PAGE_FAULT != 0;
        if (error & mask == matched) != wanted {
            return vcpu.page_fault(address, error);
        }
        return exception_to_l1(vcpu, vector, Some(error), address);
    }
    let has_error = matches!(vector, 8 | 10..=14 | 17);
    exception_to_l1(vcpu, vector, has_error.then_some(error), 0)
}

fn exception_to_l1(vcpu: &mut Vcpu, vector: u64, error: Option<u32>, qualification: u64) -> Flow {
    let event = interruption::Event {
        kind: interruption::Kind::EXCEPTION,
        vector: vector as u8,
        has_error: error.is_some(),
    };
    let exit = Exit {
        qualification,
        interruption: u64::from(event.encode()) | u64::from(error.unwrap_or(0)) << 32,
        ..Exit::new(ExitReason::EXCEPTION_OR_NMI)
    };
    vcpu.exit_to_l1(exit, 0)
}
