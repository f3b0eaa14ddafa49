//! AMD-V: the VMCB, the intercepts, and the instruction that runs a guest.
//!
//! Owns the layout of the VMCB (AMD APM volume 2, appendix B) and the assembly around VMRUN.
//!
//! Invariants:
//! * the machine is built without FPU and vector code, so the guest's x87/SSE registers stay
//!   in the CPU over an exit; only a world switch saves them;
//! * the machine uses neither FS, GS, TR nor LDTR, so the state of VMLOAD/VMSAVE stays in the
//!   CPU too: [`vmload`] is due when the VMCB's copy was written, [`vmsave`] before it is read;
//! * GIF is 0 in the machine and 1 in the guest, IF is 0 in the machine: interrupts and NMIs
//!   reach the machine only as exits.

#![expect(unsafe_code, reason = "VMRUN and its relatives")]

use core::arch::{asm, naked_asm};
use core::mem::{offset_of, size_of};

use protocols::vmsa::{Efer, Segment};

use super::cpu::{self, msr};
use super::memory::OwnPages;

/// The control area (offsets 0x000–0x3FF).
#[repr(C)]
pub struct Control {
    /// CR read (15:0) and write (31:16) intercepts.
    pub intercept_cr: u32,
    /// DR intercepts.
    pub intercept_dr: u32,
    /// Exception intercepts by vector.
    pub intercept_exceptions: u32,
    /// Intercepts of offset 0x00C, see [`intercept`].
    pub intercept_misc1: u32,
    /// Intercepts of offset 0x010, see [`intercept`].
    pub intercept_misc2: u32,
    _014: [u8; 0x040 - 0x014],
    /// I/O permission map.
    pub iopm_base: u64,
    /// MSR permission map.
    pub msrpm_base: u64,
    /// Added to the TSC.
    pub tsc_offset: u64,
    /// Address space identifier; TCG wants it not to be 0 and ignores it otherwise.
    pub asid: u32,
    /// TLB control; nothing to do on TCG, where every VMRUN flushes.
    pub tlb_control: u32,
    /// Virtual interrupt control.
    pub int_ctl: u64,
    /// Bit 0: the guest is in an interrupt shadow.
    pub int_state: u64,
    /// Why the guest exited.
    pub exit_code: u64,
    /// First detail.
    pub exit_info1: u64,
    /// Second detail.
    pub exit_info2: u64,
    /// The event that was being delivered when the exit happened.
    pub exit_int_info: u64,
    /// Bit 0: nested paging.
    pub np_enable: u64,
    _098: [u8; 0x0A8 - 0x098],
    /// Event to inject on entry.
    pub event_inj: u64,
    /// Root of the nested page tables.
    pub n_cr3: u64,
    _0b8: [u8; 0x400 - 0x0B8],
}

/// The save area (offsets 0x400–0xFFF).
#[repr(C)]
pub struct Save {
    /// ES, CS, SS, DS, FS, GS, GDTR, LDTR, IDTR, TR: see [`seg`].
    pub segments: [Segment; 10],
    _0a0: [u8; 0x0CB - 0x0A0],
    /// Privilege level; TCG derives it from SS instead.
    pub cpl: u8,
    _0cc: [u8; 4],
    /// Extended features; SVME is always set.
    pub efer: u64,
    _0d8: [u8; 0x148 - 0x0D8],
    /// CR4.
    pub cr4: u64,
    /// CR3.
    pub cr3: u64,
    /// CR0.
    pub cr0: u64,
    /// DR7.
    pub dr7: u64,
    /// DR6.
    pub dr6: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// RIP.
    pub rip: u64,
    _180: [u8; 0x1D8 - 0x180],
    /// RSP.
    pub rsp: u64,
    _1e0: [u8; 0x1F8 - 0x1E0],
    /// RAX.
    pub rax: u64,
    /// STAR, LSTAR, CSTAR, SFMASK, KernelGSBase, SYSENTER_CS, _ESP, _EIP.
    pub syscall: [u64; 8],
    /// CR2.
    pub cr2: u64,
    _248: [u8; 0x268 - 0x248],
    /// PAT; ignored by TCG.
    pub g_pat: u64,
    _270: [u8; 0xC00 - 0x270],
}

