//! PVALIDATE, good and bad.

use accept::PageSize::{Size2M, Size4K};
use accept::{Block, Frame, OnNoChange, PageState};
use protocols::svsm::{CoreCall, ResultCode};
use protocols::terminate::TurnstileReason;

use super::model::{AREA, END, Event, GUEST, LIST, OWN_PAGE, Page, VMSA};
use super::world::{
    core_registers, ignoring, in_world, rescind_2m, rescind_4k, validate_2m, validate_4k,
};
use crate::protocol::Answer;

/// A region that the guest has not asked for, and a page in another.
const REGION: u64 = 0x40_0000;
const PAGE: u64 = 0x60_5000;

#[test]
fn pages_of_both_sizes_are_accepted_and_zero() {
    for large in [true, false] {
        in_world(|world| {
            world.machine.large.set(large);
            let answer = world.pvalidate(&[validate_2m(REGION), validate_4k(PAGE)]);
            assert_eq!(answer, (ResultCode::SUCCESS, 2));
            assert_eq!(world.state(REGION + 0x1f_f000), Some(PageState::Accepted));
            assert_eq!(world.state(PAGE), Some(PageState::Accepted));
            assert_eq!(world.state(PAGE + 0x1000), Some(PageState::Unaccepted));
            assert!(world.machine.holds(REGION, 2 << 20, 0) && world.machine.holds(PAGE, 4096, 0));
            assert!(world.machine.holds(PAGE + 0x1000, 4096, 0xcc));
            let page = Page {
                validated: true,
                granted: true,
                ..Page::default()
            };
            assert_eq!(world.machine.page(PAGE), page);
        });
    }
}

#[test]
fn rescinds_are_flushed_once_before_the_answer() {
    in_world(|world| {
        world.pvalidate(&[validate_2m(REGION), validate_4k(PAGE)]);
        world.machine.take_log();
        let answer = world.pvalidate(&[rescind_4k(PAGE), rescind_2m(REGION)]);
        assert_eq!(answer, (ResultCode::SUCCESS, 2));
        assert_eq!(
            world.machine.take_log(),
            [
                Event::Revoke(PAGE),
                Event::Rescind(PAGE),
                Event::Revoke(REGION),
                Event::Rescind(REGION),
                Event::Flush,
                Event::WriteNext(2),
            ]
        );
        assert_eq!(world.state(REGION), Some(PageState::Unaccepted));
    });
}

#[test]
fn a_failed_call_still_pays_for_its_rescinds() {
    in_world(|world| {
        world.pvalidate(&[validate_4k(PAGE)]);
        world.machine.take_log();
        let answer = world.pvalidate(&[rescind_4k(PAGE), validate_4k(OWN_PAGE)]);
        assert_eq!(answer, (ResultCode::INVALID_ADDRESS, 1));
        let log = world.machine.take_log();
        assert_eq!(log[log.len() - 2..], [Event::Flush, Event::WriteNext(1)]);
    });
}

#[test]
fn an_entry_that_changes_nothing_does_not_cancel_the_flush() {
    in_world(|world| {
        world.pvalidate(&[validate_4k(PAGE)]);
        world.machine.take_log();
        let answer = world.pvalidate(&[rescind_4k(PAGE), ignoring(rescind_4k(PAGE))]);
        assert_eq!(answer, (ResultCode::SUCCESS, 2));
        assert!(world.machine.take_log().contains(&Event::Flush));
    });
}

#[test]
fn a_second_validate_executes_nothing() {
    in_world(|world| {
        world.pvalidate(&[validate_2m(REGION), validate_4k(PAGE)]);
        world.machine.fill(PAGE, &[7; 4096]);
        world.machine.fill(REGION, &[7; 4096]);
        for entry in [validate_4k(PAGE), validate_2m(REGION), validate_4k(REGION)] {
            let answer = world.nothing_changes(|| world.pvalidate(&[entry]));
            assert_eq!(answer, (ResultCode::FAIL_NO_CHANGE, 0));
            let answer = world.nothing_changes(|| world.pvalidate(&[ignoring(entry)]));
            assert_eq!(answer, (ResultCode::SUCCESS, 1));
        }
        assert!(world.machine.holds(PAGE, 4096, 7) && world.machine.holds(REGION, 4096, 7));
    });
}

