//! The host kernel's own mapping of all memory, and what 4 KiB private pages do to it.
//!
//! A host maps its memory by large pages. A page that is private to a guest must not be written
//! through a large mapping (APM 15.36.10: the RMP is checked for all of it), so the kernel splits
//! the mapping, and never joins it again. Two answers to "when" are counted side by side:
//!
//! * *needed*: a 4 KiB folio became private. Its neighbours may be anybody's, so the host must be
//!   able to write them. The pages of a 2 MiB folio belong to one guest: the host has no
//!   business in any of them until all are given back.
//! * *as Linux*: any RMPUPDATE of 4 KiB, to private or to shared (`unaccepted-memory.md` §7).
//!
//! The map is modelled in mappings of 2 MiB; that a split also takes a 1 GiB mapping apart is not.
//! Real hosts back a guest's pages by scattered frames; here the system address is the guest's,
//! so a split counts once for each 2 MiB of the guest. For scattered 4 KiB frames that is the
//! best case.

use alloc::collections::BTreeSet;

use protocols::report;

use crate::layout::Layout;
use crate::types::{PageSize, Spa};

/// Which 2 MiB mappings are split; numbers are system addresses in units of 2 MiB.
#[derive(Default)]
pub struct DirectMap {
    needed: BTreeSet<u64>,
    as_linux: BTreeSet<u64>,
}

impl DirectMap {
    /// Nothing is split.
    pub const fn new() -> Self {
        Self {
            needed: BTreeSet::new(),
            as_linux: BTreeSet::new(),
        }
    }

    /// An RMPUPDATE of 4 KiB at `spa`.
    pub fn small_update(&mut self, spa: Spa) {
        self.as_linux.insert(block(spa));
    }

    /// A 4 KiB folio at `spa` became private.
    pub fn small_folio(&mut self, spa: Spa) {
        self.needed.insert(block(spa));
    }

    /// What the report says.
    pub fn report(&self, layout: &Layout) -> report::DirectMap {
        let blocks: BTreeSet<u64> = layout
            .ranges()
            .iter()
            .flat_map(|range| block(range.spa)..=block(range.spa.plus(range.bytes() - 1)))
            .collect();
        report::DirectMap {
            blocks: blocks.len() as u64,
            splits: self.needed.len() as u64,
            splits_as_linux: self.as_linux.len() as u64,
        }
    }
}

const fn block(spa: Spa) -> u64 {
    spa.get() / PageSize::Size2M.bytes()
}
