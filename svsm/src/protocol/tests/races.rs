//! What another processor can do in the middle of a call.

use std::cell::Cell;

use accept::{Error, Frame, OnNoChange, Role};
use protocols::addr::Gpa;
use protocols::exit_code::ExitCode;
use protocols::svsm::{CoreCall, ResultCode};

use super::model::{AREA, BOOT, GUEST, LIST, Machine};
use super::world::{core_registers, in_world, rescind_4k, validate_4k};
use crate::protocol::{Answer, GuestMemory, Registers, Service, Unreachable};

const PAGE: u64 = 0x60_5000;

fn frame(gpa: u64) -> Frame {
    Frame::containing(gpa)
}

/// Guest memory that another processor acts on at the moment of a write.
struct Interrupted<'a, F> {
    inner: &'a Machine,
    act: F,
}

impl<F: Fn()> GuestMemory for Interrupted<'_, F> {
    fn read_u8(&self, gpa: Gpa) -> Result<u8, Unreachable> {
        self.inner.read_u8(gpa)
    }
    fn read_u64(&self, gpa: Gpa) -> Result<u64, Unreachable> {
        self.inner.read_u64(gpa)
    }
    fn write_u8(&self, gpa: Gpa, value: u8) -> Result<(), Unreachable> {
        self.inner.write_u8(gpa, value)
    }
    fn write_u16(&self, gpa: Gpa, value: u16) -> Result<(), Unreachable> {
        (self.act)();
        self.inner.write_u16(gpa, value)
    }
    fn read_bytes(&self, gpa: Gpa, bytes: &mut [u8]) -> Result<(), Unreachable> {
        self.inner.read_bytes(gpa, bytes)
    }
    fn write_bytes(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), Unreachable> {
        (self.act)();
        self.inner.write_bytes(gpa, bytes)
    }
}

#[test]
fn a_list_s_page_cannot_become_a_vmsa_while_the_result_is_written() {
    // The attack: the index is written at an offset that the guest chose, into a page that has
    // become a VMSA since it was found good.
    in_world(|world| {
        let attempt = Cell::new(None);
        let memory = Interrupted {
            inner: world.machine,
            act: || attempt.set(Some(world.engine.take(frame(GUEST), Role::Vmsa).map(drop))),
        };
        let service = Service::new(
            world.engine,
            memory,
            world.machine,
            world.machine,
            world.ahead,
            world.line,
        );
        world.write_list(GUEST, 1, 0, &[validate_4k(PAGE)]);
        world.machine.fill(AREA, &[1]);
        let registers = core_registers(CoreCall::PVALIDATE, [GUEST, 0, 0]);
        let answer = service.handle(BOOT, ExitCode::VMGEXIT, &registers);
        assert!(
            matches!(answer, Answer::Return(Registers { rax: 0, .. })),
            "{answer:?}"
        );
        assert_eq!(world.next_of(GUEST), 1);
        assert_eq!(
            attempt.get(),
            Some(Err(Error::Busy)),
            "the page was locked meanwhile"
        );
    });
}

#[test]
fn a_locked_region_is_busy_at_first_and_incomplete_later() {
    in_world(|world| {
        let block = accept::Block::page(frame(PAGE));
        world.engine.accept(block, OnNoChange::Fail).unwrap();
        let list = [validate_4k(PAGE + 0x1000)];
        let answer = world
            .engine
            .while_accepted(frame(PAGE), || world.pvalidate(&list))
            .unwrap();
        assert_eq!(answer, (ResultCode::BUSY, 0));

        let list = [rescind_4k(GUEST), validate_4k(PAGE + 0x1000)];
        let answer = world
            .engine
            .while_accepted(frame(PAGE), || world.pvalidate(&list))
            .unwrap();
        assert_eq!(
            answer,
            (ResultCode::INCOMPLETE, 1),
            "what is done is not done again"
        );
        assert_eq!(world.pvalidate_again(LIST), (ResultCode::SUCCESS, 2));
    });
}

#[test]
fn a_list_in_a_locked_region_is_busy() {
    in_world(|world| {
        let answer = world
            .engine
            .while_accepted(frame(GUEST), || {
                world.pvalidate_at(GUEST + 0x1000, 0, &[validate_4k(PAGE)])
            })
            .unwrap();
        assert_eq!(answer, (ResultCode::BUSY, 0));
    });
}
