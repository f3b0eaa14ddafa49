//! Random histories and the rules they must follow, for every platform alike: the reference is one
//! line per rule, on nothing but an array of states.
//!
//! Shared: the engine's own tests run these histories on the model of SEV-SNP beside this file,
//! those of the paravisor's TDX backend on a model of the secure EPT.

use accept::{
    Backend, Block, Engine, Error, OnNoChange, Order, PageSize, PageState, Role, Taken, Walk,
};
use proptest::prelude::*;

use super::{Injected, Model, frame, large, page, with_engine};

pub const REGIONS: u64 = 2;
/// Pages that may be made ready: one too few for both regions, unless the guest was first somewhere.
const BUDGET: u64 = 2 * 512 - 1;

/// A platform that the histories run on. The engine's backend is a reference to it.
pub trait Hardware: Sized {
    /// I11: map and hardware agree on every page.
    fn assert_agrees<B: Backend>(&self, engine: &Engine<'_, B>);
    /// Panics with every law of the instructions that was broken.
    fn assert_lawful(&self);
    /// How often a page was validated again without a rescind between.
    fn double_validations(&self) -> usize;
    /// The host breaks a large page into small ones, which changes nothing else.
    fn smash(&self, region: usize);
    /// The guest gives a block back, and everything follows that belongs to it on this platform.
    fn rescind(
        &self,
        engine: &Engine<'_, &Self>,
        block: Block,
        choice: OnNoChange,
    ) -> Result<(), Error>
    where
        for<'a> &'a Self: Backend;
    /// The host removes a page and puts one there that nobody has accepted.
    fn remove(&self, page: usize);
    /// The host puts a page there that was accepted and granted long ago.
    fn resurrect(&self, page: usize);
    /// Calls fail: the one with number `n` from now, with `on_and_on` all later ones too.
    fn fail_in(&self, n: usize, on_and_on: bool);
    /// Calls work again.
    fn stop_failing(&self);
}

impl Hardware for Model {
    fn assert_agrees<B: Backend>(&self, engine: &Engine<'_, B>) {
        Self::assert_agrees(self, engine);
    }
    fn assert_lawful(&self) {
        Self::assert_lawful(self);
    }
    fn double_validations(&self) -> usize {
        Self::double_validations(self)
    }
    fn smash(&self, region: usize) {
        Self::smash(self, region);
    }
    fn rescind(
        &self,
        engine: &Engine<'_, &Self>,
        block: Block,
        choice: OnNoChange,
    ) -> Result<(), Error> {
        if let Some(owed) = engine.rescind(block, choice)?.flush {
            engine.flush(owed).expect("flushed");
        }
        Ok(())
    }
    fn remove(&self, page: usize) {
        Self::remove(self, page);
    }
    fn resurrect(&self, page: usize) {
        Self::resurrect(self, page);
    }
    fn fail_in(&self, n: usize, on_and_on: bool) {
        Self::fail_in(self, n, Injected::Status, on_and_on);
    }
    fn stop_failing(&self) {
        Self::stop_failing(self);
    }
}

/// One thing that happens.
#[derive(Clone, Debug)]
pub enum Step {
    Accept(Block, OnNoChange),
    /// The same of all these, up to the first that is refused.
    List(Vec<Block>, OnNoChange),
    Rescind(Block, OnNoChange),
    /// The next region of the walk is made ready.
    Walk,
    /// The region around the block is, because it lies near a request.
    Near(Block),
    /// The guest touches the page, and the platform's policy is to accept then.
    Touch(u64),
    /// Take the page, and give it back a few steps later.
    Lend(u64, Role),
    GiveBack,
    Smash(usize),
}

/// Pages from a few places where words, lines and regions meet, so that histories collide.
pub fn any_page() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..4u64,
        30..34u64,
        254..258u64,
        508..516u64,
        Just(REGIONS * 512)
    ]
}

fn any_block() -> impl Strategy<Value = Block> {
    prop_oneof![3 => any_page().prop_map(page), 1 => (0..=REGIONS).prop_map(large)]
}

fn any_choice() -> impl Strategy<Value = OnNoChange> {
    prop_oneof![Just(OnNoChange::Fail), Just(OnNoChange::Ignore)]
}

