//! The memory map of the machine: which guest pages exist and where they are.
//!
//! GPA equals SPA (devices do DMA with guest addresses), except for windows: pages the
//! image wants where QEMU has no RAM (the firmware below 4 GiB, the VMSA at the top of the
//! address space), which the machine backs with memory of its own.
//!
//! Every existing page has a [`Slot`]: its place in the RMP and in the host's page table.
//! Slots of one range are consecutive, so the slots of a 2 MiB block that lies in one range
//! are consecutive too.

use alloc::vec::Vec;

use crate::types::{Gpa, PAGE_SIZE, PAGES_PER_BLOCK, PageSize, Spa};

const BLOCK_SIZE: u64 = PageSize::Size2M.bytes();

/// Entries that per-page tables keep in reserve for windows: 64 MiB.
const SPARE_PAGES: usize = (64 << 20) / PAGE_SIZE as usize;

/// Makes room for `pages` entries, and some for windows added later. Exactly, and seldom: the
/// machine's own memory has no room for a second copy or for doubling.
pub(crate) fn reserve<T>(table: &mut Vec<T>, pages: usize) {
    if pages > table.capacity() {
        table.reserve_exact(pages - table.len() + SPARE_PAGES);
    }
}

/// Place of a page in the per-page tables. Only [`Layout`] makes one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Slot(usize);

impl Slot {
    /// As an index into a table of [`Layout::pages`] entries.
    pub const fn index(self) -> usize {
        self.0
    }
}

/// Where a PC has video memory and ROMs.
pub const LEGACY_HOLE: core::ops::Range<u64> = 0xA_0000..0x10_0000;

/// Sorts ranges of bytes that do not overlap, and joins neighbours.
pub(crate) fn join(ranges: &mut Vec<core::ops::Range<u64>>) {
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|next, last| {
        let touch = last.end == next.start;
        if touch {
            last.end = next.end;
        }
        touch
    });
}

/// What stands behind a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backing {
    /// QEMU's RAM, identity mapped.
    Ram,
    /// Memory of the machine, put where the image wants pages and QEMU has none.
    Window,
    /// Memory of the machine in the legacy hole below 1 MiB, for guests that have RAM there.
    Legacy,
}

/// A run of existing pages.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    /// First guest-physical address, page aligned.
    pub gpa: Gpa,
    /// Number of 4 KiB pages.
    pub pages: usize,
    /// System-physical address of the first page.
    pub spa: Spa,
    /// What the pages are.
    pub backing: Backing,
    first: usize,
}

impl Range {
    /// Bytes of the range.
    pub const fn bytes(&self) -> u64 {
        self.pages as u64 * PAGE_SIZE
    }

    /// Whether `gpa` lies in the range.
    pub const fn contains(&self, gpa: Gpa) -> bool {
        gpa.get() >= self.gpa.get() && gpa.get() - self.gpa.get() < self.bytes()
    }

    /// Whether the 2 MiB block at `block` can be one RMP entry: whole, and aligned on both sides.
    const fn holds_block(&self, block: Gpa) -> bool {
        self.contains(block)
            && self.contains(Gpa::new(block.get() + (BLOCK_SIZE - 1)))
            && (self.spa.get() ^ self.gpa.get()) & (BLOCK_SIZE - 1) == 0
    }
}

/// Where a page is.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Index of the page's own entry.
    pub slot: Slot,
    /// Index of the first page's entry of the 2 MiB block, if the block can be one RMP entry.
    pub block: Option<Slot>,
    /// System-physical address of the page.
    pub spa: Spa,
}

/// Why a range was not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LayoutError {
    /// Address or length is not a multiple of 4 KiB, or the length is 0.
    Misaligned,
    /// The range touches one that exists.
    Overlap,
    /// The range passes the end of the address space.
    Wrap,
}

/// All ranges. The first one looked at is low RAM, which serves nearly every request.
#[derive(Default, Debug)]
pub struct Layout {
    ranges: Vec<Range>,
    pages: usize,
}

impl Layout {
    /// An empty map.
    pub const fn new() -> Self {
        Self {
            ranges: Vec::new(),
            pages: 0,
        }
    }

