//! Lists of requests: each is answered as it would be alone, and the lock goes when it has to.
#![cfg(not(loom))]

mod model;

use accept::{
    Accepting, Block, Done, Engine, Error, Frame, Map, OnNoChange, Operation, PageState, Range,
    Region, RegionLock, RegionLocks,
};
use model::{Call, Injected, Model, frame, large, page, with_engine};
use proptest::prelude::*;

/// Looks at a held lock before the answer is "busy".
const LOOKS: u32 = 3;

/// Whether the lock of page `number` is free, asked by a vCPU that wants the page.
fn is_free(engine: &Engine<'_, &Model>, number: u64) -> bool {
    match engine.accept(page(number), OnNoChange::Fail) {
        Ok(_) => true,
        Err(Error::Busy) => false,
        Err(error) => panic!("{error:?}"),
    }
}

fn accept(list: &mut Accepting<'_, '_, &Model>, block: Block) -> Result<Done, Error> {
    list.accept(block, OnNoChange::Fail)
}

#[test]
fn i12_the_lock_of_a_list_is_held_for_a_bounded_number_of_pages() {
    let model = Model::new(1, false);
    with_engine(&model, 1, LOOKS, |engine| {
        let mut list = engine.accepting();
        let longest = u64::from(Accepting::<&Model>::LONGEST);
        for number in 0..longest {
            assert_eq!(is_free(engine, 300 + number), number == 0, "{number}");
            accept(&mut list, page(number)).expect("accepted");
        }
        assert!(is_free(engine, 511));
        accept(&mut list, page(longest)).expect("the list goes on");
        assert!(!is_free(engine, 510));
        drop(list);
        assert!(is_free(engine, 510));
        model.assert_agrees(engine);
        model.assert_lawful();
    });
}

#[test]
fn i12_another_region_a_large_block_or_another_call_release_the_lock() {
    let model = Model::new(3, false);
    with_engine(&model, 3, LOOKS, |engine| {
        let mut list = engine.accepting();
        accept(&mut list, page(0)).expect("accepted");
        accept(&mut list, page(512)).expect("accepted");
        assert!(is_free(engine, 1) && !is_free(engine, 513));
        accept(&mut list, large(2)).expect("accepted");
        assert!(is_free(engine, 514));
        accept(&mut list, page(2)).expect("accepted");
        let owed = list.engine().rescind(page(2), OnNoChange::Fail);
        let owed = owed.expect("not busy").flush.expect("a flush is owed");
        assert!(is_free(engine, 3));
        engine.flush(owed).expect("flushed");
        model.assert_agrees(engine);
    });
}

#[test]
fn a_refusal_ends_the_hold() {
    let model = Model::new(1, false);
    with_engine(&model, 1, LOOKS, |engine| {
        engine.accept(page(7), OnNoChange::Fail).expect("accepted");
        let mut list = engine.accepting();
        accept(&mut list, page(6)).expect("accepted");
        assert_eq!(accept(&mut list, page(7)), Err(Error::NoChange));
        assert!(is_free(engine, 100));
        // This answer needs no lock, somebody else has it, and writes nothing.
        let written = engine.counters();
        let told = engine.while_accepted(frame(100), || accept(&mut list, page(7)));
        assert_eq!(told, Ok(Err(Error::NoChange)));
        assert_eq!(engine.counters(), written);
        accept(&mut list, page(8)).expect("accepted");
        assert_eq!(accept(&mut list, page(512)), Err(Error::OutOfRange));
        assert!(is_free(engine, 101));
    });
}

#[test]
fn i9_what_a_failure_owes_is_paid_before_the_answer() {
    let model = Model::new(1, false);
    with_engine(&model, 1, LOOKS, |engine| {
        let mut list = engine.accepting();
        accept(&mut list, page(0)).expect("accepted");
        model.resurrect(1);
        model.take_log();
        assert_eq!(accept(&mut list, page(1)), Err(Error::HostLied));
        assert_eq!(model.take_log().last(), Some(&Call::Flush));
        assert!(is_free(engine, 2));
        model.fail_in(0, Injected::Status, false);
        let failed = accept(&mut list, page(3));
        assert!(matches!(failed, Err(Error::Backend { .. })), "{failed:?}");
        model.assert_agrees(engine);
        model.assert_lawful();
    });
}

