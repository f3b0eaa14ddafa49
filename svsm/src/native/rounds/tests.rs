//! The rounds over the real engine and the simulated table, on memory of one word per page, and with
//! one thing wrong at a time.

use core::cell::Cell;
use std::vec::Vec;

use accept::{
    AdjustFault, Fault, Map, NotFlushed, PAGES_PER_REGION, Range, Region, RegionLock, RegionLocks,
    ValidateFault,
};
use protocols::addr::PageSize as Size;

use super::*;
use crate::guest::GUEST_VMPL;
use crate::platform::native::table::{Record, Stretch};
use crate::platform::{AdjustError, Rights, ValidateError};

const REGIONS: usize = 12;
const PAGES: u64 = (REGIONS * PAGES_PER_REGION) as u64;

/// What is wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wrong {
    Nothing,
    /// Pages are not made zero.
    NoScrub,
    /// The guest gets no rights.
    NoGrant,
    /// Two addresses lead to one page.
    Alias,
    /// Rights stay when a page leaves.
    NoRevoke,
    /// Rights come before zeros.
    EarlyGrant,
}

/// One word stands for a page.
struct Words {
    words: Vec<Cell<u64>>,
    wrong: Wrong,
}

impl Words {
    fn word(&self, page: Gpa) -> &Cell<u64> {
        let frame = page.frame() as usize;
        let frame = if self.wrong == Wrong::Alias && frame == 4000 {
            4001
        } else {
            frame
        };
        &self.words[frame]
    }
}

impl Memory for &Words {
    fn is_zero(&self, pages: PageRange) -> Result<bool, AccessFault> {
        Ok(pages.frames().all(|page| self.word(page).get() == 0))
    }

    fn mark(&self, page: Gpa) -> Result<(), AccessFault> {
        self.word(page).set(page.get() | 1);
        Ok(())
    }

    fn is_marked(&self, page: Gpa) -> Result<bool, AccessFault> {
        Ok(self.word(page).get() == page.get() | 1)
    }
}

struct Hands<'a> {
    table: &'a Table<'a>,
    words: &'a Words,
}

fn size(block: Block) -> Size {
    match block.size() {
        PageSize::Size4K => Size::Size4K,
        PageSize::Size2M => Size::Size2M,
    }
}

fn gpa(block: Block) -> Gpa {
    Gpa::new(block.gpa())
}

fn validate_fault(error: ValidateError) -> ValidateFault {
    match error {
        ValidateError::SizeMismatch => ValidateFault::SizeMismatch,
        ValidateError::NoChange => ValidateFault::AlreadyDone,
        ValidateError::Status(status) => ValidateFault::Failed(status),
        ValidateError::Fault(_) => ValidateFault::Failed(1),
    }
}

impl Hands<'_> {
    fn adjust(&self, block: Block, rights: Rights) -> Result<(), AdjustFault> {
        self.table
            .adjust(gpa(block), size(block), GUEST_VMPL, rights)
            .map_err(|error| match error {
                AdjustError::SizeMismatch => AdjustFault::SizeMismatch,
                AdjustError::Status(status) => AdjustFault::Failed(status),
                AdjustError::Fault(_) => AdjustFault::NotValidated,
            })
    }
}

impl Backend for Hands<'_> {
    fn validate(&self, block: Block) -> Result<(), ValidateFault> {
        self.table
            .validate(gpa(block), size(block))
            .map_err(validate_fault)?;
        if self.words.wrong == Wrong::EarlyGrant {
            self.adjust(block, Rights::Full).unwrap();
        }
        Ok(())
    }

    fn rescind(&self, block: Block) -> Result<(), ValidateFault> {
        self.table
            .rescind(gpa(block), size(block))
            .map_err(validate_fault)
    }

    fn scrub(&self, block: Block) -> Result<(), Fault> {
        self.table
            .may_scrub(gpa(block), size(block))
            .map_err(|_| Fault::NotValidated)?;
        if self.words.wrong != Wrong::NoScrub {
            let first = block.first().number();
            for number in first..first + block.size().pages() {
                self.words.word(Gpa::from_frame_truncating(number)).set(0);
            }
        }
        Ok(())
    }

    fn grant(&self, block: Block) -> Result<(), AdjustFault> {
        match self.words.wrong {
            Wrong::NoGrant => Ok(()),
            _ => self.adjust(block, Rights::Full),
        }
    }

    fn revoke(&self, block: Block) -> Result<(), AdjustFault> {
        match self.words.wrong {
            Wrong::NoRevoke => Ok(()),
            _ => self.adjust(block, Rights::None),
        }
    }

    fn flush(&self) -> Result<(), NotFlushed> {
        Ok(())
    }
}

/// Runs the rounds over all pages but the launched ones (two of the third region).
fn run(wrong: Wrong) -> Result<Summary, TurnstileReason> {
    let records: Vec<Record> = (0..REGIONS).map(|_| Record::default()).collect();
    let stretches = [Stretch::new(Gpa::new(0), &records)];
    let table = Table::new(&stretches);
    let words = Words {
        words: (0..PAGES).map(|_| Cell::new(0)).collect(),
        wrong,
    };
    let hands = Hands {
        table: &table,
        words: &words,
    };
    let regions: Vec<Region> = (0..REGIONS).map(|_| Region::new()).collect();
    let ranges = [Range::try_new(Frame::containing(0), PAGES, &regions).unwrap()];
    let locks: Vec<RegionLock> = (0..64).map(|_| RegionLock::new()).collect();
    let engine = Engine::new(
        hands,
        Map::try_new(&ranges).unwrap(),
        RegionLocks::try_new(&locks).unwrap(),
    );
    let span = |start, end| PageRange::try_from_frames(start, end).unwrap();
    let own = span(1030, 1032);
    table.launch(own, false).unwrap();
    engine
        .record_launch(Frame::containing(own.start().get()), 2, PageState::Owned)
        .unwrap();
    let pages = [span(0, 1030), span(1032, PAGES)];
    Rounds {
        engine: &engine,
        table: &table,
        memory: &words,
        pages: &pages,
    }
    .run()
}

#[test]
fn the_flows_leave_what_they_have_to() {
    let summary = run(Wrong::Nothing).unwrap();
    let counts = summary.counts;
    assert_eq!(summary.pages, PAGES - 2);
    // Two regions of twelve are of small pages (3 and 11), one has launched pages in it (2).
    let (small, large) = (2, REGIONS as u64 - 3);
    assert_eq!(counts.validated_2m, 2 * large);
    assert_eq!(counts.validated_4k, 2 * (small * 512 + 510));
    assert_eq!(counts.rescinded_2m, large);
    assert_eq!(counts.rescinded_4k, small * 512 + 510);
    assert!(counts.mismatches >= 3 * small);
    assert_eq!(counts.violations(), 0);
    // One request per block: the pages around the launched ones on their own.
    assert_eq!(summary.repeated, large + small + 510);
}

#[test]
fn each_thing_wrong_is_seen() {
    for wrong in [
        Wrong::NoScrub,
        Wrong::NoGrant,
        Wrong::Alias,
        Wrong::NoRevoke,
        Wrong::EarlyGrant,
    ] {
        assert_eq!(run(wrong), Err(TurnstileReason::NATIVE_CHECK), "{wrong:?}");
    }
}
