//! The list of hand-off blocks that tells the guest's firmware about memory.
//!
//! It is made from the host's map after that was checked, without what is the paravisor's, and says of
//! each stretch whether the paravisor has accepted it for the firmware already.

use protocols::hob::{Handoff, Header, HobType, Resource, ResourceAttributes, ResourceType};
use protocols::terminate::TurnstileReason;
use zerocopy::IntoBytes;

use crate::memory::layout::PageRange;

/// Bytes of a list at most.
pub const MAX_BYTES: usize = 4096;

/// A finished list.
#[derive(Debug)]
pub struct List {
    bytes: [u8; MAX_BYTES],
    used: usize,
}

impl List {
    /// Lists the memory `memory` (ascending) for a place at `gpa`: without the stretches `hidden`; the
    /// stretches `accepted` are system memory, all else is unaccepted.
    ///
    /// # Errors
    ///
    /// [`TurnstileReason::MAP_TOO_MANY`] if a page is not enough.
    pub fn make(
        gpa: u64,
        memory: impl Iterator<Item = PageRange>,
        hidden: &[PageRange],
        accepted: &[PageRange],
    ) -> Result<Self, TurnstileReason> {
        let mut list = Self {
            bytes: [0; MAX_BYTES],
            used: size_of::<Handoff>(),
        };
        for range in memory {
            list.push_range(range, hidden, accepted)?;
        }
        let end_of_list = gpa + list.used as u64;
        list.push(&header(HobType::END, size_of::<Header>()))?;
        let handoff = Handoff {
            header: header(HobType::HANDOFF, size_of::<Handoff>()),
            version: Handoff::VERSION,
            boot_mode: 0,
            memory: [0; 4],
            end_of_list,
        };
        if let Some(first) = list.bytes.get_mut(..size_of::<Handoff>()) {
            first.copy_from_slice(handoff.as_bytes());
        }
        Ok(list)
    }

    /// The list.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.used).unwrap_or_default()
    }

    fn push_range(
        &mut self,
        range: PageRange,
        hidden: &[PageRange],
        accepted: &[PageRange],
    ) -> Result<(), TurnstileReason> {
        let mut rest = range;
        // Ascending: what lies below each cut is done with.
        loop {
            let cuts = hidden
                .iter()
                .map(|cut| (cut, false))
                .chain(accepted.iter().map(|cut| (cut, true)));
            let cut = cuts
                .filter(|(cut, _)| cut.overlaps(rest))
                .min_by_key(|(cut, _)| cut.start_frame());
            let Some((cut, is_accepted)) = cut else {
                return self.push_resource(rest, ResourceType::UNACCEPTED);
            };
            let (below, above) = rest.without(*cut);
            self.push_resource(below, ResourceType::UNACCEPTED)?;
            if is_accepted {
                let start = cut.start_frame().max(rest.start_frame());
                let end = cut.end_frame().min(rest.end_frame());
                let inside =
                    PageRange::try_from_frames(start, end).ok_or(TurnstileReason::INTERNAL)?;
                self.push_resource(inside, ResourceType::SYSTEM_MEMORY)?;
            }
            rest = above;
        }
    }

    fn push_resource(
        &mut self,
        range: PageRange,
        kind: ResourceType,
    ) -> Result<(), TurnstileReason> {
        if range.is_empty() {
            return Ok(());
        }
        let attributes = ResourceAttributes::PRESENT
            | ResourceAttributes::INITIALIZED
            | ResourceAttributes::TESTED;
        self.push(&Resource {
            header: header(HobType::RESOURCE_DESCRIPTOR, size_of::<Resource>()),
            owner: [0; 2],
            kind: kind.0,
            attributes: attributes.bits(),
            start: range.start().get(),
            bytes: range.bytes(),
        })
    }

    fn push(
        &mut self,
        block: &(impl IntoBytes + zerocopy::Immutable),
    ) -> Result<(), TurnstileReason> {
        let block = block.as_bytes();
        let place = self
            .bytes
            .get_mut(self.used..)
            .and_then(|free| free.get_mut(..block.len()))
            .ok_or(TurnstileReason::MAP_TOO_MANY)?;
        place.copy_from_slice(block);
        self.used += block.len();
        Ok(())
    }
}

fn header(kind: HobType, length: usize) -> Header {
    Header {
        kind: kind.0,
        length: length as u16,
        reserved: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;
    use zerocopy::FromBytes;

    fn pages(start: u64, end: u64) -> PageRange {
        PageRange::try_from_frames(start, end).unwrap()
    }

    /// Start frame, end frame, kind of each resource, read as a firmware does.
    fn read(list: &List, gpa: u64) -> Vec<(u64, u64, ResourceType)> {
        let (handoff, mut rest) = Handoff::read_from_prefix(list.bytes()).unwrap();
        assert_eq!(handoff.header.kind, HobType::HANDOFF.0);
        let mut found = Vec::new();
        loop {
            let (header, _) = Header::read_from_prefix(rest).unwrap();
            if header.kind == HobType::END.0 {
                assert_eq!(rest.len(), 8);
                assert_eq!(handoff.end_of_list, gpa + list.bytes().len() as u64 - 8);
                return found;
            }
            let (resource, behind) = Resource::read_from_prefix(rest).unwrap();
            assert_eq!(usize::from(header.length), size_of::<Resource>());
            let (start, end) = (resource.start, resource.start + resource.bytes);
            found.push((start / 4096, end / 4096, ResourceType(resource.kind)));
            rest = behind;
        }
    }

    #[test]
    fn memory_is_cut_at_what_is_hidden_and_what_is_accepted() {
        const ACCEPTED: ResourceType = ResourceType::SYSTEM_MEMORY;
        const NOT: ResourceType = ResourceType::UNACCEPTED;
        let memory = [pages(0, 0x100), pages(0x200, 0x300)];
        let hidden = [pages(0x40, 0x50), pages(0x2F0, 0x300)];
        let accepted = [pages(0x8, 0xA), pages(0xA, 0xB), pages(0x50, 0x51)];
        let list = List::make(0x8000, memory.into_iter(), &hidden, &accepted).unwrap();
        assert_eq!(
            read(&list, 0x8000),
            [
                (0, 8, NOT),
                (8, 0xA, ACCEPTED),
                (0xA, 0xB, ACCEPTED),
                (0xB, 0x40, NOT),
                (0x50, 0x51, ACCEPTED),
                (0x51, 0x100, NOT),
                (0x200, 0x2F0, NOT),
            ]
        );
    }

    #[test]
    fn a_list_that_is_too_long_is_refused() {
        let memory = (0..90).map(|n| pages(n * 2, n * 2 + 1));
        let made = List::make(0, memory, &[], &[]);
        assert_eq!(made.err(), Some(TurnstileReason::MAP_TOO_MANY));
    }
}
