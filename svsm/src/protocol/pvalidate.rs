//! PVALIDATE: pages are accepted and rescinded by a list in the guest's memory (SVSM 6).
//!
//! What the guest relies on:
//!
//! * `next` is the number of entries done: after SUCCESS all of them, after an error the index of
//!   the entry that failed. It is written back whatever the outcome. Guests pass lists whose
//!   `next` they have advanced themselves, to skip an entry that failed.
//! * An entry is done as a whole or not at all; the engine sees to that (I9). A 2 MiB entry on
//!   smaller pages is split there, so a guest never sees a size mismatch.
//! * INCOMPLETE and BUSY ask for the same call again.

use accept::{Accepting, Backend, Block, Error, FlushOwed, Frame, OnNoChange};
use protocols::addr::{Gpa, PageSize};
use protocols::svsm::{
    EntryError, LIST_ALIGNMENT, LIST_NEXT_OFFSET, PvalidateAction, PvalidateEntry, PvalidateHeader,
    PvalidateRequest, ResultCode, entries_that_fit,
};
use protocols::terminate::TurnstileReason;
use zerocopy::transmute;

use super::argument::ArgumentPage;
use super::{Debt, GuestMemory, Service, Stop, VcpuIndex, Vcpus, VmsaPages, WORK_BUDGET, stop_for};
use crate::attestation::Carrier;

const _: () = assert!(WORK_BUDGET >= PageSize::Size2M.bytes());

/// How often one call tries a flush that is not certain, before it answers INCOMPLETE.
const FLUSH_TRIES: u32 = 2;

/// A list that the guest has passed: a header whose counts make sense, in a page.
struct List<'a, B, M> {
    page: ArgumentPage<'a, B, M>,
    /// Offset of the header in the page.
    offset: u64,
    /// Entries; they all lie in the page.
    entries: u16,
}

/// How far a call has come.
struct Progress {
    /// Entries done, those of earlier calls included.
    next: u16,
    /// Bytes changed by this call.
    work: u64,
    /// Entries were done by this call.
    any: bool,
    /// A flush is owed.
    owed: Option<FlushOwed>,
    /// The entry that was done last by this call.
    last: Option<PvalidateEntry>,
    /// The entry that an earlier call has done without saying so, until the first entry was read.
    repeated: Option<PvalidateEntry>,
}

impl<'a, B: Backend, M: GuestMemory> List<'a, B, M> {
    /// Reads the header at `list` and checks it. Returns the list and its `next`.
    fn open(page: ArgumentPage<'a, B, M>, list: Gpa) -> Result<(Self, u16), Stop> {
        if !list.get().is_multiple_of(LIST_ALIGNMENT) {
            return Err(ResultCode::INVALID_PARAMETER.into());
        }
        let offset = list.offset_in_page();
        let header: PvalidateHeader = transmute!(page.read_u64(offset)?);
        let fits = u64::from(header.entries) <= entries_that_fit(list);
        if header.entries == 0 || !fits || header.next >= header.entries {
            return Err(ResultCode::INVALID_PARAMETER.into());
        }
        Ok((
            Self {
                page,
                offset,
                entries: header.entries,
            },
            header.next,
        ))
    }

    /// Reads an entry, which must be one of `entries`.
    fn entry(&self, index: u16) -> Result<PvalidateEntry, Stop> {
        let header = size_of::<PvalidateHeader>() as u64;
        let offset = header + u64::from(index) * size_of::<PvalidateEntry>() as u64;
        self.page.read_u64(self.offset + offset).map(PvalidateEntry)
    }

    /// Reports how far the list was worked off.
    fn write_next(&self, next: u16) -> Result<(), Stop> {
        self.page.write_u16(self.offset + LIST_NEXT_OFFSET, next)
    }
}

