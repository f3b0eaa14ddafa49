//! A platform to judge the engine by: a reverse map table (RMP) written for these tests alone, with
//! the rules of the instructions, the laws they must be used by, and faults on demand.
//!
//! Guest physical and system physical addresses are the same. The table is small and slow: one
//! entry per 4 KiB page and a flag per 2 MiB for "the host holds this as one large page".

#![allow(
    dead_code,
    reason = "each test file uses the part of the model that it needs"
)]

pub mod every_call;
pub mod history;
pub mod race;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use accept::{
    AdjustFault, Backend, Block, Engine, Fault, Frame, GivenBack, Map, NotFlushed, Operation,
    PageSize, PageState, Range, Region, RegionLock, RegionLocks, ValidateFault,
};

/// The status that injected failures carry.
pub const INJECTED: u32 = 0x2a;

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// What the host left there.
    Scrambled,
    Zero,
    /// The guest has had the page and may have written to it.
    Guest,
}

/// One entry of the table.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    pub validated: bool,
    /// The guest's level has permissions.
    pub granted: bool,
    /// Permissions were taken and nobody has flushed since.
    pub stale: bool,
    pub content: Content,
}

const FRESH: Entry = Entry {
    validated: false,
    granted: false,
    stale: false,
    content: Content::Scrambled,
};

/// One call, as the backend saw it. Flushes have no block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    On(Operation, u64, PageSize),
    Flush,
}

/// What an injected fault looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injected {
    /// An unknown status.
    Status,
    /// The host takes the page away just before the instruction.
    PageGone,
}

struct Machine {
    entries: Vec<Entry>,
    /// Pages that were validated and not rescinded since, whatever the host has put there.
    witness: Vec<bool>,
    /// Per 2 MiB: the host holds it as one large page.
    large: Vec<bool>,
    log: Vec<Call>,
    broken_laws: Vec<String>,
    /// Fail the call with this number (counted from the moment it was set), and every call after
    /// it while `and_then` is set.
    fail_in: Option<(usize, Injected)>,
    keep_failing: bool,
    /// The next flush is not certain.
    flush_fails: bool,
}

/// The platform. Shared by all threads of a test.
pub struct Model {
    machine: Mutex<Machine>,
    double_validations: AtomicUsize,
    /// Give other threads the chance to get between two instructions.
    yield_often: bool,
}

impl Model {
    /// `regions` regions of 2 MiB from address 0, not validated, held by the host as `large` or
    /// small pages.
    pub fn new(regions: usize, large: bool) -> Self {
        Self {
            machine: Mutex::new(Machine {
                entries: vec![FRESH; regions * 512],
                witness: vec![false; regions * 512],
                large: vec![large; regions],
                log: Vec::new(),
                broken_laws: Vec::new(),
                fail_in: None,
                keep_failing: false,
                flush_fails: false,
            }),
            double_validations: AtomicUsize::new(0),
            yield_often: false,
        }
    }

    /// The same, where other threads often come between two instructions.
    pub fn shared(regions: usize, large: bool) -> Self {
        Self {
            yield_often: true,
            ..Self::new(regions, large)
        }
    }

    pub fn entry(&self, page: usize) -> Entry {
        self.machine.lock().unwrap().entries[page]
    }

    /// How often a page was validated again without a rescind between, also where the host had
    /// removed the first one.
    pub fn double_validations(&self) -> usize {
        self.double_validations.load(Ordering::Relaxed)
    }

    /// The calls since the last time this was asked.
    pub fn take_log(&self) -> Vec<Call> {
        std::mem::take(&mut self.machine.lock().unwrap().log)
    }

    /// The guest writes to a page that it holds.
    pub fn guest_writes(&self, page: usize) {
        let mut machine = self.machine.lock().unwrap();
        let entry = &mut machine.entries[page];
        assert!(
            entry.validated && entry.granted,
            "the guest cannot reach page {page}"
        );
        entry.content = Content::Guest;
    }

    /// The host breaks a large page into small ones, which changes nothing else.
    pub fn smash(&self, region: usize) {
        self.machine.lock().unwrap().large[region] = false;
    }

    /// The host removes a page and puts an unvalidated one in its place.
    pub fn remove(&self, page: usize) {
        let mut machine = self.machine.lock().unwrap();
        machine.large[page / 512] = false;
        machine.entries[page] = FRESH;
    }

    /// The host removes pages that the guest gave back, on a platform where nobody else can.
    pub fn host_takes(&self, pages: std::ops::Range<usize>) {
        let mut machine = self.machine.lock().unwrap();
        machine.entries[pages.clone()].fill(FRESH);
        machine.witness[pages].fill(false);
    }

