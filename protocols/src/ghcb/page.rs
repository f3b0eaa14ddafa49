//! The GHCB page: fields, valid bits, and the meaning of a reply.
//!
//! A field counts only if its bit in the valid bitmap is set: bit n stands for the quadword at
//! offset 8 n. [`Field`] ties offset and bit together. [`Ghcb`] is a *copy* of the page; code
//! that works on the shared page itself uses the offsets of [`Field`] with volatile accesses.

use core::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of the shared buffer.
pub const SHARED_BUFFER_SIZE: usize = 2032;
/// Offset of the shared buffer in the page.
pub const SHARED_BUFFER_OFFSET: usize = offset_of!(Ghcb, shared_buffer);
/// Offset of the valid bitmap (two u64) in the page.
pub const VALID_BITMAP_OFFSET: usize = offset_of!(Ghcb, valid_bitmap);
/// Offset of the protocol version (u16) in the page.
pub const PROTOCOL_VERSION_OFFSET: usize = offset_of!(Ghcb, protocol_version);
/// Offset of the usage (u32) in the page.
pub const USAGE_OFFSET: usize = offset_of!(Ghcb, usage);
/// Offset of the byte with the privilege level.
pub const CPL_OFFSET: usize = offset_of!(Ghcb, cpl);
/// The only usage value of the GHCB document.
pub const USAGE_STANDARD: u32 = 0;

/// The page (GHCB, page layout; register offsets equal those of the VMSA).
#[derive(Clone, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[expect(
    missing_docs,
    reason = "fields are the registers of the same names, or reserved"
)]
pub struct Ghcb {
    pub reserved_000: [u8; 0xCB],
    pub cpl: u8,
    pub reserved_0cc: [u8; 0x74],
    pub xss: u64,
    pub reserved_148: [u8; 0x18],
    pub dr7: u64,
    pub reserved_168: [u8; 0x10],
    pub rip: u64,
    pub reserved_180: [u8; 0x58],
    pub rsp: u64,
    pub reserved_1e0: [u8; 0x18],
    pub rax: u64,
    pub reserved_200: [u8; 0x108],
    pub rcx: u64,
    pub rdx: u64,
    pub rbx: u64,
    pub reserved_320: [u8; 8],
    pub rbp: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub reserved_380: [u8; 0x10],
    /// SW_EXITCODE.
    pub exit_code: u64,
    /// SW_EXITINFO1.
    pub exit_info_1: u64,
    /// SW_EXITINFO2.
    pub exit_info_2: u64,
    /// SW_SCRATCH, a GPA.
    pub scratch: u64,
    pub reserved_3b0: [u8; 0x38],
    pub xcr0: u64,
    pub valid_bitmap: ValidBitmap,
    pub x87_state_gpa: u64,
    pub reserved_408: [u8; 0x3F8],
    pub shared_buffer: [u8; SHARED_BUFFER_SIZE],
    pub reserved_ff0: [u8; 10],
    pub protocol_version: u16,
    pub usage: u32,
}

const _: () = {
    assert!(size_of::<Ghcb>() == 4096);
    assert!(offset_of!(Ghcb, cpl) == 0x0CB);
    assert!(offset_of!(Ghcb, xss) == 0x140);
    assert!(offset_of!(Ghcb, dr7) == 0x160);
    assert!(offset_of!(Ghcb, rip) == 0x178);
    assert!(offset_of!(Ghcb, rsp) == 0x1D8);
    assert!(offset_of!(Ghcb, rax) == 0x1F8);
    assert!(offset_of!(Ghcb, rcx) == 0x308);
    assert!(offset_of!(Ghcb, rdx) == 0x310);
    assert!(offset_of!(Ghcb, rbx) == 0x318);
    assert!(offset_of!(Ghcb, rbp) == 0x328);
    assert!(offset_of!(Ghcb, r15) == 0x378);
    assert!(offset_of!(Ghcb, exit_code) == 0x390);
    assert!(offset_of!(Ghcb, exit_info_1) == 0x398);
    assert!(offset_of!(Ghcb, exit_info_2) == 0x3A0);
    assert!(offset_of!(Ghcb, scratch) == 0x3A8);
    assert!(offset_of!(Ghcb, xcr0) == 0x3E8);
    assert!(offset_of!(Ghcb, valid_bitmap) == 0x3F0);
    assert!(offset_of!(Ghcb, x87_state_gpa) == 0x400);
    assert!(offset_of!(Ghcb, shared_buffer) == 0x800);
    assert!(offset_of!(Ghcb, protocol_version) == 0xFFA);
    assert!(offset_of!(Ghcb, usage) == 0xFFC);
};

