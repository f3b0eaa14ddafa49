//! Physical memory as the machine sees it: what there is, what it keeps for itself, and safe
//! access to all of it.
//!
//! Owns the direct map and the split of the reserved range:
//!
//! ```text
//! reserved.start                                             reserved.end = end of low memory
//! | heap (RMP, host memory, image file ...) | NPT pool | image (4 MiB) |
//! ```
//!
//! Invariants:
//! * the reserved range is 64 MiB plus 1/128 of RAM, the end of low memory, never given to a
//!   guest and mapped by no nested page table;
//! * guest memory is read and written through volatile-free byte copies of raw pointers: no
//!   Rust reference to guest memory ever exists, so a guest that writes at the same time can
//!   change values but not break the machine.

#![expect(
    unsafe_code,
    reason = "raw access to physical memory through the direct map"
)]

use core::ptr;

use machine::memory::{LINE, PhysicalMemory, scramble_word};
use machine::types::Spa;
use spin::Once;
use x86_64::instructions::tlb;

use super::boot::{self, IMAGE_SPAN, Page};
use super::cpu;

/// Where all physical memory is mapped.
pub const DIRECT_MAP: u64 = 0xFFFF_8000_0000_0000;
/// Physical bytes mapped there: all of the guest's address width (46 bits). OVMF puts devices
/// with 64-bit addresses into its last eighth, from 56 TiB.
pub const DIRECT_SPAN: u64 = 64 << 40;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// A half-open range of physical addresses.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    /// First byte.
    pub start: u64,
    /// First byte behind.
    pub end: u64,
}

impl Range {
    /// Bytes in the range.
    pub const fn len(&self) -> u64 {
        self.end - self.start
    }
}

/// The machine's layout of physical memory, fixed at boot.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Bytes of RAM below 4 GiB.
    pub low_end: u64,
    /// Bytes of RAM from 4 GiB up.
    pub high: u64,
    /// The machine's own.
    pub reserved: Range,
    /// The allocator's part of `reserved`.
    pub heap: Range,
    /// The nested page tables' part of `reserved`.
    pub tables: Range,
    /// The image: code, data, first stack.
    pub image: Range,
}

static LAYOUT: Once<Layout> = Once::new();

/// The layout. Panics before [`init`].
pub fn layout() -> &'static Layout {
    LAYOUT.get().expect("memory::init ran first")
}

/// The layout, once there is one: for what may be asked at any time.
pub fn try_layout() -> Option<&'static Layout> {
    LAYOUT.get()
}

/// CMOS index of the memory above 4 GiB, 3 bytes, in 64 KiB units (QEMU `pc_cmos_init`).
const CMOS_HIGH_64K: u8 = 0x5B;

fn cmos(index: u8) -> u64 {
    cpu::port_out(0x70, 1, u32::from(index));
    u64::from(cpu::port_in(0x71, 1))
}

/// Computes the layout and completes the direct map.
pub fn init(image: u64, low_end: u64) -> &'static Layout {
    let high = (0..3).fold(0, |sum, i| sum | cmos(CMOS_HIGH_64K + i) << (8 * i)) << 16;
    let ram = low_end + high;
    let reserved_len = (64 * MIB + ram / 128).next_multiple_of(2 * MIB);
    let reserved = Range {
        start: (low_end - reserved_len) & !(2 * MIB - 1),
        end: low_end,
    };
    let image = Range {
        start: image,
        end: image + IMAGE_SPAN,
    };
    let tables_len = (16 * MIB + ram / 512).next_multiple_of(2 * MIB);
    let tables = Range {
        start: image.start - tables_len,
        end: image.start,
    };
    let heap = Range {
        start: reserved.start,
        end: tables.start,
    };
    extend_direct_map(heap);
    LAYOUT.call_once(|| Layout {
        low_end,
        high,
        reserved,
        heap: shrink(heap),
        tables,
        image,
    })
}

/// Pages of tables that [`extend_direct_map`] takes from the start of the heap.
const EXTRA_TABLES: u64 = DIRECT_SPAN / (512 * GIB) - 1;

fn shrink(heap: Range) -> Range {
    Range {
        start: heap.start + EXTRA_TABLES * 4096,
        end: heap.end,
    }
}

/// Maps the rest of [`DIRECT_SPAN`] (the reset code did the first 512 GiB) by 1 GiB pages and
/// drops the identity map that the reset code ran in.
fn extend_direct_map(heap: Range) {
    /// Present, writable.
    const TABLE: u64 = 0x3;
    /// Present, writable, large, no execute.
    const LEAF: u64 = 0x83 | 1 << 63;
    let root = virt(boot::root_table_physical());
    for n in 0..EXTRA_TABLES {
        let table = heap.start + n * 4096;
        for i in 0..512 {
            let page = (n + 1) * 512 * GIB + i * GIB;
            // SAFETY: `table` lies in the reserved range, which nothing uses yet.
            unsafe { virt(table).cast::<u64>().add(i as usize).write(page | LEAF) };
        }
        // SAFETY: the root is the machine's own and this is the only CPU; slots 257.. are free.
        unsafe {
            root.cast::<u64>()
                .add(257 + n as usize)
                .write(table | TABLE)
        };
    }
    // SAFETY: nothing runs or lies in the identity map any more (the trampoline of the other
    // CPUs has tables of its own).
    unsafe { root.cast::<u64>().write(0) };
    tlb::flush_all();
}

/// The direct map's address of a physical one.
pub fn virt(physical: u64) -> *mut u8 {
    debug_assert!(physical < DIRECT_SPAN);
    (DIRECT_MAP + physical) as *mut u8
}

