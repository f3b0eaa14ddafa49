//! Guest memory as the cases see it: two aliases of everything, and pages nobody used yet.
//!
//! Both programs map all guest-physical memory twice by 1 GiB pages: at VA = GPA private
//! (C-bit set) and at VA = GPA + [`SHARED_ALIAS`] shared. Pages handed out here lie far from
//! the programs, so no Rust object ever lives in them.

use core::sync::atomic::{AtomicU64, Ordering};

use protocols::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE};
use protocols::launch::{REGION_GPA, REGION_SIZE};

use crate::harness::{Finding, Verdict, expect};
use crate::insn;
use crate::trap::Trap;

/// Distance from the private to the shared mapping: one entry of the top-level page table.
pub const SHARED_ALIAS: u64 = 1 << 39;
/// First byte of the memory the cases use. Everything below belongs to the programs, the
/// paravisor, the firmware areas and the legacy devices.
pub const POOL_START: u64 = REGION_GPA + REGION_SIZE;
/// End of that memory; the smallest machine the tests are run on has 2 GiB below 4 GiB, of
/// which the machine keeps less than 256 MiB.
const POOL_END: u64 = 0x7000_0000;

/// The granularity in which contents are compared: the scramble pattern differs in every
/// cache line.
const LINE: u64 = 64;

static NEXT: AtomicU64 = AtomicU64::new(POOL_START);

/// `count` consecutive 2 MiB regions that no case has touched.
pub fn fresh_regions(count: u64) -> Gpa {
    let start = NEXT.fetch_add(count * LARGE_PAGE_SIZE, Ordering::Relaxed);
    assert!(
        start + count * LARGE_PAGE_SIZE <= POOL_END,
        "the cases use more memory than planned"
    );
    Gpa::new(start)
}

/// A 2 MiB region that no case has touched.
pub fn fresh_region() -> Gpa {
    fresh_regions(1)
}

/// A page in the middle of a region of its own.
pub fn fresh_page() -> Gpa {
    page_of(fresh_region(), 5)
}

/// Page number `index` counted from `base`.
pub fn page_of(base: Gpa, index: u64) -> Gpa {
    Gpa::new(base.get() + index * PAGE_SIZE)
}

/// The virtual address of the private mapping.
pub fn private(gpa: Gpa) -> u64 {
    gpa.get()
}

/// The virtual address of the shared mapping.
pub fn shared(gpa: Gpa) -> u64 {
    gpa.get() + SHARED_ALIAS
}

fn faulted(what: &str, address: u64, trap: Trap) -> Finding {
    Finding::new(format_args!("{what} at {address:#x}: {trap:x?}"))
}

/// Reads eight bytes that must be readable.
///
/// # Errors
///
/// A finding with the exception.
pub fn read(address: u64) -> Result<u64, Finding> {
    insn::load(address).map_err(|trap| faulted("read", address, trap))
}

/// Writes eight bytes that must be writable.
///
/// # Errors
///
/// A finding with the exception.
pub fn write(address: u64, value: u64) -> Verdict {
    insn::store(address, value).map_err(|trap| faulted("write", address, trap))
}

/// Writes a value into every line of `bytes` from `address` on, different in each.
///
/// # Errors
///
/// A finding with the exception.
pub fn fill(address: u64, bytes: u64, seed: u64) -> Verdict {
    for line in lines(address, bytes) {
        write(line, seed ^ line)?;
    }
    Ok(())
}

/// Demands that what [`fill`] wrote is still there.
///
/// # Errors
///
/// A finding for the first line that differs.
pub fn expect_filled(address: u64, bytes: u64, seed: u64) -> Verdict {
    for line in lines(address, bytes) {
        expect("content of a kept line", read(line)?, seed ^ line)?;
    }
    Ok(())
}

/// Demands that every line is zero.
///
/// # Errors
///
/// A finding for the first line that is not.
pub fn expect_zero(address: u64, bytes: u64) -> Verdict {
    for line in lines(address, bytes) {
        expect("content of a new line", read(line)?, 0)?;
    }
    Ok(())
}

fn lines(address: u64, bytes: u64) -> impl Iterator<Item = u64> {
    (address..address + bytes).step_by(LINE as usize)
}

/// Writes whole words, which must be writable.
///
/// # Errors
///
/// A finding with the exception.
pub fn put_bytes(address: u64, bytes: &[u8]) -> Verdict {
    assert!(bytes.len().is_multiple_of(8), "whole words");
    for (at, word) in (address..).step_by(8).zip(bytes.chunks_exact(8)) {
        write(
            at,
            word.iter()
                .rev()
                .fold(0, |all, &byte| all << 8 | u64::from(byte)),
        )?;
    }
    Ok(())
}

/// Reads whole words, which must be readable.
///
/// # Errors
///
/// A finding with the exception.
pub fn take_bytes(address: u64, bytes: &mut [u8]) -> Verdict {
    assert!(bytes.len().is_multiple_of(8), "whole words");
    for (at, word) in (address..).step_by(8).zip(bytes.chunks_exact_mut(8)) {
        word.copy_from_slice(&read(at)?.to_le_bytes());
    }
    Ok(())
}
