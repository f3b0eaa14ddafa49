//! The machine's heap: one free list over the heap part of the reserved range.

#![expect(unsafe_code, reason = "a global allocator")]

use core::alloc::{GlobalAlloc, Layout};
use core::ptr::{self, NonNull};

use linked_list_allocator::Heap;
use spin::Mutex;

use super::memory;

struct LockedHeap(Mutex<Heap>);

#[global_allocator]
static HEAP: LockedHeap = LockedHeap(Mutex::new(Heap::empty()));

// SAFETY: `Heap` gives out disjoint blocks of its range; the lock serialises the CPUs. The
// machine takes no interrupts, so no code of a CPU can re-enter while it holds the lock.
unsafe impl GlobalAlloc for LockedHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.0
            .lock()
            .allocate_first_fit(layout)
            .map_or(ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        if let Some(pointer) = NonNull::new(pointer) {
            // SAFETY: the caller got the block from `alloc` with this layout.
            unsafe { self.0.lock().deallocate(pointer, layout) };
        }
    }
}

/// Gives the heap its range.
pub fn init(range: memory::Range) {
    let size = usize::try_from(range.len()).expect("64-bit");
    // SAFETY: the range is the machine's own, mapped, and used by nothing else; called once.
    unsafe { HEAP.0.lock().init(memory::virt(range.start), size) };
}