    /// The host puts a page there that was validated for this address, and granted, long ago.
    pub fn resurrect(&self, page: usize) {
        let mut machine = self.machine.lock().unwrap();
        machine.large[page / 512] = false;
        machine.entries[page] = Entry {
            validated: true,
            granted: true,
            stale: false,
            content: Content::Guest,
        };
    }

    /// The call number `n` from now (0 is the next) fails; with `on_and_on` all later ones too.
    pub fn fail_in(&self, n: usize, how: Injected, on_and_on: bool) {
        let mut machine = self.machine.lock().unwrap();
        machine.fail_in = Some((n, how));
        machine.keep_failing = on_and_on;
    }

    /// A vCPU keeps the next flush from being certain.
    pub fn fail_flush(&self) {
        self.machine.lock().unwrap().flush_fails = true;
    }

    pub fn stop_failing(&self) {
        self.machine.lock().unwrap().fail_in = None;
    }

    /// Whether the injected failure is still to come.
    pub fn failure_pending(&self) -> bool {
        self.machine.lock().unwrap().fail_in.is_some()
    }

    /// Panics with every law that was broken.
    pub fn assert_lawful(&self) {
        let machine = self.machine.lock().unwrap();
        assert!(machine.broken_laws.is_empty(), "{:#?}", machine.broken_laws);
    }

    /// I11: map and hardware agree on every page.
    pub fn assert_agrees<B: Backend>(&self, engine: &Engine<'_, B>) {
        let machine = self.machine.lock().unwrap();
        for (page, entry) in machine.entries.iter().enumerate() {
            let state = engine.state(Frame::try_new(page as u64).unwrap()).unwrap();
            let agrees = match state {
                PageState::Unaccepted => !entry.validated && !entry.granted,
                PageState::Ahead => {
                    entry.validated && !entry.granted && entry.content == Content::Zero
                }
                PageState::Accepted => entry.validated && entry.granted,
                PageState::Owned => entry.validated,
            };
            assert!(
                agrees,
                "page {page}: the map says {state:?}, the hardware {entry:?}"
            );
        }
    }

    /// Runs one instruction: log, injected failure, then `act` on the entries of the block.
    fn instruction<F>(
        &self,
        operation: Operation,
        block: Block,
        mismatch: Option<F>,
        failed: F,
        act: impl Fn(&mut Entry) -> Result<Option<&'static str>, F>,
    ) -> Result<(), F> {
        if self.yield_often && block.first().number().is_multiple_of(128) {
            std::thread::yield_now();
        }
        let first = block.first().number() as usize;
        let pages = block.size().pages() as usize;
        let mut machine = self.machine.lock().unwrap();
        machine
            .log
            .push(Call::On(operation, block.gpa(), block.size()));
        match machine.fail_in {
            Some((0, how)) => {
                if !machine.keep_failing {
                    machine.fail_in = None;
                }
                match how {
                    Injected::Status => return Err(failed),
                    Injected::PageGone => {
                        if pages == 1 {
                            machine.large[first / 512] = false;
                        }
                        machine.entries[first..first + pages].fill(FRESH);
                    }
                }
            }
            Some((n, how)) => machine.fail_in = Some((n - 1, how)),
            None => {}
        }
        if let Some(mismatch) = mismatch {
            match block.size() {
                PageSize::Size2M if !machine.large[first / 512] => return Err(mismatch),
                PageSize::Size2M => {}
                // The host smashes the large page and resumes the instruction.
                PageSize::Size4K => machine.large[first / 512] = false,
            }
        }
        match operation {
            Operation::Validate => {
                let twice = machine.witness[first..first + pages].contains(&true);
                self.double_validations
                    .fetch_add(usize::from(twice), Ordering::Relaxed);
                machine.witness[first..first + pages].fill(true);
            }
            Operation::Rescind => machine.witness[first..first + pages].fill(false),
            _ => {}
        }
        for page in first..first + pages {
            let mut entry = machine.entries[page];
            if let Some(law) = act(&mut entry)? {
                machine.broken_laws.push(format!("page {page}: {law}"));
            }
            machine.entries[page] = entry;
        }
        Ok(())
    }
}

impl Backend for Model {
    fn validate(&self, block: Block) -> Result<(), ValidateFault> {
        let (mismatch, failed) = (ValidateFault::SizeMismatch, ValidateFault::Failed(INJECTED));
        self.instruction(
            Operation::Validate,
            block,
            Some(mismatch),
            failed,
            |entry| {
                if entry.validated {
                    return Err(ValidateFault::AlreadyDone);
                }
                entry.validated = true;
                entry.content = Content::Scrambled;
                Ok(None)
            },
        )
    }

