//! MSG_REPORT_REQ (`snp-launch.md` §7, §8).

use p384::ecdsa::Signature as EcdsaSignature;
use p384::ecdsa::signature::Signer;
use protocols::amd_sp::FirmwareStatus;
use protocols::amd_sp::report::{
    AttestationReport, KeySelect, ReportRequest, ReportResponse, Signature,
};
use zerocopy::FromZeros;

use super::{FIRMWARE, SecurityProcessor};

/// The lowest level there is.
const LAST_VMPL: u32 = 3;

impl SecurityProcessor {
    /// The answer to a request that came with the key of level `vmpck`.
    pub(super) fn report(&self, vmpck: u8, request: &ReportRequest) -> ReportResponse {
        let mut answer = ReportResponse::new_zeroed();
        match self.signed_report(vmpck, request) {
            Ok(report) => {
                answer.report = report;
                answer.header.report_size = AttestationReport::SIZE as u32;
            }
            Err(status) => answer.header.status = status,
        }
        answer
    }

    fn signed_report(
        &self,
        vmpck: u8,
        request: &ReportRequest,
    ) -> Result<AttestationReport, FirmwareStatus> {
        const KEYS: u32 = 0b11;
        let reserved = request.key_select.0 & !KEYS != 0 || request.reserved != [0; 24];
        if reserved {
            return Err(FirmwareStatus::INVALID_PARAM);
        }
        let chip = match (request.key_select, &self.chip) {
            (KeySelect::ANY | KeySelect::VCEK, Some(chip)) => chip,
            _ => return Err(FirmwareStatus::INVALID_KEY),
        };
        // Nobody speaks for a level above the key's own.
        if request.vmpl < u32::from(vmpck) || request.vmpl > LAST_VMPL {
            return Err(FirmwareStatus::INVALID_PARAM);
        }
        let guest = &self.guest;
        let mut report = AttestationReport {
            version: AttestationReport::VERSION,
            guest_svn: guest.identity.guest_svn,
            policy: guest.policy,
            family_id: guest.identity.family_id,
            image_id: guest.identity.image_id,
            vmpl: request.vmpl,
            key_info: u32::from(guest.identity.author_key_digest.is_some()),
            id_key_digest: guest.identity.id_key_digest,
            author_key_digest: guest.identity.author_key_digest.unwrap_or([0; 48]),
            signature_algorithm: AttestationReport::ECDSA_P384_SHA384,
            current_tcb: chip.tcb,
            report_data: request.report_data,
            measurement: guest.measurement,
            report_id: self.report_id,
            report_id_ma: [0xFF; 32],
            reported_tcb: chip.tcb,
            cpuid_fms: guest.cpuid_fms,
            chip_id: chip.id,
            committed_tcb: chip.tcb,
            current_firmware: FIRMWARE.reported(),
            committed_firmware: FIRMWARE.reported(),
            launch_tcb: chip.tcb,
            ..AttestationReport::new_zeroed()
        };
        let signature: EcdsaSignature = chip.vcek.sign(report.signed());
        let (r, s) = signature.split_bytes();
        report.signature = Signature {
            r: little_endian(&r),
            s: little_endian(&s),
            reserved: [0; 368],
        };
        Ok(report)
    }
}

/// A big-endian number as the firmware writes it.
fn little_endian(number: &[u8]) -> [u8; 72] {
    let mut bytes = [0; 72];
    for (to, from) in bytes.iter_mut().zip(number.iter().rev()) {
        *to = *from;
    }
    bytes
}