#[test]
fn rescinding_what_is_not_accepted_is_no_change() {
    in_world(|world| {
        for entry in [rescind_4k(PAGE), rescind_2m(REGION)] {
            let answer = world.nothing_changes(|| world.pvalidate(&[entry]));
            assert_eq!(answer, (ResultCode::FAIL_NO_CHANGE, 0));
            let answer = world.nothing_changes(|| world.pvalidate(&[ignoring(entry)]));
            assert_eq!(answer, (ResultCode::SUCCESS, 1));
        }
    });
}

#[test]
fn next_names_the_entry_that_failed_and_earlier_ones_are_done() {
    in_world(|world| {
        let entries = [
            validate_4k(PAGE),
            validate_4k(PAGE + 0x1000),
            validate_4k(PAGE),
            0x7004,
        ];
        assert_eq!(world.pvalidate(&entries), (ResultCode::FAIL_NO_CHANGE, 2));
        assert_eq!(world.state(PAGE + 0x1000), Some(PageState::Accepted));
        assert_eq!(world.state(0x7000), Some(PageState::Unaccepted));
        // The guest skips the entry by itself, as Linux does.
        world.machine.fill(LIST + 2, &3u16.to_le_bytes());
        assert_eq!(world.pvalidate_again(LIST), (ResultCode::SUCCESS, 4));
        assert_eq!(world.state(0x7000), Some(PageState::Accepted));
    });
}

#[test]
fn entries_before_next_are_not_looked_at() {
    in_world(|world| {
        let answer = world.pvalidate_at(LIST, 2, &[u64::MAX, u64::MAX, validate_4k(PAGE)]);
        assert_eq!(answer, (ResultCode::SUCCESS, 3));
    });
}

#[test]
fn bad_entries_are_refused_with_the_documented_code() {
    in_world(|world| {
        let own_region = validate_2m(0);
        for (entry, code) in [
            (PAGE | 6, ResultCode::INVALID_PARAMETER),
            (PAGE | 7, ResultCode::INVALID_PARAMETER),
            (validate_2m(PAGE), ResultCode::INVALID_PARAMETER),
            (rescind_2m(PAGE), ResultCode::INVALID_PARAMETER),
            (validate_4k(PAGE) | 0x10, ResultCode::INVALID_PARAMETER),
            (validate_4k(PAGE) | 0x800, ResultCode::INVALID_PARAMETER),
            (validate_4k(END), ResultCode::INVALID_ADDRESS),
            (validate_2m(END), ResultCode::INVALID_ADDRESS),
            (rescind_4k(END), ResultCode::INVALID_ADDRESS),
            (validate_4k(1 << 51), ResultCode::INVALID_ADDRESS),
            (validate_4k(!0xfff), ResultCode::INVALID_ADDRESS),
            (validate_2m(!0x1f_ffff), ResultCode::INVALID_ADDRESS),
            (validate_4k(OWN_PAGE), ResultCode::INVALID_ADDRESS),
            (rescind_4k(OWN_PAGE), ResultCode::INVALID_ADDRESS),
            (validate_4k(VMSA), ResultCode::INVALID_ADDRESS),
            (rescind_4k(VMSA), ResultCode::INVALID_ADDRESS),
            (validate_4k(AREA), ResultCode::INVALID_ADDRESS),
            (rescind_4k(AREA), ResultCode::INVALID_ADDRESS),
            (own_region, ResultCode::INVALID_ADDRESS),
            (rescind_2m(0), ResultCode::INVALID_ADDRESS),
        ] {
            for entry in [entry, ignoring(entry)] {
                let answer = world.nothing_changes(|| world.pvalidate(&[entry]));
                assert_eq!(answer, (code, 0), "{entry:#x}");
            }
        }
    });
}

#[test]
fn bad_headers_are_refused_and_left_alone() {
    in_world(|world| {
        for (count, next) in [
            (0, 0),
            (0, 1),
            (1, 1),
            (3, 3),
            (3, 4),
            (511, 0),
            (65535, 0),
            (1, 65535),
        ] {
            world.write_list(LIST, count, next, &[validate_4k(PAGE)]);
            let answer = world.nothing_changes(|| world.pvalidate_again(LIST));
            assert_eq!(
                answer,
                (ResultCode::INVALID_PARAMETER, next),
                "{count} {next}"
            );
        }
        assert!(
            world.machine.take_log().is_empty(),
            "not even the index was written"
        );
    });
}

