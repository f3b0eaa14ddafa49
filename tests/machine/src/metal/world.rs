//! World switch: between the page a VMSA is kept in and the registers of the CPU.
//!
//! On hardware VMRUN loads the VMSA. Here the state is copied: what VMRUN and VMLOAD take goes
//! to the VMCB, the general registers to [`Registers`], x87 and SSE straight into the CPU.
//!
//! Invariant: between [`leave`] and [`enter`] the VMSA page holds all of the guest's state, so
//! a more privileged VMPL can read and change it.

use core::mem::offset_of;

use machine::memory::PhysicalMemory;
use machine::types::{Spa, VcpuId};
use protocols::vmsa::{Efer, Vmsa};
use zerocopy::{FromBytes, IntoBytes};

use super::cpu::{self, msr};
use super::memory::DirectMap;
use super::svm::{self, FxState, Registers, Vmcb, seg};

/// Bits of MXCSR that are defined; FXRSTOR faults on others.
const MXCSR_MASK: u32 = 0xFFFF;

/// Reads the page at `spa` as a VMSA.
pub fn read(spa: Spa) -> Vmsa {
    let mut page = [0; 4096];
    DirectMap.read(spa, &mut page);
    // All bit patterns are a VMSA, and the sizes are equal.
    Vmsa::read_from_bytes(&page).expect("4096 bytes")
}

/// Writes a VMSA back.
fn write(spa: Spa, vmsa: &Vmsa) {
    DirectMap.write(spa, vmsa.as_bytes());
}

/// What the CPU holds of the x87 registers, as the last FXSAVE found it.
///
/// They are loaded only if that changes them. FXRSTOR on one CPU may cost another CPU of QEMU its
/// state (`docs/machine.md`), and most levels never use x87.
#[derive(Clone, Copy)]
pub struct X87(X87Image);

impl X87 {
    /// What this CPU holds now.
    pub fn held() -> Self {
        let mut fx = FxState([0; 512]);
        svm::fxsave(&mut fx);
        Self(x87_of(&fx))
    }
}

/// The parts of an FXSAVE image that are x87's: all before MXCSR, and the registers.
type X87Image = ([u8; 24], [u8; 128]);

fn x87_of(fx: &FxState) -> X87Image {
    let head = core::array::from_fn(|i| fx.0[i]);
    (head, core::array::from_fn(|i| fx.0[32 + i]))
}

/// Takes the state of `vmsa` into the CPU. The VMCB's control area is the caller's.
pub fn enter(vmsa: &Vmsa, vmcb: &mut Vmcb, vmcb_at: u64, registers: &mut Registers, held: &X87) {
    let save = &mut vmcb.save;
    save.segments[seg::ES] = vmsa.es;
    save.segments[seg::CS] = vmsa.cs;
    save.segments[seg::SS] = vmsa.ss;
    save.segments[seg::DS] = vmsa.ds;
    save.segments[seg::FS] = vmsa.fs;
    save.segments[seg::GS] = vmsa.gs;
    save.segments[seg::GDTR] = vmsa.gdtr;
    save.segments[seg::LDTR] = vmsa.ldtr;
    save.segments[seg::IDTR] = vmsa.idtr;
    save.segments[seg::TR] = vmsa.tr;
    save.cpl = vmsa.cpl;
    save.efer = vmsa.efer.0 | Efer::SVME.0;
    save.cr4 = vmsa.cr4;
    save.cr3 = vmsa.cr3;
    save.cr0 = vmsa.cr0;
    save.dr7 = vmsa.dr7;
    save.dr6 = vmsa.dr6;
    save.rflags = vmsa.rflags;
    save.rip = vmsa.rip;
    save.rsp = vmsa.rsp;
    save.rax = vmsa.rax;
    save.syscall = [
        vmsa.star,
        vmsa.lstar,
        vmsa.cstar,
        vmsa.sfmask,
        vmsa.kernel_gs_base,
        vmsa.sysenter_cs,
        vmsa.sysenter_esp,
        vmsa.sysenter_eip,
    ];
    save.cr2 = vmsa.cr2;
    save.g_pat = vmsa.g_pat;
    *registers = Registers {
        rbx: vmsa.rbx,
        rcx: vmsa.rcx,
        rdx: vmsa.rdx,
        rsi: vmsa.rsi,
        rdi: vmsa.rdi,
        rbp: vmsa.rbp,
        r8_15: [
            vmsa.r8, vmsa.r9, vmsa.r10, vmsa.r11, vmsa.r12, vmsa.r13, vmsa.r14, vmsa.r15,
        ],
    };
    svm::vmload(vmcb_at);
    let fx = fx_of(vmsa);
    if held.0 == x87_of(&fx) {
        svm::load_sse(&fx);
    } else {
        svm::fxrstor(&fx);
    }
    cpu::wrmsr(msr::PAT, vmsa.g_pat);
    cpu::wrmsr(msr::TSC_AUX, u64::from(vmsa.tsc_aux));
}

