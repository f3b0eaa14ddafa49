//! Folios: the pieces of host memory that private pages live in, as guest_memfd keeps them.
//!
//! A private page gets a folio at its first use: of 2 MiB if the host backs by 2 MiB and the
//! whole block is private and has no folio yet, else of 4 KiB. Sharing a page punches a hole: a
//! 4 KiB folio is freed; a 2 MiB folio stays, because it is one allocation, and is freed when its
//! last page goes. Until then its holes are memory held twice, once here and once shared. A page
//! that becomes private again moves back into its hole.
//!
//! Invariants:
//! * a page is in at most one folio, and the 512 pages of a 2 MiB folio are one aligned block;
//! * a 2 MiB folio has at least one page that is not a hole;
//! * folios allocated minus folios freed are those that exist.
//!
//! Who may call: [`super::HostMemory`] only. Slots come from the layout.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::ops::Range;

use protocols::report;

use crate::layout::{Place, Slot, reserve};
use crate::settings::HostBacking;
use crate::types::{PAGES_PER_BLOCK, PageSize};

/// What a page of guest memory has for a folio.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
enum Page {
    /// None.
    #[default]
    None,
    /// One of its own.
    Small,
    /// A part of a 2 MiB folio.
    Large,
    /// A part of a 2 MiB folio that was given up; the memory is still the folio's.
    Hole,
}

/// All folios.
pub struct Folios {
    backing: HostBacking,
    pages: Vec<Page>,
    /// Holes of each 2 MiB folio that has some, by the slot of its first page.
    holed: BTreeMap<usize, u16>,
    counted: report::Folios,
}

impl Folios {
    /// No folios, and no pages that could have one.
    pub const fn new(backing: HostBacking) -> Self {
        Self {
            backing,
            pages: Vec::new(),
            holed: BTreeMap::new(),
            counted: report::Folios {
                large: 0,
                large_whole: 0,
                large_in_rmp: 0,
                large_allocated: 0,
                large_freed: 0,
                large_holed: 0,
                small: 0,
                small_allocated: 0,
                small_freed: 0,
                hole_pages: 0,
                hole_pages_peak: 0,
            },
        }
    }

    /// Adds pages without a folio up to `pages`.
    pub fn resize(&mut self, pages: usize) {
        reserve(&mut self.pages, pages);
        self.pages.resize(pages, Page::None);
    }

    /// The size of the folio the page at `place` is in, holes included.
    pub fn size(&self, place: &Place) -> Option<PageSize> {
        match self.pages[place.slot.index()] {
            Page::None => None,
            Page::Small => Some(PageSize::Size4K),
            Page::Large | Page::Hole => Some(PageSize::Size2M),
        }
    }

    /// Makes sure that the private page at `place` has memory, and says in what size of folio.
    /// `is_block_private` is asked only if a 2 MiB folio could be made.
    pub fn touch(&mut self, place: &Place, is_block_private: impl FnOnce() -> bool) -> PageSize {
        let slot = place.slot.index();
        match (self.pages[slot], place.block) {
            (Page::Large, _) => PageSize::Size2M,
            (Page::Hole, Some(head)) => {
                self.fill(head, slot..slot + 1);
                PageSize::Size2M
            }
            // A block that is not whole never got a 2 MiB folio.
            (Page::Small | Page::Hole, _) => PageSize::Size4K,
            (Page::None, _) => {
                let large = self.backing == HostBacking::Size2M
                    && self.is_block_empty(place)
                    && is_block_private();
                if large && self.allocate_large(place) {
                    return PageSize::Size2M;
                }
                self.pages[slot] = Page::Small;
                self.counted.small += 1;
                self.counted.small_allocated += 1;
                PageSize::Size4K
            }
        }
    }

    /// Allocates a 2 MiB folio for the block of `place`, or fills the holes of the one it has.
    /// False if the block is not whole or has 4 KiB folios.
    pub fn allocate_large(&mut self, place: &Place) -> bool {
        let (Some(head), Some(slots)) = (place.block, place.slots(PageSize::Size2M)) else {
            return false;
        };
        match self.size(place) {
            Some(PageSize::Size2M) => self.fill(head, slots),
            _ if !self.is_block_empty(place) => return false,
            _ => {
                self.pages[slots].fill(Page::Large);
                self.counted.large += 1;
                self.counted.large_allocated += 1;
            }
        }
        true
    }

    /// Gives up the pages in `slots`, which are the page or the block of `place`. Pages without a
    /// folio and holes stay as they are.
    pub fn punch(&mut self, place: &Place, slots: Range<usize>) {
        let mut punched = 0;
        for page in &mut self.pages[slots] {
            match page {
                Page::Small => {
                    *page = Page::None;
                    self.counted.small -= 1;
                    self.counted.small_freed += 1;
                }
                Page::Large => {
                    *page = Page::Hole;
                    punched += 1;
                }
                Page::None | Page::Hole => {}
            }
        }
        let Some(head) = place.block.filter(|_| punched != 0).map(Slot::index) else {
            return;
        };
        let before = usize::from(self.holed.get(&head).copied().unwrap_or(0));
        let holes = before + punched;
        if holes == PAGES_PER_BLOCK {
            self.pages[head..head + PAGES_PER_BLOCK].fill(Page::None);
            self.holed.remove(&head);
            self.counted.large -= 1;
            self.counted.large_freed += 1;
            self.counted.hole_pages -= before as u64;
            return;
        }
        self.holed.insert(head, holes as u16);
        if before == 0 {
            self.counted.large_holed += 1;
        }
        self.counted.hole_pages += punched as u64;
        self.counted.hole_pages_peak = self.counted.hole_pages_peak.max(self.counted.hole_pages);
    }

    /// What the report says. `is_large_in_rmp` tells of the slot of a block's first page whether
    /// the block has one RMP entry.
    pub fn report(&self, is_large_in_rmp: impl Fn(usize) -> bool) -> report::Folios {
        let mut in_rmp = 0;
        let mut slot = 0;
        while let Some(page) = self.pages.get(slot) {
            if matches!(page, Page::Large | Page::Hole) {
                in_rmp += u64::from(is_large_in_rmp(slot));
                slot += PAGES_PER_BLOCK;
            } else {
                slot += 1;
            }
        }
        report::Folios {
            large_whole: self.counted.large - self.holed.len() as u64,
            large_in_rmp: in_rmp,
            ..self.counted
        }
    }

    fn is_block_empty(&self, place: &Place) -> bool {
        place
            .slots(PageSize::Size2M)
            .is_some_and(|slots| self.pages[slots].iter().all(|page| *page == Page::None))
    }

    /// Takes the holes among `slots`, pages of the 2 MiB folio at `head`, into use again.
    fn fill(&mut self, head: Slot, slots: Range<usize>) {
        let mut filled = 0;
        for page in self.pages[slots].iter_mut().filter(|p| **p == Page::Hole) {
            *page = Page::Large;
            filled += 1;
        }
        self.counted.hole_pages -= u64::from(filled);
        if let Some(holes) = self.holed.get_mut(&head.index()) {
            *holes -= filled;
            if *holes == 0 {
                self.holed.remove(&head.index());
            }
        }
    }
}
