//! The table of certificates that a host adds to a report (GHCB, SNP extended guest request).
//!
//! Entries, then an entry of zeros, then the certificates. It is the host's word and proves nothing by
//! itself: who verifies a report follows the chain to a root that is known from elsewhere.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::guid::Guid;

/// One entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CertificateEntry {
    /// What it is.
    pub guid: Guid,
    /// Where it begins, in bytes from the start of the table.
    pub offset: u32,
    /// Its length in bytes.
    pub length: u32,
}

const _: () = assert!(size_of::<CertificateEntry>() == 24);

/// The key of the chip, which signs reports.
pub const VCEK: Guid = Guid::from_text("63da758d-e664-4564-adc5-f4b93be8accd");
/// AMD's key that signs the [`VCEK`].
pub const ASK: Guid = Guid::from_text("4ab7b379-bbac-4fe4-a02f-05aef327c782");
/// AMD's root key, which signs the [`ASK`] and itself.
pub const ARK: Guid = Guid::from_text("c0b406a4-a803-4952-9743-3fb6014cd0ae");

/// How many bytes of `bytes` the table takes, entries and certificates; 0 if it is empty. None if it is no
/// table: without an end, or with a certificate outside of `bytes`.
#[must_use]
pub fn extent(bytes: &[u8]) -> Option<usize> {
    let mut end = 0;
    for (index, entry) in bytes
        .chunks_exact(size_of::<CertificateEntry>())
        .enumerate()
    {
        let entry = CertificateEntry::read_from_bytes(entry).ok()?;
        if entry.as_bytes().iter().all(|&byte| byte == 0) {
            let entries = (index + 1) * size_of::<CertificateEntry>();
            return Some(if index == 0 { 0 } else { entries.max(end) });
        }
        let last = entry.offset.checked_add(entry.length)? as usize;
        end = end.max(last);
        if end > bytes.len() {
            return None;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;
    use std::vec::Vec;

    fn table(entries: &[(u32, u32)], size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size];
        for (slot, &(offset, length)) in bytes.chunks_exact_mut(24).zip(entries) {
            let entry = CertificateEntry {
                guid: VCEK,
                offset,
                length,
            };
            slot.copy_from_slice(entry.as_bytes());
        }
        bytes
    }

    #[test]
    fn a_table_ends_where_its_last_certificate_ends() {
        assert_eq!(extent(&table(&[], 4096)), Some(0));
        assert_eq!(extent(&table(&[(72, 100), (172, 8)], 4096)), Some(180));
        // Certificates of no length do not take the end mark away.
        assert_eq!(extent(&table(&[(0, 0)], 4096)), Some(48));
    }

    #[test]
    fn what_is_no_table_has_no_extent() {
        assert_eq!(extent(&table(&[(72, 4096)], 4096)), None);
        assert_eq!(extent(&table(&[(u32::MAX, 2)], 4096)), None);
        assert_eq!(extent(&table(&[(0, 1); 4], 96)), None, "no end");
        assert_eq!(extent(&[]), None);
    }
}
