//! Nested page tables: what each VMPL sees of guest-physical memory.
//!
//! Owns the table pool and the views. A view is a 4-level tree over 48 bits: addresses below
//! 2^47 are the shared alias, those above (the C-bit) the private one. Each VMPL has two: one
//! for long mode and one for everything else, where the C-bit cannot be expressed and the
//! lower half shows private memory (facts: guests.md §5.6).
//!
//! Invariants:
//! * a leaf is installed only from a [`Mapping`] that the platform has just granted for that VMPL
//!   and alias, and withdrawn by [`Tables::forget`] when the platform says so;
//! * tables come from the pool alone, so no guest page is ever a nested table;
//! * a table that goes out of use is not used anew before every CPU that was inside the guest
//!   has left it: its page walk may be in the middle of the table;
//! * when the pool is empty all views are dropped at once and grow again by faults. No CPU may
//!   be inside a guest then: see [`Tables::is_exhausted`].

#![expect(unsafe_code, reason = "page tables are raw memory")]

use alloc::vec::Vec;

use machine::access::Mapping;
use machine::platform::Invalidation;
use machine::stale::Stay;
use machine::types::{PageSize, VcpuId, Vmpl};

use super::memory::{self, Range};
use super::smp;

/// The C-bit of this machine, as an address bit.
pub const C_BIT: u64 = 1 << 47;

/// Which of a VMPL's two views.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// The C-bit tells the aliases apart.
    Long,
    /// Paging off or not long mode: the lower half is private.
    Flat,
}

/// What is at the level of 2 MiB.
pub enum Slot {
    /// Nothing: a fault may fill a whole table.
    Empty,
    /// A table of 4 KiB entries.
    Table(LeafTable),
    /// One leaf of 2 MiB.
    Large,
}

/// A table of 512 leaves of 4 KiB.
#[derive(Clone, Copy)]
pub struct LeafTable(u64);

mod bits {
    pub const PRESENT: u64 = 1 << 0;
    pub const WRITE: u64 = 1 << 1;
    /// Nested walks are user accesses.
    pub const USER: u64 = 1 << 2;
    /// Set in advance, so that TCG need not write them.
    pub const ACCESSED_DIRTY: u64 = 1 << 5 | 1 << 6;
    pub const LARGE: u64 = 1 << 7;
    pub const NO_EXECUTE: u64 = 1 << 63;
    pub const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
    pub const TABLE: u64 = PRESENT | WRITE | USER | 1 << 5;
}

/// The entry for what the platform granted; reading always is.
fn leaf(mapping: Mapping) -> u64 {
    let mut entry = mapping.spa.get() | bits::PRESENT | bits::USER | bits::ACCESSED_DIRTY;
    if mapping.write {
        entry |= bits::WRITE;
    }
    if !mapping.execute {
        entry |= bits::NO_EXECUTE;
    }
    entry
}

fn entry_at(table: u64, index: u64) -> *mut u64 {
    memory::virt(table + index * 8).cast()
}

fn get(table: u64, index: u64) -> u64 {
    // SAFETY: `table` is a page of the pool and `index` below 512.
    unsafe { entry_at(table, index).read_volatile() }
}

fn set(table: u64, index: u64, entry: u64) {
    // SAFETY: as in `get`; volatile because other CPUs' page walks read it.
    unsafe { entry_at(table, index).write_volatile(entry) };
}

/// Index of `address` at a level: 1 for 4 KiB entries up to 4 for the root.
const fn index(address: u64, level: u32) -> u64 {
    address >> (12 + 9 * (level - 1)) & 0x1FF
}

impl LeafTable {
    /// Installs or (with `None`) clears the leaf of the page at `address`.
    pub fn set(self, address: u64, mapping: Option<Mapping>) {
        set(self.0, index(address, 1), mapping.map_or(0, leaf));
    }
}

/// All views and the pool they grow from.
pub struct Tables {
    pool: Range,
    next: u64,
    free: Vec<u64>,
    /// Tables that went out of use, with the stays whose walks may still be in them.
    retired: Vec<(u64, Vec<Stay>)>,
    roots: [[Option<u64>; 2]; Vmpl::COUNT],
}

/// Tables that one fault can need at most: root, two levels, leaf table.
const PER_FAULT: u64 = 4;

impl Tables {
    /// Empty views over a pool.
    pub fn new(pool: Range) -> Self {
        Tables {
            pool,
            next: pool.start,
            free: Vec::new(),
            retired: Vec::new(),
            roots: Default::default(),
        }
    }

    /// Whether the next fault may find the pool empty. The caller then gets every CPU out of
    /// its guest and calls [`Tables::recycle`].
    pub fn is_exhausted(&mut self) -> bool {
        let scarce = |tables: &Self| {
            let untouched = tables.pool.end - tables.next;
            (tables.free.len() as u64) < PER_FAULT && untouched < PER_FAULT * 4096
        };
        if scarce(self) {
            self.reclaim();
        }
        scarce(self)
    }

    /// Makes the retired tables free that nobody can be walking any more.
    fn reclaim(&mut self) {
        let free = &mut self.free;
        self.retired.retain(|(table, stays)| {
            let walked = stays.iter().any(|&stay| smp::is_inside(stay));
            if !walked {
                free.push(*table);
            }
            walked
        });
    }

    /// Drops all views.
    pub fn recycle(&mut self) {
        self.next = self.pool.start;
        self.free.clear();
        self.retired.clear();
        self.roots = Default::default();
    }

    fn allocate(&mut self) -> u64 {
        let table = self.free.pop().unwrap_or_else(|| {
            let table = self.next;
            assert!(
                table < self.pool.end,
                "the caller recycles an exhausted pool first"
            );
            self.next += 4096;
            table
        });
        // SAFETY: a page of the pool that is part of no view.
        unsafe { memory::virt(table).write_bytes(0, 4096) };
        table
    }

