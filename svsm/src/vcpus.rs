//! The registry of virtual processors: whose VMSA and whose calling area is where.
//!
//! Each VMSA the guest has made is a *record*. A processor runs from at most one of them, its
//! current one; records that were replaced stay until the guest deletes them (kernels replace
//! the firmware's processors without deleting them). Rules:
//!
//! - a page is on record only while it is Owned in the map, and leaves only after the hardware
//!   state is undone: a record outlives what it describes;
//! - records change under one lock; what a processor needs about itself it reads without;
//! - the current record of processor `i` is entry `i` of the public table, replaced ones follow
//!   behind the processors;
//! - a processor is in the guest, or serves a call, or is being deleted (`Activity`), and
//!   changes between these only from the first: nobody deletes the state under a call.

use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use accept::{Frame, NotFlushed, Taken};
use protocols::addr::Gpa;
use protocols::map::VcpuEntry;
use protocols::vmsa::SevFeatures;
use spin::Mutex;

use crate::protocol::{DeleteRefusal, TableFull, VcpuIndex, VcpuPages, Vcpus};

/// How often a flush looks at one VMSA before it gives up (I12). A look costs a locked
/// operation and a load, so all of them take milliseconds, in which the host's timer interrupts
/// whoever runs. Looks are counted and not timed: the host can make the time stamp counter
/// stand still.
const FLUSH_LOOKS: u32 = 1 << 18;
/// At every how many looks the processor is asked whether the VMSA runs; that costs hundreds of
/// cycles, or a trip to the host.
const LOOKS_PER_QUESTION: u32 = 64;
/// Replaced records that have room, for each processor.
const REPLACED_PER_VCPU: usize = 3;

/// What a processor does right now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Activity {
    /// The host may run its guest state; nobody at VMPL0 looks at it.
    InGuest = 0,
    /// Its call is being worked on, on that processor.
    Serving = 1,
    /// Its VMSA is being deleted, on another processor.
    Deleting = 2,
}

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

    fn show(&self, record: Option<&Record>) {
        let (vmsa, area) = record.map_or((0, 0), |record| (record.vmsa.gpa(), record.area.gpa()));
        self.calling_area.store(area, Ordering::Release);
        self.vmsa.store(vmsa, Ordering::Release);
    }
}

/// One processor.
#[derive(Debug)]
pub struct Vcpu {
    apic_id: u32,
    activity: AtomicU8,
}

impl Vcpu {
    /// A processor that has no guest state yet.
    #[must_use]
    pub const fn new(apic_id: u32) -> Self {
        Self {
            apic_id,
            activity: AtomicU8::new(Activity::InGuest as u8),
        }
    }

    fn change(&self, from: Activity, to: Activity) -> bool {
        self.activity
            .compare_exchange(from as u8, to as u8, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }

    fn is(&self, activity: Activity) -> bool {
        self.activity.load(Ordering::SeqCst) == activity as u8
    }
}

/// One VMSA that the guest was started with or has made.
#[derive(Debug)]
pub struct Record {
    owner: usize,
    vmsa: Frame,
    area: Frame,
    /// The right to give the VMSA back; the one of the start is never given back.
    vmsa_loan: Option<Taken>,
    area_loan: Option<Taken>,
    startup: bool,
    deleting: bool,
}

/// Memory for the registry, all of it made at boot.
pub struct Tables<'t> {
    /// One for each processor.
    pub vcpus: &'t [Vcpu],
    /// [`Tables::records_for`] of them, empty.
    pub records: &'t mut [Option<Record>],
    /// As many, for the referee.
    pub shown: &'t [Shown],
}

impl Tables<'_> {
    /// How many records and public entries `vcpus` processors need.
    #[must_use]
    pub const fn records_for(vcpus: usize) -> usize {
        vcpus * (1 + REPLACED_PER_VCPU)
    }
}

/// All processors.
pub struct Registry<'t, C> {
    vcpus: &'t [Vcpu],
    shown: &'t [Shown],
    records: Mutex<&'t mut [Option<Record>]>,
    control: C,
    startup_features: SevFeatures,
}

