//! The CPUID table that the AMD-SP handed over at launch.
//!
//! At VMPL0 every CPUID instruction raises #VC; it is answered from this table and never from
//! the host. The table is checked once and then read only. Leaves whose true value depends on
//! the processor (APIC ids) are not asked for by the paravisor.

use core::arch::x86_64::CpuidResult;

use protocols::cpuid::{CpuidEntry, CpuidPage};
use protocols::snp::{CPUID_SEV_LEAF, SevCpuidEbx};
use protocols::terminate::TurnstileReason;

/// Leaves whose meaning depends on ECX (snp_cpuid in Linux has the same list).
const INDEXED_LEAVES: [u32; 15] = [
    0x4,
    0x7,
    0xB,
    0xD,
    0xF,
    0x10,
    0x12,
    0x14,
    0x17,
    0x18,
    0x1D,
    0x1E,
    0x1F,
    0x24,
    0x8000_001D,
];

/// A CPUID table whose header passed the checks.
#[derive(Clone, Copy)]
pub struct CpuidTable<'a> {
    entries: &'a [CpuidEntry],
}

impl<'a> CpuidTable<'a> {
    /// Takes the launch page if its header makes sense.
    ///
    /// # Errors
    ///
    /// [`TurnstileReason::CPUID_PAGE`] if it counts more entries than fit or has reserved
    /// header bits set.
    pub fn check(page: &'a CpuidPage) -> Result<Self, TurnstileReason> {
        if page.is_well_formed() {
            Ok(Self {
                entries: page.entries(),
            })
        } else {
            Err(TurnstileReason::CPUID_PAGE)
        }
    }

    /// What CPUID answers; zero for what is not in the table.
    #[must_use]
    pub fn lookup(self, leaf: u32, subleaf: u32) -> CpuidResult {
        let indexed = INDEXED_LEAVES.contains(&leaf);
        self.entries
            .iter()
            .find(|entry| entry.eax_in == leaf && (!indexed || entry.ecx_in == subleaf))
            .map_or(
                CpuidResult {
                    eax: 0,
                    ebx: 0,
                    ecx: 0,
                    edx: 0,
                },
                |entry| CpuidResult {
                    eax: entry.eax,
                    ebx: entry.ebx,
                    ecx: entry.ecx,
                    edx: entry.edx,
                },
            )
    }

    /// Position of the C-bit in page-table entries.
    #[must_use]
    pub fn c_bit(self) -> u32 {
        SevCpuidEbx(self.lookup(CPUID_SEV_LEAF, 0).ebx).c_bit()
    }

    /// Whether caches are coherent across the C=0 and C=1 view of a page; if not, every line
    /// of a page has to be evicted after validation (CVE-2025-38560).
    #[must_use]
    pub fn is_cache_coherent(self) -> bool {
        self.lookup(CPUID_SEV_LEAF, 0).ebx & SevCpuidEbx::COHERENCY_SFW_NO != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromZeros;

    fn page(entries: &[(u32, u32, u32)]) -> CpuidPage {
        let mut page = CpuidPage::new_zeroed();
        page.count = entries.len() as u32;
        for (slot, &(eax_in, ecx_in, ebx)) in page.entries.iter_mut().zip(entries) {
            slot.eax_in = eax_in;
            slot.ecx_in = ecx_in;
            slot.ebx = ebx;
        }
        page
    }

    #[test]
    fn the_count_has_to_fit() {
        let mut page = page(&[]);
        page.count = 64;
        assert!(CpuidTable::check(&page).is_ok());
        for count in [65, u32::MAX] {
            page.count = count;
            assert_eq!(
                CpuidTable::check(&page).err(),
                Some(TurnstileReason::CPUID_PAGE)
            );
        }
    }

    #[test]
    fn only_indexed_leaves_look_at_ecx() {
        let page = page(&[
            (1, 0, 10),
            (7, 0, 70),
            (7, 1, 71),
            (0x8000_001F, 0, 1 << 31 | 47),
        ]);
        let table = CpuidTable::check(&page).ok().unwrap();
        assert_eq!(table.lookup(1, 5).ebx, 10);
        assert_eq!(table.lookup(7, 1).ebx, 71);
        assert_eq!(table.lookup(7, 2).ebx, 0);
        assert_eq!(table.lookup(0x4000_0000, 0).ebx, 0);
        assert_eq!(table.c_bit(), 47);
        assert!(table.is_cache_coherent());
    }

    #[test]
    fn entries_behind_the_count_are_not_seen() {
        let mut page = page(&[(1, 0, 10), (2, 0, 20)]);
        page.count = 1;
        let table = CpuidTable::check(&page).ok().unwrap();
        assert_eq!(table.lookup(2, 0).ebx, 0);
    }
}
