//! What calls of the guest do to the registry: making, deleting and replacing VMSAs, and moving
//! calling areas between them.

use core::sync::atomic::Ordering;

use accept::{Frame, Taken};
use protocols::vmsa::SevFeatures;

use super::slot::{Kept, Slot};
use super::{Loans, NONE, Presence, RECORDS_PER_VCPU, Record, Registry, STARTUP, VmsaControl};
use crate::protocol::{
    Debt, DeleteRefusal, Deletion, Inherited, NoRoom, NotPassedOn, Place, Replaced, Steps,
    VcpuIndex, VcpuPages, Vcpus,
};

/// How often a deletion is tried although somebody looks at the VMSA. Looks are short.
const DELETE_TRIES: u32 = 1 << 12;

impl<C: VmsaControl> Registry<'_, C> {
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

    /// Whether a VMSA that one has reserved neither runs nor is about to.
    fn rests(&self, slot: &Slot, vmsa: Frame) -> bool {
        let is_next = slot.is_offered() && self.control.is_untouched(vmsa);
        !is_next && self.control.rests(vmsa)
    }
}

impl<C: VmsaControl> Vcpus for &Registry<'_, C> {
    fn steps(&self) -> Steps {
        Steps {
            taken: self.vcpus.iter().map(|vcpu| vcpu.waits.taken()).sum(),
            longest_wait: self.longest_wait.load(Ordering::Relaxed),
        }
    }

    fn count_unchanged(&self, VcpuIndex(index): VcpuIndex) {
        if let Some(vcpu) = self.vcpus.get(index) {
            // Nobody else writes it: no read-modify-write is needed.
            let before = vcpu.unchanged.load(Ordering::Relaxed);
            vcpu.unchanged
                .store(before.wrapping_add(1), Ordering::Relaxed);
        }
    }

    fn unchanged(&self) -> u64 {
        let each = self.vcpus.iter();
        each.map(|vcpu| vcpu.unchanged.load(Ordering::Relaxed))
            .fold(0, u64::wrapping_add)
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

    fn replaced(&self, apic_id: u32, nth: usize) -> Replaced {
        let owner = self.vcpus.iter().position(|vcpu| vcpu.apic_id == apic_id);
        let Some((owner, vcpu)) = owner.and_then(|at| Some((at, self.vcpus.get(at)?))) else {
            return Replaced::None;
        };
        let made = vcpu.made.load(Ordering::Relaxed);
        let mut by_age = [(0, NONE); RECORDS_PER_VCPU];
        let mut places = by_age.iter_mut();
        let mut absent = Replaced::None;
        for (slot, record) in self.records_of(owner) {
            if !record.slot.is_live() {
                absent = Replaced::NotNow;
            } else if slot != STARTUP
                && let Some(place) = places.next()
            {
                // The count of those made may wrap: what matters is how many came after this one.
                *place = (made.wrapping_sub(record.age.load(Ordering::Relaxed)), slot);
            }
        }
        let free = places.len();
        let by_age = by_age.get_mut(..RECORDS_PER_VCPU - free);
        let by_age = by_age.unwrap_or_default();
        by_age.sort_unstable_by(|one, other| other.cmp(one));
        // The last is the newest, and not replaced.
        let older = by_age.split_last().map_or(&[][..], |(_, older)| older);
        match older.get(nth) {
            None => absent,
            // It may have left in the meantime.
            Some((_, slot)) => self
                .shown_vmsa(*slot)
                .map_or(Replaced::NotNow, Replaced::Here),
        }
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
