//! Calling areas and VMSAs, good and bad.

use accept::PageState;
use protocols::svsm::{CoreCall, ResultCode};
use protocols::terminate::TurnstileReason;
use protocols::vmsa::{Efer, SevFeatures};

use super::model::{AREA, BOOT, END, Event, GUEST, OWN_PAGE, Page, VMSA};
use super::world::{core_registers, in_world, rescind_4k, validate_4k};
use crate::protocol::{Answer, Vcpus};

/// Where the tests put a VMSA and its calling area, as OVMF does: one after the other.
const NEW_VMSA: u64 = GUEST + 0x5000;
const NEW_AREA: u64 = GUEST + 0x6000;
const UNACCEPTED: u64 = 0x40_1000;

#[test]
fn a_calling_area_moves_and_the_old_one_is_the_guest_s_again() {
    in_world(|world| {
        world.machine.fill(NEW_AREA, &[1, 1]);
        assert_eq!(
            world.core(CoreCall::REMAP_CA, [NEW_AREA, 0, 0]),
            ResultCode::SUCCESS
        );
        assert_eq!(world.state(NEW_AREA), Some(PageState::Owned));
        assert_eq!(world.state(AREA), Some(PageState::Accepted));
        assert_eq!(world.machine.bytes(NEW_AREA, 1), [0]);
        assert_eq!(
            world.machine.bytes(AREA, 1),
            [0],
            "cleared in the old one as well"
        );
        // The next call comes from the new one, and the old one may even be rescinded.
        assert_eq!(
            world.pvalidate_at(NEW_AREA + 8, 0, &[rescind_4k(AREA)]).0,
            ResultCode::SUCCESS
        );
        let (code, next) = world.pvalidate_at(NEW_AREA + 8, 0, &[rescind_4k(NEW_AREA)]);
        assert_eq!((code, next), (ResultCode::INVALID_ADDRESS, 0));
    });
}

#[test]
fn moving_a_calling_area_to_where_it_is_changes_nothing() {
    in_world(|world| {
        let code = world.nothing_changes(|| world.core(CoreCall::REMAP_CA, [AREA, 0, 0]));
        assert_eq!(code, ResultCode::SUCCESS);
        assert_eq!(world.state(AREA), Some(PageState::Owned));
    });
}

#[test]
fn a_calling_area_cannot_move_to_a_bad_page() {
    in_world(|world| {
        // The guest's own, but 0 is how the table of calling areas says "none".
        world.accept_page_0();
        for (gpa, code) in [
            (GUEST + 8, ResultCode::INVALID_PARAMETER),
            (u64::MAX, ResultCode::INVALID_PARAMETER),
            (UNACCEPTED, ResultCode::INVALID_ADDRESS),
            (OWN_PAGE, ResultCode::INVALID_ADDRESS),
            (VMSA, ResultCode::INVALID_ADDRESS),
            (END, ResultCode::INVALID_ADDRESS),
            (1 << 52, ResultCode::INVALID_ADDRESS),
            (0, ResultCode::INVALID_ADDRESS),
        ] {
            let answer = world.nothing_changes(|| world.core(CoreCall::REMAP_CA, [gpa, 0, 0]));
            assert_eq!(answer, code, "{gpa:#x}");
            assert_eq!(
                (&world.machine).calling_area(BOOT).map(|f| f.gpa()),
                Some(AREA)
            );
        }
    });
}

#[test]
fn a_calling_area_cannot_move_to_a_page_that_is_gone() {
    in_world(|world| {
        let page = world.machine.page(NEW_AREA);
        world.machine.set_page(NEW_AREA, Page::default());
        let code = world.core(CoreCall::REMAP_CA, [NEW_AREA, 0, 0]);
        assert_eq!(code, ResultCode::INVALID_ADDRESS);
        assert_eq!(
            world.state(NEW_AREA),
            Some(PageState::Accepted),
            "as before"
        );
        world.machine.set_page(NEW_AREA, page);
    });
}

