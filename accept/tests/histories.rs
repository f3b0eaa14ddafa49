//! Random histories against a reference that is one line per rule, with a host that changes page
//! sizes, fails instructions and lies.
#![cfg(not(loom))]

mod model;

use accept::{Block, Engine, Error, OnNoChange, PageState, Role};
use model::{Injected, Model, frame, large, page, with_engine};
use proptest::prelude::*;

const REGIONS: u64 = 2;

#[derive(Clone, Debug)]
enum Step {
    Accept(Block, OnNoChange),
    Rescind(Block, OnNoChange),
    Prepare(Block),
    Acquire(Block),
    /// Take the page, and give it back a few steps later.
    Lend(u64, Role),
    GiveBack,
    Smash(usize),
}

/// Pages from a few places where words, lines and regions meet, so that histories collide.
fn any_page() -> impl Strategy<Value = u64> {
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

fn any_step() -> impl Strategy<Value = Step> {
    let role = prop_oneof![Just(Role::Vmsa), Just(Role::CallingArea)];
    prop_oneof![
        6 => (any_block(), any_choice()).prop_map(|(b, c)| Step::Accept(b, c)),
        6 => (any_block(), any_choice()).prop_map(|(b, c)| Step::Rescind(b, c)),
        2 => any_block().prop_map(Step::Prepare),
        1 => any_page().prop_map(|p| Step::Acquire(page(p))),
        2 => (any_page(), role).prop_map(|(p, r)| Step::Lend(p, r)),
        2 => Just(Step::GiveBack),
        1 => (0..REGIONS as usize).prop_map(Step::Smash),
    ]
}

/// The rules, on nothing but an array of states.
struct Reference(Vec<PageState>);

impl Reference {
    fn of(&mut self, block: Block) -> Option<&mut [PageState]> {
        let first = block.first().number() as usize;
        self.0.get_mut(first..first + block.size().pages() as usize)
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
        if choice == OnNoChange::Fail && pages.iter().any(|s| *s != PageState::Accepted) {
            return Err(Error::NoChange);
        }
        pages.fill(PageState::Unaccepted);
        Ok(())
    }

    fn prepare(&mut self, block: Block) -> Result<(), Error> {
        let pages = self.of(block).ok_or(Error::OutOfRange)?;
        pages
            .iter_mut()
            .filter(|s| **s == PageState::Unaccepted)
            .for_each(|s| {
                *s = PageState::Ahead;
            });
        Ok(())
    }

    fn acquire(&mut self, block: Block) -> Result<(), Error> {
        let pages = self.of(block).ok_or(Error::OutOfRange)?;
        if pages.iter().any(|s| *s != PageState::Unaccepted) {
            return Err(Error::NoChange);
        }
        pages.fill(PageState::Owned);
        Ok(())
    }

    fn take(&mut self, number: u64) -> Result<(), Error> {
        let state = self.0.get_mut(number as usize).ok_or(Error::OutOfRange)?;
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

/// One step on the engine; debts are paid at once.
fn apply(
    engine: &Engine<'_, &Model>,
    model: &Model,
    step: &Step,
    lent: &mut Vec<accept::Taken>,
) -> Result<(), Error> {
    match step {
        Step::Accept(block, choice) => engine.accept(*block, *choice).map(|_| ())?,
        Step::Rescind(block, choice) => {
            if let Some(owed) = engine.rescind(*block, *choice)?.flush {
                engine.flush(owed).expect("flushed");
            }
        }
        Step::Prepare(block) => engine.prepare(*block).map(|_| ())?,
        Step::Acquire(block) => engine.acquire(*block).map(|_| ())?,
        Step::Lend(number, role) => lent.push(engine.take(frame(*number), *role)?),
        Step::GiveBack => {
            if let Some(taken) = lent.pop()
                && let Err(failed) = engine.give_back(taken)
            {
                lent.push(failed.taken);
                return Err(failed.error);
            }
        }
        Step::Smash(region) => model.smash(*region),
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn i1_i2_i4_i11_every_history_follows_the_rules(
        on_large: bool,
        steps in prop::collection::vec(any_step(), 1..60),
    ) {
        let model = Model::new(REGIONS as usize, on_large);
        with_engine(&model, REGIONS as usize, 1000, |engine| {
            let mut reference = Reference(vec![PageState::Unaccepted; REGIONS as usize * 512]);
            let mut lent = Vec::new();
            for step in &steps {
                let returning = lent.last().map(|t: &accept::Taken| t.frame().number() as usize);
                let expected = match step {
                    Step::Accept(block, choice) => reference.accept(*block, *choice),
                    Step::Rescind(block, choice) => reference.rescind(*block, *choice),
                    Step::Prepare(block) => reference.prepare(*block),
                    Step::Acquire(block) => reference.acquire(*block),
                    Step::Lend(number, _) => reference.take(*number),
                    Step::GiveBack => {
                        if let Some(number) = returning {
                            reference.0[number] = PageState::Accepted;
                        }
                        Ok(())
                    }
                    Step::Smash(_) => Ok(()),
                };
                assert_eq!(apply(engine, &model, step, &mut lent), expected, "{step:?}");
            }
            for (number, state) in (0..).zip(&reference.0) {
                assert_eq!(engine.state(frame(number)), Some(*state), "page {number}");
            }
            model.assert_agrees(engine);
            model.assert_lawful();
        });
        prop_assert_eq!(model.double_validations(), 0);
    }

    #[test]
    fn i9_i11_failures_anywhere_leave_the_map_true(
        on_large: bool,
        steps in prop::collection::vec((any_step(), prop::option::of((0..40usize, any::<bool>()))), 1..40),
    ) {
        let model = Model::new(REGIONS as usize, on_large);
        with_engine(&model, REGIONS as usize, 1000, |engine| {
            let mut lent = Vec::new();
            for (step, failure) in &steps {
                if let Some((call, on_and_on)) = failure {
                    model.fail_in(*call, Injected::Status, *on_and_on);
                }
                let result = apply(engine, &model, step, &mut lent);
                assert_ne!(result, Err(Error::HostLied), "a failure is not a lie");
                model.stop_failing();
                model.assert_agrees(engine);
            }
            model.assert_lawful();
        });
        prop_assert_eq!(model.double_validations(), 0);
    }

    #[test]
    fn i5_a_lying_host_gains_nothing(
        on_large: bool,
        steps in prop::collection::vec(any_step(), 1..40),
        lie_at in 0..40usize,
        victim in any_page(),
    ) {
        let model = Model::new(REGIONS as usize, on_large);
        with_engine(&model, REGIONS as usize, 1000, |engine| {
            let mut lent = Vec::new();
            for (number, step) in steps.iter().enumerate() {
                if number == lie_at && victim < REGIONS * 512 {
                    match engine.state(frame(victim)).expect("in range") {
                        PageState::Unaccepted => model.resurrect(victim as usize),
                        _ => model.remove(victim as usize),
                    }
                }
                if apply(engine, &model, step, &mut lent) == Err(Error::HostLied) {
                    assert!(number >= lie_at, "no lie was told yet");
                    // The VM stops here. Until then nothing was granted against the laws.
                    break;
                }
            }
            model.assert_lawful();
        });
    }
}