impl<'t, C: VmsaControl> Registry<'t, C> {
    /// The registry in the given memory.
    #[must_use]
    pub const fn new(tables: Tables<'t>, control: C, startup_features: SevFeatures) -> Self {
        Self {
            vcpus: tables.vcpus,
            shown: tables.shown,
            records: Mutex::new(tables.records),
            control,
            startup_features,
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
        let record = Record {
            owner: 0,
            vmsa,
            area: calling_area.frame(),
            vmsa_loan: None,
            area_loan: Some(calling_area),
            startup: true,
            deleting: false,
        };
        let mut records = self.records.lock();
        self.put(&mut records, 0, Some(record));
    }

    /// The VMSA that processor `index` runs from, if it has any.
    #[must_use]
    pub fn vmsa(&self, index: usize) -> Option<Frame> {
        frame(self.shown.get(index)?.vmsa.load(Ordering::Acquire))
    }

    /// Notes that processor `index` is about to run the guest.
    pub fn enter_guest(&self, index: usize) {
        if let Some(vcpu) = self.vcpus.get(index) {
            vcpu.change(Activity::Serving, Activity::InGuest);
        }
    }

    /// Notes that processor `index` has come back and may serve a call. Waits while another
    /// processor deletes its state, which is bounded work.
    pub fn leave_guest(&self, index: usize) {
        if let Some(vcpu) = self.vcpus.get(index) {
            while !vcpu.change(Activity::InGuest, Activity::Serving) && !vcpu.is(Activity::Serving)
            {
                core::hint::spin_loop();
            }
        }
    }

    /// Makes every processor drop its translations before it runs guest code again, and waits
    /// for those that run just now.
    ///
    /// A processor does this by itself when it is about to run a VMSA whose PCPU_ID is 0
    /// (APM 15.36.15). So a VMSA is done with when its PCPU_ID has been set since, or when it is
    /// seen not to run: it then passes there first. All VMSAs on record count, whatever
    /// `Activity` says of their processors: which of them run is the host's choice.
    ///
    /// # Errors
    /// [`NotFlushed`] when one ran for longer than the bound. The tempting shortcut, to go on all
    /// the same, lets a guest write to a page through a translation that is as old as the page's
    /// former life, after the page was found to be a good VMSA.
    pub fn flush_all(&self) -> Result<(), NotFlushed> {
        {
            // Under the lock: a page that is being given back is the guest's to write.
            let records = self.records.lock();
            for record in records.iter().flatten().filter(|record| !record.deleting) {
                self.control.owe_flush(record.vmsa);
            }
        }
        // Ascending, because a record that is replaced meanwhile moves to a higher slot. One that
        // is new meanwhile owes a flush from its making.
        (0..self.shown.len()).try_for_each(|slot| self.await_flush(slot))
    }

    /// Waits until the VMSA in `slot` has dropped its translations or does not run.
    fn await_flush(&self, slot: usize) -> Result<(), NotFlushed> {
        for look in 0..FLUSH_LOOKS {
            let may_run =
                |vmsa| !look.is_multiple_of(LOOKS_PER_QUESTION) || self.control.is_running(vmsa);
            match self.records.lock().get(slot) {
                // Its page may be the guest's already, so it cannot be asked: the end is near.
                Some(Some(record)) if record.deleting => {}
                Some(Some(Record { vmsa, .. }))
                    if !self.control.has_flushed(*vmsa) && may_run(*vmsa) => {}
                _ => return Ok(()),
            }
            core::hint::spin_loop();
        }
        Err(NotFlushed)
    }

    /// Puts a record into a slot and shows it. The lock is held: `records` proves it.
    fn put(&self, records: &mut [Option<Record>], slot: usize, record: Option<Record>) {
        if let (Some(place), Some(shown)) = (records.get_mut(slot), self.shown.get(slot)) {
            shown.show(record.as_ref());
            *place = record;
        }
    }

    /// A free slot for a record that no processor runs from.
    fn spare_slot(&self, records: &[Option<Record>]) -> Option<usize> {
        let is_free = |&slot: &usize| records.get(slot).is_some_and(Option::is_none);
        (self.vcpus.len()..records.len()).find(is_free)
    }

    /// The record of the VMSA at `vmsa`. There may be two for a moment: the page of one that is
    /// being deleted is the guest's again before its record goes, and may be lent anew.
    fn slot_of(records: &[Option<Record>], vmsa: Frame, deleting: bool) -> Option<usize> {
        let is_it = |record: &Record| record.vmsa == vmsa && record.deleting == deleting;
        records
            .iter()
            .position(|slot| slot.as_ref().is_some_and(is_it))
    }
}

impl<C: VmsaControl> Vcpus for &Registry<'_, C> {
    fn has_apic_id(&self, apic_id: u32) -> bool {
        self.vcpus.iter().any(|vcpu| vcpu.apic_id == apic_id)
    }

    fn startup_features(&self) -> SevFeatures {
        self.startup_features
    }

    fn calling_area(&self, VcpuIndex(index): VcpuIndex) -> Option<Frame> {
        if index >= self.vcpus.len() {
            return None;
        }
        frame(self.shown.get(index)?.calling_area.load(Ordering::Acquire))
    }

    fn exchange_calling_area(&self, VcpuIndex(index): VcpuIndex, new: Taken) -> Option<Taken> {
        let mut records = self.records.lock();
        let record = records.get_mut(index)?.as_mut()?;
        record.area = new.frame();
        let old = record.area_loan.replace(new);
        self.shown.get(index)?.show(Some(record));
        old
    }

