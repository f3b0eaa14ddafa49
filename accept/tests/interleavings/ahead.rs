//! Memory that is made ready before the guest asks, by the two ways that ship: a step of the walk, and
//! what lies near a request.

use accept::{Done, Error, OnNoChange, PageState, Step};
use loom::sync::atomic::Ordering;

use crate::Hardware;
use crate::hardware::{
    Guarded, LEAVING_IS_SEEN, NEIGHBOURS, Platform, accept, explore, large, page, rescind,
};

/// A step of the walk over all memory: the first one takes region 0.
fn step(engine: &Guarded<'_>) -> Result<Step, Error> {
    engine.prepare_next(&engine.backend().shared.walk)
}

/// The same of region 0, because it lies near a request.
fn step_near(engine: &Guarded<'_>) -> Result<Step, Error> {
    engine.prepare_near(&engine.backend().shared.walk, large(0))
}

/// Region 0 is ready.
fn ready(engine: &Guarded<'_>) {
    assert_eq!(step_near(engine), Ok(Step::Done(WHOLE)));
}

const WHOLE: Done = Done {
    scrubbed_pages: 512,
    changed_pages: 512,
};

#[test]
fn a_claim_against_acceptance_in_the_background() {
    explore(
        NEIGHBOURS,
        |_| {},
        |engine| accept(engine, page(0, 0)),
        step,
        |shared, claimed, prepared| {
            // All of it, the rest of it, or nothing because the guest was at work there.
            let Ok(Step::Done(Done { changed_pages, .. })) = prepared else {
                panic!("{prepared:?}");
            };
            assert!([0, 511, 512].contains(&changed_pages), "{changed_pages}");
            let rest = match changed_pages {
                0 => PageState::Unaccepted,
                _ => PageState::Ahead,
            };
            let last = shared.with_engine(|engine| engine.state(page(0, 511).first()));
            assert_eq!(last, Some(rest));
            assert_eq!(claimed, Ok(()), "to the guest the page is new");
            assert_eq!(shared.hardware.content().load(Ordering::Relaxed), 0);
            let state = shared.with_engine(|engine| engine.state(page(0, 0).first()));
            assert_eq!(state, Some(PageState::Accepted));
        },
    );
}

#[test]
fn two_claims_of_one_page_have_one_winner() {
    explore(
        NEIGHBOURS,
        ready,
        |engine| accept(engine, page(0, 0)),
        |engine| accept(engine, page(0, 0)),
        |_, a, b| {
            let winners = usize::from(a.is_ok()) + usize::from(b.is_ok());
            assert_eq!(winners, 1, "{a:?} {b:?}");
        },
    );
}

#[test]
fn a_claim_against_a_rescind_of_what_was_never_claimed() {
    explore(
        NEIGHBOURS,
        ready,
        |engine| accept(engine, page(0, 0)),
        |engine| <Hardware as Platform>::rescind(engine, page(0, 0), OnNoChange::Ignore),
        // Map and hardware agree at the end, whoever was first; the page is in no other state.
        |shared, claimed, rescinded| {
            let met_leaving = LEAVING_IS_SEEN && claimed == Err(Error::Owned);
            assert!(claimed.is_ok() || met_leaving, "{claimed:?}");
            assert_eq!(rescinded, Ok(()));
            let state = shared.with_engine(|engine| engine.state(page(0, 0).first()));
            assert!(matches!(
                state,
                Some(PageState::Accepted | PageState::Unaccepted)
            ));
        },
    );
}

#[test]
fn what_was_given_back_is_not_made_ready_behind_the_guests_back() {
    explore(
        NEIGHBOURS,
        |engine| accept(engine, page(0, 0)).expect("accepted"),
        |engine| rescind(engine, page(0, 0)),
        step_near,
        |shared, rescinded, prepared| {
            assert_eq!(rescinded, Ok(()));
            let Ok(Step::Done(prepared)) = prepared else {
                panic!("{prepared:?}");
            };
            let state = |index| shared.with_engine(|engine| engine.state(page(0, index).first()));
            // Guest and host may share it by now.
            assert_eq!(state(0), Some(PageState::Unaccepted));
            let rest = match prepared.changed_pages {
                0 => PageState::Unaccepted,
                511 => PageState::Ahead,
                pages => panic!("{pages} pages"),
            };
            assert_eq!(state(1), Some(rest));
        },
    );
}

#[test]
fn the_last_region_of_a_walk_is_made_ready_once() {
    let done = Step::Done(WHOLE);
    explore(
        NEIGHBOURS,
        move |engine| assert_eq!(step(engine), Ok(done)),
        step,
        step,
        move |shared, a, b| {
            assert!([(Ok(done), Ok(Step::Over)), (Ok(Step::Over), Ok(done))].contains(&(a, b)));
            for number in NEIGHBOURS {
                let state = shared.with_engine(|engine| engine.state(page(number, 511).first()));
                assert_eq!(state, Some(PageState::Ahead));
            }
        },
    );
}
