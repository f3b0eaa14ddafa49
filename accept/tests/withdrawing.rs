//! The way out where only the host makes pages invalid.
#![cfg(not(loom))]

mod model;

use accept::{
    AdjustFault, Backend, Block, Engine, Error, Fault, NotFlushed, OnNoChange, Operation,
    PageState, Role, ValidateFault,
};
use model::{Call, INJECTED, Injected, Model, frame, large, page, with_engine};

/// The model of SEV-SNP without an instruction to make a page invalid.
struct HostRemoves<'a>(&'a Model);

impl Backend for HostRemoves<'_> {
    const HOST_REMOVES: bool = true;

    fn validate(&self, block: Block) -> Result<(), ValidateFault> {
        self.0.validate(block)
    }
    fn rescind(&self, block: Block) -> Result<(), ValidateFault> {
        panic!("nobody can make {block:?} invalid")
    }
    fn scrub(&self, block: Block) -> Result<(), Fault> {
        self.0.scrub(block)
    }
    fn grant(&self, block: Block) -> Result<(), AdjustFault> {
        self.0.grant(block)
    }
    fn revoke(&self, block: Block) -> Result<(), AdjustFault> {
        self.0.revoke(block)
    }
    fn flush(&self) -> Result<(), NotFlushed> {
        self.0.flush()
    }
}

/// A region with page 1 Ahead and page 2 Accepted.
fn with_mixed(model: &Model, test: impl FnOnce(&Engine<'_, HostRemoves<'_>>)) {
    with_engine(HostRemoves(model), 1, 0, |engine| {
        engine.prepare(page(1)).expect("prepared");
        engine.accept(page(2), OnNoChange::Fail).expect("accepted");
        model.take_log();
        test(engine);
    });
}

fn states(engine: &Engine<'_, HostRemoves<'_>>) -> [PageState; 4] {
    [0, 1, 2, 511].map(|number| engine.state(frame(number)).expect("in the map"))
}

const BEFORE: [PageState; 4] = [
    PageState::Unaccepted,
    PageState::Ahead,
    PageState::Accepted,
    PageState::Unaccepted,
];

#[test]
fn i2_i11_what_is_on_its_way_to_the_host_is_nobodys() {
    let model = Model::new(1, false);
    with_mixed(&model, |engine| {
        let withdrawn = engine.withdraw(large(0), OnNoChange::Ignore).expect("left");
        assert_eq!(withdrawn.block(), large(0));
        assert_eq!(states(engine), [PageState::Owned; 4]);
        let revoked = Call::On(Operation::Revoke, page(2).gpa(), page(2).size());
        assert_eq!(model.take_log(), [revoked]);
        for number in [0, 1, 2, 511] {
            let choice = OnNoChange::Ignore;
            assert_eq!(engine.accept(page(number), choice), Err(Error::Owned));
            assert_eq!(
                engine.withdraw(page(number), choice).map(drop),
                Err(Error::Owned)
            );
            let taken = engine.take(frame(number), Role::CallingArea);
            assert_eq!(taken.map(drop), Err(Error::Owned));
        }
        let prepared = engine.prepare(large(0)).expect("nothing to do");
        assert_eq!(prepared.changed_pages, 0);
        assert_eq!(model.take_log(), []);

        let owed = withdrawn.flush().expect("the guest had a page");
        engine.flush(owed).expect("flushed");
        model.host_takes(0..512);
        assert_eq!(engine.settle(withdrawn), None);
        assert_eq!(states(engine), [PageState::Unaccepted; 4]);
        assert_eq!(engine.counters().rescinded_2m, 1);
        assert_eq!(engine.counters().rescinded_bytes, 4096);
        engine.accept(large(0), OnNoChange::Fail).expect("as new");
        model.assert_agrees(engine);
    });
    model.assert_lawful();
    assert_eq!(model.double_validations(), 0);
}

#[test]
fn what_the_host_was_not_asked_for_is_what_it_was() {
    let model = Model::new(1, false);
    with_mixed(&model, |engine| {
        let withdrawn = engine.withdraw(large(0), OnNoChange::Ignore).expect("left");
        assert_eq!(engine.reinstate(withdrawn), None);
        assert_eq!(states(engine), BEFORE);
        model.guest_writes(2);
        model.assert_agrees(engine);
        assert_eq!(engine.counters().rescinded_2m, 0);
    });
    model.assert_lawful();
}

#[test]
fn i9_a_withdrawal_that_fails_has_not_happened() {
    let model = Model::new(1, false);
    with_mixed(&model, |engine| {
        model.fail_in(0, Injected::Status, false);
        let error = Error::Backend {
            operation: Operation::Revoke,
            status: INJECTED,
        };
        let failed = engine.withdraw(large(0), OnNoChange::Ignore);
        assert_eq!(failed, Err(error));
        assert_eq!(states(engine), BEFORE);
        let refused = engine.withdraw(large(0), OnNoChange::Fail);
        assert_eq!(refused, Err(Error::NoChange));
        assert_eq!(states(engine), BEFORE);
        // The host has taken the page by itself, and another lies there.
        model.remove(2);
        let lie = engine.withdraw(page(2), OnNoChange::Fail);
        assert_eq!(lie, Err(Error::HostLied));
        model.assert_agrees(engine);
    });
    model.assert_lawful();
}

#[test]
fn i12_who_cannot_have_the_lock_keeps_the_block() {
    let model = Model::new(1, false);
    with_mixed(&model, |engine| {
        engine.accept(page(3), OnNoChange::Fail).expect("accepted");
        let mut withdrawn = engine.withdraw(page(2), OnNoChange::Fail).expect("left");
        // While a page of the region is being copied from, the lock is held.
        withdrawn = engine
            .while_accepted(frame(3), || engine.settle(withdrawn))
            .expect("accepted")
            .expect("the lock is held");
        assert_eq!(engine.state(frame(2)), Some(PageState::Owned));
        withdrawn = engine
            .while_accepted(frame(3), || engine.reinstate(withdrawn))
            .expect("accepted")
            .expect("the lock is held");
        model.host_takes(2..3);
        assert_eq!(engine.settle(withdrawn), None);
        assert_eq!(engine.state(frame(2)), Some(PageState::Unaccepted));
        model.assert_agrees(engine);
    });
}

#[test]
fn i3_a_flush_is_owed_for_what_the_guest_had() {
    let model = Model::new(1, false);
    with_mixed(&model, |engine| {
        for (number, owed) in [(0, false), (1, false), (2, true)] {
            let withdrawn = engine
                .withdraw(page(number), OnNoChange::Ignore)
                .expect("left");
            assert_eq!(withdrawn.flush().is_some(), owed, "page {number}");
            assert_eq!(engine.reinstate(withdrawn), None);
        }
    });
}