pub fn any_step() -> impl Strategy<Value = Step> {
    let role = prop_oneof![Just(Role::Vmsa), Just(Role::CallingArea)];
    prop_oneof![
        6 => (any_block(), any_choice()).prop_map(|(b, c)| Step::Accept(b, c)),
        6 => (any_block(), any_choice()).prop_map(|(b, c)| Step::Rescind(b, c)),
        2 => (prop::collection::vec(any_block(), 1..5), any_choice())
            .prop_map(|(b, c)| Step::List(b, c)),
        2 => Just(Step::Walk),
        2 => any_block().prop_map(Step::Near),
        2 => any_page().prop_map(Step::Touch),
        2 => (any_page(), role).prop_map(|(p, r)| Step::Lend(p, r)),
        2 => Just(Step::GiveBack),
        1 => (0..REGIONS as usize).prop_map(Step::Smash),
    ]
}

/// The rules, on nothing but an array of states, of which regions the guest gave back a page, and how
/// far the walk has come.
struct Reference {
    states: Vec<PageState>,
    given_back: [bool; REGIONS as usize],
    /// Regions that the walk has visited.
    walked: u64,
    /// Pages that may still be made ready.
    budget: u64,
}

impl Reference {
    fn new() -> Self {
        Self {
            states: vec![PageState::Unaccepted; REGIONS as usize * 512],
            given_back: [false; REGIONS as usize],
            walked: 0,
            budget: BUDGET,
        }
    }

    fn of(&mut self, block: Block) -> Option<&mut [PageState]> {
        let first = block.first().number() as usize;
        self.states
            .get_mut(first..first + block.size().pages() as usize)
    }

    fn accept(&mut self, block: Block, choice: OnNoChange) -> Result<(), Error> {
        let pages = self.of(block).ok_or(Error::OutOfRange)?;
        if pages.contains(&PageState::Owned) {
            return Err(Error::Owned);
        }
        if choice == OnNoChange::Fail && pages.contains(&PageState::Accepted) {
            return Err(Error::NoChange);
        }
        pages.fill(PageState::Accepted);
        Ok(())
    }

    fn rescind(&mut self, block: Block, choice: OnNoChange) -> Result<(), Error> {
        let pages = self.of(block).ok_or(Error::OutOfRange)?;
        if pages.contains(&PageState::Owned) {
            return Err(Error::Owned);
        }
        let result =
            if choice == OnNoChange::Fail && pages.iter().any(|s| *s != PageState::Accepted) {
                Err(Error::NoChange)
            } else {
                pages.fill(PageState::Unaccepted);
                Ok(())
            };
        self.given_back[block.first().number() as usize / 512] = true;
        result
    }

    fn touch(&mut self, number: u64) -> Result<(), Error> {
        let given_back = self.given_back.get(number as usize / 512);
        let block = match given_back.ok_or(Error::OutOfRange)? {
            true => page(number),
            false => large(number / 512),
        };
        self.accept(block, OnNoChange::Ignore)
    }

    fn list(&mut self, blocks: &[Block], choice: OnNoChange) -> Result<(), Error> {
        blocks.iter().try_for_each(|b| self.accept(*b, choice))
    }

    fn walk(&mut self) -> Result<(), Error> {
        if self.budget < 512 || self.walked == REGIONS {
            return Ok(());
        }
        self.walked += 1;
        self.prepare(self.walked - 1)
    }

    fn near(&mut self, block: Block) -> Result<(), Error> {
        if self.budget < 512 {
            return Ok(());
        }
        self.prepare(block.first().number() / 512)
    }

    fn prepare(&mut self, region: u64) -> Result<(), Error> {
        let given_back = self.given_back.get(region as usize);
        if *given_back.ok_or(Error::OutOfRange)? {
            return Ok(());
        }
        let pages = self.of(large(region)).ok_or(Error::OutOfRange)?;
        let new = pages.iter_mut().filter(|s| **s == PageState::Unaccepted);
        let made = new.map(|s| *s = PageState::Ahead).count();
        self.budget -= made as u64;
        Ok(())
    }

    fn take(&mut self, number: u64) -> Result<(), Error> {
        let state = self
            .states
            .get_mut(number as usize)
            .ok_or(Error::OutOfRange)?;
        match *state {
            PageState::Owned => Err(Error::Owned),
            PageState::Accepted => {
                *state = PageState::Owned;
                Ok(())
            }
            _ => Err(Error::NotAccepted),
        }
    }
}

/// What outlives a step on the engine.
struct Kept {
    lent: Vec<Taken>,
    walk: Walk,
}

impl Kept {
    fn new() -> Self {
        Self {
            lent: Vec::new(),
            walk: Walk::new(Order::LowFirst, BUDGET * PageSize::Size4K.bytes()),
        }
    }
}

