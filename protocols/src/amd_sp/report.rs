//! Attestation reports (SNP ABI, MSG_REPORT_REQ and ATTESTATION_REPORT).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::FirmwareStatus;

/// Payload of the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ReportRequest {
    /// Goes into the report as it is.
    pub report_data: [u8; 64],
    /// The level that the report is to speak for; not above the key's.
    pub vmpl: u32,
    /// Bits 1:0: which key signs, [`KeySelect`].
    pub key_select: KeySelect,
    /// Reserved, zero.
    pub reserved: [u8; 24],
}

open_enum! {
    /// Which key signs a report, or is the root of a derived key.
    pub struct KeySelect(u32) {
        /// The VLEK if there is one, else the VCEK.
        ANY = 0,
        /// The VCEK: of the chip.
        VCEK = 1,
        /// The VLEK: of the cloud provider.
        VLEK = 2,
    }
}

/// What precedes the report in the payload of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ReportResponseHeader {
    /// Whether there is a report.
    pub status: FirmwareStatus,
    /// Bytes of the report.
    pub report_size: u32,
    /// Reserved.
    pub reserved: [u8; 24],
}

/// Payload of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ReportResponse {
    /// Whether there is a report.
    pub header: ReportResponseHeader,
    /// The report.
    pub report: AttestationReport,
}

/// R and S of a signature, or the coordinates of a point, as this firmware writes them: 72 bytes each, little
/// endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Signature {
    /// R.
    pub r: [u8; 72],
    /// S.
    pub s: [u8; 72],
    /// Zero.
    pub reserved: [u8; 368],
}

/// The report, version 3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AttestationReport {
    /// Version of this layout.
    pub version: u32,
    /// Security version of the guest, from its ID block.
    pub guest_svn: u32,
    /// Guest policy.
    pub policy: u64,
    /// From the ID block.
    pub family_id: [u8; 16],
    /// From the ID block.
    pub image_id: [u8; 16],
    /// The level that the report speaks for.
    pub vmpl: u32,
    /// [`Self::ECDSA_P384_SHA384`].
    pub signature_algorithm: u32,
    /// Version of the platform's parts as they run.
    pub current_tcb: u64,
    /// What the platform has turned on.
    pub platform_info: u64,
    /// Bit 0: there is an author key; 1: the chip key is masked; 4:2: who signed.
    pub key_info: u32,
    /// Reserved.
    pub reserved_04c: u32,
    /// As requested.
    pub report_data: [u8; 64],
    /// Launch digest.
    pub measurement: [u8; 48],
    /// Given by the host at launch.
    pub host_data: [u8; 32],
    /// Digest of the key that signed the ID block.
    pub id_key_digest: [u8; 48],
    /// Digest of the key that signed that key.
    pub author_key_digest: [u8; 48],
    /// Made at random at launch.
    pub report_id: [u8; 32],
    /// The same of the guest's migration agent; all ones without one.
    pub report_id_ma: [u8; 32],
    /// The version that the VCEK was made for.
    pub reported_tcb: u64,
    /// Family, model and stepping of the processor (from version 3 on).
    pub cpuid_fms: [u8; 3],
    /// Reserved.
    pub reserved_18b: [u8; 21],
    /// The chip, or zero if it is masked.
    pub chip_id: [u8; 64],
    /// The version that the platform does not go back behind.
    pub committed_tcb: u64,
    /// Build, minor, major of the firmware as it runs, and a reserved byte.
    pub current_firmware: [u8; 4],
    /// The same as committed.
    pub committed_firmware: [u8; 4],
    /// The version at launch.
    pub launch_tcb: u64,
    /// Reserved.
    pub reserved_1f8: [u8; 168],
    /// Over all before it.
    pub signature: Signature,
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<ReportRequest>() == 0x60);
    assert!(offset_of!(ReportRequest, vmpl) == 0x40);
    assert!(offset_of!(ReportRequest, key_select) == 0x44);
    assert!(size_of::<ReportResponseHeader>() == 0x20);
    assert!(size_of::<ReportResponse>() == 0x4C0);
    assert!(size_of::<Signature>() == 512);
    assert!(size_of::<AttestationReport>() == 0x4A0);
    assert!(offset_of!(AttestationReport, vmpl) == 0x030);
    assert!(offset_of!(AttestationReport, key_info) == 0x048);
    assert!(offset_of!(AttestationReport, report_data) == 0x050);
    assert!(offset_of!(AttestationReport, measurement) == 0x090);
    assert!(offset_of!(AttestationReport, host_data) == 0x0C0);
    assert!(offset_of!(AttestationReport, id_key_digest) == 0x0E0);
    assert!(offset_of!(AttestationReport, author_key_digest) == 0x110);
    assert!(offset_of!(AttestationReport, report_id) == 0x140);
    assert!(offset_of!(AttestationReport, report_id_ma) == 0x160);
    assert!(offset_of!(AttestationReport, reported_tcb) == 0x180);
    assert!(offset_of!(AttestationReport, cpuid_fms) == 0x188);
    assert!(offset_of!(AttestationReport, chip_id) == 0x1A0);
    assert!(offset_of!(AttestationReport, committed_tcb) == 0x1E0);
    assert!(offset_of!(AttestationReport, current_firmware) == 0x1E8);
    assert!(offset_of!(AttestationReport, launch_tcb) == 0x1F0);
    assert!(offset_of!(AttestationReport, signature) == AttestationReport::SIGNED);
};

impl AttestationReport {
    /// The version described here.
    pub const VERSION: u32 = 3;
    /// ECDSA on P-384 with SHA-384.
    pub const ECDSA_P384_SHA384: u32 = 1;
    /// Bytes of the report.
    pub const SIZE: usize = size_of::<Self>();
    /// Bytes that are signed: all before the signature.
    pub const SIGNED: usize = 0x2A0;

    /// The bytes that are signed.
    #[must_use]
    pub fn signed(&self) -> &[u8] {
        self.as_bytes().get(..Self::SIGNED).unwrap_or_default()
    }
}
