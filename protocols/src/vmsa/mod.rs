//! The VMSA: the state of one virtual processor at one VMPL, in its own encrypted page.
//!
//! Layout: APM appendix B, table B-4. The page is written by the image builder (boot
//! processor), by the guest (further processors) and by hardware at every exit. Whoever reads
//! a VMSA it did not make must first see to it that the processor cannot run
//! ([`Efer::SVME`] cleared, SVSM 5).
//!
//! - this module: the page;
//! - [`registers`]: segments, EFER, SEV features and the other fields with named bits.

pub mod registers;

pub use registers::*;

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// The GPA at which KVM launches VMSAs, and the only one QEMU accepts in an IGVM file.
pub const LAUNCH_GPA: u64 = 0xFFFF_FFFF_F000;

/// The page.
#[derive(Clone, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[expect(
    missing_docs,
    reason = "fields are the registers of the same names; units are theirs"
)]
pub struct Vmsa {
    pub es: Segment,
    pub cs: Segment,
    pub ss: Segment,
    pub ds: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub gdtr: Segment,
    pub ldtr: Segment,
    pub idtr: Segment,
    pub tr: Segment,
    /// PL0_SSP to PL3_SSP.
    pub pl_ssp: [u64; 4],
    pub u_cet: u64,
    pub reserved_0c8: [u8; 2],
    /// Privilege level of this VMSA, 0 to 3.
    pub vmpl: u8,
    pub cpl: u8,
    pub reserved_0cc: [u8; 4],
    pub efer: Efer,
    pub reserved_0d8: [u8; 8],
    /// PERF_CTL0 to 5 and PERF_CTR0 to 5.
    pub performance_counters: [u64; 12],
    pub xss: u64,
    pub cr4: u64,
    pub cr3: u64,
    pub cr0: u64,
    pub dr7: u64,
    pub dr6: u64,
    pub rflags: u64,
    pub rip: u64,
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// DR0_ADDR_MASK to DR3_ADDR_MASK.
    pub dr_address_mask: [u64; 4],
    pub instructions_retired: u64,
    pub performance_status: u64,
    pub performance_control: u64,
    pub rsp: u64,
    pub s_cet: u64,
    pub ssp: u64,
    pub isst_addr: u64,
    pub rax: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub cr2: u64,
    pub reserved_248: [u8; 0x20],
    pub g_pat: u64,
    pub dbgctl: u64,
    pub br_from: u64,
    pub br_to: u64,
    pub last_exception_from: u64,
    pub last_exception_to: u64,
    pub dbgextncfg: u64,
    pub reserved_2a0: [u8; 0x40],
    pub spec_ctrl: u64,
    pub pkru: u32,
    pub tsc_aux: u32,
    pub guest_tsc_scale: u64,
    pub guest_tsc_offset: u64,
    pub register_protection_nonce: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rbx: u64,
    pub secure_avic_control: u64,
    pub rbp: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub reserved_380: [u8; 0x10],
    /// EXITINFO1 of the last automatic exit.
    pub guest_exit_info_1: u64,
    /// EXITINFO2 of the last automatic exit.
    pub guest_exit_info_2: u64,
    pub guest_exit_int_info: u64,
    pub guest_nrip: u64,
    pub sev_features: SevFeatures,
    pub vintr_control: VintrControl,
    /// Why the processor last left this VMSA ([`crate::exit_code::ExitCode`]).
    pub guest_exit_code: u64,
    pub virtual_tom: u64,
    pub tlb_id: u64,
    /// Hardware makes it non-zero when the VMSA runs; writing 0 forces a TLB flush
    /// (APM 15.36.15).
    pub pcpu_id: u64,
    pub event_injection: u64,
    pub xcr0: u64,
    pub reserved_3f0: [u8; 0x10],
    pub x87_dp: u64,
    pub mxcsr: u32,
    pub x87_ftw: u16,
    pub x87_fsw: u16,
    pub x87_fcw: u16,
    pub x87_fop: u16,
    pub x87_ds: u16,
    pub x87_cs: u16,
    pub x87_rip: u64,
    /// ST0 to ST7, 10 bytes each.
    pub x87_registers: [u8; 80],
    /// XMM0 to XMM15.
    pub xmm: [[u8; 16]; 16],
    /// Upper halves of YMM0 to YMM15.
    pub ymm_high: [[u8; 16]; 16],
    pub lbr_stack: [u8; 0x100],
    pub lbr_select: u64,
    pub ibs: [u64; 10],
    pub reserved_7c8: [u8; 0x138],
    pub guest_intercepts: [u32; 8],
    pub guest_msr_intercepts: [u32; 8],
    pub reserved_940: [u8; 0x40],
    pub opmask: [u64; 8],
    pub zmm_high: [u8; 0x200],
    pub high_zmm: [u8; 0x400],
    pub reserved_fc0: [u8; 0x40],
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<Vmsa>() == 4096);
    assert!(offset_of!(Vmsa, cs) == 0x010);
    assert!(offset_of!(Vmsa, gdtr) == 0x060);
    assert!(offset_of!(Vmsa, ldtr) == 0x070);
    assert!(offset_of!(Vmsa, idtr) == 0x080);
    assert!(offset_of!(Vmsa, tr) == 0x090);
    assert!(offset_of!(Vmsa, pl_ssp) == 0x0A0);
    assert!(offset_of!(Vmsa, u_cet) == 0x0C0);
    assert!(offset_of!(Vmsa, vmpl) == 0x0CA);
    assert!(offset_of!(Vmsa, cpl) == 0x0CB);
    assert!(offset_of!(Vmsa, efer) == 0x0D0);
    assert!(offset_of!(Vmsa, performance_counters) == 0x0E0);
    assert!(offset_of!(Vmsa, xss) == 0x140);
    assert!(offset_of!(Vmsa, cr4) == 0x148);
    assert!(offset_of!(Vmsa, cr3) == 0x150);
    assert!(offset_of!(Vmsa, cr0) == 0x158);
    assert!(offset_of!(Vmsa, dr7) == 0x160);
    assert!(offset_of!(Vmsa, dr6) == 0x168);
    assert!(offset_of!(Vmsa, rflags) == 0x170);
    assert!(offset_of!(Vmsa, rip) == 0x178);
    assert!(offset_of!(Vmsa, dr) == 0x180);
    assert!(offset_of!(Vmsa, dr_address_mask) == 0x1A0);
    assert!(offset_of!(Vmsa, instructions_retired) == 0x1C0);
    assert!(offset_of!(Vmsa, rsp) == 0x1D8);
    assert!(offset_of!(Vmsa, s_cet) == 0x1E0);
    assert!(offset_of!(Vmsa, rax) == 0x1F8);
    assert!(offset_of!(Vmsa, star) == 0x200);
    assert!(offset_of!(Vmsa, sfmask) == 0x218);
    assert!(offset_of!(Vmsa, kernel_gs_base) == 0x220);
    assert!(offset_of!(Vmsa, sysenter_cs) == 0x228);
    assert!(offset_of!(Vmsa, cr2) == 0x240);
    assert!(offset_of!(Vmsa, g_pat) == 0x268);
    assert!(offset_of!(Vmsa, dbgctl) == 0x270);
    assert!(offset_of!(Vmsa, last_exception_to) == 0x290);
    assert!(offset_of!(Vmsa, dbgextncfg) == 0x298);
    assert!(offset_of!(Vmsa, spec_ctrl) == 0x2E0);
    assert!(offset_of!(Vmsa, pkru) == 0x2E8);
    assert!(offset_of!(Vmsa, tsc_aux) == 0x2EC);
    assert!(offset_of!(Vmsa, guest_tsc_scale) == 0x2F0);
    assert!(offset_of!(Vmsa, guest_tsc_offset) == 0x2F8);
    assert!(offset_of!(Vmsa, register_protection_nonce) == 0x300);
    assert!(offset_of!(Vmsa, rcx) == 0x308);
    assert!(offset_of!(Vmsa, rdx) == 0x310);
    assert!(offset_of!(Vmsa, rbx) == 0x318);
    assert!(offset_of!(Vmsa, secure_avic_control) == 0x320);
    assert!(offset_of!(Vmsa, rbp) == 0x328);
    assert!(offset_of!(Vmsa, r8) == 0x340);
    assert!(offset_of!(Vmsa, r15) == 0x378);
    assert!(offset_of!(Vmsa, guest_exit_info_1) == 0x390);
    assert!(offset_of!(Vmsa, guest_exit_info_2) == 0x398);
    assert!(offset_of!(Vmsa, guest_exit_int_info) == 0x3A0);
    assert!(offset_of!(Vmsa, guest_nrip) == 0x3A8);
    assert!(offset_of!(Vmsa, sev_features) == 0x3B0);
    assert!(offset_of!(Vmsa, vintr_control) == 0x3B8);
    assert!(offset_of!(Vmsa, guest_exit_code) == 0x3C0);
    assert!(offset_of!(Vmsa, virtual_tom) == 0x3C8);
    assert!(offset_of!(Vmsa, tlb_id) == 0x3D0);
    assert!(offset_of!(Vmsa, pcpu_id) == 0x3D8);
    assert!(offset_of!(Vmsa, event_injection) == 0x3E0);
    assert!(offset_of!(Vmsa, xcr0) == 0x3E8);
    assert!(offset_of!(Vmsa, x87_dp) == 0x400);
    assert!(offset_of!(Vmsa, mxcsr) == 0x408);
    assert!(offset_of!(Vmsa, x87_ftw) == 0x40C);
    assert!(offset_of!(Vmsa, x87_fsw) == 0x40E);
    assert!(offset_of!(Vmsa, x87_fcw) == 0x410);
    assert!(offset_of!(Vmsa, x87_fop) == 0x412);
    assert!(offset_of!(Vmsa, x87_ds) == 0x414);
    assert!(offset_of!(Vmsa, x87_cs) == 0x416);
    assert!(offset_of!(Vmsa, x87_rip) == 0x418);
    assert!(offset_of!(Vmsa, x87_registers) == 0x420);
    assert!(offset_of!(Vmsa, xmm) == 0x470);
    assert!(offset_of!(Vmsa, ymm_high) == 0x570);
    assert!(offset_of!(Vmsa, lbr_stack) == 0x670);
    assert!(offset_of!(Vmsa, lbr_select) == 0x770);
    assert!(offset_of!(Vmsa, ibs) == 0x778);
    assert!(offset_of!(Vmsa, guest_intercepts) == 0x900);
    assert!(offset_of!(Vmsa, guest_msr_intercepts) == 0x920);
    assert!(offset_of!(Vmsa, opmask) == 0x980);
    assert!(offset_of!(Vmsa, zmm_high) == 0x9C0);
    assert!(offset_of!(Vmsa, high_zmm) == 0xBC0);
    assert!(offset_of!(Vmsa, reserved_fc0) == 0xFC0);
};

