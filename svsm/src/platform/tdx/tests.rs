//! The TDX backend under the engine, on a model of the secure EPT: the histories that the engine's
//! own tests run on the model of SEV-SNP, and what is TDX's own.

use std::sync::{Mutex, MutexGuard};
use std::vec;
use std::vec::Vec;

use accept::{
    AdjustFault, Backend, Block, Broken, Engine, Error, Fault, Frame, NotFlushed, OnNoChange,
    PageState, Role, Run, ValidateFault,
};
use proptest::prelude::*;
use protocols::tdx::{L2Vm, Leaf, MAPPING_PENDING, PageAttributes, Status};

use super::{BUSY_LIMIT, FlushOthers, Operands, Outcome, Tdcall, TdxBackend};

#[path = "../../../../accept/tests/model/mod.rs"]
mod model;

use model::history::{
    Hardware, REGIONS, a_lie_gains_nothing, any_page, any_step, follows_the_rules, stays_true,
};
use model::{frame, large, page, with_engine};

/// A leaf of the secure EPT, for one small page.
#[derive(Clone, Copy)]
struct Entry {
    /// Accepted; else pending.
    mapped: bool,
    /// What the guest's VM may do.
    access: PageAttributes,
    zero: bool,
    /// The host has exchanged the page behind the guest's back.
    exchanged: bool,
    /// The guest gave the page back, and the host has not taken it.
    left: bool,
}

const PENDING: Entry = Entry {
    mapped: false,
    access: PageAttributes::empty(),
    zero: false,
    exchanged: false,
    left: false,
};

struct Sept {
    entries: Vec<Entry>,
    /// Per 2 MiB: one large leaf.
    large: Vec<bool>,
    calls: Vec<(Leaf, Operands)>,
    double: usize,
    unlawful: Vec<&'static str>,
    fail_in: Option<usize>,
    keep_failing: bool,
    /// So many calls find their operand busy before each one that does not.
    busy: u32,
    busy_now: u32,
}

/// The module with a secure EPT of a few regions from address 0.
struct Module(Mutex<Sept>);

impl Module {
    fn new(regions: usize, on_large: bool, busy: u32) -> Self {
        Self(Mutex::new(Sept {
            entries: vec![PENDING; regions * 512],
            large: vec![on_large; regions],
            calls: Vec::new(),
            double: 0,
            unlawful: Vec::new(),
            fail_in: None,
            keep_failing: false,
            busy,
            busy_now: busy,
        }))
    }

    fn sept(&self) -> MutexGuard<'_, Sept> {
        self.0.lock().expect("no test panicked here")
    }
}

impl Sept {
    /// The entries that a page operand names, and whether a table lies where a large leaf was
    /// asked for. A small page in a large leaf makes the host break the leaf up.
    fn find(&mut self, operand: u64) -> Result<std::ops::Range<usize>, Status> {
        let first = usize::try_from(operand >> 12).expect("small");
        match operand & 0xfff {
            0 => {
                self.large[first / 512] = false;
                Ok(first..first + 1)
            }
            1 if self.large[first / 512] => Ok(first..first + 512),
            1 => Err(Status::PAGE_SIZE_MISMATCH),
            _ => Err(Status::OPERAND_INVALID),
        }
    }

    fn accept(&mut self, operand: u64) -> Status {
        let index = usize::try_from(operand >> 12).expect("small");
        if self.large[index / 512] && self.entries[index].mapped {
            self.double += 1;
            return Status::PAGE_ALREADY_ACCEPTED;
        }
        let pages = match self.find(operand) {
            Ok(pages) => pages,
            Err(status) => return status,
        };
        for entry in &mut self.entries[pages] {
            if entry.mapped {
                self.double += usize::from(!entry.left);
                return Status::PAGE_ALREADY_ACCEPTED;
            }
            if entry.exchanged {
                self.double += 1;
            }
            if !entry.access.is_empty() {
                self.unlawful
                    .push("accepted with the guest's access in place");
            }
            *entry = Entry {
                mapped: true,
                zero: true,
                ..PENDING
            };
        }
        Status::SUCCESS
    }

