//! Page state changes (`ghcb.md` §6), by list and by MSR.
//!
//! A change moves the host's attribute; the RMP entry of a page made private comes with its
//! first use, as with guest_memfd. The host believes the guest that it has rescinded a page
//! before it shares it. The machine does not, and says so when it was not.

use alloc::format;

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
        while header.current <= header.end {
            let at =
                offset + size_of::<Header>() + usize::from(header.current) * size_of::<Entry>();
            let entry = exchange
                .buffer(at, size_of::<Entry>())
                .map(Entry::read_from_bytes);
            let Some(Ok(entry)) = entry else {
                return Outcome::INVALID_HEADER;
            };
            let outcome = self.change_entry(vmpl, entry);
            if outcome != Outcome::OK {
                let text = format!("page state change entry {:#x}: {outcome:?}", entry.0);
                self.refuse(vmpl, Some(Gpa::from_frame_truncating(entry.frame())), text);
                exchange.write_buffer(offset, header.as_bytes());
                return outcome;
            }
            let done = entry.with_current_page(entry.size().pages());
            exchange.write_buffer(at, done.as_bytes());
            header.current += 1;
        }
        exchange.write_buffer(offset, header.as_bytes());
        Outcome::OK
    }

    fn change_entry(&mut self, vmpl: Vmpl, entry: Entry) -> Outcome {
        if !entry.is_well_formed() || !entry.operation().is_known() {
            return Outcome::INVALID_ENTRY;
        }
        let gpa = Gpa::from_frame_truncating(entry.frame());
        let done = entry.current_page();
        // An entry the host had begun before is finished page by page.
        let (size, first) = match (entry.size(), done) {
            (PageSize::Size2M, 0) => (PageSize::Size2M, 0),
            _ => (PageSize::Size4K, done),
        };
        for page in (first..entry.size().pages()).step_by(size.pages() as usize) {
            let at = Gpa::new(gpa.get() + page * PAGE_SIZE);
            if self
                .change_page_state(vmpl, at, entry.operation(), size)
                .is_err()
            {
                return Outcome::HOST_ERROR;
            }
        }
        Outcome::OK
    }

    /// Changes one page or one block. `Err` has been told to the log.
    pub(super) fn change_page_state(
        &mut self,
        vmpl: Vmpl,
        gpa: Gpa,
        operation: PageOperation,
        size: PageSize,
    ) -> Result<(), ()> {
        let to = match operation {
            PageOperation::PRIVATE => Alias::Private,
            PageOperation::SHARED => Alias::Shared,
            // KVM takes both hints as done.
            PageOperation::PSMASH | PageOperation::UNSMASH => return Ok(()),
            _ => {
                self.refuse(vmpl, Some(gpa), format!("page operation {operation:?}"));
                return Err(());
            }
        };
        if size == PageSize::Size2M && self.whole_block(gpa).is_none() {
            // A block with holes: each page for itself.
            for page in 0..size.pages() {
                let at = Gpa::new(gpa.get() + page * PAGE_SIZE);
                self.change_page_state(vmpl, at, operation, PageSize::Size4K)?;
            }
            return Ok(());
        }
        let Some(place) = self.host.layout().place(gpa) else {
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
        };
        if to == Alias::Shared {
            self.note_unrescinded(vmpl, gpa, size);
        }
        if let Err(error) = self.host.convert(&self.memory, &place, gpa, size, to) {
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

    fn whole_block(&self, gpa: Gpa) -> Option<()> {
        self.host.layout().place(gpa)?.block.map(|_| ())
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
