//! The laws of the flows, one at a time: order of the instructions, sizes, states, answers.
#![cfg(not(loom))]

mod model;

use accept::{Done, Error, OnNoChange, Operation, PageSize, PageState, Rescinded, Role};
use model::{Call, Content, Model, frame, large, page, with_engine};

const SMALL: PageSize = PageSize::Size4K;
const LARGE: PageSize = PageSize::Size2M;

fn rescinded(done: Result<Rescinded, Error>, engine: &accept::Engine<'_, &Model>) {
    let owed = done.expect("rescinded").flush.expect("a flush is owed");
    engine.flush(owed).expect("flushed");
}

#[test]
fn i3_accepting_validates_then_scrubs_then_grants() {
    let model = Model::new(2, true);
    with_engine(&model, 2, 1000, |engine| {
        let done = engine.accept(large(1), OnNoChange::Fail).expect("accepted");
        assert_eq!((done.scrubbed_bytes(), done.changed_pages), (2 << 20, 512));
        assert_eq!(
            model.take_log(),
            [Operation::Validate, Operation::Scrub, Operation::Grant]
                .map(|operation| Call::On(operation, 0x20_0000, LARGE))
        );
        assert_eq!(engine.state(frame(512)), Some(PageState::Accepted));
        assert_eq!(engine.state(frame(511)), Some(PageState::Unaccepted));
        model.assert_agrees(engine);
        model.assert_lawful();
    });
}

#[test]
fn i3_rescinding_revokes_then_invalidates_and_owes_a_flush() {
    let model = Model::new(1, true);
    with_engine(&model, 1, 1000, |engine| {
        engine.accept(large(0), OnNoChange::Fail).expect("accepted");
        model.take_log();
        let done = engine.rescind(large(0), OnNoChange::Fail);
        assert_eq!(
            model.take_log(),
            [Operation::Revoke, Operation::Rescind].map(|op| Call::On(op, 0, LARGE))
        );
        assert!(model.entry(7).stale, "nobody has flushed yet");
        rescinded(done, engine);
        assert_eq!(model.take_log(), [Call::Flush]);
        assert!(!model.entry(7).stale);
        model.assert_agrees(engine);
        model.assert_lawful();
    });
}

#[test]
fn a_size_mismatch_is_split_inside_the_engine() {
    let model = Model::new(1, false);
    with_engine(&model, 1, 1000, |engine| {
        engine
            .accept(large(0), OnNoChange::Fail)
            .expect("the guest never hears of it");
        let log = model.take_log();
        let count = |operation, size| {
            log.iter()
                .filter(|c| matches!(c, Call::On(o, _, s) if (*o, *s) == (operation, size)))
                .count()
        };
        assert_eq!(
            (
                count(Operation::Validate, LARGE),
                count(Operation::Validate, SMALL)
            ),
            (1, 512)
        );
        assert_eq!(
            (
                count(Operation::Scrub, LARGE),
                count(Operation::Scrub, SMALL)
            ),
            (1, 0)
        );
        assert_eq!(
            (
                count(Operation::Grant, LARGE),
                count(Operation::Grant, SMALL)
            ),
            (0, 512)
        );
        assert_eq!(engine.counters().splits, 1);
        rescinded(engine.rescind(large(0), OnNoChange::Fail), engine);
        model.assert_agrees(engine);
        model.assert_lawful();
    });
}

#[test]
fn a_large_page_that_is_smashed_in_between_is_still_granted_and_rescinded() {
    let model = Model::new(1, true);
    with_engine(&model, 1, 1000, |engine| {
        engine.accept(large(0), OnNoChange::Fail).expect("accepted");
        model.smash(0);
        rescinded(engine.rescind(large(0), OnNoChange::Fail), engine);
        engine.accept(page(9), OnNoChange::Fail).expect("accepted");
        model.assert_agrees(engine);
        model.assert_lawful();
    });
}

#[test]
fn i2_a_second_accept_executes_nothing() {
    for on_large in [false, true] {
        let model = Model::new(1, on_large);
        with_engine(&model, 1, 1000, |engine| {
            engine.accept(large(0), OnNoChange::Fail).expect("accepted");
            model.guest_writes(3);
            model.take_log();
            for block in [large(0), page(3)] {
                assert_eq!(engine.accept(block, OnNoChange::Fail), Err(Error::NoChange));
                let done = engine.accept(block, OnNoChange::Ignore).expect("ignored");
                assert_eq!((done.changed_pages, done.scrubbed_bytes()), (0, 0));
            }
            assert_eq!(model.take_log(), []);
            assert_eq!(model.entry(3).content, Content::Guest, "contents are kept");
        });
    }
}

