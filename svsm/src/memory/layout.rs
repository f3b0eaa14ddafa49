//! Who lies where: guest-physical ranges and the paravisor's virtual address space.
//!
//! | virtual | what | rights |
//! |---|---|---|
//! | GPA of the region | the paravisor's region, one to one | W^X by segment, supervisor |
//! | [`GUEST_WINDOW`] + GPA | all of the guest's memory, 2 MiB leaves | user (behind SMAP), NX |
//! | [`OWN_WINDOW`] + GPA | the carve-out at the top of memory | supervisor, NX |
//! | [`STACK_WINDOW`] | stacks of secondary processors, 4 KiB leaves, nothing between them | supervisor, NX |
//!
//! Invariants: the windows do not overlap, the guest window never shows the region (but for
//! single pages asked for by name) nor the carve-out, and no page is writable and executable.

use core::fmt;

use accept::{Block, Frame};
use protocols::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE, PAGES_PER_LARGE_PAGE};
use protocols::launch::{REGION_GPA, REGION_SIZE};

/// Where guest-physical address 0 appears for access to guest memory.
pub const GUEST_WINDOW: u64 = 0xFFFF_8000_0000_0000;
/// Where guest-physical address 0 would appear for the paravisor's own memory outside its
/// region.
pub const OWN_WINDOW: u64 = 0xFFFF_C000_0000_0000;
/// Where the stacks of secondary processors appear, each above a page that is not mapped: below
/// all canonical addresses of the other windows, above the region.
pub const STACK_WINDOW: u64 = 0x0000_4000_0000_0000;
/// Size in bytes of each window: 46 bits, what is left below the lowest C-bit in use (47) with
/// one bit of address-space reduction.
pub const WINDOW_SIZE: u64 = 1 << 46;

const _: () = assert!(GUEST_WINDOW + WINDOW_SIZE == OWN_WINDOW);
const _: () = assert!(REGION_GPA + REGION_SIZE < STACK_WINDOW && STACK_WINDOW < 1 << 47);

/// How many virtual processors a guest may have. Sets the size of nothing but tables: memory
/// is taken for as many as there are.
pub const MAX_VCPUS: usize = 256;

/// A stretch of whole 4 KiB pages by frame number, `start..end`, possibly empty.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PageRange {
    start: u64,
    end: u64,
}

impl PageRange {
    /// No pages.
    pub const EMPTY: Self = Self { start: 0, end: 0 };

    /// The frames `start..end`; none if `end` lies before `start` or beyond what a byte
    /// address can say.
    #[must_use]
    pub const fn try_from_frames(start: u64, end: u64) -> Option<Self> {
        if start <= end && end <= u64::MAX / PAGE_SIZE {
            Some(Self { start, end })
        } else {
            None
        }
    }

    /// `size` bytes from `gpa`; none if either is not a multiple of 4 KiB or the end wraps.
    #[must_use]
    pub const fn try_from_bytes(gpa: u64, size: u64) -> Option<Self> {
        if !gpa.is_multiple_of(PAGE_SIZE) || !size.is_multiple_of(PAGE_SIZE) {
            return None;
        }
        match gpa.checked_add(size) {
            Some(end) => Self::try_from_frames(gpa / PAGE_SIZE, end / PAGE_SIZE),
            None => None,
        }
    }

    /// First frame.
    #[must_use]
    pub const fn start_frame(self) -> u64 {
        self.start
    }

    /// First frame behind.
    #[must_use]
    pub const fn end_frame(self) -> u64 {
        self.end
    }

    /// First byte.
    #[must_use]
    pub const fn start(self) -> Gpa {
        Gpa::new(self.start * PAGE_SIZE)
    }

    /// First byte behind.
    #[must_use]
    pub const fn end(self) -> Gpa {
        Gpa::new(self.end * PAGE_SIZE)
    }

    /// How many pages.
    #[must_use]
    pub const fn pages(self) -> u64 {
        self.end - self.start
    }