/// A 64-bit field that has a valid bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Field(u16);

impl Field {
    /// XSS.
    pub const XSS: Self = Self::at(offset_of!(Ghcb, xss));
    /// DR7.
    pub const DR7: Self = Self::at(offset_of!(Ghcb, dr7));
    /// RIP.
    pub const RIP: Self = Self::at(offset_of!(Ghcb, rip));
    /// RSP.
    pub const RSP: Self = Self::at(offset_of!(Ghcb, rsp));
    /// RAX.
    pub const RAX: Self = Self::at(offset_of!(Ghcb, rax));
    /// RCX.
    pub const RCX: Self = Self::at(offset_of!(Ghcb, rcx));
    /// RDX.
    pub const RDX: Self = Self::at(offset_of!(Ghcb, rdx));
    /// RBX.
    pub const RBX: Self = Self::at(offset_of!(Ghcb, rbx));
    /// RBP.
    pub const RBP: Self = Self::at(offset_of!(Ghcb, rbp));
    /// RSI.
    pub const RSI: Self = Self::at(offset_of!(Ghcb, rsi));
    /// RDI.
    pub const RDI: Self = Self::at(offset_of!(Ghcb, rdi));
    /// R8.
    pub const R8: Self = Self::at(offset_of!(Ghcb, r8));
    /// R9.
    pub const R9: Self = Self::at(offset_of!(Ghcb, r9));
    /// R10.
    pub const R10: Self = Self::at(offset_of!(Ghcb, r10));
    /// R11.
    pub const R11: Self = Self::at(offset_of!(Ghcb, r11));
    /// R12.
    pub const R12: Self = Self::at(offset_of!(Ghcb, r12));
    /// R13.
    pub const R13: Self = Self::at(offset_of!(Ghcb, r13));
    /// R14.
    pub const R14: Self = Self::at(offset_of!(Ghcb, r14));
    /// R15.
    pub const R15: Self = Self::at(offset_of!(Ghcb, r15));
    /// SW_EXITCODE.
    pub const EXIT_CODE: Self = Self::at(offset_of!(Ghcb, exit_code));
    /// SW_EXITINFO1.
    pub const EXIT_INFO_1: Self = Self::at(offset_of!(Ghcb, exit_info_1));
    /// SW_EXITINFO2.
    pub const EXIT_INFO_2: Self = Self::at(offset_of!(Ghcb, exit_info_2));
    /// SW_SCRATCH.
    pub const SCRATCH: Self = Self::at(offset_of!(Ghcb, scratch));
    /// XCR0.
    pub const XCR0: Self = Self::at(offset_of!(Ghcb, xcr0));

    const fn at(offset: usize) -> Self {
        assert!(offset < VALID_BITMAP_OFFSET && offset.is_multiple_of(8));
        Self(offset as u16)
    }

    /// Offset in bytes in the page, a multiple of 8 below 0x3F0.
    #[must_use]
    pub const fn offset(self) -> usize {
        self.0 as usize
    }

    /// Its bit in the valid bitmap, 0 to 125.
    #[must_use]
    pub const fn bit(self) -> u32 {
        self.0 as u32 / 8
    }
}

/// The valid bitmap: bit n stands for the quadword at offset 8 n.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct ValidBitmap(pub [u64; 2]);

impl ValidBitmap {
    /// The bit of the privilege level, which is a byte and therefore no [`Field`].
    pub const CPL_BIT: u32 = 0xCB / 8;

    /// Whether the field's bit is set.
    #[must_use]
    pub const fn contains(self, field: Field) -> bool {
        self.contains_bit(field.bit())
    }

    /// Whether bit `bit` is set; false for bits that do not exist.
    #[must_use]
    pub const fn contains_bit(self, bit: u32) -> bool {
        bit < 128 && self.as_u128() >> bit & 1 != 0
    }

    /// Whether the bits of all the fields are set.
    #[must_use]
    pub fn contains_all(self, fields: &[Field]) -> bool {
        fields.iter().all(|&field| self.contains(field))
    }

    /// Sets the field's bit.
    pub const fn insert(&mut self, field: Field) {
        self.insert_bit(field.bit());
    }

