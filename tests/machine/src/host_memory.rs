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
        self.rmp.assign(place, gpa.align_down(size), size, false)?;
        self.scramble(memory, place, gpa, size);
        self.invalidate(gpa, size, Views::ALL);
        Ok(())
    }

    /// RMPUPDATE to immutable (Pre-Guest) for the launch; contents follow from the image.
    pub(crate) fn assign_for_launch(&mut self, place: &Place, gpa: Gpa) -> Result<(), UpdateError> {
        if self.attribute(place) == Alias::Shared || self.rmp.entry(place).is_assigned() {
            return Err(UpdateError::Overlap);
        }
        self.rmp.assign(place, gpa.align_down(PageSize::Size4K), PageSize::Size4K, true)
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
