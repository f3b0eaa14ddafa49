//! The state of the first processor on the native platform.
//!
//! The same start as in [`crate::vmsa`], as far as a processor without SEV has it: 64-bit mode on the
//! image's own page tables, interrupts off, the address of the launch parameters in RDI.

use igvm_defs::IgvmNativeVpContextX64;
use protocols::vmsa::Efer;
use zerocopy::FromZeros;

use crate::vmsa::{cr, selector};

/// Segment attributes as a descriptor has them from bit 40 on (IGVM, native VP context): present,
/// accessed, and code in 64-bit mode or data that can be written.
mod attributes {
    pub const CODE64: u16 = 0xA09B;
    pub const DATA32: u16 = 0xC093;
}

/// RFLAGS with nothing but the bit that is always one.
const RFLAGS_RESET: u64 = 2;

/// Builds the state: tables at `page_table_root`, first instruction at `entry`, launch parameters at
/// `params`.
pub fn context(page_table_root: u64, entry: u64, params: u64) -> IgvmNativeVpContextX64 {
    let mut context = IgvmNativeVpContextX64::new_zeroed();
    context.rip = entry;
    context.rdi = params;
    context.rflags = RFLAGS_RESET;
    context.code_selector = selector::CODE;
    context.code_attributes = attributes::CODE64;
    context.code_limit = u32::MAX;
    context.data_selector = selector::DATA;
    context.data_attributes = attributes::DATA32;
    context.data_limit = u32::MAX;
    context.cr0 = cr::CR0_LONG_MODE;
    context.cr3 = page_table_root;
    context.cr4 = cr::CR4_PAE;
    context.efer = (Efer::LME | Efer::LMA | Efer::NXE).bits();
    context
}
