//! The SVSM protocol: how the guest's kernel or firmware calls the paravisor (SVSM).
//!
//! A call is: registers ([`CallId`] in RAX, arguments in RCX, RDX, R8, R9), a set
//! `call_pending` in the [`CallingArea`], and a request to the host to run VMPL 0. The result
//! is a [`ResultCode`] in RAX. Lists that the guest passes are claims: they are copied once
//! and decoded with [`PvalidateEntry::decode`].

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::addr::{Gpa, PAGE_SIZE, PageSize};

/// Highest version of the core protocol described here (SVSM 6).
pub const CORE_PROTOCOL_VERSION: u32 = 1;
/// MSR through which runtime code finds the calling area (SVSM 4.2).
pub const CAA_MSR: u32 = 0xC001_F000;

/// The calling area, one page per virtual processor (SVSM 5, table 2).
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
    /// Protocol number, upper half of RAX (SVSM 5.1, table 3).
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
    }
}

open_enum! {
    /// Calls of the core protocol, lower half of RAX (SVSM 6, table 5).
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
    /// Result of a call (SVSM 5.2, table 4; from 0x8000_1000: SVSM 6.2).
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
    /// (SVSM 6.2).
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

    /// Reads RAX; the upper half does not count (SVSM 5.2).
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

/// Head of the PVALIDATE list (SVSM 6.2, table 6). Also heads the list of DEPOSIT_MEM.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct PvalidateHeader {
    /// How many entries follow.
    pub entries: u16,
    /// Index of the next entry; read and written.
    pub next: u16,
    /// Reserved.
    pub reserved: u32,
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<PvalidateHeader>() == 8);
    assert!(offset_of!(PvalidateHeader, entries) == 0);
    assert!(offset_of!(PvalidateHeader, next) == 2);
    assert!(offset_of!(PvalidateHeader, reserved) == 4);
    assert!(size_of::<PvalidateEntry>() == 8);
};

/// Alignment of a PVALIDATE list in bytes.
pub const LIST_ALIGNMENT: u64 = 8;

/// Offset of `next` in the head, for writing back.
pub const LIST_NEXT_OFFSET: u64 = core::mem::offset_of!(PvalidateHeader, next) as u64;

/// Entries that fit between a list's head at `list` and the end of its page.
#[must_use]
pub const fn entries_that_fit(list: Gpa) -> u64 {
    let room = PAGE_SIZE - list.offset_in_page();
    room.saturating_sub(size_of::<PvalidateHeader>() as u64) / size_of::<PvalidateEntry>() as u64
}

/// Entries that fit into a calling area's buffer.
pub const MAX_ENTRIES_IN_CALLING_AREA: u64 =
    entries_that_fit(Gpa::new(CallingArea::BUFFER_OFFSET as u64));

const _: () = assert!(MAX_ENTRIES_IN_CALLING_AREA == 510);

/// What to do with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PvalidateAction {
    /// Validate.
    Validate,
    /// Rescind.
    Rescind,
}

/// One entry: size 1:0, action 2, ignore CF 3, reserved 11:4, page 63:12 (SVSM 6.2, table 6).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct PvalidateEntry(pub u64);

/// A decoded entry whose address fits its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PvalidateRequest {
    /// The page, aligned to `size`.
    pub gpa: Gpa,
    /// Its size.
    pub size: PageSize,
    /// What to do.
    pub action: PvalidateAction,
    /// Whether "was so already" is success.
    pub ignore_no_change: bool,
}

/// Why an entry has no meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EntryError {
    /// Bits 11:4 are not zero; here they are, shifted down.
    ReservedBits(u8),
    /// The page size is neither 0 nor 1.
    PageSize(u8),
    /// A 2 MiB page that is not aligned to 2 MiB.
    Misaligned(Gpa),
}

impl PvalidateEntry {
    /// An entry; the address loses what lies below its 4 KiB page.
    #[must_use]
    pub const fn new(
        gpa: Gpa,
        size: PageSize,
        action: PvalidateAction,
        ignore_no_change: bool,
    ) -> Self {
        let action = match action {
            PvalidateAction::Validate => 1 << 2,
            PvalidateAction::Rescind => 0,
        };
        Self(
            gpa.align_down(PageSize::Size4K).get()
                | size.encoding() as u64
                | action
                | (ignore_no_change as u64) << 3,
        )
    }

    /// Bits 11:4, shifted down.
    #[must_use]
    pub const fn reserved_bits(self) -> u8 {
        (self.0 >> 4) as u8
    }

