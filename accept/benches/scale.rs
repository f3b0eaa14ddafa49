//! The engine at sizes that no test machine has: how much memory its record takes, and how often
//! vCPUs meet at a lock.
//!
//! `cargo bench -p accept --bench scale`. The record of 1 TiB is made and used; of 16 TiB it is
//! computed, because a bench should run on a laptop. Collisions are counted on the real choice of
//! locks, by what can be seen from outside: while one region's lock is held, a request for another
//! region is refused if it has the same lock.

use accept::{
    AdjustFault, Backend, Block, Engine, Error, Fault, Frame, Map, NotFlushed, PageState, Range,
    Region, RegionLock, RegionLocks, ValidateFault,
};

const TIB: u64 = 1 << 40;
const GIB: u64 = 1 << 30;
const REGION_BYTES: u64 = 2 << 20;
const VCPUS: usize = 128;
/// Pairs of regions that are looked at per pattern.
const PAIRS: u64 = 200_000;

struct Free;

impl Backend for Free {
    fn validate(&self, _: Block) -> Result<(), ValidateFault> {
        Ok(())
    }
    fn rescind(&self, _: Block) -> Result<(), ValidateFault> {
        Ok(())
    }
    fn scrub(&self, _: Block) -> Result<(), Fault> {
        Ok(())
    }
    fn grant(&self, _: Block) -> Result<(), AdjustFault> {
        Ok(())
    }
    fn revoke(&self, _: Block) -> Result<(), AdjustFault> {
        Ok(())
    }
    fn flush(&self) -> Result<(), NotFlushed> {
        Ok(())
    }
}

/// A small generator: the bench needs many pairs, not good randomness.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

fn frame(region: u64) -> Frame {
    Frame::try_new(region * 512).expect("below 2^52")
}

/// Whether two regions share a lock.
fn meet(engine: &Engine<'_, Free>, a: u64, b: u64) -> bool {
    let inner = engine.while_accepted(frame(a), || engine.while_accepted(frame(b), || ()));
    inner.expect("accepted before") == Err(Error::Busy)
}

fn main() {
    let regions = TIB / REGION_BYTES;
    let count = RegionLocks::count_for(VCPUS);
    let lock_bytes = count * size_of::<RegionLock>();
    println!("{VCPUS} vCPUs, {count} locks, {lock_bytes} bytes of locks");
    for tib in [1, 16] {
        let bytes = tib * TIB / REGION_BYTES * size_of::<Region>() as u64;
        println!(
            "map of {tib:>2} TiB: {} MiB, {} KiB per GiB",
            bytes >> 20,
            (bytes / (tib * TIB / GIB)) >> 10
        );
    }

    let states: Vec<Region> = (0..regions).map(|_| Region::new()).collect();
    let ranges = [Range::try_new(frame(0), regions * 512, &states).expect("a good range")];
    let locks: Vec<RegionLock> = (0..count).map(|_| RegionLock::new()).collect();
    let engine = Engine::new(
        Free,
        Map::try_new(&ranges).expect("a good map"),
        RegionLocks::try_new(&locks)
            .expect("good locks")
            .with_spin_limit(0),
    );
    engine
        .record_launch(frame(0), regions * 512, PageState::Accepted)
        .expect("recorded");

    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let mut share = |pick: &mut dyn FnMut(&mut Dice) -> (u64, u64)| {
        let mut met = 0_u64;
        for _ in 0..PAIRS {
            let (a, b) = pick(&mut dice);
            met += u64::from(a != b && meet(&engine, a, b));
        }
        met as f64 / PAIRS as f64
    };
    println!(
        "share of pairs of regions with one lock; 1 / locks = {:.5}",
        1.0 / count as f64
    );
    let any = share(&mut |dice| (dice.below(regions), dice.below(regions)));
    println!("  any two regions of 1 TiB:        {any:.5}");
    let near = share(&mut |dice| {
        let a = dice.below(regions - VCPUS as u64);
        (a, a + 1 + dice.below(VCPUS as u64 - 1))
    });
    println!("  less than {VCPUS} regions apart:      {near:.5}");
    let slices = share(&mut |dice| {
        // Each vCPU walks its own 8 GiB; all are equally far.
        let (slice, at) = (regions / VCPUS as u64, dice.below(regions / VCPUS as u64));
        let a = dice.below(VCPUS as u64);
        let b = (a + 1 + dice.below(VCPUS as u64 - 1)) % VCPUS as u64;
        (a * slice + at, b * slice + at)
    });
    println!("  same place of two 8 GiB slices:  {slices:.5}");
}
