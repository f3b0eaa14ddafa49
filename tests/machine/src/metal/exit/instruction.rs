//! Instructions that TCG does not know: the #UD exit for PVALIDATE, RMPADJUST and RMPQUERY, and
//! the VMMCALL exit, which is VMGEXIT when there is a repeat prefix.

use machine::guest::decode::{self, MAX_LENGTH, Opcode};
use machine::guest::walk::Access;
use machine::isa::{self, Completion, Instruction, Operands, Operation, Request};
use protocols::exit_code::ExitCode;
use protocols::snp::ReturnCode;

use crate::metal::guest_memory::{View, fetch};
use crate::metal::vcpu::{Flow, Vcpu};
use crate::metal::{shared, smp, world};

use super::{instruction_at_rip, vmgexit};

/// A #UD exit: one of the new instructions, or a real #UD to inject again.
pub fn undefined(vcpu: &mut Vcpu) -> Flow {
    let found = instruction_at_rip(vcpu);
    let opcode = match found.opcode {
        Opcode::Pvalidate => isa::Opcode::Pvalidate,
        Opcode::Rmpadjust => isa::Opcode::Rmpadjust,
        Opcode::Rmpquery => isa::Opcode::Rmpquery,
        _ => {
            vcpu.trace(format_args!("#UD"));
            return vcpu.undefined_opcode();
        }
    };
    let operands = Operands {
        rax: vcpu.save().rax,
        rcx: vcpu.registers.rcx,
        rdx: vcpu.registers.rdx,
        cpl: vcpu.cpl(),
        long_mode: vcpu.is_64_bit(),
    };
    let outcome = execute(vcpu, opcode, &operands);
    vcpu.trace(format_args!("{opcode:?} {operands:x?}: {outcome:?}"));
    match outcome {
        Outcome::Platform(Instruction::Complete(done)) => complete(vcpu, &done, found),
        Outcome::Platform(Instruction::UndefinedOpcode) => vcpu.undefined_opcode(),
        Outcome::Platform(Instruction::GeneralProtection) => vcpu.general_protection(),
        Outcome::Platform(Instruction::NotValidated) => {
            vcpu.save_mut().cr2 = operands.rax & !0xFFF;
            vcpu.vc(ExitCode::PAGE_NOT_VALIDATED)
        }
        Outcome::Platform(Instruction::Refused(denial)) => super::refused(
            vcpu,
            format_args!("{opcode:?} of {:#x}", operands.rax),
            denial,
        ),
        Outcome::PageFault(code) => vcpu.page_fault(operands.rax & !0xFFF, code),
    }
}

#[derive(Debug)]
enum Outcome {
    Platform(Instruction),
    PageFault(u32),
}

fn execute(vcpu: &Vcpu, opcode: isa::Opcode, operands: &Operands) -> Outcome {
    let mut machine = vcpu.lock();
    let request = match Request::decode(opcode, vcpu.vmpl, operands) {
        Ok(request) => request,
        Err(early) => {
            if let Instruction::Complete(done) = &early {
                machine
                    .platform
                    .count_early(opcode, vcpu.vmpl, operands, done.eax);
            }
            return Outcome::Platform(early);
        }
    };
    let view = View::new(&machine.platform, vcpu.vmpl);
    let to = match vcpu
        .paging()
        .translate(&view, request.gva, Access::default())
    {
        Ok(to) => to,
        Err(fault) => return Outcome::PageFault(fault.code),
    };
    machine.update_stale();
    let result = machine
        .platform
        .execute(vcpu.vmpl, &request, to.alias, to.gpa);
    if matches!(result, Instruction::Complete(done) if done.eax == ReturnCode::FAIL_IN_USE.0) {
        // On hardware the host's timer interrupts every processor now and then, so a VMSA that
        // is in use is free, or runs with fresh translations, a moment later. Here interrupts
        // go straight to the guest and an idle one would never leave.
        // Once it is out (and it stays out while the lock is held) its translations are gone,
        // which is what PCPU_ID would tell when it runs again.
        smp::shoot_down(vcpu.id, |_, _| true);
        if let Some(vmsa) = machine.platform.spa_of(to.gpa) {
            world::mark_running(vmsa, vcpu.id);
        }
    }
    if matches!(result, Instruction::Complete(done) if done.eax == 0) {
        // What follows is nearly always a scrub of the page, or its use by the level that was
        // given it. (Withdrawn rights are the business of `settle`.)
        match request.operation {
            Operation::Pvalidate { validate: true, .. } => machine.show(vcpu.vmpl, to.gpa),
            Operation::Rmpadjust(adjustment) => machine.show(adjustment.target, to.gpa),
            _ => {}
        }
    }
    Outcome::Platform(result)
}

fn complete(vcpu: &mut Vcpu, done: &Completion, found: decode::Instruction) -> Flow {
    let save = vcpu.save_mut();
    save.rax = u64::from(done.eax);
    save.rflags = done.flags(save.rflags);
    if let Some(rcx) = done.rcx {
        vcpu.registers.rcx = rcx;
    }
    if let Some(rdx) = done.rdx {
        vcpu.registers.rdx = rdx;
    }
    vcpu.skip(found.length)
}

/// A VMMCALL exit.
pub fn vmmcall(vcpu: &mut Vcpu) -> Flow {
    let (bytes, len) = fetch::<MAX_LENGTH>(&shared::lock(vcpu.rip()), vcpu);
    let found = decode::decode(&bytes[..len], vcpu.is_64_bit());
    if found.opcode == Opcode::Vmgexit {
        // Hardware has no privilege check either; the guest's kernel keeps its users off the
        // GHCB by paging.
        return vmgexit::exit(vcpu, found.length);
    }
    match ask_oracle(vcpu, found.length) {
        Some(flow) => flow,
        None if vcpu.strict => vcpu.vc(ExitCode::VMMCALL),
        None => vcpu.undefined_opcode(),
    }
}

/// A question of a test guest, by plain VMMCALL of `length` bytes; `None` if it is none.
pub fn ask_oracle(vcpu: &mut Vcpu, length: u64) -> Option<Flow> {
    let (rax, rcx, rdx) = (vcpu.save().rax, vcpu.registers.rcx, vcpu.registers.rdx);
    let answer = shared::lock(vcpu.rip()).platform.ask_oracle(rax, rcx, rdx);
    answer.map(|answer| {
        vcpu.save_mut().rax = answer.rax;
        if let Some(rdx) = answer.rdx {
            vcpu.registers.rdx = rdx;
        }
        vcpu.skip(length)
    })
}