    fn write_attributes(&mut self, operands: Operands) -> (Status, u64, u64) {
        let pages = match self.find(operands.rcx) {
            Ok(pages) => pages,
            Err(status) => return (status, 0, 0),
        };
        let mask = L2Vm::Vm1.attributes(operands.r8) & PageAttributes::ALL_ACCESS;
        let wanted = L2Vm::Vm1.attributes(operands.rdx);
        if !wanted.contains(PageAttributes::VALID) || operands.rdx & 0xffff != 0 {
            return (Status::PAGE_ATTR_INVALID, 0, 0);
        }
        let (mut mapping, mut read_back) = (operands.rcx, 0);
        for entry in &mut self.entries[pages] {
            entry.access = (entry.access - mask) | (wanted & mask);
            if !entry.mapped {
                mapping |= MAPPING_PENDING;
            } else if !entry.access.is_empty() {
                entry.zero = false;
            }
            read_back = L2Vm::Vm1.field(entry.access | PageAttributes::VALID);
        }
        (Status::SUCCESS, mapping, read_back)
    }
}

impl Tdcall for Module {
    fn tdcall(&self, leaf: Leaf, operands: Operands) -> Outcome {
        if operands.rcx.is_multiple_of(128 << 12) {
            std::thread::yield_now();
        }
        let mut sept = self.sept();
        let status = |status: Status| Outcome {
            rax: u64::from(status.0) << 32 | 1,
            ..Outcome::default()
        };
        sept.calls.push((leaf, operands));
        if sept.busy_now > 0 {
            sept.busy_now -= 1;
            return status(Status::OPERAND_BUSY);
        }
        sept.busy_now = sept.busy;
        // A flush that is not certain is a case of its own.
        let next = sept.fail_in.filter(|_| leaf != Leaf::VP_INVEPT);
        match next {
            Some(0) => {
                if !sept.keep_failing {
                    sept.fail_in = None;
                }
                return status(Status::OPERAND_INVALID);
            }
            Some(n) => sept.fail_in = Some(n - 1),
            None => {}
        }
        match leaf {
            Leaf::MEM_PAGE_ACCEPT => status(sept.accept(operands.rcx)),
            Leaf::MEM_PAGE_ATTR_WR => {
                let (code, rcx, rdx) = sept.write_attributes(operands);
                Outcome {
                    rcx,
                    rdx,
                    ..status(code)
                }
            }
            Leaf::VP_INVEPT => status(Status::SUCCESS),
            _ => status(Status::OPERAND_INVALID),
        }
    }
}

/// Other vCPUs that are never in the way.
struct NoOthers;

impl FlushOthers for NoOthers {
    fn flush_others(&self) -> Result<(), NotFlushed> {
        Ok(())
    }
}

/// The platform as the engine and the histories see it.
struct Tdx(TdxBackend<Module, NoOthers>);

impl Tdx {
    fn new(on_large: bool, busy: u32) -> Self {
        Self::sized(REGIONS as usize, on_large, busy)
    }

    fn sized(regions: usize, on_large: bool, busy: u32) -> Self {
        let module = Module::new(regions, on_large, busy);
        Self(TdxBackend::new(module, NoOthers))
    }

    fn sept(&self) -> MutexGuard<'_, Sept> {
        self.0.module().sept()
    }

    /// The host removes the pages of a block, one by one.
    fn convert(&self, block: Block) {
        for number in block.first().number()..=block.last().number() {
            let page = usize::try_from(number).expect("small");
            if page.is_multiple_of(64) {
                std::thread::yield_now();
            }
            let mut sept = self.sept();
            sept.large[page / 512] = false;
            if !sept.entries[page].access.is_empty() {
                sept.unlawful.push("removed under the guest's hands");
            }
            sept.entries[page] = PENDING;
        }
    }
}

impl Backend for &Tdx {
    const HOST_REMOVES: bool = <TdxBackend<Module, NoOthers> as Backend>::HOST_REMOVES;

