//! Acceptance ahead of the guest: what is taken, in which order, and what is kept off.
#![cfg(not(loom))]

mod model;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use accept::{
    Backend, Block, Done, Engine, Error, Frame, GivenBack, Map, OnNoChange, Operation, Order,
    PageSize, PageState, Range, Region, RegionLock, RegionLocks, Step, Walk,
};
use model::{Call, INJECTED, Injected, Model, frame, large, page};

const REGIONS: u64 = 4;
const STEP: u64 = PageSize::Size2M.bytes();

/// Runs `test` with an engine over [`REGIONS`] regions from address 0 that remembers what is given
/// back.
fn with_memory<B: Backend>(backend: B, test: impl FnOnce(&Engine<'_, B>)) {
    // Whoever waits for a lock here waits until he has it.
    model::with_engine(backend, REGIONS as usize, u32::MAX, test);
}

/// Takes steps until the walk is over.
fn walk_to_the_end<B: Backend>(engine: &Engine<'_, B>, walk: &Walk) -> u64 {
    let mut scrubbed = 0;
    while let Step::Done(done) = engine.prepare_next(walk).expect("a step") {
        scrubbed += done.scrubbed_bytes();
    }
    scrubbed
}

/// The blocks that were validated, in order.
fn validated(model: &Model) -> Vec<u64> {
    let log = model.take_log();
    log.into_iter()
        .filter_map(|call| match call {
            Call::On(Operation::Validate, gpa, _) => Some(gpa),
            _ => None,
        })
        .collect()
}

#[test]
fn a_walk_makes_all_memory_ready_and_a_claim_validates_nothing() {
    let model = Model::new(REGIONS as usize, true);
    with_memory(&model, |engine| {
        let walk = Walk::new(Order::LowFirst, u64::MAX);
        assert_eq!(walk_to_the_end(engine, &walk), REGIONS * STEP);
        assert_eq!(validated(&model), [0, STEP, 2 * STEP, 3 * STEP]);
        assert_eq!(engine.counters().prepared_bytes, REGIONS * STEP);
        model.assert_agrees(engine);

        for block in [large(1), page(0), page(3 * 512 + 7)] {
            let done = engine.accept(block, OnNoChange::Fail).expect("claimed");
            assert_eq!(done.scrubbed_bytes(), 0);
        }
        assert!(validated(&model).is_empty(), "a claim has validated");
        assert_eq!(engine.counters().claimed_bytes, STEP + 2 * 4096);
        model.assert_agrees(engine);
        // The end stays the end, however often it is asked.
        for _ in 0..3 {
            assert_eq!(engine.prepare_next(&walk), Ok(Step::Over));
        }
    });
    model.assert_lawful();
    assert_eq!(model.double_validations(), 0);
}

#[test]
fn a_walk_stops_at_its_budget_and_takes_what_others_left_of_it() {
    let model = Model::new(REGIONS as usize, true);
    with_memory(&model, |engine| {
        // The guest was first in region 0: that step costs nothing.
        engine.accept(large(0), OnNoChange::Fail).expect("accepted");
        // A region of which a page is accepted costs the rest of it.
        engine
            .accept(page(512), OnNoChange::Fail)
            .expect("accepted");
        let walk = Walk::new(Order::LowFirst, 2 * STEP);
        assert_eq!(
            engine.prepare_next(&walk),
            Ok(Step::Done(Done {
                scrubbed_pages: 0,
                changed_pages: 0
            }))
        );
        assert_eq!(walk_to_the_end(engine, &walk), 2 * STEP - 4096);
        assert_eq!(engine.state(frame(3 * 512)), Some(PageState::Unaccepted));
        assert_eq!(engine.state(frame(513)), Some(PageState::Ahead));
        model.assert_agrees(engine);
    });
    model.assert_lawful();
}

#[test]
fn what_the_guest_gave_back_is_left_to_it() {
    let model = Model::new(REGIONS as usize, false);
    with_memory(&model, |engine| {
        // Given back after it was accepted, and announced as shared without ever being accepted.
        engine.accept(page(3), OnNoChange::Fail).expect("accepted");
        for number in [3, 512 + 9] {
            let rescinded = engine
                .rescind(page(number), OnNoChange::Ignore)
                .expect("rescinded");
            if let Some(owed) = rescinded.flush {
                engine.flush(owed).expect("flushed");
            }
        }
        model.take_log();
        let walk = Walk::new(Order::LowFirst, u64::MAX);
        assert_eq!(walk_to_the_end(engine, &walk), 2 * STEP);
        let validated = validated(&model);
        assert!(!validated.is_empty() && validated.iter().all(|gpa| *gpa >= 2 * STEP));
        for number in [0, 3, 512, 512 + 9] {
            assert_eq!(engine.state(frame(number)), Some(PageState::Unaccepted));
        }
        // Asked for, it is accepted like any other.
        engine.accept(page(3), OnNoChange::Fail).expect("accepted");
        model.assert_agrees(engine);
    });
    model.assert_lawful();
}

#[test]
fn without_a_memory_of_what_was_given_back_nothing_is_accepted_ahead() {
    let model = Model::new(1, true);
    let states = [Region::new()];
    let ranges = [Range::try_new(frame(0), 512, &states).expect("a good range")];
    let locks = [const { RegionLock::new() }; RegionLocks::MINIMUM];
    let engine = Engine::new(
        &model,
        Map::try_new(&ranges).expect("a good map"),
        RegionLocks::try_new(&locks).expect("good locks"),
    );
    let walk = Walk::new(Order::LowFirst, u64::MAX);
    assert_eq!(walk_to_the_end(&engine, &walk), 0);
    assert_eq!(engine.state(frame(0)), Some(PageState::Unaccepted));
    // And what is touched may lie beside what is shared.
    let done = engine.accept_around(frame(3)).expect("accepted");
    assert_eq!(done.changed_pages, 1);
}

#[test]
fn zones_come_in_the_order_asked_for_and_edges_are_left_to_requests() {
    /// A platform that only remembers.
    struct Log(std::sync::Mutex<Vec<u64>>);
    impl Backend for Log {
        fn validate(&self, block: Block) -> Result<(), accept::ValidateFault> {
            self.0.lock().unwrap().push(block.gpa());
            Ok(())
        }
        fn rescind(&self, _: Block) -> Result<(), accept::ValidateFault> {
            Ok(())
        }
        fn scrub(&self, _: Block) -> Result<(), accept::Fault> {
            Ok(())
        }
        fn grant(&self, _: Block) -> Result<(), accept::AdjustFault> {
            Ok(())
        }
        fn revoke(&self, _: Block) -> Result<(), accept::AdjustFault> {
            Ok(())
        }
        fn flush(&self) -> Result<(), accept::NotFlushed> {
            Ok(())
        }
    }

    const GIB: u64 = 1 << 30;
    for (order, expected) in [
        (
            Order::LowFirst,
            [2 * STEP, 4 * GIB - STEP, 4 * GIB, 4 * GIB + STEP],
        ),
        (
            Order::HighFirst,
            [4 * GIB, 4 * GIB + STEP, 2 * STEP, 4 * GIB - STEP],
        ),
    ] {
        // From the middle of one region to the middle of another, and across 4 GiB.
        let (low, high) = ([const { Region::new() }; 3], [const { Region::new() }; 3]);
        let flags = [const { GivenBack::new() }; 1];
        let range = |gpa, pages, regions| {
            let first = Frame::starting_at(gpa).expect("aligned");
            let range = Range::try_new(first, pages, regions).expect("a good range");
            range.with_given_back(&flags).expect("good flags")
        };
        let ranges = [
            range(STEP + 0x1000, 511 + 512 + 100, &low),
            range(4 * GIB - STEP, 3 * 512, &high),
        ];
        let locks = [const { RegionLock::new() }; RegionLocks::MINIMUM];
        let engine = Engine::new(
            Log(Vec::new().into()),
            Map::try_new(&ranges).expect("a good map"),
            RegionLocks::try_new(&locks).expect("good locks"),
        );
        walk_to_the_end(&engine, &Walk::new(order, u64::MAX));
        assert_eq!(*engine.backend().0.lock().unwrap(), expected, "{order:?}");
    }
}

#[test]
fn i5_a_walk_that_meets_a_lie_says_so_and_keeps_the_map_true() {
    let model = Model::new(REGIONS as usize, true);
    with_memory(&model, |engine| {
        model.resurrect(5);
        let walk = Walk::new(Order::LowFirst, u64::MAX);
        assert_eq!(engine.prepare_next(&walk), Err(Error::HostLied));
        model.assert_agrees(engine);
        model.fail_in(0, Injected::Status, false);
        assert_eq!(
            engine.prepare_next(&walk),
            Err(Error::Backend {
                operation: Operation::Validate,
                status: INJECTED
            })
        );
        model.assert_agrees(engine);
        // Failed steps cost no budget and no other region.
        assert_eq!(walk_to_the_end(engine, &walk), 2 * STEP);
    });
}

#[test]
fn i2_walkers_and_guest_at_once_never_validate_twice() {
    let model = Model::shared(REGIONS as usize, false);
    let (claims, over) = (AtomicU64::new(0), AtomicBool::new(false));
    with_memory(&model, |engine| {
        let walk = Walk::new(Order::HighFirst, u64::MAX);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| walk_to_the_end(engine, &walk));
            }
            scope.spawn(|| {
                for number in (0..REGIONS * 512).step_by(61) {
                    match engine.accept(page(number), OnNoChange::Fail) {
                        Ok(done) if done.scrubbed_bytes() == 0 => {
                            claims.fetch_add(1, Ordering::Relaxed);
                        }
                        Ok(_) => {}
                        Err(error) => panic!("to the guest every page is new: {error:?}"),
                    }
                }
                over.store(true, Ordering::Relaxed);
            });
        });
        assert!(over.into_inner());
        for number in 0..REGIONS * 512 {
            let state = engine.state(frame(number));
            let asked = number.is_multiple_of(61);
            let expected = if asked {
                PageState::Accepted
            } else {
                PageState::Ahead
            };
            // A region that the guest was at work on is passed over.
            assert!(
                state == Some(expected) || !asked && state == Some(PageState::Unaccepted),
                "page {number}: {state:?}"
            );
        }
        model.assert_agrees(engine);
    });
    assert_eq!(model.double_validations(), 0);
    model.assert_lawful();
}

