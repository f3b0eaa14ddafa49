//! Exits of a trust domain: what its module answers itself, what becomes #VE, and TDCALL.
//!
//! L1 is always treated strictly: there is no `vc=direct` for it, because a trust domain without #VE
//! is none that its software could be tested on.

use machine::guest::decode::{MAX_LENGTH, Opcode};
use machine::platform::End;
use machine::tdx::tdcall::{Caller, Gprs, Outcome};
use machine::tdx::ve::{self, Delivery, MsrClass};
use machine::types::{Alias, Gpa, Kind};
use protocols::exit_code::ExitCode;
use protocols::tdx::ve::{ExitReason, PortAccess, VeInfo};
use protocols::tdx::vmcall::register;
use protocols::tdx::{Leaf, Status};
use protocols::vmsa::Efer;

use crate::metal::cpu::msr;
use crate::metal::guest_memory::fetch;
use crate::metal::shared;
use crate::metal::vcpu::{Flow, Vcpu};
use crate::metal::world::Reason;

use super::{instruction, instruction_at_rip, io, vmgexit};

/// Handles an exit that means something else in a trust domain than in an SNP guest.
pub fn exit(vcpu: &mut Vcpu, code: ExitCode) -> Option<Flow> {
    Some(match code {
        ExitCode::EXCEPTION_UD => undefined(vcpu),
        ExitCode::VMMCALL => {
            let found = instruction_at_rip(vcpu);
            match found.opcode {
                Opcode::Vmmcall => instruction::ask_oracle(vcpu, found.length)
                    .unwrap_or_else(|| vcpu.undefined_opcode()),
                _ => vcpu.undefined_opcode(),
            }
        }
        ExitCode::CPUID => cpuid(vcpu),
        ExitCode::MSR => model_specific(vcpu),
        ExitCode::IOIO => port(vcpu),
        ExitCode::HLT => instruction_ve(vcpu, ExitReason::HLT),
        ExitCode::INVD => instruction_ve(vcpu, ExitReason::INVD),
        ExitCode::WBINVD => instruction_ve(vcpu, ExitReason::WBINVD),
        ExitCode::MONITOR => instruction_ve(vcpu, ExitReason::MONITOR),
        ExitCode::MWAIT => instruction_ve(vcpu, ExitReason::MWAIT),
        _ => return None,
    })
}

/// L1 used a page that it has not accepted.
pub fn pending(vcpu: &mut Vcpu, gpa: Gpa, kind: Kind) -> Flow {
    let gla = vcpu.faulting_address(gpa, kind);
    let info = ve::ept_violation(gpa, Alias::Private, kind, Some(gla));
    let delivery = vcpu.lock().platform.pending_access(vcpu.id, info);
    deliver(vcpu, info, delivery)
}

/// L1 used a device: the host leaves such entries of the shared tables to #VE.
pub fn device(vcpu: &mut Vcpu, gpa: Gpa, kind: Kind) -> Flow {
    let gla = vcpu.faulting_address(gpa, kind);
    raise(vcpu, ve::ept_violation(gpa, Alias::Shared, kind, Some(gla)))
}

fn raise(vcpu: &mut Vcpu, info: VeInfo) -> Flow {
    let delivery = vcpu.lock().platform.raise_ve(vcpu.id, info);
    deliver(vcpu, info, delivery)
}

fn deliver(vcpu: &mut Vcpu, info: VeInfo, delivery: Delivery) -> Flow {
    vcpu.trace(format_args!("#VE {info:x?}: {delivery:?}"));
    match delivery {
        Delivery::Ve => vcpu.ve(),
        Delivery::DoubleFault => vcpu.double_fault(),
        Delivery::Host(why) => Flow::End(End::Refused(why)),
    }
}

/// #VE for the instruction at RIP.
fn instruction_ve(vcpu: &mut Vcpu, reason: ExitReason) -> Flow {
    let length = instruction_at_rip(vcpu).length as u32;
    raise(vcpu, ve::instruction(reason, 0, length))
}

/// A #UD exit: TDCALL, or a real #UD. VMCALL does not exist on this processor, and raises #VE.
fn undefined(vcpu: &mut Vcpu) -> Flow {
    let found = instruction_at_rip(vcpu);
    match found.opcode {
        Opcode::Tdcall => tdcall(vcpu, found.length),
        Opcode::Vmcall => raise(
            vcpu,
            ve::instruction(ExitReason::VMCALL, 0, found.length as u32),
        ),
        _ => {
            vcpu.trace(format_args!("#UD"));
            vcpu.undefined_opcode()
        }
    }
}

