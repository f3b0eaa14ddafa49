//! What remains after a failure: at every call of the backend, once and from then on, with a
//! strange status and with a host that takes pages away.
#![cfg(not(loom))]

mod model;

use accept::{Engine, Error, OnNoChange, Operation, PageState, Role};
use model::{Call, INJECTED, Injected, Model, frame, large, page, with_engine};

/// No flow makes so many calls: three instructions and a flush at most for each page.
const MOST_CALLS: usize = 4 * 512;

/// Runs `flow` on a prepared engine with the failure at call 0, 1, 2, … until it no longer fails,
/// and gives every outcome to `judge`. Returns how often it failed.
fn at_every_call<T>(
    on_large: bool,
    how: Injected,
    on_and_on: bool,
    prepare: impl Fn(&Engine<'_, &Model>, &Model),
    flow: impl Fn(&Engine<'_, &Model>) -> Result<T, Error>,
    judge: impl Fn(&Engine<'_, &Model>, &Model, Error),
) -> usize {
    for failing_call in 0..=MOST_CALLS {
        let model = Model::new(1, on_large);
        let mut finished = false;
        with_engine(&model, 1, 1000, |engine| {
            prepare(engine, &model);
            model.fail_in(failing_call, how, on_and_on);
            let result = flow(engine);
            finished = model.failure_pending() && !on_and_on || result.is_ok();
            model.stop_failing();
            if let Err(error) = result {
                judge(engine, &model, error);
            }
            model.assert_lawful();
        });
        if finished {
            return failing_call;
        }
    }
    panic!("the flow fails without a failure")
}

fn nothing(_: &Engine<'_, &Model>, _: &Model) {}

fn all_accepted(engine: &Engine<'_, &Model>, model: &Model) {
    engine.accept(large(0), OnNoChange::Fail).expect("accepted");
    model.guest_writes(0);
}

#[test]
fn i9_i11_a_failure_at_any_call_leaves_the_map_true() {
    model::every_call::the_map_stays_true(|on_large| Model::new(1, on_large));
}

#[test]
fn i9_a_failed_accept_is_fully_undone() {
    for (on_large, calls) in [(true, 3), (false, 1 + 512 + 1 + 512)] {
        let failures = at_every_call(
            on_large,
            Injected::Status,
            false,
            nothing,
            |engine| engine.accept(large(0), OnNoChange::Fail),
            |engine, model, error| {
                assert!(matches!(error, Error::Backend { .. }), "{error:?}");
                model.assert_agrees(engine);
                for number in 0..512 {
                    assert_eq!(engine.state(frame(number)), Some(PageState::Unaccepted));
                    assert!(
                        !model.entry(number as usize).stale,
                        "flushed before the answer"
                    );
                }
                assert_eq!(engine.counters().failures, 1);
                engine
                    .accept(large(0), OnNoChange::Fail)
                    .expect("a second try works");
                model.assert_agrees(engine);
            },
        );
        assert_eq!(failures, calls, "every call was made to fail");
    }
}

#[test]
fn i9_a_failed_accept_names_the_step_and_the_status() {
    for (call, operation, status) in [
        (0, Operation::Validate, INJECTED),
        (1, Operation::Scrub, 1),
        (2, Operation::Grant, INJECTED),
    ] {
        let model = Model::new(1, true);
        with_engine(&model, 1, 1000, |engine| {
            model.fail_in(call, Injected::Status, false);
            assert_eq!(
                engine.accept(page(0), OnNoChange::Fail),
                Err(Error::Backend { operation, status })
            );
        });
    }
}

#[test]
fn i9_a_mixed_block_keeps_what_it_had() {
    let prepare = |engine: &Engine<'_, &Model>, model: &Model| {
        engine.accept(page(3), OnNoChange::Fail).expect("accepted");
        model.guest_writes(3);
        engine.prepare(page(4)).expect("prepared");
    };
    let failures = at_every_call(
        false,
        Injected::Status,
        false,
        prepare,
        |engine| engine.accept(large(0), OnNoChange::Ignore),
        |engine, model, _| {
            model.assert_agrees(engine);
            assert_eq!(
                engine.state(frame(3)),
                Some(PageState::Accepted),
                "not ours to undo"
            );
            // Granted and taken back, it may hold the guest's data, so it starts from the beginning.
            let ahead = engine.state(frame(4)).expect("in range");
            assert!(
                matches!(ahead, PageState::Ahead | PageState::Unaccepted),
                "{ahead:?}"
            );
            assert_eq!(engine.state(frame(5)), Some(PageState::Unaccepted));
        },
    );
    assert_eq!(failures, 510 + 510 + 511);
}

#[test]
fn i9_when_the_undo_fails_too_the_map_tells_the_truth() {
    for on_large in [true, false] {
        let failures = at_every_call(
            on_large,
            Injected::Status,
            true,
            nothing,
            |engine| engine.accept(large(0), OnNoChange::Fail),
            |engine, model, _| model.assert_agrees(engine),
        );
        assert!(failures >= 3);
    }
}

#[test]
fn i9_a_failed_revoke_restores_the_guest_s_access() {
    // A large page: revoke and invalidate. Small ones: a large try, then 512 of each.
    for (on_large, calls) in [(true, 2), (false, 1 + 512 + 512)] {
        let failures = at_every_call(
            on_large,
            Injected::Status,
            false,
            all_accepted,
            |engine| engine.rescind(large(0), OnNoChange::Fail),
            |engine, model, error| {
                model.assert_agrees(engine);
                let Error::Backend {
                    operation,
                    status: INJECTED,
                } = error
                else {
                    panic!("{error:?}")
                };
                if operation == Operation::Revoke {
                    // Nothing has left: nobody's translation is wrong.
                    assert!(!model.take_log().contains(&Call::Flush));
                    for number in 0..512 {
                        assert_eq!(engine.state(frame(number)), Some(PageState::Accepted));
                    }
                }
                assert!(!model.entry(0).stale || model.entry(0).granted);
            },
        );
        assert_eq!(failures, calls, "every call was made to fail");
    }
}

#[test]
fn i9_a_rescind_that_fails_half_way_is_recorded_as_it_is() {
    let model = Model::new(1, false);
    with_engine(&model, 1, 1000, |engine| {
        all_accepted(engine, &model);
        // One large try and 512 revokes, then the eleventh invalidation fails.
        model.fail_in(1 + 512 + 10, Injected::Status, false);
        assert_eq!(
            engine.rescind(large(0), OnNoChange::Fail),
            Err(Error::Backend {
                operation: Operation::Rescind,
                status: INJECTED
            })
        );
        for number in 0..512 {
            let expected = if number < 10 {
                PageState::Unaccepted
            } else {
                PageState::Accepted
            };
            assert_eq!(engine.state(frame(number)), Some(expected), "page {number}");
            assert!(
                !model.entry(number as usize).stale,
                "flushed although nobody was to pay"
            );
        }
        model.assert_agrees(engine);
        let done = engine
            .rescind(large(0), OnNoChange::Ignore)
            .expect("the rest goes");
        assert_eq!(done.changed_pages, 502);
        engine.flush(done.flush.expect("owed")).expect("flushed");
        model.assert_agrees(engine);
    });
}

#[test]
fn i9_a_rescind_that_fails_for_good_tells_the_truth() {
    for on_large in [true, false] {
        at_every_call(
            on_large,
            Injected::Status,
            true,
            all_accepted,
            |engine| engine.rescind(large(0), OnNoChange::Fail),
            |engine, model, _| model.assert_agrees(engine),
        );
    }
}

#[test]
fn i5_a_page_that_is_valid_already_is_not_granted() {
    for number in [0, 300, 511] {
        let model = Model::new(1, false);
        with_engine(&model, 1, 1000, |engine| {
            model.resurrect(number);
            assert_eq!(
                engine.accept(large(0), OnNoChange::Fail),
                Err(Error::HostLied)
            );
            assert_eq!(engine.counters().host_lies, 1);
            let entry = model.entry(number);
            assert!(
                !entry.validated && !entry.granted && !entry.stale,
                "put out: {entry:?}"
            );
            model.assert_agrees(engine);
            for number in 0..512 {
                assert_eq!(engine.state(frame(number)), Some(PageState::Unaccepted));
            }
            model.assert_lawful();
        });
    }
}

/// Such a page may be put out only if the hardware says so: a failure is no proof of that.
#[test]
fn i5_a_page_that_is_valid_already_and_cannot_be_put_out_is_nobodys() {
    for (last_call, owned) in [(2, true), (3, false)] {
        let model = Model::new(1, false);
        with_engine(&model, 1, 1000, |engine| {
            model.resurrect(8);
            // Validate, revoke, rescind.
            model.fail_in(last_call, Injected::Status, false);
            let answer = engine.accept(page(8), OnNoChange::Fail);
            assert_eq!(answer, Err(Error::HostLied));
            let state = if owned {
                PageState::Owned
            } else {
                PageState::Unaccepted
            };
            assert_eq!(engine.state(frame(8)), Some(state));
            model.stop_failing();
            model.assert_agrees(engine);
        });
    }
}

/// The host takes the page back while it is being put out: it is as invalid as it should be.
#[test]
fn i5_a_page_that_vanishes_while_it_is_put_out_is_out() {
    let model = Model::new(1, false);
    with_engine(&model, 1, 1000, |engine| {
        model.resurrect(8);
        model.fail_in(2, Injected::PageGone, false);
        let answer = engine.accept(page(8), OnNoChange::Fail);
        assert_eq!(answer, Err(Error::HostLied));
        assert_eq!(engine.state(frame(8)), Some(PageState::Unaccepted));
        model.assert_agrees(engine);
    });
}

#[test]
fn i5_to_ignore_no_change_is_not_to_ignore_a_lie() {
    let model = Model::new(1, true);
    with_engine(&model, 1, 1000, |engine| {
        model.resurrect(8);
        assert_eq!(
            engine.accept(page(8), OnNoChange::Ignore),
            Err(Error::HostLied)
        );
        assert!(!model.entry(8).granted);
    });
}

#[test]
fn i5_a_page_the_host_removed_is_found_out_by_the_rescind() {
    for on_no_change in [OnNoChange::Fail, OnNoChange::Ignore] {
        let model = Model::new(1, true);
        with_engine(&model, 1, 1000, |engine| {
            all_accepted(engine, &model);
            model.remove(77);
            assert_eq!(engine.rescind(large(0), on_no_change), Err(Error::HostLied));
            assert_eq!(engine.state(frame(77)), Some(PageState::Unaccepted));
            assert_eq!(engine.state(frame(78)), Some(PageState::Accepted));
            model.assert_agrees(engine);
            assert_eq!(engine.counters().host_lies, 1);
        });
    }
}

#[test]
fn i5_pages_that_vanish_in_the_middle_of_a_flow_are_lies() {
    for on_large in [true, false] {
        // A page that vanishes before it is validated is just an unvalidated page; one that was
        // made ready is missed when it is claimed.
        let accept = at_every_call(
            on_large,
            Injected::PageGone,
            false,
            |engine, _| {
                engine.prepare(page(0)).expect("prepared");
            },
            |engine| engine.accept(page(0), OnNoChange::Fail),
            |engine, model, error| {
                assert_eq!(error, Error::HostLied);
                assert!(!model.entry(0).granted);
                // Nobody has given it back, so no other may be validated in its place (I2).
                assert_eq!(engine.state(frame(0)), Some(PageState::Ahead));
                model.take_log();
                let again = engine.accept(page(0), OnNoChange::Fail);
                assert_eq!(again, Err(Error::HostLied));
                let validate = Call::On(Operation::Validate, 0, page(0).size());
                assert!(!model.take_log().contains(&validate));
            },
        );
        assert_eq!(accept, 1, "the grant of a claim");
        let rescind = at_every_call(
            on_large,
            Injected::PageGone,
            false,
            all_accepted,
            |engine| engine.rescind(page(0), OnNoChange::Fail),
            |engine, model, error| {
                assert_eq!(error, Error::HostLied);
                model.assert_agrees(engine);
                let flushed = model.take_log().contains(&Call::Flush);
                assert!(flushed, "the page that vanished may still be reached");
            },
        );
        assert_eq!(rescind, 2, "the revoke and the invalidation");
    }
}

#[test]
fn i9_a_page_that_cannot_be_taken_stays_the_guest_s() {
    let model = Model::new(1, true);
    with_engine(&model, 1, 1000, |engine| {
        all_accepted(engine, &model);
        model.fail_in(0, Injected::Status, false);
        let error = Error::Backend {
            operation: Operation::Revoke,
            status: INJECTED,
        };
        assert_eq!(engine.take(frame(9), Role::Vmsa), Err(error));
        assert_eq!(engine.state(frame(9)), Some(PageState::Accepted));
        model.assert_agrees(engine);

        model.remove(9);
        assert_eq!(engine.take(frame(9), Role::Vmsa), Err(Error::HostLied));
        // The page that was validated may come back: nobody may validate another one here.
        assert_eq!(engine.state(frame(9)), Some(PageState::Accepted));
        let again = engine.accept(page(9), OnNoChange::Fail);
        assert_eq!(again, Err(Error::NoChange));
        assert!(!model.entry(9).validated, "I2: not without a rescind");
    });
}

#[test]
fn i3_a_page_that_somebody_may_still_write_to_is_not_taken_as_a_vmsa() {
    // The attack: another vCPU keeps running with a translation from before the revoke, waits
    // until the page is found good, and then writes another privilege level into it.
    let model = Model::new(1, true);
    with_engine(&model, 1, 1000, |engine| {
        all_accepted(engine, &model);
        model.fail_flush();
        assert_eq!(engine.take(frame(9), Role::Vmsa), Err(Error::Busy));
        assert_eq!(engine.state(frame(9)), Some(PageState::Accepted));
        assert!(model.entry(9).granted, "the guest has it as before");
        let taken = engine.take(frame(9), Role::Vmsa).expect("taken");
        assert!(!model.entry(9).stale);
        engine.give_back(taken).expect("returned");
    });
}

#[test]
fn i3_a_flush_that_is_not_certain_is_still_owed() {
    let model = Model::new(1, true);
    with_engine(&model, 1, 1000, |engine| {
        all_accepted(engine, &model);
        let done = engine.rescind(page(3), OnNoChange::Fail).expect("done");
        model.fail_flush();
        let owed = engine.flush(done.flush.expect("owed"));
        let owed = owed.expect_err("still owed");
        assert!(model.entry(3).stale);
        engine.flush(owed).expect("flushed");
        model.assert_agrees(engine);
    });
}

/// What a failed flow has put out is out by the map, but it could not be certain that nobody reaches
/// it any more. A guest that asks again is told that nothing has changed, and shares the page.
#[test]
fn i3_i12_a_flush_that_a_failed_flow_owed_is_owed_by_who_gives_the_page_back() {
    let model = Model::new(1, false);
    with_engine(&model, 1, 1000, |engine| {
        all_accepted(engine, &model);
        let before = engine.rescind(page(511), OnNoChange::Fail).expect("done");
        engine.flush(before.flush.expect("owed")).expect("flushed");
        let nothing = engine.rescind(page(511), OnNoChange::Ignore).expect("done");
        assert_eq!(nothing.flush, None, "nothing has failed so far");
        engine.accept(page(511), OnNoChange::Fail).expect("as new");

        // One large try and 512 revokes, then the eleventh invalidation fails.
        model.fail_in(1 + 512 + 10, Injected::Status, false);
        model.fail_flush();
        let failed = engine.rescind(large(0), OnNoChange::Fail);
        assert!(matches!(failed, Err(Error::Backend { .. })), "{failed:?}");
        assert_eq!(engine.state(frame(3)), Some(PageState::Unaccepted));
        assert!(model.entry(3).stale, "somebody may still write to it");

        let again = engine.rescind(page(3), OnNoChange::Ignore).expect("out");
        assert_eq!(again.changed_pages, 0);
        engine.flush(again.flush.expect("owed")).expect("flushed");
        assert!(!model.entry(3).stale);
        model.assert_agrees(engine);
    });
}

#[test]
fn i9_a_page_that_cannot_be_given_back_stays_owned_and_can_be_tried_again() {
    let model = Model::new(1, true);
    with_engine(&model, 1, 1000, |engine| {
        all_accepted(engine, &model);
        let vmsa = engine.take(frame(9), Role::Vmsa).expect("taken");
        model.fail_in(0, Injected::Status, false);
        let failed = engine.give_back(vmsa).expect_err("injected");
        assert_eq!(
            failed.error,
            Error::Backend {
                operation: Operation::Grant,
                status: INJECTED
            }
        );
        assert_eq!(engine.state(frame(9)), Some(PageState::Owned));
        engine.give_back(failed.taken).expect("returned");
        model.assert_agrees(engine);
    });
}
