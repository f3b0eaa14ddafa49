//! The table of a host that does not exist: what an RMP would say about each page.
//!
//! The rules are those of PVALIDATE and RMPADJUST as far as the engine can meet them (facts: APM
//! 15.36.5 and 15.36.6; [`crate::platform::Platform`]):
//!
//! 1. a change of 2 MiB is refused with a size mismatch while the host backs the region by 4 KiB pages:
//!    always in some regions ([`backed_by_small_pages`]), elsewhere once a single page of it was
//!    changed, as a host splits its entry then;
//! 2. to validate what is valid, or to rescind what is not, is "no change", never success;
//! 3. rights to a page that is not valid cannot be given or taken.
//!
//! It is the hardware's side of the simulation: neither engine nor map know of it, so both can be
//! wrong and it shows. One processor uses it; atomics only make that sound.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use accept::PAGES_PER_REGION;
use protocols::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE, PageSize, Vmpl};

use crate::guest::GUEST_VMPL;
use crate::memory::layout::PageRange;
use crate::platform::{AccessFault, AdjustError, Rights, ValidateError};

/// Words of one bit per page of a region.
const WORDS: usize = PAGES_PER_REGION / 64;
/// Status of an address that no memory is behind (the processor's FAIL_INPUT).
const FAIL_INPUT: u32 = 1;
/// Every so many regions one is backed by 4 KiB pages.
const SMALL_EVERY: u64 = 8;
/// Which of them.
const SMALL_AT: u64 = 3;

/// Whether the simulated host never backs this region (its number from address 0) by a large page.
#[must_use]
pub const fn backed_by_small_pages(region: u64) -> bool {
    region % SMALL_EVERY == SMALL_AT
}

/// What a processor reports for an access to a page that is not valid.
const NOT_VALIDATED: AccessFault = AccessFault {
    vector: 29,
    code: 0x404,
};

/// One bit per page of a region.
#[derive(Default)]
struct Bits([AtomicU64; WORDS]);

impl Bits {
    /// How many of `count` bits from `first` on are set.
    fn count(&self, first: usize, count: usize) -> usize {
        (first..first + count).filter(|&bit| self.get(bit)).count()
    }

    fn get(&self, bit: usize) -> bool {
        self.0
            .get(bit / 64)
            .is_some_and(|word| word.load(Ordering::Relaxed) >> (bit % 64) & 1 != 0)
    }

    fn set(&self, first: usize, count: usize, value: bool) {
        for bit in first..first + count {
            let Some(word) = self.0.get(bit / 64) else {
                return;
            };
            let mask = 1 << (bit % 64);
            if value {
                word.fetch_or(mask, Ordering::Relaxed);
            } else {
                word.fetch_and(!mask, Ordering::Relaxed);
            }
        }
    }
}

/// The entries of one region of 2 MiB.
#[derive(Default)]
pub struct Record {
    validated: Bits,
    granted: Bits,
    /// Whether the host holds the region as 4 KiB pages.
    small: AtomicBool,
}

/// Regions that follow each other.
#[derive(Clone, Copy)]
pub struct Stretch<'m> {
    /// Number of the first region.
    first: u64,
    records: &'m [Record],
}

impl<'m> Stretch<'m> {
    /// The regions of `records`, from the one at `start` on, which is at a multiple of 2 MiB.
    #[must_use]
    pub fn new(start: Gpa, records: &'m [Record]) -> Self {
        let first = start.get() / LARGE_PAGE_SIZE;
        for (number, record) in (first..).zip(records) {
            record
                .small
                .store(backed_by_small_pages(number), Ordering::Relaxed);
        }
        Self { first, records }
    }
}

