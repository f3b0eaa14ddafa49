//! What the engine itself costs per 2 MiB, with a platform that costs nothing (design §10: at most
//! 150 ns, and 0.5 % of filling the block with zeros).
//!
//! `cargo bench -p accept`. A plain timer: the figure is wanted to a few nanoseconds, and as a
//! ratio to a fill on the same machine.

use std::hint::black_box;
use std::time::Instant;

use accept::{
    AdjustFault, Backend, Block, Engine, Fault, Frame, Map, NotFlushed, OnNoChange, PageSize,
    Range, Region, RegionLock, RegionLocks, ValidateFault,
};

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
const ROUNDS: u64 = 20;

/// Nanoseconds per region of `work`, best of all rounds.
fn measure(mut work: impl FnMut(Block)) -> f64 {
    let mut best = f64::MAX;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for region in 0..REGIONS {
            work(Block::region_around(Frame::containing(region << 21)));
        }
        best = best.min(start.elapsed().as_nanos() as f64 / REGIONS as f64);
    }
    best
}

/// Runs `test` with an engine on a free platform.
fn with_engine(small: bool, test: impl FnOnce(&Engine<'_, Free>)) {
    let states: Vec<Region> = (0..REGIONS).map(|_| Region::new()).collect();
    let ranges =
        [Range::try_new(Frame::containing(0), REGIONS * 512, &states).expect("good range")];
    let locks: Vec<RegionLock> = (0..64).map(|_| RegionLock::new()).collect();
    let map = Map::try_new(&ranges).expect("good map");
    test(&Engine::new(
        Free { small },
        map,
        RegionLocks::try_new(&locks).expect("good locks"),
    ));
}

/// Accepts a block and takes it back.
fn there_and_back(engine: &Engine<'_, Free>, block: Block) {
    engine.accept(block, OnNoChange::Fail).expect("accepted");
    let rescinded = engine.rescind(block, OnNoChange::Fail).expect("rescinded");
    if let Some(owed) = rescinded.flush {
        engine.flush(owed).expect("flushed");
    }
}

fn main() {
    let mut memory = vec![1u8; 2 << 20];
    let fill = measure(|_| black_box(&mut memory).fill(0));
    println!("filling 2 MiB with zeros:                 {fill:8.0} ns");
    with_engine(false, |engine| {
        let both = measure(|block| there_and_back(engine, block));
        let share = both / fill * 100.0;
        println!("accept and rescind of 2 MiB, large page:  {both:8.1} ns, {share:.3} % of a fill");
        measure(|block| {
            engine.accept(block, OnNoChange::Ignore).expect("accepted");
        });
        let refused = measure(|block| {
            engine
                .accept(block, OnNoChange::Fail)
                .expect_err("accepted before");
        });
        println!("\"already accepted\", 2 MiB:                {refused:8.1} ns");
    });
    with_engine(true, |engine| {
        let both = measure(|block| there_and_back(engine, block));
        println!("accept and rescind of 2 MiB, small pages: {both:8.1} ns");
        // One small page in each region.
        let both = measure(|block| there_and_back(engine, Block::page(block.first())));
        println!("accept and rescind of 4 KiB:              {both:8.1} ns");
    });
}
