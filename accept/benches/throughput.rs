//! How much of the memory's own speed is left when several vCPUs accept at once, and what two
//! simpler designs would leave of it.
//!
//! `cargo bench -p accept --bench throughput [-- --memory MIB --threads N,N --rounds N --only PATTERN]`. All
//! figures are ratios of times within one round: of the fill alone to the engine (1.00 means that
//! accepting costs no more than the fill which it contains), and of each baseline to the engine
//! (above 1.00 the engine is faster).
//!
//! Noise: a thread's time is its time on a processor ([`figures::thread_time`]), so who waits for
//! one because the machine is busy is not counted; the time of all threads is that of the one that
//! took longest. Each thread stays on a processor of its own. Rounds are short (64 MiB, some
//! milliseconds for each candidate), and the candidates are interleaved: all orders of them are gone
//! through, in a shuffled sequence ([`orders`]). A figure is the median over the rounds; beside it is
//! the ratio of the best times of either side.
//!
//! "Not slower" is judged by a control: the second baseline is measured twice in each round, and its
//! times are compared with each other as the engine's are with a baseline's. How far these ratios
//! scatter tells how far a median of so many rounds may lie from the truth ([`error_of_median`]); the
//! engine's may be below 1.00 by [`ERRORS`] times that. The control is held to the same limit, either way
//! round: a bench in which identical code is faster than itself says nothing of others.
//!
//! Where a candidate's variables lie is part of the noise, too. A load waits for a store before it to an
//! address with the same low 12 bits, and behind the fill of a page stores to many of them are under way.
//! So each timing has its stacks at another place within a page ([`lower`]), and over [`PLACES`] rounds
//! each candidate has been at all of them, in a sequence of its own.
//!
//! With two threads the best time of a candidate with locks may be that of a round in which they
//! did not run at the same time.

mod figures;
mod orders;

use std::hint::{black_box, spin_loop};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, available_parallelism};
use std::time::Duration;

use accept::{
    AdjustFault, Backend, Block, Engine, Fault, Frame, Map, NotFlushed, OnNoChange, PageSize,
    Range, Region, RegionLock, RegionLocks, ValidateFault,
};
use figures::{Limit, figure, median, option, quantile, thread_time};
use orders::{Shuffled, orders};
use rustix::thread::{CpuSet, sched_setaffinity};
use spin::Mutex;

const UNIT: usize = PageSize::Size2M.bytes() as usize;
const PAGE: usize = PageSize::Size4K.bytes() as usize;

/// Guest memory: one buffer for each block that is asked for, at the start of a page, with a mutex in
/// cache lines of its own. As every design under test keeps two vCPUs off one block, the mutex is
/// never contended; it costs as much as a lock that nobody else wants.
struct Memory {
    blocks: Vec<Cell>,
    size: PageSize,
}

#[repr(align(128))]
struct Cell(Mutex<Vec<u8>>);

impl Memory {
    fn new(units: usize, size: PageSize) -> Self {
        let pages = units * UNIT / PAGE;
        let blocks = pages / size.pages() as usize;
        let cell = || Cell(Mutex::new(vec![1; size.bytes() as usize + PAGE]));
        Self {
            blocks: (0..blocks).map(|_| cell()).collect(),
            size,
        }
    }

    fn units(&self) -> usize {
        self.blocks.len() * self.size.bytes() as usize / UNIT
    }

    /// The same instructions for all candidates: a copy for one of them, elsewhere in the program, was seen
    /// to be a quarter slower or faster.
    #[inline(never)]
    fn fill(&self, block: Block) {
        assert_eq!(block.size(), self.size);
        let index = block.first().number() / self.size.pages();
        let mut buffer = self.blocks[index as usize].0.lock();
        let start = buffer.as_ptr().align_offset(PAGE);
        let bytes = self.size.bytes() as usize;
        black_box(&mut buffer[start..start + bytes]).fill(0);
    }
}

/// What is compared: accepts a block once, and says "no" the second time.
trait Candidate: Sync {
    fn accept(&self, memory: &Memory, block: Block);

    /// The same for a list of blocks, as a guest asks for them.
    fn accept_all(&self, memory: &Memory, blocks: &[Block]) {
        for block in blocks {
            self.accept(memory, *block);
        }
    }
}

