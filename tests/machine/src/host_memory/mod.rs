//! The host's side of memory, as KVM with guest_memfd does it.
//!
//! Every page has an attribute, private or shared, that only the host changes (initially all
//! private, as under QEMU). A private page gets a folio ([`folios`]) and an RMP entry on first
//! use, not before: of 2 MiB if the folio is and the whole block is private and assigned to
//! nobody, else of 4 KiB (`unaccepted-memory.md` §7). Making a page shared gives up its part of
//! the folio and takes its RMP entry away, splitting a large one only if a part of it stays. What
//! RMP updates do to the host's own mapping is counted in [`direct_map`].
//!
//! A conversion touches exactly the range it is asked for: pages that have the attribute already
//! keep their contents, neighbours keep their entries and mappings. The model is described in
//! `docs/host-memory.md`.
//!
//! Contents never survive a change of owner or alias: the page is filled with the scramble
//! pattern and the generation is remembered, so that a page handed on without a scrub is
//! recognised.
//!
//! Who may call: [`crate::platform::Platform`] only. Every change that makes a mapping stale
//! is queued as an [`Invalidation`].

pub mod direct_map;
pub mod folios;
mod swap;

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::ops::Range;

use protocols::report;

use self::direct_map::DirectMap;
use self::folios::Folios;
use self::swap::Aside;
use crate::layout::{Layout, LayoutError, Place, reserve};
use crate::memory::PhysicalMemory;
use crate::platform::{Cause, Invalidation, Views};
use crate::rmp::{Entry, Rmp, UpdateError};
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
    /// VMPL0 has validated the address, or the launch has, and VMPL0 has not rescinded it since. In a
    /// trust domain: L1 has accepted it, or the launch has, and L1 has not given it back since. Unlike
    /// the RMP's bit this outlives what the host does to the page.
    accepted: bool,
}

/// Layout, attributes and RMP of all guest memory.
pub struct HostMemory {
    layout: Layout,
    rmp: Rmp,
    pages: Vec<Page>,
    /// Pages kept aside by a hostile host, by the slot of their address.
    aside: BTreeMap<usize, Aside>,
    folios: Folios,
    direct_map: DirectMap,
    conversions: report::Conversions,
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
            aside: BTreeMap::new(),
            folios: Folios::new(backing),
            direct_map: DirectMap::new(),
            conversions: report::Conversions::default(),
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

    /// Makes the legacy hole memory of the machine.
    pub fn add_legacy(&mut self, spa: Spa) -> Result<(), LayoutError> {
        self.layout.add_legacy(spa)?;
        self.grow();
        Ok(())
    }

