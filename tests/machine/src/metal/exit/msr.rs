//! RDMSR and WRMSR, by exit and on behalf of a GHCB request.

use machine::types::Vmpl;
use protocols::exit_code::ExitCode;
use protocols::vmsa::Efer;

use crate::metal::apic;
use crate::metal::cpu::{self, msr};
use crate::metal::shared;
use crate::metal::vcpu::{Flow, Vcpu};

/// SEV_STATUS: SEV, SEV-ES and SEV-SNP are active (APM 15.34.10).
const SEV_STATUS: u64 = 7;
const CR0_PG: u64 = 1 << 31;

/// An exit by RDMSR (EXITINFO1 0) or WRMSR (1).
pub fn access(vcpu: &mut Vcpu) -> Flow {
    let number = vcpu.registers.rcx as u32;
    let write = vcpu.vmcb().control.exit_info1 & 1 != 0;
    // Both instructions are 0F 3x; a prefix is legal but no compiler emits one.
    let length = super::instruction_at_rip(vcpu).length;
    let value = vcpu.registers.rdx << 32 | vcpu.save().rax & 0xFFFF_FFFF;
    match number {
        msr::EFER if write => {
            if !write_efer(vcpu, value) {
                return vcpu.general_protection();
            }
        }
        msr::EFER => set_result(vcpu, vcpu.save().efer),
        msr::GHCB if write => {
            shared::lock(vcpu.rip())
                .platform
                .set_ghcb_msr(vcpu.id, vcpu.vmpl, value);
        }
        msr::GHCB => {
            let value = shared::lock(vcpu.rip())
                .platform
                .ghcb_msr(vcpu.id, vcpu.vmpl);
            set_result(vcpu, value);
        }
        msr::SEV_STATUS if write => return vcpu.general_protection(),
        msr::SEV_STATUS => set_result(vcpu, SEV_STATUS),
        _ if vcpu.strict => return vcpu.vc(ExitCode::MSR),
        _ if write => {
            if !write_for_guest(vcpu, number, value) {
                return vcpu.general_protection();
            }
        }
        _ => match read_for_guest(vcpu, number) {
            Some(value) => set_result(vcpu, value),
            None => return vcpu.general_protection(),
        },
    }
    vcpu.skip(length)
}

pub(super) fn set_result(vcpu: &mut Vcpu, value: u64) {
    vcpu.save_mut().rax = value & 0xFFFF_FFFF;
    vcpu.registers.rdx = value >> 32;
}

/// What an MSR reads without #VC; `None` is #GP(0).
pub fn read_for_guest(vcpu: &mut Vcpu, number: u32) -> Option<u64> {
    match number {
        msr::SVSM_CAA if vcpu.vmpl != Vmpl::VMPL0 => {
            let area = shared::lock(vcpu.rip()).platform.calling_area(vcpu.id);
            Some(area.map_or(0, |gpa| gpa.get()))
        }
        msr::VM_HSAVE_PA => None,
        _ => Some(cpu::rdmsr(number)),
    }
}

/// Writes an MSR without #VC; false is #GP(0).
pub fn write_for_guest(vcpu: &mut Vcpu, number: u32, value: u64) -> bool {
    match number {
        msr::X2APIC_ICR => apic::write_icr(vcpu.id, value),
        msr::SVSM_CAA => return false,
        _ if cpu::is_forbidden_write(number, value) => return false,
        _ => cpu::wrmsr(number, value),
    }
    true
}

/// EFER as the guest writes it: SVME stays, LMA follows LME and paging. Changing LME while
/// paging is #GP (APM 14.6.1).
pub(super) fn write_efer(vcpu: &mut Vcpu, value: u64) -> bool {
    const KNOWN: u64 = Efer::SCE.0 | Efer::LME.0 | Efer::LMA.0 | Efer::NXE.0 | Efer::SVME.0
        | 1 << 13  // LMSLE
        | 1 << 14  // FFXSR
        | 1 << 15; // TCE
    let old = vcpu.save().efer;
    let paging = vcpu.save().cr0 & CR0_PG != 0;
    if value & !KNOWN != 0 || (paging && (value ^ old) & Efer::LME.0 != 0) {
        return false;
    }
    let active = if paging && value & Efer::LME.0 != 0 {
        Efer::LMA.0
    } else {
        0
    };
    vcpu.save_mut().efer = value & !Efer::LMA.0 | active | Efer::SVME.0;
    true
}