/// Puts the state of the CPU into the VMSA page at `spa`, with the reason for leaving. Returns what
/// the CPU holds still.
pub fn leave(spa: Spa, vmcb: &Vmcb, vmcb_at: u64, registers: &Registers, why: &Reason) -> X87 {
    svm::vmsave(vmcb_at);
    let mut vmsa = read(spa);
    let save = &vmcb.save;
    vmsa.es = save.segments[seg::ES];
    vmsa.cs = save.segments[seg::CS];
    vmsa.ss = save.segments[seg::SS];
    vmsa.ds = save.segments[seg::DS];
    vmsa.fs = save.segments[seg::FS];
    vmsa.gs = save.segments[seg::GS];
    vmsa.gdtr = save.segments[seg::GDTR];
    vmsa.ldtr = save.segments[seg::LDTR];
    vmsa.idtr = save.segments[seg::IDTR];
    vmsa.tr = save.segments[seg::TR];
    vmsa.cpl = vmsa.ss.attributes.dpl();
    vmsa.efer = Efer(save.efer);
    vmsa.cr4 = save.cr4;
    vmsa.cr3 = save.cr3;
    vmsa.cr0 = save.cr0;
    vmsa.dr7 = save.dr7;
    vmsa.dr6 = save.dr6;
    vmsa.rflags = save.rflags;
    vmsa.rip = save.rip;
    vmsa.rsp = save.rsp;
    vmsa.rax = save.rax;
    [
        vmsa.star,
        vmsa.lstar,
        vmsa.cstar,
        vmsa.sfmask,
        vmsa.kernel_gs_base,
        vmsa.sysenter_cs,
        vmsa.sysenter_esp,
        vmsa.sysenter_eip,
    ] = save.syscall;
    vmsa.cr2 = save.cr2;
    vmsa.g_pat = cpu::rdmsr(msr::PAT);
    vmsa.tsc_aux = cpu::rdmsr(msr::TSC_AUX) as u32;
    vmsa.rbx = registers.rbx;
    vmsa.rcx = registers.rcx;
    vmsa.rdx = registers.rdx;
    vmsa.rsi = registers.rsi;
    vmsa.rdi = registers.rdi;
    vmsa.rbp = registers.rbp;
    [
        vmsa.r8, vmsa.r9, vmsa.r10, vmsa.r11, vmsa.r12, vmsa.r13, vmsa.r14, vmsa.r15,
    ] = registers.r8_15;
    let held = fx_into(&mut vmsa);
    vmsa.guest_exit_code = why.code;
    vmsa.guest_exit_info_1 = why.info_1;
    vmsa.guest_exit_info_2 = why.info_2;
    vmsa.guest_exit_int_info = 0;
    write(spa, &vmsa);
    held
}

/// Notes in the VMSA page at `spa` that CPU `id` runs it. On hardware VMRUN drops all of the
/// guest's translations when PCPU_ID is 0 and makes it non-zero (APM 15.36.15); here every VMRUN
/// drops them, and a paravisor that waits for a flush needs to see the mark.
pub fn mark_running(spa: Spa, id: VcpuId) {
    let at = Spa::new(spa.get() + offset_of!(Vmsa, pcpu_id) as u64);
    let mut mark = [0; 8];
    DirectMap.read(at, &mut mark);
    if u64::from_le_bytes(mark) == 0 {
        DirectMap.write(at, &(u64::from(id.0) + 1).to_le_bytes());
    }
}

/// What GUEST_EXITCODE and its companions tell (APM 15.36.9).
pub struct Reason {
    /// The exit code.
    pub code: u64,
    /// EXITINFO1.
    pub info_1: u64,
    /// EXITINFO2.
    pub info_2: u64,
}

/// The FXSAVE image of a VMSA's x87 and SSE fields (APM volume 2, figure 11-7).
fn fx_of(vmsa: &Vmsa) -> FxState {
    let mut fx = FxState([0; 512]);
    let image = &mut fx.0;
    image[0..2].copy_from_slice(&vmsa.x87_fcw.to_le_bytes());
    image[2..4].copy_from_slice(&vmsa.x87_fsw.to_le_bytes());
    image[4] = abridge_tags(vmsa.x87_ftw);
    image[6..8].copy_from_slice(&vmsa.x87_fop.to_le_bytes());
    image[8..16].copy_from_slice(&vmsa.x87_rip.to_le_bytes());
    image[16..24].copy_from_slice(&vmsa.x87_dp.to_le_bytes());
    image[24..28].copy_from_slice(&(vmsa.mxcsr & MXCSR_MASK).to_le_bytes());
    for (slot, register) in image[32..160]
        .chunks_exact_mut(16)
        .zip(vmsa.x87_registers.chunks_exact(10))
    {
        slot[..10].copy_from_slice(register);
    }
    image[160..416].copy_from_slice(vmsa.xmm.as_bytes());
    fx
}

fn fx_into(vmsa: &mut Vmsa) -> X87 {
    let mut fx = FxState([0; 512]);
    svm::fxsave(&mut fx);
    let image = &fx.0;
    let word = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
    let quad = |at: usize| u64::from_le_bytes(core::array::from_fn(|i| image[at + i]));
    vmsa.x87_fcw = word(0);
    vmsa.x87_fsw = word(2);
    vmsa.x87_ftw = u16::from(image[4]);
    vmsa.x87_fop = word(6);
    vmsa.x87_rip = quad(8);
    vmsa.x87_dp = quad(16);
    vmsa.mxcsr = u32::from(word(24));
    for (slot, register) in image[32..160]
        .chunks_exact(16)
        .zip(vmsa.x87_registers.chunks_exact_mut(10))
    {
        register.copy_from_slice(&slot[..10]);
    }
    vmsa.xmm.as_mut_bytes().copy_from_slice(&image[160..416]);
    X87(x87_of(&fx))
}

/// The tag byte of FXSAVE. A VMSA is written by software with either form: the abridged byte
/// is taken as it is, a full tag word (2 bits per register, 3 = empty) is reduced.
fn abridge_tags(word: u16) -> u8 {
    if word <= 0xFF {
        return word as u8;
    }
    (0..8).fold(0, |tags, i| tags | u8::from(word >> (2 * i) & 3 != 3) << i)
}