#[test]
fn a_list_must_lie_in_one_page() {
    in_world(|world| {
        // In the calling area 510 entries fit; in a page of the guest's, 511.
        let many = vec![ignoring(rescind_4k(PAGE)); 511];
        assert_eq!(world.pvalidate(&many[..510]), (ResultCode::SUCCESS, 510));
        assert_eq!(
            world.pvalidate_at(GUEST, 0, &many),
            (ResultCode::SUCCESS, 511)
        );
        for (list, count) in [(GUEST + 8, 511), (GUEST + 0xff0, 2), (GUEST + 0xff8, 1)] {
            world.write_list(list, count, 0, &[]);
            let answer = world.nothing_changes(|| world.pvalidate_again(list));
            assert_eq!(answer, (ResultCode::INVALID_PARAMETER, 0), "{list:#x}");
        }
        let answer = world.pvalidate_at(GUEST + 0xff0, 0, &[validate_4k(PAGE)]);
        assert_eq!(answer, (ResultCode::SUCCESS, 1));
    });
}

#[test]
fn a_list_must_be_aligned() {
    in_world(|world| {
        for list in [LIST + 1, LIST + 2, LIST + 4, GUEST + 7] {
            let code = world.nothing_changes(|| world.core(CoreCall::PVALIDATE, [list, 0, 0]));
            assert_eq!(code, ResultCode::INVALID_PARAMETER, "{list:#x}");
        }
    });
}

#[test]
fn a_list_is_touched_only_in_accepted_memory() {
    in_world(|world| {
        world
            .engine
            .prepare(accept::Block::page(accept::Frame::containing(PAGE)))
            .unwrap();
        for list in [REGION, PAGE, OWN_PAGE, VMSA, END, 1 << 47, 1 << 52, !7] {
            if list < END {
                // A perfect list, to be sure that it is the page that is refused.
                world.write_list(list, 1, 0, &[validate_4k(0x9000)]);
            }
            let code = world.nothing_changes(|| world.core(CoreCall::PVALIDATE, [list, 0, 0]));
            assert_eq!(code, ResultCode::INVALID_ADDRESS, "{list:#x}");
        }
    });
}

#[test]
fn a_list_that_vanishes_is_the_guest_s_error() {
    in_world(|world| {
        world.write_list(GUEST, 1, 0, &[validate_4k(PAGE)]);
        let page = world.machine.page(GUEST);
        world.machine.set_page(GUEST, Page::default());
        let code = world.core(CoreCall::PVALIDATE, [GUEST, 0, 0]);
        assert_eq!(code, ResultCode::INVALID_ADDRESS);
        world.machine.set_page(GUEST, page);
    });
}

#[test]
fn a_list_that_rescinds_its_own_page_ends_there() {
    in_world(|world| {
        let entries = [rescind_4k(GUEST), validate_4k(PAGE)];
        world.write_list(GUEST, 2, 0, &entries);
        let code = world.core(CoreCall::PVALIDATE, [GUEST, 0, 0]);
        assert_eq!(code, ResultCode::INVALID_ADDRESS);
        assert_eq!(world.state(GUEST), Some(PageState::Unaccepted));
        assert_eq!(
            world.state(PAGE),
            Some(PageState::Unaccepted),
            "the second was not read"
        );
    });
}

#[test]
fn i8_a_call_stops_after_32_mib_and_goes_on_where_it_stopped() {
    for large in [true, false] {
        in_world(|world| {
            world.machine.large.set(large);
            let first = 2 << 21;
            let entries: Vec<u64> = (0..20).map(|n| validate_2m(first + (n << 21))).collect();
            assert_eq!(world.pvalidate(&entries), (ResultCode::INCOMPLETE, 16));
            assert_eq!(world.state(first + (15 << 21)), Some(PageState::Accepted));
            assert_eq!(world.state(first + (16 << 21)), Some(PageState::Unaccepted));
            assert_eq!(world.pvalidate_again(LIST), (ResultCode::SUCCESS, 20));

            let entries: Vec<u64> = (0..20).map(|n| rescind_2m(first + (n << 21))).collect();
            assert_eq!(world.pvalidate(&entries), (ResultCode::INCOMPLETE, 16));
            assert_eq!(world.pvalidate_again(LIST), (ResultCode::SUCCESS, 20));
        });
    }
}