/// The fill alone.
struct Raw;

impl Candidate for Raw {
    fn accept(&self, memory: &Memory, block: Block) {
        memory.fill(block);
    }
}

/// The engine, on a platform whose instructions are free but for the fill: the baselines have none.
struct Turnstile<'m>(Engine<'m, Scrubber<'m>>);

struct Scrubber<'m>(&'m Memory);

impl Backend for Scrubber<'_> {
    fn validate(&self, _: Block) -> Result<(), ValidateFault> {
        Ok(())
    }
    fn rescind(&self, _: Block) -> Result<(), ValidateFault> {
        Ok(())
    }
    fn scrub(&self, block: Block) -> Result<(), Fault> {
        self.0.fill(block);
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

impl Candidate for Turnstile<'_> {
    fn accept(&self, _: &Memory, block: Block) {
        black_box(self.0.accept(block, OnNoChange::Fail).is_ok());
    }
    fn accept_all(&self, _: &Memory, blocks: &[Block]) {
        let mut list = self.0.accepting();
        for block in blocks {
            black_box(list.accept(*block, OnNoChange::Fail).is_ok());
        }
    }
}

/// A spin lock of one byte, as the second baseline packs 64 of them into a cache line.
#[derive(Default)]
struct ByteLock(AtomicBool);

impl ByteLock {
    fn with<T>(&self, work: impl FnOnce() -> T) -> T {
        while self.0.swap(true, Ordering::Acquire) {
            while self.0.load(Ordering::Relaxed) {
                spin_loop();
            }
        }
        let result = work();
        self.0.store(false, Ordering::Release);
        result
    }
}

/// One bit per page: accepted. The words of a unit have one lock, so plain loads and stores do.
struct Bitmap(Vec<AtomicU64>);

impl Bitmap {
    const PAGES_PER_WORD: usize = u64::BITS as usize;

    fn new(units: usize) -> Self {
        let words = units * 512 / Self::PAGES_PER_WORD;
        Self((0..words).map(|_| AtomicU64::new(0)).collect())
    }

    /// Accepts the block unless a page of it is.
    fn accept(&self, memory: &Memory, block: Block) {
        let first = block.first().number() as usize;
        let word = first / Self::PAGES_PER_WORD;
        match block.size() {
            PageSize::Size4K => {
                let (word, bit) = (&self.0[word], 1 << (first % Self::PAGES_PER_WORD));
                if word.load(Ordering::Relaxed) & bit == 0 {
                    memory.fill(block);
                    word.store(word.load(Ordering::Relaxed) | bit, Ordering::Relaxed);
                }
            }
            PageSize::Size2M => {
                let words = &self.0[word..word + 512 / Self::PAGES_PER_WORD];
                if words.iter().all(|word| word.load(Ordering::Relaxed) == 0) {
                    memory.fill(block);
                    for word in words {
                        word.store(u64::MAX, Ordering::Relaxed);
                    }
                }
            }
        }
    }
}

/// Baseline 1: one lock for everything.
struct GlobalLock(ByteLock, Bitmap);

impl Candidate for GlobalLock {
    fn accept(&self, memory: &Memory, block: Block) {
        self.0.with(|| self.1.accept(memory, block));
    }
}

/// Baseline 2: 64 locks of a byte each, side by side, chosen by the unit's number modulo 64.
struct AdjacentLocks([ByteLock; 64], Bitmap);

impl Candidate for AdjacentLocks {
    fn accept(&self, memory: &Memory, block: Block) {
        let unit = block.first().number() as usize / 512;
        self.0[unit % 64].with(|| self.1.accept(memory, block));
    }
}

/// Which blocks each thread asks for.
#[derive(Clone, Copy)]
enum Pattern {
    /// Each thread has a part of memory of its own.
    Disjoint,
    /// Neighbouring blocks belong to different threads.
    Neighbours,
    /// Each thread's blocks are 64 units from its next: all on one of 64 modulo-chosen locks.
    Strides,
    /// All threads ask for all blocks in the same order.
    Colliding,
    /// As neighbours, with small pages: threads meet in every region.
    SmallPages,
}

