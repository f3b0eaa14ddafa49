//! The page tables the paravisor starts on, made at build time and measured with the image.
//!
//! They map the paravisor's region one to one, and nothing else, with 4 KiB leaves:
//!
//! 1. a page is writable or executable, never both; what is no code is not executable;
//! 2. every leaf and every table carries the C-bit: the region is private. A platform without one
//!    has tables of its own, at the same addresses;
//! 3. nothing is a user page;
//! 4. accessed and dirty bits are set already, so that the processor never writes to a table.

use protocols::addr::PAGE_SIZE;
use protocols::launch::{REGION_GPA, REGION_SIZE};

use crate::elf::Access;
use crate::layout::{Layout, ProgramPage};

/// Page table entry bits (APM volume 2, §5.4.1).
mod bit {
    pub const PRESENT: u64 = 1 << 0;
    pub const WRITABLE: u64 = 1 << 1;
    pub const ACCESSED: u64 = 1 << 5;
    pub const DIRTY: u64 = 1 << 6;
    pub const NO_EXECUTE: u64 = 1 << 63;
}

/// Bytes that one entry of the lowest level of tables maps with all its leaves.
const TABLE_SPAN: u64 = 512 * PAGE_SIZE;

/// How many lowest-level tables the region needs.
const LEAF_TABLES: u64 = REGION_SIZE / TABLE_SPAN;

/// Bytes of all tables: three upper levels and the lowest ones.
pub const BYTES: u64 = (3 + LEAF_TABLES) * PAGE_SIZE;

// One directory is enough, and every lowest table is full.
const _: () =
    assert!(REGION_GPA.is_multiple_of(TABLE_SPAN) && REGION_SIZE.is_multiple_of(TABLE_SPAN));
const _: () = assert!(REGION_GPA >> 30 == (REGION_GPA + REGION_SIZE - 1) >> 30);

/// One table as it lies in memory.
pub type Table = [u64; 512];

/// Builds the tables, root first, for the addresses from `layout.page_tables` on.
pub fn build(layout: &Layout, pages: &[ProgramPage], c_bit: Option<u32>) -> Vec<Table> {
    let private = c_bit.map_or(0, |bit| 1u64 << bit);
    let inner = private | bit::PRESENT | bit::WRITABLE | bit::ACCESSED;
    let address_of = |table: u64| layout.page_tables + table * PAGE_SIZE;

    let mut tables = vec![[0; 512]; (BYTES / PAGE_SIZE) as usize];
    tables[0][index(REGION_GPA, 39)] = address_of(1) | inner;
    tables[1][index(REGION_GPA, 30)] = address_of(2) | inner;
    for leaf_table in 0..LEAF_TABLES {
        let base = REGION_GPA + leaf_table * TABLE_SPAN;
        tables[2][index(base, 21)] = address_of(3 + leaf_table) | inner;
        for (entry, slot) in tables[3 + leaf_table as usize].iter_mut().enumerate() {
            let gpa = base + entry as u64 * PAGE_SIZE;
            let page = ((gpa - REGION_GPA) / PAGE_SIZE) as usize;
            *slot = gpa | private | leaf_bits(pages.get(page).map(|page| page.access));
        }
    }
    tables
}

/// Bits of a leaf; pages behind the program are data.
fn leaf_bits(access: Option<Access>) -> u64 {
    let Access { write, execute, .. } = access.unwrap_or(Access {
        read: true,
        write: true,
        execute: false,
    });
    bit::PRESENT
        | bit::ACCESSED
        | if write { bit::WRITABLE | bit::DIRTY } else { 0 }
        | if execute { 0 } else { bit::NO_EXECUTE }
}

/// Index of `address` in the table whose entries map `1 << shift` bytes.
fn index(address: u64, shift: u32) -> usize {
    (address >> shift) as usize & 511
}
