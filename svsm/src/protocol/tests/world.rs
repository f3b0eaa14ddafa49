//! The paravisor on the model, and a guest that calls it.

use std::cell::RefCell;

use accept::{Engine, Frame, GivenBack, Map, PageState, Range, Region, RegionLock, RegionLocks};
use protocols::exit_code::ExitCode;
use protocols::launch::Acceptance;
use protocols::svsm::{CallId, CoreCall, ResultCode};
use protocols::vmsa::{Efer, SevFeatures, Vmsa};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::model::{
    AREA, BOOT, END, Event, GUEST, GUEST_PAGES, LIST, Machine, OWN_PAGE, Page, REGIONS, VMSA,
};
use crate::ahead::Ahead;
use crate::attestation::tests::{Model, ToModel};
use crate::attestation::{self, Line};
use crate::protocol::{Answer, Registers, Service, VcpuIndex, Vcpus};

/// The paravisor, and what the tests look at.
pub struct World<'a> {
    pub machine: &'a Machine,
    pub engine: &'a Engine<'a, &'a Machine>,
    pub ahead: &'a Ahead,
    /// The security processor, and the host around it.
    pub firmware: &'a RefCell<Model>,
    pub line: &'a Line<ToModel<'a>>,
    service: Service<'a, &'a Machine, &'a Machine, &'a Machine, &'a Machine, ToModel<'a>>,
}

