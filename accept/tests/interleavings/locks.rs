//! Several regions: lists, and the locks that they share.

use std::sync::{Arc, Mutex};

use accept::{Error, OnNoChange, PageState};

use crate::hardware::{
    Guarded, NEIGHBOURS, Platform, Shared, accept, explore, explore_bounded, page, rescind,
};

/// How often one vCPU is interrupted for the other in the model of two lists.
const PREEMPTIONS: usize = 4;

#[test]
fn lists_in_opposite_order_do_not_wait_for_each_other() {
    // As the paravisor works off a list: the lock of the first page stays held until the second's turn.
    let list = |engine: &Guarded<'_>, numbers: [u64; 2]| {
        let mut list = engine.accepting();
        Ok(numbers.map(|number| list.accept(page(number, 0), OnNoChange::Fail).map(drop)))
    };
    // Two flows each meet in more than a million ways.
    explore_bounded(
        Some(PREEMPTIONS),
        NEIGHBOURS,
        |_| {},
        move |engine| list(engine, [0, 1]),
        move |engine| list(engine, [1, 0]),
        |_, mine, theirs| {
            let ([a0, a1], [b1, b0]) = (mine.expect("a list"), theirs.expect("a list"));
            for (mine, theirs) in [(a0, b0), (a1, b1)] {
                // Who is told "busy" has met the other at this very page.
                assert_eq!(usize::from(mine.is_ok()) + usize::from(theirs.is_ok()), 1);
                let loser = mine.and(theirs);
                assert!(
                    matches!(loser, Err(Error::NoChange | Error::Busy)),
                    "{loser:?}"
                );
            }
        },
    );
}

#[test]
fn two_regions_with_the_same_lock() {
    // Found by trying: a region that answers "busy" while region 0 is being worked on.
    let twin = (1..)
        .step_by(2)
        .find(|number| same_lock(0, *number))
        .expect("64 locks");
    explore(
        [0, twin],
        |_| {},
        |engine| accept(engine, page(0, 0)),
        move |engine| accept(engine, page(twin, 0)),
        |_, a, b| assert_eq!((a, b), (Ok(()), Ok(()))),
    );
}

/// Whether two regions share a lock, as seen from outside: with no patience at all, work on the
/// one is refused while the other's lock is held.
fn same_lock(a: u64, b: u64) -> bool {
    let same = Arc::new(Mutex::new(false));
    let seen = Arc::clone(&same);
    loom::model(move || {
        Shared::new([a, b]).with_patience(0, |engine| {
            accept(engine, page(a, 0)).expect("accepted");
            let inner = engine.while_accepted(page(a, 0).first(), || {
                engine.accept(page(b, 0), OnNoChange::Fail)
            });
            *seen.lock().expect("no panic") = inner == Ok(Err(Error::Busy));
        });
    });
    *same.lock().expect("no panic")
}

#[test]
fn i2_a_list_of_two_pages_against_one_who_wants_the_second() {
    explore(
        NEIGHBOURS,
        |_| {},
        |engine| {
            let mut list = engine.accepting();
            let first = list.accept(page(0, 0), OnNoChange::Fail).map(drop);
            let second = list.accept(page(0, 1), OnNoChange::Fail).map(drop);
            Ok((first, second))
        },
        |engine| accept(engine, page(0, 1)),
        |shared, list, other| {
            let (first, second) = list.expect("a list");
            // "Busy" is asked again by `explore` only where the whole answer is.
            let accepted = |index| {
                let state = shared.with_engine(|engine| engine.state(page(0, index).first()));
                state == Some(PageState::Accepted)
            };
            assert_eq!(accepted(0), first.is_ok());
            assert_eq!(accepted(1), second.is_ok() || other.is_ok());
            assert!(second.is_err() || other.is_err(), "two winners");
        },
    );
}

#[test]
fn i1_i3_a_list_against_the_rescind_of_its_first_page() {
    explore(
        NEIGHBOURS,
        |_| {},
        |engine| {
            let mut list = engine.accepting();
            list.accept(page(0, 0), OnNoChange::Fail)?;
            list.accept(page(0, 1), OnNoChange::Fail).map(drop)
        },
        |engine| rescind(engine, page(0, 0)),
        |shared, list, rescinded| {
            if list.is_ok() && rescinded.is_ok() {
                let state = shared.with_engine(|engine| engine.state(page(0, 0).first()));
                assert_eq!(state, Some(PageState::Unaccepted));
            }
            assert!(!shared.hardware.is_stale());
        },
    );
}
