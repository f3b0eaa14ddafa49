//! The live page tables: those of the image, extended at boot.
//!
//! Tables lie in the region (mapped one to one) or in the carve-out (mapped in
//! [`OWN_WINDOW`]), always private. Invariants:
//!
//! - a leaf is either not writable or not executable;
//! - every leaf but those of GHCB pages has the C-bit;
//! - user leaves are never executable and lie in the guest window only;
//! - accessed and dirty bits are set beforehand, so the processor never writes to a table.
#![expect(unsafe_code, reason = "reads and writes live page tables")]

use protocols::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE};
use protocols::terminate::TurnstileReason;
use spin::Mutex;
use x86_64::VirtAddr;
use x86_64::instructions::tlb;
use x86_64::structures::paging::{PageTable, PageTableFlags, PageTableIndex};

use super::layout::{OWN_WINDOW, PageRange};
use super::pool::Pool;

/// Bits of an entry that hold an address, the C-bit possibly among them.
const ADDRESS_MASK: u64 = 0x000F_FFFF_FFFF_F000;
/// Rights of every table entry: the leaf decides.
const TABLE: PageTableFlags = PageTableFlags::PRESENT
    .union(PageTableFlags::WRITABLE)
    .union(PageTableFlags::USER_ACCESSIBLE)
    .union(PageTableFlags::ACCESSED);
/// Rights of a leaf for data of the paravisor.
const OWN_DATA: PageTableFlags = PageTableFlags::PRESENT
    .union(PageTableFlags::WRITABLE)
    .union(PageTableFlags::NO_EXECUTE)
    .union(PageTableFlags::ACCESSED)
    .union(PageTableFlags::DIRTY);
/// Rights of a leaf for guest memory.
const GUEST_DATA: PageTableFlags = OWN_DATA.union(PageTableFlags::USER_ACCESSIBLE);

/// Through which alias a page is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alias {
    /// C-bit clear: readable by the host.
    Shared,
}

/// Whose memory a window shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The paravisor's: supervisor pages.
    Paravisor,
    /// The guest's: user pages.
    Guest,
}

/// The root, and what tells tables in the region from others.
struct Tables {
    root: Gpa,
    region: PageRange,
    c_bit: u64,
}

static TABLES: Mutex<Option<Tables>> = Mutex::new(None);

/// Takes over the image's tables; `c_bit` is a bit of addresses, none on a platform without one.
pub fn init(root: Gpa, region: PageRange, c_bit: Option<u32>) {
    *TABLES.lock() = Some(Tables {
        root,
        region,
        c_bit: c_bit.map_or(0, |bit| 1 << bit),
    });
}

/// Maps the 4 KiB page of the region at `gpa` through another alias.
///
/// # Errors
///
/// [`TurnstileReason::INTERNAL`] if there is no such leaf.
pub fn set_alias(gpa: Gpa, alias: Alias) -> Result<(), TurnstileReason> {
    with_leaf(gpa, |entry, _| {
        let Alias::Shared = alias;
        *entry = gpa.get() | OWN_DATA.bits();
    })
}

/// Removes the 4 KiB page of the region at `gpa` from the address space.
///
/// # Errors
///
/// [`TurnstileReason::INTERNAL`] if there is no such leaf.
pub fn unmap(gpa: Gpa) -> Result<(), TurnstileReason> {
    with_leaf(gpa, |entry, _| *entry = 0)
}

/// Maps the whole 2 MiB pages `pages` at `window` plus their address. Missing tables come
/// from `pool`.
///
/// # Errors
///
/// [`TurnstileReason::OUT_OF_MEMORY`] if the pool is empty, [`TurnstileReason::INTERNAL`] if a
/// part is mapped otherwise already.
pub fn map_large(
    window: u64,
    pages: PageRange,
    owner: Owner,
    pool: &mut Pool,
) -> Result<(), TurnstileReason> {
    let rights = match owner {
        Owner::Paravisor => OWN_DATA,
        Owner::Guest => GUEST_DATA,
    };
    let guard = TABLES.lock();
    let tables = guard.as_ref().ok_or(TurnstileReason::INTERNAL)?;
    let steps = (pages.start().get()..pages.end().get()).step_by(LARGE_PAGE_SIZE as usize);
    for gpa in steps {
        let address = VirtAddr::try_new(window + gpa).map_err(|_| TurnstileReason::INTERNAL)?;
        let mut table = tables.root;
        for index in [address.p4_index(), address.p3_index()] {
            table = tables.descend_or_create(table, index, pool)?;
        }
        let leaf = gpa | tables.c_bit | (rights | PageTableFlags::HUGE_PAGE).bits();
        tables.write(table, address.p2_index(), leaf);
    }
    Ok(())
}

