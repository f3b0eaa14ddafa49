//! Turnstile's own protocol, and read-ahead, on the model.

use accept::{Frame, PageState, Step};
use protocols::launch::{AcceptPolicy, Acceptance, Budget, BudgetUnit};
use protocols::svsm::turnstile::{TurnstileCall, TurnstileCounter};
use protocols::svsm::{CoreCall, ResultCode};

use super::model::{AREA, END, Event, GUEST, GUEST_PAGES, LIST, OWN_PAGE};
use super::world::{
    World, core_registers, ignoring, in_world, in_world_that_accepts, rescind_2m, validate_2m,
};
use crate::protocol::{Answer, Registers, Steps};

const REGION: u64 = 4 << 20;
const LARGE: u64 = 2 << 20;

fn ahead(budget: Budget, read_ahead: u32) -> Acceptance {
    Acceptance {
        policy: AcceptPolicy::AHEAD,
        budget,
        read_ahead,
        ..Acceptance::LAZY
    }
}

fn ask(world: &World<'_>, call: TurnstileCall, rcx: u64, rdx: u64) -> (ResultCode, Registers) {
    ask_into(world, call, (rcx, rdx), (0, 0))
}

/// The same with a buffer.
fn ask_into(
    world: &World<'_>,
    call: TurnstileCall,
    (rcx, rdx): (u64, u64),
    (r8, r9): (u64, u64),
) -> (ResultCode, Registers) {
    let registers = Registers {
        rax: call.id().encode(),
        rcx,
        rdx,
        r8,
        r9,
    };
    match world.call_raw(&registers) {
        Answer::Return(answer) => (ResultCode::decode(answer.rax), answer),
        other => panic!("{other:?}"),
    }
}

fn validations(world: &World<'_>) -> usize {
    let is_one = |event: &Event| matches!(event, Event::Validate(..));
    world
        .machine
        .take_log()
        .iter()
        .filter(|e| is_one(e))
        .count()
}

#[test]
fn i8_a_long_range_is_cut_and_goes_on_where_it_stopped() {
    in_world(|world| {
        let bytes = END - REGION;
        let (code, first) = ask(world, TurnstileCall::ACCEPT, REGION, bytes);
        assert_eq!(code, ResultCode::INCOMPLETE);
        assert_eq!(
            (first.rcx, first.rdx),
            (REGION + (32 << 20), bytes - (32 << 20))
        );
        assert_eq!(world.state(first.rcx - 1), Some(PageState::Accepted));
        assert_eq!(world.state(first.rcx), Some(PageState::Unaccepted));
        let (code, last) = ask(world, TurnstileCall::ACCEPT, first.rcx, first.rdx);
        assert_eq!((code, last.rcx, last.rdx), (ResultCode::SUCCESS, END, 0));
        assert_eq!(validations(world) as u64, bytes / LARGE);
        // Again: nothing is executed.
        let (code, _) = ask(world, TurnstileCall::ACCEPT, REGION, 32 << 20);
        assert_eq!((code, validations(world)), (ResultCode::SUCCESS, 0));
    });
}

#[test]
fn i4_i9_a_range_ends_at_the_first_page_that_is_not_the_guest_s() {
    in_world(|world| {
        for owned in [OWN_PAGE, AREA] {
            let (code, left) = ask(world, TurnstileCall::ACCEPT, owned, 4096);
            assert_eq!((code, left.rcx), (ResultCode::INVALID_ADDRESS, owned));
        }
        let start = OWN_PAGE + 4096;
        let (code, _) = ask(world, TurnstileCall::ACCEPT, start, 4096);
        assert_eq!(code, ResultCode::SUCCESS);
        let (code, left) = ask(world, TurnstileCall::ACCEPT, END - 4096, 8192);
        assert_eq!(code, ResultCode::INVALID_ADDRESS);
        assert_eq!((left.rcx, left.rdx), (END, 4096));
        assert_eq!(world.state(END - 4096), Some(PageState::Accepted));
    });
}