/// Nothing is written: all that the engine ever writes beside states and locks are its counters.
#[test]
fn what_is_accepted_is_told_without_a_lock_and_without_a_write() {
    let model = Model::new(1, true);
    with_engine(&model, 1, 0, |engine| {
        engine.accept(large(0), OnNoChange::Fail).expect("accepted");
        let written = engine.counters();
        // Somebody has the lock, and nobody has patience.
        let told = engine.while_accepted(frame(9), || {
            [
                engine.accept(large(0), OnNoChange::Fail),
                engine.accept(page(3), OnNoChange::Fail),
                engine.accept(page(3), OnNoChange::Ignore),
            ]
        });
        let nothing = Done {
            scrubbed_pages: 0,
            changed_pages: 0,
        };
        let no_change = Err(Error::NoChange);
        assert_eq!(told, Ok([no_change, no_change, Ok(nothing)]));
        assert_eq!(engine.counters(), written);
        // One page decides nothing about the other 511.
        let told = engine.while_accepted(frame(9), || engine.accept(large(0), OnNoChange::Ignore));
        assert_eq!(told, Ok(Err(Error::Busy)));
    });
}

#[test]
fn i2_a_page_is_validated_again_only_after_a_rescind() {
    let model = Model::new(1, true);
    with_engine(&model, 1, 1000, |engine| {
        for _ in 0..3 {
            engine.accept(page(5), OnNoChange::Fail).expect("accepted");
            model.guest_writes(5);
            rescinded(engine.rescind(page(5), OnNoChange::Fail), engine);
        }
        model.assert_lawful();
        assert_eq!(model.double_validations(), 0);
    });
}

#[test]
fn a_mixed_block_is_refused_or_completed_as_asked() {
    let model = Model::new(1, true);
    with_engine(&model, 1, 1000, |engine| {
        engine
            .accept(page(100), OnNoChange::Fail)
            .expect("accepted");
        model.guest_writes(100);
        model.take_log();
        assert_eq!(
            engine.accept(large(0), OnNoChange::Fail),
            Err(Error::NoChange)
        );
        assert_eq!(
            engine.rescind(large(0), OnNoChange::Fail),
            Err(Error::NoChange)
        );
        assert_eq!(model.take_log(), []);

        let done = engine
            .accept(large(0), OnNoChange::Ignore)
            .expect("completed");
        assert_eq!(
            (done.changed_pages, done.scrubbed_bytes()),
            (511, 511 << 12)
        );
        assert_eq!(
            model.entry(100).content,
            Content::Guest,
            "contents are kept"
        );
        model.assert_agrees(engine);

        rescinded(engine.rescind(page(7), OnNoChange::Fail), engine);
        let done = engine.rescind(large(0), OnNoChange::Ignore);
        assert_eq!(done.as_ref().map(|done| done.changed_pages), Ok(511));
        rescinded(done, engine);
        let nothing = engine
            .rescind(large(0), OnNoChange::Ignore)
            .expect("nothing to do");
        assert!(
            nothing.flush.is_none(),
            "nothing changed, so no flush is owed"
        );
        model.assert_agrees(engine);
        model.assert_lawful();
    });
}

#[test]
fn claiming_a_page_ahead_validates_nothing() {
    let model = Model::new(2, true);
    with_engine(&model, 2, 1000, |engine| {
        let done = engine.prepare(large(0)).expect("prepared");
        assert_eq!(done.scrubbed_bytes(), 2 << 20);
        assert_eq!(engine.state(frame(1)), Some(PageState::Ahead));
        model.assert_agrees(engine);
        model.take_log();
        let done = engine
            .accept(large(0), OnNoChange::Fail)
            .expect("new to the guest");
        assert_eq!((done.scrubbed_bytes(), done.changed_pages), (0, 512));
        assert_eq!(model.take_log(), [Call::On(Operation::Grant, 0, LARGE)]);
        assert_eq!(engine.counters().claimed_bytes, 2 << 20);

        // Half ahead, half not: both become the guest's, each in its own way.
        engine.prepare(page(512 + 3)).expect("prepared");
        let done = engine.accept(large(1), OnNoChange::Fail).expect("accepted");
        assert_eq!(
            (done.scrubbed_bytes(), done.changed_pages),
            (511 << 12, 512)
        );
        model.assert_agrees(engine);
        model.assert_lawful();
        assert_eq!(
            engine.prepare(large(1)).map(|done| done.changed_pages),
            Ok(0)
        );
    });
}