    /// Sets bit `bit`; bits that do not exist are ignored.
    pub const fn insert_bit(&mut self, bit: u32) {
        if bit < 128 {
            let value = self.as_u128() | 1 << bit;
            self.0 = [value as u64, (value >> 64) as u64];
        }
    }

    const fn as_u128(self) -> u128 {
        self.0[0] as u128 | (self.0[1] as u128) << 64
    }
}

impl Ghcb {
    /// The field's value, if its bit is set.
    #[must_use]
    pub fn get(&self, field: Field) -> Option<u64> {
        if !self.valid_bitmap.contains(field) {
            return None;
        }
        let (value, _) = u64::read_from_prefix(self.as_bytes().get(field.offset()..)?).ok()?;
        Some(value)
    }

    /// Sets the field's value and its bit.
    pub fn set(&mut self, field: Field, value: u64) {
        // A `Field` lies inside the page by construction.
        if let Some(bytes) = self
            .as_mut_bytes()
            .get_mut(field.offset()..field.offset() + 8)
        {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
        self.valid_bitmap.insert(field);
    }

    /// Forgets all valid bits: the first step of every request and of every reply.
    pub const fn clear_valid(&mut self) {
        self.valid_bitmap = ValidBitmap([0; 2]);
    }
}

open_enum! {
    /// Low half of SW_EXITINFO1 in a reply (GHCB, VMGEXIT return).
    pub struct Response(u32) {
        /// Nothing more to do.
        NO_ACTION = 0,
        /// Raise the exception described by SW_EXITINFO2.
        EXCEPTION = 1,
        /// The request was malformed; SW_EXITINFO2 is a [`MalformedReason`].
        MALFORMED = 2,
    }
}

open_enum! {
    /// SW_EXITINFO2 after [`Response::MALFORMED`] (GHCB, VMGEXIT return).
    pub struct MalformedReason(u64) {
        /// The GHCB is not the registered one.
        NOT_REGISTERED = 1,
        /// Unknown usage value.
        INVALID_USAGE = 2,
        /// The scratch area is not where it has to be.
        INVALID_SCRATCH = 3,
        /// A needed field has no valid bit.
        MISSING_INPUT = 4,
        /// A field has a value that cannot be.
        INVALID_INPUT = 5,
        /// Unknown or impossible event.
        INVALID_EVENT = 6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromZeros;

    #[test]
    fn bits_are_those_of_the_document() {
        let expected = [
            (Field::XSS, 40),
            (Field::DR7, 44),
            (Field::RSP, 59),
            (Field::RAX, 63),
            (Field::RCX, 97),
            (Field::RBX, 99),
            (Field::RBP, 101),
            (Field::R15, 111),
            (Field::EXIT_CODE, 114),
            (Field::EXIT_INFO_2, 116),
            (Field::SCRATCH, 117),
            (Field::XCR0, 125),
        ];
        for (field, bit) in expected {
            assert_eq!(field.bit(), bit);
        }
        assert_eq!(ValidBitmap::CPL_BIT, 25);
    }

    #[test]
    fn a_field_counts_only_with_its_bit() {
        let mut ghcb = Ghcb::new_zeroed();
        ghcb.rax = 5;
        assert_eq!(ghcb.get(Field::RAX), None);
        ghcb.set(Field::RAX, 6);
        ghcb.set(Field::EXIT_CODE, 0x8000_0010);
        assert_eq!(ghcb.get(Field::RAX), Some(6));
        assert_eq!(ghcb.rax, 6);
        assert!(
            ghcb.valid_bitmap
                .contains_all(&[Field::RAX, Field::EXIT_CODE])
        );
        assert!(!ghcb.valid_bitmap.contains_all(&[Field::RAX, Field::RBX]));
        assert_eq!(ghcb.as_bytes()[0x3F0 + 63 / 8], 1 << (63 % 8));
        assert_eq!(ghcb.as_bytes()[0x3F0 + 114 / 8], 1 << (114 % 8));
        ghcb.clear_valid();
        assert_eq!(ghcb.get(Field::RAX), None);
    }

    #[test]
    fn bits_that_do_not_exist_are_never_set() {
        let mut bitmap = ValidBitmap([u64::MAX; 2]);
        assert!(bitmap.contains_bit(127));
        assert!(!bitmap.contains_bit(128));
        bitmap.insert_bit(1000);
        assert_eq!(bitmap, ValidBitmap([u64::MAX; 2]));
    }
}
