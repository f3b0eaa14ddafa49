//! The engine's real code under every interleaving of two vCPUs, by the model checker loom.
//!
//! Built only with `--cfg loom` (`cargo xtask test` does so in its job `unit/interleavings`):
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p accept --release --test interleavings
//! ```
//!
//! Each model runs until loom has tried every order in which the threads' atomic operations and
//! instructions can happen, without a bound on preemptions, and every value that a load may return
//! under the memory model. What is not explored: more than two threads, waiting for longer than
//! [`LOOKS`], and the counters, which decide nothing.
#![cfg(loom)]

use std::sync::{Arc, Mutex};

use accept::{
    AdjustFault, Backend, Block, Engine, Error, Fault, Frame, Map, NotFlushed, OnNoChange,
    PageState, Range, Region, RegionLock, RegionLocks, Role, ValidateFault,
};
use loom::sync::atomic::{AtomicU64, Ordering};

/// Looks at a held lock before the answer is "busy". Loom tries a run for each number of looks, so
/// they are few; who was told "busy" asks again when the other is done.
const LOOKS: u32 = 2;
/// Regions of the models, each a range of its own.
const REGIONS: usize = 2;
/// What the host left in a page.
const GARBAGE: u64 = 0xdead;

/// The hardware: one instruction at a time, with a place before each where the other vCPU may come
/// in. It keeps the laws of the instructions and remembers who broke them.
struct Hardware {
    /// Touched by each instruction, so that loom may switch there. Relaxed: it must not make
    /// anything visible that the engine itself does not.
    bus: AtomicU64,
    /// The first word of page 0.
    content: AtomicU64,
    /// Validated and granted pages, and what went wrong. Not loom's: instructions are atomic.
    rmp: Mutex<Rmp>,
}

struct Rmp {
    valid: Vec<bool>,
    granted: Vec<bool>,
    double_validations: usize,
    unlawful: Vec<&'static str>,
    /// Pages that were revoked and may still be cached.
    stale: bool,
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
        act(&mut self.rmp.lock().expect("no thread panicked"))
    }
}

/// The pages of a block, as indices. The models' regions differ in the lowest bit of their number.
fn pages(block: Block) -> std::ops::Range<usize> {
    let first = block.first().number() as usize % (REGIONS * 512);
    first..first + block.size().pages() as usize
}

/// The hardware with an eye on the map.
struct Watched<'m> {
    shared: &'m Shared,
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

type Guarded<'m> = Engine<'m, Watched<'m>>;

/// What the vCPUs of one run share.
struct Shared {
    hardware: Hardware,
    regions: [Region; REGIONS],
    locks: [RegionLock; RegionLocks::MINIMUM],
    /// The numbers of the two regions.
    numbers: [u64; REGIONS],
}

impl Shared {
    fn new(numbers: [u64; REGIONS]) -> Self {
        Self {
            hardware: Hardware::new(),
            regions: [const { Region::new() }; REGIONS],
            locks: [const { RegionLock::new() }; RegionLocks::MINIMUM],
            numbers,
        }
    }

