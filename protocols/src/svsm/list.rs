//! Lists of pages that the guest passes: PVALIDATE, DEPOSIT_MEM, WITHDRAW_MEM.
//!
//! A list is a head of 8 bytes and entries of 8 bytes, aligned to 8, and ends with its page.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::CallingArea;
use crate::addr::{Gpa, PAGE_SIZE, PageSize};

/// Head of the PVALIDATE list (SVSM table 6). Also heads the list of DEPOSIT_MEM.
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

/// One entry: size 1:0, action 2, ignore CF 3, reserved 11:4, page 63:12 (SVSM table 6).
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
    /// Reserved bits are not zero; here they are, shifted down.
    ReservedBits(u16),
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
    pub const fn reserved_bits(self) -> u16 {
        (self.0 >> 4 & 0xFF) as u16
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

/// One entry of DEPOSIT_MEM: size 1:0, reserved 11:2, page 63:12 (SVSM 6, DEPOSIT_MEM).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct DepositEntry(pub u64);

const _: () = assert!(size_of::<DepositEntry>() == 8);

impl DepositEntry {
    /// The page that is given, and its size; the same checks as [`PvalidateEntry::decode`].
    ///
    /// # Errors
    ///
    /// [`EntryError`] says what is wrong.
    pub const fn decode(self) -> Result<(Gpa, PageSize), EntryError> {
        let reserved = (self.0 >> 2 & 0x3FF) as u16;
        if reserved != 0 {
            return Err(EntryError::ReservedBits(reserved));
        }
        let Some(size) = PageSize::from_encoding(self.0 & 3) else {
            return Err(EntryError::PageSize((self.0 & 3) as u8));
        };
        let gpa = Gpa::new(self.0 & !(PAGE_SIZE - 1));
        if gpa.is_aligned(size) {
            Ok((gpa, size))
        } else {
            Err(EntryError::Misaligned(gpa))
        }
    }
}

/// Head of the list that WITHDRAW_MEM fills with GPAs (SVSM 6, WITHDRAW_MEM).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct WithdrawHeader {
    /// How many GPAs follow.
    pub count: u16,
    /// Unused.
    pub reserved: [u8; 6],
}

const _: () = assert!(size_of::<WithdrawHeader>() == 8);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
    fn a_deposit_has_no_action() {
        assert_eq!(
            DepositEntry(0x20_0001).decode(),
            Ok((Gpa::new(0x20_0000), PageSize::Size2M))
        );
        assert_eq!(
            DepositEntry(0x1004).decode(),
            Err(EntryError::ReservedBits(1))
        );
        assert_eq!(DepositEntry(0x1002).decode(), Err(EntryError::PageSize(2)));
        let gpa = Gpa::new(0x1000);
        assert_eq!(
            DepositEntry(0x1001).decode(),
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