    fn register(&self, apic_id: u32, pages: VcpuPages) -> Result<(), TableFull> {
        let owner = self
            .vcpus
            .iter()
            .enumerate()
            .find(|(_, vcpu)| vcpu.apic_id == apic_id);
        let Some((owner, vcpu)) = owner else {
            return Err(TableFull(pages));
        };
        let mut records = self.records.lock();
        if let Some(Some(Record { deleting: true, .. })) = records.get(owner) {
            return Err(TableFull(pages));
        }
        let spare = self.spare_slot(&records);
        let current = records.get_mut(owner).and_then(Option::take);
        // A processor keeps the state it makes a call from: the new one is on record, and the
        // host may run it, but calls are answered to the caller.
        let keeps = current.is_some() && !vcpu.is(Activity::InGuest);
        let (record_slot, moved_to) = match (&current, spare) {
            (None, _) => (owner, None),
            (Some(_), Some(spare)) if keeps => (spare, Some(owner)),
            (Some(_), Some(spare)) => (owner, Some(spare)),
            (Some(_), None) => {
                self.put(&mut records, owner, current);
                return Err(TableFull(pages));
            }
        };
        let record = Record {
            owner,
            vmsa: pages.vmsa.frame(),
            area: pages.calling_area.frame(),
            vmsa_loan: Some(pages.vmsa),
            area_loan: Some(pages.calling_area),
            startup: false,
            deleting: false,
        };
        if let Some(slot) = moved_to {
            self.put(&mut records, slot, current);
        }
        let vmsa = record.vmsa;
        self.put(&mut records, record_slot, Some(record));
        // Only now: what can run is on record.
        self.control.release(vmsa);
        Ok(())
    }

    fn begin_delete(
        &self,
        VcpuIndex(caller): VcpuIndex,
        vmsa: Frame,
    ) -> Result<VcpuPages, DeleteRefusal> {
        let mut records = self.records.lock();
        if Registry::<C>::slot_of(&records, vmsa, true).is_some() {
            return Err(DeleteRefusal::InUse);
        }
        let slot = Registry::<C>::slot_of(&records, vmsa, false).ok_or(DeleteRefusal::Unknown)?;
        let record = records
            .get_mut(slot)
            .and_then(Option::as_mut)
            .ok_or(DeleteRefusal::Unknown)?;
        if record.startup {
            return Err(DeleteRefusal::Startup);
        }
        let runs_elsewhere = slot == record.owner && record.owner != caller;
        if runs_elsewhere
            && let Some(vcpu) = self.vcpus.get(record.owner)
            && !vcpu.change(Activity::InGuest, Activity::Deleting)
        {
            return Err(DeleteRefusal::InUse);
        }
        match (record.vmsa_loan.take(), record.area_loan.take()) {
            (Some(vmsa), Some(calling_area)) => {
                record.deleting = true;
                self.control.stop(record.vmsa);
                Ok(VcpuPages { vmsa, calling_area })
            }
            // Only the startup record lacks a loan, and that was answered above.
            _ => Err(DeleteRefusal::Startup),
        }
    }

    fn end_delete(&self, vmsa: Frame) {
        let mut records = self.records.lock();
        if let Some(slot) = Registry::<C>::slot_of(&records, vmsa, true) {
            let owner = records
                .get(slot)
                .and_then(Option::as_ref)
                .map(|record| record.owner);
            self.put(&mut records, slot, None);
            if let Some(vcpu) = owner.filter(|&o| o == slot).and_then(|o| self.vcpus.get(o)) {
                vcpu.change(Activity::Deleting, Activity::InGuest);
            }
        }
    }

    fn undo_delete(&self, pages: VcpuPages) {
        let mut records = self.records.lock();
        let slot = Registry::<C>::slot_of(&records, pages.vmsa.frame(), true);
        let record = slot
            .and_then(|slot| records.get_mut(slot))
            .and_then(Option::as_mut);
        let Some(record) = record else { return };
        record.vmsa_loan = Some(pages.vmsa);
        record.area_loan = Some(pages.calling_area);
        record.deleting = false;
        // A flush may have passed it over meanwhile.
        self.control.owe_flush(record.vmsa);
        match self
            .vcpus
            .get(record.owner)
            .filter(|_| slot == Some(record.owner))
        {
            // The caller's own: the request loop releases it with the answer.
            Some(vcpu) if vcpu.is(Activity::Serving) => {}
            Some(vcpu) => {
                self.control.release(record.vmsa);
                vcpu.change(Activity::Deleting, Activity::InGuest);
            }
            None => self.control.release(record.vmsa),
        }
    }

    fn runs_from(&self, VcpuIndex(index): VcpuIndex, vmsa: Frame) -> bool {
        index < self.vcpus.len() && self.vmsa(index) == Some(vmsa)
    }
}

/// The frame of a page the table shows; none for 0.
fn frame(gpa: u64) -> Option<Frame> {
    (gpa != 0).then(|| Frame::containing(Gpa::new(gpa).get()))
}

#[cfg(test)]
mod tests;