/// Maps the page at `gpa`, which is the paravisor's, at `address`. Missing tables come from
/// `pool`.
///
/// # Errors
///
/// [`TurnstileReason::OUT_OF_MEMORY`] if the pool is empty, [`TurnstileReason::INTERNAL`] if
/// something is mapped there already.
pub fn map_page(address: u64, gpa: Gpa, pool: &mut Pool) -> Result<(), TurnstileReason> {
    let guard = TABLES.lock();
    let tables = guard.as_ref().ok_or(TurnstileReason::INTERNAL)?;
    let address = VirtAddr::try_new(address).map_err(|_| TurnstileReason::INTERNAL)?;
    let mut table = tables.root;
    for index in [address.p4_index(), address.p3_index(), address.p2_index()] {
        table = tables.descend_or_create(table, index, pool)?;
    }
    if tables.read(table, address.p1_index()) != 0 {
        return Err(TurnstileReason::INTERNAL);
    }
    let leaf = gpa.get() | tables.c_bit | OWN_DATA.bits();
    tables.write(table, address.p1_index(), leaf);
    Ok(())
}

/// Calls `change` with the leaf entry of a page of the region and flushes its translation.
fn with_leaf(gpa: Gpa, change: impl FnOnce(&mut u64, &Tables)) -> Result<(), TurnstileReason> {
    let guard = TABLES.lock();
    let tables = guard.as_ref().ok_or(TurnstileReason::INTERNAL)?;
    let address = VirtAddr::try_new(gpa.get()).map_err(|_| TurnstileReason::INTERNAL)?;
    let mut table = tables.root;
    for index in [address.p4_index(), address.p3_index(), address.p2_index()] {
        table = tables
            .descend(table, index)
            .ok_or(TurnstileReason::INTERNAL)?;
    }
    let mut entry = tables.read(table, address.p1_index());
    change(&mut entry, tables);
    tables.write(table, address.p1_index(), entry);
    tlb::flush(address);
    Ok(())
}

impl Tables {
    /// Where the table at `gpa` is mapped.
    fn address(&self, gpa: Gpa) -> *mut PageTable {
        let window = if (self.region.start()..self.region.end()).contains(&gpa) {
            0
        } else {
            OWN_WINDOW
        };
        (window + gpa.get()) as *mut PageTable
    }

    fn read(&self, table: Gpa, index: PageTableIndex) -> u64 {
        // SAFETY: `table` comes from the root or from a table entry, so it is a live table; the
        // index is below 512. The processor only reads entries (see the module's invariants).
        unsafe {
            (self.address(table) as *const u64)
                .add(index.into())
                .read_volatile()
        }
    }

    fn write(&self, table: Gpa, index: PageTableIndex, entry: u64) {
        // SAFETY: as in `read`; the lock on the tables excludes other writers.
        unsafe {
            (self.address(table) as *mut u64)
                .add(index.into())
                .write_volatile(entry)
        }
    }

    /// The table one level down, if the entry is a table.
    fn descend(&self, table: Gpa, index: PageTableIndex) -> Option<Gpa> {
        let entry = self.read(table, index);
        let flags = PageTableFlags::from_bits_truncate(entry);
        let is_table =
            flags.contains(PageTableFlags::PRESENT) && !flags.contains(PageTableFlags::HUGE_PAGE);
        is_table.then(|| Gpa::new(entry & ADDRESS_MASK & !self.c_bit))
    }

    /// The table one level down; an empty one is put there if there is nothing.
    fn descend_or_create(
        &self,
        table: Gpa,
        index: PageTableIndex,
        pool: &mut Pool,
    ) -> Result<Gpa, TurnstileReason> {
        if self.read(table, index) == 0 {
            let fresh = pool.page()?;
            self.write(table, index, fresh.get() | self.c_bit | TABLE.bits());
            return Ok(fresh);
        }
        self.descend(table, index).ok_or(TurnstileReason::INTERNAL)
    }
}

const _: () = assert!(size_of::<PageTable>() == PAGE_SIZE as usize);
