//! Laws of the registry, with a spy in place of the VMSA pages and real loans from an engine.

use std::boxed::Box;
use std::collections::BTreeSet;
use std::sync::Mutex as StdMutex;
use std::vec::Vec;

use accept::{Engine, Map, NotFlushed, PageState, Range, Region, RegionLock, RegionLocks, Role};

use super::*;
use crate::protocol::{
    DeleteRefusal, Deletion, Inherited, NotPassedOn, Replaced, VcpuIndex, VcpuPages, Vcpus,
};
use crate::testing::Willing;

const VMSA: u64 = 0x10;
const AREA: u64 = 0x40;

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
    /// What has not stopped since it was released.
    awaited: StdMutex<Vec<Frame>>,
    /// What has run.
    touched: StdMutex<Vec<Frame>>,
    /// Pages that are the guest's: to touch one is the worst that can happen.
    guests: StdMutex<BTreeSet<u64>>,
}

impl Spy {
    fn note(&self, act: Act) {
        self.acts.lock().unwrap().push(act);
    }

    fn take(&self) -> Vec<Act> {
        std::mem::take(&mut self.acts.lock().unwrap())
    }

    fn touch(&self, vmsa: Frame) {
        let guests = self.guests.lock().unwrap();
        assert!(!guests.contains(&vmsa.number()), "{vmsa:?} is the guest's");
    }
}

impl VmsaControl for &Spy {
    fn stop(&self, vmsa: Frame) {
        self.touch(vmsa);
        self.note(Act::Stop(vmsa));
    }
    fn release(&self, vmsa: Frame) {
        self.touch(vmsa);
        self.note(Act::Release(vmsa));
    }
    fn owe_flush(&self, vmsa: Frame) {
        self.touch(vmsa);
        self.note(Act::Owe(vmsa));
    }
    fn has_flushed(&self, vmsa: Frame) -> bool {
        self.touch(vmsa);
        self.flushed.lock().unwrap().contains(&vmsa)
    }
    fn is_running(&self, vmsa: Frame) -> bool {
        self.touch(vmsa);
        self.running.lock().unwrap().contains(&vmsa)
    }
    fn is_awaited(&self, vmsa: Frame) -> bool {
        self.touch(vmsa);
        self.awaited.lock().unwrap().contains(&vmsa)
    }
    fn is_untouched(&self, vmsa: Frame) -> bool {
        self.touch(vmsa);
        !self.touched.lock().unwrap().contains(&vmsa)
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
    let records = count * RECORDS_PER_VCPU;
    let tables = Tables {
        vcpus: leak((0..count).map(|apic_id| Vcpu::new(apic_id as u32))),
        slots: leak((0..records).map(|_| Record::none())),
        shown: leak((0..records).map(|_| Shown::none())),
    };
    let registry = Registry::new(tables, spy, SevFeatures::SNP_ACTIVE);
    let area = engine.adopt(frame(AREA), Role::CallingArea).unwrap();
    registry.record_startup(vmsa(0), area);
    World {
        engine,
        registry,
        spy,
    }
}

/// The VMSA page number `index` of these tests.
fn vmsa(index: u64) -> Frame {
    frame(VMSA + index)
}

/// A VMSA's number and that of its calling area.
fn pair(index: u64) -> (u64, u64) {
    (VMSA + index, AREA + index)
}

impl World {
    fn pages(&self, index: u64) -> VcpuPages {
        VcpuPages {
            vmsa: self.engine.adopt(vmsa(index), Role::Vmsa).unwrap(),
            calling_area: self
                .engine
                .adopt(frame(AREA + index), Role::CallingArea)
                .ok(),
        }
    }

    fn register(&self, apic_id: u32, index: u64) {
        (&self.registry)
            .register(apic_id, self.pages(index))
            .unwrap();
    }

    fn begin(&self, caller: usize, index: u64) -> Result<Deletion, DeleteRefusal> {
        (&self.registry).begin_delete(VcpuIndex(caller), vmsa(index))
    }

    fn delete(&self, caller: usize, index: u64) -> Result<(), DeleteRefusal> {
        let Deletion { place, pages } = self.begin(caller, index)?;
        self.engine.give_back(pages.vmsa).unwrap();
        if let Some(area) = pages.calling_area {
            self.engine.give_back(area).unwrap();
        }
        (&self.registry).end_delete(place);
        Ok(())
    }

