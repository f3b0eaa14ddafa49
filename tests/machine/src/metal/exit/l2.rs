//! Exits of an L2 VM: nearly all are L1's (`tdx.md` §7, exit routing), in the form Intel's
//! processors give them.

use alloc::format;

use machine::guest::decode::{MAX_LENGTH, Opcode};
use machine::platform::End;
use machine::tdx::l2::msr::MsrAccess;
use machine::tdx::tdcall::Outcome;
use machine::tdx::ve;
use machine::types::{Alias, Gpa, Kind};
use protocols::exit_code::ExitCode;
use protocols::tdx::Status;
use protocols::tdx::l2::{Exit, ExtendedType};
use protocols::tdx::ve::ExitReason;
use protocols::tdx::vmcall::register::RSP;
use protocols::tdx::vmcs::interruption;
use protocols::vmsa::Efer;

use crate::metal::cpu::{self, msr};
use crate::metal::guest_memory::fetch;
use crate::metal::svm::{self, EXIT_INVALID_LOW};
use crate::metal::vcpu::{Flow, Vcpu};
use crate::metal::{shared, smp};

use super::{instruction, instruction_at_rip, nested, td, vmgexit};

const CR0_PE: u64 = 1 << 0;
const CR0_TS: u64 = 1 << 3;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_VMXE: u64 = 1 << 13;
/// Process-context identifiers, which this processor has not and CPUID does not show. Setting the bit is
/// not refused in a trust domain: all processors with TDX have them, so OVMF 2026.08 turns the bit over
/// where it means to clear it (`ApRunLoop.nasm`).
const CR4_PCIDE: u64 = 1 << 17;
/// What this processor has of CR4: up to OSXMMEXCPT, UMIP, FSGSBASE, SMEP, SMAP.
const CR4_KNOWN: u64 = 0x7FF | 1 << 11 | 1 << 16 | 1 << 20 | 1 << 21;

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
    let (bytes, len) = fetch::<MAX_LENGTH>(&shared::lock(vcpu.rip()), vcpu);
    if let Some(moved) = ControlMove::decode(&bytes[..len], vcpu.is_64_bit())
        && matches!(moved.what, ControlOp::To(3 | 4, _))
    {
        return vcpu.general_protection();
    }
    vcpu.exit_to_l1(Exit::new(ExitReason::ENTRY_FAILED_STATE), 0)
}