/// One step on the engine; debts are paid at once.
fn apply<H: Hardware>(
    engine: &Engine<'_, &H>,
    hardware: &H,
    step: &Step,
    Kept { lent, walk }: &mut Kept,
) -> Result<(), Error>
where
    for<'a> &'a H: Backend,
{
    match step {
        Step::Accept(block, choice) => engine.accept(*block, *choice).map(|_| ())?,
        Step::Rescind(block, choice) => hardware.rescind(engine, *block, *choice)?,
        Step::List(blocks, choice) => {
            let mut list = engine.accepting();
            blocks
                .iter()
                .try_for_each(|b| list.accept(*b, *choice).map(drop))?;
        }
        Step::Walk => engine.prepare_next(walk).map(drop)?,
        Step::Near(block) => engine.prepare_near(walk, *block).map(drop)?,
        Step::Touch(number) => engine.accept_around(frame(*number)).map(|_| ())?,
        Step::Lend(number, role) => lent.push(engine.take(frame(*number), *role)?),
        Step::GiveBack => {
            if let Some(taken) = lent.pop()
                && let Err(failed) = engine.give_back(taken)
            {
                lent.push(failed.taken);
                return Err(failed.error);
            }
        }
        Step::Smash(region) => hardware.smash(*region),
    }
    Ok(())
}

/// Runs a history and compares every answer and every state with the reference.
pub fn follows_the_rules<H: Hardware>(hardware: &H, steps: &[Step])
where
    for<'a> &'a H: Backend,
{
    with_engine(hardware, REGIONS as usize, 1000, |engine| {
        let mut reference = Reference::new();
        let mut kept = Kept::new();
        for step in steps {
            let returning = kept.lent.last().map(|t| t.frame().number() as usize);
            let expected = match step {
                Step::Accept(block, choice) => reference.accept(*block, *choice),
                Step::Rescind(block, choice) => reference.rescind(*block, *choice),
                Step::List(blocks, choice) => reference.list(blocks, *choice),
                Step::Walk => reference.walk(),
                Step::Near(block) => reference.near(*block),
                Step::Touch(number) => reference.touch(*number),
                Step::Lend(number, _) => reference.take(*number),
                Step::GiveBack => {
                    if let Some(number) = returning {
                        reference.states[number] = PageState::Accepted;
                    }
                    Ok(())
                }
                Step::Smash(_) => Ok(()),
            };
            assert_eq!(
                apply(engine, hardware, step, &mut kept),
                expected,
                "{step:?}"
            );
        }
        for (number, state) in (0..).zip(&reference.states) {
            assert_eq!(engine.state(frame(number)), Some(*state), "page {number}");
        }
        hardware.assert_agrees(engine);
        hardware.assert_lawful();
    });
    assert_eq!(hardware.double_validations(), 0);
}

/// Runs a history in which calls fail, once or from then on to the end of the step: the map stays
/// true.
pub fn stays_true<H: Hardware>(hardware: &H, steps: &[(Step, Option<(usize, bool)>)])
where
    for<'a> &'a H: Backend,
{
    with_engine(hardware, REGIONS as usize, 1000, |engine| {
        let mut kept = Kept::new();
        for (step, failure) in steps {
            if let Some((call, on_and_on)) = failure {
                hardware.fail_in(*call, *on_and_on);
            }
            let result = apply(engine, hardware, step, &mut kept);
            assert_ne!(result, Err(Error::HostLied), "a failure is not a lie");
            hardware.stop_failing();
            hardware.assert_agrees(engine);
        }
        hardware.assert_lawful();
    });
    assert_eq!(hardware.double_validations(), 0);
}

/// Runs a history in which the host lies about one page. The first answer that says so ends it;
/// until then nothing was granted against the laws.
pub fn a_lie_gains_nothing<H: Hardware>(hardware: &H, steps: &[Step], lie_at: usize, victim: u64)
where
    for<'a> &'a H: Backend,
{
    with_engine(hardware, REGIONS as usize, 1000, |engine| {
        let mut kept = Kept::new();
        for (number, step) in steps.iter().enumerate() {
            if number == lie_at && victim < REGIONS * 512 {
                match engine.state(frame(victim)).expect("in range") {
                    PageState::Unaccepted => hardware.resurrect(victim as usize),
                    _ => hardware.remove(victim as usize),
                }
            }
            if apply(engine, hardware, step, &mut kept) == Err(Error::HostLied) {
                assert!(number >= lie_at, "no lie was told yet");
                break;
            }
        }
        hardware.assert_lawful();
    });
    assert_eq!(hardware.double_validations(), 0);
}