impl<B: Backend, M: GuestMemory, V: Vcpus, P: VmsaPages, C: Carrier> Service<'_, B, M, V, P, C> {
    pub(super) fn pvalidate(&self, caller: VcpuIndex, rcx: u64) -> Result<(), Stop> {
        let gpa = Gpa::new(rcx);
        let area = self.vcpus.calling_area(caller);
        let page = ArgumentPage::around(self.engine, &self.memory, area, gpa);
        let (list, next) = List::open(page, gpa)?;

        let mut progress = Progress {
            next,
            work: 0,
            any: false,
            owed: None,
            last: None,
            repeated: None,
        };
        self.settle(caller, &mut progress)?;
        let ended = self.work_off(caller, &list, &mut progress);
        if let Err(Stop::Machine(_)) = ended {
            return ended;
        }
        // One exit: whatever happened, what is owed is paid and what was done is reported.
        if let Some(flush) = self.pay(progress.owed.take()) {
            // The guest asks again, also for the last entry, which so stays unreported.
            let done = progress.last.filter(|_| progress.next == list.entries);
            progress.next -= u16::from(done.is_some());
            self.vcpus.put_debt(caller, Debt { flush, done });
            list.write_next(progress.next)?;
            return Err(ResultCode::INCOMPLETE.into());
        }
        list.write_next(progress.next)?;
        ended
    }

    /// Flushes what rescinds owe, and returns what is owed still. The guest hears of success only
    /// when nothing is (I3): it would share a page with the host that another of its processors
    /// still writes secrets to. It does not wait here for a processor that runs on and on, but
    /// asks again (I12).
    fn pay(&self, mut owed: Option<FlushOwed>) -> Option<FlushOwed> {
        for _ in 0..FLUSH_TRIES {
            owed = self.engine.flush(owed?).err();
        }
        owed
    }

    /// Pays what an earlier call of this processor has left owing, before anything else. An entry
    /// that was done then may come again.
    fn settle(&self, caller: VcpuIndex, progress: &mut Progress) -> Result<(), Stop> {
        let Some(Debt { flush, done }) = self.vcpus.take_debt(caller) else {
            return Ok(());
        };
        if let Some(flush) = self.pay(Some(flush)) {
            self.vcpus.put_debt(caller, Debt { flush, done });
            return Err(ResultCode::INCOMPLETE.into());
        }
        progress.repeated = done;
        Ok(())
    }

    /// Does entry after entry; on return `progress.next` names the first that is not done.
    fn work_off(
        &self,
        caller: VcpuIndex,
        list: &List<'_, B, M>,
        progress: &mut Progress,
    ) -> Result<(), Stop> {
        let mut accepting = self.engine.accepting();
        while progress.next < list.entries {
            if list.page.takes_lock() {
                accepting.release();
            }
            let done = list.entry(progress.next).and_then(|entry| {
                let mut request = entry.decode().map_err(malformed)?;
                // To be in that state already is no mistake of an entry that put it there. What
                // another processor has made of the page since is undone: the guest may have lost
                // interest in the old list, and means it now.
                request.ignore_no_change |= progress.repeated.take() == Some(entry);
                self.apply(caller, &request, &mut accepting, progress)
                    .map(|()| entry)
            });
            match done {
                Ok(entry) => {
                    progress.next += 1;
                    progress.any = true;
                    progress.last = Some(entry);
                }
                // BUSY says that nothing was done.
                Err(Stop::Result(ResultCode::BUSY)) if progress.any => {
                    return Err(ResultCode::INCOMPLETE.into());
                }
                Err(stop) => return Err(stop),
            }
        }
        Ok(())
    }

    /// Does one entry.
    fn apply(
        &self,
        caller: VcpuIndex,
        request: &PvalidateRequest,
        accepting: &mut Accepting<'_, '_, B>,
        progress: &mut Progress,
    ) -> Result<(), Stop> {
        // An entry is no larger than the budget, so a call does one at least.
        if progress.work + request.size.bytes() > WORK_BUDGET {
            return Err(ResultCode::INCOMPLETE.into());
        }
        let size = match request.size {
            PageSize::Size4K => accept::PageSize::Size4K,
            PageSize::Size2M => accept::PageSize::Size2M,
        };
        let block = Block::try_new(Frame::containing(request.gpa.get()), size)
            .map_err(|_| ResultCode::INVALID_PARAMETER)?;
        let on_no_change = match request.ignore_no_change {
            true => OnNoChange::Ignore,
            false => OnNoChange::Fail,
        };
        let (changed, on_lie) = match request.action {
            PvalidateAction::Validate => {
                let done = accepting.accept(block, on_no_change);
                let changed = done.map(|done| done.changed_pages);
                (changed, TurnstileReason::ALREADY_VALID)
            }
            PvalidateAction::Rescind => {
                let rescinded = accepting.engine().rescind(block, on_no_change);
                let changed = rescinded.map(|rescinded| {
                    progress.owed = rescinded.flush.or(progress.owed.take());
                    rescinded.changed_pages
                });
                (changed, TurnstileReason::NOT_VALIDATED)
            }
        };
        if let Ok(0) | Err(Error::NoChange) = changed {
            self.vcpus.count_unchanged(caller);
        }
        let changed_pages = changed.map_err(|error| self.refused(request, error, on_lie))?;
        progress.work += u64::from(changed_pages) * PageSize::Size4K.bytes();
        if request.action == PvalidateAction::Validate && request.size == PageSize::Size2M {
            let room = WORK_BUDGET - progress.work;
            progress.work += self.ahead.prepare_behind(accepting.engine(), block, room)?;
        }
        Ok(())
    }

    fn refused(&self, request: &PvalidateRequest, error: Error, on_lie: TurnstileReason) -> Stop {
        if error == Error::HostLied {
            log::error!(
                "{:?} of {} ({:?})",
                request.action,
                request.gpa,
                request.size
            );
        }
        stop_for(error, on_lie)
    }
}

/// What the guest is told about an entry without meaning.
fn malformed(error: EntryError) -> Stop {
    if let EntryError::ReservedBits(bits) = error {
        // The one mistake that a real guest makes, and then it dies with no more than a code.
        log::warn!("PVALIDATE entry with reserved bits {bits:#x}: Linux before 6.12.44?");
    }
    ResultCode::INVALID_PARAMETER.into()
}
