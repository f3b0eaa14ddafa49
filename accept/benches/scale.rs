//! The engine at sizes that no test machine has: how much memory its record takes, and how often
//! vCPUs meet at a lock.
//!
//! `cargo bench -p accept --bench scale [-- --sizes TIB,TIB]`. The record of each size is made (1 GiB
//! for 16 TiB) and its memory is both computed and measured. Collisions are counted on the real
//! choice of locks, by what can be seen from outside: 128 simulated vCPUs hold the lock of a region
//! each, one after the other; who finds the lock taken is refused.

mod figures;

use accept::{
    AdjustFault, Backend, Block, Engine, Error, Fault, Frame, Map, NotFlushed, OnNoChange, Range,
    Region, RegionLock, RegionLocks, ValidateFault,
};
use figures::{Limit, figure, option};

const TIB: u64 = 1 << 40;
const GIB: u64 = 1 << 30;
const REGION_BYTES: u64 = 2 << 20;
const VCPUS: usize = 128;
/// Times that all vCPUs take a lock, per pattern.
const ROUNDS: u64 = 4_000;

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

/// How many of the vCPUs find the lock of their region taken, when each keeps what it has got until
/// the last had its turn.
fn refused(engine: &Engine<'_, Free>, regions: &[u64]) -> u64 {
    let Some((first, rest)) = regions.split_first() else {
        return 0;
    };
    match engine.while_accepted(frame(*first), || refused(engine, rest)) {
        Ok(count) => count,
        Err(Error::Busy) => 1 + refused(engine, rest),
        Err(error) => panic!("accepted before: {error:?}"),
    }
}

/// Resident memory of this process in bytes.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = text
        .split_whitespace()
        .nth(1)
        .and_then(|word| word.parse::<u64>().ok());
    pages.unwrap_or(0) * 4096
}

fn main() {
    let count = RegionLocks::count_for(VCPUS);
    let lock_bytes = count * size_of::<RegionLock>();
    figure("locks for 128 vCPUs", count as f64, "locks", Limit::None);
    figure(
        "memory of the locks",
        lock_bytes as f64 / 1024.0,
        "KiB",
        Limit::None,
    );
    // Balls in bins: of n that choose among m at random, n - m (1 - (1 - 1/m)^n) find theirs taken.
    let (n, m) = (VCPUS as f64, count as f64);
    let computed = 1.0 - m / n * (1.0 - (1.0 - 1.0 / m).powf(n));
    figure(
        "refused of 128 vCPUs, as computed",
        computed,
        "share",
        Limit::None,
    );
    let sizes = option("--sizes").unwrap_or_else(|| "1,16".into());
    for size in sizes.split(',') {
        let tib: u64 = size.parse().expect("--sizes takes numbers of TiB");
        at_size(tib, count, computed);
    }
}

fn at_size(tib: u64, count: usize, computed: f64) {
    let regions = tib * TIB / REGION_BYTES;
    let before = resident();
    let states: Vec<Region> = (0..regions).map(|_| Region::new()).collect();
    let used = resident().saturating_sub(before);
    let bytes = regions * size_of::<Region>() as u64;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    figure(
        &format!("map of {tib} TiB, computed"),
        mib(bytes),
        "MiB",
        Limit::None,
    );
    figure(
        &format!("map of {tib} TiB, measured"),
        mib(used),
        "MiB",
        Limit::None,
    );
    let per_gib = bytes as f64 / 1024.0 / (tib * TIB / GIB) as f64;
    figure(
        &format!("map of {tib} TiB, per GiB"),
        per_gib,
        "KiB",
        Limit::AtMost(64.0),
    );

    let ranges = [Range::try_new(frame(0), regions * 512, &states).expect("a good range")];
    let locks: Vec<RegionLock> = (0..count).map(|_| RegionLock::new()).collect();
    let engine = Engine::new(
        Free,
        Map::try_new(&ranges).expect("a good map"),
        RegionLocks::try_new(&locks)
            .expect("good locks")
            .with_spin_limit(0),
    );
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let vcpus = VCPUS as u64;
    let mut share = |what: &str, limit, pick: &dyn Fn(&mut Dice) -> Vec<u64>| {
        let mut met = 0;
        for _ in 0..ROUNDS {
            let chosen = pick(&mut dice);
            for region in &chosen {
                let block = Block::region_around(frame(*region));
                engine.accept(block, OnNoChange::Ignore).expect("accepted");
            }
            met += refused(&engine, &chosen);
        }
        let share = met as f64 / (ROUNDS * vcpus) as f64;
        figure(
            &format!("{tib} TiB, refused: {what}"),
            share,
            "share",
            limit,
        );
    };
    // Half as much again is far outside of what chance does in so many rounds.
    let by_chance = Limit::AtMost(computed * 1.5);
    share("regions anywhere", by_chance, &|dice| {
        let mut chosen = Vec::new();
        while chosen.len() < VCPUS {
            let region = dice.below(regions);
            if !chosen.contains(&region) {
                chosen.push(region);
            }
        }
        chosen
    });
    share("neighbours", Limit::AtMost(computed), &|dice| {
        let first = dice.below(regions - vcpus);
        (first..first + vcpus).collect()
    });
    share("same place of 128 slices", by_chance, &|dice| {
        let slice = regions / vcpus;
        let at = dice.below(slice);
        (0..vcpus).map(|vcpu| vcpu * slice + at).collect()
    });
    share("anywhere in 128 slices", by_chance, &|dice| {
        let slice = regions / vcpus;
        (0..vcpus)
            .map(|vcpu| vcpu * slice + dice.below(slice))
            .collect()
    });
}