    fn validate(&self, block: Block) -> Result<(), ValidateFault> {
        self.0.validate(block)
    }
    fn validate_run(&self, run: Run) -> Result<(), Broken<ValidateFault>> {
        self.0.validate_run(run)
    }
    fn grant_run(&self, run: Run) -> Result<(), Broken<AdjustFault>> {
        self.0.grant_run(run)
    }
    fn rescind(&self, block: Block) -> Result<(), ValidateFault> {
        self.0.rescind(block)
    }
    fn scrub(&self, block: Block) -> Result<(), Fault> {
        self.0.scrub(block)
    }
    fn grant(&self, block: Block) -> Result<(), AdjustFault> {
        self.0.grant(block)
    }
    fn revoke(&self, block: Block) -> Result<(), AdjustFault> {
        self.0.revoke(block)
    }
    fn flush(&self) -> Result<(), NotFlushed> {
        self.0.flush()
    }
}

impl Hardware for Tdx {
    fn assert_agrees<B: Backend>(&self, engine: &Engine<'_, B>) {
        let sept = self.sept();
        for (number, entry) in (0..).zip(&sept.entries) {
            let state = engine.state(Frame::try_new(number).expect("small"));
            let granted = !entry.access.is_empty();
            let agrees = match state.expect("in the map") {
                PageState::Unaccepted => !entry.mapped && !granted,
                PageState::Ahead => entry.mapped && !granted && entry.zero,
                PageState::Accepted => entry.mapped && granted,
                PageState::Owned => entry.mapped,
            };
            assert!(
                agrees,
                "page {number}: the map says {state:?}; mapped {}, granted {granted}",
                entry.mapped
            );
        }
    }

    fn assert_lawful(&self) {
        assert!(
            self.sept().unlawful.is_empty(),
            "{:?}",
            self.sept().unlawful
        );
    }

    fn double_validations(&self) -> usize {
        self.sept().double
    }

    fn smash(&self, region: usize) {
        self.sept().large[region] = false;
    }

    fn rescind(
        &self,
        engine: &Engine<'_, &Self>,
        block: Block,
        choice: OnNoChange,
    ) -> Result<(), Error> {
        let withdrawn = engine.withdraw(block, choice)?;
        if let Some(owed) = withdrawn.flush() {
            engine.flush(owed).expect("flushed");
        }
        self.convert(block);
        assert_eq!(engine.settle(withdrawn), None, "the lock is free");
        Ok(())
    }

    fn remove(&self, page: usize) {
        let mut sept = self.sept();
        sept.large[page / 512] = false;
        sept.entries[page] = Entry {
            exchanged: true,
            ..PENDING
        };
    }

    fn resurrect(&self, page: usize) {
        // The module never brings an accepted page back. What a host can do is not to take one.
        let mut sept = self.sept();
        sept.large[page / 512] = false;
        sept.entries[page] = Entry {
            mapped: true,
            left: true,
            ..PENDING
        };
    }

    fn fail_in(&self, n: usize, on_and_on: bool) {
        let mut sept = self.sept();
        sept.fail_in = Some(n);
        sept.keep_failing = on_and_on;
    }

