//! Derived keys, and what firmware tells of the time stamp counter (SNP ABI, MSG_KEY_REQ and
//! MSG_TSC_INFO_REQ).

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::FirmwareStatus;

/// Payload of a request for a derived key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct KeyRequest {
    /// Bit 0: [`Self::ROOT_VMRK`] or the chip's key; bits 2:1: which of the chip's.
    pub root: u32,
    /// Reserved, zero.
    pub reserved: u32,
    /// What goes into the key: [`GuestFields`].
    pub fields: u64,
    /// The level that goes into the key; not above the message key's.
    pub vmpl: u32,
    /// Goes into the key if selected; not above the guest's.
    pub guest_svn: u32,
    /// Goes into the key if selected; not above the platform's.
    pub tcb: u64,
}

impl KeyRequest {
    /// The root is the key that was made at launch, or comes from the migration agent.
    pub const ROOT_VMRK: u32 = 1;
    /// Lowest bit of the selection among the chip's keys, [`super::report::KeySelect`].
    pub const KEY_SELECT_SHIFT: u32 = 1;
}

bitflags! {
    /// Which facts go into a derived key. Unknown bits are kept.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct GuestFields: u64 {
        /// Guest policy.
        const POLICY = 1 << 0;
        /// Image id.
        const IMAGE_ID = 1 << 1;
        /// Family id.
        const FAMILY_ID = 1 << 2;
        /// Launch digest.
        const MEASUREMENT = 1 << 3;
        /// The guest's security version as given in the request.
        const GUEST_SVN = 1 << 4;
        /// The platform's version as given in the request.
        const TCB_VERSION = 1 << 5;
        const _ = !0;
    }
}

/// Payload of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct KeyResponse {
    /// Whether there is a key.
    pub status: FirmwareStatus,
    /// Reserved.
    pub reserved: [u8; 28],
    /// The key.
    pub key: [u8; 32],
}

/// Payload of a request about the time stamp counter: 128 zero bytes.
pub const TSC_INFO_REQUEST_SIZE: usize = 128;

/// Payload of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TscInfoResponse {
    /// Whether the rest counts.
    pub status: FirmwareStatus,
    /// Reserved.
    pub reserved_04: u32,
    /// GUEST_TSC_SCALE of the guest's VMSAs.
    pub tsc_scale: u64,
    /// GUEST_TSC_OFFSET of the guest's VMSAs.
    pub tsc_offset: u64,
    /// Correction of the frequency, in 1/100000.
    pub tsc_factor: u32,
    /// Reserved.
    pub reserved_1c: [u8; 100],
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<KeyRequest>() == 0x20);
    assert!(offset_of!(KeyRequest, fields) == 0x08);
    assert!(offset_of!(KeyRequest, vmpl) == 0x10);
    assert!(offset_of!(KeyRequest, tcb) == 0x18);
    assert!(size_of::<KeyResponse>() == 0x40);
    assert!(offset_of!(KeyResponse, key) == 0x20);
    assert!(size_of::<TscInfoResponse>() == 128);
    assert!(offset_of!(TscInfoResponse, tsc_scale) == 0x08);
    assert!(offset_of!(TscInfoResponse, tsc_factor) == 0x18);
};
