//! The registry of virtual processors: whose VMSA and whose calling area is where.
//!
//! Each VMSA the guest has made is a *record* in a slot of the processor it was made for. A
//! processor may have several: kernels replace those of the firmware without deleting them, and
//! which one the host runs is between the host and the guest. Every one is served when a call was
//! made from it. Rules:
//!
//! - a page is on record only while it is Owned in the map, and leaves only after the hardware
//!   state is undone: a record outlives what it describes;
//! - there is no lock. A record is changed by whoever has its slot to himself ([`slot`]); a
//!   processor that serves a call waits for nobody;
//! - a calling area belongs to one VMSA; a newer one of the same processor may inherit it, and the
//!   older then makes no calls;
//! - nobody deletes the state under a call, nor one that a processor at VMPL0 has just asked the
//!   host to run: the host would find no VMSA there, and that ends the VM. A processor that has
//!   answered a call is awaited in that VMSA; one that has not leaves it to the host which one
//!   to run, so all that it has *offered* and that were never run stay until it comes back;
//! - the public table shows the records in the order of the slots: first those of the first
//!   slot of each processor, then those of the second, and so on.

use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use accept::{Frame, Taken};
use protocols::addr::Gpa;
use protocols::map::VcpuEntry;
use protocols::vmsa::SevFeatures;
use spin::Mutex;

use crate::protocol::{
    Debt, DeleteRefusal, Deletion, Inherited, NoRoom, NotPassedOn, Place, Steps, VcpuIndex,
    VcpuPages, Vcpus,
};
use slot::{Kept, Look, Pin, Slot};
use waits::Waits;

mod flush;
mod slot;
mod waits;

/// VMSAs that one processor may have on record.
pub const RECORDS_PER_VCPU: usize = 4;
/// How often a deletion is tried although somebody looks at the VMSA. Looks are short.
const DELETE_TRIES: u32 = 1 << 12;
/// No slot.
const NONE: usize = usize::MAX;
/// The slot of the VMSA that the guest was started with.
const STARTUP: usize = 0;

/// What the registry does to VMSA pages. All are on record, so a fault ends the machine.
pub trait VmsaControl {
    /// Makes the VMSA impossible to run.
    fn stop(&self, vmsa: Frame);
    /// Makes the VMSA runnable.
    fn release(&self, vmsa: Frame);
    /// Makes the processor drop all translations before it runs the VMSA again.
    fn owe_flush(&self, vmsa: Frame);
    /// Whether that has happened since.
    fn has_flushed(&self, vmsa: Frame) -> bool;
    /// Whether it may run right now, on any processor of the host.
    fn is_running(&self, vmsa: Frame) -> bool;
    /// Whether it has not stopped since its processor at VMPL0 has last released it: it runs, or
    /// the host is about to run it.
    fn is_awaited(&self, vmsa: Frame) -> bool;
    /// Whether it has never been run.
    fn is_untouched(&self, vmsa: Frame) -> bool;
    /// Whether it neither runs nor is about to.
    fn rests(&self, vmsa: Frame) -> bool {
        !self.is_awaited(vmsa) && !self.is_running(vmsa)
    }
}

/// What the referee reads about one VMSA; layout of [`VcpuEntry`]. 0 means none.
#[derive(Debug)]
#[repr(C)]
pub struct Shown {
    vmsa: AtomicU64,
    calling_area: AtomicU64,
}

const _: () = assert!(size_of::<Shown>() == size_of::<VcpuEntry>());

impl Shown {
    /// An entry without guest state.
    #[must_use]
    pub const fn none() -> Self {
        Self {
            vmsa: AtomicU64::new(0),
            calling_area: AtomicU64::new(0),
        }
    }

    fn show(&self, vmsa: u64, area: u64) {
        self.calling_area.store(area, Ordering::SeqCst);
        self.vmsa.store(vmsa, Ordering::SeqCst);
    }
}

/// One processor.
#[derive(Debug)]
pub struct Vcpu {
    apic_id: u32,
    /// The slot whose call it works on. Only the processor itself looks at it.
    serving: AtomicUsize,
    /// How many VMSAs were made for it, which tells old from new.
    made: AtomicU32,
    /// What it owes before it may say that a rescind is done. Only the processor itself looks.
    debt: Mutex<Option<Debt>>,
    /// Its steps ahead of the guest, and whether that waits for one.
    waits: Waits,
}