fn create(vmsa: u64, area: u64, apic_id: u64) -> (CoreCall, [u64; 3]) {
    (CoreCall::CREATE_VCPU, [vmsa, area, apic_id])
}

#[test]
fn a_vmsa_is_shut_off_before_it_is_looked_at() {
    in_world(|world| {
        world.write_vmsa(NEW_VMSA, |_| {});
        world.machine.take_log();
        let (call, arguments) = create(NEW_VMSA, NEW_AREA, 0xffff_ffff_0000_0001);
        // The model asserts that the page was flushed when it is looked at.
        assert_eq!(world.core(call, arguments), ResultCode::SUCCESS);
        assert_eq!(
            world.machine.take_log(),
            [
                Event::Revoke(NEW_VMSA),
                Event::Flush,
                Event::MakeVmsa(NEW_VMSA)
            ]
        );
        let page = world.machine.page(NEW_VMSA);
        assert!(page.vmsa && !page.granted && page.validated);
        assert!(
            world.machine.page(NEW_AREA).granted,
            "both sides use a calling area"
        );
        for gpa in [NEW_VMSA, NEW_AREA] {
            assert_eq!(world.state(gpa), Some(PageState::Owned));
            for entry in [rescind_4k(gpa), validate_4k(gpa)] {
                let answer = world.nothing_changes(|| world.pvalidate(&[entry]));
                assert_eq!(answer, (ResultCode::INVALID_ADDRESS, 0));
            }
        }
        // Neither page can be used a second time.
        world.write_vmsa(GUEST, |_| {});
        for (vmsa, area) in [(NEW_VMSA, GUEST), (GUEST, NEW_AREA), (GUEST, NEW_VMSA)] {
            let (call, arguments) = create(vmsa, area, 0);
            assert_eq!(world.core(call, arguments), ResultCode::INVALID_ADDRESS);
        }
    });
}

#[test]
fn a_bad_vmsa_is_refused_and_given_back_as_it_was() {
    in_world(|world| {
        let spoils: [fn(&mut protocols::vmsa::Vmsa); 6] = [
            |vmsa| vmsa.vmpl = 0,
            |vmsa| vmsa.vmpl = 2,
            |vmsa| vmsa.vmpl = 0x81,
            |vmsa| vmsa.efer.remove(Efer::SVME),
            |vmsa| vmsa.sev_features = SevFeatures(0),
            |vmsa| vmsa.sev_features.insert(SevFeatures::REFLECT_VC),
        ];
        for (number, spoil) in spoils.into_iter().enumerate() {
            world.write_vmsa(NEW_VMSA, spoil);
            let content = world.machine.bytes(NEW_VMSA, 4096);
            let (call, arguments) = create(NEW_VMSA, NEW_AREA, 1);
            assert_eq!(
                world.core(call, arguments),
                ResultCode::INVALID_PARAMETER,
                "{number}"
            );
            for gpa in [NEW_VMSA, NEW_AREA] {
                assert_eq!(world.state(gpa), Some(PageState::Accepted));
                assert!(world.machine.page(gpa).granted && !world.machine.page(gpa).vmsa);
            }
            assert_eq!(world.machine.bytes(NEW_VMSA, 4096), content);
        }
    });
}

