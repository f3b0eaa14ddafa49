//! What the models share: the hardware, the memory of one run, and the run itself.

use std::sync::{Arc, Mutex, MutexGuard};

use accept::{
    AdjustFault, Backend, Block, Engine, Error, Fault, Frame, GivenBack, Map, NotFlushed,
    OnNoChange, Order, PageState, Range, Region, RegionLock, RegionLocks, ValidateFault, Walk,
};
use loom::sync::atomic::{AtomicU64, Ordering};

/// Looks at a held lock before the answer is "busy". Loom tries a run for each number of looks, so
/// they are few; who was told "busy" asks again when the other is done.
pub const LOOKS: u32 = 2;
/// Regions of the models, each a range of its own.
pub const REGIONS: usize = 2;
/// What the host left in a page.
pub const GARBAGE: u64 = 0xdead;

/// The hardware: one instruction at a time, with a place before each where the other vCPU may come
/// in. It keeps the laws of the instructions and remembers who broke them.
pub struct Hardware {
    /// Touched by each instruction, so that loom may switch there. Relaxed: it must not make
    /// anything visible that the engine itself does not.
    bus: AtomicU64,
    /// The first word of page 0.
    pub content: AtomicU64,
    /// Validated and granted pages, and what went wrong. Not loom's: instructions are atomic.
    rmp: Mutex<Rmp>,
}

pub struct Rmp {
    valid: Vec<bool>,
    pub granted: Vec<bool>,
    double_validations: usize,
    unlawful: Vec<&'static str>,
    /// Pages that were revoked and may still be cached.
    pub stale: bool,
}

impl Hardware {
    fn new() -> Self {
        Self {
            bus: AtomicU64::new(0),
            content: AtomicU64::new(GARBAGE),
            rmp: Mutex::new(Rmp {
                valid: vec![false; REGIONS * 512],
                granted: vec![false; REGIONS * 512],
                double_validations: 0,
                unlawful: Vec::new(),
                stale: false,
            }),
        }
    }

    fn instruction<T>(&self, act: impl FnOnce(&mut Rmp) -> T) -> T {
        self.bus.fetch_add(1, Ordering::Relaxed);
        act(&mut self.rmp())
    }

    /// The table as it is.
    pub fn rmp(&self) -> MutexGuard<'_, Rmp> {
        self.rmp.lock().expect("no thread panicked")
    }
}

/// The pages of a block, as indices. The models' regions differ in the lowest bit of their number.
fn pages(block: Block) -> std::ops::Range<usize> {
    let first = block.first().number() as usize % (REGIONS * 512);
    first..first + block.size().pages() as usize
}

/// The hardware with an eye on the map.
pub struct Watched<'m> {
    pub shared: &'m Shared,
}

impl Watched<'_> {
    /// One instruction that takes pages away: nobody may be told any more that they are accepted.
    fn taking<T>(&self, block: Block, act: impl FnOnce(&mut Rmp) -> T) -> T {
        let state = self
            .shared
            .with_engine(|engine| engine.state(block.first()));
        self.instruction(|rmp| {
            if state == Some(PageState::Accepted) {
                rmp.unlawful.push("taken while recorded as accepted");
            }
            act(rmp)
        })
    }

    fn instruction<T>(&self, act: impl FnOnce(&mut Rmp) -> T) -> T {
        self.shared.hardware.instruction(act)
    }
}

impl Backend for Watched<'_> {
    fn validate(&self, block: Block) -> Result<(), ValidateFault> {
        self.instruction(|rmp| {
            if rmp.valid[pages(block)].contains(&true) {
                rmp.double_validations += 1;
                return Err(ValidateFault::AlreadyDone);
            }
            rmp.valid[pages(block)].fill(true);
            Ok(())
        })
    }

    fn rescind(&self, block: Block) -> Result<(), ValidateFault> {
        self.taking(block, |rmp| {
            if rmp.valid[pages(block)].contains(&false) {
                return Err(ValidateFault::AlreadyDone);
            }
            if rmp.granted[pages(block)].contains(&true) {
                rmp.unlawful.push("rescinded while granted");
            }
            rmp.valid[pages(block)].fill(false);
            Ok(())
        })
    }

    fn scrub(&self, block: Block) -> Result<(), Fault> {
        if pages(block).contains(&0) {
            self.shared.hardware.content.store(0, Ordering::Relaxed);
        }
        self.instruction(|rmp| {
            if rmp.granted[pages(block)].contains(&true) {
                rmp.unlawful.push("scrubbed under the guest's hands");
            }
            if rmp.valid[pages(block)].contains(&false) {
                return Err(Fault::NotValidated);
            }
            Ok(())
        })
    }

    fn grant(&self, block: Block) -> Result<(), AdjustFault> {
        self.instruction(|rmp| {
            if rmp.valid[pages(block)].contains(&false) {
                return Err(AdjustFault::NotValidated);
            }
            rmp.granted[pages(block)].fill(true);
            Ok(())
        })
    }

    fn revoke(&self, block: Block) -> Result<(), AdjustFault> {
        self.taking(block, |rmp| {
            if rmp.valid[pages(block)].contains(&false) {
                return Err(AdjustFault::NotValidated);
            }
            rmp.granted[pages(block)].fill(false);
            rmp.stale = true;
            Ok(())
        })
    }

    fn flush(&self) -> Result<(), NotFlushed> {
        self.instruction(|rmp| rmp.stale = false);
        Ok(())
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
            let rmp = self.hardware.rmp();
            assert_eq!(rmp.double_validations, 0);
            assert!(rmp.unlawful.is_empty(), "{:?}", rmp.unlawful);
            for number in self.numbers {
                // The pages in use, and one that nobody asked for by itself.
                for index in [0, 1, 2, 511] {
                    let page = page(number, index);
                    let at = pages(page).start;
                    let (valid, granted) = (rmp.valid[at], rmp.granted[at]);
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
    let second = Arc::new(second);
    let mut model = loom::model::Builder::new();
    model.max_branches = 100_000;
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
    });
}

/// Accepts for the guest.
pub fn accept(engine: &Guarded<'_>, block: Block) -> Result<(), Error> {
    engine.accept(block, OnNoChange::Fail).map(drop)
}

/// Rescinds, and pays for it.
pub fn rescind(engine: &Guarded<'_>, block: Block) -> Result<(), Error> {
    let rescinded = engine.rescind(block, OnNoChange::Fail)?;
    if let Some(owed) = rescinded.flush {
        engine.flush(owed).expect("flushes do not fail here");
    }
    Ok(())
}
