//! The service on a trust domain that is a model: what the guest is answered, and what its answers cost.

use std::cell::{Cell, RefCell};

use std::boxed::Box;
use std::vec::Vec;

use accept::{
    AdjustFault, Backend, Block, Engine, Fault, Frame, GivenBack, Map, NotFlushed, PageState,
    Range, Region, RegionLock, RegionLocks, ValidateFault,
};
use protocols::addr::Gpa;
use protocols::launch::{Acceptance, Touch};
use protocols::tdx::l2::{EnterState, Exit};
use protocols::tdx::metadata::{FieldId, TdControls};
use protocols::tdx::ve::{EptViolation, ExitReason};
use protocols::tdx::vmcall::register::{R8, R9, R10, R11, R12, R13, RAX, RCX, RDX};
use protocols::tdx::vmcall::{Status as HostStatus, SubFunction};
use protocols::tdx::{Leaf, Operand, Status, TdAttributes};
use protocols::terminate::TurnstileReason;

use super::interrupts::VirtualApic;
use super::memory::CONVERTED_AT_ONCE;
use super::vp::Vp;
use super::{
    Domain, GuestTd, HostRegisters, MEASUREMENT, Mapping, Next, REPORT, REPORT_DATA, Service,
    Unreachable,
};
use crate::ahead::Ahead;

mod exits;
mod policies;
mod refusals;

const SHARED: u64 = 1 << 47;
/// Regions of the model's memory, from address 0. The last one is the paravisor's.
const REGIONS: usize = 20;
const OWNED: u64 = (REGIONS as u64 - 1) << 21;
const TDCALL_LENGTH: u64 = 4;

/// Accepts everything, once.
#[derive(Default)]
struct Sept {
    lies: bool,
    /// No flush is certain.
    others_stay: Cell<bool>,
    /// What the module answers to an accept, to a grant; done without.
    accept_fails: Cell<Option<Status>>,
    grant_fails: Cell<Option<Status>>,
    accepted: RefCell<Vec<u64>>,
}

impl Backend for &Sept {
    const HOST_REMOVES: bool = true;
    fn validate(&self, block: Block) -> Result<(), ValidateFault> {
        if self.lies {
            return Err(ValidateFault::AlreadyDone);
        }
        if let Some(status) = self.accept_fails.get() {
            return Err(ValidateFault::Failed(status.0));
        }
        self.accepted.borrow_mut().push(block.gpa());
        Ok(())
    }
    fn rescind(&self, _: Block) -> Result<(), ValidateFault> {
        Err(ValidateFault::Failed(0))
    }
    fn scrub(&self, _: Block) -> Result<(), Fault> {
        Ok(())
    }
    fn grant(&self, _: Block) -> Result<(), AdjustFault> {
        match self.grant_fails.get() {
            Some(status) => Err(AdjustFault::Failed(status.0)),
            None => Ok(()),
        }
    }
    fn revoke(&self, _: Block) -> Result<(), AdjustFault> {
        Ok(())
    }
    fn flush(&self) -> Result<(), NotFlushed> {
        match self.others_stay.get() {
            true => Err(NotFlushed),
            false => Ok(()),
        }
    }
}

/// Module, host and memory: what was asked of the host, and what it says.
struct Model<H = fn()> {
    asked: RefCell<Vec<HostRegisters>>,
    fatal: RefCell<Vec<([u64; 2], [u64; 8])>>,
    /// R10 and R11 of its answers.
    answer: (HostStatus, u64),
    mapping: Mapping,
    /// What others do while the host is asked.
    meanwhile: H,
}

impl Default for Model {
    fn default() -> Self {
        Self {
            asked: RefCell::default(),
            fatal: RefCell::default(),
            answer: (HostStatus::SUCCESS, 0),
            mapping: Mapping {
                level: 0,
                pending: false,
            },
            meanwhile: || (),
        }
    }
}