impl Vcpu {
    /// A processor that has no guest state yet.
    #[must_use]
    pub const fn new(apic_id: u32) -> Self {
        Self {
            apic_id,
            serving: AtomicUsize::new(NONE),
            made: AtomicU32::new(0),
            debt: Mutex::new(None),
            waits: Waits::new(),
        }
    }
}

/// The rights to give the pages of a VMSA back. The VMSA of the start is never given back.
#[derive(Debug, Default)]
struct Loans {
    vmsa: Option<Taken>,
    area: Option<Taken>,
}

/// One place for a VMSA that the guest was started with or has made.
#[derive(Debug)]
pub struct Record {
    slot: Slot,
    /// Of the VMSAs of its processor, the how many-th.
    age: AtomicU32,
    /// Looked at by whoever has the slot to himself, so that nobody ever waits here.
    loans: Mutex<Loans>,
}

impl Record {
    /// An empty place.
    #[must_use]
    pub const fn none() -> Self {
        Self {
            slot: Slot::new(),
            age: AtomicU32::new(0),
            loans: Mutex::new(Loans {
                vmsa: None,
                area: None,
            }),
        }
    }
}

/// Memory for the registry, all of it made at boot.
pub struct Tables<'t> {
    /// One for each processor.
    pub vcpus: &'t [Vcpu],
    /// [`RECORDS_PER_VCPU`] for each processor, empty.
    pub slots: &'t [Record],
    /// As many, for the referee.
    pub shown: &'t [Shown],
}

/// All processors.
pub struct Registry<'t, C> {
    vcpus: &'t [Vcpu],
    slots: &'t [Record],
    shown: &'t [Shown],
    control: C,
    startup_features: SevFeatures,
    /// The most steps the guest ever waited for a processor.
    longest_wait: AtomicU64,
}

/// A call that may be served: the processor has this VMSA to itself.
pub struct Service {
    /// The VMSA.
    pub vmsa: Frame,
    slot: usize,
}

impl<'t, C: VmsaControl> Registry<'t, C> {
    /// The registry in the given memory.
    #[must_use]
    pub const fn new(tables: Tables<'t>, control: C, startup_features: SevFeatures) -> Self {
        Self {
            vcpus: tables.vcpus,
            slots: tables.slots,
            shown: tables.shown,
            control,
            startup_features,
            longest_wait: AtomicU64::new(0),
        }
    }

    /// How many entries the public table has.
    #[must_use]
    pub const fn shown_count(&self) -> usize {
        self.shown.len()
    }

    /// The APIC id of processor `index`.
    #[must_use]
    pub fn apic_id(&self, index: usize) -> Option<u32> {
        self.vcpus.get(index).map(|vcpu| vcpu.apic_id)
    }

    /// Records the state that processor 0 starts from.
    pub fn record_startup(&self, vmsa: Frame, calling_area: Taken) {
        if let (Some(record), Some(shown)) = (self.slots.get(STARTUP), self.shown.get(STARTUP))
            && record.slot.claim()
        {
            shown.show(vmsa.gpa(), calling_area.frame().gpa());
            record.loans.lock().area = Some(calling_area);
            record.slot.publish();
            record.slot.open();
        }
    }

    /// Whether processor `index` has any VMSA that could run.
    #[must_use]
    pub fn presence(&self, index: usize) -> Presence {
        self.look_at_all(index, Slot::glance)
    }

    /// The same of a processor that has answered no call, and if it has one, it goes to run what
    /// there is. Until [`Registry::withdraw`] nobody deletes what has never been run.
    ///
    /// One that somebody is deleting may stay: the deleter has yet to find out whether it is about
    /// to run. A processor that takes it for gone gives itself back, and nobody starts it again.
    #[must_use]
    pub fn offer(&self, index: usize) -> Presence {
        self.look_at_all(index, Slot::offer)
    }

    /// Processor `index` is back.
    pub fn withdraw(&self, index: usize) {
        for (_, record) in self.records_of(index) {
            record.slot.withdraw();
        }
    }

