//! Page state changes (`ghcb.md` §6), by list and by MSR.
//!
//! A change moves the host's attribute; the RMP entry of a page made private comes with its
//! first use, as with guest_memfd. The host believes the guest that it has rescinded a page
//! before it shares it. The machine does not, and says so when it was not. Neighbouring entries
//! with the same operation and size are one change, as in KVM.

use alloc::format;
use alloc::vec;
use core::ops::Range;

use protocols::ghcb::PageOperation;
use protocols::ghcb::psc::{Entry, Header, MAX_ENTRIES, Outcome};
use zerocopy::{FromBytes, IntoBytes};

use super::page::Exchange;
use crate::memory::PhysicalMemory;
use crate::platform::Platform;
use crate::settings::Hostile;
use crate::types::{Alias, Gpa, PAGE_SIZE, PageSize, Vmpl};

impl<P: PhysicalMemory> Platform<P> {
    /// Works a list in the shared buffer at `offset`. Returns SW_EXITINFO2.
    pub(super) fn change_page_states(
        &mut self,
        vmpl: Vmpl,
        exchange: &mut Exchange,
        offset: usize,
    ) -> Outcome {
        if self.settings.is_hostile(Hostile::GhcbPsc) {
            return Outcome::HOST_ERROR;
        }
        let room = exchange
            .buffer_len()
            .saturating_sub(offset + size_of::<Header>());
        let room = (room / size_of::<Entry>()).min(MAX_ENTRIES);
        let header = exchange.buffer(offset, size_of::<Header>());
        let Some(Ok(mut header)) = header.map(Header::read_from_bytes) else {
            self.refuse(
                vmpl,
                None,
                format!("no room for a page state list at {offset:#x}"),
            );
            return Outcome::INVALID_HEADER;
        };
        // The reserved word is not looked at: OVMF leaves what the buffer held before.
        if usize::from(header.end) >= room {
            let text = format!(
                "page state list ends at {}, there is room for {room}",
                header.end
            );
            self.refuse(vmpl, None, text);
            return Outcome::INVALID_HEADER;
        }
        let entry_at =
            |index: u16| offset + size_of::<Header>() + usize::from(index) * size_of::<Entry>();
        let read = |exchange: &Exchange, index: u16| {
            let bytes = exchange.buffer(entry_at(index), size_of::<Entry>())?;
            Entry::read_from_bytes(bytes).ok()
        };
        while header.current <= header.end {
            let Some(first) = read(exchange, header.current) else {
                return Outcome::INVALID_HEADER;
            };
            let mut range = vec![first];
            for index in header.current + 1..=header.end {
                match read(exchange, index) {
                    Some(next) if continues(&range, next) => range.push(next),
                    _ => break,
                }
            }
            let outcome = self.change_entries(vmpl, first, range.len() as u64);
            if outcome != Outcome::OK {
                let text = format!("page state change entry {:#x}: {outcome:?}", first.0);
                self.refuse(vmpl, Some(Gpa::from_frame_truncating(first.frame())), text);
                exchange.write_buffer(offset, header.as_bytes());
                return outcome;
            }
            for entry in range {
                let done = entry.with_current_page(entry.size().pages());
                exchange.write_buffer(entry_at(header.current), done.as_bytes());
                header.current += 1;
            }
        }
        exchange.write_buffer(offset, header.as_bytes());
        Outcome::OK
    }

    /// Works `count` entries that continue each other; an entry the host had begun before is
    /// finished.
    fn change_entries(&mut self, vmpl: Vmpl, first: Entry, count: u64) -> Outcome {
        if !first.is_well_formed() || !first.operation().is_known() {
            return Outcome::INVALID_ENTRY;
        }
        let base = Gpa::from_frame_truncating(first.frame()).get();
        let start = base + first.current_page() * PAGE_SIZE;
        let end = base + count * first.size().bytes();
        match self.change_range(vmpl, start..end, first.operation()) {
            Ok(()) => Outcome::OK,
            Err(()) => Outcome::HOST_ERROR,
        }
    }

