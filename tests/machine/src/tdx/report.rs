//! TDG.MR.RTMR.EXTEND and TDG.MR.REPORT (§1, §11).

use alloc::format;

use hmac::{Hmac, Mac};
use protocols::tdx::report::{RTMR_COUNT, ReportMac, TdInfo, TdReport};
use protocols::tdx::vmcall::register::{R8, RCX, RDX};
use protocols::tdx::{Operand, Status};
use sha2::{Digest as _, Sha256, Sha384};
use zerocopy::{FromZeros, IntoBytes};

use super::tdcall::Gprs;
use super::{SHARED, Stop, Td};
use crate::access::Verdict;
use crate::memory::PhysicalMemory;
use crate::platform::Platform;
use crate::types::{Gpa, Kind, PageSize, Spa, Vmpl};

/// Where a structure that a leaf reads or writes may lie.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sharing {
    PrivateOnly,
    Either,
}

impl<P: PhysicalMemory> Platform<P> {
    /// The memory of an operand that does not cross pages; `None` if the address is none that the
    /// leaf takes.
    fn operand_memory(
        &mut self,
        address: u64,
        sharing: Sharing,
        kind: Kind,
    ) -> Result<Option<Spa>, Stop> {
        let shared = address & SHARED != 0;
        if address >= SHARED << 1 || (shared && sharing == Sharing::PrivateOnly) {
            return Ok(None);
        }
        let gpa = Gpa::new(address & !SHARED);
        match self.access(Vmpl::VMPL0, self.alias_of_bit(shared), gpa, kind) {
            Verdict::Map(mapping) => {
                let page = gpa.align_down(PageSize::Size4K);
                Ok(Some(mapping.spa.plus(gpa.get() - page.get())))
            }
            Verdict::NotValidated => {
                self.counters.count_td_exit(Vmpl::VMPL0, "operand");
                Err(Stop::Pending(gpa))
            }
            Verdict::Denied(denial) => Err(Stop::Refused(format!("operand at {gpa}: {denial}"))),
            Verdict::Mmio(_) => Err(Stop::Refused(format!("operand at {gpa}: no memory"))),
        }
    }

    /// TDG.MR.RTMR.EXTEND. The value is read before the index is looked at.
    pub(super) fn rtmr_extend(&mut self, gprs: &Gprs) -> Result<u64, Stop> {
        let (address, index) = (gprs[RCX], gprs[RDX]);
        if !address.is_multiple_of(64) {
            return Ok(Operand::RCX.invalid());
        }
        let Some(at) = self.operand_memory(address, Sharing::PrivateOnly, Kind::Read)? else {
            return Ok(Operand::RCX.invalid());
        };
        let mut value = [0; 48];
        self.memory.read(at, &mut value);
        if index >= RTMR_COUNT as u64 {
            return Ok(Operand::RDX.invalid());
        }
        if let Some(rtmr) = self.td_mut().and_then(|td| td.rtmr.get_mut(index as usize)) {
            *rtmr = Sha384::new()
                .chain_update(*rtmr)
                .chain_update(value)
                .finalize()
                .into();
        }
        Ok(Status::SUCCESS.with(0))
    }

    /// TDG.MR.REPORT. The data is read before the subtype is looked at, the report's place last.
    pub(super) fn mr_report(&mut self, gprs: &Gprs) -> Result<u64, Stop> {
        let (to, from, subtype) = (gprs[RCX], gprs[RDX], gprs[R8]);
        if !to.is_multiple_of(size_of::<TdReport>() as u64) {
            return Ok(Operand::RCX.invalid());
        }
        if !from.is_multiple_of(64) {
            return Ok(Operand::RDX.invalid());
        }
        let Some(from) = self.operand_memory(from, Sharing::Either, Kind::Read)? else {
            return Ok(Operand::RDX.invalid());
        };
        let mut report = TdReport::new_zeroed();
        self.memory.read(from, &mut report.mac.report_data);
        if subtype != 0 {
            return Ok(Operand::R8.invalid());
        }
        let Some(to) = self.operand_memory(to, Sharing::Either, Kind::Write)? else {
            return Ok(Operand::RCX.invalid());
        };
        if let Some(td) = self.td() {
            td.complete(&mut report);
        }
        self.memory.write(to, report.as_bytes());
        Ok(Status::SUCCESS.with(0))
    }
}

impl Td {
    /// Fills in all but the asker's data, and authenticates it with the processor's key.
    fn complete(&self, report: &mut TdReport) {
        report.td_info = TdInfo {
            attributes: self.attributes.bits(),
            xfam: super::launch::XFAM,
            mrtd: self.mrtd,
            rtmr: self.rtmr,
            ..TdInfo::new_zeroed()
        };
        report.mac.report_type = ReportMac::TYPE_TDX;
        report.mac.tee_tcb_info_hash = Sha384::digest(report.tee_tcb_info).into();
        report.mac.tee_info_hash = Sha384::digest(report.td_info.as_bytes()).into();
        report.mac.mac = [0; 32];
        let covered = size_of::<ReportMac>() - report.mac.mac.len();
        // A key of any length will do.
        if let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&self.mac_key) {
            mac.update(&report.mac.as_bytes()[..covered]);
            report.mac.mac = mac.finalize().into_bytes().into();
        }
    }
}
