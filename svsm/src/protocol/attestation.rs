//! The attestation protocol: a report on the paravisor and what it knows (SVSM 7, docs/protocol.md §6).
//!
//! The guest passes an operation, which names its buffers. Everything about them is checked before the
//! security processor is asked, and again when they are written: page after page, each while its region is
//! locked and the page is the guest's. So a buffer that another processor gives away meanwhile is not written
//! to, and never one that is not the guest's.

use accept::{Backend, PAGES_PER_REGION};
use protocols::addr::{Gpa, PAGE_SIZE};
use protocols::amd_sp::report::AttestationReport;
use protocols::svsm::ResultCode;
use protocols::svsm::attestation::{
    AttestationCall, Buffer, NONCE_SIZE, OPERATION_ALIGNMENT, ServicesManifest, ServicesOperation,
    SingleServiceOperation, TURNSTILE_SERVICE, TurnstileManifest,
};
use protocols::svsm::turnstile::LARGEST_LOOK;
use sha2::{Digest, Sha512};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::argument::ArgumentPage;
use super::{Finished, GuestMemory, Registers, Service, Stop, VcpuIndex, Vcpus, VmsaPages};
use crate::attestation::{CERTIFICATE_BYTES, Carrier, Refusal};

/// First byte that no guest-physical address reaches.
const ADDRESS_END: u64 = 1 << 52;

/// Bytes that are written to a manifest buffer at most.
const MANIFEST_BYTES: usize = size_of::<ServicesManifest>();

impl<B: Backend, M: GuestMemory, V: Vcpus, P: VmsaPages, C: Carrier> Service<'_, B, M, V, P, C> {
    pub(super) fn attestation(
        &self,
        caller: VcpuIndex,
        call: u32,
        registers: &mut Registers,
    ) -> Result<Finished, Stop> {
        match AttestationCall(call) {
            AttestationCall::SERVICES => {
                let operation: ServicesOperation = self.operation(caller, registers.rcx)?;
                let manifest = ServicesManifest::new(self.own_manifest());
                self.attest(&operation, manifest.as_bytes(), registers)?;
            }
            AttestationCall::SINGLE_SERVICE => {
                let operation: SingleServiceOperation = self.operation(caller, registers.rcx)?;
                if operation.reserved != 0
                    || operation.service != TURNSTILE_SERVICE
                    || operation.manifest_version != TurnstileManifest::VERSION
                {
                    return Err(ResultCode::INVALID_PARAMETER.into());
                }
                let manifest = self.own_manifest();
                self.attest(&operation.buffers, manifest.as_bytes(), registers)?;
            }
            _ => return Err(ResultCode::UNSUPPORTED_CALL.into()),
        }
        Ok(Finished::Returns)
    }

    /// Reads an operation, each word once.
    fn operation<T: FromZeros + FromBytes + IntoBytes>(
        &self,
        caller: VcpuIndex,
        rcx: u64,
    ) -> Result<T, Stop> {
        let gpa = Gpa::new(rcx);
        let offset = gpa.offset_in_page();
        if !rcx.is_multiple_of(OPERATION_ALIGNMENT) || offset + size_of::<T>() as u64 > PAGE_SIZE {
            return Err(ResultCode::INVALID_PARAMETER.into());
        }
        let area = self.vcpus.calling_area(caller);
        let page = ArgumentPage::around(self.engine, &self.memory, area, gpa);
        let mut operation = T::new_zeroed();
        page.read_bytes(offset, operation.as_mut_bytes())?;
        Ok(operation)
    }

    fn attest(
        &self,
        operation: &ServicesOperation,
        manifest: &[u8],
        registers: &mut Registers,
    ) -> Result<(), Stop> {
        check_form(operation)?;
        let nonce = self.nonce(&operation.nonce)?;
        let outputs = [
            (&operation.report, AttestationReport::SIZE),
            (&operation.manifest, MANIFEST_BYTES),
            (&operation.certificates, CERTIFICATE_BYTES),
        ];
        for (buffer, most) in outputs {
            self.check_output(buffer, most)?;
        }
        let data: [u8; 64] = Sha512::new()
            .chain_update(nonce)
            .chain_update(manifest)
            .finalize()
            .into();
        let wants_certificates = operation.certificates.size != 0;
        let delivered = self
            .line
            .report(&data, wants_certificates, |report, certificates| {
                let parts = [
                    (&operation.manifest, manifest),
                    (&operation.certificates, certificates),
                    (&operation.report, report.as_bytes()),
                ];
                let fits = |(buffer, bytes): &(&Buffer, &[u8])| bytes.len() <= buffer.size as usize;
                let all_fit = parts.iter().all(fits);
                if all_fit {
                    for (buffer, bytes) in parts {
                        self.deliver(buffer, bytes)?;
                    }
                }
                let [of_manifest, of_certificates, of_report] =
                    parts.map(|(_, bytes)| bytes.len() as u64);
                registers.rcx = of_manifest;
                registers.rdx = of_certificates;
                registers.r8 = of_report;
                if all_fit {
                    Ok(())
                } else {
                    Err(ResultCode::INVALID_PARAMETER.into())
                }
            });
        match delivered {
            Ok(ended) => ended,
            Err(Refusal::Busy) => Err(ResultCode::BUSY.into()),
            Err(Refusal::Failed | Refusal::HostLied) => Err(ResultCode::INVALID_REQUEST.into()),
        }
    }

    /// Reads the nonce, wherever it lies: it may cross into the next page.
    fn nonce(&self, buffer: &Buffer) -> Result<[u8; NONCE_SIZE as usize], Stop> {
        let mut nonce = [0; NONCE_SIZE as usize];
        let gpa = Gpa::new(buffer.gpa);
        let here = (PAGE_SIZE - gpa.offset_in_page()).min(u64::from(NONCE_SIZE)) as usize;
        let (first, second) = nonce.split_at_mut(here);
        self.guests(gpa).read_bytes(gpa.offset_in_page(), first)?;
        if !second.is_empty() {
            let next = Gpa::new(buffer.gpa + here as u64);
            self.guests(next).read_bytes(0, second)?;
        }
        Ok(nonce)
    }

    /// Checks that the pages of a buffer are the guest's, as far as they may be written to: `most` bytes.
    fn check_output(&self, buffer: &Buffer, most: usize) -> Result<(), Stop> {
        let bytes = u64::from(buffer.size).min(most as u64);
        for offset in (0..bytes).step_by(PAGE_SIZE as usize) {
            self.guests(Gpa::new(buffer.gpa + offset)).check()?;
        }
        Ok(())
    }

    fn deliver(&self, buffer: &Buffer, bytes: &[u8]) -> Result<(), Stop> {
        for (index, chunk) in (0..).zip(bytes.chunks(PAGE_SIZE as usize)) {
            let gpa = Gpa::new(buffer.gpa + index * PAGE_SIZE);
            self.guests(gpa).write_bytes(0, chunk)?;
        }
        Ok(())
    }

    /// A page that must be the guest's own. Its calling areas are not: a report must not write over a pending
    /// call.
    pub(super) fn guests(&self, gpa: Gpa) -> ArgumentPage<'_, B, M> {
        ArgumentPage::around(self.engine, &self.memory, None, gpa)
    }

    /// What the paravisor says about itself, now.
    fn own_manifest(&self) -> TurnstileManifest {
        let acceptance = self.ahead.acceptance();
        let (mut memory, mut countable, mut end) = (0, LARGEST_LOOK / PAGE_SIZE, 0);
        for range in self.engine.map().ranges() {
            memory += range.pages() * PAGE_SIZE;
            let pages = range.pages().min(countable);
            countable -= pages;
            if pages != 0 {
                end = (range.first().number() + pages).div_ceil(PAGES_PER_REGION as u64);
            }
        }
        let census = self.engine.census(0..end);
        TurnstileManifest {
            version: TurnstileManifest::VERSION,
            size: size_of::<TurnstileManifest>() as u32,
            policy: acceptance.policy.0,
            order: acceptance.order.0,
            budget: self.ahead.budget(),
            read_ahead: acceptance.read_ahead,
            reserved: 0,
            memory_bytes: memory,
            counted_bytes: census.unaccepted + census.ahead + census.accepted + census.owned,
            unaccepted_bytes: census.unaccepted,
            ahead_bytes: census.ahead,
            accepted_bytes: census.accepted,
            owned_bytes: census.owned,
            repeated_requests: self.vcpus.unchanged(),
            host_lies: self.line.host_lies(),
        }
    }
}