/// Runs `test` in a world whose guest has been started.
pub fn in_world(test: impl FnOnce(&World<'_>)) {
    in_world_that_accepts(Acceptance::LAZY, test);
}

/// The same, with memory accepted so.
pub fn in_world_that_accepts(acceptance: Acceptance, test: impl FnOnce(&World<'_>)) {
    let machine = &Machine::new();
    let regions: Vec<Region> = (1..REGIONS).map(|_| Region::new()).collect();
    let given_back = [GivenBack::new()];
    let range = Range::try_new(Frame::containing(0), END >> 12, &regions).unwrap();
    let ranges = [range.with_given_back(&given_back).unwrap()];
    let ahead = Ahead::new(acceptance, END);
    let locks: Vec<RegionLock> = (0..64).map(|_| RegionLock::new()).collect();
    let locks = RegionLocks::try_new(&locks).unwrap().with_spin_limit(3);
    let engine = &Engine::new(machine, Map::try_new(&ranges).unwrap(), locks);

    let launch = |gpa: u64, pages: u64, state, page| {
        engine
            .record_launch(Frame::starting_at(gpa).unwrap(), pages, state)
            .unwrap();
        (0..pages).for_each(|n| machine.set_page(gpa + (n << 12), page));
    };
    let own = Page {
        validated: true,
        ..Page::default()
    };
    launch(VMSA, 1, PageState::Owned, Page { vmsa: true, ..own });
    launch(
        AREA,
        1,
        PageState::Owned,
        Page {
            granted: true,
            ..own
        },
    );
    launch(OWN_PAGE, 1, PageState::Owned, own);
    launch(
        GUEST,
        GUEST_PAGES,
        PageState::Accepted,
        Page {
            granted: true,
            ..own
        },
    );

    let frame = |gpa| Frame::starting_at(gpa).unwrap();
    let area = engine
        .adopt(frame(AREA), accept::Role::CallingArea)
        .unwrap();
    machine.start_boot_processor(frame(VMSA), area);
    machine.fill(AREA, &[0; 4096]);

    let firmware = &RefCell::new(Model::new());
    let line = &attestation::tests::line(firmware);
    let world = World {
        machine,
        engine,
        ahead: &ahead,
        firmware,
        line,
        service: Service::new(engine, machine, machine, machine, &ahead, line),
    };
    test(&world);
    machine.assert_agrees(engine);
}

impl World<'_> {
    /// The processor stops with these registers, whatever is in the calling area.
    pub fn exit(&self, exit: ExitCode, registers: &Registers) -> Answer {
        self.exit_on(BOOT, exit, registers)
    }

    /// The same on another processor.
    pub fn exit_on(&self, vcpu: VcpuIndex, exit: ExitCode, registers: &Registers) -> Answer {
        self.service.handle(vcpu, exit, registers)
    }

    /// The guest's side of a call: pending flag, call, and what is left of the flag.
    pub fn call_raw(&self, registers: &Registers) -> Answer {
        let area = (&self.machine)
            .calling_area(BOOT)
            .expect("the boot processor has one")
            .gpa();
        self.machine.fill(area, &[1]);
        let answer = self.exit(ExitCode::VMGEXIT, registers);
        if let Answer::Return(_) = answer {
            let area = (&self.machine)
                .calling_area(BOOT)
                .expect("still has one")
                .gpa();
            assert_eq!(self.machine.bytes(area, 1), [0], "the call was executed");
        }
        answer
    }

    /// A call that must come back.
    pub fn call(&self, registers: Registers) -> (ResultCode, Registers) {
        match self.call_raw(&registers) {
            Answer::Return(answer) => {
                let code = ResultCode::decode(answer.rax);
                (
                    code,
                    Registers {
                        rax: registers.rax,
                        ..answer
                    },
                )
            }
            other => panic!("{other:?}"),
        }
    }

    /// A core call whose registers do not change; its result.
    pub fn core(&self, call: CoreCall, arguments: [u64; 3]) -> ResultCode {
        let registers = core_registers(call, arguments);
        let (code, after) = self.call(registers);
        assert_eq!(after, registers, "registers are preserved");
        code
    }

    /// Writes a list and passes it; the result and `next`.
    pub fn pvalidate_at(&self, list: u64, next: u16, entries: &[u64]) -> (ResultCode, u16) {
        self.write_list(list, entries.len() as u16, next, entries);
        self.pvalidate_again(list)
    }

    /// Passes a list in the calling area from its beginning.
    pub fn pvalidate(&self, entries: &[u64]) -> (ResultCode, u16) {
        self.pvalidate_at(LIST, 0, entries)
    }

    /// Passes the list that is there already.
    pub fn pvalidate_again(&self, list: u64) -> (ResultCode, u16) {
        let code = self.core(CoreCall::PVALIDATE, [list, 0, 0]);
        (code, self.next_of(list))
    }

    pub fn next_of(&self, list: u64) -> u16 {
        u16::read_from_bytes(&self.machine.bytes(list + 2, 2)).unwrap()
    }

    pub fn write_list(&self, list: u64, count: u16, next: u16, entries: &[u64]) {
        self.machine.fill(list, &count.to_le_bytes());
        self.machine.fill(list + 2, &next.to_le_bytes());
        self.machine.fill(list + 4, &[0; 4]);
        self.machine.fill(list + 8, entries.as_bytes());
    }

    pub fn state(&self, gpa: u64) -> Option<PageState> {
        self.engine.state(Frame::containing(gpa))
    }

    /// `act` changes no state and executes nothing.
    pub fn nothing_changes<T>(&self, act: impl FnOnce() -> T) -> T {
        let states = || {
            (0..END >> 12)
                .map(|n| self.state(n << 12))
                .collect::<Vec<_>>()
        };
        let pages = || self.machine.pages();
        let before = (states(), pages());
        self.machine.take_log();
        let result = act();
        let events = self.machine.take_log();
        assert!(
            events.iter().all(|e| matches!(e, Event::WriteNext(_))),
            "{events:?}"
        );
        assert!((states(), pages()) == before, "a state changed");
        result
    }

    /// The guest has the first page of memory.
    pub fn accept_page_0(&self) {
        let page = accept::Block::page(Frame::containing(0));
        self.engine
            .accept(page, accept::OnNoChange::Fail)
            .expect("accepted");
    }

    /// A page of the guest that holds a VMSA which would be taken, changed by `spoil`.
    pub fn write_vmsa(&self, gpa: u64, spoil: impl FnOnce(&mut Vmsa)) {
        let mut vmsa = Vmsa::new_zeroed();
        vmsa.vmpl = 1;
        vmsa.efer = Efer::SVME;
        vmsa.sev_features = SevFeatures::SNP_ACTIVE;
        spoil(&mut vmsa);
        self.machine.fill(gpa, vmsa.as_bytes());
    }
}

pub fn core_registers(call: CoreCall, [rcx, rdx, r8]: [u64; 3]) -> Registers {
    Registers {
        rax: CallId::core(call).encode(),
        rcx,
        rdx,
        r8,
        r9: 0x99,
    }
}

/// Entries of a list.
pub fn validate_4k(gpa: u64) -> u64 {
    gpa | 4
}
pub fn validate_2m(gpa: u64) -> u64 {
    gpa | 5
}
pub fn rescind_4k(gpa: u64) -> u64 {
    gpa
}
pub fn rescind_2m(gpa: u64) -> u64 {
    gpa | 1
}
/// The same entry with "no change is success".
pub fn ignoring(entry: u64) -> u64 {
    entry | 8
}
