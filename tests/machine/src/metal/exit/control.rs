//! Instructions of a trust domain with control and debug registers: those of an L2 VM that are L1's to see, and
//! those of L1 that this processor would refuse.

use alloc::format;

use machine::guest::decode::MAX_LENGTH;
use machine::platform::End;
use protocols::tdx::l2::Exit;
use protocols::tdx::ve::ExitReason;
use protocols::tdx::vmcall::register::RSP;
use protocols::vmsa::Efer;

use crate::metal::guest_memory::fetch;
use crate::metal::vcpu::{Flow, Vcpu};
use crate::metal::{cpu, shared, svm};

use super::l2::undefined_opcode;

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

/// Whether an L2 VM's next instruction is a MOV to CR3 or CR4.
pub fn loads_paging_register(vcpu: &Vcpu) -> bool {
    let (bytes, len) = fetch::<MAX_LENGTH>(&shared::lock(vcpu.rip()), vcpu);
    ControlMove::decode(&bytes[..len], vcpu.is_64_bit())
        .is_some_and(|found| matches!(found.what, ControlOp::To(3 | 4, _)))
}

/// Bits 3:0 register, 5:4 kind of access, 11:8 general register.
const fn control_qualification(register: u8, from: bool, general: usize) -> u64 {
    register as u64 | (from as u64) << 4 | (general as u64) << 8
}

/// An access of an L2 VM to CR0 or CR4, or a read of any (SDM volume 3, 27.3): L1's if it changes a bit that
/// is L1's.
pub fn control_register(vcpu: &mut Vcpu) -> Flow {
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

/// A MOV to or from a debug register by an L2 VM: L1's.
pub fn debug_register(vcpu: &mut Vcpu) -> Flow {
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
