//! Laws of the registry, with a spy in place of the VMSA pages and real loans from an engine.

use std::boxed::Box;
use std::sync::Mutex as StdMutex;
use std::thread;
use std::time::Duration;
use std::vec::Vec;

use accept::{
    AdjustFault, Backend, Block, Engine, Fault, Map, NotFlushed, PageState, Range, Region,
    RegionLock, RegionLocks, Role, ValidateFault,
};

use super::*;

const VMSA: [u64; 8] = [0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17];
const AREA: u64 = 0x40;

/// A platform on which everything works.
struct Willing;

impl Backend for Willing {
    fn validate(&self, _: Block) -> Result<(), ValidateFault> {
        Ok(())
    }
    fn rescind(&self, _: Block) -> Result<(), ValidateFault> {
        Ok(())
    }
    fn scrub(&self, _: Block) -> Result<(), Fault> {
        Ok(())
    }
    fn grant(&self, _: Block) -> Result<(), AdjustFault> {
        Ok(())
    }
    fn revoke(&self, _: Block) -> Result<(), AdjustFault> {
        Ok(())
    }
    fn flush(&self) -> Result<(), NotFlushed> {
        Ok(())
    }
}

/// What was done to VMSAs, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Stop(Frame),
    Release(Frame),
    Owe(Frame),
}

#[derive(Default)]
struct Spy {
    acts: StdMutex<Vec<Act>>,
    /// What the host runs right now and does not interrupt.
    running: StdMutex<Vec<Frame>>,
    /// What was run anew since it owed a flush.
    flushed: StdMutex<Vec<Frame>>,
}

impl Spy {
    fn note(&self, act: Act) {
        self.acts.lock().unwrap().push(act);
    }

    fn take(&self) -> Vec<Act> {
        std::mem::take(&mut self.acts.lock().unwrap())
    }
}

impl VmsaControl for &Spy {
    fn stop(&self, vmsa: Frame) {
        self.note(Act::Stop(vmsa));
    }
    fn release(&self, vmsa: Frame) {
        self.note(Act::Release(vmsa));
    }
    fn owe_flush(&self, vmsa: Frame) {
        self.note(Act::Owe(vmsa));
    }
    fn has_flushed(&self, vmsa: Frame) -> bool {
        self.flushed.lock().unwrap().contains(&vmsa)
    }
    fn is_running(&self, vmsa: Frame) -> bool {
        self.running.lock().unwrap().contains(&vmsa)
    }
}

/// A machine with processors of APIC ids 0, 1, …; all pages are Owned.
struct World {
    engine: Engine<'static, Willing>,
    registry: Registry<'static, &'static Spy>,
    spy: &'static Spy,
}

fn frame(number: u64) -> Frame {
    Frame::try_new(number).unwrap()
}

fn leak<T>(items: impl IntoIterator<Item = T>) -> &'static mut [T] {
    Box::leak(items.into_iter().collect::<Vec<_>>().into_boxed_slice())
}

fn world(count: usize) -> World {
    let regions = leak([Region::new()]);
    let ranges = leak([Range::try_new(frame(0), 512, regions).unwrap()]);
    let locks = leak((0..RegionLocks::MINIMUM).map(|_| RegionLock::new()));
    let engine = Engine::new(
        Willing,
        Map::try_new(ranges).unwrap(),
        RegionLocks::try_new(locks).unwrap(),
    );
    engine
        .record_launch(frame(0), 512, PageState::Owned)
        .unwrap();
    let spy: &'static Spy = Box::leak(Box::default());
    let records = Tables::records_for(count);
    let tables = Tables {
        vcpus: leak((0..count).map(|apic_id| Vcpu::new(apic_id as u32))),
        records: leak((0..records).map(|_| None)),
        shown: leak((0..records).map(|_| Shown::none())),
    };
    let registry = Registry::new(tables, spy, SevFeatures::SNP_ACTIVE);
    let area = engine.adopt(frame(AREA), Role::CallingArea).unwrap();
    registry.record_startup(frame(VMSA[0]), area);
    World {
        engine,
        registry,
        spy,
    }
}

impl World {
    fn pages(&self, index: usize) -> VcpuPages {
        VcpuPages {
            vmsa: self.engine.adopt(frame(VMSA[index]), Role::Vmsa).unwrap(),
            calling_area: self
                .engine
                .adopt(frame(AREA + index as u64), Role::CallingArea)
                .unwrap(),
        }
    }

    fn register(&self, apic_id: u32, index: usize) {
        (&self.registry)
            .register(apic_id, self.pages(index))
            .unwrap();
    }

    fn delete(&self, caller: usize, index: usize) -> Result<(), DeleteRefusal> {
        let vcpus = &self.registry;
        let VcpuPages { vmsa, calling_area } =
            vcpus.begin_delete(VcpuIndex(caller), frame(VMSA[index]))?;
        self.engine.give_back(vmsa).unwrap();
        self.engine.give_back(calling_area).unwrap();
        vcpus.end_delete(frame(VMSA[index]));
        Ok(())
    }