#[test]
fn bad_arguments_of_create_change_nothing() {
    in_world(|world| {
        world.write_vmsa(NEW_VMSA, |_| {});
        for (vmsa, area, apic_id, code) in [
            (NEW_VMSA + 8, NEW_AREA, 1, ResultCode::INVALID_PARAMETER),
            (NEW_VMSA, NEW_AREA + 1, 1, ResultCode::INVALID_PARAMETER),
            (0x20_0000, NEW_AREA, 1, ResultCode::INVALID_PARAMETER),
            (NEW_VMSA, NEW_AREA, 2, ResultCode::INVALID_PARAMETER),
            (
                NEW_VMSA,
                NEW_AREA,
                0xffff_ffff,
                ResultCode::INVALID_PARAMETER,
            ),
            (OWN_PAGE, NEW_AREA, 1, ResultCode::INVALID_ADDRESS),
            (VMSA, NEW_AREA, 1, ResultCode::INVALID_ADDRESS),
            (AREA, NEW_AREA, 1, ResultCode::INVALID_ADDRESS),
            (UNACCEPTED, NEW_AREA, 1, ResultCode::INVALID_ADDRESS),
            (END + 0x1000, NEW_AREA, 1, ResultCode::INVALID_ADDRESS),
        ] {
            let (call, arguments) = create(vmsa, area, apic_id);
            let answer = world.nothing_changes(|| world.core(call, arguments));
            assert_eq!(answer, code, "{vmsa:#x} {area:#x} {apic_id:#x}");
        }
        // A bad calling area is found when the VMSA is taken already.
        world.accept_page_0();
        for area in [OWN_PAGE, VMSA, AREA, UNACCEPTED, END, NEW_VMSA, 0] {
            let (call, arguments) = create(NEW_VMSA, area, 1);
            assert_eq!(
                world.core(call, arguments),
                ResultCode::INVALID_ADDRESS,
                "{area:#x}"
            );
            assert_eq!(world.state(NEW_VMSA), Some(PageState::Accepted));
            assert!(world.machine.page(NEW_VMSA).granted);
        }
    });
}

#[test]
fn a_create_that_fails_late_gives_both_pages_back() {
    in_world(|world| {
        world.write_vmsa(NEW_VMSA, |_| {});
        let (call, arguments) = create(NEW_VMSA, NEW_AREA, 1);
        world.machine.adjust_fails.set(Some(1));
        assert_eq!(world.core(call, arguments), ResultCode::FAIL_INPUT);
        world.machine.room.set(0);
        assert_eq!(world.core(call, arguments), ResultCode::INVALID_REQUEST);
        world.machine.others_are_at_it.set(true);
        assert_eq!(world.core(call, arguments), ResultCode::BUSY);
        for gpa in [NEW_VMSA, NEW_AREA] {
            assert_eq!(world.state(gpa), Some(PageState::Accepted));
            assert!(world.machine.page(gpa).granted && !world.machine.page(gpa).vmsa);
        }
        world.machine.room.set(8);
        assert_eq!(world.core(call, arguments), ResultCode::SUCCESS);
        let vmsa = accept::Frame::containing(NEW_VMSA);
        assert!(world.machine.svme(vmsa), "and can be run");
    });
}

#[test]
fn i3_a_vmsa_is_not_made_while_somebody_may_still_write_to_it() {
    in_world(|world| {
        world.write_vmsa(NEW_VMSA, |_| {});
        let (call, arguments) = create(NEW_VMSA, NEW_AREA, 1);
        world.machine.flush_fails.set(1);
        assert_eq!(world.core(call, arguments), ResultCode::BUSY);
        for gpa in [NEW_VMSA, NEW_AREA] {
            assert_eq!(world.state(gpa), Some(PageState::Accepted));
            assert!(world.machine.page(gpa).granted && !world.machine.page(gpa).vmsa);
        }
        assert_eq!(world.core(call, arguments), ResultCode::SUCCESS);
    });
}

#[test]
fn a_deleted_vmsa_is_the_guest_s_again() {
    in_world(|world| {
        world.write_vmsa(NEW_VMSA, |_| {});
        let (call, arguments) = create(NEW_VMSA, NEW_AREA, 1);
        assert_eq!(world.core(call, arguments), ResultCode::SUCCESS);
        assert_eq!(
            world.core(CoreCall::DELETE_VCPU, [NEW_VMSA, 0, 0]),
            ResultCode::SUCCESS
        );
        for gpa in [NEW_VMSA, NEW_AREA] {
            assert_eq!(world.state(gpa), Some(PageState::Accepted));
            assert!(world.machine.page(gpa).granted && !world.machine.page(gpa).vmsa);
        }
        let again = world.core(CoreCall::DELETE_VCPU, [NEW_VMSA, 0, 0]);
        assert_eq!(again, ResultCode::INVALID_PARAMETER);
        assert_eq!(
            world.core(call, arguments),
            ResultCode::SUCCESS,
            "and can be used again"
        );
    });
}

