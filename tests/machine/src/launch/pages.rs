//! The two pages that the host does not write from the file: secrets and CPUID.

use protocols::cpuid::{CpuidEntry, CpuidPage, MAX_ENTRIES};
use protocols::secrets::SecretsPage;
use zerocopy::FromZeros;

use crate::cpuid::Table;
use crate::settings::{Hostile, Settings};

/// The secrets page, with fresh keys from `random`.
pub fn secrets(random: &mut dyn FnMut() -> u64) -> SecretsPage {
    let mut page = SecretsPage::new_zeroed();
    page.version = SecretsPage::MIN_VERSION;
    for word in page.vmpck.as_flattened_mut().chunks_exact_mut(8) {
        word.copy_from_slice(&random().to_le_bytes());
    }
    page
}

/// The CPUID page. XCR0 and XSS of all questions are zero: no leaf here depends on them.
pub fn cpuid(table: &Table, settings: &Settings) -> CpuidPage {
    let mut page = CpuidPage::new_zeroed();
    for (slot, entry) in page.entries.iter_mut().zip(table.entries()) {
        *slot = CpuidEntry {
            eax_in: entry.leaf,
            ecx_in: entry.subleaf,
            eax: entry.value.eax,
            ebx: entry.value.ebx,
            ecx: entry.value.ecx,
            edx: entry.value.edx,
            ..CpuidEntry::default()
        };
        page.count += 1;
    }
    if settings.is_hostile(Hostile::CpuidCount) {
        page.count = MAX_ENTRIES as u32 + 1;
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpuid::Leaf;

    #[test]
    fn keys_are_random_and_the_rest_is_zero() {
        let mut next = 0u64;
        let page = secrets(&mut || {
            next += 1;
            next
        });
        assert_eq!(page.version, 3);
        let words: Vec<u64> = page
            .vmpck
            .as_flattened()
            .chunks(8)
            .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
            .collect();
        assert_eq!(words, (1..=16).collect::<Vec<_>>());
        let blank = SecretsPage {
            version: 0,
            vmpck: [[0; 32]; 4],
            ..page
        };
        assert!(blank == SecretsPage::new_zeroed());
    }

    #[test]
    fn the_page_holds_the_table() {
        let table = Table::build(
            &|leaf, subleaf| Leaf {
                eax: leaf | 0x20,
                ebx: subleaf,
                ecx: 0,
                edx: 0,
            },
            1,
        );
        let page = cpuid(&table, &Settings::default());
        assert!(page.is_well_formed());
        assert_eq!(page.entries().len(), table.entries().len());
        for entry in table.entries() {
            let found = page.find(entry.leaf, entry.subleaf).unwrap();
            let r = entry.value;
            assert_eq!(
                (found.eax, found.ebx, found.ecx, found.edx),
                (r.eax, r.ebx, r.ecx, r.edx)
            );
        }
        let lying = cpuid(&table, &Settings::parse("hostile=cpuid-count").unwrap());
        assert_eq!(lying.count, 65);
    }
}