    /// Changes a range of pages, by whole blocks where there are some: the host is told what
    /// becomes of a folio as a whole, however many entries say it.
    fn change_range(
        &mut self,
        vmpl: Vmpl,
        range: Range<u64>,
        operation: PageOperation,
    ) -> Result<(), ()> {
        if let Some(to) = alias_after(operation) {
            self.host.count_range(to);
        }
        let mut at = range.start;
        while at < range.end {
            let gpa = Gpa::new(at);
            let whole = gpa.is_aligned(PageSize::Size2M)
                && range.end - at >= PageSize::Size2M.bytes()
                && self.is_whole_block(gpa);
            let size = if whole {
                PageSize::Size2M
            } else {
                PageSize::Size4K
            };
            self.change_page_state(vmpl, gpa, operation, size)?;
            at += size.bytes();
        }
        Ok(())
    }

    /// Changes one page by the MSR protocol. `Err` has been told to the log.
    pub(super) fn change_page(
        &mut self,
        vmpl: Vmpl,
        gpa: Gpa,
        operation: PageOperation,
    ) -> Result<(), ()> {
        self.change_range(vmpl, gpa.get()..gpa.get() + PAGE_SIZE, operation)
    }

    /// Changes one page or one whole block. `Err` has been told to the log.
    fn change_page_state(
        &mut self,
        vmpl: Vmpl,
        gpa: Gpa,
        operation: PageOperation,
        size: PageSize,
    ) -> Result<(), ()> {
        let Some(to) = alias_after(operation) else {
            // KVM takes both hints as done.
            if matches!(operation, PageOperation::PSMASH | PageOperation::UNSMASH) {
                return Ok(());
            }
            self.refuse(vmpl, Some(gpa), format!("page operation {operation:?}"));
            return Err(());
        };
        if self.host.layout().place(gpa).is_none() {
            // Where there are only devices everything is shared; QEMU takes that as done.
            return match to {
                Alias::Shared => Ok(()),
                Alias::Private => {
                    self.refuse(
                        vmpl,
                        Some(gpa),
                        format!("{gpa} is no memory to make private"),
                    );
                    Err(())
                }
            };
        }
        if to == Alias::Shared {
            self.note_unrescinded(vmpl, gpa, size);
        }
        if let Err(error) = self.convert(gpa, size, to) {
            self.refuse(vmpl, Some(gpa), format!("host cannot convert: {error:?}"));
            return Err(());
        }
        let counters = self.counters.vmpl(vmpl);
        match to {
            Alias::Private => counters.psc_private_pages += size.pages(),
            Alias::Shared => counters.psc_shared_pages += size.pages(),
        }
        Ok(())
    }

    fn is_whole_block(&self, gpa: Gpa) -> bool {
        let place = self.host.layout().place(gpa);
        place.is_some_and(|place| place.block.is_some())
    }

    /// A page that goes to the host still validated: real hosts clear Validated by RMPUPDATE
    /// and hide the mistake; one that does not would keep a page the guest thinks is gone.
    fn note_unrescinded(&mut self, vmpl: Vmpl, gpa: Gpa, size: PageSize) {
        for page in 0..size.pages() {
            let at = Gpa::new(gpa.get() + page * PAGE_SIZE);
            let Some(place) = self.host.layout().place(at) else {
                continue;
            };
            let entry = self.host.rmp().entry(&place);
            if entry.is_assigned() && entry.is_validated() {
                self.counters.violations.unrescinded_share += 1;
                if self.counters.violations.unrescinded_share <= 8 {
                    self.refuse(vmpl, Some(at), format!("{at} is shared without a rescind"));
                }
            }
        }
    }
}

/// Whether `next` goes on where `range`, which is not empty, ends: KVM makes one change of such
/// entries (`unaccepted-memory.md` §7).
fn continues(range: &[Entry], next: Entry) -> bool {
    let first = range[0];
    let frames = range.len() as u64 * first.size().pages();
    first.is_well_formed()
        && next.is_well_formed()
        && next.current_page() == 0
        && next.operation() == first.operation()
        && next.size() == first.size()
        && next.frame() == first.frame() + frames
}

/// The attribute of a page after the operation; none if it does not change.
const fn alias_after(operation: PageOperation) -> Option<Alias> {
    match operation {
        PageOperation::PRIVATE => Some(Alias::Private),
        PageOperation::SHARED => Some(Alias::Shared),
        _ => None,
    }
}
