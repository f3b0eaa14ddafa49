//! What the cases shared with `tdx_cases` need of its module of this name.

use guest::harness::Finding;
use guest::insn::{self, CpuidResult};

/// CPUID that must not raise an exception.
///
/// # Errors
///
/// A finding with the exception.
pub fn cpuid(leaf: u32) -> Result<CpuidResult, Finding> {
    insn::cpuid(leaf, 0).map_err(|trap| Finding::new(format_args!("CPUID {leaf:#x}: {trap:x?}")))
}