    /// Every pair the referee would read.
    fn shown(&self) -> Vec<(u64, u64)> {
        let load = |s: &Shown| {
            (
                s.vmsa.load(Ordering::Relaxed) >> 12,
                s.calling_area.load(Ordering::Relaxed) >> 12,
            )
        };
        self.registry
            .shown
            .iter()
            .map(load)
            .filter(|pair| pair.0 != 0)
            .collect()
    }
}

#[test]
fn the_boot_processor_runs_from_the_startup_state() {
    let world = world(2);
    assert_eq!(world.registry.vmsa(0), Some(frame(VMSA[0])));
    assert_eq!(
        (&world.registry).calling_area(VcpuIndex(0)),
        Some(frame(AREA))
    );
    assert_eq!(world.registry.vmsa(1), None);
    assert_eq!(world.registry.vmsa(usize::MAX), None);
    assert_eq!(world.delete(0, 0), Err(DeleteRefusal::Startup));
    assert_eq!(world.shown(), [(VMSA[0], AREA)]);
}

#[test]
fn a_new_state_replaces_the_old_which_stays_on_record() {
    let world = world(2);
    world.register(1, 1);
    world.register(1, 2);
    assert_eq!(world.registry.vmsa(1), Some(frame(VMSA[2])));
    assert_eq!(
        world.shown(),
        [(VMSA[0], AREA), (VMSA[2], AREA + 2), (VMSA[1], AREA + 1)]
    );
    assert_eq!(world.delete(0, 1), Ok(()));
    assert_eq!(world.registry.vmsa(1), Some(frame(VMSA[2])));
    assert_eq!(world.delete(0, 1), Err(DeleteRefusal::Unknown));
    assert_eq!(world.shown(), [(VMSA[0], AREA), (VMSA[2], AREA + 2)]);
}

#[test]
fn a_processor_keeps_the_state_it_makes_a_call_from() {
    let world = world(1);
    world.registry.leave_guest(0);
    world.register(0, 1);
    assert_eq!(world.registry.vmsa(0), Some(frame(VMSA[0])));
    assert_eq!(world.delete(0, 1), Ok(()));
}

#[test]
fn nobody_deletes_the_state_under_a_call() {
    let world = world(2);
    world.register(1, 1);
    world.registry.leave_guest(0);
    world.registry.leave_guest(1);
    assert_eq!(world.delete(0, 1), Err(DeleteRefusal::InUse));
    world.registry.enter_guest(1);
    world.spy.take();
    assert_eq!(world.delete(0, 1), Ok(()));
    assert_eq!(world.spy.take(), [Act::Stop(frame(VMSA[1]))]);
    assert_eq!(world.registry.vmsa(1), None);
    // It may be made anew, and then serves calls again.
    world.register(1, 2);
    world.registry.leave_guest(1);
    assert_eq!(world.registry.vmsa(1), Some(frame(VMSA[2])));
}

#[test]
fn a_processor_may_delete_itself() {
    let world = world(2);
    world.register(1, 1);
    world.registry.leave_guest(1);
    assert!((&world.registry).runs_from(VcpuIndex(1), frame(VMSA[1])));
    assert_eq!(world.delete(1, 1), Ok(()));
    assert_eq!(world.registry.vmsa(1), None);
    world.registry.enter_guest(1);
    world.registry.leave_guest(1);
}

#[test]
fn a_deletion_in_progress_keeps_others_out_until_it_ends() {
    let world = world(2);
    world.register(1, 1);
    let pages = (&world.registry)
        .begin_delete(VcpuIndex(0), frame(VMSA[1]))
        .unwrap();
    assert_eq!(world.delete(0, 1), Err(DeleteRefusal::InUse));
    thread::scope(|scope| {
        let comes_back = scope.spawn(|| world.registry.leave_guest(1));
        thread::sleep(Duration::from_millis(20));
        assert!(!comes_back.is_finished());
        world.spy.take();
        (&world.registry).undo_delete(pages);
        comes_back.join().unwrap();
    });
    let vmsa = frame(VMSA[1]);
    assert_eq!(world.spy.take(), [Act::Owe(vmsa), Act::Release(vmsa)]);
    assert_eq!(world.registry.vmsa(1), Some(vmsa));
}

#[test]
fn an_own_deletion_that_fails_leaves_the_release_to_the_answer() {
    let world = world(2);
    world.register(1, 1);
    world.registry.leave_guest(1);
    let pages = (&world.registry)
        .begin_delete(VcpuIndex(1), frame(VMSA[1]))
        .unwrap();
    world.spy.take();
    (&world.registry).undo_delete(pages);
    assert_eq!(world.spy.take(), [Act::Owe(frame(VMSA[1]))]);
    assert_eq!(world.delete(1, 1), Ok(()));
}