#[test]
fn rescinding_a_page_ahead_is_no_change_to_the_guest_but_done_on_ignore() {
    let model = Model::new(1, true);
    with_engine(&model, 1, 1000, |engine| {
        engine.prepare(page(4)).expect("prepared");
        assert_eq!(
            engine.rescind(page(4), OnNoChange::Fail),
            Err(Error::NoChange)
        );
        model.assert_agrees(engine);
        // The guest is about to share the address: nothing valid may stay behind it.
        rescinded(engine.rescind(page(4), OnNoChange::Ignore), engine);
        assert!(!model.entry(4).validated);
        model.assert_agrees(engine);
        model.assert_lawful();
    });
}

#[test]
fn i4_no_request_touches_an_owned_page() {
    let model = Model::new(2, true);
    with_engine(&model, 2, 1000, |engine| {
        for number in [20, 21] {
            engine
                .accept(page(number), OnNoChange::Fail)
                .expect("accepted");
        }
        let _vmsa = engine.take(frame(20), Role::Vmsa).expect("lent");
        let area = engine.take(frame(21), Role::CallingArea).expect("lent");
        model.take_log();
        for block in [page(20), page(21), large(0)] {
            for on_no_change in [OnNoChange::Fail, OnNoChange::Ignore] {
                assert_eq!(engine.accept(block, on_no_change), Err(Error::Owned));
                assert_eq!(engine.rescind(block, on_no_change), Err(Error::Owned));
            }
            assert_eq!(engine.is_owned(block), Ok(true));
        }
        for block in [page(19), page(22), large(1)] {
            assert_eq!(engine.is_owned(block), Ok(false));
        }
        assert_eq!(engine.is_owned(large(2)), Err(Error::OutOfRange));
        for number in [20, 21] {
            assert_eq!(engine.take(frame(number), Role::Vmsa), Err(Error::Owned));
        }
        // Also beside accepted pages, from either half of the region.
        engine
            .accept(page(400), OnNoChange::Fail)
            .expect("accepted");
        engine.accept(page(19), OnNoChange::Fail).expect("accepted");
        model.take_log();
        assert_eq!(engine.accept(large(0), OnNoChange::Fail), Err(Error::Owned));
        assert_eq!(model.take_log(), []);
        engine.give_back(area).expect("returned");
        assert_eq!(engine.state(frame(21)), Some(PageState::Accepted));
        model.assert_agrees(engine);
        model.assert_lawful();
    });
}

#[test]
fn i3_a_vmsa_is_revoked_and_flushed_before_anyone_looks() {
    let model = Model::new(1, true);
    with_engine(&model, 1, 1000, |engine| {
        engine.accept(large(0), OnNoChange::Fail).expect("accepted");
        model.guest_writes(6);
        model.take_log();
        let vmsa = engine.take(frame(6), Role::Vmsa).expect("taken");
        assert_eq!(
            model.take_log(),
            [Call::On(Operation::Revoke, 0x6000, SMALL), Call::Flush],
            "one small page, and the flush is not left to the caller"
        );
        let entry = model.entry(6);
        assert!(entry.validated && !entry.granted && !entry.stale);
        assert_eq!(entry.content, Content::Guest);
        assert_eq!((vmsa.frame(), vmsa.role()), (frame(6), Role::Vmsa));

        engine.give_back(vmsa).expect("returned");
        assert!(model.entry(6).granted);
        assert_eq!(
            model.entry(6).content,
            Content::Guest,
            "as the guest wrote it"
        );
        model.assert_agrees(engine);
        model.assert_lawful();
    });
}

#[test]
fn only_an_accepted_page_can_be_lent() {
    let model = Model::new(1, true);
    with_engine(&model, 1, 1000, |engine| {
        engine.prepare(page(1)).expect("prepared");
        for number in [0, 1] {
            assert_eq!(
                engine.take(frame(number), Role::Vmsa),
                Err(Error::NotAccepted)
            );
            assert_eq!(
                engine.adopt(frame(number), Role::Vmsa),
                Err(Error::NotAccepted)
            );
        }
        assert_eq!(engine.take(frame(512), Role::Vmsa), Err(Error::OutOfRange));
        assert_eq!(engine.adopt(frame(512), Role::Vmsa), Err(Error::OutOfRange));
    });
}

