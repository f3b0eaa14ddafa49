//! TDREPORT_STRUCT: what TDG.MR.REPORT says about the trust domain, authenticated by the processor.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A SHA-384 value.
pub type Digest = [u8; 48];

/// Runtime measurement registers of a trust domain.
pub const RTMR_COUNT: usize = 4;

/// Bytes that the asker may have put into the report.
pub const REPORT_DATA_SIZE: usize = 64;

/// TDREPORT_STRUCT.
#[derive(Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TdReport {
    /// REPORTMACSTRUCT.
    pub mac: ReportMac,
    /// TEE_TCB_INFO.
    pub tee_tcb_info: [u8; 239],
    /// Zero.
    pub reserved: [u8; 17],
    /// TDINFO_STRUCT.
    pub td_info: TdInfo,
}

/// REPORTMACSTRUCT.
#[derive(Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ReportMac {
    /// What kind of report: [`ReportMac::TYPE_TDX`].
    pub report_type: [u8; 4],
    /// Zero.
    pub reserved_1: [u8; 12],
    /// Security version of the processor.
    pub cpu_svn: [u8; 16],
    /// SHA-384 of TEE_TCB_INFO.
    pub tee_tcb_info_hash: Digest,
    /// SHA-384 of TDINFO_STRUCT.
    pub tee_info_hash: Digest,
    /// What the asker gave.
    pub report_data: [u8; REPORT_DATA_SIZE],
    /// Zero.
    pub reserved_2: [u8; 32],
    /// Message authentication code over all before it.
    pub mac: [u8; 32],
}

impl ReportMac {
    /// TDX, subtype 0, without service trust domains.
    pub const TYPE_TDX: [u8; 4] = [0x81, 0, 0, 0];
}

/// TDINFO_STRUCT.
#[derive(Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TdInfo {
    /// ATTRIBUTES.
    pub attributes: u64,
    /// XFAM: the extended features that are on.
    pub xfam: u64,
    /// Measurement of the launch.
    pub mrtd: Digest,
    /// Chosen by the host.
    pub mr_config_id: Digest,
    /// Chosen by the host.
    pub mr_owner: Digest,
    /// Chosen by the host.
    pub mr_owner_config: Digest,
    /// Measurements by the guest.
    pub rtmr: [Digest; RTMR_COUNT],
    /// Of service trust domains.
    pub servtd_hash: Digest,
    /// Zero.
    pub reserved: [u8; 64],
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<TdReport>() == 1024);
    assert!(size_of::<ReportMac>() == 256);
    assert!(size_of::<TdInfo>() == 512);
    assert!(offset_of!(TdReport, td_info) == 0x200);
    assert!(offset_of!(ReportMac, cpu_svn) == 0x10);
    assert!(offset_of!(ReportMac, tee_tcb_info_hash) == 0x20);
    assert!(offset_of!(ReportMac, tee_info_hash) == 0x50);
    assert!(offset_of!(ReportMac, report_data) == 0x80);
    assert!(offset_of!(ReportMac, mac) == 0xE0);
    assert!(offset_of!(TdInfo, mrtd) == 0x10);
    assert!(offset_of!(TdInfo, rtmr) == 0xD0);
    assert!(offset_of!(TdInfo, servtd_hash) == 0x190);
};
