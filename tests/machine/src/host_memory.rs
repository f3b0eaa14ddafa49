//! The host's side of memory, as KVM with guest_memfd does it.
//!
//! Every page has an attribute, private or shared, that only the host changes (initially all
//! private, as under QEMU). A private page gets an RMP entry on first use, not before: of
//! 2 MiB if the host backs by 2 MiB and the whole block is private and free, else of 4 KiB
//! (`unaccepted-memory.md` §7). Making a page shared takes its RMP entry away, splitting a
//! large one first.
//!
//! Contents never survive a change of owner or alias: the page is filled with the scramble
//! pattern and the generation is remembered, so that a page handed on without a scrub is
//! recognised.
//!
//! Who may call: [`crate::platform::Platform`] only. Every change that makes a mapping stale
//! is queued as an [`Invalidation`].

use alloc::vec::Vec;

use crate::layout::{Layout, LayoutError, Place, reserve};
use crate::memory::PhysicalMemory;
use crate::platform::{Invalidation, Views};
use crate::rmp::{Rmp, UpdateError};
use crate::settings::HostBacking;
use crate::types::{Alias, Gpa, PAGE_SIZE, PageSize, Spa};

/// What the host remembers about a page.
#[derive(Clone, Copy, Default)]
struct Page {
    /// Generation of the scramble pattern the page may still hold; 0 = none.
    generation: u32,
    /// The memory attribute: shared if set.
    shared: bool,
    /// The guest lost the page by its own access through the shared alias.
    given_away: bool,
}

/// Layout, attributes and RMP of all guest memory.
pub struct HostMemory {
    layout: Layout,
    rmp: Rmp,
    pages: Vec<Page>,
    backing: HostBacking,
    generation: u32,
    scrambled_bytes: u64,
    psmashes: u64,
    invalidations: Vec<Invalidation>,
}

impl HostMemory {
    /// No memory yet.
    pub fn new(backing: HostBacking) -> Self {
        Self {
            layout: Layout::new(),
            rmp: Rmp::new(),
            pages: Vec::new(),
            backing,
            generation: 0,
            scrambled_bytes: 0,
            psmashes: 0,
            invalidations: Vec::new(),
        }
    }

    /// Adds RAM (GPA = SPA).
    pub fn add_ram(&mut self, gpa: Gpa, bytes: u64) -> Result<(), LayoutError> {
        self.layout.add_ram(gpa, bytes)?;
        self.grow();
        Ok(())
    }

    /// Adds a window backed by memory of the machine.
    pub fn add_window(&mut self, gpa: Gpa, bytes: u64, spa: Spa) -> Result<(), LayoutError> {
        self.layout.add_window(gpa, bytes, spa)?;
        self.grow();
        Ok(())
    }

    fn grow(&mut self) {
        self.rmp.resize(self.layout.pages());
        let pages = self.layout.pages();
        reserve(&mut self.pages, pages);
        self.pages.resize(pages, Page::default());
    }

    /// The memory map.
    pub const fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The reverse map table.
    pub const fn rmp(&self) -> &Rmp {
        &self.rmp
    }

    /// The reverse map table, for the instructions that change it.
    pub(crate) const fn rmp_mut(&mut self) -> &mut Rmp {
        &mut self.rmp
    }

    /// Bytes ever overwritten by the pattern.
    pub const fn scrambled_bytes(&self) -> u64 {
        self.scrambled_bytes
    }

    /// Large RMP entries ever split.
    pub const fn psmashes(&self) -> u64 {
        self.psmashes
    }

    /// Whether there are stale mappings to take.
    #[inline]
    pub const fn has_invalidations(&self) -> bool {
        !self.invalidations.is_empty()
    }

    /// The queue of stale mappings; empty afterwards.
    pub fn take_invalidations(&mut self) -> Vec<Invalidation> {
        core::mem::take(&mut self.invalidations)
    }