    /// The processor comes back with a call from this VMSA.
    fn serve(&self, vcpu: usize, index: u64) -> Service {
        self.registry
            .slots_of(vcpu)
            .find_map(|slot| match self.registry.begin_service(vcpu, slot) {
                Arrival::Serve(service) if service.vmsa == vmsa(index) => Some(service),
                Arrival::Serve(service) => {
                    self.registry.end_service(vcpu, service);
                    None
                }
                Arrival::None | Arrival::Wait => None,
            })
            .expect("there is such a VMSA")
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
    assert_eq!(world.registry.presence(0), Presence::Live);
    assert_eq!(world.registry.presence(1), Presence::None);
    assert_eq!(world.registry.presence(usize::MAX), Presence::None);
    assert_eq!(
        (&world.registry).calling_area(VcpuIndex(0)),
        None,
        "no call"
    );
    let service = world.serve(0, 0);
    let area = (&world.registry).calling_area(VcpuIndex(0));
    assert_eq!(area, Some(frame(AREA)));
    world.registry.end_service(0, service);
    assert_eq!(world.delete(0, 0), Err(DeleteRefusal::Startup));
    assert_eq!(world.delete(1, 0), Err(DeleteRefusal::Startup));
    assert_eq!(world.shown(), [pair(0)]);
}

#[test]
fn a_processor_may_have_several_states_and_each_is_served() {
    let world = world(2);
    world.register(1, 1);
    world.register(1, 2);
    assert_eq!(world.shown(), [pair(0), pair(1), pair(2)]);
    for index in [1, 2] {
        let service = world.serve(1, index);
        let area = (&world.registry).calling_area(VcpuIndex(1));
        assert_eq!(area, Some(frame(AREA + index)));
        assert!((&world.registry).runs_from(VcpuIndex(1), vmsa(index)));
        assert!(!(&world.registry).runs_from(VcpuIndex(0), vmsa(index)));
        world.registry.end_service(1, service);
    }
    assert_eq!(world.delete(0, 1), Ok(()));
    assert_eq!(world.delete(0, 1), Err(DeleteRefusal::Unknown));
    assert_eq!(world.shown(), [pair(0), pair(2)]);
    assert_eq!(world.registry.presence(1), Presence::Live);
}

#[test]
fn a_call_from_one_state_does_not_keep_the_others() {
    // A kernel's processor accepts memory already while another deletes the firmware's VMSA.
    let world = world(2);
    world.register(1, 1);
    world.register(1, 2);
    let service = world.serve(1, 2);
    assert_eq!(world.delete(0, 1), Ok(()));
    assert_eq!(world.delete(0, 2), Err(DeleteRefusal::InUse));
    world.registry.end_service(1, service);
    assert_eq!(world.delete(0, 2), Ok(()));
    assert_eq!(world.registry.presence(1), Presence::None);
}

#[test]
fn nobody_deletes_what_the_host_was_asked_to_run() {
    // It has returned from a call this moment: the host finds no VMSA, and that ends the VM.
    let world = world(2);
    world.register(1, 1);
    world.spy.awaited.lock().unwrap().push(vmsa(1));
    assert_eq!(world.delete(0, 1), Err(DeleteRefusal::InUse));
    world.spy.awaited.lock().unwrap().clear();
    world.spy.running.lock().unwrap().push(vmsa(1));
    assert_eq!(world.delete(0, 1), Err(DeleteRefusal::InUse));
    let acts = world.spy.take();
    assert!(!acts.contains(&Act::Stop(vmsa(1))), "left alone: {acts:?}");
    world.spy.running.lock().unwrap().clear();
    assert_eq!(world.delete(0, 1), Ok(()));
    assert!(world.spy.take().contains(&Act::Stop(vmsa(1))));
    // It may be made anew, and then serves calls again.
    world.register(1, 2);
    world.serve(1, 2);
}

#[test]
fn nobody_deletes_what_a_processor_goes_to_run_for_the_first_time() {
    // The processor found a new VMSA at VMPL0, and asked the host to run what there is. Deleted
    // then, it was no VMSA any more when the host came to it (svsm_cases,
    // smp_delete_while_running).
    let world = world(2);
    world.register(1, 1);
    assert_eq!(world.registry.offer(1), Presence::Live);
    assert_eq!(world.delete(0, 1), Err(DeleteRefusal::InUse));
    let passed = (&world.registry).pass_on_area(VcpuIndex(0), 1, frame(AREA + 1));
    assert!(matches!(passed, Err(NotPassedOn::Busy)));
    // What is made after it has gone, the guest must give to the host itself.
    world.register(1, 2);
    assert_eq!(world.delete(0, 2), Ok(()));
    // What it has run, and left, is at rest although the host may have come to run another.
    world.spy.touched.lock().unwrap().push(vmsa(1));
    assert_eq!(world.delete(0, 1), Ok(()));
    world.register(1, 3);
    assert_eq!(world.registry.offer(1), Presence::Live);
    world.registry.withdraw(1);
    assert_eq!(world.delete(0, 3), Ok(()));
    assert_eq!(world.registry.offer(1), Presence::None);
}

#[test]
fn what_a_processor_does_not_go_to_run_may_be_deleted() {
    // A host that enters VMPL0 for nothing goes on with what ran. New VMSAs beside that stayed for
    // as long as there was no call, and the table was full (hostile/early-return).
    let world = world(2);
    world.spy.touched.lock().unwrap().push(vmsa(1));
    world.register(1, 1);
    world.register(1, 2);
    assert_eq!(world.registry.offer(1), Presence::Live);
    assert_eq!(world.delete(0, 2), Ok(()));
}

#[test]
fn what_is_being_deleted_is_not_offered() {
    let world = world(2);
    world.register(1, 1);
    let deletion = world.begin(0, 1).unwrap();
    assert_eq!(world.registry.offer(1), Presence::Leaving);
    (&world.registry).undo_delete(VcpuIndex(0), deletion);
    assert_eq!(world.delete(0, 1), Ok(()), "it was not offered");
}

#[test]
fn a_processor_may_delete_itself() {
    let world = world(2);
    world.register(1, 1);
    world.serve(1, 1);
    assert_eq!(world.delete(1, 1), Ok(()));
    world.registry.forget_service(1);
    assert_eq!(world.registry.presence(1), Presence::None);
    assert_eq!((&world.registry).calling_area(VcpuIndex(1)), None);
    world.register(1, 2);
    world.serve(1, 2);
}

#[test]
fn a_deletion_in_progress_keeps_its_processor_waiting() {
    let world = world(2);
    world.register(1, 1);
    let deletion = world.begin(0, 1).unwrap();
    assert_eq!(world.delete(0, 1), Err(DeleteRefusal::Busy));
    // It may stay: a processor that took it for gone was never run again (svsm_cases,
    // smp_delete_while_running).
    assert_eq!(world.registry.presence(1), Presence::Leaving);
    assert_eq!((&world.registry).replaced(1, 0), Replaced::NotNow);
    let slot = world.registry.slots_of(1).next().unwrap();
    assert!(matches!(
        world.registry.begin_service(1, slot),
        Arrival::Wait
    ));
    world.spy.take();
    (&world.registry).undo_delete(VcpuIndex(0), deletion);
    assert_eq!(world.spy.take(), [Act::Owe(vmsa(1)), Act::Release(vmsa(1))]);
    assert_eq!(world.registry.presence(1), Presence::Live);
    world.serve(1, 1);
}

#[test]
fn an_own_deletion_that_fails_leaves_the_release_to_the_answer() {
    let world = world(2);
    world.register(1, 1);
    world.serve(1, 1);
    let deletion = world.begin(1, 1).unwrap();
    world.spy.take();
    (&world.registry).undo_delete(VcpuIndex(1), deletion);
    assert_eq!(world.spy.take(), [Act::Owe(vmsa(1))]);
    assert_eq!(world.delete(1, 1), Ok(()));
}

#[test]
fn a_full_table_gives_the_pages_back_and_changes_nothing() {
    let world = world(2);
    for index in 1..=RECORDS_PER_VCPU as u64 {
        world.register(1, index);
    }
    let before = world.shown();
    let refused = (&world.registry).register(1, world.pages(9)).unwrap_err();
    assert_eq!(refused.0, world.pages(9));
    assert_eq!(world.shown(), before);
    assert!((&world.registry).register(9, world.pages(9)).is_err());
    // Which are the oldest, the newest never among them.
    let replaced = |nth| (&world.registry).replaced(1, nth);
    for nth in 0..RECORDS_PER_VCPU - 1 {
        assert_eq!(replaced(nth), Replaced::Here(vmsa(1 + nth as u64)));
    }
    assert_eq!(replaced(RECORDS_PER_VCPU - 1), Replaced::None);
    assert_eq!((&world.registry).replaced(9, 0), Replaced::None);
    // Nothing newer than the startup VMSA, and there are places.
    assert_eq!((&world.registry).replaced(0, 0), Replaced::NotNow);
    // While somebody deletes one, it cannot be said that there is no room: it was, when the deletion had
    // been given up before the next look (svsm_cases, smp_create_and_delete).
    let deletion = world.begin(0, 2).unwrap();
    assert_eq!(replaced(RECORDS_PER_VCPU - 2), Replaced::NotNow);
    (&world.registry).undo_delete(VcpuIndex(0), deletion);
    assert_eq!(replaced(RECORDS_PER_VCPU - 1), Replaced::None);
    // The place of one that went is taken again, and age goes on.
    assert_eq!(world.delete(0, 1), Ok(()));
    world.register(1, 9);
    assert_eq!((&world.registry).replaced(1, 0), Replaced::Here(vmsa(2)));
}

#[test]
fn the_calling_area_moves_and_the_old_loan_comes_back() {
    let world = world(1);
    let adopt = |number| {
        world
            .engine
            .adopt(frame(AREA + number), Role::CallingArea)
            .unwrap()
    };
    let stray = (&world.registry).exchange_calling_area(VcpuIndex(0), adopt(4));
    assert_eq!(stray, None, "outside a call nothing moves");
    world.serve(0, 0);
    let old = (&world.registry)
        .exchange_calling_area(VcpuIndex(0), adopt(3))
        .unwrap();
    assert_eq!(old.frame(), frame(AREA));
    assert_eq!(world.shown(), [(VMSA, AREA + 3)]);
    let stray = (&world.registry).exchange_calling_area(VcpuIndex(9), adopt(4));
    assert_eq!(stray, None);
    assert_eq!(world.shown(), [(VMSA, AREA + 3)]);
}

#[test]
fn a_newer_state_of_a_processor_inherits_the_calling_area() {
    let world = world(2);
    world.register(1, 1);
    let pass_on = |apic_id| (&world.registry).pass_on_area(VcpuIndex(0), apic_id, frame(AREA + 1));
    assert_eq!(pass_on(0), Err(NotPassedOn::NotThere));
    assert_eq!(pass_on(7), Err(NotPassedOn::NotThere));
    // Not while it runs or a call of it is worked on: that call would never be answered.
    world.spy.awaited.lock().unwrap().push(vmsa(1));
    assert_eq!(pass_on(1), Err(NotPassedOn::Busy));
    world.spy.awaited.lock().unwrap().clear();
    let service = world.serve(1, 1);
    assert_eq!(pass_on(1), Err(NotPassedOn::Busy));
    let own = (&world.registry).pass_on_area(VcpuIndex(1), 1, frame(AREA + 1));
    assert_eq!(own, Err(NotPassedOn::NotThere), "not under its own call");
    world.registry.end_service(1, service);
    let inherited = pass_on(1).unwrap();
    assert_eq!(world.shown(), [pair(0), (VMSA + 1, 0)]);
    let service = world.serve(1, 1);
    assert_eq!((&world.registry).calling_area(VcpuIndex(1)), None);
    world.registry.end_service(1, service);
    assert_eq!((&world.registry).return_area(inherited), None);
    assert_eq!(world.shown(), [pair(0), pair(1)]);

    let Inherited { area, from } = pass_on(1).unwrap();
    let pages = VcpuPages {
        calling_area: Some(area),
        ..world.pages(2)
    };
    (&world.registry).register(1, pages).unwrap();
    assert_eq!(world.delete(0, 1), Ok(()));
    assert_eq!(world.shown(), [pair(0), (VMSA + 2, AREA + 1)]);
    // Nobody is left to return one to.
    let area = world.pages(9).calling_area.unwrap();
    let left = (&world.registry).return_area(Inherited { from, area });
    assert!(left.is_some());
}

#[test]
fn what_can_run_is_on_record() {
    let world = world(2);
    world.spy.take();
    world.register(1, 1);
    assert_eq!(world.spy.take(), [Act::Release(vmsa(1))]);
    let refused = (&world.registry).register(9, world.pages(7));
    assert!(refused.is_err());
    assert_eq!(world.spy.take(), []);
}

#[test]
fn a_page_lent_anew_while_its_old_record_goes_keeps_its_new_record() {
    // The attack: between the return of a VMSA page and the end of its record another processor
    // lends the page again; the new record has to survive the end of the old one.
    let world = world(2);
    world.register(1, 1);
    let Deletion { place, pages } = world.begin(0, 1).unwrap();
    assert_eq!(pages, world.pages(1));
    world.register(0, 1);
    (&world.registry).end_delete(place);
    world.serve(0, 1);
    world.registry.forget_service(0);
    assert_eq!(world.shown(), [pair(0), pair(1)]);
}

#[test]
fn a_flush_is_owed_by_all_on_record() {
    let world = world(3);
    world.register(1, 1);
    world.register(1, 2);
    world.serve(1, 1);
    world.spy.take();
    assert_eq!(world.registry.flush_all(), Ok(()));
    assert_eq!(
        world.spy.take(),
        [0, 1, 2].map(|index| Act::Owe(vmsa(index)))
    );
}

#[test]
fn i3_a_flush_is_not_certain_while_a_vmsa_runs_on() {
    // Also one that was replaced, and one whose processor is in the middle of a call: what the
    // host runs is the host's choice.
    let world = world(2);
    world.register(1, 1);
    world.register(1, 2);
    world.serve(1, 2);
    for index in [0, 1, 2] {
        let vmsa = vmsa(index);
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
    let deletion = world.begin(0, 1).unwrap();
    world.spy.take();
    assert_eq!(
        world.registry.flush_all(),
        Err(NotFlushed),
        "not to be told"
    );
    assert_eq!(world.spy.take(), [Act::Owe(vmsa(0))]);
    (&world.registry).undo_delete(VcpuIndex(0), deletion);
    assert!(world.spy.take().contains(&Act::Owe(vmsa(1))));
    assert_eq!(world.registry.flush_all(), Ok(()));
    // So does one whose deletion was refused after it had begun.
    world.spy.awaited.lock().unwrap().push(vmsa(1));
    assert_eq!(world.delete(0, 1), Err(DeleteRefusal::InUse));
    assert_eq!(world.spy.take().last(), Some(&Act::Owe(vmsa(1))));
}

#[test]
fn i4_no_page_of_the_guest_is_touched_however_the_threads_meet() {
    // Two threads make and delete VMSAs of the same processor while two flush and one serves.
    // The spy fails when anybody touches a page between its return and its next loan.
    const ROUNDS: u64 = 3000;
    let world = &world(3);
    world
        .spy
        .guests
        .lock()
        .unwrap()
        .extend([VMSA + 1, VMSA + 2]);
    let done = &std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for index in [1, 2] {
            scope.spawn(move || {
                let mut deleted = 0;
                for _ in 0..ROUNDS {
                    world.spy.guests.lock().unwrap().remove(&(VMSA + index));
                    world.register(1, index);
                    let deletion = loop {
                        match world.begin(0, index) {
                            Ok(deletion) => break deletion,
                            Err(DeleteRefusal::InUse | DeleteRefusal::Busy) => {}
                            Err(other) => panic!("{other:?}"),
                        }
                    };
                    world.spy.guests.lock().unwrap().insert(VMSA + index);
                    (&world.registry).end_delete(deletion.place);
                    deleted += 1;
                    world.spy.take();
                }
                assert_eq!(deleted, ROUNDS);
                done.fetch_add(1, Ordering::SeqCst);
            });
        }
        for _ in 0..2 {
            scope.spawn(|| {
                while done.load(Ordering::SeqCst) < 2 {
                    // Certain or not: a VMSA may be on its way out for longer than the bound.
                    let _ = world.registry.flush_all();
                }
            });
        }
        scope.spawn(|| {
            while done.load(Ordering::SeqCst) < 2 {
                for slot in world.registry.slots_of(1) {
                    if let Arrival::Serve(service) = world.registry.begin_service(1, slot) {
                        (&world.spy).stop(service.vmsa);
                        (&world.spy).release(service.vmsa);
                        world.registry.end_service(1, service);
                    }
                }
            }
        });
    });
    assert_eq!(world.shown(), [pair(0)]);
}

/// Design §10: who is told that nothing changes writes to nobody else's cache lines.
#[test]
fn each_processor_counts_requests_without_effect_in_lines_of_its_own() {
    let world = world(3);
    let registry = &world.registry;
    for vcpu in [0, 2, 2] {
        registry.count_unchanged(VcpuIndex(vcpu));
    }
    let counts: Vec<u64> = registry
        .vcpus
        .iter()
        .map(|vcpu| vcpu.unchanged.load(Ordering::Relaxed))
        .collect();
    assert_eq!(counts, [1, 0, 2]);
    assert_eq!(registry.unchanged(), 3);
    // No processor of the VM.
    registry.count_unchanged(VcpuIndex(3));
    assert_eq!(registry.unchanged(), 3);
    assert_eq!(align_of::<Vcpu>(), 128);
}