impl<H: Fn()> Domain for &Model<H> {
    fn shared_bit(&self) -> u64 {
        SHARED
    }
    fn info(&self) -> [u64; 5] {
        [48, 0, 2 << 32 | 2, 0, 1]
    }
    fn cpuid(&self, leaf: u32, _: u32) -> Option<[u32; 4]> {
        (leaf < 0x4000_0000).then_some([leaf, 1, 2, 3])
    }
    fn read_vm(&self, _: FieldId) -> Result<u64, Status> {
        Ok(2)
    }
    fn read_sys(&self, _: FieldId) -> Result<u64, Status> {
        Ok(u64::MAX)
    }
    fn mapping(&self, _: Gpa) -> Result<Mapping, Status> {
        Ok(self.mapping)
    }
    fn report(&self, _: &[u8; REPORT_DATA]) -> Result<[u8; REPORT], Status> {
        Ok([7; REPORT])
    }
    fn extend(&self, _: u64, _: &[u8; MEASUREMENT]) -> Status {
        Status::SUCCESS
    }
    fn ask_host(&self, registers: HostRegisters) -> Result<HostRegisters, Status> {
        self.asked.borrow_mut().push(registers);
        (self.meanwhile)();
        let [_, _, rest @ ..] = registers;
        let [r12, r13, r14, r15] = rest;
        Ok([self.answer.0.0, self.answer.1, r12, r13, r14, r15])
    }
    fn report_fatal_error(&self, operands: [u64; 2], text: [u64; 8]) {
        self.fatal.borrow_mut().push((operands, text));
    }
    fn read(&self, _: Gpa, _: &mut [u8]) -> Result<(), Unreachable> {
        Ok(())
    }
    fn write(&self, _: Gpa, _: &[u8]) -> Result<(), Unreachable> {
        Ok(())
    }
}

type TestService<'a> = Service<'a, &'a Sept, &'a Model>;

