//! Pages that the guest lends: VMSAs and calling areas.

use accept::{Error, PageState, Role, Taken};

use crate::hardware::{
    Guarded, LEAVING_IS_SEEN, NEIGHBOURS, Platform, accept, explore, page, rescind,
};

#[test]
fn i4_accept_against_creation_of_a_vmsa_in_the_same_page() {
    explore(
        NEIGHBOURS,
        |engine| accept(engine, page(0, 0)).expect("accepted"),
        |engine| {
            let taken = engine.take(page(0, 0).first(), Role::Vmsa);
            let taken = taken?;
            let hardware = &engine.backend().shared.hardware;
            let (_, granted) = hardware.page(0);
            let reached = granted || hardware.is_stale();
            assert!(!reached, "the guest can still write to it");
            Ok(taken)
        },
        |engine| accept(engine, page(0, 0)),
        |shared, taken, accepted| {
            let taken = taken.expect("accepted before");
            let error = accepted.expect_err("never the guest's again");
            assert!(matches!(error, Error::Owned | Error::NoChange), "{error:?}");
            assert_eq!(taken.frame(), page(0, 0).first());
            shared.with_engine(|engine| {
                assert_eq!(engine.state(taken.frame()), Some(PageState::Owned));
            });
        },
    );
}

#[test]
fn i4_rescind_against_creation_of_a_vmsa_in_the_same_page() {
    explore(
        NEIGHBOURS,
        |engine| accept(engine, page(0, 0)).expect("accepted"),
        |engine| engine.take(page(0, 0).first(), Role::Vmsa),
        |engine| rescind(engine, page(0, 0)),
        |shared, taken, rescinded| {
            let state = shared.with_engine(|engine| engine.state(page(0, 0).first()));
            match (taken, rescinded) {
                (Ok(_), Err(Error::Owned)) => assert_eq!(state, Some(PageState::Owned)),
                (Err(Error::NotAccepted), Ok(())) => assert_eq!(state, Some(PageState::Unaccepted)),
                (Err(Error::Owned), Ok(())) if LEAVING_IS_SEEN => {
                    assert_eq!(state, Some(PageState::Unaccepted));
                }
                both => panic!("both or neither had the page: {both:?}"),
            }
        },
    );
}

/// A page that was lent as a VMSA, and the right to give it back. Two closures need it, each of
/// which may run twice; it is only used once.
fn lend(engine: &Guarded<'_>) {
    accept(engine, page(0, 0)).expect("accepted");
    // The right is made again by `adopt`, as the paravisor does for pages of the launch.
    let _ = engine.take(page(0, 0).first(), Role::Vmsa).expect("taken");
}

fn give_back(engine: &Guarded<'_>) -> Result<(), Error> {
    let taken: Taken = engine.adopt(page(0, 0).first(), Role::Vmsa)?;
    engine.give_back(taken).map_err(|failed| failed.error)
}

#[test]
fn i4_a_vmsa_that_is_given_back_against_a_rescind() {
    explore(
        NEIGHBOURS,
        lend,
        give_back,
        |engine| rescind(engine, page(0, 0)),
        |shared, returned, rescinded| {
            assert_eq!(returned, Ok(()));
            let state = shared.with_engine(|engine| engine.state(page(0, 0).first()));
            match rescinded {
                Err(Error::Owned) => assert_eq!(state, Some(PageState::Accepted)),
                Ok(()) => assert_eq!(state, Some(PageState::Unaccepted)),
                Err(error) => panic!("{error:?}"),
            }
        },
    );
}

#[test]
fn i4_two_creations_of_vmsas_in_one_page_have_one_winner() {
    let take = |engine: &Guarded<'_>| engine.take(page(0, 0).first(), Role::Vmsa).map(drop);
    explore(
        NEIGHBOURS,
        |engine| accept(engine, page(0, 0)).expect("accepted"),
        take,
        take,
        |_, a, b| {
            assert_eq!(usize::from(a.is_ok()) + usize::from(b.is_ok()), 1);
            assert_eq!(a.and(b), Err(Error::Owned));
        },
    );
}

#[test]
fn i4_an_access_on_the_guests_behalf_against_creation_of_a_vmsa() {
    explore(
        NEIGHBOURS,
        |engine| accept(engine, page(0, 0)).expect("accepted"),
        |engine| {
            engine.while_accepted(page(0, 0).first(), || {
                let (_, granted) = engine.backend().shared.hardware.page(0);
                assert!(granted, "an access to a page that is a VMSA by now");
            })
        },
        |engine| engine.take(page(0, 0).first(), Role::Vmsa),
        |_, accessed, taken| {
            assert!(taken.is_ok());
            assert!(
                matches!(accessed, Ok(()) | Err(Error::Owned)),
                "{accessed:?}"
            );
        },
    );
}

#[test]
fn i3_an_access_on_the_guests_behalf_against_a_rescind() {
    explore(
        NEIGHBOURS,
        |engine| accept(engine, page(0, 0)).expect("accepted"),
        |engine| {
            engine.while_accepted(page(0, 0).first(), || {
                let (_, granted) = engine.backend().shared.hardware.page(0);
                assert!(granted, "an access to a page on its way out");
            })
        },
        |engine| rescind(engine, page(0, 0)),
        |_, accessed, rescinded| {
            assert_eq!(rescinded, Ok(()));
            let met_leaving = LEAVING_IS_SEEN && accessed == Err(Error::Owned);
            assert!(
                matches!(accessed, Ok(()) | Err(Error::NotAccepted)) || met_leaving,
                "{accessed:?}"
            );
        },
    );
}