impl Vmsa {
    /// Offset of [`Self::efer`], for an atomic access that stops or releases a processor.
    pub const EFER_OFFSET: usize = core::mem::offset_of!(Self, efer);
    /// Reset value of PAT (APM 7.8).
    pub const PAT_RESET: u64 = 0x0007_0406_0007_0406;
    /// Reset value of MXCSR.
    pub const MXCSR_RESET: u32 = 0x1F80;
    /// Reset value of the x87 control word as KVM and QEMU have it.
    pub const X87_FCW_RESET: u16 = 0x037F;
    /// Reset value of DR6 (APM 14.1.3).
    pub const DR6_RESET: u64 = 0xFFFF_0FF0;
    /// Reset value of DR7.
    pub const DR7_RESET: u64 = 0x400;
    /// Reset value of CR0: caches off, extension type.
    pub const CR0_RESET: u64 = 0x6000_0010;

    /// A processor after reset (APM 14.1.3) that starts in real mode at the linear address
    /// `reset_eip`, with SVME set as VMRUN demands. SEV features and VMPL are the caller's.
    #[must_use]
    pub fn at_reset(reset_eip: u32) -> Self {
        let data = Segment {
            selector: 0,
            attributes: SegmentAttributes::DATA16,
            limit: 0xFFFF,
            base: 0,
        };
        let mut vmsa = Self::new_zeroed();
        vmsa.es = data;
        vmsa.ss = data;
        vmsa.ds = data;
        vmsa.fs = data;
        vmsa.gs = data;
        vmsa.cs = Segment {
            selector: 0xF000,
            attributes: SegmentAttributes::CODE16,
            limit: 0xFFFF,
            base: u64::from(reset_eip & 0xFFFF_0000),
        };
        vmsa.gdtr.limit = 0xFFFF;
        vmsa.idtr.limit = 0xFFFF;
        vmsa.ldtr = Segment {
            attributes: SegmentAttributes::LDT,
            limit: 0xFFFF,
            ..vmsa.ldtr
        };
        vmsa.tr = Segment {
            attributes: SegmentAttributes::TSS_BUSY,
            limit: 0xFFFF,
            ..vmsa.tr
        };
        vmsa.efer = Efer::SVME;
        vmsa.cr0 = Self::CR0_RESET;
        vmsa.dr6 = Self::DR6_RESET;
        vmsa.dr7 = Self::DR7_RESET;
        vmsa.rflags = 2;
        vmsa.rip = u64::from(reset_eip & 0xFFFF);
        vmsa.g_pat = Self::PAT_RESET;
        vmsa.xcr0 = 1;
        vmsa.mxcsr = Self::MXCSR_RESET;
        vmsa.x87_fcw = Self::X87_FCW_RESET;
        vmsa
    }

    /// Whether VMRUN would take it: SVME set and not busy (APM 15.36.16).
    #[must_use]
    pub const fn is_runnable(&self) -> bool {
        self.efer.0 & Efer::SVME.0 != 0 && self.vintr_control.0 & VintrControl::BUSY.0 == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reset_starts_at_the_reset_vector() {
        let vmsa = Vmsa::at_reset(0xFFFF_FFF0);
        assert_eq!(vmsa.cs.base + vmsa.rip, 0xFFFF_FFF0);
        assert_eq!(vmsa.rip, 0xFFF0);
        assert!(vmsa.is_runnable());
        let bytes = vmsa.as_bytes();
        assert_eq!(bytes[0x0D0..0x0D8], 0x1000u64.to_le_bytes());
        assert_eq!(bytes[0x012..0x014], 0x9Bu16.to_le_bytes());
    }

    #[test]
    fn a_stopped_or_busy_processor_is_not_runnable() {
        let mut vmsa = Vmsa::at_reset(0);
        vmsa.efer.remove(Efer::SVME);
        assert!(!vmsa.is_runnable());
        vmsa.efer.insert(Efer::SVME);
        vmsa.vintr_control.insert(VintrControl::BUSY);
        assert!(!vmsa.is_runnable());
    }
}