    fn stop_failing(&self) {
        self.sept().fail_in = None;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn i1_i2_i4_i11_every_history_follows_the_rules(
        on_large: bool,
        busy in 0..3u32,
        steps in prop::collection::vec(any_step(), 1..60),
    ) {
        follows_the_rules(&Tdx::new(on_large, busy), &steps);
    }

    #[test]
    fn i9_i11_failures_anywhere_leave_the_map_true(
        on_large: bool,
        steps in prop::collection::vec(
            (any_step(), prop::option::of((0..40usize, any::<bool>()))), 1..40),
    ) {
        stays_true(&Tdx::new(on_large, 0), &steps);
    }

    #[test]
    fn i5_a_lying_host_gains_nothing(
        on_large: bool,
        steps in prop::collection::vec(any_step(), 1..40),
        lie_at in 0..40usize,
        victim in any_page(),
    ) {
        a_lie_gains_nothing(&Tdx::new(on_large, 0), &steps, lie_at, victim);
    }
}

#[test]
fn i9_i11_a_failure_at_any_call_leaves_the_map_true() {
    model::every_call::the_map_stays_true(|on_large| Tdx::sized(1, on_large, 0));
}

#[test]
fn i2_one_of_many_wins_a_region() {
    model::race::one_of_many_wins_a_region(|on_large| Tdx::sized(1, on_large, 1));
}

#[test]
fn i1_i2_random_work_on_few_regions_never_validates_twice() {
    for on_large in [true, false] {
        model::race::random_work_never_validates_twice(&Tdx::new(on_large, 1));
    }
}

#[test]
fn small_leaves_are_asked_for_once_as_large_ones_and_then_one_by_one() {
    let tdx = Tdx::new(false, 0);
    with_engine(&tdx, 2, 1000, |engine| {
        engine.accept(large(0), OnNoChange::Fail).expect("accepted");
        let calls = std::mem::take(&mut tdx.sept().calls);
        let (accepts, grants) = calls.split_at(513);
        assert_eq!((accepts[0].0, accepts[0].1.rcx), (Leaf::MEM_PAGE_ACCEPT, 1));
        assert_eq!((accepts[1].0, accepts[1].1.rcx), (Leaf::MEM_PAGE_ACCEPT, 0));
        assert_eq!(accepts[512].1.rcx, 511 << 12);
        assert_eq!(grants.len(), 512, "the size is remembered for the grants");
        assert!(grants.iter().all(|call| call.0 == Leaf::MEM_PAGE_ATTR_WR));
        tdx.assert_agrees(engine);
    });
}

#[test]
fn i5_already_accepted_is_a_lie_at_either_level_and_nobody_gets_the_page() {
    for on_large in [true, false] {
        let tdx = Tdx::new(on_large, 0);
        tdx.sept().entries[..512].fill(Entry {
            mapped: true,
            ..PENDING
        });
        with_engine(&tdx, 2, 1000, |engine| {
            assert_eq!(
                engine.accept(page(5), OnNoChange::Fail),
                Err(Error::HostLied)
            );
            assert_eq!(engine.state(frame(5)), Some(PageState::Owned));
            assert!(tdx.sept().entries[5].access.is_empty());
        });
    }
}

#[test]
fn a_page_that_vanishes_before_it_is_granted_leaves_no_access_behind() {
    let tdx = Tdx::new(false, 0);
    with_engine(&tdx, 2, 1000, |engine| {
        engine.accept(page(7), OnNoChange::Fail).expect("accepted");
        let taken = engine.take(frame(7), Role::Vmsa).expect("taken");
        tdx.remove(7);
        let error = engine.give_back(taken).expect_err("it is gone").error;
        assert_eq!(error, Error::HostLied);
        assert!(tdx.sept().entries[7].access.is_empty());
    });
}

#[test]
fn i12_busy_is_repeated_with_the_same_operands_and_not_for_ever() {
    let tdx = Tdx::new(true, 3);
    (&tdx).validate(large(0)).expect("accepted in the end");
    let calls = std::mem::take(&mut tdx.sept().calls);
    assert_eq!(calls.len(), 4);
    assert!(calls.iter().all(|call| *call == calls[0]));

    let stuck = Tdx::new(true, u32::MAX);
    assert_eq!(
        (&stuck).validate(large(0)),
        Err(ValidateFault::Failed(Status::OPERAND_BUSY.0))
    );
    assert_eq!(stuck.sept().calls.len(), BUSY_LIMIT as usize + 1);
    assert_eq!((&stuck).flush(), Err(NotFlushed));
}

#[test]
fn attributes_that_do_not_read_back_are_written_again_and_then_refused() {
    /// A module that says yes and does nothing.
    struct Forgetful(Mutex<u32>);
    impl Tdcall for Forgetful {
        fn tdcall(&self, _: Leaf, operands: Operands) -> Outcome {
            *self.0.lock().expect("no panic") += 1;
            Outcome {
                rcx: operands.rcx,
                ..Outcome::default()
            }
        }
    }
    let backend = TdxBackend::new(Forgetful(Mutex::new(0)), NoOthers);
    assert_eq!(
        backend.grant(page(1)),
        Err(AdjustFault::Failed(Status::PAGE_ATTR_INVALID.0))
    );
    assert_eq!(*backend.module().0.lock().expect("no panic"), 4);
    // What is to be taken away is gone already: that reads back.
    assert_eq!(backend.revoke(page(1)), Ok(()));
}