#[test]
fn a_call_of_exactly_the_budget_is_complete() {
    in_world(|world| {
        let entries: Vec<u64> = (0..16).map(|n| validate_2m((2 + n) << 21)).collect();
        assert_eq!(world.pvalidate(&entries), (ResultCode::SUCCESS, 16));
    });
}

#[test]
fn a_failing_instruction_is_reported_with_its_status() {
    in_world(|world| {
        world.machine.validate_fails_at.set(Some(PAGE));
        let answer = world.pvalidate(&[validate_4k(0x9000), validate_4k(PAGE)]);
        assert_eq!(answer, (ResultCode::FAIL_PERMISSION, 1));
        world.machine.validate_fails_at.set(None);
        world.machine.adjust_fails.set(Some(0x77));
        let answer = world.pvalidate(&[validate_4k(PAGE)]);
        assert_eq!(answer, (ResultCode::FAIL_UNKNOWN, 0));
        assert_eq!(world.state(PAGE), Some(PageState::Unaccepted));
        assert_eq!(
            world.pvalidate(&[validate_4k(PAGE)]),
            (ResultCode::SUCCESS, 1)
        );
    });
}

#[test]
fn i5_a_lying_host_ends_the_machine() {
    in_world(|world| {
        let valid = Page {
            validated: true,
            granted: true,
            ..Page::default()
        };
        world.machine.set_page(PAGE, valid);
        world.write_list(LIST, 1, 0, &[validate_4k(PAGE)]);
        let answer = world.call_raw(&core_registers(CoreCall::PVALIDATE, [LIST, 0, 0]));
        assert_eq!(answer, Answer::Terminate(TurnstileReason::ALREADY_VALID));
        assert!(!world.machine.page(PAGE).granted);
        assert_eq!(world.engine.counters().host_lies, 1);

        world.machine.remove(GUEST + 0x1000);
        world.write_list(LIST, 1, 0, &[rescind_4k(GUEST + 0x1000)]);
        let answer = world.call_raw(&core_registers(CoreCall::PVALIDATE, [LIST, 0, 0]));
        assert_eq!(answer, Answer::Terminate(TurnstileReason::NOT_VALIDATED));
    });
}

#[test]
fn a_two_mib_entry_costs_one_validate_on_large_pages() {
    in_world(|world| {
        world.machine.take_log();
        world.pvalidate(&[validate_2m(REGION)]);
        assert_eq!(
            world.machine.take_log(),
            [
                Event::Validate(REGION, Size2M),
                Event::Scrub(REGION),
                Event::Grant(REGION),
                Event::WriteNext(1),
            ]
        );
        world.pvalidate(&[validate_4k(PAGE)]);
        assert_eq!(world.machine.take_log()[0], Event::Validate(PAGE, Size4K));
    });
}

#[test]
fn i3_a_rescind_is_answered_only_when_the_flush_is_certain() {
    in_world(|world| {
        world.machine.flush_fails.set(1);
        let answer = world.pvalidate(&[rescind_4k(GUEST)]);
        assert_eq!(
            answer,
            (ResultCode::SUCCESS, 1),
            "it is tried more than once"
        );
        assert!(!world.machine.page(GUEST).stale);

        // A processor that runs on and on: the guest asks again and again.
        world.machine.flush_fails.set(u32::MAX);
        let list = [rescind_4k(GUEST + 0x1000), rescind_4k(GUEST + 0x2000)];
        let mut answer = world.pvalidate(&list);
        for _ in 0..5 {
            assert_eq!(answer, (ResultCode::INCOMPLETE, 1));
            answer = world.pvalidate_again(LIST);
        }
        assert!(world.machine.page(GUEST + 0x2000).stale);
        world.machine.flush_fails.set(0);
        world.machine.take_log();
        assert_eq!(world.pvalidate_again(LIST), (ResultCode::SUCCESS, 2));
        assert_eq!(
            world.machine.take_log(),
            [Event::Flush, Event::WriteNext(2)],
            "what is done is not done again"
        );
        // Nothing is owed any more.
        assert_eq!(world.pvalidate_again(LIST).0, ResultCode::INVALID_PARAMETER);
    });
}