#[test]
fn a_processor_is_made_anew_any_number_of_times_without_a_delete() {
    in_world(|world| {
        world.machine.room.set(3);
        let pair = |n: u64| (GUEST + n * 0x2000, GUEST + n * 0x2000 + 0x1000);
        for n in 0..20 {
            let (vmsa, area) = pair(n);
            world.write_vmsa(vmsa, |_| {});
            let (call, arguments) = create(vmsa, area, 1);
            assert_eq!(world.core(call, arguments), ResultCode::SUCCESS, "{n}");
        }
        // The newest are there, the others are the guest's again, without the attribute.
        for n in 0..20 {
            let (vmsa, area) = pair(n);
            let kept = n >= 17;
            let state = if kept {
                PageState::Owned
            } else {
                PageState::Accepted
            };
            assert_eq!(
                (world.state(vmsa), world.state(area)),
                (Some(state), Some(state))
            );
            assert_eq!(world.machine.page(vmsa).vmsa, kept, "{n}");
        }
        // Those that cannot go stay; the next younger one goes.
        world.machine.busy.borrow_mut().insert(pair(17).0);
        let (vmsa, area) = pair(20);
        world.write_vmsa(vmsa, |_| {});
        let (call, arguments) = create(vmsa, area, 1);
        assert_eq!(world.core(call, arguments), ResultCode::SUCCESS);
        assert_eq!(world.state(pair(17).0), Some(PageState::Owned));
        assert_eq!(world.state(pair(18).0), Some(PageState::Accepted));
        // And if none can go, nothing is made.
        world.machine.busy.borrow_mut().insert(pair(19).0);
        let (vmsa, area) = pair(21);
        world.write_vmsa(vmsa, |_| {});
        let (call, arguments) = create(vmsa, area, 1);
        assert_eq!(world.core(call, arguments), ResultCode::INVALID_REQUEST);
        assert_eq!(world.state(vmsa), Some(PageState::Accepted));
        world.machine.busy.borrow_mut().clear();
    });
}

#[test]
fn a_processor_is_started_anew_with_the_calling_area_it_has() {
    // What Linux does when a CPU comes back: a new VMSA, the old calling area, and the old VMSA
    // is deleted afterwards.
    in_world(|world| {
        const OTHER: u64 = GUEST + 0x7000;
        for vmsa in [NEW_VMSA, OTHER] {
            world.write_vmsa(vmsa, |_| {});
        }
        let make = |vmsa, apic_id| {
            let (call, arguments) = create(vmsa, NEW_AREA, apic_id);
            world.core(call, arguments)
        };
        assert_eq!(make(NEW_VMSA, 1), ResultCode::SUCCESS);
        // Not that of another processor, nor while it is in use, nor for a bad VMSA.
        assert_eq!(make(OTHER, 0), ResultCode::INVALID_ADDRESS);
        world.machine.busy.borrow_mut().insert(NEW_VMSA);
        assert_eq!(make(OTHER, 1), ResultCode::BUSY);
        world.machine.busy.borrow_mut().clear();
        world.write_vmsa(OTHER, |vmsa| vmsa.vmpl = 0);
        assert_eq!(make(OTHER, 1), ResultCode::INVALID_PARAMETER);
        assert_eq!(world.state(OTHER), Some(PageState::Accepted));
        assert_eq!(world.state(NEW_AREA), Some(PageState::Owned));
        // The old VMSA has it still: with it goes the area.
        let delete = |vmsa| world.core(CoreCall::DELETE_VCPU, [vmsa, 0, 0]);
        world.write_vmsa(OTHER, |_| {});
        assert_eq!(make(OTHER, 1), ResultCode::SUCCESS);
        assert_eq!(delete(NEW_VMSA), ResultCode::SUCCESS);
        assert_eq!(world.state(NEW_VMSA), Some(PageState::Accepted));
        assert_eq!(
            world.state(NEW_AREA),
            Some(PageState::Owned),
            "the new one's"
        );
        assert_eq!(delete(OTHER), ResultCode::SUCCESS);
        assert_eq!(world.state(NEW_AREA), Some(PageState::Accepted));
        assert_eq!(make(NEW_VMSA, 1), ResultCode::SUCCESS);
        assert_eq!(delete(NEW_VMSA), ResultCode::SUCCESS);
        assert_eq!(world.state(NEW_AREA), Some(PageState::Accepted));
    });
}