/// Indices into [`Save::segments`].
pub mod seg {
    /// ES.
    pub const ES: usize = 0;
    /// CS.
    pub const CS: usize = 1;
    /// SS.
    pub const SS: usize = 2;
    /// DS.
    pub const DS: usize = 3;
    /// FS.
    pub const FS: usize = 4;
    /// GS.
    pub const GS: usize = 5;
    /// GDTR.
    pub const GDTR: usize = 6;
    /// LDTR.
    pub const LDTR: usize = 7;
    /// IDTR.
    pub const IDTR: usize = 8;
    /// TR.
    pub const TR: usize = 9;
}

/// The virtual machine control block: one page.
#[repr(C, align(4096))]
pub struct Vmcb {
    /// What the machine asks for and is told.
    pub control: Control,
    /// The guest's state that VMRUN switches.
    pub save: Save,
}

const _: () = {
    assert!(size_of::<Vmcb>() == 4096);
    assert!(offset_of!(Control, iopm_base) == 0x040);
    assert!(offset_of!(Control, asid) == 0x058);
    assert!(offset_of!(Control, int_ctl) == 0x060);
    assert!(offset_of!(Control, exit_code) == 0x070);
    assert!(offset_of!(Control, exit_int_info) == 0x088);
    assert!(offset_of!(Control, event_inj) == 0x0A8);
    assert!(offset_of!(Control, n_cr3) == 0x0B0);
    assert!(offset_of!(Vmcb, save) == 0x400);
    assert!(offset_of!(Save, cpl) == 0x0CB);
    assert!(offset_of!(Save, efer) == 0x0D0);
    assert!(offset_of!(Save, cr4) == 0x148);
    assert!(offset_of!(Save, rip) == 0x178);
    assert!(offset_of!(Save, rsp) == 0x1D8);
    assert!(offset_of!(Save, rax) == 0x1F8);
    assert!(offset_of!(Save, syscall) == 0x200);
    assert!(offset_of!(Save, cr2) == 0x240);
    assert!(offset_of!(Save, g_pat) == 0x268);
};

/// Intercept bits.
pub mod intercept {
    /// misc1: external interrupts, for a CPU that waits for one.
    pub const INTR: u32 = 1 << 0;
    /// misc1: NMI, which is how another CPU gets this one out of the guest.
    pub const NMI: u32 = 1 << 1;
    /// misc1: a virtual interrupt can be taken.
    pub const VINTR: u32 = 1 << 4;
    /// misc1: INIT.
    pub const INIT: u32 = 1 << 3;
    /// misc1: CPUID.
    pub const CPUID: u32 = 1 << 18;
    /// misc1: IRET.
    pub const IRET: u32 = 1 << 20;
    /// misc1: INVD.
    pub const INVD: u32 = 1 << 22;
    /// misc1: HLT.
    pub const HLT: u32 = 1 << 24;
    /// misc1: INVLPGA.
    pub const INVLPGA: u32 = 1 << 26;
    /// misc1: ports, by the permission map.
    pub const IOIO: u32 = 1 << 27;
    /// misc1: MSRs, by the permission map.
    pub const MSR: u32 = 1 << 28;
    /// misc1: shutdown (triple fault).
    pub const SHUTDOWN: u32 = 1 << 31;
    /// misc2: VMRUN, VMMCALL, VMLOAD, VMSAVE, STGI, CLGI, SKINIT: un-intercepted, VMLOAD and
    /// VMSAVE would act on the host's physical memory.
    pub const SVM: u32 = 0x7F;
    /// misc1: RDTSC, and under TCG RDTSCP too.
    pub const RDTSC: u32 = 1 << 14;
    /// misc1: RDPMC.
    pub const RDPMC: u32 = 1 << 15;
    /// misc2: RDTSCP.
    pub const RDTSCP: u32 = 1 << 7;
    /// misc2: WBINVD.
    pub const WBINVD: u32 = 1 << 9;
    /// misc2: MONITOR and MWAIT.
    pub const MONITOR_MWAIT: u32 = 1 << 10 | 1 << 11;
    /// misc2: XSETBV.
    pub const XSETBV: u32 = 1 << 13;
    /// exceptions: #UD, which is how the new instructions arrive.
    pub const EXCEPTION_UD: u32 = 1 << 6;
    /// exceptions: #DB and #AC, which KVM intercepts in guests whose debug registers it cannot
    /// switch.
    pub const EXCEPTION_DB_AC: u32 = 1 << 1 | 1 << 17;
    /// control registers: reads of CR0, and under TCG of all others.
    pub const CR_READ: u32 = 1 << 0;
    /// control registers: writes of CR0.
    pub const CR0_WRITE: u32 = 1 << 16;
    /// control registers: writes of CR4.
    pub const CR4_WRITE: u32 = 1 << 20;
    /// control registers: writes of CR8.
    pub const CR8_WRITE: u32 = 1 << 24;
    /// debug registers: all accesses.
    pub const DR_ALL: u32 = 0x00FF_00FF;
    /// debug registers: reads (15:0) and writes (31:16) of DR7.
    pub const DR7: u32 = 1 << 7 | 1 << 23;
}

