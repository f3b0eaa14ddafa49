//! What the engine itself costs per 2 MiB, with a platform that costs nothing (design §10: at most
//! 150 ns, and 0.5 % of filling the block with zeros).
//!
//! `cargo bench -p accept`. A plain timer: the figure is wanted to a few nanoseconds, and as a
//! ratio to a fill on the same machine.

use std::hint::black_box;
use std::time::Instant;

use accept::{
    AdjustFault, Backend, Block, Engine, Fault, Frame, Map, OnNoChange, Range, Region, RegionLock,
    RegionLocks, ValidateFault,
};

/// A platform on which every instruction is free.
struct Free;

impl Backend for Free {
    fn validate(&self, block: Block) -> Result<(), ValidateFault> {
        black_box(block);
        Ok(())
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
    fn flush(&self) {}
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

fn main() {
    let states: Vec<Region> = (0..REGIONS).map(|_| Region::new()).collect();
    let ranges =
        [Range::try_new(Frame::containing(0), REGIONS * 512, &states).expect("good range")];
    let locks: Vec<RegionLock> = (0..64).map(|_| RegionLock::new()).collect();
    let map = Map::try_new(&ranges).expect("good map");
    let engine = Engine::new(Free, map, RegionLocks::try_new(&locks).expect("good locks"));

    let both = measure(|block| {
        engine.accept(block, OnNoChange::Fail).expect("accepted");
        let rescinded = engine.rescind(block, OnNoChange::Fail).expect("rescinded");
        if let Some(owed) = rescinded.flush {
            engine.flush(owed);
        }
    });
    measure(|block| {
        engine.accept(block, OnNoChange::Ignore).expect("accepted");
    });
    let refused = measure(|block| {
        engine
            .accept(block, OnNoChange::Fail)
            .expect_err("accepted before");
    });
    let mut memory = vec![1u8; 2 << 20];
    let fill = measure(|_| black_box(&mut memory).fill(0));

    println!(
        "accept and rescind of 2 MiB: {both:7.1} ns, {:.3} % of a fill",
        both / fill * 100.0
    );
    println!("\"already accepted\", 2 MiB:    {refused:7.1} ns");
    println!("filling 2 MiB with zeros:    {fill:7.0} ns");
}
