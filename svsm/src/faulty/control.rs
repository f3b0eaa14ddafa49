//! The control of the benches: a boot in which acceptance costs nothing.
//!
//! Not a fault but a build that must not ship either. Before the guest starts, every region that
//! nobody has is validated, scrubbed and granted for good, while the map goes on to call it
//! Unaccepted. When the guest asks for a page then, the engine takes its usual way, but the
//! platform's part is done already: validate, scrub and grant return at once. What is left of a
//! request is the call and the record. A page that was claimed is like any other from then on.

use core::sync::atomic::{AtomicU64, Ordering};

use accept::{
    AdjustFault, Backend, Block, Fault, Frame, Map, PAGES_PER_REGION, PageSize, PageState,
    ValidateFault,
};

/// Pages that the control can have: all below 8 GiB.
const PAGES: usize = 2 << 20;
const BITS: usize = u64::BITS as usize;

/// The pages that are the guest's already and were not claimed yet.
pub struct Ready([AtomicU64; PAGES / BITS]);

/// How much of a block is ready.
enum Share {
    None,
    Part,
    All,
}

/// The one of this paravisor.
pub static READY: Ready = Ready::none();

impl Ready {
    /// No page.
    #[must_use]
    pub const fn none() -> Self {
        Self([const { AtomicU64::new(0) }; PAGES / BITS])
    }

    /// The word and the bit of a page, if the set has room for it.
    fn bit(&self, page: u64) -> Option<(&AtomicU64, u64)> {
        let page = usize::try_from(page).ok()?;
        Some((self.0.get(page / BITS)?, 1 << (page % BITS)))
    }

