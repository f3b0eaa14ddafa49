//! The SVSM protocol: how the guest's kernel or firmware calls the paravisor (SVSM).
//!
//! A call is: registers ([`CallId`] in RAX, arguments in RCX, RDX, R8, R9), a set
//! `call_pending` in the [`CallingArea`], and a request to the host to run VMPL 0. The result
//! is a [`ResultCode`] in RAX. Lists that the guest passes are claims: they are copied once
//! and decoded with [`PvalidateEntry::decode`].
//!
//! - this module: calling area, call numbers, result codes;
//! - [`list`]: the lists of PVALIDATE, DEPOSIT_MEM and WITHDRAW_MEM;
//! - [`registers`]: register encodings of QUERY_PROTOCOL and CONFIGURE_VTOM;
//! - [`attestation`]: reports on the paravisor;
//! - [`turnstile`]: our own protocol.

pub mod attestation;
pub mod list;
pub mod registers;
pub mod turnstile;

pub use list::*;
pub use registers::*;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Highest version of the core protocol described here (SVSM 6).
pub const CORE_PROTOCOL_VERSION: u32 = 1;
/// MSR through which runtime code finds the calling area (SVSM 4.2).
pub const CAA_MSR: u32 = 0xC001_F000;

/// The calling area, one page per virtual processor (SVSM 5).
#[derive(Clone, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CallingArea {
    /// 1 while a call waits, 0 otherwise; anything else is malformed.
    pub call_pending: u8,
    /// 1 while the paravisor has memory to give back.
    pub memory_available: u8,
    /// 1 while an end of interrupt need not be reported (APIC protocol).
    pub no_eoi_required: u8,
    /// Reserved; need not be zero.
    pub reserved: [u8; 5],
    /// The guest's, for arguments.
    pub buffer: [u8; 4088],
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<CallingArea>() == 4096);
    assert!(offset_of!(CallingArea, call_pending) == 0);
    assert!(offset_of!(CallingArea, memory_available) == 1);
    assert!(offset_of!(CallingArea, no_eoi_required) == 2);
    assert!(offset_of!(CallingArea, buffer) == 8);
};

impl CallingArea {
    /// Offset of `call_pending`, for an atomic access.
    pub const CALL_PENDING_OFFSET: usize = core::mem::offset_of!(Self, call_pending);
    /// Offset of the guest's buffer.
    pub const BUFFER_OFFSET: usize = core::mem::offset_of!(Self, buffer);
}

open_enum! {
    /// Protocol number, upper half of RAX (SVSM 5, table 3).
    pub struct Protocol(u32) {
        /// Core.
        CORE = 0,
        /// Attestation.
        ATTESTATION = 1,
        /// Virtual TPM.
        VTPM = 2,
        /// APIC emulation (draft).
        APIC = 3,
        /// UEFI management mode (draft).
        UEFI_MM = 4,
        /// Turnstile's own (docs/protocol.md): outside what SVSM reserves, 0x8000_0000 to
        /// 0x8000_FFFF for the reference implementation included.
        TURNSTILE = 0x8001_5453,
    }
}

open_enum! {
    /// Calls of the core protocol, lower half of RAX (SVSM 6).
    pub struct CoreCall(u32) {
        /// Move the calling area. RCX = new GPA.
        REMAP_CA = 0,
        /// Validate or rescind pages. RCX = GPA of the list.
        PVALIDATE = 1,
        /// Make a VMSA. RCX = VMSA, RDX = calling area, R8 = APIC ID.
        CREATE_VCPU = 2,
        /// Give a VMSA back. RCX = VMSA.
        DELETE_VCPU = 3,
        /// Give memory to the paravisor.
        DEPOSIT_MEM = 4,
        /// Take deposited memory back.
        WITHDRAW_MEM = 5,
        /// Which versions of a protocol? RCX in and out.
        QUERY_PROTOCOL = 6,
        /// Virtual top of memory.
        CONFIGURE_VTOM = 7,
    }
}

/// RAX of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CallId {
    /// Upper half.
    pub protocol: Protocol,
    /// Lower half; its meaning is the protocol's.
    pub call: u32,
}