#[test]
fn a_full_table_gives_the_pages_back_and_changes_nothing() {
    let world = world(1);
    for index in 1..=REPLACED_PER_VCPU {
        world.register(0, index);
    }
    let before = world.shown();
    let refused = (&world.registry).register(0, world.pages(7)).unwrap_err();
    assert_eq!(refused.0, world.pages(7));
    assert_eq!(world.shown(), before);
    assert!((&world.registry).register(9, world.pages(7)).is_err());
}

#[test]
fn the_calling_area_moves_and_the_old_loan_comes_back() {
    let world = world(1);
    let new = world
        .engine
        .adopt(frame(AREA + 3), Role::CallingArea)
        .unwrap();
    let old = (&world.registry)
        .exchange_calling_area(VcpuIndex(0), new)
        .unwrap();
    assert_eq!(old.frame(), frame(AREA));
    assert_eq!(world.shown(), [(VMSA[0], AREA + 3)]);
    let stray = world
        .engine
        .adopt(frame(AREA + 4), Role::CallingArea)
        .unwrap();
    assert_eq!(
        (&world.registry).exchange_calling_area(VcpuIndex(9), stray),
        None
    );
    assert_eq!(world.shown(), [(VMSA[0], AREA + 3)]);
}

#[test]
fn what_can_run_is_on_record() {
    let world = world(2);
    world.spy.take();
    world.register(1, 1);
    assert_eq!(world.spy.take(), [Act::Release(frame(VMSA[1]))]);
    let refused = (&world.registry).register(9, world.pages(7));
    assert!(refused.is_err());
    assert_eq!(world.spy.take(), []);
}

#[test]
fn a_page_lent_anew_while_its_old_record_goes_keeps_its_new_record() {
    // The attack: between the return of a VMSA page and the end of its record another processor
    // lends the page again; the new record has to survive the end of the old one.
    let world = world(2);
    let vcpus = &world.registry;
    world.register(1, 1);
    world.register(1, 2); // the first one lies in a higher slot now
    let lent = vcpus.begin_delete(VcpuIndex(0), frame(VMSA[1])).unwrap();
    world.register(0, 1);
    assert_eq!(world.registry.vmsa(0), Some(frame(VMSA[1])));
    let again = vcpus.begin_delete(VcpuIndex(0), frame(VMSA[1]));
    assert_eq!(again, Err(DeleteRefusal::InUse), "one at a time");
    assert_eq!(lent, world.pages(1));
    vcpus.end_delete(frame(VMSA[1]));
    assert_eq!(world.registry.vmsa(0), Some(frame(VMSA[1])));
    assert_eq!(world.delete(1, 1), Ok(()), "the new one has its loans");
}

#[test]
fn a_state_cannot_be_replaced_while_it_is_deleted() {
    let world = world(2);
    world.register(1, 1);
    let pages = (&world.registry)
        .begin_delete(VcpuIndex(0), frame(VMSA[1]))
        .unwrap();
    assert!((&world.registry).register(1, world.pages(2)).is_err());
    (&world.registry).undo_delete(pages);
    world.register(1, 2);
    assert_eq!(world.registry.vmsa(1), Some(frame(VMSA[2])));
}

#[test]
fn a_flush_is_owed_by_all_on_record() {
    let world = world(3);
    world.register(1, 1);
    world.register(1, 2);
    world.spy.take();
    assert_eq!(world.registry.flush_all(), Ok(()));
    assert_eq!(
        world.spy.take(),
        [0, 2, 1].map(|index| Act::Owe(frame(VMSA[index])))
    );
}

#[test]
fn i3_a_flush_is_not_certain_while_a_vmsa_runs_on() {
    // Also one that was replaced, and one whose processor is in the middle of a call: what the
    // host runs is the host's choice.
    let world = world(2);
    world.register(1, 1);
    world.register(1, 2);
    world.registry.leave_guest(1);
    for index in [0, 1, 2] {
        let vmsa = frame(VMSA[index]);
        *world.spy.running.lock().unwrap() = vec![vmsa];
        assert_eq!(world.registry.flush_all(), Err(NotFlushed), "{index}");
        *world.spy.flushed.lock().unwrap() = vec![vmsa];
        assert_eq!(world.registry.flush_all(), Ok(()), "run anew since");
        world.spy.flushed.lock().unwrap().clear();
    }
    world.spy.running.lock().unwrap().clear();
    assert_eq!(
        world.registry.flush_all(),
        Ok(()),
        "at rest, they pass there first"
    );
}

#[test]
fn i3_a_state_that_was_passed_over_while_deleted_owes_the_flush_afterwards() {
    let world = world(2);
    world.register(1, 1);
    let pages = (&world.registry)
        .begin_delete(VcpuIndex(0), frame(VMSA[1]))
        .unwrap();
    world.spy.take();
    assert_eq!(
        world.registry.flush_all(),
        Err(NotFlushed),
        "not to be told"
    );
    assert_eq!(world.spy.take(), [Act::Owe(frame(VMSA[0]))]);
    (&world.registry).undo_delete(pages);
    assert!(world.spy.take().contains(&Act::Owe(frame(VMSA[1]))));
    assert_eq!(world.registry.flush_all(), Ok(()));
}