/// Checks what can be seen without looking at memory. Sizes may be anything: no more is touched than is needed.
fn check_form(operation: &ServicesOperation) -> Result<(), ResultCode> {
    let ServicesOperation {
        report,
        nonce,
        manifest,
        certificates,
    } = operation;
    let all = [report, nonce, manifest, certificates];
    let aligned = |buffer: &&Buffer| buffer.size == 0 || buffer.gpa.is_multiple_of(PAGE_SIZE);
    if all.iter().any(|buffer| buffer.reserved != 0)
        || nonce.size != u32::from(NONCE_SIZE)
        || ![report, manifest, certificates].iter().all(aligned)
    {
        return Err(ResultCode::INVALID_PARAMETER);
    }
    // A buffer of no size is nowhere.
    let mut ranges = [(0, 0); 4];
    let used = all.iter().filter(|buffer| buffer.size != 0);
    for (range, buffer) in ranges.iter_mut().zip(used) {
        let end = buffer.gpa.checked_add(buffer.size.into());
        *range = match end {
            Some(end) if end <= ADDRESS_END => (buffer.gpa, end),
            _ => return Err(ResultCode::INVALID_ADDRESS),
        };
    }
    let mut rest = ranges.as_slice();
    while let Some((&(start, end), others)) = rest.split_first() {
        let overlaps = |other: &(u64, u64)| start < other.1 && other.0 < end;
        if others.iter().any(overlaps) {
            return Err(ResultCode::INVALID_PARAMETER);
        }
        rest = others;
    }
    Ok(())
}