#[test]
fn arguments_without_meaning_are_refused_as_they_are() {
    in_world(|world| {
        let calls = [
            (TurnstileCall::ACCEPT, REGION + 1, 4096),
            (TurnstileCall::ACCEPT, REGION, 0),
            (TurnstileCall::ACCEPT, u64::MAX - 4095, 8192),
            (TurnstileCall::ACCEPT, 1 << 52, 4096),
            (TurnstileCall::CENSUS, REGION, 4096),
            (TurnstileCall::CENSUS, REGION, 0),
            (TurnstileCall::CENSUS, 0, (64 << 30) + LARGE),
            (TurnstileCall::CONTAINS_UNACCEPTED, u64::MAX, 2),
            (TurnstileCall::COUNTER, 14, 0),
            (TurnstileCall::COUNTER, u64::MAX, 0),
        ];
        for (call, rcx, rdx) in calls {
            let (code, after) = ask(world, call, rcx, rdx);
            assert_eq!(
                code,
                ResultCode::INVALID_PARAMETER,
                "{call:?} {rcx:#x} {rdx:#x}"
            );
            assert_eq!((after.rcx, after.rdx), (rcx, rdx));
        }
        let (code, _) = ask(world, TurnstileCall(6), 0, 0);
        assert_eq!(code, ResultCode::UNSUPPORTED_CALL);
    });
}

#[test]
fn what_is_ready_is_counted_and_is_unaccepted_to_the_guest() {
    in_world_that_accepts(ahead(Budget::ALL, 0), |world| {
        world.ahead.step(world.engine).unwrap();
        world.ahead.step(world.engine).unwrap();
        let (_, found) = ask(world, TurnstileCall::CENSUS, LARGE, LARGE);
        assert_eq!([found.rcx, found.rdx, found.r8, found.r9], [0, LARGE, 0, 0]);
        let (_, found) = ask(world, TurnstileCall::CONTAINS_UNACCEPTED, LARGE, 8);
        assert_eq!(found.rcx, 1);
        let (_, found) = ask(world, TurnstileCall::CONTAINS_UNACCEPTED, GUEST, 8);
        assert_eq!(found.rcx, 0);
        world.machine.take_log();
        let (code, _) = ask(world, TurnstileCall::ACCEPT, LARGE, LARGE);
        assert_eq!(
            (code, validations(world)),
            (ResultCode::SUCCESS, 0),
            "claimed"
        );
        let counter =
            |counter: TurnstileCounter| ask(world, TurnstileCall::COUNTER, counter.0, 0).1.rcx;
        assert_eq!(counter(TurnstileCounter::CLAIMED_BYTES), LARGE);
        world.machine.steps.set(Steps {
            taken: 2,
            longest_wait: 1,
        });
        assert_eq!(counter(TurnstileCounter::STEPS), 2);
        assert_eq!(counter(TurnstileCounter::LONGEST_WAIT), 1);
        assert_eq!(counter(TurnstileCounter::FAILED_STEPS), 0);
    });
}

/// Requests that change nothing are counted, and nothing else about them is written by the engine.
#[test]
fn requests_that_find_nothing_to_do_are_counted() {
    in_world(|world| {
        let counted = || {
            let number = TurnstileCounter::NO_CHANGE.0;
            ask(world, TurnstileCall::COUNTER, number, 0).1.rcx
        };
        assert_eq!(request_2m(world, REGION), ResultCode::SUCCESS);
        assert_eq!(counted(), 0);
        let written = world.engine.counters();
        for expected in 1..4 {
            assert_eq!(request_2m(world, REGION), ResultCode::FAIL_NO_CHANGE);
            assert_eq!(counted(), expected);
        }
        assert_eq!(world.engine.counters(), written);
        // Two blocks of a range, one of them new; a list that ignores it; what is out already.
        let (code, _) = ask(world, TurnstileCall::ACCEPT, REGION, 2 * LARGE);
        assert_eq!((code, counted()), (ResultCode::SUCCESS, 4));
        let entries = [
            ignoring(validate_2m(REGION)),
            ignoring(rescind_2m(END - LARGE)),
            rescind_2m(END - LARGE),
        ];
        let answer = world.pvalidate(&entries);
        assert_eq!(answer, (ResultCode::FAIL_NO_CHANGE, 2));
        assert_eq!(counted(), 7);
    });
}

const TABLE: TurnstileCall = TurnstileCall::UNACCEPTED_TABLE;
/// Where the guest has the table put, and what is there before.
const BUFFER: u64 = GUEST + 0x4000;
const BLANK: u8 = 0x5a;

