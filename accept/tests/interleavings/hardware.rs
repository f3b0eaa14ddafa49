//! What the models share: the hardware as they see it, the memory of one run, and the run itself.
//!
//! Which hardware it is says the crate that these modules are part of, by the type `crate::Hardware`:
//! that of SEV-SNP here, that of TDX in the paravisor's crate, which includes these files.

use std::sync::{Arc, Mutex};

use accept::{
    AdjustFault, Backend, Block, Broken, Engine, Error, Fault, Frame, GivenBack, Map, NotFlushed,
    OnNoChange, Order, PageState, Range, Region, RegionLock, RegionLocks, Run, ValidateFault, Walk,
};
use loom::sync::atomic::AtomicU64;

use crate::Hardware;

/// Looks at a held lock before the answer is "busy". Loom tries a run for each number of looks, so
/// they are few; who was told "busy" asks again when the other is done.
pub const LOOKS: u32 = 2;
/// Regions of the models, each a range of its own.
pub const REGIONS: usize = 2;
/// Any two flows can meet in more ways than this.
const FEWEST_RUNS: u32 = 10;
/// What the host left in a page.
pub const GARBAGE: u64 = 0xdead;

/// A platform under the model checker. The engine's backend is a reference to it.
///
/// It executes one instruction at a time, and touches one of loom's atomics before each, relaxed, so
/// that the other vCPU may come in there and nothing becomes visible that the engine itself does not
/// make so. It keeps the laws of the instructions and remembers who broke them.
pub trait Platform: Send + Sync + 'static {
    /// Nothing is valid.
    fn new() -> Self;

    /// The first word of page 0.
    fn content(&self) -> &AtomicU64;

    /// Whether a page is valid, and whether the guest has access to it.
    fn page(&self, index: usize) -> (bool, bool);

    /// Whether pages were revoked and may still be cached.
    fn is_stale(&self) -> bool;

    /// How often a valid page was validated.
    fn double_validations(&self) -> usize;

    /// The laws that were broken.
    fn unlawful(&self) -> Vec<&'static str>;

    /// A law was broken.
    fn accuse(&self, of: &'static str);

    /// The guest gives a block back, and everything follows that belongs to it on this platform.
    fn rescind(engine: &Guarded<'_>, block: Block, choice: OnNoChange) -> Result<(), Error>;
}

/// Whether others may meet a page on its way out: where the host removes it, it is waited for without
/// a lock.
pub const LEAVING_IS_SEEN: bool = <&Hardware as Backend>::HOST_REMOVES;

/// The pages of a block, as indices. The models' regions differ in the lowest bit of their number.
pub fn pages(block: Block) -> std::ops::Range<usize> {
    let first = block.first().number() as usize % (REGIONS * 512);
    first..first + block.size().pages() as usize
}

/// The hardware with an eye on the map.
pub struct Watched<'m> {
    pub shared: &'m Shared,
}

impl Watched<'_> {
    fn hardware(&self) -> &Hardware {
        &self.shared.hardware
    }

    /// Something takes a page away: nobody may be told any more that it is accepted.
    pub fn is_taken(&self, block: Block) {
        let state = self
            .shared
            .with_engine(|engine| engine.state(block.first()));
        if state == Some(PageState::Accepted) {
            self.hardware().accuse("taken while recorded as accepted");
        }
    }
}

impl Backend for Watched<'_> {
    const HOST_REMOVES: bool = LEAVING_IS_SEEN;

    fn validate(&self, block: Block) -> Result<(), ValidateFault> {
        self.hardware().validate(block)
    }
    fn validate_run(&self, run: Run) -> Result<(), Broken<ValidateFault>> {
        self.hardware().validate_run(run)
    }
    fn grant_run(&self, run: Run) -> Result<(), Broken<AdjustFault>> {
        self.hardware().grant_run(run)
    }
    fn rescind(&self, block: Block) -> Result<(), ValidateFault> {
        self.is_taken(block);
        Backend::rescind(&self.hardware(), block)
    }
    fn scrub(&self, block: Block) -> Result<(), Fault> {
        self.hardware().scrub(block)
    }
    fn grant(&self, block: Block) -> Result<(), AdjustFault> {
        self.hardware().grant(block)
    }
    fn revoke(&self, block: Block) -> Result<(), AdjustFault> {
        self.is_taken(block);
        self.hardware().revoke(block)
    }
    fn flush(&self) -> Result<(), NotFlushed> {
        self.hardware().flush()
    }
}

pub type Guarded<'m> = Engine<'m, Watched<'m>>;

/// What the vCPUs of one run share.
pub struct Shared {
    pub hardware: Hardware,
    regions: [Region; REGIONS],
    given_back: [GivenBack; REGIONS],
    /// A walk over all memory.
    pub walk: Walk,
    /// On the heap: the stacks of loom's threads are small.
    locks: Vec<RegionLock>,
    /// The numbers of the two regions.
    numbers: [u64; REGIONS],
}

impl Shared {
    pub fn new(numbers: [u64; REGIONS]) -> Self {
        Self {
            hardware: Hardware::new(),
            regions: [const { Region::new() }; REGIONS],
            given_back: [const { GivenBack::new() }; REGIONS],
            walk: Walk::new(Order::LowFirst, u64::MAX),
            locks: (0..RegionLocks::MINIMUM)
                .map(|_| RegionLock::new())
                .collect(),
            numbers,
        }
    }