    /// What the entry asks for. Reserved bits are looked at first, then size, then alignment.
    ///
    /// # Errors
    ///
    /// [`EntryError`] says which of the three is wrong.
    pub const fn decode(self) -> Result<PvalidateRequest, EntryError> {
        if self.reserved_bits() != 0 {
            return Err(EntryError::ReservedBits(self.reserved_bits()));
        }
        let Some(size) = PageSize::from_encoding(self.0 & 3) else {
            return Err(EntryError::PageSize((self.0 & 3) as u8));
        };
        let gpa = Gpa::new(self.0 & !(PAGE_SIZE - 1));
        if !gpa.is_aligned(size) {
            return Err(EntryError::Misaligned(gpa));
        }
        let action = match self.0 >> 2 & 1 {
            0 => PvalidateAction::Rescind,
            _ => PvalidateAction::Validate,
        };
        Ok(PvalidateRequest {
            gpa,
            size,
            action,
            ignore_no_change: self.0 >> 3 & 1 != 0,
        })
    }
}

impl PvalidateRequest {
    /// The entry that asks for this.
    #[must_use]
    pub const fn encode(self) -> PvalidateEntry {
        PvalidateEntry::new(self.gpa, self.size, self.action, self.ignore_no_change)
    }
}

/// RCX of QUERY_PROTOCOL, in and out (SVSM 6.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProtocolQuery {
    /// Which protocol.
    pub protocol: Protocol,
    /// Which version is wanted.
    pub version: u32,
}

impl ProtocolQuery {
    /// RCX of the answer "not available".
    pub const UNAVAILABLE: u64 = 0;

    /// RCX of the call.
    #[must_use]
    pub const fn encode(self) -> u64 {
        (self.protocol.0 as u64) << 32 | self.version as u64
    }

    /// Reads RCX of the call.
    #[must_use]
    pub const fn decode(rcx: u64) -> Self {
        Self {
            protocol: Protocol((rcx >> 32) as u32),
            version: rcx as u32,
        }
    }

    /// RCX of the answer if versions `min` to `max` are available: 0 if the wanted one is not
    /// among them.
    #[must_use]
    pub const fn answer(self, min: u32, max: u32) -> u64 {
        if min <= self.version && self.version <= max {
            (max as u64) << 32 | min as u64
        } else {
            Self::UNAVAILABLE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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

    #[test]
    fn an_entry_has_the_documented_bits() {
        let entry = PvalidateEntry::new(
            Gpa::new(0x1_0020_0000),
            PageSize::Size2M,
            PvalidateAction::Validate,
            false,
        );
        assert_eq!(entry.0, 0x1_0020_0005);
        let rescind = PvalidateEntry(0x1_0020_1008).decode().unwrap();
        assert_eq!(rescind.action, PvalidateAction::Rescind);
        assert!(rescind.ignore_no_change);
        assert_eq!(rescind.gpa, Gpa::new(0x1_0020_1000));
    }

    #[test]
    fn each_bad_entry_is_named() {
        assert_eq!(
            PvalidateEntry(0x1014).decode(),
            Err(EntryError::ReservedBits(1))
        );
        assert_eq!(
            PvalidateEntry(0x1804).decode(),
            Err(EntryError::ReservedBits(0x80))
        );
        assert_eq!(
            PvalidateEntry(0x1006).decode(),
            Err(EntryError::PageSize(2))
        );
        assert_eq!(
            PvalidateEntry(0x1007).decode(),
            Err(EntryError::PageSize(3))
        );
        let gpa = Gpa::new(0x1000);
        assert_eq!(
            PvalidateEntry(0x1005).decode(),
            Err(EntryError::Misaligned(gpa))
        );
    }

    #[test]
    fn lists_end_with_their_page() {
        assert_eq!(entries_that_fit(Gpa::new(0x5000)), 511);
        assert_eq!(entries_that_fit(Gpa::new(0x5FF0)), 1);
        assert_eq!(entries_that_fit(Gpa::new(0x5FF8)), 0);
        assert_eq!(entries_that_fit(Gpa::new(0x5FFC)), 0);
    }

    #[test]
    fn a_query_is_answered_with_a_range_or_zero() {
        let query = ProtocolQuery::decode(1);
        assert_eq!(query.protocol, Protocol::CORE);
        assert_eq!(query.answer(1, 1), 1 << 32 | 1);
        assert_eq!(
            ProtocolQuery {
                version: 2,
                ..query
            }
            .answer(1, 1),
            0
        );
        assert_eq!(
            ProtocolQuery {
                version: 0,
                ..query
            }
            .answer(1, 1),
            0
        );
    }

    proptest! {
        #[test]
        fn decoded_entries_are_aligned_and_encode_to_themselves(value: u64) {
            let entry = PvalidateEntry(value);
            if let Ok(request) = entry.decode() {
                prop_assert!(request.gpa.is_aligned(request.size));
                prop_assert_eq!(request.encode(), entry);
            }
        }
    }
}