    /// Queues a stale mapping.
    pub(crate) fn invalidate(&mut self, gpa: Gpa, size: PageSize, views: Views) {
        let gpa = gpa.align_down(size);
        let bytes = size.bytes();
        // Requests walk upwards, so runs merge into one entry.
        if let Some(last) = self.invalidations.last_mut()
            && last.views == views
            && last.gpa.get() + last.bytes == gpa.get()
        {
            last.bytes += bytes;
            return;
        }
        self.invalidations.push(Invalidation { gpa, bytes, views });
    }

    /// The attribute of the page at `place`.
    #[inline]
    pub fn attribute(&self, place: &Place) -> Alias {
        if self.pages[place.slot.index()].shared {
            Alias::Shared
        } else {
            Alias::Private
        }
    }

    /// Remembers that a lower VMPL's own access took the page at `place` away.
    pub(crate) fn give_away(&mut self, place: &Place) {
        self.pages[place.slot.index()].given_away = true;
    }

    /// Whether the guest gave the page away without telling the paravisor.
    pub fn is_given_away(&self, place: &Place) -> bool {
        self.pages[place.slot.index()].given_away
    }

    /// Whether all pages of the block have the attribute `alias`; false where the block is
    /// not whole.
    pub fn is_block(&self, place: &Place, alias: Alias) -> bool {
        let shared = alias == Alias::Shared;
        place
            .slots(PageSize::Size2M)
            .is_some_and(|slots| self.pages[slots].iter().all(|page| page.shared == shared))
    }

    fn scramble<P: PhysicalMemory>(&mut self, memory: &P, place: &Place, gpa: Gpa, size: PageSize) {
        let Some(slots) = place.slots(size) else {
            return;
        };
        // 0 means "no pattern"; after 2^32 changes the count starts again at 1.
        self.generation = self.generation.wrapping_add(1).max(1);
        let generation = self.generation;
        let into_block = gpa.align_down(PageSize::Size4K).get() - gpa.align_down(size).get();
        let start = Spa::new(place.spa.get() - into_block);
        memory.fill_scramble(start, size.bytes(), generation);
        for page in &mut self.pages[slots] {
            page.generation = generation;
            page.given_away = false;
        }
        self.scrambled_bytes += size.bytes();
    }

    /// The first byte of the page or block that still holds the scramble pattern. A page that
    /// was once found clean is not looked at again.
    pub fn find_scrambled<P: PhysicalMemory>(
        &mut self,
        memory: &P,
        place: &Place,
        gpa: Gpa,
        size: PageSize,
    ) -> Option<Gpa> {
        let slots = place.slots(size)?;
        let base = gpa.align_down(size).get();
        let into_block = gpa.align_down(PageSize::Size4K).get() - base;
        let start = place.spa.get() - into_block;
        for (index, page) in self.pages[slots].iter_mut().enumerate() {
            if page.generation == 0 {
                continue;
            }
            let offset = index as u64 * PAGE_SIZE;
            let spa = Spa::new(start + offset);
            if let Some(line) = memory.find_scrambled(spa, PAGE_SIZE, page.generation) {
                return Some(Gpa::new(base + offset + line));
            }
            page.generation = 0;
        }
        None
    }

    /// Gives a private page that has no RMP entry one, as KVM does at the first private fault.
    /// Does nothing if it has one.
    pub fn prepare<P: PhysicalMemory>(
        &mut self,
        memory: &P,
        place: &Place,
        gpa: Gpa,
    ) -> Result<(), UpdateError> {
        if self.rmp.entry(place).is_assigned() {
            return Ok(());
        }
        let large = self.backing == HostBacking::Size2M
            && self.rmp.is_block_free(place)
            && self.is_block(place, Alias::Private);
        let size = if large {
            PageSize::Size2M
        } else {
            PageSize::Size4K
        };
        self.assign(memory, place, gpa, size)
    }

    /// RMPUPDATE to the guest at a given size, with new contents.
    pub(crate) fn assign<P: PhysicalMemory>(
        &mut self,
        memory: &P,
        place: &Place,
        gpa: Gpa,
        size: PageSize,
    ) -> Result<(), UpdateError> {
        // Nothing becomes stale: a private page without an entry is mapped nowhere.
        self.rmp.assign(place, gpa.align_down(size), size, false)?;
        self.scramble(memory, place, gpa, size);
        Ok(())
    }

