//! Page frames and aligned blocks: the units in which memory is asked for.
//!
//! Invariants:
//! * A [`Frame`] number is below 2^52, so its address never overflows 64 bits.
//! * A [`Block`] starts at a multiple of its own size. A block therefore never crosses a 2 MiB
//!   boundary, and its last frame always exists.

use core::fmt;

/// 4 KiB pages in the 2 MiB region that shares a lock and a large page.
pub const PAGES_PER_REGION: usize = 512;

/// log2 of the small page size in bytes.
const PAGE_SHIFT: u32 = 12;
/// log2 of [`PAGES_PER_REGION`].
const REGION_SHIFT: u32 = 9;

const _: () = assert!(1 << REGION_SHIFT == PAGES_PER_REGION);

/// The number of a 4 KiB guest page: guest physical address / 4096.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frame(u64);

impl Frame {
    /// The frame that holds the byte at guest physical address `gpa`.
    #[must_use]
    pub const fn containing(gpa: u64) -> Self {
        Self(gpa >> PAGE_SHIFT)
    }

    /// The frame that starts at `gpa`, or `None` when `gpa` is not a multiple of 4096.
    #[must_use]
    pub const fn starting_at(gpa: u64) -> Option<Self> {
        if gpa & ((1 << PAGE_SHIFT) - 1) == 0 {
            Some(Self(gpa >> PAGE_SHIFT))
        } else {
            None
        }
    }

    /// The frame with this number, or `None` when its address would not fit in 64 bits.
    #[must_use]
    pub const fn try_new(number: u64) -> Option<Self> {
        if number >> (64 - PAGE_SHIFT) == 0 {
            Some(Self(number))
        } else {
            None
        }
    }

    /// The frame number.
    #[must_use]
    pub const fn number(self) -> u64 {
        self.0
    }

    /// The guest physical address of the frame's first byte.
    #[must_use]
    pub const fn gpa(self) -> u64 {
        self.0 << PAGE_SHIFT
    }

    /// The frame `pages` further up, or `None` beyond the address space.
    #[must_use]
    pub const fn checked_add(self, pages: u64) -> Option<Self> {
        match self.0.checked_add(pages) {
            Some(number) => Self::try_new(number),
            None => None,
        }
    }

    /// The number of the 2 MiB region around this frame.
    pub(crate) const fn region_number(self) -> u64 {
        self.0 >> REGION_SHIFT
    }

    /// The first frame of the 2 MiB region around this frame.
    pub(crate) const fn region_start(self) -> Self {
        Self(self.0 >> REGION_SHIFT << REGION_SHIFT)
    }

    /// The frame's place in its region, 0 to 511.
    pub(crate) const fn index_in_region(self) -> usize {
        (self.0 & (PAGES_PER_REGION as u64 - 1)) as usize
    }

    /// The frame at `index` (0 to 511) of the region that starts at `self`.
    pub(crate) const fn at_index(self, index: usize) -> Self {
        Self(self.region_start().0 | (index as u64 & (PAGES_PER_REGION as u64 - 1)))
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Frame({:#x})", self.gpa())
    }
}

/// The size of one page, as the instructions know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageSize {
    /// 4 KiB.
    Size4K,
    /// 2 MiB.
    Size2M,
}

impl PageSize {
    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.pages() << PAGE_SHIFT
    }

    /// The size in 4 KiB pages.
    #[must_use]
    pub const fn pages(self) -> u64 {
        match self {
            Self::Size4K => 1,
            Self::Size2M => PAGES_PER_REGION as u64,
        }
    }
}

/// One page of either size, aligned to its size: what one entry of a request names, and what one
/// instruction of the [`Backend`](crate::Backend) works on.
///
/// It proves alignment only. Whether there is memory, and whose, is for the map to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Block {
    first: Frame,
    size: PageSize,
}

/// The frame given to [`Block::try_new`] is not a multiple of the size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Misaligned {
    /// The frame that was given.
    pub first: Frame,
    /// The size it is not aligned to.
    pub size: PageSize,
}

impl Block {
    /// The block of `size` that starts at `first`; refused unless aligned to the size.
    ///
    /// # Errors
    /// [`Misaligned`], with the refused values.
    pub const fn try_new(first: Frame, size: PageSize) -> Result<Self, Misaligned> {
        if first.number().is_multiple_of(size.pages()) {
            Ok(Self { first, size })
        } else {
            Err(Misaligned { first, size })
        }
    }

    /// The block of one small page.
    #[must_use]
    pub const fn page(frame: Frame) -> Self {
        Self {
            first: frame,
            size: PageSize::Size4K,
        }
    }

    /// The 2 MiB block around `frame`.
    #[must_use]
    pub const fn region_around(frame: Frame) -> Self {
        Self {
            first: frame.region_start(),
            size: PageSize::Size2M,
        }
    }

    /// The first frame.
    #[must_use]
    pub const fn first(self) -> Frame {
        self.first
    }

    /// The page size.
    #[must_use]
    pub const fn size(self) -> PageSize {
        self.size
    }

    /// The guest physical address of the first byte.
    #[must_use]
    pub const fn gpa(self) -> u64 {
        self.first.gpa()
    }

    /// The last frame.
    #[must_use]
    pub const fn last(self) -> Frame {
        // Cannot pass 2^52: the start is a multiple of the size.
        Frame(self.first.0 + (self.size.pages() - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_aligned_to_its_size() {
        let odd = Frame::containing(0x20_1000);
        assert!(Block::try_new(odd, PageSize::Size4K).is_ok());
        assert_eq!(
            Block::try_new(odd, PageSize::Size2M),
            Err(Misaligned {
                first: odd,
                size: PageSize::Size2M
            })
        );
        let even = Frame::containing(0x20_0000);
        assert_eq!(
            Block::try_new(even, PageSize::Size2M).map(Block::last),
            Ok(Frame::containing(0x3f_f000))
        );
    }

    #[test]
    fn addresses_at_the_end_of_the_space_do_not_overflow() {
        let top = Frame::containing(u64::MAX);
        assert_eq!(top.gpa(), 0xffff_ffff_ffff_f000);
        assert_eq!(top.checked_add(1), None);
        assert_eq!(Frame::try_new(1 << 52), None);
        assert_eq!(Block::region_around(top).last(), top);
        assert_eq!(top.index_in_region(), 511);
    }

    #[test]
    fn a_frame_is_told_by_its_address() {
        assert_eq!(format!("{:?}", Frame::containing(0x1fff)), "Frame(0x1000)");
    }

    #[test]
    fn a_frame_starts_only_at_a_multiple_of_4096() {
        assert_eq!(Frame::starting_at(0x1001), None);
        assert_eq!(Frame::starting_at(0x1000), Some(Frame::containing(0x1fff)));
    }
}