/// #UD: L1's if it wants it.
fn undefined_opcode(vcpu: &mut Vcpu) -> Flow {
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

/// What an instruction does with a control or debug register.
#[derive(Clone, Copy)]
enum ControlOp {
    /// MOV to register, from general register.
    To(u8, usize),
    /// MOV from register, to general register.
    From(u8, usize),
    /// CLTS.
    Clts,
}

struct ControlMove {
    what: ControlOp,
    length: u64,
}

impl ControlMove {
    /// MOV to and from control registers, CLTS. LMSW and SMSW are of no use to a guest that can have
    /// these, and are not known here.
    fn decode(bytes: &[u8], long: bool) -> Option<Self> {
        Self::decode_moves(bytes, long, [0x22, 0x20])
    }

    /// MOV to and from debug registers.
    fn decode_debug(bytes: &[u8], long: bool) -> Option<Self> {
        Self::decode_moves(bytes, long, [0x23, 0x21])
    }

    fn decode_moves(bytes: &[u8], long: bool, [to, from]: [u8; 2]) -> Option<Self> {
        let mut rex = 0;
        let mut at = 0;
        loop {
            match *bytes.get(at)? {
                byte @ 0x40..=0x4F if long => rex = byte,
                0x26 | 0x2E | 0x36 | 0x3E | 0x64..=0x67 | 0xF0 | 0xF2 | 0xF3 => {}
                _ => break,
            }
            at += 1;
        }
        match *bytes.get(at..)? {
            [0x0F, 0x06, ..] => Some(Self {
                what: ControlOp::Clts,
                length: at as u64 + 2,
            }),
            [0x0F, opcode, modrm, ..] if opcode == to || opcode == from => {
                let register = modrm >> 3 & 7 | (rex & 4) << 1;
                let general = usize::from(modrm & 7 | (rex & 1) << 3);
                let what = if opcode == to {
                    ControlOp::To(register, general)
                } else {
                    ControlOp::From(register, general)
                };
                Some(Self {
                    what,
                    length: at as u64 + 3,
                })
            }
            _ => None,
        }
    }
}

/// Bits 3:0 register, 5:4 kind of access, 11:8 general register.
const fn control_qualification(register: u8, from: bool, general: usize) -> u64 {
    register as u64 | (from as u64) << 4 | (general as u64) << 8
}

/// An access to CR0 or CR4, or a read of any (SDM volume 3, 27.3): L1's if it changes a bit that is
/// L1's.
fn control_register(vcpu: &mut Vcpu) -> Flow {
    let (bytes, len) = fetch::<MAX_LENGTH>(&shared::lock(vcpu.rip()), vcpu);
    let found = ControlMove::decode(&bytes[..len], vcpu.is_64_bit());
    let Some(ControlMove { what, length }) = found else {
        return Flow::End(End::Refused(format!(
            "{} at RIP {:#x}: LMSW or SMSW",
            vcpu.vmpl,
            vcpu.rip()
        )));
    };
    if vcpu.cpl() != 0 {
        return vcpu.general_protection();
    }
    let ([mask0, mask4], [shadow0, shadow4]) = (vcpu.l2.controls.masks, vcpu.l2.controls.shadows);
    let (cr0, cr4) = (vcpu.save().cr0, vcpu.save().cr4);
    let mut gprs = vcpu.general_registers();
    let is_64_bit = vcpu.is_64_bit();
    let width = if is_64_bit { u64::MAX } else { 0xFFFF_FFFF };
    let fine = match what {
        ControlOp::From(register, general) => {
            let value = match register {
                0 => cr0 & !mask0 | shadow0 & mask0,
                2 => vcpu.save().cr2,
                3 => vcpu.save().cr3,
                4 => cr4 & !mask4 | shadow4 & mask4,
                8 => vcpu.vmcb().control.int_ctl & svm::virq::TPR,
                _ => return undefined_opcode(vcpu),
            };
            gprs[general] = value & width;
            vcpu.set_general_registers(&gprs);
            vcpu.save_mut().rsp = gprs[RSP];
            true
        }
        ControlOp::To(0, general) => {
            let value = gprs[general] & width;
            if (value ^ shadow0) & mask0 != 0 {
                let exit = Exit {
                    qualification: control_qualification(0, false, general),
                    ..Exit::new(ExitReason::CR_ACCESS)
                };
                return vcpu.exit_to_l1(exit, length);
            }
            set_cr0(vcpu, cr0 & mask0 | value & !mask0)
        }
        ControlOp::To(4, general) => {
            let value = gprs[general] & width;
            if (value ^ shadow4) & mask4 != 0 {
                let exit = Exit {
                    qualification: control_qualification(4, false, general),
                    ..Exit::new(ExitReason::CR_ACCESS)
                };
                return vcpu.exit_to_l1(exit, length);
            }
            set_cr4(vcpu, cr4 & mask4 | value & !mask4 & !CR4_VMXE)
        }
        ControlOp::To(8, general) => {
            let Ok(class @ 0..=0xF) = u8::try_from(gprs[general] & width) else {
                return vcpu.general_protection();
            };
            let below = vcpu.set_virtual_cr8(class);
            let flow = vcpu.skip(length);
            if below {
                // The instruction is complete.
                return vcpu.exit_to_l1(Exit::new(ExitReason::TPR_BELOW_THRESHOLD), 0);
            }
            return flow;
        }
        ControlOp::Clts => {
            if mask0 & CR0_TS != 0 && shadow0 & CR0_TS != 0 {
                let exit = Exit {
                    qualification: 2 << 4,
                    ..Exit::new(ExitReason::CR_ACCESS)
                };
                return vcpu.exit_to_l1(exit, length);
            }
            set_cr0(
                vcpu,
                if mask0 & CR0_TS == 0 {
                    cr0 & !CR0_TS
                } else {
                    cr0
                },
            )
        }
        ControlOp::To(..) => return undefined_opcode(vcpu),
    };
    if !fine {
        return vcpu.general_protection();
    }
    vcpu.show_control_registers();
    vcpu.skip(length)
}

/// A MOV to CR8 of a guest whose task priority is the processor's, while an interrupt waits.
pub fn write_cr8(vcpu: &mut Vcpu) -> Flow {
    let (bytes, len) = fetch::<MAX_LENGTH>(&shared::lock(vcpu.rip()), vcpu);
    match ControlMove::decode(&bytes[..len], vcpu.is_64_bit()) {
        Some(ControlMove {
            what: ControlOp::To(8, general),
            length,
        }) => match vcpu.general_registers()[general] {
            class @ 0..=0xF => {
                cpu::set_task_priority(class);
                vcpu.skip(length)
            }
            _ => vcpu.general_protection(),
        },
        _ => vcpu.undefined_opcode(),
    }
}

/// A MOV to CR4 by L1 with bits that the processor refuses.
pub fn write_refused_cr4(vcpu: &mut Vcpu) -> Flow {
    let (bytes, len) = fetch::<MAX_LENGTH>(&shared::lock(vcpu.rip()), vcpu);
    match ControlMove::decode(&bytes[..len], vcpu.is_64_bit()) {
        Some(ControlMove {
            what: ControlOp::To(4, general),
            length,
        }) => {
            let width = if vcpu.is_64_bit() {
                u64::MAX
            } else {
                0xFFFF_FFFF
            };
            let value = vcpu.general_registers()[general] & width;
            // Without the bit that is tolerated there is nothing to refuse, or it is refused still.
            if value & CR4_PCIDE != 0 && set_cr4(vcpu, value) {
                vcpu.skip(length)
            } else {
                vcpu.general_protection()
            }
        }
        _ => vcpu.general_protection(),
    }
}

/// False is #GP(0).
fn set_cr0(vcpu: &mut Vcpu, value: u64) -> bool {
    let lacks = |bits: u64| value & bits == 0;
    let save = vcpu.save();
    let paging = !lacks(CR0_PG);
    let long = save.efer & Efer::LME.0 != 0;
    let impossible = value >> 32 != 0
        || paging && lacks(CR0_PE)
        || !lacks(CR0_NW) && lacks(CR0_CD)
        || paging && long && save.cr4 & CR4_PAE == 0
        || !paging && vcpu.is_64_bit();
    if impossible {
        return false;
    }
    let save = vcpu.save_mut();
    save.cr0 = value;
    save.efer &= !Efer::LMA.0;
    if paging && long {
        save.efer |= Efer::LMA.0;
    }
    true
}

/// False is #GP(0).
fn set_cr4(vcpu: &mut Vcpu, value: u64) -> bool {
    let value = value & !CR4_PCIDE;
    let long_paging = vcpu.save().efer & Efer::LMA.0 != 0;
    if value & !CR4_KNOWN != 0 || long_paging && value & CR4_PAE == 0 {
        return false;
    }
    vcpu.save_mut().cr4 = value;
    true
}

fn debug_register(vcpu: &mut Vcpu) -> Flow {
    let (bytes, len) = fetch::<MAX_LENGTH>(&shared::lock(vcpu.rip()), vcpu);
    let found = ControlMove::decode_debug(&bytes[..len], vcpu.is_64_bit());
    let Some(ControlMove { what, length }) = found else {
        return undefined_opcode(vcpu);
    };
    let qualification = match what {
        ControlOp::To(register, general) => control_qualification(register, false, general),
        ControlOp::From(register, general) => control_qualification(register, true, general),
        ControlOp::Clts => return undefined_opcode(vcpu),
    };
    let exit = Exit {
        qualification,
        ..Exit::new(ExitReason::DR_ACCESS)
    };
    vcpu.exit_to_l1(exit, length)
}
