//! The SNP CPUID page (SNP ABI, SNP_LAUNCH_UPDATE, CPUID page; Linux `struct snp_cpuid_table`).
//!
//! The security processor checks the host's values when it launches the page. The count is
//! still looked at by every reader, because a launch without a real security processor (or
//! with an unmeasured page in its place) checks nothing.

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Entries that the page can hold.
pub const MAX_ENTRIES: usize = 64;

/// One leaf with its results.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct CpuidEntry {
    /// EAX of the query: the leaf.
    pub eax_in: u32,
    /// ECX of the query: the subleaf, if the leaf has some.
    pub ecx_in: u32,
    /// XCR0 the results are for; matters for leaf 0xD only.
    pub xcr0_in: u64,
    /// XSS the results are for; matters for leaf 0xD only.
    pub xss_in: u64,
    /// Result.
    pub eax: u32,
    /// Result.
    pub ebx: u32,
    /// Result.
    pub ecx: u32,
    /// Result.
    pub edx: u32,
    /// Zero.
    pub reserved: u64,
}

/// The page.
#[derive(Clone, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CpuidPage {
    /// Entries in use, at most [`MAX_ENTRIES`].
    pub count: u32,
    /// Zero.
    pub reserved0: u32,
    /// Zero.
    pub reserved1: u64,
    /// The entries.
    pub entries: [CpuidEntry; MAX_ENTRIES],
    /// Zero.
    pub reserved2: [u8; 1008],
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<CpuidEntry>() == 48);
    assert!(offset_of!(CpuidEntry, xcr0_in) == 8);
    assert!(offset_of!(CpuidEntry, xss_in) == 16);
    assert!(offset_of!(CpuidEntry, eax) == 24);
    assert!(offset_of!(CpuidEntry, reserved) == 40);
    assert!(size_of::<CpuidPage>() == 4096);
    assert!(offset_of!(CpuidPage, entries) == 16);
    assert!(offset_of!(CpuidPage, reserved2) == 0xC10);
};

impl CpuidPage {
    /// A page with these entries; none if there are too many.
    #[must_use]
    pub fn from_entries(entries: &[CpuidEntry]) -> Option<Self> {
        let mut page = Self::new_zeroed();
        page.entries
            .get_mut(..entries.len())?
            .copy_from_slice(entries);
        page.count = u32::try_from(entries.len()).ok()?;
        Some(page)
    }

    /// Whether the count is possible and the reserved fields are zero.
    #[must_use]
    pub fn is_well_formed(&self) -> bool {
        self.count as usize <= MAX_ENTRIES && self.reserved0 == 0 && self.reserved1 == 0
    }

    /// The entries in use; never more than there are.
    #[must_use]
    pub fn entries(&self) -> &[CpuidEntry] {
        let count = (self.count as usize).min(MAX_ENTRIES);
        self.entries.get(..count).unwrap_or_default()
    }

    /// The first entry of a leaf and subleaf.
    #[must_use]
    pub fn find(&self, leaf: u32, subleaf: u32) -> Option<&CpuidEntry> {
        self.entries()
            .iter()
            .find(|entry| entry.eax_in == leaf && entry.ecx_in == subleaf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(eax_in: u32, ecx_in: u32) -> CpuidEntry {
        CpuidEntry {
            eax_in,
            ecx_in,
            ..CpuidEntry::default()
        }
    }

    #[test]
    fn entries_are_found_by_leaf_and_subleaf() {
        let page =
            CpuidPage::from_entries(&[leaf(7, 0), leaf(7, 1), leaf(0x8000_001F, 0)]).unwrap();
        assert!(page.is_well_formed());
        assert_eq!(page.find(7, 1), Some(&leaf(7, 1)));
        assert_eq!(page.find(7, 2), None);
        let read = CpuidPage::read_from_bytes(page.as_bytes()).unwrap();
        assert_eq!(read.entries().len(), 3);
    }

    #[test]
    fn a_wild_count_stays_inside() {
        let mut page = CpuidPage::from_entries(&[leaf(1, 0); MAX_ENTRIES]).unwrap();
        page.count = 65;
        assert!(!page.is_well_formed());
        assert_eq!(page.entries().len(), MAX_ENTRIES);
        assert!(CpuidPage::from_entries(&[leaf(1, 0); MAX_ENTRIES + 1]).is_none());
    }
}