#[test]
fn the_table_tells_which_units_of_a_range_are_unaccepted() {
    in_world(|world| {
        for region in [REGION, REGION + 2 * LARGE, REGION + 3 * LARGE] {
            assert_eq!(request_2m(world, region), ResultCode::SUCCESS);
        }
        world.machine.fill(BUFFER, &[BLANK; 4096]);
        let range = (REGION, END - REGION);
        let (code, after) = ask_into(world, TABLE, range, (BUFFER, 4096));
        assert_eq!((code, after.rcx), (ResultCode::SUCCESS, 24 + 3));
        assert_eq!(
            (after.rdx, after.r8, after.r9),
            (END - REGION, BUFFER, 4096)
        );
        // Units 3 to 22: unit 2, 4 and 5 of memory are accepted.
        let mut expected = std::vec![1, 0, 0, 0, 0, 0, 0x20, 0];
        expected.extend_from_slice(&(3 * LARGE).to_le_bytes());
        expected.extend_from_slice(&3_u64.to_le_bytes());
        expected.extend_from_slice(&[0b1111_1001, 0xff, 0b1111]);
        assert_eq!(world.machine.bytes(BUFFER, 27), expected);
        assert!(world.machine.holds(BUFFER + 27, 4096 - 27, BLANK));
        // Exactly as much as is needed, of a buffer that ends where the guest's memory does.
        let last = GUEST + ((GUEST_PAGES - 1) << 12);
        let (code, _) = ask_into(world, TABLE, range, (last, 27));
        assert_eq!(code, ResultCode::SUCCESS);
        assert_eq!(world.machine.bytes(last, 27), expected);
        // No more is looked at than could be written.
        let (code, _) = ask_into(world, TABLE, range, (last, 1 << 40));
        assert_eq!(code, ResultCode::SUCCESS);
        // Nothing is unaccepted there.
        let (code, after) = ask_into(world, TABLE, (REGION, LARGE), (BUFFER, 24));
        assert_eq!((code, after.rcx), (ResultCode::SUCCESS, 24));
        assert!(world.machine.holds(BUFFER + 8, 16, 0));
    });
}

#[test]
fn a_buffer_too_small_for_the_table_is_told_what_is_needed() {
    in_world(|world| {
        for size in [0, 23, 24, 26] {
            world.machine.fill(BUFFER, &[BLANK; 64]);
            let range = (REGION, END - REGION);
            let (code, after) =
                world.nothing_changes(|| ask_into(world, TABLE, range, (BUFFER, size)));
            assert_eq!((code, after.rcx), (ResultCode::INVALID_PARAMETER, 27));
            assert!(world.machine.holds(BUFFER, 64, BLANK), "written");
        }
    });
}

#[test]
fn i4_i7_the_table_goes_to_the_guest_s_own_memory_only() {
    in_world(|world| {
        let good = (REGION, END - REGION);
        for (range, buffer, expected) in [
            (good, (BUFFER + 8, 27), ResultCode::INVALID_PARAMETER),
            (good, (!4095, 4097), ResultCode::INVALID_PARAMETER),
            (good, (1 << 52, 27), ResultCode::INVALID_PARAMETER),
            (
                (REGION, 4096),
                (BUFFER, 4096),
                ResultCode::INVALID_PARAMETER,
            ),
            ((REGION, 0), (BUFFER, 4096), ResultCode::INVALID_PARAMETER),
            (
                (0, (64 << 30) + LARGE),
                (BUFFER, 4096),
                ResultCode::INVALID_PARAMETER,
            ),
            (good, (REGION, 27), ResultCode::INVALID_ADDRESS),
            (good, (OWN_PAGE, 27), ResultCode::INVALID_ADDRESS),
            (good, (AREA, 27), ResultCode::INVALID_ADDRESS),
            (good, (END, 27), ResultCode::INVALID_ADDRESS),
            (good, ((1 << 52) - 4096, 27), ResultCode::INVALID_ADDRESS),
        ] {
            let (code, after) = world.nothing_changes(|| ask_into(world, TABLE, range, buffer));
            assert_eq!(code, expected, "{range:x?} {buffer:x?}");
            assert_eq!((after.rcx, after.rdx), range);
        }
        // A table of 64 GiB may have more than a page: all of it must be the guest's.
        let last = GUEST + ((GUEST_PAGES - 1) << 12);
        let (code, _) = ask_into(world, TABLE, (0, 64 << 30), (last, 8192));
        assert_eq!(code, ResultCode::INVALID_ADDRESS);
    });
}