    /// Adds RAM at `gpa` (= SPA), `bytes` long.
    pub fn add_ram(&mut self, gpa: Gpa, bytes: u64) -> Result<(), LayoutError> {
        self.add(gpa, bytes, Spa::new(gpa.get()), Backing::Ram)
    }

    /// Adds a window at `gpa`, `bytes` long, backed by machine memory at `spa`.
    pub fn add_window(&mut self, gpa: Gpa, bytes: u64, spa: Spa) -> Result<(), LayoutError> {
        self.add(gpa, bytes, spa, Backing::Window)
    }

    /// Makes the legacy hole memory, backed by machine memory at `spa`.
    pub fn add_legacy(&mut self, spa: Spa) -> Result<(), LayoutError> {
        let (start, end) = (LEGACY_HOLE.start, LEGACY_HOLE.end);
        self.add(Gpa::new(start), end - start, spa, Backing::Legacy)
    }

    fn add(&mut self, gpa: Gpa, bytes: u64, spa: Spa, backing: Backing) -> Result<(), LayoutError> {
        let aligned = (gpa.get() | spa.get() | bytes) & (PAGE_SIZE - 1) == 0;
        if !aligned || bytes == 0 {
            return Err(LayoutError::Misaligned);
        }
        let last = gpa.get().checked_add(bytes - 1).ok_or(LayoutError::Wrap)?;
        let overlaps =
            |r: &Range| gpa.get() <= r.gpa.get() + (r.bytes() - 1) && r.gpa.get() <= last;
        if self.ranges.iter().any(overlaps) {
            return Err(LayoutError::Overlap);
        }
        let pages = (bytes / PAGE_SIZE) as usize;
        self.ranges.push(Range {
            gpa,
            pages,
            spa,
            backing,
            first: self.pages,
        });
        self.pages += pages;
        Ok(())
    }

    /// Number of existing pages: the length of a per-page table.
    pub const fn pages(&self) -> usize {
        self.pages
    }

    /// The ranges in the order they were added.
    pub fn ranges(&self) -> &[Range] {
        &self.ranges
    }

    /// The memory that a guest is told of: ascending, neighbours joined.
    pub fn memory(&self) -> Vec<core::ops::Range<u64>> {
        let told = self.ranges.iter().filter(|r| r.backing != Backing::Window);
        let mut told: Vec<_> = told
            .map(|range| range.gpa.get()..range.gpa.get() + range.bytes())
            .collect();
        join(&mut told);
        told
    }

    /// The range `gpa` lies in.
    #[inline]
    pub fn range(&self, gpa: Gpa) -> Option<&Range> {
        self.ranges.iter().find(|r| r.contains(gpa))
    }

    /// Whether the page of `gpa` is backed by memory of the machine.
    pub fn is_window(&self, gpa: Gpa) -> bool {
        self.range(gpa)
            .is_some_and(|range| range.backing != Backing::Ram)
    }

    /// Where the page of `gpa` is; `None` if there is no memory.
    #[inline]
    pub fn place(&self, gpa: Gpa) -> Option<Place> {
        let range = self.range(gpa)?;
        let offset = gpa.align_down(PageSize::Size4K).get() - range.gpa.get();
        let slot = Slot(range.first + (offset / PAGE_SIZE) as usize);
        let within = (gpa.get() / PAGE_SIZE) as usize % PAGES_PER_BLOCK;
        let block = range
            .holds_block(gpa.align_down(PageSize::Size2M))
            .then(|| Slot(slot.0 - within));
        Some(Place {
            slot,
            block,
            spa: range.spa.plus(offset),
        })
    }

    /// Where `gpa` itself (not its page) is.
    pub fn spa_of(&self, gpa: Gpa) -> Option<Spa> {
        self.place(gpa)
            .map(|place| place.spa.plus(gpa.offset_in_page()))
    }

    /// Whether all of `[gpa, gpa + size)` is in one range.
    pub fn holds(&self, gpa: Gpa, size: PageSize) -> bool {
        self.range(gpa).is_some_and(|r| {
            gpa.checked_add(size.bytes() - 1)
                .is_some_and(|last| r.contains(last))
        })
    }