impl CallId {
    /// A call of the core protocol.
    #[must_use]
    pub const fn core(call: CoreCall) -> Self {
        Self {
            protocol: Protocol::CORE,
            call: call.0,
        }
    }

    /// RAX.
    #[must_use]
    pub const fn encode(self) -> u64 {
        (self.protocol.0 as u64) << 32 | self.call as u64
    }

    /// Reads RAX.
    #[must_use]
    pub const fn decode(rax: u64) -> Self {
        Self {
            protocol: Protocol((rax >> 32) as u32),
            call: rax as u32,
        }
    }
}

open_enum! {
    /// Result of a call (SVSM table 4; from 0x8000_1000: SVSM 6, PVALIDATE).
    pub struct ResultCode(u32) {
        /// Done.
        SUCCESS = 0,
        /// Part is done; call again.
        INCOMPLETE = 0x8000_0000,
        /// No such protocol.
        UNSUPPORTED_PROTOCOL = 0x8000_0001,
        /// No such call.
        UNSUPPORTED_CALL = 0x8000_0002,
        /// An address is not the guest's to name.
        INVALID_ADDRESS = 0x8000_0003,
        /// The call's form is wrong.
        INVALID_FORMAT = 0x8000_0004,
        /// An argument is wrong.
        INVALID_PARAMETER = 0x8000_0005,
        /// The call cannot be made now.
        INVALID_REQUEST = 0x8000_0006,
        /// Nothing is done; call again.
        BUSY = 0x8000_0007,

        /// PVALIDATE or RMPADJUST: invalid input.
        FAIL_INPUT = 0x8000_1001,
        /// PVALIDATE or RMPADJUST: no permission.
        FAIL_PERMISSION = 0x8000_1002,
        /// DELETE_VCPU: the VMSA is running.
        FAIL_IN_USE = 0x8000_1003,
        /// PVALIDATE: 2 MiB asked where the platform has 4 KiB.
        FAIL_SIZE_MISMATCH = 0x8000_1006,
        /// PVALIDATE: the page was in that state already, and CF was not to be ignored.
        FAIL_NO_CHANGE = 0x8000_1010,
        /// PVALIDATE or RMPADJUST: a code outside 0 to 15.
        FAIL_UNKNOWN = 0x8000_1011,
    }
}

impl ResultCode {
    /// What the guest is told when PVALIDATE or RMPADJUST returned `eax`, which is not 0
    /// (SVSM 6, PVALIDATE).
    #[must_use]
    pub const fn of_instruction(eax: u32) -> Self {
        if eax < 0x10 {
            Self(0x8000_1000 + eax)
        } else {
            Self::FAIL_UNKNOWN
        }
    }

    /// RAX.
    #[must_use]
    pub const fn encode(self) -> u64 {
        self.0 as u64
    }

    /// Reads RAX; the upper half does not count (SVSM 5).
    #[must_use]
    pub const fn decode(rax: u64) -> Self {
        Self(rax as u32)
    }

    /// Whether the same call is to be made again.
    #[must_use]
    pub const fn wants_retry(self) -> bool {
        matches!(self, Self::INCOMPLETE | Self::BUSY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_and_results_have_the_documented_bits() {
        assert_eq!(CallId::core(CoreCall::QUERY_PROTOCOL).encode(), 6);
        let vtpm = CallId::decode(2 << 32 | 1);
        assert_eq!((vtpm.protocol, vtpm.call), (Protocol::VTPM, 1));
        assert_eq!(
            ResultCode::of_instruction(6),
            ResultCode::FAIL_SIZE_MISMATCH
        );
        assert_eq!(ResultCode::of_instruction(0x10), ResultCode::FAIL_UNKNOWN);
        assert_eq!(ResultCode::decode(0xFFFF_FFFF_8000_0007), ResultCode::BUSY);
        assert!(ResultCode::BUSY.wants_retry() && ResultCode::INCOMPLETE.wants_retry());
        assert!(!ResultCode::INVALID_ADDRESS.wants_retry());
    }
}
