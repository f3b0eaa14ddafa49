//! What the machine does about each kind of exit.
//!
//! Two rules run through all of them. What hardware reflects to an SNP guest becomes #VC at a
//! strict level and is done at once for a direct one (facts: guests.md §5.5). What the platform
//! means is asked of the library; nothing here decides it.

mod control;
mod instruction;
mod io;
mod l2;
pub mod msr;
mod nested;
mod td;
mod vmgexit;

use alloc::format;
use core::fmt;

use machine::access::Denial;
use machine::cpuid::{Context, Leaf};
use machine::guest::decode::{self, MAX_LENGTH, Opcode};
use machine::guest::event::{Event, vector};
use machine::platform::End;
use machine::settings::PlatformKind;
use machine::types::Vmpl;
use protocols::exit_code::ExitCode;

use super::guest_memory::fetch;
use super::svm::{self, EXIT_INVALID_LOW, intercept};
use super::vcpu::{Flow, RFLAGS_IF, Vcpu};
use super::world::Reason;
use super::{shared, smp};

/// A MOV to CR4 (APM-B, Appendix C).
const EXIT_WRITE_CR4: ExitCode = ExitCode(0x14);
/// A MOV to CR8.
const EXIT_WRITE_CR8: ExitCode = ExitCode(0x18);

/// Handles the exit that VMRUN returned with.
pub fn handle(vcpu: &mut Vcpu) -> Flow {
    let code = vcpu.vmcb().control.exit_code;
    vcpu.lock().platform.counters().count_exit(vcpu.vmpl, code);
    vcpu.count_executed();
    let control = &vcpu.vmcb().control;
    let (info_1, info_2) = (control.exit_info1, control.exit_info2);
    vcpu.trace(format_args!("exit {code:#x} {info_1:#x} {info_2:#x}"));
    if vcpu.is_l2() {
        return l2::exit(vcpu, ExitCode(code));
    }
    if code & 0xFFFF_FFFF == EXIT_INVALID_LOW {
        return invalid(vcpu);
    }
    if vcpu.kind == PlatformKind::Tdx
        && let Some(flow) = td::exit(vcpu, ExitCode(code))
    {
        return flow;
    }
    match ExitCode(code) {
        ExitCode::NPF => nested::fault(vcpu),
        ExitCode::VMMCALL => instruction::vmmcall(vcpu),
        ExitCode::EXCEPTION_UD => instruction::undefined(vcpu),
        ExitCode::MSR => msr::access(vcpu),
        ExitCode::IOIO => io::access(vcpu),
        ExitCode::CPUID => cpuid(vcpu),
        ExitCode::HLT => halt(vcpu),
        // Only a strict level exits for these.
        ExitCode::INVD
        | ExitCode::WBINVD
        | ExitCode::MONITOR
        | ExitCode::MWAIT
        | ExitCode::RDPMC
        | ExitCode::READ_DR7
        | ExitCode::WRITE_DR7
        | ExitCode::EXCEPTION_DB
        | ExitCode::EXCEPTION_AC => vcpu.vc(ExitCode(code)),
        // TCG has one exit for two instructions (facts: tcg-svm.md §5).
        ExitCode::RDTSC | ExitCode::RDTSCP => {
            let code = match instruction_at_rip(vcpu).opcode {
                Opcode::Rdtscp => ExitCode::RDTSCP,
                _ => ExitCode::RDTSC,
            };
            vcpu.vc(code)
        }
        // No XSAVE is advertised, so CR4.OSXSAVE is clear; the SVM instructions do not exist
        // in a guest whose CPUID hides SVM.
        ExitCode::XSETBV | ExitCode(0x7A | 0x80 | 0x82..=0x86) => vcpu.undefined_opcode(),
        EXIT_WRITE_CR4 => write_cr4(vcpu),
        EXIT_WRITE_CR8 => control::write_cr8(vcpu),
        ExitCode::NMI => {
            svm::take_nmi();
            if smp::was_kicked(vcpu.id) {
                Flow::Resume
            } else {
                vcpu.nmi_unless_held()
            }
        }
        ExitCode::SHUTDOWN => {
            vcpu.tell_shutdown();
            Flow::End(if fetch_fault_is_unfounded(vcpu) {
                End::EmulatorFault(vcpu.id.0)
            } else {
                End::Shutdown {
                    vmpl: vcpu.vmpl,
                    rip: vcpu.rip(),
                }
            })
        }
        other => Flow::End(End::Refused(format!("{} exited with {other:?}", vcpu.vmpl))),
    }
}

/// Whether the shutdown began with a page fault at the instruction at RIP, "not present", although
/// the guest's tables map it: QEMU has walked something else than the guest's tables.
fn fetch_fault_is_unfounded(vcpu: &Vcpu) -> bool {
    /// Error code of #PF (APM 8.4.2): P clear, I/D set, in all else as a supervisor reads.
    const FETCH_NOT_PRESENT: u32 = 0x10;
    let began = Event::decode(vcpu.vmcb().control.exit_int_info);
    began == Some(Event::exception(vector::PF, Some(FETCH_NOT_PRESENT)))
        && fetch::<MAX_LENGTH>(&shared::lock(vcpu.rip()), vcpu).1 > 0
}