    fn grow(&mut self) {
        self.rmp.resize(self.layout.pages());
        let pages = self.layout.pages();
        reserve(&mut self.pages, pages);
        self.pages.resize(pages, Page::default());
        self.folios.resize(pages);
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
    pub(crate) fn invalidate(&mut self, gpa: Gpa, size: PageSize, views: Views, cause: Cause) {
        let gpa = gpa.align_down(size);
        let bytes = size.bytes();
        // Requests walk upwards, so runs merge into one entry.
        if let Some(last) = self.invalidations.last_mut()
            && (last.views, last.cause) == (views, cause)
            && last.gpa.get() + last.bytes == gpa.get()
        {
            last.bytes += bytes;
            return;
        }
        self.invalidations.push(Invalidation {
            gpa,
            bytes,
            views,
            cause,
        });
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

    /// Notes that the page or block was validated or rescinded from inside (in a trust domain:
    /// accepted or given back). Returns whether a page
    /// of it had been validated before and not rescinded since, whatever the host has done to the
    /// RMP meanwhile.
    pub(crate) fn note_validation(
        &mut self,
        place: &Place,
        size: PageSize,
        validated: bool,
    ) -> bool {
        let slots = place.slots(size).unwrap_or_default();
        let mut before = false;
        for page in &mut self.pages[slots] {
            before |= core::mem::replace(&mut page.accepted, validated);
        }
        before
    }

    /// Whether all pages of the block have the attribute `alias`; false where the block is
    /// not whole.
    pub fn is_block(&self, place: &Place, alias: Alias) -> bool {
        let shared = alias == Alias::Shared;
        place
            .slots(PageSize::Size2M)
            .is_some_and(|slots| self.pages[slots].iter().all(|page| page.shared == shared))
    }

    /// Fills the private ones of `slots` with the pattern; `start` is where the first one is.
    fn scramble<P: PhysicalMemory>(&mut self, memory: &P, start: Spa, slots: Range<usize>) {
        // 0 means "no pattern"; after 2^32 changes the count starts again at 1.
        self.generation = self.generation.wrapping_add(1).max(1);
        let mut at = start;
        for run in self.pages[slots].chunk_by_mut(|a, b| a.shared == b.shared) {
            let bytes = run.len() as u64 * PAGE_SIZE;
            if !run[0].shared {
                memory.fill_scramble(at, bytes, self.generation);
                for page in run {
                    page.generation = self.generation;
                    page.given_away = false;
                }
                self.scrambled_bytes += bytes;
            }
            at = at.plus(bytes);
        }
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
    /// Does nothing if it has one, but for unblocking it.
    pub fn prepare<P: PhysicalMemory>(
        &mut self,
        memory: &P,
        place: &Place,
        gpa: Gpa,
    ) -> Result<(), UpdateError> {
        let entry = self.rmp.entry(place);
        if entry.is_assigned() {
            if entry.is_blocked() {
                self.rmp.set_blocked(place, false);
            }
            return Ok(());
        }
        let large = self.touch(place) == PageSize::Size2M
            && self.rmp.is_block_free(place)
            && self.is_block(place, Alias::Private)
            && self.folios.allocate_large(place);
        let size = if large {
            PageSize::Size2M
        } else {
            PageSize::Size4K
        };
        self.assign(memory, place, gpa, size)
    }

    /// TDG.MEM.PAGE.ACCEPT of a pending page or block: its contents become zero, and the guest
    /// may use it. Says whether a part of it was accepted before and never given back.
    pub(crate) fn accept<P: PhysicalMemory>(
        &mut self,
        memory: &P,
        place: &Place,
        gpa: Gpa,
        size: PageSize,
    ) -> Result<bool, UpdateError> {
        let (start, slots) = extent(place, gpa, size).ok_or(UpdateError::Input)?;
        memory.fill_zero(start, size.bytes());
        self.rmp.set_validated(place, true);
        for page in &mut self.pages[slots] {
            page.generation = 0;
        }
        Ok(self.note_validation(place, size, true))
    }

    /// Blocks the secure EPT entry of a page, as hosts do before they change it. False if there is
    /// none.
    pub(crate) fn block(&mut self, place: &Place, gpa: Gpa) -> bool {
        let entry = self.rmp.entry(place);
        if !entry.is_assigned() {
            return false;
        }
        self.rmp.set_blocked(place, true);
        self.invalidate(gpa, entry.size(), Views::ALL, Cause::Host);
        true
    }

    /// Backs a block by 2 MiB whatever the settings say. Refused if one of its pages is shared, or
    /// has memory of its own.
    pub(crate) fn back_by_2m<P: PhysicalMemory>(
        &mut self,
        memory: &P,
        place: &Place,
        gpa: Gpa,
    ) -> Result<(), UpdateError> {
        if !self.is_block(place, Alias::Private)
            || !self.rmp.is_block_free(place)
            || !self.folios.allocate_large(place)
        {
            return Err(UpdateError::Overlap);
        }
        self.assign(memory, place, gpa, PageSize::Size2M)
    }

    /// Makes sure that a private page has a folio; its size.
    fn touch(&mut self, place: &Place) -> PageSize {
        let pages = &self.pages;
        self.folios.touch(place, || {
            place
                .slots(PageSize::Size2M)
                .is_some_and(|slots| !pages[slots].iter().any(|page| page.shared))
        })
    }

    /// RMPUPDATE to the guest, with new contents.
    fn assign<P: PhysicalMemory>(
        &mut self,
        memory: &P,
        place: &Place,
        gpa: Gpa,
        size: PageSize,
    ) -> Result<(), UpdateError> {
        let (start, slots) = extent(place, gpa, size).ok_or(UpdateError::Input)?;
        self.update(place, gpa, size, false)?;
        self.scramble(memory, start, slots);
        Ok(())
    }

    /// RMPUPDATE to immutable (Pre-Guest) for the launch; contents follow from the image.
    pub(crate) fn assign_for_launch(&mut self, place: &Place, gpa: Gpa) -> Result<(), UpdateError> {
        if self.attribute(place) == Alias::Shared || self.rmp.entry(place).is_assigned() {
            return Err(UpdateError::Overlap);
        }
        self.touch(place);
        self.update(place, gpa, PageSize::Size4K, true)
    }

    /// RMPUPDATE to the guest. Nothing becomes stale: a private page without an entry is mapped
    /// nowhere.
    fn update(
        &mut self,
        place: &Place,
        gpa: Gpa,
        size: PageSize,
        immutable: bool,
    ) -> Result<(), UpdateError> {
        self.rmp
            .assign(place, gpa.align_down(size), size, immutable)?;
        if size == PageSize::Size4K {
            self.direct_map.small_update(place.spa);
            if self.folios.size(place) == Some(PageSize::Size4K) {
                self.direct_map.small_folio(place.spa);
            }
        }
        Ok(())
    }

    /// Splits the large entry that speaks for the page, if one does, as KVM does for an
    /// instruction of 4 KiB on it. The whole block is mapped anew: a large nested mapping of
    /// small entries would fault.
    pub fn psmash(&mut self, place: &Place, gpa: Gpa) -> bool {
        let split = self.split(place);
        if split {
            self.invalidate(gpa, PageSize::Size2M, Views::ALL, Cause::Split);
        }
        split
    }

    fn split(&mut self, place: &Place) -> bool {
        let split = self.rmp.psmash(place);
        self.psmashes += u64::from(split);
        split
    }

    /// Takes a page or a whole block away from the guest; the attribute stays. Contents go, of
    /// the pages that are not shared.
    pub fn take_away<P: PhysicalMemory>(
        &mut self,
        memory: &P,
        place: &Place,
        gpa: Gpa,
        size: PageSize,
    ) -> Result<(), UpdateError> {
        let (start, slots) = extent(place, gpa, size).ok_or(UpdateError::Input)?;
        let entry = self.rmp.entry(place);
        let in_large = entry.is_assigned() && entry.size() == PageSize::Size2M;
        let assigned = match size {
            PageSize::Size4K => entry.is_assigned(),
            PageSize::Size2M => !self.rmp.is_block_free(place),
        };
        if assigned {
            if in_large && size == PageSize::Size4K {
                self.split(place);
            }
            self.rmp.unassign(place, size)?;
            if !in_large || size == PageSize::Size4K {
                self.direct_map.small_update(place.spa);
            }
        }
        self.folios.punch(place, slots.clone());
        self.scramble(memory, start, slots);
        self.invalidate(gpa, size, Views::ALL, Cause::Host);
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
        let differ = |page: &&Page| page.shared != shared;
        let changing = self.pages[slots.clone()].iter().filter(differ).count() as u64;
        if changing == 0 {
            return Ok(());
        }
        if shared {
            self.take_away(memory, place, gpa, size)?;
            self.conversions.pages_to_shared += changing;
        } else {
            self.invalidate(gpa, size, Views::ALL, Cause::Host);
            self.conversions.pages_to_private += changing;
        }
        self.conversions.invalidated_pages += size.pages();
        for page in &mut self.pages[slots] {
            page.shared = shared;
        }
        Ok(())
    }

    /// Counts a contiguous range that [`Self::convert`] is called for piece by piece.
    pub(crate) const fn count_range(&mut self, to: Alias) {
        match to {
            Alias::Private => self.conversions.ranges_to_private += 1,
            Alias::Shared => self.conversions.ranges_to_shared += 1,
        }
    }

    /// The host's part of the report's figures on memory.
    pub fn report(&self) -> report::Memory {
        let entry = |slot: usize| self.rmp.entry_at(slot);
        report::Memory {
            guest_pages: self.layout.pages() as u64,
            assigned_pages: self.rmp.count(Entry::is_assigned),
            validated_pages: self.rmp.count(Entry::is_validated),
            scrambled_bytes: self.scrambled_bytes,
            psmashes: self.psmashes,
            shared_pages: self.pages.iter().filter(|page| page.shared).count() as u64,
            conversions: self.conversions,
            folios: self
                .folios
                .report(|slot| entry(slot).is_assigned() && entry(slot).size() == PageSize::Size2M),
            direct_map: self.direct_map.report(&self.layout),
            ..report::Memory::default()
        }
    }
}

/// Where the page or block of `gpa` at `place` begins, and its slots.
fn extent(place: &Place, gpa: Gpa, size: PageSize) -> Option<(Spa, Range<usize>)> {
    let into_block = gpa.align_down(PageSize::Size4K).get() - gpa.align_down(size).get();
    let start = Spa::new(place.spa.get().checked_sub(into_block)?);
    Some((start, place.slots(size)?))
}

#[cfg(test)]
mod tests;