    /// An engine on the shared memory. It has no state of its own, so every vCPU may have one.
    pub fn with_engine<T>(&self, work: impl FnOnce(&Guarded<'_>) -> T) -> T {
        self.with_patience(LOOKS, work)
    }

    pub fn with_patience<T>(&self, looks: u32, work: impl FnOnce(&Guarded<'_>) -> T) -> T {
        let range = |index: usize| {
            let first = large(self.numbers[index]).first();
            Range::try_new(first, 512, &self.regions[index..=index])
                .and_then(|range| range.with_given_back(&self.given_back[index..=index]))
                .expect("a good range")
        };
        let ranges = [range(0), range(1)];
        let locks = RegionLocks::try_new(&self.locks).expect("good locks");
        work(&Engine::new(
            Watched { shared: self },
            Map::try_new(&ranges).expect("a good map"),
            locks.with_spin_limit(looks),
        ))
    }

    /// What must hold after every run: I2, I3, I11.
    fn assert_good(&self) {
        self.with_engine(|engine| {
            assert_eq!(self.hardware.double_validations(), 0);
            let unlawful = self.hardware.unlawful();
            assert!(unlawful.is_empty(), "{unlawful:?}");
            for number in self.numbers {
                // The pages in use, and one that nobody asked for by itself.
                for index in [0, 1, 2, 511] {
                    let page = page(number, index);
                    let (valid, granted) = self.hardware.page(pages(page).start);
                    let state = engine.state(page.first()).expect("in the map");
                    let agrees = match state {
                        PageState::Unaccepted => !valid && !granted,
                        PageState::Ahead => valid && !granted,
                        PageState::Accepted => valid && granted,
                        PageState::Owned => valid,
                    };
                    assert!(
                        agrees,
                        "{page:?} {state:?}: valid {valid}, granted {granted}"
                    );
                }
            }
        });
    }
}

/// The 2 MiB block with this number.
pub fn large(number: u64) -> Block {
    Block::region_around(Frame::try_new(number * 512).expect("a small number"))
}

/// A small page of it.
pub fn page(number: u64, index: u64) -> Block {
    Block::page(Frame::try_new(number * 512 + index).expect("a small number"))
}

/// Two neighbours: regions with different locks.
pub const NEIGHBOURS: [u64; REGIONS] = [0, 1];

/// Runs `first` and `second` side by side in every order, on new memory that `prepare` has worked
/// on, and hands their answers to `judge`. Who was told "busy" asks again when both are done, as a
/// guest does.
pub fn explore<A: 'static, B: Send + 'static>(
    numbers: [u64; REGIONS],
    prepare: impl Fn(&Guarded<'_>) + Send + Sync + 'static,
    first: impl Fn(&Guarded<'_>) -> Result<A, Error> + Send + Sync + 'static,
    second: impl Fn(&Guarded<'_>) -> Result<B, Error> + Send + Sync + 'static,
    judge: impl Fn(&Shared, Result<A, Error>, Result<B, Error>) + Send + Sync + 'static,
) {
    explore_bounded(None, numbers, prepare, first, second, judge);
}

/// The same with a bound on how often one vCPU is interrupted for the other.
pub fn explore_bounded<A: 'static, B: Send + 'static>(
    preemptions: Option<usize>,
    numbers: [u64; REGIONS],
    prepare: impl Fn(&Guarded<'_>) + Send + Sync + 'static,
    first: impl Fn(&Guarded<'_>) -> Result<A, Error> + Send + Sync + 'static,
    second: impl Fn(&Guarded<'_>) -> Result<B, Error> + Send + Sync + 'static,
    judge: impl Fn(&Shared, Result<A, Error>, Result<B, Error>) + Send + Sync + 'static,
) {
    let second = Arc::new(second);
    let runs = Arc::new(Mutex::new(0_u32));
    let seen = Arc::clone(&runs);
    let mut model = loom::model::Builder::new();
    model.max_branches = 100_000;
    model.preemption_bound = preemptions;
    model.check(move || {
        let shared = Arc::new(Shared::new(numbers));
        shared.with_engine(|engine| {
            for number in numbers {
                // Loom wants to see its atomics made before there is a second thread.
                let first = large(number).first();
                engine
                    .record_launch(first, 512, PageState::Unaccepted)
                    .expect("free");
            }
            prepare(engine);
        });
        let other = loom::thread::spawn({
            let (shared, second) = (Arc::clone(&shared), Arc::clone(&second));
            move || shared.with_engine(|engine| second(engine))
        });
        let mut mine = shared.with_engine(&first);
        let mut theirs = other.join().expect("no panic");
        shared.with_engine(|engine| {
            if matches!(mine, Err(Error::Busy)) {
                mine = first(engine);
            }
            if matches!(theirs, Err(Error::Busy)) {
                theirs = second(engine);
            }
        });
        judge(&shared, mine, theirs);
        shared.assert_good();
        *seen.lock().expect("no panic") += 1;
    });
    let runs = *runs.lock().expect("no panic");
    println!("{runs} runs");
    // Loom leaves out what it thinks makes no difference. It was mistaken once: see `accept::sync`.
    assert!(runs > FEWEST_RUNS, "{runs} runs explore nothing");
}

/// Accepts for the guest.
pub fn accept(engine: &Guarded<'_>, block: Block) -> Result<(), Error> {
    engine.accept(block, OnNoChange::Fail).map(drop)
}

/// Gives back what the guest has.
pub fn rescind(engine: &Guarded<'_>, block: Block) -> Result<(), Error> {
    <Hardware as Platform>::rescind(engine, block, OnNoChange::Fail)
}