    /// Physical address of the root of a view.
    pub fn root(&mut self, vmpl: Vmpl, mode: Mode) -> u64 {
        if let Some(root) = self.roots[vmpl.index()][mode as usize] {
            return root;
        }
        let root = self.allocate();
        self.roots[vmpl.index()][mode as usize] = Some(root);
        root
    }

    /// The table of level 2 (whose entries span 2 MiB) for `address`, if it exists.
    fn directory(root: u64, address: u64) -> Option<u64> {
        let mut table = root;
        for level in [4, 3] {
            let entry = get(table, index(address, level));
            if entry & bits::PRESENT == 0 {
                return None;
            }
            table = entry & bits::ADDRESS;
        }
        Some(table)
    }

    fn grow_directory(&mut self, root: u64, address: u64) -> u64 {
        let mut table = root;
        for level in [4, 3] {
            let entry = get(table, index(address, level));
            table = if entry & bits::PRESENT == 0 {
                let child = self.allocate();
                set(table, index(address, level), child | bits::TABLE);
                child
            } else {
                entry & bits::ADDRESS
            };
        }
        table
    }

    /// What a view has for the 2 MiB at `address` (48 bits, with the C-bit).
    pub fn slot(&self, vmpl: Vmpl, mode: Mode, address: u64) -> Slot {
        let Some(root) = self.roots[vmpl.index()][mode as usize] else {
            return Slot::Empty;
        };
        match Self::directory(root, address).map(|table| get(table, index(address, 2))) {
            Some(entry) if entry & bits::PRESENT == 0 => Slot::Empty,
            Some(entry) if entry & bits::LARGE != 0 => Slot::Large,
            Some(entry) => Slot::Table(LeafTable(entry & bits::ADDRESS)),
            None => Slot::Empty,
        }
    }

    /// Makes sure there is a table of 4 KiB leaves for `address`; a large leaf is dropped.
    pub fn grow(&mut self, vmpl: Vmpl, mode: Mode, address: u64) -> LeafTable {
        if let Slot::Table(table) = self.slot(vmpl, mode, address) {
            return table;
        }
        let root = self.root(vmpl, mode);
        let directory = self.grow_directory(root, address);
        let table = self.allocate();
        set(directory, index(address, 2), table | bits::TABLE);
        LeafTable(table)
    }

    /// Maps the 2 MiB at `address` by one leaf. `this` is the CPU that does it.
    pub fn map_large(
        &mut self,
        this: VcpuId,
        vmpl: Vmpl,
        mode: Mode,
        address: u64,
        mapping: Mapping,
    ) {
        let root = self.root(vmpl, mode);
        let directory = self.grow_directory(root, address);
        let old = get(directory, index(address, 2));
        set(directory, index(address, 2), leaf(mapping) | bits::LARGE);
        if old & bits::PRESENT != 0 && old & bits::LARGE == 0 {
            let stays = smp::inside(this).map(|(stay, _)| stay).collect();
            self.retired.push((old & bits::ADDRESS, stays));
        }
    }

    /// Withdraws stale leaves, both aliases. For each page whose table of 4 KiB leaves stays,
    /// `refill` says what holds now; a whole block is left to the next fault, which may find
    /// that one large leaf will do. A large leaf over a single page is dropped.
    ///
    /// Says for each VMPL whether it lost or got another mapping: only then can a CPU hold a
    /// translation that is no longer true.
    pub fn forget(
        &self,
        stale: &Invalidation,
        refill: impl Fn(Vmpl, Mode, u64) -> Option<Mapping>,
    ) -> [bool; Vmpl::COUNT] {
        let mut changed = [false; Vmpl::COUNT];
        let block = PageSize::Size2M.bytes();
        let end = stale.gpa.get() + stale.bytes;
        for vmpl in Vmpl::ALL
            .into_iter()
            .filter(|&vmpl| stale.views.contains(vmpl))
        {
            for mode in [Mode::Long, Mode::Flat] {
                let Some(root) = self.roots[vmpl.index()][mode as usize] else {
                    continue;
                };
                for alias in [0, C_BIT] {
                    let mut at = stale.gpa.get();
                    while at < end {
                        let next = (at / block + 1) * block;
                        let pages = at | alias..next.min(end) | alias;
                        changed[vmpl.index()] |=
                            Self::forget_in_block(root, pages, |page| refill(vmpl, mode, page));
                        at = next;
                    }
                }
            }
        }
        changed
    }

    /// The part of [`Tables::forget`] inside one block; whether a mapping changed.
    fn forget_in_block(
        root: u64,
        pages: core::ops::Range<u64>,
        refill: impl Fn(u64) -> Option<Mapping>,
    ) -> bool {
        let Some(directory) = Self::directory(root, pages.start) else {
            return false;
        };
        let slot = index(pages.start, 2);
        let entry = get(directory, slot);
        if entry & bits::PRESENT == 0 {
            return false;
        }
        if entry & bits::LARGE != 0 {
            set(directory, slot, 0);
            return true;
        }
        let table = entry & bits::ADDRESS;
        if pages.end - pages.start == PageSize::Size2M.bytes() {
            let changed = (0..512).any(|n| get(table, n) & bits::PRESENT != 0);
            // SAFETY: a table of the pool, in use as such.
            unsafe { memory::virt(table).write_bytes(0, 4096) };
            return changed;
        }
        pages.step_by(4096).fold(false, |changed, page| {
            let old = get(table, index(page, 1));
            let new = refill(page).map_or(0, leaf);
            set(table, index(page, 1), new);
            changed || (old & bits::PRESENT != 0 && old != new)
        })
    }
}