macro_rules! counts {
    ($($(#[$doc:meta])+ $name:ident,)+) => {
        /// What was asked of the simulated processor.
        #[derive(Default)]
        struct Tally {
            $($name: AtomicU64,)+
        }

        /// The counts at one moment.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Counts {
            $($(#[$doc])+ pub $name: u64,)+
        }

        impl Tally {
            fn counts(&self) -> Counts {
                Counts {
                    $($name: self.$name.load(Ordering::Relaxed),)+
                }
            }
        }
    };
}

counts! {
    /// 2 MiB validated.
    validated_2m,
    /// 4 KiB validated.
    validated_4k,
    /// 2 MiB rescinded.
    rescinded_2m,
    /// 4 KiB rescinded.
    rescinded_4k,
    /// 2 MiB refused for the size of what the host holds.
    mismatches,
    /// Validations of what was valid.
    double_validations,
    /// Other changes that changed nothing.
    no_changes,
    /// Uses of a page that was not valid.
    not_validated,
    /// Scrubs of a page that a lower level had rights to.
    late_scrubs,
    /// Rescinds of a page that a lower level had rights to.
    live_rescinds,
}

impl Counts {
    /// All validations that were carried out.
    #[must_use]
    pub const fn validations(&self) -> u64 {
        self.validated_2m + self.validated_4k
    }

    /// What no correct paravisor does, on a host that does not lie.
    #[must_use]
    pub const fn violations(&self) -> u64 {
        self.double_validations
            + self.no_changes
            + self.not_validated
            + self.late_scrubs
            + self.live_rescinds
    }
}

/// The table.
pub struct Table<'m> {
    stretches: &'m [Stretch<'m>],
    tally: Tally,
}

/// The part of a region that an operation is on.
struct Part<'m> {
    record: &'m Record,
    first: usize,
    count: usize,
    size: PageSize,
}

impl Part<'_> {
    fn validated(&self) -> usize {
        self.record.validated.count(self.first, self.count)
    }

    fn granted(&self) -> usize {
        self.record.granted.count(self.first, self.count)
    }

    /// Rule 1.
    fn mismatches(&self) -> bool {
        match self.size {
            PageSize::Size2M => self.record.small.load(Ordering::Relaxed),
            PageSize::Size4K => {
                self.record.small.store(true, Ordering::Relaxed);
                false
            }
        }
    }
}

fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl<'m> Table<'m> {
    /// A table in which nothing is valid. The stretches ascend.
    #[must_use]
    pub fn new(stretches: &'m [Stretch<'m>]) -> Self {
        Self {
            stretches,
            tally: Tally::default(),
        }
    }

    /// What was asked so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.tally.counts()
    }

    fn part(&self, gpa: Gpa, size: PageSize) -> Option<Part<'m>> {
        let region = gpa.get() / LARGE_PAGE_SIZE;
        let record = self.stretches.iter().find_map(|stretch| {
            let index = usize::try_from(region.checked_sub(stretch.first)?).ok()?;
            stretch.records.get(index)
        })?;
        let (first, count) = match size {
            PageSize::Size2M => (0, PAGES_PER_REGION),
            PageSize::Size4K => ((gpa.get() % LARGE_PAGE_SIZE / PAGE_SIZE) as usize, 1),
        };
        Some(Part {
            record,
            first,
            count,
            size,
        })
    }

    /// Makes pages valid as a launch does, with rights for the guest or without. Not counted.
    ///
    /// # Errors
    /// The first page that has no entry.
    pub fn launch(&self, pages: PageRange, granted: bool) -> Result<(), Gpa> {
        for page in pages.frames() {
            let part = self.part(page, PageSize::Size4K).ok_or(page)?;
            part.record.validated.set(part.first, 1, true);
            part.record.granted.set(part.first, 1, granted);
        }
        Ok(())
    }

    /// Whether the page is valid, and whether the guest has rights to it.
    #[must_use]
    pub fn entry(&self, page: Gpa) -> (bool, bool) {
        self.part(page, PageSize::Size4K)
            .map_or((false, false), |part| {
                (part.validated() == 1, part.granted() == 1)
            })
    }

    /// Rule 1 and 2 for validating.
    ///
    /// # Errors
    /// As the instruction; nothing changed.
    pub fn validate(&self, gpa: Gpa, size: PageSize) -> Result<(), ValidateError> {
        let part = self
            .part(gpa, size)
            .ok_or(ValidateError::Status(FAIL_INPUT))?;
        if part.mismatches() {
            add(&self.tally.mismatches);
            return Err(ValidateError::SizeMismatch);
        }
        if part.validated() != 0 {
            add(&self.tally.double_validations);
            return Err(ValidateError::NoChange);
        }
        part.record.validated.set(part.first, part.count, true);
        add(match size {
            PageSize::Size2M => &self.tally.validated_2m,
            PageSize::Size4K => &self.tally.validated_4k,
        });
        Ok(())
    }

    /// Rule 1 and 2 for rescinding. Rights end with validity.
    ///
    /// # Errors
    /// As the instruction; nothing changed.
    pub fn rescind(&self, gpa: Gpa, size: PageSize) -> Result<(), ValidateError> {
        let part = self
            .part(gpa, size)
            .ok_or(ValidateError::Status(FAIL_INPUT))?;
        if part.mismatches() {
            add(&self.tally.mismatches);
            return Err(ValidateError::SizeMismatch);
        }
        if part.validated() != part.count {
            add(&self.tally.no_changes);
            return Err(ValidateError::NoChange);
        }
        if part.granted() != 0 {
            add(&self.tally.live_rescinds);
        }
        part.record.validated.set(part.first, part.count, false);
        part.record.granted.set(part.first, part.count, false);
        add(match size {
            PageSize::Size2M => &self.tally.rescinded_2m,
            PageSize::Size4K => &self.tally.rescinded_4k,
        });
        Ok(())
    }

    /// Rule 1 and 3. Only the guest's level has rights that are kept here.
    ///
    /// # Errors
    /// As the instruction; nothing changed.
    pub fn adjust(
        &self,
        gpa: Gpa,
        size: PageSize,
        vmpl: Vmpl,
        rights: Rights,
    ) -> Result<(), AdjustError> {
        let part = self
            .part(gpa, size)
            .ok_or(AdjustError::Status(FAIL_INPUT))?;
        if part.mismatches() {
            add(&self.tally.mismatches);
            return Err(AdjustError::SizeMismatch);
        }
        if part.validated() != part.count {
            add(&self.tally.not_validated);
            return Err(AdjustError::Fault(NOT_VALIDATED));
        }
        if vmpl == GUEST_VMPL {
            let granted = rights == Rights::Full;
            part.record.granted.set(part.first, part.count, granted);
        }
        Ok(())
    }

    /// Whether memory may be filled: as any access, it needs a valid page.
    ///
    /// # Errors
    /// The fault of the access.
    pub fn may_scrub(&self, gpa: Gpa, size: PageSize) -> Result<(), AccessFault> {
        let part = self.part(gpa, size).ok_or(NOT_VALIDATED)?;
        if part.validated() != part.count {
            add(&self.tally.not_validated);
            return Err(NOT_VALIDATED);
        }
        if part.granted() != 0 {
            add(&self.tally.late_scrubs);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    const REGIONS: usize = 8;

    fn records() -> Vec<Record> {
        (0..REGIONS).map(|_| Record::default()).collect()
    }

    fn with_table(test: impl FnOnce(&Table<'_>)) {
        let records = records();
        let stretches = [Stretch::new(Gpa::new(0), &records)];
        test(&Table::new(&stretches));
    }

    const LARGE: Gpa = Gpa::new(0);
    const SMALL: Gpa = Gpa::new(SMALL_AT * LARGE_PAGE_SIZE);

    #[test]
    fn validity_changes_once_each_way() {
        with_table(|table| {
            for size in [PageSize::Size2M, PageSize::Size4K] {
                let again = Err(ValidateError::NoChange);
                assert_eq!(table.validate(LARGE, size), Ok(()));
                assert_eq!(table.validate(LARGE, size), again);
                assert_eq!(table.entry(LARGE), (true, false));
                assert_eq!(table.rescind(LARGE, size), Ok(()));
                assert_eq!(table.rescind(LARGE, size), again);
                assert_eq!(table.entry(LARGE), (false, false));
            }
            let counts = table.counts();
            assert_eq!((counts.double_validations, counts.no_changes), (2, 2));
            assert_eq!((counts.validated_2m, counts.validated_4k), (1, 1));
            assert_eq!((counts.rescinded_2m, counts.rescinded_4k), (1, 1));
            assert_eq!(counts.violations(), 4);
        });
    }

    #[test]
    fn a_block_of_which_a_page_is_valid_is_no_new_block() {
        with_table(|table| {
            table
                .launch(PageRange::try_from_frames(7, 8).unwrap(), true)
                .unwrap();
            assert_eq!(
                table.validate(LARGE, PageSize::Size2M),
                Err(ValidateError::NoChange)
            );
            assert_eq!(table.entry(Gpa::new(7 * PAGE_SIZE)), (true, true));
            assert_eq!(table.entry(Gpa::new(6 * PAGE_SIZE)), (false, false));
        });
    }

    #[test]
    fn small_pages_mismatch_from_the_start_or_from_the_first_small_change() {
        with_table(|table| {
            let mismatch = Err(ValidateError::SizeMismatch);
            assert_eq!(table.validate(SMALL, PageSize::Size2M), mismatch);
            assert_eq!(table.validate(SMALL, PageSize::Size4K), Ok(()));
            assert_eq!(table.validate(LARGE, PageSize::Size2M), Ok(()));
            assert_eq!(table.rescind(LARGE, PageSize::Size4K), Ok(()));
            assert_eq!(table.rescind(LARGE, PageSize::Size2M), mismatch);
            assert_eq!(
                table.adjust(LARGE, PageSize::Size2M, GUEST_VMPL, Rights::Full),
                Err(AdjustError::SizeMismatch)
            );
            assert_eq!(table.counts().mismatches, 3);
        });
    }

    #[test]
    fn rights_need_validity_and_end_with_it() {
        with_table(|table| {
            let size = PageSize::Size2M;
            let fault = table.adjust(LARGE, size, GUEST_VMPL, Rights::Full);
            assert_eq!(fault, Err(AdjustError::Fault(NOT_VALIDATED)));
            assert_eq!(table.may_scrub(LARGE, size), Err(NOT_VALIDATED));
            assert!(NOT_VALIDATED.is_not_validated());
            table.validate(LARGE, size).unwrap();
            table.may_scrub(LARGE, size).unwrap();
            table
                .adjust(LARGE, size, Vmpl::VMPL2, Rights::Full)
                .unwrap();
            assert_eq!(table.entry(LARGE), (true, false));
            table.adjust(LARGE, size, GUEST_VMPL, Rights::Full).unwrap();
            assert_eq!(table.entry(LARGE), (true, true));
            assert_eq!(table.counts().late_scrubs, 0);
            table.may_scrub(LARGE, size).unwrap();
            table.rescind(LARGE, size).unwrap();
            assert_eq!(table.entry(LARGE), (false, false));
            let counts = table.counts();
            assert_eq!((counts.late_scrubs, counts.live_rescinds), (1, 1));
            assert_eq!(counts.not_validated, 2);
        });
    }

    #[test]
    fn what_has_no_entry_is_refused() {
        with_table(|table| {
            let beyond = Gpa::new(REGIONS as u64 * LARGE_PAGE_SIZE);
            let status = Err(ValidateError::Status(FAIL_INPUT));
            assert_eq!(table.validate(beyond, PageSize::Size4K), status);
            assert_eq!(table.rescind(beyond, PageSize::Size2M), status);
            let pages = PageRange::try_from_bytes(beyond.get(), PAGE_SIZE).unwrap();
            assert_eq!(table.launch(pages, false), Err(beyond));
            assert_eq!(table.entry(beyond), (false, false));
        });
    }
}