/// The instruction at RIP; its length is meaningful for the expected opcode only.
fn instruction_at_rip(vcpu: &Vcpu) -> decode::Instruction {
    let machine = shared::lock(vcpu.rip());
    let (bytes, len) = fetch::<MAX_LENGTH>(&machine, vcpu);
    decode::decode(&bytes[..len], vcpu.is_64_bit())
}

/// TCG gives VMEXIT_INVALID for a MOV to CR3 or CR4 with reserved bits, where hardware gives
/// #GP(0) (facts: tcg-svm.md §5). Anything else is a VMSA that cannot run.
fn invalid(vcpu: &mut Vcpu) -> Flow {
    let (bytes, _) = fetch::<MAX_LENGTH>(&shared::lock(vcpu.rip()), vcpu);
    let mut rest = &bytes[..];
    while let [0x40..=0x4F | 0x66 | 0x67, tail @ ..] = rest {
        rest = tail;
    }
    if let [0x0F, 0x22, modrm, ..] = rest
        && matches!(modrm >> 3 & 7, 3 | 4)
    {
        return if vcpu.kind == PlatformKind::Tdx {
            control::write_refused_cr4(vcpu)
        } else {
            vcpu.general_protection()
        };
    }
    let save = vcpu.save();
    Flow::End(End::Refused(format!(
        "{} has a state that VMRUN refuses: RIP {:#x} CR0 {:#x} CR3 {:#x} CR4 {:#x} EFER {:#x}",
        vcpu.vmpl, save.rip, save.cr0, save.cr3, save.cr4, save.efer
    )))
}

/// A MOV to CR4 by a guest whose long mode is hidden (see [`Vcpu`]). Reserved bits end the run at the
/// next entry.
fn write_cr4(vcpu: &mut Vcpu) -> Flow {
    let (bytes, _) = fetch::<MAX_LENGTH>(&shared::lock(vcpu.rip()), vcpu);
    // Outside 64-bit mode there is no REX prefix, so the register is one of the first eight.
    let Some(at) = bytes.iter().position(|&byte| byte == 0x0F) else {
        return vcpu.undefined_opcode();
    };
    let modrm = bytes.get(at + 2).copied().unwrap_or(0);
    let value = vcpu.general_registers()[usize::from(modrm & 7)];
    vcpu.save_mut().cr4 = value & 0xFFFF_FFFF;
    vcpu.skip(at as u64 + 3)
}

/// An access that no host can make succeed ends the run.
fn refused(vcpu: &Vcpu, what: fmt::Arguments<'_>, denial: Denial) -> Flow {
    Flow::End(End::Refused(format!(
        "{} at RIP {:#x}: {what}: {denial}",
        vcpu.vmpl,
        vcpu.rip()
    )))
}

fn cpuid(vcpu: &mut Vcpu) -> Flow {
    if vcpu.strict {
        return vcpu.vc(ExitCode::CPUID);
    }
    let length = instruction_at_rip(vcpu).length;
    let (leaf, subleaf) = (vcpu.save().rax as u32, vcpu.registers.rcx as u32);
    let context = cpuid_context(vcpu);
    let result = shared::lock(vcpu.rip())
        .cpuid
        .lookup(leaf, subleaf, &context);
    set_cpuid(vcpu, result, length)
}

/// Completes CPUID.
fn set_cpuid(vcpu: &mut Vcpu, result: Leaf, length: u64) -> Flow {
    vcpu.save_mut().rax = u64::from(result.eax);
    vcpu.registers.rbx = u64::from(result.ebx);
    vcpu.registers.rcx = u64::from(result.ecx);
    vcpu.registers.rdx = u64::from(result.edx);
    vcpu.skip(length)
}

/// What CPUID values depend on for this CPU, when it asks without #VC.
fn cpuid_context(vcpu: &Vcpu) -> Context {
    const CR4_OSXSAVE: u64 = 1 << 18;
    Context {
        osxsave: vcpu.save().cr4 & CR4_OSXSAVE != 0,
        apic_id: vcpu.id.0,
        svsm: vcpu.vmpl != Vmpl::VMPL0,
    }
}

/// HLT with interrupts on is native: the intercept is lifted until the next exit. With
/// interrupts off only INIT or an NMI can wake the CPU.
fn halt(vcpu: &mut Vcpu) -> Flow {
    if vcpu.save().rflags & RFLAGS_IF != 0 {
        vcpu.vmcb_mut().control.intercept_misc1 &= !intercept::HLT;
        return Flow::Resume;
    }
    vcpu.skip(1);
    halt_for_good(vcpu)
}

/// Only INIT or an NMI can wake this CPU.
fn halt_for_good(vcpu: &Vcpu) -> Flow {
    if smp::is_alone_awake(vcpu.id) {
        let save = vcpu.save();
        return Flow::End(End::Halted {
            vmpl: vcpu.vmpl,
            rip: save.rip,
            rsp: save.rsp,
        });
    }
    Flow::Hold(Reason {
        code: ExitCode::HLT.0,
        info_1: 0,
        info_2: 0,
    })
}