    fn look_at_all(&self, index: usize, look: fn(&Slot) -> Look<()>) -> Presence {
        self.records_of(index)
            .map(|(_, record)| match look(&record.slot) {
                Look::Absent => Presence::None,
                Look::Leaving => Presence::Leaving,
                Look::Here(()) => Presence::Live,
            })
            .max()
            .unwrap_or(Presence::None)
    }

    /// Whether a VMSA that one has reserved neither runs nor is about to.
    fn rests(&self, slot: &Slot, vmsa: Frame) -> bool {
        let is_next = slot.is_offered() && self.control.is_untouched(vmsa);
        !is_next && self.control.rests(vmsa)
    }

    /// Processor `index`, which has no VMSA to run, has prepared another piece of memory.
    pub fn count_step(&self, index: usize) {
        if let Some(vcpu) = self.vcpus.get(index) {
            vcpu.waits.count();
        }
    }

    /// Processor `index` has a VMSA and goes to run the guest.
    pub fn count_wait(&self, index: usize) {
        if let Some(waited) = self.vcpus.get(index).and_then(|vcpu| vcpu.waits.answer()) {
            self.longest_wait.fetch_max(waited, Ordering::Relaxed);
        }
    }

    /// The VMSAs of processor `index` by number, for [`Registry::begin_service`].
    pub fn slots_of(&self, index: usize) -> impl Iterator<Item = usize> + use<C> {
        let (stride, end) = match self.vcpus.len() {
            stride if index < stride => (stride, self.slots.len()),
            _ => (1, 0),
        };
        (index..end).step_by(stride)
    }

    fn records_of(&self, index: usize) -> impl Iterator<Item = (usize, &Record)> {
        self.slots_of(index)
            .filter_map(|slot| Some((slot, self.slots.get(slot)?)))
    }

    /// Processor `index` has come back from the guest and looks whether a call was made from the
    /// VMSA in `slot`, one of [`Registry::slots_of`] itself. Until [`Registry::end_service`]
    /// nobody deletes that.
    ///
    /// [`Arrival::Wait`] is the answer while somebody deletes it: a processor must not go on
    /// before that is done or given up, and has nothing else to do. Nobody waits for it.
    pub fn begin_service(&self, index: usize, slot: usize) -> Arrival {
        let (Some(vcpu), Some(record)) = (self.vcpus.get(index), self.slots.get(slot)) else {
            return Arrival::None;
        };
        match record.slot.serve() {
            Look::Absent => Arrival::None,
            Look::Leaving => Arrival::Wait,
            Look::Here(()) => match self.shown_vmsa(slot) {
                Some(vmsa) => {
                    vcpu.serving.store(slot, Ordering::Relaxed);
                    Arrival::Serve(Service { vmsa, slot })
                }
                None => {
                    record.slot.end_service();
                    Arrival::None
                }
            },
        }
    }

    /// Ends what [`Registry::begin_service`] has begun; not after the VMSA has deleted itself.
    pub fn end_service(&self, index: usize, service: Service) {
        self.forget_service(index);
        if let Some(record) = self.slots.get(service.slot) {
            record.slot.end_service();
        }
    }

    /// Processor `index` works on no call any more: the VMSA it came from is deleted.
    pub fn forget_service(&self, index: usize) {
        if let Some(vcpu) = self.vcpus.get(index) {
            vcpu.serving.store(NONE, Ordering::Relaxed);
        }
    }

    /// Pins what is in a slot.
    fn look(&self, slot: usize) -> Look<(Pin<'_>, Frame)> {
        let Some(record) = self.slots.get(slot) else {
            return Look::Absent;
        };
        match record.slot.pin() {
            Look::Absent => Look::Absent,
            Look::Leaving => Look::Leaving,
            // Read under the pin: only then it is certain to be the VMSA that is pinned.
            Look::Here(pin) => match self.shown_vmsa(slot) {
                Some(vmsa) => Look::Here((pin, vmsa)),
                None => Look::Absent,
            },
        }
    }

    fn shown_area(&self, slot: usize) -> Option<Frame> {
        frame(self.shown.get(slot)?.calling_area.load(Ordering::SeqCst))
    }