    fn rescind(&self, block: Block) -> Result<(), ValidateFault> {
        let (mismatch, failed) = (ValidateFault::SizeMismatch, ValidateFault::Failed(INJECTED));
        self.instruction(Operation::Rescind, block, Some(mismatch), failed, |entry| {
            if !entry.validated {
                return Err(ValidateFault::AlreadyDone);
            }
            entry.validated = false;
            Ok(entry
                .granted
                .then_some("invalidated while the guest had permissions"))
        })
    }

    fn scrub(&self, block: Block) -> Result<(), Fault> {
        self.instruction(Operation::Scrub, block, None, Fault::NotMapped, |entry| {
            if !entry.validated {
                return Err(Fault::NotValidated);
            }
            entry.content = Content::Zero;
            Ok(entry.granted.then_some("scrubbed under the guest's hands"))
        })
    }

    fn grant(&self, block: Block) -> Result<(), AdjustFault> {
        let (mismatch, failed) = (AdjustFault::SizeMismatch, AdjustFault::Failed(INJECTED));
        self.instruction(Operation::Grant, block, Some(mismatch), failed, |entry| {
            if !entry.validated {
                return Err(AdjustFault::NotValidated);
            }
            entry.granted = true;
            let unscrubbed = entry.content == Content::Scrambled;
            if entry.content == Content::Zero {
                entry.content = Content::Guest;
            }
            Ok(unscrubbed.then_some("granted without a scrub"))
        })
    }

    fn revoke(&self, block: Block) -> Result<(), AdjustFault> {
        let (mismatch, failed) = (AdjustFault::SizeMismatch, AdjustFault::Failed(INJECTED));
        self.instruction(Operation::Revoke, block, Some(mismatch), failed, |entry| {
            if !entry.validated {
                return Err(AdjustFault::NotValidated);
            }
            entry.granted = false;
            entry.stale = true;
            Ok(None)
        })
    }

    fn flush(&self) -> Result<(), NotFlushed> {
        let mut machine = self.machine.lock().unwrap();
        machine.log.push(Call::Flush);
        if core::mem::take(&mut machine.flush_fails) {
            return Err(NotFlushed);
        }
        for entry in &mut machine.entries {
            entry.stale = false;
        }
        Ok(())
    }
}

/// Lets a test keep the model while the engine owns a reference.
impl Backend for &Model {
    fn validate(&self, block: Block) -> Result<(), ValidateFault> {
        (**self).validate(block)
    }
    fn rescind(&self, block: Block) -> Result<(), ValidateFault> {
        (**self).rescind(block)
    }
    fn scrub(&self, block: Block) -> Result<(), Fault> {
        (**self).scrub(block)
    }
    fn grant(&self, block: Block) -> Result<(), AdjustFault> {
        (**self).grant(block)
    }
    fn revoke(&self, block: Block) -> Result<(), AdjustFault> {
        (**self).revoke(block)
    }
    fn flush(&self) -> Result<(), NotFlushed> {
        (**self).flush()
    }
}

/// Runs `test` with an engine over `regions` regions from address 0 that remembers what is given back.
pub fn with_engine<B: Backend, T>(
    backend: B,
    regions: usize,
    spin_limit: u32,
    test: impl FnOnce(&Engine<'_, B>) -> T,
) -> T {
    let states: Vec<Region> = (0..regions).map(|_| Region::new()).collect();
    let flags: Vec<GivenBack> = (0..GivenBack::needed(regions))
        .map(|_| GivenBack::new())
        .collect();
    let range = Range::try_new(Frame::containing(0), regions as u64 * 512, &states).unwrap();
    let ranges = [range.with_given_back(&flags).unwrap()];
    let locks: Vec<RegionLock> = (0..64).map(|_| RegionLock::new()).collect();
    let locks = RegionLocks::try_new(&locks)
        .unwrap()
        .with_spin_limit(spin_limit);
    test(&Engine::new(backend, Map::try_new(&ranges).unwrap(), locks))
}

/// The small page with this number.
pub fn page(number: u64) -> Block {
    Block::page(frame(number))
}

/// The large block with this number.
pub fn large(number: u64) -> Block {
    Block::region_around(frame(number * 512))
}

pub fn frame(number: u64) -> Frame {
    Frame::try_new(number).unwrap()
}