#[test]
fn a_region_near_a_request_is_paid_from_the_walk_s_budget() {
    let model = Model::new(REGIONS as usize, true);
    with_memory(&model, |engine| {
        let walk = Walk::new(Order::LowFirst, 2 * STEP);
        // Any block names its region.
        let done = engine.prepare_near(&walk, page(2 * 512 + 9)).expect("done");
        assert_eq!(
            done,
            Step::Done(Done {
                scrubbed_pages: 512,
                changed_pages: 512
            })
        );
        // What is ready already costs nothing, and a region that is no memory is an error.
        engine.prepare_near(&walk, large(2)).expect("done");
        assert_eq!(
            engine.prepare_near(&walk, large(REGIONS)),
            Err(Error::OutOfRange)
        );
        assert_eq!(walk_to_the_end(engine, &walk), STEP);
        assert_eq!(engine.prepare_near(&walk, large(3)), Ok(Step::Over));
        assert_eq!(validated(&model), [2 * STEP, 0]);
        model.assert_agrees(engine);
    });
    model.assert_lawful();
}

#[test]
fn a_region_that_is_left_to_requests_is_neither_walked_over_nor_read_ahead() {
    let model = Model::new(REGIONS as usize, true);
    with_memory(&model, |engine| {
        engine.leave_to_requests(page(512 + 1)).expect("in range");
        assert_eq!(
            engine.leave_to_requests(large(REGIONS)),
            Err(Error::OutOfRange)
        );
        let walk = Walk::new(Order::LowFirst, u64::MAX);
        engine.prepare_near(&walk, large(1)).expect("passed over");
        assert_eq!(walk_to_the_end(engine, &walk), (REGIONS - 1) * STEP);
        assert_eq!(engine.state(frame(512 + 1)), Some(PageState::Unaccepted));
        engine
            .accept(large(1), OnNoChange::Fail)
            .expect("a request is served");
        model.assert_agrees(engine);
    });
    model.assert_lawful();
}