    fn contains(&self, page: u64) -> bool {
        self.bit(page)
            .is_some_and(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
    }

    /// How much of a block is ready. Must cost next to nothing: it is part of what is measured.
    fn share(&self, block: Block) -> Share {
        let first = block.first().number();
        if block.size() == PageSize::Size4K {
            return match self.contains(first) {
                true => Share::All,
                false => Share::None,
            };
        }
        let Some(words) = usize::try_from(first)
            .ok()
            .and_then(|first| self.0.get(first / BITS..(first + PAGES_PER_REGION) / BITS))
        else {
            return Share::None;
        };
        let (mut any, mut all) = (0, u64::MAX);
        for word in words {
            let word = word.load(Ordering::Relaxed);
            (any, all) = (any | word, all & word);
        }
        match (any, all) {
            (0, _) => Share::None,
            (_, u64::MAX) => Share::All,
            _ => Share::Part,
        }
    }

    /// Forgets that a block is ready.
    fn forget(&self, block: Block) {
        if block.size() == PageSize::Size4K {
            if let Some((word, bit)) = self.bit(block.first().number()) {
                word.fetch_and(!bit, Ordering::Relaxed);
            }
            return;
        }
        for word in pages(block).step_by(BITS) {
            if let Some((word, _)) = self.bit(word) {
                word.store(0, Ordering::Relaxed);
            }
        }
    }

    /// Makes all regions ready that are Unaccepted as a whole; `state` tells what a page is.
    ///
    /// # Errors
    ///
    /// What the platform failed with.
    pub fn fill(
        &self,
        backend: &impl Backend,
        map: &Map<'_>,
        state: impl Fn(Frame) -> Option<PageState>,
    ) -> Result<(), ValidateFault> {
        let per_region = PAGES_PER_REGION as u64;
        for range in map.ranges() {
            let first = range.first().number().div_ceil(per_region);
            let end = (range.last().number() + 1) / per_region;
            let frames = (first..end).filter_map(|region| Frame::try_new(region * per_region));
            for region in frames.map(Block::region_around) {
                let free = |page| {
                    let frame = Frame::try_new(page);
                    frame.and_then(&state) == Some(PageState::Unaccepted)
                };
                let fits = pages(region).all(|page| self.bit(page).is_some());
                if fits && pages(region).all(free) {
                    accept(backend, region)?;
                    for (word, bit) in pages(region).filter_map(|page| self.bit(page)) {
                        word.fetch_or(bit, Ordering::Relaxed);
                    }
                }
            }
        }
        Ok(())
    }

    /// Validates what is not ready.
    ///
    /// # Errors
    ///
    /// Those of the platform; a block that is ready in part has to be split.
    pub fn validate(&self, backend: &impl Backend, block: Block) -> Result<(), ValidateFault> {
        match self.share(block) {
            Share::None => backend.validate(block),
            Share::All => Ok(()),
            Share::Part => Err(ValidateFault::SizeMismatch),
        }
    }

    /// Scrubs what is not ready.
    ///
    /// # Errors
    ///
    /// Those of the platform.
    pub fn scrub(&self, backend: &impl Backend, block: Block) -> Result<(), Fault> {
        match self.share(block) {
            Share::None => return backend.scrub(block),
            Share::All => return Ok(()),
            Share::Part => {}
        }
        pages(block)
            .filter(|page| !self.contains(*page))
            .filter_map(Frame::try_new)
            .try_for_each(|frame| backend.scrub(Block::page(frame)))
    }

    /// Grants what is not ready, and forgets that the rest was.
    ///
    /// # Errors
    ///
    /// Those of the platform; a block that is ready in part has to be split.
    pub fn grant(&self, backend: &impl Backend, block: Block) -> Result<(), AdjustFault> {
        match self.share(block) {
            Share::None => backend.grant(block),
            Share::All => {
                self.forget(block);
                Ok(())
            }
            Share::Part => Err(AdjustFault::SizeMismatch),
        }
    }
}

/// The numbers of the block's pages.
fn pages(block: Block) -> core::ops::Range<u64> {
    let first = block.first().number();
    first..first + block.size().pages()
}

/// Gives a region to the guest, in small pages if it has to be.
fn accept(backend: &impl Backend, region: Block) -> Result<(), ValidateFault> {
    let small = || {
        pages(region)
            .filter_map(Frame::try_new)
            .map(Block::page)
            .inspect(|page| debug_assert_eq!(page.size(), PageSize::Size4K))
    };
    let split = match backend.validate(region) {
        Ok(()) => false,
        Err(ValidateFault::SizeMismatch) => {
            small().try_for_each(|page| backend.validate(page))?;
            true
        }
        Err(fault) => return Err(fault),
    };
    let other = |_| ValidateFault::Failed(0);
    backend
        .scrub(region)
        .map_err(|_| ValidateFault::Failed(0))?;
    if split {
        small()
            .try_for_each(|page| backend.grant(page))
            .map_err(other)
    } else {
        backend.grant(region).map_err(other)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use accept::{NotFlushed, Operation, Range, Region};

    use super::*;

    /// Notes what arrives; refuses large pages if told so.
    #[derive(Default)]
    struct Witness {
        seen: RefCell<Vec<(Operation, u64, PageSize)>>,
        small: bool,
    }

    impl Witness {
        fn note(&self, operation: Operation, block: Block) {
            let mut seen = self.seen.borrow_mut();
            seen.push((operation, block.first().number(), block.size()));
        }
    }

    impl Backend for Witness {
        fn validate(&self, block: Block) -> Result<(), ValidateFault> {
            if self.small && block.size() == PageSize::Size2M {
                return Err(ValidateFault::SizeMismatch);
            }
            self.note(Operation::Validate, block);
            Ok(())
        }
        fn rescind(&self, block: Block) -> Result<(), ValidateFault> {
            self.note(Operation::Rescind, block);
            Ok(())
        }
        fn scrub(&self, block: Block) -> Result<(), Fault> {
            self.note(Operation::Scrub, block);
            Ok(())
        }
        fn grant(&self, block: Block) -> Result<(), AdjustFault> {
            self.note(Operation::Grant, block);
            Ok(())
        }
        fn revoke(&self, block: Block) -> Result<(), AdjustFault> {
            self.note(Operation::Revoke, block);
            Ok(())
        }
        fn flush(&self) -> Result<(), NotFlushed> {
            Ok(())
        }
    }

    fn page(number: u64) -> Block {
        Block::page(Frame::try_new(number).unwrap())
    }

    /// Three regions, the second with a page that is somebody's.
    fn filled(backend: &Witness) -> Box<Ready> {
        let regions = [const { Region::new() }; 3];
        let ranges = [Range::try_new(Frame::containing(0), 3 * 512, &regions).unwrap()];
        let map = Map::try_new(&ranges).unwrap();
        let ready = Box::new(Ready::none());
        let state = |frame: Frame| {
            let owned = frame.number() == 600;
            Some(if owned {
                PageState::Owned
            } else {
                PageState::Unaccepted
            })
        };
        assert_eq!(ready.fill(backend, &map, state), Ok(()));
        ready
    }

    #[test]
    fn only_free_regions_are_made_ready_each_step_once() {
        let backend = Witness::default();
        filled(&backend);
        use Operation::{Grant, Scrub, Validate};
        let large = PageSize::Size2M;
        let expected = [0, 1024]
            .map(|first| [Validate, Scrub, Grant].map(|step| (step, first, large)))
            .concat();
        assert_eq!(backend.seen.take(), expected);
        let small = Witness {
            small: true,
            ..Witness::default()
        };
        filled(&small);
        let granted = small
            .seen
            .take()
            .into_iter()
            .filter(|(step, ..)| *step == Grant);
        assert_eq!(granted.count(), 2 * 512);
    }

    #[test]
    fn a_claim_of_what_is_ready_costs_nothing_and_the_next_one_everything() {
        let backend = Witness::default();
        let ready = filled(&backend);
        backend.seen.take();
        let region = Block::region_around(Frame::containing(0));
        for expected in [0, 3] {
            assert_eq!(ready.validate(&backend, region), Ok(()));
            assert_eq!(ready.scrub(&backend, region), Ok(()));
            assert_eq!(ready.grant(&backend, region), Ok(()));
            assert_eq!(backend.seen.take().len(), expected);
        }
    }

    #[test]
    fn a_region_that_is_ready_in_part_is_split() {
        let backend = Witness::default();
        let ready = filled(&backend);
        assert_eq!(ready.grant(&backend, page(7)), Ok(()));
        backend.seen.take();
        let region = Block::region_around(Frame::containing(0));
        assert_eq!(
            ready.validate(&backend, region),
            Err(ValidateFault::SizeMismatch)
        );
        assert_eq!(
            ready.grant(&backend, region),
            Err(AdjustFault::SizeMismatch)
        );
        assert_eq!(ready.validate(&backend, page(8)), Ok(()));
        assert!(backend.seen.take().is_empty());
        assert_eq!(ready.validate(&backend, page(7)), Ok(()));
        assert_eq!(ready.scrub(&backend, region), Ok(()));
        let small = PageSize::Size4K;
        assert_eq!(
            backend.seen.take(),
            [
                (Operation::Validate, 7, small),
                (Operation::Scrub, 7, small)
            ]
        );
    }
}
