//! Memory that the paravisor gives to itself, once and for ever.
//!
//! There is no heap: everything whose size depends on the machine is carved at boot from one of
//! two pools, the rest of the region and the carve-out at the top of memory. A pool's memory is
//! validated, zeroed, private, mapped, recorded Owned in the map, and nobody else's. Nothing
//! is ever given back.
#![expect(unsafe_code, reason = "turns raw memory into slices")]

use protocols::addr::{Gpa, PAGE_SIZE};
use protocols::terminate::TurnstileReason;

use super::layout::PageRange;

/// A stretch of memory and how much of it is used.
#[derive(Debug)]
pub struct Pool {
    /// Next free byte.
    next: u64,
    end: u64,
    /// Virtual address of guest-physical address 0.
    window: u64,
}

impl Pool {
    /// A pool of the pages `range`, mapped at `window` plus their address.
    ///
    /// # Safety
    ///
    /// 1. The pages are validated, private, zero and mapped writable there for ever.
    /// 2. Nobody else uses them.
    #[must_use]
    pub const unsafe fn new(range: PageRange, window: u64) -> Self {
        Self {
            next: range.start().get(),
            end: range.end().get(),
            window,
        }
    }

    /// Takes `size` bytes aligned to `align` (a power of two); returns their address.
    fn take(&mut self, size: u64, align: u64) -> Result<Gpa, TurnstileReason> {
        let start = self
            .next
            .checked_next_multiple_of(align)
            .ok_or(TurnstileReason::OUT_OF_MEMORY)?;
        let end = start
            .checked_add(size)
            .ok_or(TurnstileReason::OUT_OF_MEMORY)?;
        if end > self.end {
            return Err(TurnstileReason::OUT_OF_MEMORY);
        }
        self.next = end;
        Ok(Gpa::new(start))
    }

    /// Takes one page of zeros.
    ///
    /// # Errors
    ///
    /// [`TurnstileReason::OUT_OF_MEMORY`].
    pub fn page(&mut self) -> Result<Gpa, TurnstileReason> {
        self.take(PAGE_SIZE, PAGE_SIZE)
    }

    /// Takes contiguous zeros in whole pages, at least `bytes`.
    ///
    /// # Errors
    ///
    /// [`TurnstileReason::OUT_OF_MEMORY`].
    pub fn bytes(&mut self, bytes: u64) -> Result<Gpa, TurnstileReason> {
        let size = bytes
            .checked_next_multiple_of(PAGE_SIZE)
            .ok_or(TurnstileReason::OUT_OF_MEMORY)?;
        self.take(size, PAGE_SIZE)
    }

    /// Virtual address of something taken from this pool.
    #[must_use]
    pub const fn address(&self, gpa: Gpa) -> u64 {
        self.window + gpa.get()
    }

    /// Takes memory for `count` values and makes each of its index.
    ///
    /// # Errors
    ///
    /// [`TurnstileReason::OUT_OF_MEMORY`].
    pub fn slice<T>(
        &mut self,
        count: usize,
        make: impl Fn(usize) -> T,
    ) -> Result<(Gpa, &'static mut [T]), TurnstileReason> {
        let size = (count as u64)
            .checked_mul(size_of::<T>() as u64)
            .ok_or(TurnstileReason::OUT_OF_MEMORY)?;
        let gpa = self.take(size, align_of::<T>() as u64)?;
        let first = self.address(gpa) as *mut T;
        for index in 0..count {
            // SAFETY: the memory was just taken, is large enough and aligned: windows are
            // aligned to more than any type.
            unsafe { first.add(index).write(make(index)) };
        }
        // SAFETY: all values are initialized, and nobody else has the memory.
        Ok((gpa, unsafe {
            core::slice::from_raw_parts_mut(first, count)
        }))
    }

    /// Gives a value a place for ever.
    ///
    /// # Errors
    ///
    /// [`TurnstileReason::OUT_OF_MEMORY`].
    pub fn leak<T>(&mut self, value: T) -> Result<&'static T, TurnstileReason> {
        let gpa = self.take(size_of::<T>() as u64, align_of::<T>() as u64)?;
        let place = self.address(gpa) as *mut T;
        // SAFETY: the memory was just taken, is large enough and aligned, and nobody else's.
        unsafe {
            place.write(value);
            Ok(&*place)
        }
    }
}