fn with<T>(
    sept: &Sept,
    model: &Model,
    touch: Touch,
    test: impl FnOnce(&TestService<'_>, &mut Vp) -> T,
) -> T {
    let acceptance = Acceptance {
        touch,
        ..Acceptance::LAZY
    };
    with_policy(sept, model, acceptance, test)
}

fn with_policy<T>(
    sept: &Sept,
    model: &Model,
    acceptance: Acceptance,
    test: impl FnOnce(&TestService<'_>, &mut Vp) -> T,
) -> T {
    let regions: Vec<Region> = (0..REGIONS).map(|_| Region::new()).collect();
    let flags = [const { GivenBack::new() }; 1];
    let range = Range::try_new(Frame::containing(0), REGIONS as u64 * 512, &regions).unwrap();
    let ranges = [range.with_given_back(&flags).unwrap()];
    let locks: Vec<RegionLock> = (0..RegionLocks::MINIMUM)
        .map(|_| RegionLock::new())
        .collect();
    let map = Map::try_new(&ranges).unwrap();
    let engine = Engine::new(sept, map, RegionLocks::try_new(&locks).unwrap());
    engine
        .record_launch(Frame::containing(OWNED), 512, PageState::Owned)
        .unwrap();
    let td = GuestTd::new(TdAttributes::empty());
    let ahead = Ahead::new(acceptance, (REGIONS as u64) << 21);
    let service = Service {
        engine: &engine,
        ahead: &ahead,
        domain: model,
        td: &td,
        touch: acceptance.touch,
    };
    let apic = Box::leak(Box::new(VirtualApic::new()));
    let mut vp = Vp::new(1, EnterState::default(), apic, 0x1FF);
    test(&service, &mut vp)
}

/// TDCALL from 64-bit code.
fn tdcall<D: Domain>(
    service: &Service<'_, &Sept, D>,
    vp: &mut Vp,
    registers: &[(usize, u64)],
) -> Next {
    for &(register, value) in registers {
        vp.gprs()[register] = value;
    }
    let exit = Exit {
        cs: 1 << 29,
        instruction: TDCALL_LENGTH << 32,
        ..Exit::new(ExitReason::TDCALL)
    };
    service.handle(vp, &exit)
}

fn call<D: Domain>(
    service: &Service<'_, &Sept, D>,
    vp: &mut Vp,
    leaf: Leaf,
    registers: &[(usize, u64)],
) -> u64 {
    vp.gprs()[RAX] = leaf.0.into();
    let rip = vp.state.rip;
    assert_eq!(tdcall(service, vp, registers), Next::Resume);
    assert_eq!(vp.state.rip, rip + TDCALL_LENGTH, "the leaf completes");
    vp.gprs()[RAX]
}

fn accept<D: Domain>(service: &Service<'_, &Sept, D>, vp: &mut Vp, rcx: u64) -> u64 {
    call(service, vp, Leaf::MEM_PAGE_ACCEPT, &[(RCX, rcx)])
}

/// R10, R11 of a request, or the end.
fn ask<D: Domain>(
    service: &Service<'_, &Sept, D>,
    vp: &mut Vp,
    function: SubFunction,
    operands: [u64; 2],
) -> Result<(HostStatus, u64), TurnstileReason> {
    let registers = [
        (RAX, 0),
        (RCX, 0xFC00),
        (R10, 0),
        (R11, function.0),
        (R12, operands[0]),
        (R13, operands[1]),
    ];
    match tdcall(service, vp, &registers) {
        Next::End(reason) => Err(reason),
        _ => Ok((HostStatus(vp.gprs()[R10]), vp.gprs()[R11])),
    }
}

/// I2, I4: what is accepted or the paravisor's never reaches the instruction.
#[test]
fn an_accept_reaches_the_module_once_and_for_the_guests_memory_only() {
    let (sept, model) = (Sept::default(), Model::default());
    with(&sept, &model, Touch::FAULT, |service, vp| {
        assert_eq!(accept(service, vp, 0x20_1000), 0);
        assert_eq!(*sept.accepted.borrow(), [0x20_1000]);
        let already = Status::PAGE_ALREADY_ACCEPTED.with(0);
        assert_eq!(accept(service, vp, 0x20_1000), already);
        assert_eq!(
            accept(service, vp, 0x20_0001),
            Status::PAGE_SIZE_MISMATCH.with(1)
        );
        for rcx in [
            OWNED,
            OWNED | 1,
            OWNED + (2 << 20),
            SHARED | 0x1000,
            1 << 48,
            1 << 52,
            0x1008,
            0x1002,
            0x20_1001,
            u64::MAX,
        ] {
            assert_eq!(accept(service, vp, rcx), Operand::RCX.invalid(), "{rcx:#x}");
        }
        assert_eq!(sept.accepted.borrow().len(), 1);
    });
}

#[test]
fn a_block_that_is_mapped_at_once_is_already_accepted_at_its_level() {
    let sept = Sept::default();
    let model = Model {
        mapping: Mapping {
            level: 1,
            pending: false,
        },
        ..Model::default()
    };
    with(&sept, &model, Touch::FAULT, |service, vp| {
        assert_eq!(accept(service, vp, 0x20_0001), 0);
        let already = Status::PAGE_ALREADY_ACCEPTED.with(1);
        assert_eq!(accept(service, vp, 0x20_0001), already);
        assert_eq!(accept(service, vp, 0x20_3000), already);
    });
}

/// I5.
#[test]
fn a_page_that_was_accepted_behind_our_back_ends_the_machine() {
    let (sept, model) = (
        Sept {
            lies: true,
            ..Sept::default()
        },
        Model::default(),
    );
    with(&sept, &model, Touch::FAULT, |service, vp| {
        let registers = [(RAX, Leaf::MEM_PAGE_ACCEPT.0.into()), (RCX, 0x1000)];
        let next = tdcall(service, vp, &registers);
        assert_eq!(next, Next::End(TurnstileReason::ALREADY_VALID));
    });
}

/// The map changes before the host is asked, and the page can be accepted again afterwards.
#[test]
fn what_becomes_shared_leaves_the_map_first() {
    let (sept, model) = (Sept::default(), Model::default());
    with(&sept, &model, Touch::FAULT, |service, vp| {
        assert_eq!(accept(service, vp, 0x20_0000), 0);
        let done = ask(
            service,
            vp,
            SubFunction::MAP_GPA,
            [SHARED | 0x20_0000, 0x2000],
        );
        assert_eq!(done, Ok((HostStatus::SUCCESS, 0)));
        let state = service.engine.state(Frame::containing(0x20_0000));
        assert_eq!(state, Some(PageState::Unaccepted));
        let asked: Vec<_> = model.asked.borrow().iter().map(|r| (r[2], r[3])).collect();
        assert_eq!(
            asked,
            [(SHARED | 0x20_0000, 0x1000), (SHARED | 0x20_1000, 0x1000)]
        );
        let done = ask(service, vp, SubFunction::MAP_GPA, [0x20_0000, 0x2000]);
        assert_eq!(done, Ok((HostStatus::SUCCESS, 0)));
        assert_eq!(accept(service, vp, 0x20_0000), 0);
    });
}

/// I2, I11: while the host is asked to take a block, nobody else can have it, be it accepted or not.
#[test]
fn what_is_on_its_way_to_the_host_is_nobodys() {
    let (sept, quiet) = (Sept::default(), Model::default());
    with(&sept, &quiet, Touch::FAULT, |service, vp| {
        assert_eq!(accept(service, vp, 0x20_0000), 0);
        let apic = Box::leak(Box::new(VirtualApic::new()));
        let other = RefCell::new(Vp::new(0, EnterState::default(), apic, 0x1FF));
        let answers = RefCell::new(Vec::new());
        let racing = Model {
            asked: RefCell::default(),
            fatal: RefCell::default(),
            answer: quiet.answer,
            mapping: quiet.mapping,
            meanwhile: || {
                let mut other = other.borrow_mut();
                let accepts = [0x20_0000, 0x20_1000].map(|gpa| accept(service, &mut other, gpa));
                let converted = [0, SHARED].map(|alias| {
                    let range = [alias | 0x20_0000, 0x2000];
                    ask(service, &mut other, SubFunction::MAP_GPA, range)
                });
                answers.borrow_mut().push((accepts, converted));
            },
        };
        let service = Service {
            engine: service.engine,
            ahead: service.ahead,
            domain: &racing,
            td: service.td,
            touch: service.touch,
        };
        let range = [SHARED | 0x20_0000, 2 << 20];
        let done = ask(&service, vp, SubFunction::MAP_GPA, range);
        assert_eq!(done, Ok((HostStatus::SUCCESS, 0)));
        let refused = Operand::RCX.invalid();
        let invalid = Ok((HostStatus::INVALID_OPERAND, 0));
        let [(accepts, [to_private, to_shared])] = answers.borrow()[..] else {
            panic!("the host is asked once");
        };
        assert_eq!(accepts, [refused; 2]);
        let status = |answer: Result<(HostStatus, u64), _>| answer.map(|(status, _)| (status, 0));
        assert_eq!([status(to_private), status(to_shared)], [invalid; 2]);
        assert_eq!(sept.accepted.borrow().len(), 1);
        assert!(quiet.asked.borrow().is_empty());
    });
}

/// I3, I12: no flush, no conversion; the guest has its pages as before and may ask again.
#[test]
fn without_a_flush_nothing_has_changed() {
    let (sept, model) = (Sept::default(), Model::default());
    with(&sept, &model, Touch::FAULT, |service, vp| {
        assert_eq!(accept(service, vp, 0x20_0000), 0);
        sept.others_stay.set(true);
        let range = [SHARED | 0x20_0000, 0x2000];
        let mut answer = ask(service, vp, SubFunction::MAP_GPA, range);
        assert_eq!(answer, Ok((HostStatus::RETRY, SHARED | 0x20_0000)));
        assert!(model.asked.borrow().is_empty());
        let state = |gpa| service.engine.state(Frame::containing(gpa));
        assert_eq!(state(0x20_0000), Some(PageState::Accepted));
        assert_eq!(state(0x20_1000), Some(PageState::Unaccepted));
        sept.others_stay.set(false);
        answer = ask(service, vp, SubFunction::MAP_GPA, range);
        assert_eq!(answer, Ok((HostStatus::SUCCESS, 0)));
        assert_eq!(state(0x20_0000), Some(PageState::Unaccepted));
    });
}

#[test]
fn bad_ranges_are_not_passed_on() {
    let (sept, model) = (Sept::default(), Model::default());
    with(&sept, &model, Touch::FAULT, |service, vp| {
        let (invalid, align) = (HostStatus::INVALID_OPERAND, HostStatus::ALIGN_ERROR);
        for (start, bytes, status) in [
            (SHARED | OWNED, 0x1000, invalid),
            (OWNED, 0x1000, invalid),
            (OWNED + (2 << 20), 0x1000, invalid),
            (0x1000, 0, invalid),
            (0x1000, u64::MAX, invalid),
            (SHARED - 0x1000, 0x2000, invalid),
            (SHARED << 1, 0x1000, invalid),
            (0x1001, 0x1000, align),
            (0x1000, 0x1001, align),
        ] {
            let answer = ask(service, vp, SubFunction::MAP_GPA, [start, bytes]);
            assert_eq!(
                answer.map(|(status, _)| status),
                Ok(status),
                "{start:#x}+{bytes:#x}"
            );
        }
        assert!(model.asked.borrow().is_empty());
    });
}

/// I8: the work of one request is bounded, and the answer says how far it came.
#[test]
fn a_large_conversion_is_done_in_parts() {
    let (sept, model) = (Sept::default(), Model::default());
    with(&sept, &model, Touch::FAULT, |service, vp| {
        let all = OWNED;
        let answer = ask(service, vp, SubFunction::MAP_GPA, [SHARED, all]);
        assert_eq!(answer, Ok((HostStatus::RETRY, SHARED | CONVERTED_AT_ONCE)));
        assert_eq!(model.asked.borrow().len() as u64, CONVERTED_AT_ONCE >> 21);
    });
}

/// I7: a host that says RETRY for ever ends the machine; one that refuses to take pages as well.
#[test]
fn a_host_that_does_not_convert_ends_the_machine() {
    let sept = Sept::default();
    for status in [HostStatus::RETRY, HostStatus::GPA_IN_USE] {
        let model = Model {
            answer: (status, SHARED | 0x1000),
            ..Model::default()
        };
        with(&sept, &model, Touch::FAULT, |service, vp| {
            let answer = ask(service, vp, SubFunction::MAP_GPA, [SHARED | 0x1000, 0x1000]);
            assert_eq!(answer, Err(TurnstileReason::TD_MAP_GPA));
        });
        assert!(model.asked.borrow().len() < 2000);
    }
    // To private nothing has changed: the guest hears the host's answer.
    let model = Model {
        answer: (HostStatus::GPA_IN_USE, 0),
        ..Model::default()
    };
    with(&sept, &model, Touch::FAULT, |service, vp| {
        let answer = ask(service, vp, SubFunction::MAP_GPA, [0x1000, 0x1000]);
        assert_eq!(answer, Ok((HostStatus::GPA_IN_USE, 0x1000)));
    });
}

/// All 64 bytes of the text, in their order, of what is passed.
#[test]
fn a_fatal_error_is_told_with_its_whole_text() {
    let (sept, model) = (Sept::default(), Model::default());
    with(&sept, &model, Touch::FAULT, |service, vp| {
        // All, then all but RSI and R8.
        for passed in [0xFFCC, 0xFFCC & !(1 << 6 | 1 << 8)] {
            let mut registers: [(usize, u64); 16] =
                core::array::from_fn(|register| (register, 0x100 + register as u64));
            registers[RAX].1 = 0;
            registers[RCX].1 = passed;
            registers[R10].1 = 0;
            registers[R11].1 = SubFunction::REPORT_FATAL_ERROR.0;
            assert_eq!(tdcall(service, vp, &registers), Next::Resume);
        }
        let told = model.fatal.borrow();
        let operands = [0x10C, 0x10D];
        let text = [0x10E, 0x10F, 0x103, 0x107, 0x106, 0x108, 0x109, 0x102];
        assert_eq!(told[0], (operands, text));
        let text = [0x10E, 0x10F, 0x103, 0x107, 0, 0, 0x109, 0x102];
        assert_eq!(told[1], (operands, text));
        assert!(model.asked.borrow().is_empty());
    });
}

#[test]
fn the_host_sees_what_the_guest_passes_and_nothing_else() {
    let (sept, model) = (Sept::default(), Model::default());
    with(&sept, &model, Touch::FAULT, |service, vp| {
        let function = SubFunction::IO.0;
        let registers = [
            (RAX, 0),
            (RCX, 0x3C00),
            (R10, 0),
            (R11, function),
            (R12, 1),
            (R13, 2),
        ];
        vp.gprs()[14] = 0x5EC2;
        assert_eq!(tdcall(service, vp, &registers), Next::Resume);
        assert_eq!(*model.asked.borrow(), [[0, function, 1, 2, 0, 0]]);
        assert_eq!(vp.gprs()[14], 0x5EC2);
        // What nobody knows is not passed on.
        for (r10, r11) in [(9, 0), (0, 0x1_0FFF), (0, 0x1_0004)] {
            let registers = [(RAX, 0), (RCX, 0xFC00), (R10, r10), (R11, r11)];
            assert_eq!(tdcall(service, vp, &registers), Next::Resume);
            let unsupported = HostStatus::SUBFUNCTION_UNSUPPORTED.0;
            let wanted = if r10 == 0 {
                unsupported
            } else {
                (-1000_i64).cast_unsigned()
            };
            assert_eq!(vp.gprs()[R10], wanted);
        }
        assert_eq!(model.asked.borrow().len(), 1);
        let halted = tdcall(
            service,
            vp,
            &[(RAX, 0), (RCX, 0xFC00), (R10, 0), (R11, 0xC), (R12, 1)],
        );
        assert_eq!(halted, Next::Wait { blocked: true });
    });
}

fn touch(service: &TestService<'_>, vp: &mut Vp, gpa: u64) -> Next {
    let exit = Exit {
        gpa,
        extended: 6,
        ..Exit::new(ExitReason::EPT_VIOLATION)
    };
    service.handle(vp, &exit)
}

const VE: u32 = 0x8000_0314;
const DOUBLE_FAULT: u32 = 0x8000_0B08;
const GENERAL_PROTECTION: u32 = 0x8000_0B0D;
const INVALID_OPCODE: u32 = 0x8000_0306;
const PAGE_FAULT: u32 = 0x8000_0B0E;

fn injected(vp: &Vp) -> Option<u32> {
    vp.injection.map(|injection| injection.information)
}

#[test]
fn memory_that_is_not_accepted_is_a_fault_or_is_accepted() {
    let (sept, model) = (Sept::default(), Model::default());
    with(&sept, &model, Touch::FAULT, |service, vp| {
        assert_eq!(touch(service, vp, 0x3123), Next::Resume);
        assert_eq!(injected(vp), Some(VE));
        assert!(sept.accepted.borrow().is_empty());
        // A second one before the guest has asked for the first.
        assert_eq!(touch(service, vp, OWNED), Next::Resume);
        assert_eq!(injected(vp), Some(DOUBLE_FAULT));
        assert_eq!(call(service, vp, Leaf::VP_VEINFO_GET, &[]), 0);
        assert_eq!((vp.gprs()[RCX], vp.gprs()[R9]), (48, 0x3123));
        let none = Status::NO_VALID_VE_INFO.with(0);
        assert_eq!(call(service, vp, Leaf::VP_VEINFO_GET, &[]), none);
        let disable = TdControls::PENDING_VE_DISABLE.bits();
        let write = [
            (RCX, 0),
            (RDX, FieldId::TD_CTLS.0),
            (R8, disable),
            (R9, disable),
        ];
        assert_eq!(call(service, vp, Leaf::VM_WR, &write), 0);
        assert_eq!(
            touch(service, vp, 0x3000),
            Next::End(TurnstileReason::L2_MEMORY)
        );
    });
    with(&sept, &model, Touch::ACCEPT, |service, vp| {
        assert_eq!(touch(service, vp, 0x20_3123), Next::Resume);
        assert_eq!(injected(vp), None);
        assert_eq!(*sept.accepted.borrow(), [0x20_0000]);
        assert_eq!(touch(service, vp, OWNED), Next::Resume);
        assert_eq!(injected(vp), Some(VE));
    });
}

/// Bits of an address above the width are reserved (facts: tdx §3), and a page fault tells where by CR2.
#[test]
fn an_address_beyond_the_width_is_a_page_fault() {
    let (sept, model) = (Sept::default(), Model::default());
    let told = EptViolation::LINEAR_ADDRESS | EptViolation::FINAL;
    with(&sept, &model, Touch::ACCEPT, |service, vp| {
        for (gpa, access, cpl, error) in [
            (1 << 48, EptViolation::READ, 0, 0x9),
            (1 << 51 | SHARED | 0x1000, EptViolation::WRITE, 3, 0xF),
            (1 << 48 | 0x3000, EptViolation::FETCH, 0, 0x19),
        ] {
            let exit = Exit {
                gpa,
                cpl,
                gla: 0xFFFF_8000_0000_1234,
                qualification: (told | access).bits(),
                ..Exit::new(ExitReason::EPT_VIOLATION)
            };
            assert_eq!(service.handle(vp, &exit), Next::Resume);
            let event = vp.injection.unwrap();
            assert_eq!(
                (event.information, event.error, event.address),
                (PAGE_FAULT, error, Some(exit.gla)),
                "{gpa:#x}"
            );
            // Without a linear address it is no page fault.
            let exit = Exit {
                qualification: access.bits(),
                ..exit
            };
            vp.ve = None;
            assert_eq!(service.handle(vp, &exit), Next::Resume);
            assert_eq!(injected(vp), Some(VE));
        }
        assert!(sept.accepted.borrow().is_empty());
    });
}

/// TD_CTLS.PENDING_VE_DISABLE starts as ATTRIBUTES say (facts: tdx §3).
#[test]
fn the_attributes_say_whether_pending_pages_raise_an_exception() {
    let others = TdAttributes::DEBUG | TdAttributes::MIGRATABLE;
    assert_eq!(GuestTd::new(others).controls(), TdControls::empty());
    let disabled = GuestTd::new(others | TdAttributes::SEPT_VE_DISABLE);
    assert_eq!(disabled.controls(), TdControls::PENDING_VE_DISABLE);
}

/// I6: a page on record that is pending was exchanged; one that is not was accepted by another
/// processor while this one exited.
#[test]
fn a_pending_page_on_record_ends_the_machine() {
    let sept = Sept::default();
    for pending in [false, true] {
        let model = Model {
            mapping: Mapping { level: 0, pending },
            ..Model::default()
        };
        with(&sept, &model, Touch::FAULT, |service, vp| {
            let before = sept.accepted.borrow().len();
            assert_eq!(accept(service, vp, 0x3000), 0);
            let wanted = match pending {
                true => Next::End(TurnstileReason::NOT_VALIDATED),
                false => Next::Resume,
            };
            assert_eq!(touch(service, vp, 0x3000), wanted);
            // To ask again does not help the host either (I2): nothing is executed.
            let registers = [(RAX, Leaf::MEM_PAGE_ACCEPT.0.into()), (RCX, 0x3000)];
            assert_eq!(tdcall(service, vp, &registers), wanted);
            assert_eq!(sept.accepted.borrow().len(), before + 1);
        });
    }
}
