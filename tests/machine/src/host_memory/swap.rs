//! What a host does to a page that the guest has accepted, to have it accepted twice.
//!
//! On hardware an address is mapped to another page by the nested page table, and each page has an
//! RMP entry of its own that follows it. Here an address has one page, so the other page is kept
//! aside, entry and contents, and the two are exchanged.

use alloc::boxed::Box;

use super::{HostMemory, Page};
use crate::layout::Place;
use crate::memory::PhysicalMemory;
use crate::platform::{Cause, Views};
use crate::rmp::{Entry, UpdateError};
use crate::types::{Alias, Gpa, PAGE_SIZE, PageSize};

/// A page that the host keeps for an address while another is there.
pub(super) struct Aside {
    entry: Entry,
    generation: u32,
    contents: Box<[u8; PAGE_SIZE as usize]>,
}

impl HostMemory {
    /// Puts another page at the address: the first time one that was just assigned, from then on
    /// the one that was there before.
    ///
    /// # Errors
    /// [`UpdateError::Input`] unless the page is private and assigned.
    pub(crate) fn exchange<P: PhysicalMemory>(
        &mut self,
        memory: &P,
        place: &Place,
        gpa: Gpa,
    ) -> Result<(), UpdateError> {
        if self.attribute(place) == Alias::Shared || !self.rmp.entry(place).is_assigned() {
            return Err(UpdateError::Input);
        }
        self.psmash(place, gpa);
        let slot = place.slot.index();
        let mut leaving = Aside {
            entry: self.rmp.entry(place),
            generation: self.pages[slot].generation,
            contents: Box::new([0; PAGE_SIZE as usize]),
        };
        memory.read(place.spa, &mut leaving.contents[..]);
        match self.aside.remove(&slot) {
            Some(Aside {
                entry,
                generation,
                contents,
            }) => {
                self.rmp.put_entry(place, entry);
                memory.write(place.spa, &contents[..]);
                self.pages[slot] = Page {
                    generation,
                    ..self.pages[slot]
                };
            }
            None => {
                self.rmp.unassign(place, PageSize::Size4K)?;
                self.assign(memory, place, gpa, PageSize::Size4K)?;
            }
        }
        self.aside.insert(slot, leaving);
        self.invalidate(gpa, PageSize::Size4K, Views::ALL, Cause::Host);
        Ok(())
    }

    /// Removes the page or block from the RMP and adds it again: assigned, not validated.
    ///
    /// # Errors
    /// [`UpdateError::Input`] unless all of it is private and assigned.
    pub(crate) fn re_add<P: PhysicalMemory>(
        &mut self,
        memory: &P,
        place: &Place,
        gpa: Gpa,
        size: PageSize,
    ) -> Result<(), UpdateError> {
        if self.attribute(place) == Alias::Shared || !self.rmp.entry(place).is_assigned() {
            return Err(UpdateError::Input);
        }
        self.take_away(memory, place, gpa, size)?;
        match size {
            PageSize::Size4K => self.prepare(memory, place, gpa),
            PageSize::Size2M => self.back_by_2m(memory, place, gpa),
        }
    }
}