/// Two ranges may share 2 MiB of address space without sharing its state words.
#[test]
fn i1_a_hold_ends_at_the_end_of_its_range() {
    let model = Model::new(1, false);
    let (low, high) = ([const { Region::new() }; 1], [const { Region::new() }; 1]);
    let at = |number| Frame::try_new(number).expect("a small number");
    let ranges = [
        Range::try_new(at(0), 100, &low).expect("good"),
        Range::try_new(at(200), 100, &high).expect("good"),
    ];
    let locks = [const { RegionLock::new() }; RegionLocks::MINIMUM];
    let engine = Engine::new(
        &model,
        Map::try_new(&ranges).expect("good"),
        RegionLocks::try_new(&locks)
            .expect("good")
            .with_spin_limit(LOOKS),
    );
    let mut list = engine.accepting();
    for number in [98, 99, 200, 299] {
        list.accept(page(number), OnNoChange::Fail)
            .expect("accepted");
    }
    assert_eq!(
        list.accept(page(150), OnNoChange::Fail),
        Err(Error::OutOfRange)
    );
    drop(list);
    let state = |number| engine.state(frame(number));
    for number in [98, 99, 200, 299] {
        assert_eq!(state(number), Some(PageState::Accepted), "{number}");
    }
    assert_eq!(
        (state(0), state(201)),
        (Some(PageState::Unaccepted), Some(PageState::Unaccepted))
    );
}

#[test]
fn i2_two_lists_over_the_same_pages_share_them() {
    let model = Model::shared(2, false);
    with_engine(&model, 2, 1 << 30, |engine| {
        let won: u64 = std::thread::scope(|scope| {
            let vcpus: Vec<_> = (0..3)
                .map(|_| {
                    scope.spawn(|| {
                        let mut list = engine.accepting();
                        (0..1024)
                            .filter(|number| accept(&mut list, page(*number)).is_ok())
                            .count() as u64
                    })
                })
                .collect();
            let won = vcpus.into_iter().map(|vcpu| vcpu.join().expect("no panic"));
            won.sum()
        });
        assert_eq!(won, 1024);
        assert_eq!(engine.counters().accepted_4k, 1024);
        model.assert_agrees(engine);
        model.assert_lawful();
    });
    assert_eq!(model.double_validations(), 0);
}

fn any_request() -> impl Strategy<Value = (Block, OnNoChange)> {
    let block = prop_oneof![
        8 => model::history::any_page().prop_map(page),
        1 => (0..=model::history::REGIONS).prop_map(large),
    ];
    (
        block,
        prop_oneof![Just(OnNoChange::Fail), Just(OnNoChange::Ignore)],
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn i1_i2_a_list_is_answered_like_single_requests(
        requests in prop::collection::vec(any_request(), 1..60),
        ready in model::history::any_page(),
    ) {
        let regions = model::history::REGIONS as usize;
        let (one_by_one, as_list) = (Model::new(regions, false), Model::new(regions, false));
        let work = |model: &Model, listed: bool| {
            let mut answers = Vec::new();
            with_engine(model, regions, LOOKS, |engine| {
                // Some of it is ready before the guest asks.
                let _ = engine.prepare(page(ready));
                let mut list = engine.accepting();
                for (block, choice) in &requests {
                    answers.push(match listed {
                        true => list.accept(*block, *choice),
                        false => engine.accept(*block, *choice),
                    });
                }
                drop(list);
                model.assert_agrees(engine);
                model.assert_lawful();
            });
            (answers, model.take_log())
        };
        prop_assert_eq!(work(&one_by_one, false), work(&as_list, true));
        prop_assert_eq!(as_list.double_validations(), 0);
    }
}

#[test]
fn i3_each_page_of_a_list_is_granted_before_the_next_is_validated() {
    let model = Model::new(1, false);
    with_engine(&model, 1, LOOKS, |engine| {
        let mut list = engine.accepting();
        for number in 0..3 {
            accept(&mut list, page(number)).expect("accepted");
            let calls = [Operation::Validate, Operation::Scrub, Operation::Grant]
                .map(|operation| Call::On(operation, number << 12, page(0).size()));
            assert_eq!(model.take_log(), calls);
            assert_eq!(engine.state(frame(number)), Some(PageState::Accepted));
        }
    });
}