#[test]
fn what_cannot_be_deleted_is_told_apart() {
    in_world(|world| {
        world.write_vmsa(NEW_VMSA, |_| {});
        let (call, arguments) = create(NEW_VMSA, NEW_AREA, 1);
        assert_eq!(world.core(call, arguments), ResultCode::SUCCESS);
        world.machine.busy.borrow_mut().insert(NEW_VMSA);
        for (gpa, code) in [
            (NEW_VMSA + 1, ResultCode::INVALID_PARAMETER),
            (VMSA, ResultCode::INVALID_PARAMETER),
            (GUEST, ResultCode::INVALID_PARAMETER),
            (OWN_PAGE, ResultCode::INVALID_PARAMETER),
            (END, ResultCode::INVALID_PARAMETER),
            (NEW_VMSA, ResultCode::FAIL_IN_USE),
        ] {
            let answer = world.nothing_changes(|| world.core(CoreCall::DELETE_VCPU, [gpa, 0, 0]));
            assert_eq!(answer, code, "{gpa:#x}");
        }
        world.machine.busy.borrow_mut().clear();
        // The hardware has the last word.
        world.machine.adjust_fails.set(Some(3));
        let code = world.core(CoreCall::DELETE_VCPU, [NEW_VMSA, 0, 0]);
        assert_eq!(code, ResultCode::FAIL_IN_USE);
        assert_eq!(world.state(NEW_VMSA), Some(PageState::Owned));
        assert_eq!(
            world.core(CoreCall::DELETE_VCPU, [NEW_VMSA, 0, 0]),
            ResultCode::SUCCESS
        );
    });
}

#[test]
fn a_processor_that_deletes_itself_does_not_return() {
    in_world(|world| {
        world.write_vmsa(NEW_VMSA, |_| {});
        let (call, arguments) = create(NEW_VMSA, NEW_AREA, 0);
        assert_eq!(world.core(call, arguments), ResultCode::SUCCESS);
        let registers = core_registers(CoreCall::DELETE_VCPU, [NEW_VMSA, 0, 0]);
        assert_eq!(world.call_raw(&registers), Answer::Gone);
        assert_eq!(world.state(NEW_VMSA), Some(PageState::Accepted));
    });
}

#[test]
fn i6_a_vmsa_that_vanishes_after_it_was_taken_ends_the_machine() {
    in_world(|world| {
        world.write_vmsa(NEW_VMSA, |_| {});
        let (call, arguments) = create(NEW_VMSA, NEW_AREA, 1);
        assert_eq!(world.core(call, arguments), ResultCode::SUCCESS);
        let page = world.machine.page(NEW_VMSA);
        world.machine.set_page(NEW_VMSA, Page::default());
        let registers = core_registers(CoreCall::DELETE_VCPU, [NEW_VMSA, 0, 0]);
        let answer = world.call_raw(&registers);
        assert_eq!(answer, Answer::Terminate(TurnstileReason::NOT_VALIDATED));
        world.machine.set_page(NEW_VMSA, page);
    });
}