    fn shown_vmsa(&self, slot: usize) -> Option<Frame> {
        frame(self.shown.get(slot)?.vmsa.load(Ordering::SeqCst))
    }

    /// The slot that processor `index` works on a call of.
    fn served_slot(&self, index: usize) -> Option<usize> {
        let slot = self.vcpus.get(index)?.serving.load(Ordering::Relaxed);
        (slot < self.slots.len()).then_some(slot)
    }

    /// Where the VMSA at `vmsa` is on record. There may be two for a moment: the page of one that
    /// is being deleted is the guest's again before its record goes, and may be lent anew.
    fn find(&self, vmsa: Frame) -> Option<usize> {
        let is_it = |&slot: &usize| self.shown_vmsa(slot) == Some(vmsa);
        let mut found = (0..self.slots.len()).filter(is_it);
        let first = found.next()?;
        let is_live = |slot: &usize| self.slots.get(*slot).is_some_and(|r| r.slot.is_live());
        core::iter::once(first)
            .chain(found)
            .find(is_live)
            .or(Some(first))
    }

    /// Ends what [`Registry::reserve`] has begun; the VMSA stays.
    fn let_go(&self, index: usize, slot: &Slot) {
        // A flush may have passed it over meanwhile.
        if let Some(vmsa) = self.shown_vmsa(index) {
            self.control.owe_flush(vmsa);
        }
        slot.undo_delete();
    }

    /// Gets a VMSA on record for oneself, as to delete it, with a bounded wait for those who look
    /// at it.
    fn reserve(&self, slot: &Slot, page: Frame, own: bool) -> Result<(), DeleteRefusal> {
        for _ in 0..DELETE_TRIES {
            match slot.begin_delete(own) {
                Ok(()) => return Ok(()),
                Err(Kept::Absent) => return Err(DeleteRefusal::Unknown),
                Err(Kept::Deleting) => return Err(DeleteRefusal::Busy),
                // A call is long; a look whether there is one is short.
                Err(Kept::Serving | Kept::Pinned) => core::hint::spin_loop(),
            }
        }
        log::debug!("{page:?} is looked at for too long");
        match slot.begin_delete(own) {
            Ok(()) => Ok(()),
            Err(Kept::Serving) => Err(DeleteRefusal::InUse),
            Err(_) => Err(DeleteRefusal::Busy),
        }
    }
}

/// What there is to run on a processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Presence {
    /// Nothing.
    None,
    /// Only what is being deleted: it goes soon, or it stays.
    Leaving,
    /// A VMSA.
    Live,
}

/// What a processor that has come back finds in one of its slots.
pub enum Arrival {
    /// Nothing.
    None,
    /// Something that is being deleted.
    Wait,
    /// A VMSA, from which a call may have been made.
    Serve(Service),
}