/// The virtual interrupt of the control area (APM 15.21.4).
pub mod virq {
    const IRQ: u64 = 1 << 8;
    const IGNORE_TPR: u64 = 1 << 20;
    const VECTOR_SHIFT: u32 = 32;
    /// RFLAGS.IF of the guest and its CR8 are its own; physical interrupts exit.
    pub const MASKING: u64 = 1 << 24;
    /// The task priority class that CR8 is.
    pub const TPR: u64 = 0xF;

    /// A virtual interrupt that is taken as soon as interrupts are on.
    pub const fn pending(vector: u8) -> u64 {
        IRQ | IGNORE_TPR | (vector as u64) << VECTOR_SHIFT
    }

    /// What is left of `control` when the level is left: an interrupt not taken yet.
    pub const fn kept(control: u64) -> u64 {
        if control & IRQ != 0 { control } else { 0 }
    }
}

/// VMEXIT_INVALID as TCG stores it: 32 bits of the 64-bit -1.
pub const EXIT_INVALID_LOW: u64 = 0xFFFF_FFFF;

/// General registers that VMRUN does not switch.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Registers {
    /// RBX.
    pub rbx: u64,
    /// RCX.
    pub rcx: u64,
    /// RDX.
    pub rdx: u64,
    /// RSI.
    pub rsi: u64,
    /// RDI.
    pub rdi: u64,
    /// RBP.
    pub rbp: u64,
    /// R8 to R15.
    pub r8_15: [u64; 8],
}

/// Turns SVM on for this CPU and gives it a host save area.
pub fn enable(host_save: &OwnPages) {
    cpu::wrmsr(msr::EFER, cpu::rdmsr(msr::EFER) | Efer::SVME.0);
    cpu::wrmsr(msr::VM_HSAVE_PA, host_save.physical());
    // SAFETY: clears the global interrupt flag; the machine waits for interrupts nowhere.
    unsafe { asm!("clgi", options(nomem, nostack)) };
}

/// Loads FS, GS, TR, LDTR and the system call registers from the VMCB.
pub fn vmload(vmcb: u64) {
    // SAFETY: `vmcb` is a VMCB of the machine; the machine uses none of these registers.
    unsafe { asm!("vmload rax", in("rax") vmcb, options(nostack)) };
}

/// Stores the same registers to the VMCB.
pub fn vmsave(vmcb: u64) {
    // SAFETY: `vmcb` is a VMCB of the machine, written as one.
    unsafe { asm!("vmsave rax", in("rax") vmcb, options(nostack)) };
}

/// Takes an NMI that ended a guest: the exit leaves it pending.
pub fn take_nmi() {
    // SAFETY: opens GIF for one instruction with IF clear, so only an NMI comes, and its handler
    // does nothing.
    unsafe { asm!("stgi", "nop", "clgi") };
}

/// Lets physical interrupts end a guest that has [`virq::MASKING`], or no more. GIF is 0, so none
/// comes here.
pub fn host_interrupts(on: bool) {
    // SAFETY: RFLAGS.IF means nothing while GIF is 0; the instruction behind STI takes its shadow.
    unsafe {
        if on {
            asm!("sti", "nop", options(nomem, nostack));
        } else {
            asm!("cli", options(nomem, nostack));
        }
    }
}

/// Ticks of the time stamp counter that [`vmrun`] itself takes where each instruction is a tick:
/// its instructions between the two RDTSC, VMRUN and one of the two included.
pub const VMRUN_TICKS: u64 = 37;