fn request_2m(world: &World<'_>, gpa: u64) -> ResultCode {
    world.write_list(LIST, 1, 0, &[validate_2m(gpa)]);
    match world.call_raw(&core_registers(CoreCall::PVALIDATE, [LIST, 0, 0])) {
        Answer::Return(answer) => ResultCode::decode(answer.rax),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_request_prepares_what_lies_behind_it() {
    in_world_that_accepts(ahead(Budget::ALL, 2), |world| {
        assert_eq!(request_2m(world, REGION), ResultCode::SUCCESS);
        let states = [0, 1, 2, 3].map(|n| world.state(REGION + n * LARGE).unwrap());
        use PageState::{Accepted, Ahead, Unaccepted};
        assert_eq!(states, [Accepted, Ahead, Ahead, Unaccepted]);
        // The next request costs one more region, not three.
        world.machine.take_log();
        assert_eq!(request_2m(world, REGION + LARGE), ResultCode::SUCCESS);
        assert_eq!(validations(world), 1);
        // Behind the last region there is nothing to prepare.
        assert_eq!(request_2m(world, END - LARGE), ResultCode::SUCCESS);
    });
}

#[test]
fn read_ahead_keeps_within_the_budget() {
    let one_region = Budget {
        unit: BudgetUnit::BYTES,
        amount: LARGE,
    };
    in_world_that_accepts(ahead(one_region, 15), |world| {
        assert_eq!(request_2m(world, REGION), ResultCode::SUCCESS);
        assert_eq!(validations(world), 2);
        assert_eq!(request_2m(world, REGION + 4 * LARGE), ResultCode::SUCCESS);
        assert_eq!(validations(world), 1, "the budget is spent");
        assert_eq!(world.ahead.step(world.engine), Ok(false));
    });
}

#[test]
fn what_the_guest_gave_back_is_left_to_it() {
    in_world_that_accepts(ahead(Budget::ALL, 1), |world| {
        assert_eq!(request_2m(world, REGION + LARGE), ResultCode::SUCCESS);
        world.write_list(LIST, 1, 0, &[rescind_2m(REGION + LARGE)]);
        let rescind = core_registers(CoreCall::PVALIDATE, [LIST, 0, 0]);
        assert!(matches!(
            world.call_raw(&rescind),
            Answer::Return(Registers { rax: 0, .. })
        ));
        assert_eq!(world.state(REGION + LARGE), Some(PageState::Unaccepted));
        assert_eq!(request_2m(world, REGION), ResultCode::SUCCESS);
        while world.ahead.step(world.engine).unwrap() {}
        assert_eq!(world.state(REGION + LARGE), Some(PageState::Unaccepted));
        assert_eq!(world.state(END - LARGE), Some(PageState::Ahead));
        assert!(world.ahead.is_idle());
    });
}

#[test]
fn a_step_that_fails_is_counted_and_the_walk_goes_on() {
    in_world_that_accepts(ahead(Budget::ALL, 0), |world| {
        world.machine.validate_fails_at.set(Some(REGION));
        while world.ahead.step(world.engine).unwrap() {}
        assert_eq!(world.ahead.failed(), 1);
        assert_eq!(world.state(REGION), Some(PageState::Unaccepted));
        assert_eq!(world.state(REGION + LARGE), Some(PageState::Ahead));
        world.machine.validate_fails_at.set(None);
        assert_eq!(request_2m(world, REGION), ResultCode::SUCCESS);
    });
}

#[test]
fn nothing_is_ahead_of_a_guest_that_asks_for_everything() {
    in_world(|world| {
        assert_eq!(world.ahead.step(world.engine), Ok(false));
        assert_eq!(request_2m(world, REGION), ResultCode::SUCCESS);
        assert_eq!(world.state(REGION + LARGE), Some(PageState::Unaccepted));
    });
}

#[test]
fn a_region_that_is_left_to_requests_is_passed_over() {
    in_world_that_accepts(ahead(Budget::ALL, 0), |world| {
        let block = accept::Block::region_around(Frame::containing(REGION));
        world.engine.leave_to_requests(block).unwrap();
        while world.ahead.step(world.engine).unwrap() {}
        assert_eq!(world.state(REGION), Some(PageState::Unaccepted));
        assert!(matches!(
            world.engine.prepare_near(&accept::Walk::new(accept::Order::LowFirst, LARGE), block),
            Ok(Step::Done(done)) if done.changed_pages == 0
        ));
    });
}
