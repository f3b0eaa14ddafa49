//! Accepting and rescinding.

use accept::{Error, PageState};
use loom::sync::atomic::Ordering;

use crate::hardware::{
    LEAVING_IS_SEEN, NEIGHBOURS, Platform, accept, explore, large, page, rescind,
};

#[test]
fn i2_two_accepts_of_one_page_have_one_winner() {
    explore(
        NEIGHBOURS,
        |_| {},
        |engine| accept(engine, page(0, 0)),
        |engine| accept(engine, page(0, 0)),
        |_, a, b| {
            let winners = usize::from(a.is_ok()) + usize::from(b.is_ok());
            assert_eq!(winners, 1, "{a:?} {b:?}");
            assert_eq!(a.and(b), Err(Error::NoChange));
        },
    );
}

#[test]
fn i2_a_page_and_its_region_asked_for_at_once() {
    explore(
        NEIGHBOURS,
        |_| {},
        |engine| accept(engine, large(0)),
        |engine| accept(engine, page(0, 1)),
        |_, a, b| {
            assert_eq!(usize::from(a.is_ok()) + usize::from(b.is_ok()), 1);
            assert_eq!(a.and(b), Err(Error::NoChange));
        },
    );
}

#[test]
fn i10_who_is_told_already_accepted_finds_the_page_zero() {
    explore(
        NEIGHBOURS,
        |_| {},
        |engine| accept(engine, page(0, 0)),
        |engine| {
            let accepted = engine.state(page(0, 0).first()) == Some(PageState::Accepted);
            if accepted {
                let answer = accept(engine, page(0, 0));
                assert_eq!(answer, Err(Error::NoChange), "answered without the lock");
                // The guest looks at the page as soon as it has this answer.
                let content = engine
                    .backend()
                    .shared
                    .hardware
                    .content()
                    .load(Ordering::Relaxed);
                assert_eq!(content, 0, "the guest saw what the host left");
            }
            Ok(())
        },
        |_, first, _| assert_eq!(first, Ok(())),
    );
}

#[test]
fn i1_i3_accept_against_rescind_of_the_same_page() {
    explore(
        NEIGHBOURS,
        |engine| accept(engine, page(0, 0)).expect("accepted"),
        |engine| accept(engine, page(0, 0)),
        |engine| rescind(engine, page(0, 0)),
        |shared, accepted, rescinded| {
            assert_eq!(rescinded, Ok(()));
            let state = shared.with_engine(|engine| engine.state(page(0, 0).first()));
            // Either the accept came too early, or it brought the page back.
            match accepted {
                Err(Error::NoChange) => assert_eq!(state, Some(PageState::Unaccepted)),
                Ok(()) => assert_eq!(state, Some(PageState::Accepted)),
                Err(Error::Owned) if LEAVING_IS_SEEN => {
                    assert_eq!(state, Some(PageState::Unaccepted));
                }
                Err(error) => panic!("a page on its way out was called {error:?}"),
            }
            assert!(!shared.hardware.is_stale());
        },
    );
}