/// Runs the guest until its next exit. Returns the ticks of the time stamp counter that this took,
/// [`VMRUN_TICKS`] included.
///
/// # Safety
/// 1. `vmcb` is the physical address of a VMCB whose nested tables give the guest no memory
///    of the machine;
/// 2. its intercepts include the SVM instructions (un-intercepted, they act on host memory);
/// 3. SVM is enabled on this CPU.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn vmrun(vmcb: u64, registers: &mut Registers) -> u64 {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "rdtsc",
        "shl rdx, 32",
        "or rax, rdx",
        "push rax",
        "push rsi",
        "mov rax, rdi",
        "mov rbx, [rsi + {rbx}]",
        "mov rcx, [rsi + {rcx}]",
        "mov rdx, [rsi + {rdx}]",
        "mov rdi, [rsi + {rdi}]",
        "mov rbp, [rsi + {rbp}]",
        "mov r8, [rsi + {r8}]",
        "mov r9, [rsi + {r8} + 8]",
        "mov r10, [rsi + {r8} + 16]",
        "mov r11, [rsi + {r8} + 24]",
        "mov r12, [rsi + {r8} + 32]",
        "mov r13, [rsi + {r8} + 40]",
        "mov r14, [rsi + {r8} + 48]",
        "mov r15, [rsi + {r8} + 56]",
        "mov rsi, [rsi + {rsi}]",
        "vmrun rax",
        "xchg rsi, [rsp]",
        "mov [rsi + {rbx}], rbx",
        "mov [rsi + {rcx}], rcx",
        "mov [rsi + {rdx}], rdx",
        "mov [rsi + {rdi}], rdi",
        "mov [rsi + {rbp}], rbp",
        "mov [rsi + {r8}], r8",
        "mov [rsi + {r8} + 8], r9",
        "mov [rsi + {r8} + 16], r10",
        "mov [rsi + {r8} + 24], r11",
        "mov [rsi + {r8} + 32], r12",
        "mov [rsi + {r8} + 40], r13",
        "mov [rsi + {r8} + 48], r14",
        "mov [rsi + {r8} + 56], r15",
        "pop rax",
        "mov [rsi + {rsi}], rax",
        "rdtsc",
        "shl rdx, 32",
        "or rax, rdx",
        "pop rdx",
        "sub rax, rdx",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "cld",
        "ret",
        rbx = const offset_of!(Registers, rbx),
        rcx = const offset_of!(Registers, rcx),
        rdx = const offset_of!(Registers, rdx),
        rsi = const offset_of!(Registers, rsi),
        rdi = const offset_of!(Registers, rdi),
        rbp = const offset_of!(Registers, rbp),
        r8 = const offset_of!(Registers, r8_15),
    )
}

/// The x87/SSE state as FXSAVE stores it.
#[repr(C, align(16))]
pub struct FxState(pub [u8; 512]);

/// Stores the guest's x87/SSE registers.
pub fn fxsave(state: &mut FxState) {
    // SAFETY: 512 aligned bytes; CR4.OSFXSR is set and CR0.TS clear in the machine.
    unsafe { asm!("fxsave64 [{}]", in(reg) state, options(nostack)) };
}

/// Loads the SSE registers and MXCSR of an image. The caller has masked MXCSR to its defined bits.
pub fn load_sse(state: &FxState) {
    // SAFETY: the image is 512 aligned bytes (APM volume 2, figure 11-7: MXCSR at 24, XMM0 at
    // 160); the registers are the guest's, the machine uses none.
    unsafe {
        asm!(
            "ldmxcsr [{fx} + 24]",
            "movaps xmm0, [{fx} + 160]",
            "movaps xmm1, [{fx} + 176]",
            "movaps xmm2, [{fx} + 192]",
            "movaps xmm3, [{fx} + 208]",
            "movaps xmm4, [{fx} + 224]",
            "movaps xmm5, [{fx} + 240]",
            "movaps xmm6, [{fx} + 256]",
            "movaps xmm7, [{fx} + 272]",
            "movaps xmm8, [{fx} + 288]",
            "movaps xmm9, [{fx} + 304]",
            "movaps xmm10, [{fx} + 320]",
            "movaps xmm11, [{fx} + 336]",
            "movaps xmm12, [{fx} + 352]",
            "movaps xmm13, [{fx} + 368]",
            "movaps xmm14, [{fx} + 384]",
            "movaps xmm15, [{fx} + 400]",
            fx = in(reg) state,
            options(nostack, readonly)
        );
    }
}

/// Loads x87/SSE registers. The caller has masked MXCSR to its defined bits.
pub fn fxrstor(state: &FxState) {
    // SAFETY: 512 aligned bytes; the registers are the guest's, the machine uses none.
    unsafe { asm!("fxrstor64 [{}]", in(reg) state, options(nostack, readonly)) };
}
