//! The window onto the guest's memory, and copying through it.
//!
//! All of the guest's memory is mapped at [`GUEST_WINDOW`] by large user pages that cannot be
//! executed. The functions here turn a guest-physical address into an access; they check that
//! it lies in the window, nothing else. Whether a page may be touched is for the callers to
//! decide *before*, by its state in the map:
//!
//! - the engine's backend touches pages whose region it holds locked;
//! - the protocols touch Accepted pages and calling areas;
//! - the vCPU registry touches VMSAs.
//!
//! Pages that vanish under an access are reported, never fatal here.

use protocols::addr::{Gpa, PAGE_SIZE};
use zerocopy::{Immutable, IntoBytes};

use super::access;
use super::layout::{GUEST_WINDOW, WINDOW_SIZE};
use crate::platform::AccessFault;
use crate::protocol::{GuestMemory, Unreachable};

/// What an address outside the window is reported as: a page fault on a missing page.
pub const OUTSIDE: AccessFault = AccessFault {
    vector: 14,
    code: 0,
};

/// Virtual address of `bytes` bytes of guest memory.
///
/// # Errors
///
/// [`AccessFault`] if they are not all inside the window.
pub fn address(gpa: Gpa, bytes: u64) -> Result<u64, AccessFault> {
    match gpa.checked_add(bytes) {
        Some(end) if end.get() <= WINDOW_SIZE => Ok(GUEST_WINDOW + gpa.get()),
        _ => Err(OUTSIDE),
    }
}

/// The guest-physical address of `bytes` bytes at a virtual address; none if they are not all inside
/// the window.
#[must_use]
pub fn gpa(address: u64, bytes: u64) -> Option<Gpa> {
    let offset = address.checked_sub(GUEST_WINDOW)?;
    (offset.checked_add(bytes)? <= WINDOW_SIZE).then_some(Gpa::new(offset))
}

/// Copies bytes into guest memory.
///
/// # Errors
///
/// The fault; the memory may be written in part.
pub fn write(gpa: Gpa, data: &[u8]) -> Result<(), AccessFault> {
    access::copy_out(address(gpa, data.len() as u64)?, data)
}

/// Copies a value into guest memory.
///
/// # Errors
///
/// The fault; the memory may be written in part.
pub fn write_value<T: IntoBytes + Immutable>(gpa: Gpa, value: &T) -> Result<(), AccessFault> {
    write(gpa, value.as_bytes())
}

/// Copies a page of guest memory to another one.
///
/// # Errors
///
/// The fault; the target may be written in part.
pub fn copy_page(from: Gpa, to: Gpa) -> Result<(), AccessFault> {
    const PIECE: u64 = 256;
    let mut piece = [0; PIECE as usize];
    for offset in (0..PAGE_SIZE).step_by(PIECE as usize) {
        let at = |gpa: Gpa| gpa.checked_add(offset).ok_or(OUTSIDE);
        access::copy_in(address(at(from)?, PIECE)?, &mut piece)?;
        write(at(to)?, &piece)?;
    }
    Ok(())
}

/// The window as the protocols see it.
#[derive(Clone, Copy, Debug)]
pub struct Window;

impl GuestMemory for Window {
    fn read_u8(&self, gpa: Gpa) -> Result<u8, Unreachable> {
        address(gpa, 1)
            .and_then(access::load_u8)
            .map_err(|_| Unreachable)
    }

    fn read_u64(&self, gpa: Gpa) -> Result<u64, Unreachable> {
        address(gpa, 8)
            .and_then(access::load_u64)
            .map_err(|_| Unreachable)
    }

    fn write_u8(&self, gpa: Gpa, value: u8) -> Result<(), Unreachable> {
        write(gpa, &[value]).map_err(|_| Unreachable)
    }

    fn write_u16(&self, gpa: Gpa, value: u16) -> Result<(), Unreachable> {
        address(gpa, 2)
            .and_then(|at| access::store_u16(at, value))
            .map_err(|_| Unreachable)
    }

    fn read_bytes(&self, gpa: Gpa, bytes: &mut [u8]) -> Result<(), Unreachable> {
        address(gpa, bytes.len() as u64)
            .and_then(|at| access::copy_in(at, bytes))
            .map_err(|_| Unreachable)
    }

    fn write_bytes(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), Unreachable> {
        write(gpa, bytes).map_err(|_| Unreachable)
    }
}
