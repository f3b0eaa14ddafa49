//! The list of hand-off blocks that a VMM writes for the firmware of a trust domain (TDVF, "TD HOB";
//! `tdx.md` §10): which memory there is, and what of it was launched.
//!
//! As QEMU writes it: what was added before the launch is system memory, all other RAM is unaccepted.

use alloc::vec::Vec;
use core::ops::Range;

use protocols::hob::{Handoff, Header, HobType, Resource, ResourceAttributes, ResourceType};
use zerocopy::IntoBytes;

use crate::layout::Layout;

/// The list for a place at `gpa`. `launched` are the image's pages, ascending.
pub fn list(gpa: u64, layout: &Layout, launched: &[Range<u64>]) -> Vec<u8> {
    let resources: Vec<Resource> = layout
        .memory()
        .into_iter()
        .flat_map(|range| divide(range, launched))
        .map(|(range, kind)| resource(&range, kind))
        .collect();
    let end_of_list = gpa + (size_of::<Handoff>() + resources.as_slice().as_bytes().len()) as u64;
    let first = Handoff {
        header: header(HobType::HANDOFF, size_of::<Handoff>()),
        version: Handoff::VERSION,
        boot_mode: 0,
        memory: [0; 4],
        end_of_list,
    };
    let last = header(HobType::END, size_of::<Header>());
    [
        first.as_bytes(),
        resources.as_slice().as_bytes(),
        last.as_bytes(),
    ]
    .concat()
}

/// A range of RAM in the parts that were launched and those that were not.
fn divide(ram: Range<u64>, launched: &[Range<u64>]) -> Vec<(Range<u64>, ResourceType)> {
    let mut parts = Vec::new();
    let mut at = ram.start;
    let inside = launched
        .iter()
        .map(|range| range.start.max(ram.start)..range.end.min(ram.end))
        .filter(|range| !range.is_empty());
    for range in inside {
        parts.push((at..range.start, ResourceType::UNACCEPTED));
        at = range.end;
        parts.push((range, ResourceType::SYSTEM_MEMORY));
    }
    parts.push((at..ram.end, ResourceType::UNACCEPTED));
    parts.retain(|(range, _)| !range.is_empty());
    parts
}

fn resource(range: &Range<u64>, kind: ResourceType) -> Resource {
    let attributes =
        ResourceAttributes::PRESENT | ResourceAttributes::INITIALIZED | ResourceAttributes::TESTED;
    Resource {
        header: header(HobType::RESOURCE_DESCRIPTOR, size_of::<Resource>()),
        owner: [0; 2],
        kind: kind.0,
        attributes: attributes.bits(),
        start: range.start,
        bytes: range.end - range.start,
    }
}

fn header(kind: HobType, bytes: usize) -> Header {
    Header {
        kind: kind.0,
        // The largest block has 56.
        length: bytes as u16,
        reserved: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Gpa, Spa};
    use zerocopy::FromBytes;

    const PLACE: u64 = 0x80_9000;

    #[test]
    fn all_memory_is_listed_once_and_what_was_launched_is_no_more_to_be_accepted() {
        let mut layout = Layout::new();
        for (gpa, bytes) in [
            (1 << 32, 0x8000_0000),
            (0, 0xA_0000),
            (0x10_0000, 0x6FF0_0000),
        ] {
            layout.add_ram(Gpa::new(gpa), bytes).unwrap();
        }
        let rom = 0xFFC0_0000..0x1_0000_0000;
        layout
            .add_window(Gpa::new(rom.start), 0x40_0000, Spa::new(0x7000_0000))
            .unwrap();
        let launched = [0x80_0000..0x80_6000, 0x80_9000..0x80_D000, rom];
        let list = list(PLACE, &layout, &launched);
        let (first, rest) = Handoff::read_from_prefix(&list).unwrap();
        assert_eq!((first.header.kind, first.version), (1, 9));
        let end = (first.end_of_list - PLACE) as usize;
        assert_eq!(Header::read_from_bytes(&list[end..]).unwrap().kind, 0xFFFF);
        let blocks = &rest[..end - size_of::<Handoff>()];
        let found: Vec<_> = blocks
            .chunks(size_of::<Resource>())
            .map(|bytes| Resource::read_from_bytes(bytes).unwrap())
            .inspect(|block| assert_eq!((block.header.kind, block.attributes), (3, 7)))
            .map(|block| (block.start, block.bytes, ResourceType(block.kind)))
            .collect();
        let (used, unaccepted) = (ResourceType::SYSTEM_MEMORY, ResourceType::UNACCEPTED);
        let wanted = [
            (0, 0xA_0000, unaccepted),
            (0x10_0000, 0x70_0000, unaccepted),
            (0x80_0000, 0x6000, used),
            (0x80_6000, 0x3000, unaccepted),
            (0x80_9000, 0x4000, used),
            (0x80_D000, 0x6F7F_3000, unaccepted),
            (1 << 32, 0x8000_0000, unaccepted),
        ];
        assert_eq!(found, wanted);
    }
}