    /// How many bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.pages() * PAGE_SIZE
    }

    /// Whether there are no pages.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Whether all of `other` lies inside.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// Whether a page is in both.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end && !self.is_empty() && !other.is_empty()
    }

    /// What is left of the range below and above `hole`; either may be empty.
    #[must_use]
    pub fn without(self, hole: Self) -> (Self, Self) {
        if !self.overlaps(hole) {
            return (self, Self::EMPTY);
        }
        let below = Self {
            start: self.start,
            end: hole.start.max(self.start),
        };
        let above = Self {
            start: hole.end.min(self.end),
            end: self.end,
        };
        (below, above)
    }

    /// The last whole 2 MiB pages of the range that together have at least `bytes`; none if
    /// the range is too small.
    #[must_use]
    pub fn large_pages_at_end(self, bytes: u64) -> Option<Self> {
        let pages = bytes.checked_next_multiple_of(LARGE_PAGE_SIZE)? / PAGE_SIZE;
        let end = self.end / PAGES_PER_LARGE_PAGE * PAGES_PER_LARGE_PAGE;
        let start = end.checked_sub(pages)?;
        (start >= self.start).then_some(Self { start, end })
    }

    /// Each frame of the range as the address of its first byte.
    pub fn frames(self) -> impl DoubleEndedIterator<Item = Gpa> {
        (self.start..self.end).map(Gpa::from_frame_truncating)
    }

    /// The range in blocks, each as large as it can be.
    pub fn blocks(self) -> impl Iterator<Item = Block> {
        let mut left = self;
        core::iter::from_fn(move || {
            if left.is_empty() {
                return None;
            }
            let block = largest_block(Frame::containing(left.start().get()), left.pages());
            left.start += block.size().pages();
            Some(block)
        })
    }
}

/// The largest block that begins at a page and has at most so many, which is not none.
#[must_use]
pub const fn largest_block(first: Frame, pages: u64) -> Block {
    if first.gpa().is_multiple_of(LARGE_PAGE_SIZE) && pages >= PAGES_PER_LARGE_PAGE {
        Block::region_around(first)
    } else {
        Block::page(first)
    }
}

impl fmt::Debug for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start(), self.end())
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> PageRange {
        PageRange::try_from_frames(start, end).unwrap()
    }

    #[test]
    fn bytes_have_to_be_whole_pages_that_do_not_wrap() {
        assert_eq!(PageRange::try_from_bytes(0x1000, 0x2000), Some(range(1, 3)));
        assert_eq!(PageRange::try_from_bytes(0x1001, 0x2000), None);
        assert_eq!(PageRange::try_from_bytes(0x1000, 0x2001), None);
        assert_eq!(PageRange::try_from_bytes(u64::MAX - 0xfff, 0x1000), None);
        assert_eq!(PageRange::try_from_frames(2, 1), None);
        assert_eq!(PageRange::try_from_frames(0, u64::MAX), None);
    }

    #[test]
    fn a_hole_leaves_what_lies_around_it() {
        let memory = range(10, 20);
        assert_eq!(
            memory.without(range(12, 15)),
            (range(10, 12), range(15, 20))
        );
        assert_eq!(memory.without(range(5, 15)), (range(10, 10), range(15, 20)));
        assert_eq!(
            memory.without(range(15, 25)),
            (range(10, 15), range(20, 20))
        );
        assert_eq!(memory.without(range(20, 25)), (memory, PageRange::EMPTY));
        assert_eq!(memory.without(range(15, 15)), (memory, PageRange::EMPTY));
    }

    #[test]
    fn blocks_are_as_large_as_they_can_be() {
        let blocks = |start, end| -> std::vec::Vec<(u64, u64)> {
            let blocks = range(start, end).blocks();
            blocks
                .map(|block| (block.first().number(), block.size().pages()))
                .collect()
        };
        assert_eq!(
            blocks(510, 1026),
            [(510, 1), (511, 1), (512, 512), (1024, 1), (1025, 1)]
        );
        assert_eq!(blocks(512, 1024), [(512, 512)]);
        assert_eq!(blocks(1, 3), [(1, 1), (2, 1)]);
        assert_eq!(blocks(513, 1024).len(), 511);
        assert!(blocks(7, 7).is_empty());
    }

    #[test]
    fn the_end_is_taken_in_whole_large_pages() {
        let memory = range(100, 5000);
        assert_eq!(memory.large_pages_at_end(1), Some(range(4096, 4608)));
        assert_eq!(
            memory.large_pages_at_end(LARGE_PAGE_SIZE + 1),
            Some(range(3584, 4608))
        );
        assert_eq!(memory.large_pages_at_end(9 * LARGE_PAGE_SIZE), None);
        assert_eq!(memory.large_pages_at_end(u64::MAX), None);
        assert_eq!(range(0, 511).large_pages_at_end(1), None);
    }
}
