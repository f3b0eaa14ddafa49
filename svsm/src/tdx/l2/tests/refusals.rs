//! What the guest is told when the module refuses the paravisor: what it would be told itself.

use super::*;

const BUSY: u64 = Status::OPERAND_BUSY.with(Operand::RCX.0);

/// I12 (facts: tdx §2, statuses): with its operand, and never as the host's right of way, which the module
/// keeps to itself.
#[test]
fn a_page_that_stays_busy_is_busy_to_the_guest() {
    let (sept, model) = (Sept::default(), Model::default());
    with(&sept, &model, Touch::FAULT, |service, vp| {
        for (status, told) in [
            (Status::OPERAND_BUSY, BUSY),
            (Status::OPERAND_BUSY_HOST_PRIORITY, BUSY),
            (Status::OPERAND_INVALID, Operand::RCX.invalid()),
            (Status(0xC000_0FFF), Operand::RCX.invalid()),
        ] {
            sept.accept_fails.set(Some(status));
            for rcx in [0x20_1000, 0x40_0001] {
                assert_eq!(accept(service, vp, rcx), told, "{status:?} {rcx:#x}");
            }
        }
        assert!(sept.accepted.borrow().is_empty());
        sept.accept_fails.set(None);
        assert_eq!(accept(service, vp, 0x20_1000), 0);
        assert_eq!(accept(service, vp, 0x40_0001), 0);
    });
}

/// To the guest there is no grant: the page is not its yet, and becomes so when it asks again. It is not
/// accepted a second time for that (I2).
#[test]
fn a_page_that_is_accepted_but_not_given_is_busy() {
    let (sept, model) = (Sept::default(), Model::default());
    with(&sept, &model, Touch::FAULT, |service, vp| {
        for (status, rcx) in [
            (Status::PAGE_ATTR_INVALID, 0x20_1000),
            (Status::OPERAND_BUSY_HOST_PRIORITY, 0x40_0001),
        ] {
            sept.grant_fails.set(Some(status));
            assert_eq!(accept(service, vp, rcx), BUSY, "{status:?}");
            sept.grant_fails.set(None);
            assert_eq!(accept(service, vp, rcx), 0, "{status:?}");
        }
        assert_eq!(*sept.accepted.borrow(), [0x20_1000, 0x40_0000]);
    });
}
