//! SEV-SNP: one unsafe function per instruction, and [`Snp`] on top of them.
//!
//! The status is decoded here and nowhere else. An instruction that may fault has a landing
//! pad ([`crate::exceptions::fixup`]); its fault comes back as a value. PVALIDATE's carry flag
//! is read in the same statement as the instruction: any instruction in between may change it
//! (facts: CF hidden by an XOR in an earlier SVSM).
//!
//! Guest pages are user pages, so accesses are bracketed by STAC and CLAC here and in
//! [`crate::memory::access`], and nowhere else.
#![expect(unsafe_code, reason = "the instructions themselves")]

use core::arch::asm;

use protocols::addr::{PAGE_SIZE, PageSize, Vmpl};
use protocols::snp::{Permissions, Pvalidate, ReturnCode, RmpAdjust, msr};
use protocols::vmsa::SevStatus;
use x86_64::registers::control::{Cr4, Cr4Flags};
use x86_64::registers::model_specific::Msr;

use super::{
    AccessFault, AdjustError, FailedAt, MappedBlock, MappedRun, Platform, Rights, ValidateError,
};
use crate::exceptions::fixup::guarded;
use crate::memory::access;

/// What PVALIDATE left behind.
struct PvalidateResult {
    status: ReturnCode,
    carry: bool,
}

/// PVALIDATE (APM volume 3; facts: snp-isa §3).
///
/// # Safety
///
/// 1. The page is not in use by Rust code: validating or rescinding changes its contents.
/// 2. The caller's books say that the page is in the other state.
unsafe fn pvalidate(block: MappedBlock, validate: bool) -> Result<PvalidateResult, AccessFault> {
    let operands = Pvalidate {
        size: block.size(),
        validate,
    };
    let carry: u8;
    let rax = guarded!(
        ".byte 0xf2, 0x0f, 0x01, 0xff", // pvalidate
        "setc {carry}";
        rax = block.address(),
        carry = out(reg_byte) carry,
        in("ecx") operands.ecx(),
        in("edx") operands.edx(),
    )?;
    Ok(PvalidateResult {
        status: ReturnCode(rax as u32),
        carry: carry != 0,
    })
}

/// RMPADJUST (APM volume 3; facts: snp-isa §4). Returns the status.
///
/// # Safety
///
/// Giving rights (or the VMSA attribute) hands the page to a lower privilege level: the page
/// holds nothing of the paravisor's and no Rust object lives in it.
unsafe fn rmpadjust(block: MappedBlock, target: RmpAdjust) -> Result<ReturnCode, AccessFault> {
    let rax = guarded!(
        ".byte 0xf3, 0x0f, 0x01, 0xfe"; // rmpadjust
        rax = block.address(),
        inout("rcx") u64::from(block.size().encoding()) => _,
        inout("rdx") target.0 => _,
    )?;
    Ok(ReturnCode(rax as u32))
}

/// PVALIDATE of small pages one after the other, up to the first that does not change its state.
/// Returns the address of the last page it was executed on, and what it left behind there.
///
/// # Safety
///
/// As [`pvalidate`], for each page.
unsafe fn pvalidate_run(
    run: MappedRun,
    validate: bool,
) -> (u64, Result<PvalidateResult, AccessFault>) {
    let operands = Pvalidate {
        size: PageSize::Size4K,
        validate,
    };
    let mut at = run.address();
    let carry: u8;
    let result = guarded!(
        ".byte 0xf2, 0x0f, 0x01, 0xff", // pvalidate
        "setc {carry}",
        "jc 4f",
        "test eax, eax",
        "jnz 4f",
        "cmp {at}, {last}",
        "jae 4f",
        "add {at}, {page}",
        "mov rax, {at}",
        "jmp 2b";
        rax = run.address(),
        carry = out(reg_byte) carry,
        at = inout(reg) at,
        last = in(reg) run.last(),
        page = const PAGE_SIZE,
        in("ecx") operands.ecx(),
        in("edx") operands.edx(),
    );
    let result = result.map(|rax| PvalidateResult {
        status: ReturnCode(rax as u32),
        carry: carry != 0,
    });
    (at, result)
}