#[test]
fn the_regions_of_a_walk_are_told_in_its_order() {
    let model = Model::new(REGIONS as usize, true);
    with_memory(&model, |engine| {
        let regions: Vec<Block> = engine.regions_of_walk(Order::HighFirst).collect();
        assert_eq!(regions, [large(0), large(1), large(2), large(3)]);
    });
}

#[test]
fn a_touch_takes_the_region_but_where_pages_were_given_back_one_page() {
    let model = Model::new(REGIONS as usize, true);
    with_memory(&model, |engine| {
        let done = engine.accept_around(frame(7)).expect("accepted");
        assert_eq!(done.changed_pages, 512);
        assert_eq!(validated(&model), [0]);
        // Nothing is new there.
        assert_eq!(
            engine
                .accept_around(frame(8))
                .expect("nothing")
                .changed_pages,
            0
        );

        let owed = engine
            .rescind(page(512 + 9), OnNoChange::Ignore)
            .expect("given back");
        assert_eq!(owed.flush, None);
        let done = engine.accept_around(frame(512 + 3)).expect("accepted");
        assert_eq!(
            (done.changed_pages, validated(&model)),
            (1, vec![STEP + 3 * 4096])
        );

        engine
            .record_launch(frame(2 * 512 + 1), 1, PageState::Owned)
            .expect("recorded");
        assert_eq!(engine.accept_around(frame(2 * 512)), Err(Error::Owned));
        assert_eq!(
            engine.accept_around(frame(REGIONS * 512)),
            Err(Error::OutOfRange)
        );
        engine.prepare(large(3)).expect("ready");
        assert!(!validated(&model).is_empty());
        let done = engine.accept_around(frame(3 * 512)).expect("claimed");
        assert_eq!((done.scrubbed_bytes(), done.changed_pages), (0, 512));
        assert!(validated(&model).is_empty());
    });
    model.assert_lawful();
}