    /// RMPUPDATE to immutable (Pre-Guest) for the launch; contents follow from the image.
    pub(crate) fn assign_for_launch(&mut self, place: &Place, gpa: Gpa) -> Result<(), UpdateError> {
        if self.attribute(place) == Alias::Shared || self.rmp.entry(place).is_assigned() {
            return Err(UpdateError::Overlap);
        }
        self.rmp.assign(
            place,
            gpa.align_down(PageSize::Size4K),
            PageSize::Size4K,
            true,
        )
    }

    /// Splits the large entry that speaks for the page, if one does.
    pub fn psmash(&mut self, place: &Place, gpa: Gpa) -> bool {
        let split = self.rmp.psmash(place);
        if split {
            self.psmashes += 1;
            self.invalidate(gpa, PageSize::Size2M, Views::ALL);
        }
        split
    }

    /// Takes a page or a whole block away from the guest; the attribute stays. Contents go.
    pub fn take_away<P: PhysicalMemory>(
        &mut self,
        memory: &P,
        place: &Place,
        gpa: Gpa,
        size: PageSize,
    ) -> Result<(), UpdateError> {
        let entry = self.rmp.entry(place);
        if entry.is_assigned() {
            if size == PageSize::Size4K && entry.size() == PageSize::Size2M {
                self.psmash(place, gpa);
            }
            self.rmp.unassign(place, size)?;
        } else if size == PageSize::Size2M && !self.rmp.is_block_free(place) {
            self.rmp.unassign(place, size)?;
        }
        self.scramble(memory, place, gpa, size);
        self.invalidate(gpa, size, Views::ALL);
        Ok(())
    }

