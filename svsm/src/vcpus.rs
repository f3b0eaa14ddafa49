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
//!   answered a call is awaited in that VMSA; one that has not, and has never run anything,
//!   leaves it to the host which one to run, so all that it has *offered* stay until it is back;
//! - the public table shows the records in the order of the slots: first those of the first
//!   slot of each processor, then those of the second, and so on.

use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use accept::{Frame, Taken};
use protocols::addr::Gpa;
use protocols::map::VcpuEntry;
use protocols::vmsa::SevFeatures;
use spin::Mutex;

use crate::protocol::Debt;
use slot::{Look, Pin, Slot};
use waits::Waits;

mod calls;
mod flush;
mod slot;
mod waits;

/// VMSAs that one processor may have on record.
pub const RECORDS_PER_VCPU: usize = 4;
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

/// One processor. In cache lines of its own: most of it is written by the processor itself, at each
/// call.
#[derive(Debug)]
#[repr(align(128))]
pub struct Vcpu {
    apic_id: u32,
    /// The slot whose call it works on. Only the processor itself looks at it.
    serving: AtomicUsize,
    /// How many VMSAs were made for it, which tells old from new.
    made: AtomicU32,
    /// What it owes before it may say that a rescind is done. Only the processor itself looks.
    debt: Mutex<Option<Debt>>,
    /// Requests of its calls that found nothing to change. Only the processor itself writes it.
    unchanged: AtomicU64,
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
            unchanged: AtomicU64::new(0),
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
    /// there is. Until [`Registry::withdraw`] nobody deletes what has never been run, if nothing of
    /// this processor has: else the host goes on with that, unless the guest itself tells it to run
    /// another, which is then the guest's to keep.
    ///
    /// One that somebody is deleting may stay: the deleter has yet to find out whether it is about
    /// to run. A processor that takes it for gone gives itself back, and nobody starts it again.
    #[must_use]
    pub fn offer(&self, index: usize) -> Presence {
        let has_run = |slot| match self.look(slot) {
            Look::Here((_pin, vmsa)) => !self.control.is_untouched(vmsa),
            Look::Absent | Look::Leaving => false,
        };
        let go = if self.slots_of(index).any(has_run) {
            Slot::glance
        } else {
            Slot::offer
        };
        self.look_at_all(index, go)
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

/// The frame of a page the table shows; none for 0.
fn frame(gpa: u64) -> Option<Frame> {
    (gpa != 0).then(|| Frame::containing(Gpa::new(gpa).get()))
}

#[cfg(test)]
mod tests;