/// The physical address of one of the image's statics or of something on the heap.
pub fn phys_of<T>(object: *const T) -> u64 {
    let address = object as u64;
    if address >= boot::VBASE {
        layout().image.start + (address - boot::VBASE)
    } else {
        address - DIRECT_MAP
    }
}

/// One zeroed page of the machine's own, never freed: VMCBs, host save areas, bitmaps.
pub struct OwnPages {
    physical: u64,
}

impl OwnPages {
    /// Allocates `count` contiguous pages.
    pub fn new(count: usize) -> Self {
        let pages: alloc::boxed::Box<[Page]> = (0..count).map(|_| Page::zeroed()).collect();
        let physical = phys_of(pages.as_ptr());
        alloc::boxed::Box::leak(pages);
        OwnPages { physical }
    }

    /// The physical address, for the CPU.
    pub fn physical(&self) -> u64 {
        self.physical
    }

    /// The address for the machine.
    pub fn pointer<T>(&self) -> *mut T {
        virt(self.physical).cast()
    }
}

/// Access to all RAM through the direct map.
#[derive(Clone, Copy, Debug, Default)]
pub struct DirectMap;

impl DirectMap {
    /// The address of `[spa, spa + len)` if it is RAM, of the guest or of the machine.
    fn backed(spa: Spa, len: u64) -> Option<*mut u8> {
        let layout = layout();
        let start = spa.get();
        let end = start.checked_add(len)?;
        let ram = end <= layout.low_end || (start >= 4 * GIB && end <= 4 * GIB + layout.high);
        ram.then(|| virt(start))
    }
}

impl PhysicalMemory for DirectMap {
    fn read(&self, spa: Spa, out: &mut [u8]) {
        match Self::backed(spa, out.len() as u64) {
            // SAFETY: `backed` says the source is mapped RAM; `out` is a Rust buffer, which
            // guest-visible memory never overlaps. A guest may write meanwhile: the bytes are
            // then a mixture, which is what its race deserves.
            Some(from) => unsafe { ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) },
            None => out.fill(0xFF),
        }
    }

    fn write(&self, spa: Spa, data: &[u8]) {
        if let Some(to) = Self::backed(spa, data.len() as u64) {
            // SAFETY: as in `read`. The platform writes only to pages it manages, never to the
            // machine's image or heap.
            unsafe { ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
        }
    }

    fn fill_zero(&self, spa: Spa, bytes: u64) {
        if let Some(to) = Self::backed(spa, bytes) {
            // SAFETY: as in `write`.
            unsafe { to.write_bytes(0, bytes as usize) };
        }
    }

    fn fill_scramble(&self, spa: Spa, bytes: u64, generation: u32) {
        let Some(to) = Self::backed(spa, bytes) else {
            return;
        };
        let to = to.cast::<u64>();
        for word in 0..bytes / 8 {
            // SAFETY: inside the range that `backed` has checked, 8-byte aligned (pages).
            unsafe {
                to.add(word as usize)
                    .write(scramble_word(generation, spa.get() + word * 8))
            };
        }
    }

    fn find_scrambled(&self, spa: Spa, bytes: u64, generation: u32) -> Option<u64> {
        let from = Self::backed(spa, bytes)?;
        (0..bytes).step_by(LINE as usize).find(|&offset| {
            // SAFETY: inside the range that `backed` has checked, 8-byte aligned (pages).
            let word = unsafe { from.add(offset as usize).cast::<u64>().read_volatile() };
            word == scramble_word(generation, spa.get() + offset)
        })
    }
}

/// Reads a device register; reads outside the direct map give ones, as an empty bus does.
pub fn mmio_read(physical: u64, bytes: u8) -> u64 {
    if !is_device(physical) {
        return u64::MAX;
    }
    let at = virt(physical);
    // SAFETY: mapped, and not RAM, so no Rust object lives there.
    unsafe {
        match bytes {
            1 => u64::from(at.read_volatile()),
            2 => u64::from(at.cast::<u16>().read_volatile()),
            4 => u64::from(at.cast::<u32>().read_volatile()),
            _ => at.cast::<u64>().read_volatile(),
        }
    }
}

/// Writes a device register; writes outside the direct map are dropped.
pub fn mmio_write(physical: u64, bytes: u8, value: u64) {
    if !is_device(physical) {
        return;
    }
    let at = virt(physical);
    // SAFETY: as in `mmio_read`.
    unsafe {
        match bytes {
            1 => at.write_volatile(value as u8),
            2 => at.cast::<u16>().write_volatile(value as u16),
            4 => at.cast::<u32>().write_volatile(value as u32),
            _ => at.cast::<u64>().write_volatile(value),
        }
    }
}

fn is_device(physical: u64) -> bool {
    physical < DIRECT_SPAN - 8 && DirectMap::backed(Spa::new(physical), 1).is_none()
}

/// Contiguous pages of the machine's own that become guest memory where QEMU has none; never
/// freed. Aligned to 2 MiB from 512 pages on.
pub fn allocate_window(pages: usize) -> Option<Spa> {
    let align = if pages >= 512 { 2 << 20 } else { 4096 };
    let layout = core::alloc::Layout::from_size_align(pages * 4096, align).ok()?;
    if layout.size() == 0 {
        return None;
    }
    // SAFETY: the size is not zero.
    let pointer = unsafe { alloc::alloc::alloc_zeroed(layout) };
    (!pointer.is_null()).then(|| Spa::new(phys_of(pointer)))
}