    /// The guest address of a slot; for the referee, which walks all pages.
    pub fn gpa_of(&self, slot: Slot) -> Option<Gpa> {
        let range = self
            .ranges
            .iter()
            .find(|r| slot.0 >= r.first && slot.0 - r.first < r.pages)?;
        range
            .gpa
            .checked_add((slot.0 - range.first) as u64 * PAGE_SIZE)
    }
}

impl Place {
    /// The slots of the page (4 KiB) or of its whole block (2 MiB, if it can be one entry).
    pub fn slots(&self, size: PageSize) -> Option<core::ops::Range<usize>> {
        let first = match size {
            PageSize::Size4K => self.slot,
            PageSize::Size2M => self.block?,
        };
        Some(first.0..first.0 + size.pages() as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map() -> Layout {
        let mut map = Layout::new();
        map.add_ram(Gpa::new(0), 0xA_0000).unwrap();
        map.add_ram(Gpa::new(0x10_0000), 0x3F0_0000).unwrap();
        map.add_window(Gpa::new(0xFFC0_0000), 0x40_0000, Spa::new(0x500_0000))
            .unwrap();
        map.add_window(Gpa::new(0xFFFF_FFFF_F000), 0x1000, Spa::new(0x540_0000))
            .unwrap();
        map
    }

    #[test]
    fn ram_is_identity_and_windows_are_not() {
        let map = map();
        assert_eq!(map.spa_of(Gpa::new(0x12_3456)), Some(Spa::new(0x12_3456)));
        assert_eq!(
            map.spa_of(Gpa::new(0xFFC0_0010)),
            Some(Spa::new(0x500_0010))
        );
        assert_eq!(map.spa_of(Gpa::new(0xA_0000)), None);
        assert_eq!(
            map.spa_of(Gpa::new(0xFFFF_FFFF_FFFF)),
            Some(Spa::new(0x540_0FFF))
        );
    }

    #[test]
    fn a_guest_is_told_of_ram_and_of_a_filled_hole() {
        let mut map = map();
        assert_eq!(map.memory(), [0..0xA_0000, 0x10_0000..0x400_0000]);
        map.add_legacy(Spa::new(0x560_0000)).unwrap();
        assert_eq!(map.memory(), core::slice::from_ref(&(0..0x400_0000)));
        assert_eq!(map.spa_of(Gpa::new(0xC_0000)), Some(Spa::new(0x562_0000)));
        assert!(map.is_window(Gpa::new(0xC_0000)));
        assert_eq!(
            map.add_legacy(Spa::new(0x600_0000)),
            Err(LayoutError::Overlap)
        );
    }

    #[test]
    fn a_block_with_a_hole_is_no_block() {
        let map = map();
        assert!(map.place(Gpa::new(0x1000)).unwrap().block.is_none());
        assert!(map.place(Gpa::new(0x10_0000)).unwrap().block.is_none());
        let place = map.place(Gpa::new(0x20_3000)).unwrap();
        assert_eq!(place.slot.index() - place.block.unwrap().index(), 3);
    }

    #[test]
    fn slots_and_addresses_are_inverse() {
        let map = map();
        for slot in 0..map.pages() {
            let gpa = map.gpa_of(Slot(slot)).unwrap();
            assert_eq!(map.place(gpa).unwrap().slot, Slot(slot));
        }
        assert_eq!(map.gpa_of(Slot(map.pages())), None);
    }

    #[test]
    fn ranges_neither_overlap_nor_wrap() {
        let mut map = map();
        assert_eq!(
            map.add_ram(Gpa::new(0x3FF_F000), 0x2000),
            Err(LayoutError::Overlap)
        );
        assert_eq!(
            map.add_ram(Gpa::new(!0xFFF), 0x2000),
            Err(LayoutError::Wrap)
        );
        assert_eq!(
            map.add_ram(Gpa::new(0x800), 0x1000),
            Err(LayoutError::Misaligned)
        );
        assert_eq!(
            map.add_ram(Gpa::new(0xB_0000), 0),
            Err(LayoutError::Misaligned)
        );
    }
}
