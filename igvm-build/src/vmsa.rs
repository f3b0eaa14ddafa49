//! The state of the first virtual processor at VMPL0.
//!
//! It starts in 64-bit mode on the image's own page tables, interrupts off, with the address
//! of the launch parameters in RDI. Only fields that QEMU's loader accepts are set (QEMU
//! `target/i386/sev.c`, `check_vmsa_supported`); everything else is as after reset or zero.

use protocols::vmsa::{Efer, Segment, SegmentAttributes, SevFeatures, Vmsa};

/// Control register bits (APM volume 2, §3.1).
pub(crate) mod cr {
    /// PE, ET, NE, WP, PG.
    pub const CR0_LONG_MODE: u64 = 1 << 0 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
    pub const CR4_PAE: u64 = 1 << 5;
}

/// Selectors of the segments. No descriptor table is behind them: the entry code loads its own
/// before it touches a segment register.
pub(crate) mod selector {
    pub const CODE: u16 = 0x08;
    pub const DATA: u16 = 0x10;
}

/// What differs from image to image.
#[derive(Debug, Clone, Copy)]
pub struct Start {
    /// Root of the page tables, without C-bit.
    pub page_table_root: u64,
    /// Position of the C-bit.
    pub c_bit: u32,
    /// First instruction.
    pub entry: u64,
    /// Guest-physical address of the launch parameters.
    pub params: u64,
}

/// Builds the VMSA of the first virtual processor.
pub fn build(start: &Start) -> Vmsa {
    let mut vmsa = Vmsa::at_reset(0);
    let flat = |selector, attributes| Segment {
        selector,
        attributes,
        limit: u32::MAX,
        base: 0,
    };
    let data = flat(selector::DATA, SegmentAttributes::DATA32);
    vmsa.cs = flat(selector::CODE, SegmentAttributes::CODE64);
    vmsa.ds = data;
    vmsa.es = data;
    vmsa.fs = data;
    vmsa.gs = data;
    vmsa.ss = data;
    // The reset limits would describe tables at address 0; there are none.
    vmsa.gdtr.limit = 0;
    vmsa.idtr.limit = 0;

    vmsa.cr0 = cr::CR0_LONG_MODE;
    vmsa.cr3 = start.page_table_root | 1 << start.c_bit;
    vmsa.cr4 = cr::CR4_PAE;
    vmsa.efer = Efer::LME | Efer::LMA | Efer::NXE | Efer::SVME;

    vmsa.rip = start.entry;
    vmsa.rdi = start.params;
    vmsa.sev_features = SevFeatures::SNP_ACTIVE;
    vmsa
}