impl<C: VmsaControl> Vcpus for &Registry<'_, C> {
    fn steps(&self) -> Steps {
        Steps {
            taken: self.vcpus.iter().map(|vcpu| vcpu.waits.taken()).sum(),
            longest_wait: self.longest_wait.load(Ordering::Relaxed),
        }
    }

    fn has_apic_id(&self, apic_id: u32) -> bool {
        self.vcpus.iter().any(|vcpu| vcpu.apic_id == apic_id)
    }

    fn startup_features(&self) -> SevFeatures {
        self.startup_features
    }

    fn calling_area(&self, VcpuIndex(index): VcpuIndex) -> Option<Frame> {
        self.shown_area(self.served_slot(index)?)
    }

    fn exchange_calling_area(&self, VcpuIndex(index): VcpuIndex, new: Taken) -> Option<Taken> {
        // A processor is at work on a call, so its slot is its own.
        let slot = self.served_slot(index)?;
        let shown = self.shown.get(slot)?;
        let mut loans = self.slots.get(slot)?.loans.lock();
        shown
            .calling_area
            .store(new.frame().gpa(), Ordering::SeqCst);
        loans.area.replace(new)
    }

    fn register(&self, apic_id: u32, pages: VcpuPages) -> Result<(), NoRoom> {
        let owner = self.vcpus.iter().position(|vcpu| vcpu.apic_id == apic_id);
        let Some(owner) = owner else {
            return Err(NoRoom(pages));
        };
        let free = self
            .records_of(owner)
            .find(|(_, record)| record.slot.claim());
        let (Some((slot, record)), Some(vcpu)) = (free, self.vcpus.get(owner)) else {
            return Err(NoRoom(pages));
        };
        let VcpuPages { vmsa, calling_area } = pages;
        let frame = vmsa.frame();
        let area = calling_area.as_ref().map_or(0, |area| area.frame().gpa());
        if let Some(shown) = self.shown.get(slot) {
            shown.show(frame.gpa(), area);
        }
        let age = vcpu.made.fetch_add(1, Ordering::Relaxed);
        record.age.store(age, Ordering::Relaxed);
        *record.loans.lock() = Loans {
            vmsa: Some(vmsa),
            area: calling_area,
        };
        if self.presence(owner) == Presence::None {
            vcpu.waits.ask();
        }
        record.slot.publish();
        vcpu.waits.found_waiting();
        // Only now: what can run is on record.
        self.control.release(frame);
        record.slot.open();
        Ok(())
    }

    fn pass_on_area(
        &self,
        VcpuIndex(caller): VcpuIndex,
        apic_id: u32,
        area: Frame,
    ) -> Result<Inherited, NotPassedOn> {
        let owner = self.vcpus.iter().position(|vcpu| vcpu.apic_id == apic_id);
        let has_it = |&(slot, _): &(usize, &Record)| self.shown_area(slot) == Some(area);
        let found = owner.and_then(|owner| self.records_of(owner).find(has_it));
        let (slot, record) = found.ok_or(NotPassedOn::NotThere)?;
        if self.served_slot(caller) == Some(slot) {
            return Err(NotPassedOn::NotThere);
        }
        // Nobody may be about to answer a call that was made through it.
        self.reserve(&record.slot, area, false)
            .map_err(|refusal| match refusal {
                DeleteRefusal::Unknown | DeleteRefusal::Startup => NotPassedOn::NotThere,
                DeleteRefusal::InUse | DeleteRefusal::Busy => NotPassedOn::Busy,
            })?;
        let rests = self
            .shown_vmsa(slot)
            .is_some_and(|vmsa| self.rests(&record.slot, vmsa));
        let taken = if rests && self.shown_area(slot) == Some(area) {
            record.loans.lock().area.take()
        } else {
            None
        };
        if let (Some(_), Some(shown)) = (&taken, self.shown.get(slot)) {
            shown.calling_area.store(0, Ordering::SeqCst);
        }
        self.let_go(slot, &record.slot);
        let area = taken.ok_or(NotPassedOn::Busy)?;
        let from = Place(slot);
        Ok(Inherited { from, area })
    }

    fn return_area(&self, Inherited { from, area }: Inherited) -> Option<Taken> {
        let Place(slot) = from;
        let (Some(record), Some(shown)) = (self.slots.get(slot), self.shown.get(slot)) else {
            return Some(area);
        };
        // What is there now may be another VMSA, which came with an area of its own; one without
        // has lost it as the former owner has, and it is the same processor's.
        if self.shown_area(slot).is_some()
            || self.reserve(&record.slot, area.frame(), false).is_err()
        {
            return Some(area);
        }
        let mut loans = record.loans.lock();
        let left = match loans.area {
            None => {
                let gpa = area.frame().gpa();
                shown.calling_area.store(gpa, Ordering::SeqCst);
                loans.area.replace(area)
            }
            Some(_) => Some(area),
        };
        drop(loans);
        self.let_go(slot, &record.slot);
        left
    }

    fn replaced(&self, apic_id: u32, nth: usize) -> Option<Frame> {
        let owner = self.vcpus.iter().position(|vcpu| vcpu.apic_id == apic_id)?;
        let made = self.vcpus.get(owner)?.made.load(Ordering::Relaxed);
        let mut by_age = [(0, NONE); RECORDS_PER_VCPU];
        let mut count = 0;
        let live = self
            .records_of(owner)
            .filter(|&(slot, record)| slot != STARTUP && record.slot.is_live());
        for ((slot, record), place) in live.zip(&mut by_age) {
            // The count of those made may wrap: what matters is how many came after this one.
            *place = (made.wrapping_sub(record.age.load(Ordering::Relaxed)), slot);
            count += 1;
        }
        let by_age = by_age.get_mut(..count)?;
        by_age.sort_unstable_by(|one, other| other.cmp(one));
        // The last is the newest, and not replaced.
        let (_, slot) = by_age.split_last()?.1.get(nth)?;
        self.shown_vmsa(*slot)
    }

    fn is_changing(&self, apic_id: u32) -> bool {
        let owner = self.vcpus.iter().position(|vcpu| vcpu.apic_id == apic_id);
        owner.is_some_and(|owner| {
            self.records_of(owner)
                .any(|(_, record)| record.slot.is_changing())
        })
    }

    fn begin_delete(
        &self,
        VcpuIndex(caller): VcpuIndex,
        vmsa: Frame,
    ) -> Result<Deletion, DeleteRefusal> {
        let slot = self.find(vmsa).ok_or(DeleteRefusal::Unknown)?;
        let record = self.slots.get(slot).ok_or(DeleteRefusal::Unknown)?;
        if slot == STARTUP {
            return Err(DeleteRefusal::Startup);
        }
        let own = self.served_slot(caller) == Some(slot);
        self.reserve(&record.slot, vmsa, own)?;
        // From here on the slot is ours.
        let mut loans = record.loans.lock();
        let refusal = if self.shown_vmsa(slot) != Some(vmsa) {
            // Deleted and made anew since it was found.
            Some(DeleteRefusal::Busy)
        } else if !own && !self.rests(&record.slot, vmsa) {
            Some(DeleteRefusal::InUse)
        } else {
            None
        };
        match (refusal, loans.vmsa.take(), loans.area.take()) {
            (None, Some(page), calling_area) => {
                self.control.stop(vmsa);
                Ok(Deletion {
                    place: Place(slot),
                    pages: VcpuPages {
                        vmsa: page,
                        calling_area,
                    },
                })
            }
            (refusal, page, area) => {
                (loans.vmsa, loans.area) = (page, area);
                drop(loans);
                self.let_go(slot, &record.slot);
                Err(refusal.unwrap_or(DeleteRefusal::Unknown))
            }
        }
    }

    fn end_delete(&self, Place(slot): Place) {
        if let (Some(record), Some(shown)) = (self.slots.get(slot), self.shown.get(slot)) {
            record.slot.retire();
            shown.show(0, 0);
            record.slot.free();
        }
    }

    fn undo_delete(&self, VcpuIndex(caller): VcpuIndex, deletion: Deletion) {
        let Deletion {
            place: Place(slot),
            pages: VcpuPages { vmsa, calling_area },
        } = deletion;
        let Some(record) = self.slots.get(slot) else {
            return;
        };
        let frame = vmsa.frame();
        *record.loans.lock() = Loans {
            vmsa: Some(vmsa),
            area: calling_area,
        };
        self.control.owe_flush(frame);
        // The caller's own is released by the request loop, with the answer.
        if self.served_slot(caller) != Some(slot) {
            self.control.release(frame);
        }
        record.slot.undo_delete();
    }

    fn runs_from(&self, VcpuIndex(index): VcpuIndex, vmsa: Frame) -> bool {
        self.served_slot(index)
            .is_some_and(|slot| self.shown_vmsa(slot) == Some(vmsa))
    }

    fn take_debt(&self, VcpuIndex(index): VcpuIndex) -> Option<Debt> {
        self.vcpus.get(index)?.debt.try_lock()?.take()
    }

    fn put_debt(&self, VcpuIndex(index): VcpuIndex, debt: Debt) {
        let place = self.vcpus.get(index).and_then(|vcpu| vcpu.debt.try_lock());
        debug_assert!(place.is_some(), "nobody but processor {index} looks");
        if let Some(mut place) = place {
            *place = Some(debt);
        }
    }
}

/// The frame of a page the table shows; none for 0.
fn frame(gpa: u64) -> Option<Frame> {
    (gpa != 0).then(|| Frame::containing(Gpa::new(gpa).get()))
}

#[cfg(test)]
mod tests;
