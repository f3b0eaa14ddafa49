//! Buffers for calls, and the calls.
//!
//! Buffers are pages of regions of their own, so that whatever is written beside them is seen.

use guest::harness::{Finding, Verdict, expect, expect_not};
use guest::memory::{self, page_of};
use guest::svsm::{self, Caller, Registers};
use protocols::addr::{Gpa, PAGE_SIZE};
use protocols::amd_sp::report::AttestationReport;
use protocols::svsm::ResultCode;
use protocols::svsm::attestation::{AttestationCall, Buffer, ServicesManifest, ServicesOperation};
use sha2::{Digest, Sha512};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::setup::{accepted_region, unchanged};

/// What buffers hold before a call: a value of its own in each line.
pub const SEED: u64 = 0xB1A2_0000_0000;
const BUSY_TRIES: u32 = 1_000_000;

/// Buffers in a region: the nonce from the end of page 0 into page 1, report in 2, manifest in 3, certificates in
/// 4 to 7.
#[derive(Clone, Copy)]
pub struct Place(pub Gpa);

pub const REPORT_PAGE: u64 = 2;
pub const MANIFEST_PAGE: u64 = 3;
pub const CERTIFICATE_PAGE: u64 = 4;
pub const END_PAGE: u64 = 8;
/// Half of the nonce lies in page 0, the other half in page 1.
pub const NONCE_OFFSET: u64 = PAGE_SIZE - 32;

/// The nonce of caller `number`; no two bytes of it are alike.
pub fn nonce_of(number: u8) -> [u8; 64] {
    core::array::from_fn(|index| number.wrapping_add(index as u8))
}

pub const fn buffer(gpa: Gpa, size: u32) -> Buffer {
    Buffer {
        gpa: gpa.get(),
        size,
        reserved: 0,
    }
}

impl Place {
    pub fn new() -> Result<Self, Finding> {
        accepted_region().map(Self)
    }

    pub fn page(self, index: u64) -> Gpa {
        page_of(self.0, index)
    }

    pub fn nonce(self) -> Gpa {
        Gpa::new(self.0.get() + NONCE_OFFSET)
    }

    /// The nonce of caller `number`.
    pub fn put_nonce(self, number: u8) -> Verdict {
        memory::put_bytes(self.nonce().get(), &nonce_of(number))
    }

    pub fn operation(self) -> ServicesOperation {
        ServicesOperation {
            report: buffer(self.page(REPORT_PAGE), PAGE_SIZE as u32),
            nonce: buffer(self.nonce(), 64),
            manifest: buffer(self.page(MANIFEST_PAGE), PAGE_SIZE as u32),
            certificates: buffer(self.page(CERTIFICATE_PAGE), 4 * PAGE_SIZE as u32),
        }
    }

    pub fn blank(self) -> Verdict {
        let bytes = (END_PAGE - REPORT_PAGE) * PAGE_SIZE;
        memory::fill(self.page(REPORT_PAGE).get(), bytes, SEED)
    }

    pub fn expect_blank(self) -> Verdict {
        let bytes = (END_PAGE - REPORT_PAGE) * PAGE_SIZE;
        memory::expect_filled(self.page(REPORT_PAGE).get(), bytes, SEED)
    }

    pub fn report(self) -> Result<AttestationReport, Finding> {
        let mut report = AttestationReport::new_zeroed();
        memory::take_bytes(self.page(REPORT_PAGE).get(), report.as_mut_bytes())?;
        Ok(report)
    }

    pub fn manifest<T: FromZeros + FromBytes + IntoBytes>(self) -> Result<T, Finding> {
        let mut manifest = T::new_zeroed();
        memory::take_bytes(self.page(MANIFEST_PAGE).get(), manifest.as_mut_bytes())?;
        Ok(manifest)
    }

    /// Report and manifest belong together, and to the nonce of caller `number`.
    pub fn expect_answer<T: FromZeros + FromBytes + IntoBytes>(
        self,
        number: u8,
    ) -> Result<T, Finding> {
        let report = self.report()?;
        expect("version and VMPL", (report.version, report.vmpl), (3, 0))?;
        expect_not("MEASUREMENT", report.measurement, [0; 48])?;
        let mut manifest: T = self.manifest()?;
        let data = Sha512::new()
            .chain_update(nonce_of(number))
            .chain_update(manifest.as_mut_bytes())
            .finalize();
        expect("REPORT_DATA", report.report_data[..] == data[..], true)?;
        Ok(manifest)
    }
}

/// Passes an operation in the calling area of `caller`.
pub fn pass_by(
    caller: Caller,
    id: AttestationCall,
    operation: &[u8],
) -> Result<(ResultCode, Registers), Finding> {
    let at = caller.0.get() + protocols::svsm::CallingArea::BUFFER_OFFSET as u64;
    memory::put_bytes(at, operation)?;
    let registers = Registers {
        rcx: at,
        rdx: u64::MAX,
        r8: u64::MAX,
        r9: 0,
    };
    for _ in 0..BUSY_TRIES {
        match caller.call_of(id.id(), registers)? {
            (ResultCode::BUSY, _) => {}
            answer => return Ok(answer),
        }
    }
    Err(Finding::new(format_args!("BUSY {BUSY_TRIES} times")))
}

pub fn pass(id: AttestationCall, operation: &[u8]) -> Result<(ResultCode, Registers), Finding> {
    pass_by(Caller(svsm::calling_area()), id, operation)
}

pub fn ask(operation: &ServicesOperation) -> Result<(ResultCode, Registers), Finding> {
    pass(AttestationCall::SERVICES, operation.as_bytes())
}

pub fn sizes(registers: &Registers) -> (u64, u64, u64) {
    (registers.rcx, registers.rdx, registers.r8)
}

/// Bytes of manifest and report.
pub const MANIFEST: u64 = size_of::<ServicesManifest>() as u64;
pub const REPORT: u64 = AttestationReport::SIZE as u64;

/// The call must be refused with `code`: registers as they were, nothing written, no page changed.
pub fn refused(place: Place, operation: &ServicesOperation, code: ResultCode) -> Verdict {
    place.blank()?;
    let pages = [place.0, place.page(REPORT_PAGE), place.page(END_PAGE)];
    unchanged(&pages, || {
        let (result, registers) = ask(operation)?;
        expect("result", result, code)?;
        let untouched = (svsm::buffer().get(), u64::MAX, u64::MAX);
        expect("RCX, RDX, R8", sizes(&registers), untouched)
    })?;
    place.expect_blank()
}