    /// Changes the attribute. To shared: the RMP entry goes and the contents are lost. To
    /// private: the page gets its entry on first use. Nothing happens to pages that have the
    /// attribute already.
    pub fn convert<P: PhysicalMemory>(
        &mut self,
        memory: &P,
        place: &Place,
        gpa: Gpa,
        size: PageSize,
        to: Alias,
    ) -> Result<(), UpdateError> {
        let slots = place.slots(size).ok_or(UpdateError::Input)?;
        let shared = to == Alias::Shared;
        if self.pages[slots.clone()]
            .iter()
            .all(|page| page.shared == shared)
        {
            return Ok(());
        }
        if shared {
            self.take_away(memory, place, gpa, size)?;
        } else {
            self.invalidate(gpa, size, Views::ALL);
        }
        for page in &mut self.pages[slots] {
            page.shared = shared;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::scramble_word;
    use crate::testing::Sparse;

    const BLOCK: Gpa = Gpa::new(0x20_0000);
    const SMALL: PageSize = PageSize::Size4K;
    const LARGE: PageSize = PageSize::Size2M;

    fn host(backing: HostBacking) -> (HostMemory, Sparse, Place) {
        let mut host = HostMemory::new(backing);
        host.add_ram(Gpa::new(0), 0x80_0000).unwrap();
        let place = host.layout().place(BLOCK).unwrap();
        (host, Sparse::default(), place)
    }

    /// `unaccepted-memory.md` §7, first private fault: 2 MiB only if the whole block is free.
    #[test]
    fn the_first_private_use_decides_the_size() {
        for (backing, neighbour_used, expected) in [
            (HostBacking::Size4K, false, SMALL),
            (HostBacking::Size2M, false, LARGE),
            (HostBacking::Size2M, true, SMALL),
        ] {
            let (mut host, memory, place) = host(backing);
            if neighbour_used {
                let gpa = Gpa::new(BLOCK.get() + 5 * PAGE_SIZE);
                let other = host.layout().place(gpa).unwrap();
                host.convert(&memory, &other, gpa, SMALL, Alias::Shared)
                    .unwrap();
            }
            host.prepare(&memory, &place, BLOCK).unwrap();
            assert_eq!(host.rmp().entry(&place).size(), expected);
        }
    }

    #[test]
    fn a_page_that_has_an_entry_keeps_it() {
        let (mut host, memory, place) = host(HostBacking::Size4K);
        host.prepare(&memory, &place, BLOCK).unwrap();
        host.rmp_mut().set_validated(&place, true);
        host.prepare(&memory, &place, BLOCK).unwrap();
        assert!(host.rmp().entry(&place).is_validated());
    }

    #[test]
    fn contents_are_lost_on_every_change_of_owner() {
        let (mut host, memory, place) = host(HostBacking::Size4K);
        memory.write(place.spa, &[7; 4096]);
        host.prepare(&memory, &place, BLOCK).unwrap();
        assert_eq!(memory.read_u64(place.spa), scramble_word(1, BLOCK.get()));
        host.convert(&memory, &place, BLOCK, SMALL, Alias::Shared)
            .unwrap();
        assert_eq!(memory.read_u64(place.spa), scramble_word(2, BLOCK.get()));
        // To the attribute it has: nothing happens.
        memory.write(place.spa, &[7; 4096]);
        host.convert(&memory, &place, BLOCK, SMALL, Alias::Shared)
            .unwrap();
        assert_eq!(memory.read_u64(place.spa), 0x0707_0707_0707_0707);
        host.convert(&memory, &place, BLOCK, SMALL, Alias::Private)
            .unwrap();
        host.prepare(&memory, &place, BLOCK).unwrap();
        assert_eq!(memory.read_u64(place.spa), scramble_word(3, BLOCK.get()));
        assert_eq!(host.scrambled_bytes(), 3 * PAGE_SIZE);
    }

    #[test]
    fn a_clean_page_is_not_looked_at_again() {
        let (mut host, memory, place) = host(HostBacking::Size4K);
        host.prepare(&memory, &place, BLOCK).unwrap();
        let mut find = |memory: &Sparse| host.find_scrambled(memory, &place, BLOCK, SMALL);
        assert_eq!(find(&memory), Some(BLOCK));
        memory.write(place.spa, &[0; 4096]);
        assert_eq!(find(&memory), None);
        memory.fill_scramble(place.spa, PAGE_SIZE, 1);
        assert_eq!(find(&memory), None, "it was the owner's doing");
    }

    #[test]
    fn a_large_entry_is_split_for_one_page_and_taken_whole_for_a_block() {
        let (mut host, memory, place) = host(HostBacking::Size2M);
        host.prepare(&memory, &place, BLOCK).unwrap();
        let gpa = Gpa::new(BLOCK.get() + 9 * PAGE_SIZE);
        let page = host.layout().place(gpa).unwrap();
        host.convert(&memory, &page, gpa, SMALL, Alias::Shared)
            .unwrap();
        assert_eq!(host.psmashes(), 1);
        assert!(!host.rmp().entry(&page).is_assigned());
        assert!(host.rmp().entry(&place).is_assigned());
        host.convert(&memory, &place, BLOCK, LARGE, Alias::Shared)
            .unwrap();
        assert!(host.rmp().is_block_free(&place));
        assert!(host.is_block(&place, Alias::Shared));
        host.convert(&memory, &place, BLOCK, LARGE, Alias::Private)
            .unwrap();
        host.prepare(&memory, &place, BLOCK).unwrap();
        assert_eq!(host.rmp().entry(&place).size(), LARGE);
    }

    #[test]
    fn neighbouring_invalidations_become_one() {
        let (mut host, _, _) = host(HostBacking::Size4K);
        for page in 0..4 {
            host.invalidate(Gpa::new(BLOCK.get() + page * PAGE_SIZE), SMALL, Views::ALL);
        }
        host.invalidate(Gpa::new(0), SMALL, Views::ALL);
        let queue = host.take_invalidations();
        assert_eq!(queue.len(), 2);
        assert_eq!((queue[0].gpa, queue[0].bytes), (BLOCK, 4 * PAGE_SIZE));
        assert!(host.take_invalidations().is_empty());
    }
}
