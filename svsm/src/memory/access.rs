//! The only instructions that touch memory which somebody else controls.
//!
//! Guest pages are mapped as user pages. With SMAP on, any other instruction that reaches one
//! faults instead of leaking; these set AC for their own duration. Each may fault (the host can
//! take any page away) and then returns the fault.
//!
//! All take virtual addresses. A wrong address is a fault, never undefined behaviour for the
//! paravisor's own objects, as long as callers stay in the guest window
//! ([`super::guest_map`]), or pass pages of their own that hold no Rust object.
#![expect(unsafe_code, reason = "the accesses themselves")]

use protocols::addr::{LARGE_PAGE_SIZE, PAGE_SIZE, PageSize};

use crate::exceptions::fixup::{fixup, guarded};
use crate::platform::AccessFault;

/// Copies `data` to `address`.
///
/// # Errors
///
/// The fault; the memory may be written in part.
pub fn copy_out(address: u64, data: &[u8]) -> Result<(), AccessFault> {
    guarded!("rep movsb"; rax = 0,
        inout("rcx") data.len() => _,
        inout("rsi") data.as_ptr() => _,
        inout("rdi") address => _,
    )
    .map(drop)
}

/// Copies from `address` into `data`.
///
/// # Errors
///
/// The fault; `data` may be written in part.
pub fn copy_in(address: u64, data: &mut [u8]) -> Result<(), AccessFault> {
    guarded!("rep movsb"; rax = 0,
        inout("rcx") data.len() => _,
        inout("rsi") address => _,
        inout("rdi") data.as_mut_ptr() => _,
    )
    .map(drop)
}

/// Fills `bytes` bytes (a multiple of 8) at `address` with zeros.
///
/// # Errors
///
/// The fault; the memory may be filled in part.
pub fn fill_zero(address: u64, bytes: u64) -> Result<(), AccessFault> {
    guarded!("rep stosq"; rax = 0,
        inout("rcx") bytes / 8 => _,
        inout("rdi") address => _,
    )
    .map(drop)
}

/// Fills the page of this size at `address` with zeros: through the caches what its owner is about to
/// use, past them what is too large for that.
///
/// # Errors
///
/// The fault; the page may be filled in part.
pub fn zero_page(address: u64, size: PageSize) -> Result<(), AccessFault> {
    match size {
        PageSize::Size4K => fill_zero(address, PAGE_SIZE),
        PageSize::Size2M => stream_zeros(address),
    }
}

/// Bytes that one round of [`stream_zeros`] writes.
const STREAM_STEP: u64 = 512;
const _: () = assert!(LARGE_PAGE_SIZE.is_multiple_of(STREAM_STEP));

/// Fills the large page at `address` with zeros, past the caches: new memory is in none of them, and
/// nobody reads all of it soon (decision 021). The zeros are in memory when this returns.
///
/// Leaves zero in XMM0. The paravisor has nothing there, and what the guest has there is in its VMSA
/// while the paravisor runs.
///
/// # Errors
///
/// The fault; the memory may be filled in part.
#[inline(never)]
fn stream_zeros(address: u64) -> Result<(), AccessFault> {
    guarded!(
        "xorps xmm0, xmm0",
        "5:",
        ".irp line, 0, 64, 128, 192, 256, 320, 384, 448",
        ".irp part, 0, 16, 32, 48",
        "6:",
        "movntps [{end} + {at} + \\line + \\part], xmm0",
        fixup!("6b", "3f"),
        ".endr",
        ".endr",
        "add {at}, {step}",
        "jnz 5b",
        // These stores are not ordered with others, such as the one that releases a lock.
        "sfence";
        rax = 0,
        end = in(reg) address.wrapping_add(LARGE_PAGE_SIZE),
        at = inout(reg) LARGE_PAGE_SIZE.wrapping_neg() => _,
        step = const STREAM_STEP,
        // There is no such register to a compiler that must not use it.
        #[cfg(target_feature = "sse")]
        out("xmm0") _,
    )
    .map(drop)
}

/// Whether `bytes` bytes (a multiple of 8) at `address` are all zero.
///
/// # Errors
///
/// The fault.
pub fn is_zero(address: u64, bytes: u64) -> Result<bool, AccessFault> {
    // With nothing to compare the flags would be those of before.
    if bytes / 8 == 0 {
        return Ok(true);
    }
    // The first word that is not zero ends the loop with ZF clear.
    let same: u8;
    guarded!("repe scasq", "sete {same}"; rax = 0,
        same = out(reg_byte) same,
        inout("rcx") bytes / 8 => _,
        inout("rdi") address => _,
    )?;
    Ok(same != 0)
}

/// Reads one byte.
///
/// # Errors
///
/// The fault.
pub fn load_u8(address: u64) -> Result<u8, AccessFault> {
    guarded!("movzx eax, byte ptr [{address}]"; rax = 0, address = in(reg) address)
        .map(|value| value as u8)
}

/// Reads 64 bits at once.
///
/// # Errors
///
/// The fault.
pub fn load_u64(address: u64) -> Result<u64, AccessFault> {
    guarded!("mov rax, [{address}]"; rax = 0, address = in(reg) address)
}

/// Writes 64 bits at once.
///
/// # Errors
///
/// The fault; nothing was written.
pub fn store_u64(address: u64, value: u64) -> Result<(), AccessFault> {
    guarded!("mov [{address}], rax"; rax = value, address = in(reg) address).map(drop)
}

/// Writes 16 bits at once.
///
/// # Errors
///
/// The fault; nothing was written.
pub fn store_u16(address: u64, value: u16) -> Result<(), AccessFault> {
    guarded!("mov [{address}], ax"; rax = value.into(), address = in(reg) address).map(drop)
}

/// Clears bits of a 64-bit word as one locked operation.
///
/// # Errors
///
/// The fault; nothing was written.
pub fn clear_bits(address: u64, bits: u64) -> Result<(), AccessFault> {
    guarded!("lock and [{address}], rax"; rax = !bits, address = in(reg) address).map(drop)
}

/// Sets bits of a 64-bit word as one locked operation.
///
/// # Errors
///
/// The fault; nothing was written.
pub fn set_bits(address: u64, bits: u64) -> Result<(), AccessFault> {
    guarded!("lock or [{address}], rax"; rax = bits, address = in(reg) address).map(drop)
}