/// RMPADJUST of small pages one after the other, up to the first that fails. Returns the address
/// of the last page it was executed on, and the status there.
///
/// # Safety
///
/// As [`rmpadjust`], for each page.
unsafe fn rmpadjust_run(
    run: MappedRun,
    target: RmpAdjust,
) -> (u64, Result<ReturnCode, AccessFault>) {
    let mut at = run.address();
    let result = guarded!(
        ".byte 0xf3, 0x0f, 0x01, 0xfe", // rmpadjust
        "test eax, eax",
        "jnz 4f",
        "cmp {at}, {last}",
        "jae 4f",
        "add {at}, {page}",
        "mov rax, {at}",
        "xor ecx, ecx",
        "mov rdx, {target}",
        "jmp 2b";
        rax = run.address(),
        at = inout(reg) at,
        last = in(reg) run.last(),
        target = in(reg) target.0,
        page = const PAGE_SIZE,
        inout("rcx") u64::from(PageSize::Size4K.encoding()) => _,
        inout("rdx") target.0 => _,
    );
    (at, result.map(|rax| ReturnCode(rax as u32)))
}

// What `rmpadjust_run` clears RCX for.
const _: () = assert!(PageSize::Size4K.encoding() == 0);

/// Leaves to the hypervisor (VMGEXIT, APM 15.35.6).
///
/// # Safety
///
/// The GHCB MSR holds a request of the MSR protocol, or the address of a GHCB page that was
/// filled by its owner.
pub unsafe fn vmgexit() {
    // SAFETY: the host may change the GHCB page and MSR, which nobody holds a reference into;
    // registers and other memory of this privilege level are protected from it.
    unsafe { asm!("rep vmmcall", options(nostack)) }
}

/// Reads SEV_STATUS; never intercepted.
#[must_use]
pub fn sev_status() -> SevStatus {
    // SAFETY: the MSR exists on every processor this image is launched on.
    SevStatus(unsafe { Msr::new(msr::SEV_STATUS).read() })
}

/// Reads the GHCB MSR.
#[must_use]
pub fn read_ghcb_msr() -> u64 {
    // SAFETY: reading has no side effect.
    unsafe { Msr::new(msr::GHCB).read() }
}

/// Writes the GHCB MSR. Without VMGEXIT it has no effect.
pub fn write_ghcb_msr(value: u64) {
    // SAFETY: the value is looked at by the host only, at the next VMGEXIT.
    unsafe { Msr::new(msr::GHCB).write(value) }
}

/// What the results of PVALIDATE mean.
fn validated(result: Result<PvalidateResult, AccessFault>) -> Result<(), ValidateError> {
    match result.map_err(ValidateError::Fault)? {
        PvalidateResult {
            status: ReturnCode::SUCCESS,
            carry: false,
        } => Ok(()),
        PvalidateResult {
            status: ReturnCode::SUCCESS,
            carry: true,
        } => Err(ValidateError::NoChange),
        PvalidateResult {
            status: ReturnCode::FAIL_SIZE_MISMATCH,
            ..
        } => Err(ValidateError::SizeMismatch),
        PvalidateResult { status, .. } => Err(ValidateError::Status(status.0)),
    }
}

/// What the results of RMPADJUST mean.
fn adjusted(result: Result<ReturnCode, AccessFault>) -> Result<(), AdjustError> {
    match result.map_err(AdjustError::Fault)? {
        ReturnCode::SUCCESS => Ok(()),
        ReturnCode::FAIL_SIZE_MISMATCH => Err(AdjustError::SizeMismatch),
        status => Err(AdjustError::Status(status.0)),
    }
}

