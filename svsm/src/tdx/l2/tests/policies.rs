//! Memory that becomes the guest's otherwise than on request: accepted ahead of it, or on touch.

use protocols::launch::AcceptPolicy;
use protocols::tdx::MAPPING_PENDING;

use super::*;
use crate::ahead::HostLied;

/// Where guest and host may be sharing pages, only the touched one is accepted: to accept its neighbours
/// would take them from both.
#[test]
fn a_touch_takes_no_page_that_is_shared() {
    let (sept, model) = (Sept::default(), Model::default());
    with(&sept, &model, Touch::ACCEPT, |service, vp| {
        let shared = [SHARED | 0x20_5000, 0x1000];
        let done = ask(service, vp, SubFunction::MAP_GPA, shared);
        assert_eq!(done, Ok((HostStatus::SUCCESS, 0)));
        assert_eq!(touch(service, vp, 0x20_3123), Next::Resume);
        assert_eq!(*sept.accepted.borrow(), [0x20_3000]);
        let state = |gpa| service.engine.state(Frame::containing(gpa));
        assert_eq!(state(0x20_5000), Some(PageState::Unaccepted));
        assert_eq!(touch(service, vp, 0x40_3123), Next::Resume);
        assert_eq!(*sept.accepted.borrow(), [0x20_3000, 0x40_0000]);
    });
}

/// What was accepted on touch is accepted: the guest that asks after all hears that.
#[test]
fn what_was_touched_is_already_accepted() {
    let (sept, model) = (Sept::default(), Model::default());
    with(&sept, &model, Touch::ACCEPT, |service, vp| {
        assert_eq!(touch(service, vp, 0x20_3123), Next::Resume);
        let already = Status::PAGE_ALREADY_ACCEPTED.with(0);
        assert_eq!(accept(service, vp, 0x20_7000), already);
        assert_eq!(sept.accepted.borrow().len(), 1);
    });
}

const AHEAD: Acceptance = Acceptance {
    policy: AcceptPolicy::AHEAD,
    ..Acceptance::LAZY
};

/// Pages that are ready are the guest's without an instruction, and to it they are as new as others.
#[test]
fn a_claim_executes_no_accept() {
    let (sept, model) = (Sept::default(), Model::default());
    with_policy(&sept, &model, AHEAD, |service, vp| {
        let wanted = service
            .ahead
            .steps_until_wanted(service.engine, || false)
            .unwrap();
        assert!(!wanted);
        // All but the paravisor's.
        let executed = sept.accepted.borrow().len();
        assert_eq!(executed, REGIONS - 1);
        let state = |gpa| service.engine.state(Frame::containing(gpa));
        assert_eq!(state(0x20_1000), Some(PageState::Ahead));
        // Until it asks they are not there for it.
        assert_eq!(touch(service, vp, 0x20_1000), Next::Resume);
        assert_eq!(injected(vp), Some(VE));
        let attributes = [(RCX, 0x20_1000)];
        assert_eq!(call(service, vp, Leaf::MEM_PAGE_ATTR_RD, &attributes), 0);
        assert_ne!(vp.gprs()[RCX] & MAPPING_PENDING, 0);

        assert_eq!(accept(service, vp, 0x20_1000), 0);
        assert_eq!(state(0x20_1000), Some(PageState::Accepted));
        assert_eq!(state(0x20_2000), Some(PageState::Ahead));
        assert_eq!(accept(service, vp, 0x40_0001), 0);
        let already = Status::PAGE_ALREADY_ACCEPTED.with(0);
        assert_eq!(accept(service, vp, 0x20_1000), already);
        assert_eq!(sept.accepted.borrow().len(), executed);
    });
}

/// Whoever steps looks before each step, so nobody waits for more than the one that was begun.
#[test]
fn a_processor_that_is_wanted_takes_no_further_step() {
    let (sept, model) = (Sept::default(), Model::default());
    with_policy(&sept, &model, AHEAD, |service, _| {
        let executed = || sept.accepted.borrow().len();
        let steps = |wanted: &dyn Fn() -> bool| {
            service
                .ahead
                .steps_until_wanted(service.engine, wanted)
                .unwrap()
        };
        assert!(steps(&|| true));
        assert_eq!(executed(), 0);
        assert!(steps(&|| executed() == 3));
        assert_eq!(executed(), 3);
    });
    // On request only, there is nothing to do in between.
    let sept = Sept::default();
    with(&sept, &model, Touch::FAULT, |service, _| {
        let wanted = service.ahead.steps_until_wanted(service.engine, || false);
        assert_eq!(wanted, Ok(false));
        assert!(sept.accepted.borrow().is_empty());
    });
}

/// What the guest shares is not made private by anybody but itself, whether it was ready or not.
#[test]
fn what_is_shared_is_not_accepted_ahead() {
    let (sept, model) = (Sept::default(), Model::default());
    with_policy(&sept, &model, AHEAD, |service, vp| {
        let share = |vp: &mut Vp, gpa: u64| {
            let done = ask(service, vp, SubFunction::MAP_GPA, [SHARED | gpa, 0x1000]);
            assert_eq!(done, Ok((HostStatus::SUCCESS, 0)));
        };
        share(vp, 0x60_3000);
        let finish = || {
            let wanted = service.ahead.steps_until_wanted(service.engine, || false);
            assert_eq!(wanted, Ok(false));
        };
        finish();
        assert!(!sept.accepted.borrow().contains(&0x60_0000));
        share(vp, 0x20_5000);
        finish();
        let state = |gpa| service.engine.state(Frame::containing(gpa));
        for gpa in [0x20_5000, 0x60_3000] {
            assert_eq!(state(gpa), Some(PageState::Unaccepted), "{gpa:#x}");
        }
        assert_eq!(state(0x20_6000), Some(PageState::Ahead));
        let asked = model.asked.borrow().len();
        assert_eq!(asked, 2, "the host was asked for what the guest asked");
    });
}

/// The regions behind a request, out of the same budget.
#[test]
fn an_accept_reads_ahead() {
    let (sept, model) = (Sept::default(), Model::default());
    let acceptance = Acceptance {
        read_ahead: 2,
        ..AHEAD
    };
    with_policy(&sept, &model, acceptance, |service, vp| {
        assert_eq!(accept(service, vp, 0x20_0001), 0);
        assert_eq!(*sept.accepted.borrow(), [0x20_0000, 0x40_0000, 0x60_0000]);
        let state = service.engine.state(Frame::containing(0x40_0000));
        assert_eq!(state, Some(PageState::Ahead));
        // Small pages are no sign of more to come.
        assert_eq!(accept(service, vp, 0xA0_0000), 0);
        assert_eq!(sept.accepted.borrow().len(), 4);
    });
}

/// I5, before anybody asked.
#[test]
fn a_lie_about_a_page_ends_the_walk() {
    let sept = Sept {
        lies: true,
        ..Sept::default()
    };
    let model = Model::default();
    with_policy(&sept, &model, AHEAD, |service, _| {
        let wanted = service.ahead.steps_until_wanted(service.engine, || false);
        assert_eq!(wanted, Err(HostLied));
    });
}