#[test]
fn i3_what_is_owed_is_paid_by_the_next_list_whatever_it_says() {
    in_world(|world| {
        world.machine.flush_fails.set(2);
        let answer = world.pvalidate(&[rescind_4k(GUEST)]);
        assert_eq!(answer, (ResultCode::INCOMPLETE, 0));
        world.machine.take_log();
        // The guest has lost interest; another list is not taken for the old one.
        let answer = world.pvalidate(&[rescind_4k(GUEST + 0x1000), rescind_4k(GUEST)]);
        assert_eq!(answer, (ResultCode::FAIL_NO_CHANGE, 1));
        let log = world.machine.take_log();
        assert_eq!(log[..2], [Event::Flush, Event::Revoke(GUEST + 0x1000)]);
        assert_eq!(log[3..], [Event::Flush, Event::WriteNext(1)]);
    });
}

#[test]
fn what_was_done_without_saying_so_and_undone_since_is_done_again() {
    in_world(|world| {
        let block = Block::page(Frame::containing(GUEST));
        world.machine.flush_fails.set(2);
        let answer = world.pvalidate(&[rescind_4k(GUEST)]);
        assert_eq!(answer, (ResultCode::INCOMPLETE, 0));
        // Another processor accepts the page before this one asks again.
        let accepted = world.engine.accept(block, OnNoChange::Fail);
        assert_eq!(accepted.map(|done| done.changed_pages), Ok(1));
        assert_eq!(world.pvalidate_again(LIST), (ResultCode::SUCCESS, 1));
        assert_eq!(world.state(GUEST), Some(PageState::Unaccepted));
    });
}

#[test]
fn i3_an_error_is_told_after_what_came_before_it_is_certain() {
    in_world(|world| {
        world.machine.flush_fails.set(2);
        let list = [rescind_4k(GUEST), rescind_4k(OWN_PAGE)];
        assert_eq!(world.pvalidate(&list), (ResultCode::INCOMPLETE, 1));
        assert_eq!(
            world.pvalidate_again(LIST),
            (ResultCode::INVALID_ADDRESS, 1)
        );
        assert!(!world.machine.page(GUEST).stale);
    });
}

#[test]
fn i8_a_large_entry_does_not_exceed_what_is_left_of_the_budget() {
    in_world(|world| {
        let first = 2 << 21;
        let mut entries = vec![validate_4k(1 << 21)];
        entries.extend((0..16).map(|n| validate_2m(first + (n << 21))));
        assert_eq!(world.pvalidate(&entries), (ResultCode::INCOMPLETE, 16));
        assert_eq!(world.state(first + (15 << 21)), Some(PageState::Unaccepted));
        assert_eq!(world.pvalidate_again(LIST), (ResultCode::SUCCESS, 17));
    });
}

/// I12: the entries of a list in the guest's own page are read under the lock of that page, so no other
/// lock may stay held from one entry to the next, and least of all the same one.
#[test]
fn i12_a_list_is_read_while_no_region_is_held() {
    in_world(|world| {
        // The list's own region, and all others, among them regions that share its lock.
        let own = [0x15_0000, 0x15_1000, 0x15_2000];
        let others = (1..super::model::REGIONS - 1).flat_map(|region| {
            let first = region << 21;
            [first, first + 0x1000]
        });
        let entries: Vec<u64> = own.into_iter().chain(others).map(validate_4k).collect();
        let count = u16::try_from(entries.len()).unwrap();
        let answer = world.pvalidate_at(GUEST, 0, &entries);
        assert_eq!(answer, (ResultCode::SUCCESS, count));
        let counters = world.engine.counters();
        assert_eq!((counters.busy, counters.contended), (0, 0));
        assert_eq!(counters.accepted_4k, u64::from(count));
    });
}
