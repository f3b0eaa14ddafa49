//! What the engine itself costs per request, with a platform that costs nothing (design §10: at
//! most 150 ns per 2 MiB, and 0.5 % of filling the block with zeros).
//!
//! `cargo bench -p accept --bench cost`. Rounds of the fill and of the engine are interleaved, each
//! on new state; the figures are medians over the rounds, of times on a processor and of their
//! ratios within a round.

mod figures;

use std::hint::black_box;

use accept::{
    AdjustFault, Backend, Block, Engine, Fault, Frame, Map, NotFlushed, OnNoChange, PageSize,
    Range, Region, RegionLock, RegionLocks, ValidateFault,
};
use figures::{Limit, figure, median, thread_time};

/// A platform on which every instruction is free.
struct Free {
    /// Memory is held as small pages: every large validate is refused.
    small: bool,
}

impl Backend for Free {
    fn validate(&self, block: Block) -> Result<(), ValidateFault> {
        match black_box(block).size() {
            PageSize::Size2M if self.small => Err(ValidateFault::SizeMismatch),
            _ => Ok(()),
        }
    }
    fn rescind(&self, block: Block) -> Result<(), ValidateFault> {
        black_box(block);
        Ok(())
    }
    fn scrub(&self, block: Block) -> Result<(), Fault> {
        black_box(block);
        Ok(())
    }
    fn grant(&self, block: Block) -> Result<(), AdjustFault> {
        black_box(block);
        Ok(())
    }
    fn revoke(&self, block: Block) -> Result<(), AdjustFault> {
        black_box(block);
        Ok(())
    }
    fn flush(&self) -> Result<(), NotFlushed> {
        Ok(())
    }
}

const REGIONS: u64 = 4096;
const ROUNDS: usize = 61;
/// Fills per round: some milliseconds.
const FILLS: usize = 32;

/// Nanoseconds per region of `work`.
fn per_region(work: impl Fn(Block)) -> f64 {
    let start = thread_time();
    for region in 0..REGIONS {
        work(Block::region_around(Frame::containing(region << 21)));
    }
    (thread_time() - start).as_nanos() as f64 / REGIONS as f64
}

/// Nanoseconds per fill of 2 MiB.
fn fill(memory: &mut [u8]) -> f64 {
    let start = thread_time();
    for _ in 0..FILLS {
        black_box(&mut *memory).fill(0);
    }
    (thread_time() - start).as_nanos() as f64 / FILLS as f64
}

/// Runs `test` with an engine on a free platform.
fn with_engine<T>(small: bool, test: impl FnOnce(&Engine<'_, Free>) -> T) -> T {
    let states: Vec<Region> = (0..REGIONS).map(|_| Region::new()).collect();
    let ranges =
        [Range::try_new(Frame::containing(0), REGIONS * 512, &states).expect("good range")];
    let locks: Vec<RegionLock> = (0..64).map(|_| RegionLock::new()).collect();
    let map = Map::try_new(&ranges).expect("good map");
    test(&Engine::new(
        Free { small },
        map,
        RegionLocks::try_new(&locks).expect("good locks"),
    ))
}

fn accept(engine: &Engine<'_, Free>, block: Block) {
    engine.accept(block, OnNoChange::Fail).expect("accepted");
}

fn rescind(engine: &Engine<'_, Free>, block: Block) {
    let rescinded = engine.rescind(block, OnNoChange::Fail).expect("rescinded");
    if let Some(owed) = rescinded.flush {
        engine.flush(owed).expect("flushed");
    }
}

/// The times of one round, in nanoseconds per region.
struct Round {
    fill: f64,
    accept: f64,
    refused: f64,
    rescind: f64,
    small: f64,
    page: f64,
}

fn round(memory: &mut [u8]) -> Round {
    let (accepted, refused, rescinded) = with_engine(false, |engine| {
        (
            per_region(|block| accept(engine, block)),
            per_region(|block| {
                engine
                    .accept(block, OnNoChange::Fail)
                    .expect_err("accepted before");
            }),
            per_region(|block| rescind(engine, block)),
        )
    });
    Round {
        fill: fill(memory),
        accept: accepted,
        refused,
        rescind: rescinded,
        small: with_engine(true, |engine| per_region(|block| accept(engine, block))),
        page: with_engine(false, |engine| {
            per_region(|block| accept(engine, Block::page(block.first())))
        }),
    }
}

fn main() {
    let mut memory = vec![1u8; 2 << 20];
    let rounds: Vec<Round> = (0..ROUNDS).map(|_| round(&mut memory)).collect();
    let middle = |of: &dyn Fn(&Round) -> f64| median(&rounds.iter().map(of).collect::<Vec<_>>());
    let ns = |name: &str, of: &dyn Fn(&Round) -> f64, limit| figure(name, middle(of), "ns", limit);
    ns("fill 2 MiB", &|r| r.fill, Limit::None);
    ns(
        "accept 2 MiB, large page",
        &|r| r.accept,
        Limit::AtMost(150.0),
    );
    figure(
        "accept 2 MiB, large page, of a fill",
        middle(&|r| r.accept / r.fill * 100.0),
        "%",
        Limit::AtMost(0.5),
    );
    ns("accept 2 MiB, small pages", &|r| r.small, Limit::None);
    ns("accept 4 KiB", &|r| r.page, Limit::None);
    ns("refuse 2 MiB that is accepted", &|r| r.refused, Limit::None);
    ns("rescind 2 MiB, large page", &|r| r.rescind, Limit::None);
}