    /// An engine on the shared memory. It has no state of its own, so every vCPU may have one.
    fn with_engine<T>(&self, work: impl FnOnce(&Guarded<'_>) -> T) -> T {
        self.with_patience(LOOKS, work)
    }

    fn with_patience<T>(&self, looks: u32, work: impl FnOnce(&Guarded<'_>) -> T) -> T {
        let range = |index: usize| {
            let first = large(self.numbers[index]).first();
            Range::try_new(first, 512, &self.regions[index..=index]).expect("a good range")
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
            let rmp = self.hardware.rmp.lock().expect("no thread panicked");
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
fn large(number: u64) -> Block {
    Block::region_around(Frame::try_new(number * 512).expect("a small number"))
}

/// A small page of it.
fn page(number: u64, index: u64) -> Block {
    Block::page(Frame::try_new(number * 512 + index).expect("a small number"))
}

/// Two neighbours: regions with different locks.
const NEIGHBOURS: [u64; REGIONS] = [0, 1];

/// Runs `first` and `second` side by side in every order, on new memory that `prepare` has worked
/// on, and hands their answers to `judge`. Who was told "busy" asks again when both are done, as a
/// guest does.
fn explore<A: 'static, B: Send + 'static>(
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
fn accept(engine: &Guarded<'_>, block: Block) -> Result<(), Error> {
    engine.accept(block, OnNoChange::Fail).map(drop)
}

/// Rescinds, and pays for it.
fn rescind(engine: &Guarded<'_>, block: Block) -> Result<(), Error> {
    let rescinded = engine.rescind(block, OnNoChange::Fail)?;
    if let Some(owed) = rescinded.flush {
        engine.flush(owed).expect("flushes do not fail here");
    }
    Ok(())
}

#[test]
fn i2_two_accepts_of_one_page_have_one_winner() {
    explore(
        NEIGHBOURS,
        |_| {},
        |engine| accept(engine, page(0, 0)),
        |engine| accept(engine, page(0, 0)),
        |_, a, b| {
            let winners = usize::from(a.is_ok()) + usize::from(b.is_ok());
            assert_eq!(winners, 1, "{a:?} {b:?}");
            assert_eq!(a.and(b), Err(Error::NoChange));
        },
    );
}

#[test]
fn i2_a_page_and_its_region_asked_for_at_once() {
    explore(
        NEIGHBOURS,
        |_| {},
        |engine| accept(engine, large(0)),
        |engine| accept(engine, page(0, 1)),
        |_, a, b| {
            assert_eq!(usize::from(a.is_ok()) + usize::from(b.is_ok()), 1);
            assert_eq!(a.and(b), Err(Error::NoChange));
        },
    );
}

#[test]
fn i10_who_is_told_already_accepted_finds_the_page_zero() {
    explore(
        NEIGHBOURS,
        |_| {},
        |engine| accept(engine, page(0, 0)),
        |engine| {
            let accepted = engine.state(page(0, 0).first()) == Some(PageState::Accepted);
            if accepted {
                let answer = accept(engine, page(0, 0));
                assert_eq!(answer, Err(Error::NoChange), "answered without the lock");
                // The guest looks at the page as soon as it has this answer.
                let content = engine
                    .backend()
                    .shared
                    .hardware
                    .content
                    .load(Ordering::Relaxed);
                assert_eq!(content, 0, "the guest saw what the host left");
            }
            Ok(())
        },
        |_, first, _| assert_eq!(first, Ok(())),
    );
}

#[test]
fn i1_i3_accept_against_rescind_of_the_same_page() {
    explore(
        NEIGHBOURS,
        |engine| accept(engine, page(0, 0)).expect("accepted"),
        |engine| accept(engine, page(0, 0)),
        |engine| rescind(engine, page(0, 0)),
        |shared, accepted, rescinded| {
            assert_eq!(rescinded, Ok(()));
            let state = shared.with_engine(|engine| engine.state(page(0, 0).first()));
            // Either the accept came too early, or it brought the page back.
            match accepted {
                Err(Error::NoChange) => assert_eq!(state, Some(PageState::Unaccepted)),
                Ok(()) => assert_eq!(state, Some(PageState::Accepted)),
                Err(error) => panic!("a page on its way out was called {error:?}"),
            }
            assert!(!shared.hardware.rmp.lock().expect("no panic").stale);
        },
    );
}

#[test]
fn i4_accept_against_creation_of_a_vmsa_in_the_same_page() {
    explore(
        NEIGHBOURS,
        |engine| accept(engine, page(0, 0)).expect("accepted"),
        |engine| {
            let taken = engine.take(page(0, 0).first(), Role::Vmsa);
            let taken = taken?;
            let rmp = engine
                .backend()
                .shared
                .hardware
                .rmp
                .lock()
                .expect("no panic");
            assert!(
                !rmp.granted[0] && !rmp.stale,
                "the guest can still write to it"
            );
            drop(rmp);
            Ok(taken)
        },
        |engine| accept(engine, page(0, 0)),
        |shared, taken, accepted| {
            let taken = taken.expect("accepted before");
            let error = accepted.expect_err("never the guest's again");
            assert!(matches!(error, Error::Owned | Error::NoChange), "{error:?}");
            assert_eq!(taken.frame(), page(0, 0).first());
            shared.with_engine(|engine| {
                assert_eq!(engine.state(taken.frame()), Some(PageState::Owned));
            });
        },
    );
}

#[test]
fn i4_rescind_against_creation_of_a_vmsa_in_the_same_page() {
    explore(
        NEIGHBOURS,
        |engine| accept(engine, page(0, 0)).expect("accepted"),
        |engine| engine.take(page(0, 0).first(), Role::Vmsa),
        |engine| rescind(engine, page(0, 0)),
        |shared, taken, rescinded| {
            let state = shared.with_engine(|engine| engine.state(page(0, 0).first()));
            match (taken, rescinded) {
                (Ok(_), Err(Error::Owned)) => assert_eq!(state, Some(PageState::Owned)),
                (Err(Error::NotAccepted), Ok(())) => assert_eq!(state, Some(PageState::Unaccepted)),
                both => panic!("both or neither had the page: {both:?}"),
            }
        },
    );
}

#[test]
fn a_claim_against_acceptance_in_the_background() {
    explore(
        NEIGHBOURS,
        |_| {},
        |engine| accept(engine, page(0, 0)),
        |engine| engine.prepare(large(0)).map(drop),
        |shared, claimed, prepared| {
            assert_eq!(prepared, Ok(()));
            assert_eq!(claimed, Ok(()), "to the guest the page is new");
            assert_eq!(shared.hardware.content.load(Ordering::Relaxed), 0);
            let state = shared.with_engine(|engine| engine.state(page(0, 0).first()));
            assert_eq!(state, Some(PageState::Accepted));
        },
    );
}

#[test]
fn two_claims_of_one_page_have_one_winner() {
    explore(
        NEIGHBOURS,
        |engine| engine.prepare(page(0, 0)).map(drop).expect("prepared"),
        |engine| accept(engine, page(0, 0)),
        |engine| accept(engine, page(0, 0)),
        |_, a, b| {
            let winners = usize::from(a.is_ok()) + usize::from(b.is_ok());
            assert_eq!(winners, 1, "{a:?} {b:?}");
        },
    );
}

#[test]
fn a_claim_against_a_rescind_of_what_was_never_claimed() {
    explore(
        NEIGHBOURS,
        |engine| engine.prepare(page(0, 0)).map(drop).expect("prepared"),
        |engine| accept(engine, page(0, 0)),
        |engine| engine.rescind(page(0, 0), OnNoChange::Ignore).map(drop),
        // Map and hardware agree at the end, whoever was first; the page is in no other state.
        |shared, claimed, rescinded| {
            assert_eq!((claimed, rescinded), (Ok(()), Ok(())));
            let state = shared.with_engine(|engine| engine.state(page(0, 0).first()));
            assert!(matches!(
                state,
                Some(PageState::Accepted | PageState::Unaccepted)
            ));
        },
    );
}

#[test]
fn lists_in_opposite_order_do_not_wait_for_each_other() {
    let list = |engine: &Guarded<'_>, numbers: [u64; 2]| {
        Ok(numbers.map(|number| accept(engine, page(number, 0))))
    };
    explore(
        NEIGHBOURS,
        |_| {},
        move |engine| list(engine, [0, 1]),
        move |engine| list(engine, [1, 0]),
        |_, mine, theirs| {
            let ([a0, a1], [b1, b0]) = (mine.expect("a list"), theirs.expect("a list"));
            for (mine, theirs) in [(a0, b0), (a1, b1)] {
                // Who is told "busy" has met the other at this very page.
                assert_eq!(usize::from(mine.is_ok()) + usize::from(theirs.is_ok()), 1);
                let loser = mine.and(theirs);
                assert!(
                    matches!(loser, Err(Error::NoChange | Error::Busy)),
                    "{loser:?}"
                );
            }
        },
    );
}

#[test]
fn two_regions_with_the_same_lock() {
    // Found by trying: a region that answers "busy" while region 0 is being worked on.
    let twin = (1..)
        .step_by(2)
        .find(|number| same_lock(0, *number))
        .expect("64 locks");
    explore(
        [0, twin],
        |_| {},
        |engine| accept(engine, page(0, 0)),
        move |engine| accept(engine, page(twin, 0)),
        |_, a, b| assert_eq!((a, b), (Ok(()), Ok(()))),
    );
}

/// Whether two regions share a lock, as seen from outside: with no patience at all, work on the
/// one is refused while the other's lock is held.
fn same_lock(a: u64, b: u64) -> bool {
    let same = Arc::new(Mutex::new(false));
    let seen = Arc::clone(&same);
    loom::model(move || {
        Shared::new([a, b]).with_patience(0, |engine| {
            accept(engine, page(a, 0)).expect("accepted");
            let inner = engine.while_accepted(page(a, 0).first(), || {
                engine.accept(page(b, 0), OnNoChange::Fail)
            });
            *seen.lock().expect("no panic") = inner == Ok(Err(Error::Busy));
        });
    });
    *same.lock().expect("no panic")
}