impl Pattern {
    const ALL: [(Self, &'static str); 5] = [
        (Self::Disjoint, "2 MiB, disjoint"),
        (Self::Neighbours, "2 MiB, neighbours"),
        (Self::Strides, "2 MiB, stride of 64"),
        (Self::Colliding, "2 MiB, all the same"),
        (Self::SmallPages, "4 KiB, interleaved"),
    ];

    const fn block_size(self) -> PageSize {
        match self {
            Self::SmallPages => PageSize::Size4K,
            _ => PageSize::Size2M,
        }
    }

    fn blocks(self, units: usize, threads: usize, thread: usize) -> Vec<Block> {
        let unit =
            |number: usize| Block::region_around(Frame::try_new(number as u64 * 512).unwrap());
        let page = |number: usize| Block::page(Frame::try_new(number as u64).unwrap());
        match self {
            Self::Disjoint => {
                let share = units / threads;
                (thread * share..(thread + 1) * share).map(unit).collect()
            }
            Self::Neighbours => (thread..units).step_by(threads).map(unit).collect(),
            Self::Strides => {
                let columns = (0..64).flat_map(|c| (c..units).step_by(64));
                let mine = columns.enumerate().filter(|(n, _)| n % threads == thread);
                mine.map(|(_, number)| unit(number)).collect()
            }
            Self::Colliding => (0..units).map(unit).collect(),
            Self::SmallPages => (thread..units * 512).step_by(threads).map(page).collect(),
        }
    }
}

/// Keeps the calling thread on one processor: two threads that share one never meet.
fn pin(thread: usize) {
    let mut processors = CpuSet::new();
    processors.set(thread % available_parallelism().map_or(1, usize::from));
    // Where this is not allowed the threads are where they are.
    let _ = sched_setaffinity(None, &processors);
}

/// Lines of a page at which a stack can begin.
const PLACES: usize = 64;

/// Does `work` with the stack about `lines` cache lines further down.
#[inline(never)]
fn lower<T>(lines: usize, work: &mut dyn FnMut() -> T) -> T {
    let mut line = [0_u8; 64];
    black_box(&mut line);
    let result = match lines.checked_sub(1) {
        Some(rest) => lower(rest, work),
        None => work(),
    };
    // Behind the call, so that it is not the last thing done and the frame stays.
    black_box(&mut line);
    result
}

/// The time that the threads need for their blocks, with their stacks at a place: that of the slowest.
fn time(candidate: &dyn Candidate, memory: &Memory, work: &[Vec<Block>], place: usize) -> Duration {
    let start = Barrier::new(work.len());
    thread::scope(|scope| {
        let threads: Vec<_> = work
            .iter()
            .enumerate()
            .map(|(thread, blocks)| {
                let start = &start;
                scope.spawn(move || {
                    pin(thread);
                    start.wait();
                    lower(place, &mut || {
                        let begun = thread_time();
                        candidate.accept_all(memory, blocks);
                        thread_time() - begun
                    })
                })
            })
            .collect();
        let times = threads
            .into_iter()
            .map(|thread| thread.join().expect("no panic"));
        times.max().unwrap_or_default()
    })
}

/// One round of the engine on new state.
fn time_engine(memory: &Memory, work: &[Vec<Block>], place: usize) -> Duration {
    let units = memory.units();
    let states: Vec<Region> = (0..units).map(|_| Region::new()).collect();
    let ranges = [Range::try_new(Frame::containing(0), units as u64 * 512, &states).unwrap()];
    let locks: Vec<RegionLock> = (0..RegionLocks::count_for(work.len()))
        .map(|_| RegionLock::new())
        .collect();
    let map = Map::try_new(&ranges).unwrap();
    let locks = RegionLocks::try_new(&locks).unwrap();
    let engine = Engine::new(Scrubber(memory), map, locks);
    time(&Turnstile(engine), memory, work, place)
}

/// What is compared, in the order of [`round`]'s times.
const CANDIDATES: usize = 5;

/// The times of the fill, the engine, the two baselines, and the second of them again, measured in this
/// order.
fn round(
    memory: &Memory,
    work: &[Vec<Block>],
    raw: &[Vec<Block>],
    order: [usize; CANDIDATES],
    places: [usize; CANDIDATES],
) -> [f64; CANDIDATES] {
    let units = memory.units();
    let mut times = [0.0; CANDIDATES];
    for which in order {
        let place = places[which];
        // What the threads share is on this stack.
        let taken = lower(place, &mut || match which {
            0 => time(&Raw, memory, raw, place),
            1 => time_engine(memory, work, place),
            2 => {
                let baseline = GlobalLock(ByteLock::default(), Bitmap::new(units));
                time(&baseline, memory, work, place)
            }
            _ => {
                let locks = std::array::from_fn(|_| ByteLock::default());
                let baseline = AdjacentLocks(locks, Bitmap::new(units));
                time(&baseline, memory, work, place)
            }
        });
        times[which] = taken.as_secs_f64();
    }
    times
}

/// The standard error of the median of these values, from their quartiles, as if they were normally
/// distributed.
fn error_of_median(values: &[f64]) -> f64 {
    let deviation = (quantile(values, 0.75) - quantile(values, 0.25)) / 1.349;
    1.2533 * deviation / (values.len() as f64).sqrt()
}

/// By how many standard errors a median may be on the wrong side: with two, one of the forty comparisons
/// would be by chance.
const ERRORS: f64 = 3.0;

/// The least that has to be left of the memory's speed, on blocks that nobody else asks for.
const DISJOINT_SHARE: f64 = 0.95;

fn main() {
    let number = |name: &str, default: usize| {
        option(name).map_or(default, |text| text.parse().expect("a number"))
    };
    let (mib, rounds) = (number("--memory", 64), number("--rounds", 2 * PLACES));
    let threads = option("--threads").unwrap_or_else(|| "1,2".into());
    let units = mib / 2;
    let only = option("--only").unwrap_or_default();
    for (pattern, name) in Pattern::ALL
        .into_iter()
        .filter(|(_, name)| name.contains(&only))
    {
        let memory = Memory::new(units, pattern.block_size());
        for threads in threads.split(',') {
            let threads: usize = threads.parse().expect("--threads takes numbers");
            let work: Vec<Vec<Block>> = (0..threads)
                .map(|thread| pattern.blocks(units, threads, thread))
                .collect();
            // When all ask for the same, the fill is done once: the raw time is one thread's.
            let raw = match pattern {
                Pattern::Colliding => &work[..1],
                _ => &work[..],
            };
            let mut places: [_; CANDIDATES] =
                std::array::from_fn(|which| Shuffled::new(which, (0..PLACES).collect()));
            let times: Vec<_> = Shuffled::new(0, orders())
                .take(rounds)
                .map(|order| {
                    let places = std::array::from_fn(|which| places[which].next().unwrap_or(0));
                    round(&memory, &work, raw, order, places)
                })
                .collect();
            let ratios = |other: usize, of: usize| -> Vec<f64> {
                times.iter().map(|times| times[other] / times[of]).collect()
            };
            let least = |which: usize| -> f64 {
                let times = times.iter().map(|times| times[which]);
                times.fold(f64::INFINITY, f64::min)
            };
            let best = |other: usize| least(other) / least(1);
            let label = |what: &str| format!("{name}, {threads} thr: {what}");
            let limit = match pattern {
                Pattern::Disjoint if threads == 2 => Limit::AtLeast(DISJOINT_SHARE),
                _ => Limit::None,
            };
            let control = ratios(4, 3);
            let limit_of_noise = 1.0 - ERRORS * error_of_median(&control);
            let limit_of_noise = (limit_of_noise * 1e4).round() / 1e4;
            for (control, what) in [(control, "control"), (ratios(3, 4), "control, reversed")] {
                let limit = Limit::AtLeast(limit_of_noise);
                figure(&label(what), median(&control), "ratio", limit);
            }
            for (other, what) in [(0, "share of fill"), (2, "one lock"), (3, "64 locks")] {
                let limit = match other {
                    0 => limit,
                    _ => Limit::AtLeast(limit_of_noise),
                };
                figure(&label(what), median(&ratios(other, 1)), "ratio", limit);
                let what_best = format!("{what}, best times");
                figure(&label(&what_best), best(other), "ratio", Limit::None);
            }
        }
    }
}