fn tdcall(vcpu: &mut Vcpu, length: u64) -> Flow {
    let mut gprs = vcpu.general_registers();
    let asked = gprs;
    let caller = Caller {
        cpl: vcpu.cpl(),
        long_mode: vcpu.is_64_bit(),
    };
    let id = vcpu.id;
    let served = vmgexit::serve(vcpu, |platform, host| {
        platform.tdcall(id, caller, &mut gprs, host)
    });
    let outcome = served.result;
    vcpu.trace(format_args!("TDCALL {asked:x?}: {outcome:?} {gprs:x?}"));
    match outcome {
        Outcome::Complete => {
            vcpu.set_general_registers(&gprs);
            show_accepted(vcpu, &asked, gprs[register::RAX]);
            let flow = vcpu.skip(length);
            vcpu.release_held_nmi();
            let command = served.after.interrupt_command();
            let flow = served.after.carry_out(id).unwrap_or(flow);
            // Now that it is sent: what its processor does from here on is done while it waits.
            if let Some(command) = command {
                vcpu.lock().platform.count_interrupt(command);
            }
            flow
        }
        Outcome::Halt { blocked } => {
            vcpu.set_general_registers(&gprs);
            vcpu.skip(length);
            if blocked {
                super::halt_for_good(vcpu)
            } else {
                Flow::Idle(halted())
            }
        }
        Outcome::Enter(vmpl) => {
            vcpu.skip(length);
            Flow::Run(vmpl, entered())
        }
        Outcome::UndefinedOpcode => vcpu.undefined_opcode(),
        Outcome::GeneralProtection => vcpu.general_protection(),
        Outcome::Pending(gpa) => {
            let info = ve::ept_violation(gpa, Alias::Private, Kind::Read, None);
            let delivery = vcpu.lock().platform.pending_access(id, info);
            deliver(vcpu, info, delivery)
        }
        Outcome::End(end) => Flow::End(end),
        Outcome::Refused(why) => Flow::End(End::Refused(why)),
    }
}

/// L1 is left by its own wish: nothing of this is anybody's to read.
const fn entered() -> Reason {
    Reason {
        code: ExitCode::EXCEPTION_UD.0,
        info_1: 0,
        info_2: 0,
    }
}

const fn halted() -> Reason {
    Reason {
        code: ExitCode::HLT.0,
        info_1: 0,
        info_2: 0,
    }
}

/// What follows an accept is nearly always the page's use.
fn show_accepted(vcpu: &Vcpu, asked: &Gprs, rax: u64) {
    let leaf = Leaf(asked[register::RAX] as u16);
    if leaf == Leaf::MEM_PAGE_ACCEPT && Status::of(rax) == Status::SUCCESS {
        let gpa = Gpa::new(asked[register::RCX] & !0xFFF);
        vcpu.lock().show(vcpu.vmpl, gpa);
    }
}

fn cpuid(vcpu: &mut Vcpu) -> Flow {
    let length = instruction_at_rip(vcpu).length;
    let question = (vcpu.save().rax as u32, vcpu.registers.rcx as u32);
    let context = super::cpuid_context(vcpu);
    let cpl = vcpu.cpl();
    let answer = {
        let machine = vcpu.lock();
        machine
            .platform
            .td_cpuid(vcpu.id, cpl, &machine.cpuid, question, &context)
    };
    match answer {
        Some(result) => super::set_cpuid(vcpu, result, length),
        None => raise(vcpu, ve::instruction(ExitReason::CPUID, 0, length as u32)),
    }
}

fn model_specific(vcpu: &mut Vcpu) -> Flow {
    let number = vcpu.registers.rcx as u32;
    let write = vcpu.vmcb().control.exit_info1 & 1 != 0;
    let length = instruction_at_rip(vcpu).length;
    let reason = if write {
        ExitReason::WRMSR
    } else {
        ExitReason::RDMSR
    };
    let value = vcpu.registers.rdx << 32 | vcpu.save().rax & 0xFFFF_FFFF;
    vcpu.trace(format_args!("{reason:?} {number:#x}"));
    match (ve::msr_class(number, write), number) {
        (MsrClass::None, _) => return vcpu.general_protection(),
        (MsrClass::Host, _) => return raise(vcpu, ve::instruction(reason, 0, length as u32)),
        (MsrClass::Fixed(_), _) if write => {}
        (MsrClass::Fixed(value), _) => super::msr::set_result(vcpu, value),
        // There is no SVM in this processor.
        (MsrClass::Native, msr::EFER) if write => {
            if value & Efer::SVME.0 != 0 || !super::msr::write_efer(vcpu, value) {
                return vcpu.general_protection();
            }
        }
        (MsrClass::Native, msr::EFER) => {
            let value = vcpu.save().efer & !Efer::SVME.0;
            super::msr::set_result(vcpu, value);
        }
        // A register that the permission map cannot name.
        (MsrClass::Native, _) if write => {
            if !super::msr::write_for_guest(vcpu, number, value) {
                return vcpu.general_protection();
            }
        }
        (MsrClass::Native, _) => match super::msr::read_for_guest(vcpu, number) {
            Some(value) => super::msr::set_result(vcpu, value),
            None => return vcpu.general_protection(),
        },
    }
    vcpu.skip(length)
}

fn port(vcpu: &mut Vcpu) -> Flow {
    let (access, length) = port_access(vcpu);
    raise(
        vcpu,
        ve::instruction(ExitReason::IO, access.encode(), length as u32),
    )
}

/// What stands at RIP: IN, OUT or a string form, and its length.
pub fn port_access(vcpu: &Vcpu) -> (PortAccess, u64) {
    let control = &vcpu.vmcb().control;
    let info = io::Info(control.exit_info1);
    let length = control.exit_info2.wrapping_sub(vcpu.rip());
    let (bytes, len) = fetch::<MAX_LENGTH>(&shared::lock(vcpu.rip()), vcpu);
    // IN and OUT with the port in the instruction: E4 to E7, behind prefixes.
    let opcode = bytes[..len]
        .iter()
        .find(|byte| !matches!(byte, 0x26 | 0x2E | 0x36 | 0x3E | 0x40..=0x4F | 0x64..=0x67 | 0xF0 | 0xF2 | 0xF3));
    let access = PortAccess {
        bytes: info.bytes(),
        input: info.is_input(),
        string: info.is_string(),
        repeated: info.is_repeated(),
        immediate: matches!(opcode, Some(0xE4..=0xE7)),
        port: info.port(),
    };
    (access, length)
}