/// The operand of RMPADJUST.
const fn operand(vmpl: Vmpl, rights: Rights) -> RmpAdjust {
    let (permissions, vmsa) = match rights {
        Rights::None => (Permissions::empty(), false),
        Rights::Full => (Permissions::FULL, false),
        Rights::Vmsa => (Permissions::empty(), true),
        Rights::ReadableVmsa => (Permissions::READ, true),
    };
    RmpAdjust::new(vmpl, permissions, vmsa)
}

/// The SEV-SNP processor.
#[derive(Clone, Copy, Debug)]
pub struct Snp {
    /// Whether the processor keeps C=0 and C=1 cache lines of a page coherent.
    pub cache_coherent: bool,
}

impl Snp {
    /// PVALIDATE with its result decoded.
    fn change(block: MappedBlock, validate: bool) -> Result<(), ValidateError> {
        // SAFETY: callers of `Platform` pass pages that no Rust object lives in (1) and are the
        // ones that keep the books (2).
        validated(unsafe { pvalidate(block, validate) })
    }

    /// Reads the first and the last byte of each 4 KiB page, which evicts lines cached under
    /// the page's former state where the processor does not do so (CVE-2025-38560).
    fn evict(block: MappedBlock) -> Result<(), AccessFault> {
        let end = block.address() + block.size().bytes();
        for page in (block.address()..end).step_by(4096) {
            access::load_u8(page)?;
            access::load_u8(page + 4095)?;
        }
        Ok(())
    }
}

impl Platform for Snp {
    fn validate(&self, block: MappedBlock) -> Result<(), ValidateError> {
        Self::change(block, true)?;
        if !self.cache_coherent {
            // The page is validated whatever happens here: the scrub that follows meets the
            // same fault and reports it.
            let _ = Self::evict(block);
        }
        Ok(())
    }

    fn validate_run(&self, run: MappedRun) -> Result<(), FailedAt<ValidateError>> {
        // SAFETY: as in `change`.
        let (at, result) = unsafe { pvalidate_run(run, true) };
        let result = validated(result).map_err(|error| FailedAt {
            index: run.index_of(at),
            error,
        });
        if !self.cache_coherent {
            let done = result.map_or_else(|failed| failed.index, |()| u64::MAX);
            for (block, _) in run.blocks().zip(0..done) {
                // As in `validate`.
                let _ = Self::evict(block);
            }
        }
        result
    }

    fn rescind(&self, block: MappedBlock) -> Result<(), ValidateError> {
        Self::change(block, false)
    }

    fn adjust(&self, block: MappedBlock, vmpl: Vmpl, rights: Rights) -> Result<(), AdjustError> {
        // SAFETY: callers of `Platform` hand over pages of the guest, or make a VMSA of a page of
        // their own that they have filled and will not touch as an object again.
        adjusted(unsafe { rmpadjust(block, operand(vmpl, rights)) })
    }

    fn adjust_run(
        &self,
        run: MappedRun,
        vmpl: Vmpl,
        rights: Rights,
    ) -> Result<(), FailedAt<AdjustError>> {
        // SAFETY: as in `adjust`.
        let (at, result) = unsafe { rmpadjust_run(run, operand(vmpl, rights)) };
        adjusted(result).map_err(|error| FailedAt {
            index: run.index_of(at),
            error,
        })
    }

    fn scrub(&self, block: MappedBlock) -> Result<(), AccessFault> {
        access::zero_page(block.address(), block.size())
    }

    fn flush_local(&self) {
        // All VMPLs of a guest share its ASID, so dropping everything here, global entries
        // included, drops the guest's translations on this processor too.
        let cr4 = Cr4::read();
        // SAFETY: PGE only decides whether global translations survive a CR3 load; toggling it
        // drops translations and changes nothing else.
        unsafe {
            Cr4::write(cr4 ^ Cr4Flags::PAGE_GLOBAL);
            Cr4::write(cr4);
        }
    }
}