#[test]
fn i4_the_paravisor_touches_only_accepted_pages_for_the_guest() {
    let model = Model::new(1, true);
    with_engine(&model, 1, 10, |engine| {
        engine.prepare(page(1)).expect("prepared");
        for number in [0, 2] {
            engine
                .accept(page(number), OnNoChange::Fail)
                .expect("accepted");
        }
        let _area = engine.take(frame(2), Role::CallingArea).expect("lent");
        for (number, expected) in [
            (0, Ok(Err(Error::Busy))),
            (1, Err(Error::NotAccepted)),
            (2, Err(Error::Owned)),
            (3, Err(Error::NotAccepted)),
            (512, Err(Error::OutOfRange)),
        ] {
            // Meanwhile nobody can lend or rescind the page: the lock is held.
            let access = || engine.take(frame(0), Role::Vmsa).map(drop);
            assert_eq!(engine.while_accepted(frame(number), access), expected);
        }
        engine
            .take(frame(0), Role::Vmsa)
            .map(drop)
            .expect("free again");
    });
}

#[test]
fn launch_pages_are_recorded_without_an_instruction() {
    let model = Model::new(3, true);
    with_engine(&model, 3, 1000, |engine| {
        engine
            .record_launch(frame(510), 600, PageState::Accepted)
            .expect("recorded");
        engine
            .record_launch(frame(600), 1, PageState::Owned)
            .expect("recorded");
        assert_eq!(model.take_log(), []);
        for (number, state) in [
            (509, PageState::Unaccepted),
            (510, PageState::Accepted),
            (599, PageState::Accepted),
            (600, PageState::Owned),
            (1109, PageState::Accepted),
            (1110, PageState::Unaccepted),
        ] {
            assert_eq!(engine.state(frame(number)), Some(state), "page {number}");
        }
        assert_eq!(
            engine.accept(page(510), OnNoChange::Fail),
            Err(Error::NoChange)
        );
        let area = engine.adopt(frame(600), Role::CallingArea).expect("ours");
        engine.give_back(area).expect("returned");
        assert_eq!(engine.state(frame(600)), Some(PageState::Accepted));
        assert_eq!(
            engine.record_launch(frame(1535), 2, PageState::Owned),
            Err(Error::OutOfRange)
        );
        assert_eq!(engine.state(frame(1535)), Some(PageState::Unaccepted));
    });
}

#[test]
fn memory_without_a_state_is_out_of_range() {
    let model = Model::new(1, true);
    with_engine(&model, 1, 1000, |engine| {
        for block in [
            page(512),
            large(1),
            page((1 << 52) - 1),
            large((1 << 43) - 1),
        ] {
            assert_eq!(
                engine.accept(block, OnNoChange::Fail),
                Err(Error::OutOfRange)
            );
            assert_eq!(
                engine.rescind(block, OnNoChange::Ignore),
                Err(Error::OutOfRange)
            );
            assert_eq!(engine.prepare(block), Err(Error::OutOfRange));
            assert_eq!(engine.state(block.first()), None);
        }
        assert_eq!(model.take_log(), []);
    });
}

#[test]
fn counters_tell_sizes_and_bytes() {
    let model = Model::new(3, true);
    with_engine(&model, 3, 1000, |engine| {
        engine.accept(large(0), OnNoChange::Fail).expect("accepted");
        engine
            .accept(page(512), OnNoChange::Fail)
            .expect("accepted");
        engine
            .accept(page(1024), OnNoChange::Fail)
            .expect("accepted");
        rescinded(engine.rescind(page(512), OnNoChange::Fail), engine);
        rescinded(engine.rescind(large(0), OnNoChange::Fail), engine);
        let counters = engine.counters();
        assert_eq!((counters.accepted_2m, counters.accepted_4k), (1, 2));
        assert_eq!((counters.rescinded_2m, counters.rescinded_4k), (1, 1));
        assert_eq!(counters.accepted_bytes(), (2 << 20) + 8192);
        assert_eq!(counters.rescinded_bytes, (2 << 20) + 4096);
        assert_eq!(
            (counters.host_lies, counters.failures, counters.busy),
            (0, 0, 0)
        );
    });
}
