mod histories;

use super::*;
use crate::memory::scramble_word;
use crate::testing::Sparse;
use crate::types::Vmpl;

const BLOCK: Gpa = Gpa::new(0x20_0000);
const SMALL: PageSize = PageSize::Size4K;
const LARGE: PageSize = PageSize::Size2M;

fn host(backing: HostBacking) -> (HostMemory, Sparse, Place) {
    let mut host = HostMemory::new(backing);
    host.add_ram(Gpa::new(0), 0x80_0000).unwrap();
    let place = host.layout().place(BLOCK).unwrap();
    (host, Sparse::default(), place)
}

/// `unaccepted-memory.md` §7, first private fault: 2 MiB only if the whole block is free.
#[test]
fn the_first_private_use_decides_the_size() {
    for (backing, neighbour_used, expected) in [
        (HostBacking::Size4K, false, SMALL),
        (HostBacking::Size2M, false, LARGE),
        (HostBacking::Size2M, true, SMALL),
    ] {
        let (mut host, memory, place) = host(backing);
        if neighbour_used {
            let gpa = Gpa::new(BLOCK.get() + 5 * PAGE_SIZE);
            let other = host.layout().place(gpa).unwrap();
            host.convert(&memory, &other, gpa, SMALL, Alias::Shared)
                .unwrap();
        }
        host.prepare(&memory, &place, BLOCK).unwrap();
        assert_eq!(host.rmp().entry(&place).size(), expected);
    }
}

#[test]
fn a_page_that_has_an_entry_keeps_it() {
    let (mut host, memory, place) = host(HostBacking::Size4K);
    host.prepare(&memory, &place, BLOCK).unwrap();
    host.rmp_mut().set_validated(&place, true);
    host.prepare(&memory, &place, BLOCK).unwrap();
    assert!(host.rmp().entry(&place).is_validated());
}

#[test]
fn contents_are_lost_on_every_change_of_owner() {
    let (mut host, memory, place) = host(HostBacking::Size4K);
    memory.write(place.spa, &[7; 4096]);
    host.prepare(&memory, &place, BLOCK).unwrap();
    assert_eq!(memory.read_u64(place.spa), scramble_word(1, BLOCK.get()));
    host.convert(&memory, &place, BLOCK, SMALL, Alias::Shared)
        .unwrap();
    assert_eq!(memory.read_u64(place.spa), scramble_word(2, BLOCK.get()));
    // To the attribute it has: nothing happens.
    memory.write(place.spa, &[7; 4096]);
    host.convert(&memory, &place, BLOCK, SMALL, Alias::Shared)
        .unwrap();
    assert_eq!(memory.read_u64(place.spa), 0x0707_0707_0707_0707);
    host.convert(&memory, &place, BLOCK, SMALL, Alias::Private)
        .unwrap();
    host.prepare(&memory, &place, BLOCK).unwrap();
    assert_eq!(memory.read_u64(place.spa), scramble_word(3, BLOCK.get()));
    assert_eq!(host.scrambled_bytes(), 3 * PAGE_SIZE);
}

#[test]
fn a_clean_page_is_not_looked_at_again() {
    let (mut host, memory, place) = host(HostBacking::Size4K);
    host.prepare(&memory, &place, BLOCK).unwrap();
    let mut find = |memory: &Sparse| host.find_scrambled(memory, &place, BLOCK, SMALL);
    assert_eq!(find(&memory), Some(BLOCK));
    memory.write(place.spa, &[0; 4096]);
    assert_eq!(find(&memory), None);
    memory.fill_scramble(place.spa, PAGE_SIZE, 1);
    assert_eq!(find(&memory), None, "it was the owner's doing");
}

#[test]
fn a_large_entry_is_split_for_one_page_and_taken_whole_for_a_block() {
    let (mut host, memory, place) = host(HostBacking::Size2M);
    host.prepare(&memory, &place, BLOCK).unwrap();
    let gpa = Gpa::new(BLOCK.get() + 9 * PAGE_SIZE);
    let page = host.layout().place(gpa).unwrap();
    host.convert(&memory, &page, gpa, SMALL, Alias::Shared)
        .unwrap();
    assert_eq!(host.psmashes(), 1);
    assert!(!host.rmp().entry(&page).is_assigned());
    assert!(host.rmp().entry(&place).is_assigned());
    host.convert(&memory, &place, BLOCK, LARGE, Alias::Shared)
        .unwrap();
    assert!(host.rmp().is_block_free(&place));
    assert!(host.is_block(&place, Alias::Shared));
    host.convert(&memory, &place, BLOCK, LARGE, Alias::Private)
        .unwrap();
    host.prepare(&memory, &place, BLOCK).unwrap();
    assert_eq!(host.rmp().entry(&place).size(), LARGE);
}

#[test]
fn neighbouring_invalidations_become_one() {
    let (mut host, _, _) = host(HostBacking::Size4K);
    for page in 0..4 {
        let gpa = Gpa::new(BLOCK.get() + page * PAGE_SIZE);
        host.invalidate(gpa, SMALL, Views::ALL, Cause::Host);
    }
    let next = Gpa::new(BLOCK.get() + 4 * PAGE_SIZE);
    let rescinded = Cause::Instruction(Vmpl::VMPL0);
    host.invalidate(next, SMALL, Views::ALL, rescinded);
    host.invalidate(Gpa::new(0), SMALL, Views::ALL, rescinded);
    let queue = host.take_invalidations();
    assert_eq!(
        queue.len(),
        3,
        "neighbours with another cause are not merged"
    );
    assert_eq!((queue[0].gpa, queue[0].bytes), (BLOCK, 4 * PAGE_SIZE));
    assert!(host.take_invalidations().is_empty());
}

fn page(host: &HostMemory, index: u64) -> (Place, Gpa) {
    let gpa = Gpa::new(BLOCK.get() + index * PAGE_SIZE);
    (host.layout().place(gpa).unwrap(), gpa)
}

/// Converts `size` at page `index` of the block.
fn convert(host: &mut HostMemory, memory: &Sparse, index: u64, size: PageSize, to: Alias) {
    let (place, gpa) = page(host, index);
    host.convert(memory, &place, gpa, size, to).unwrap();
}

#[test]
fn a_folio_that_goes_whole_leaves_nothing_behind() {
    let (mut host, memory, place) = host(HostBacking::Size2M);
    for round in 1..4 {
        host.prepare(&memory, &place, BLOCK).unwrap();
        let report = host.report();
        assert_eq!((report.folios.large, report.folios.large_whole), (1, 1));
        assert_eq!(report.folios.large_in_rmp, 1);
        convert(&mut host, &memory, 0, LARGE, Alias::Shared);
        let report = host.report();
        assert_eq!((report.folios.large, report.folios.large_freed), (0, round));
        convert(&mut host, &memory, 0, LARGE, Alias::Private);
    }
    let report = host.report();
    assert_eq!((report.psmashes, report.folios.large_holed), (0, 0));
    assert_eq!(report.direct_map.splits_as_linux, 0);
    assert_eq!(report.conversions.pages_to_shared, 3 * 512);
    assert_eq!(report.conversions.pages_to_private, 3 * 512);
    assert_eq!(report.conversions.invalidated_pages, 6 * 512);
}

#[test]
fn a_folio_with_holes_is_freed_with_its_last_page() {
    let (mut host, memory, place) = host(HostBacking::Size2M);
    host.prepare(&memory, &place, BLOCK).unwrap();
    for index in 0..511 {
        convert(&mut host, &memory, index, SMALL, Alias::Shared);
        let folios = host.report().folios;
        assert_eq!(
            (folios.large, folios.large_whole, folios.large_in_rmp),
            (1, 0, 0)
        );
        assert_eq!((folios.large_holed, folios.hole_pages), (1, index + 1));
    }
    convert(&mut host, &memory, 511, SMALL, Alias::Shared);
    let report = host.report();
    assert_eq!((report.folios.large, report.folios.large_freed), (0, 1));
    assert_eq!(
        (report.folios.hole_pages, report.folios.hole_pages_peak),
        (0, 511)
    );
    // One guest's folio all the time: only Linux' rule split the host's own mapping.
    assert_eq!(
        (report.direct_map.splits, report.direct_map.splits_as_linux),
        (0, 1)
    );
    assert_eq!(report.psmashes, 1);
}

#[test]
fn a_page_that_comes_back_moves_into_its_hole() {
    let (mut host, memory, place) = host(HostBacking::Size2M);
    host.prepare(&memory, &place, BLOCK).unwrap();
    convert(&mut host, &memory, 9, SMALL, Alias::Shared);
    convert(&mut host, &memory, 9, SMALL, Alias::Private);
    let (ninth, gpa) = page(&host, 9);
    assert_eq!(host.report().folios.hole_pages, 1, "not used yet");
    host.prepare(&memory, &ninth, gpa).unwrap();
    let folios = host.report().folios;
    assert_eq!(
        (folios.large, folios.large_whole, folios.hole_pages),
        (1, 1, 0)
    );
    assert_eq!((folios.large_in_rmp, folios.small_allocated), (0, 0));
    assert_eq!(host.rmp().entry(&ninth).size(), SMALL);
}

#[test]
fn a_block_with_small_folios_gets_no_large_one() {
    let (mut host, memory, place) = host(HostBacking::Size2M);
    convert(&mut host, &memory, 7, SMALL, Alias::Shared);
    host.prepare(&memory, &place, BLOCK).unwrap();
    convert(&mut host, &memory, 7, SMALL, Alias::Private);
    let (seventh, gpa) = page(&host, 7);
    host.prepare(&memory, &seventh, gpa).unwrap();
    let report = host.report();
    assert_eq!((report.folios.large, report.folios.small), (0, 2));
    assert_eq!(report.direct_map.splits, 1);
    // Given back whole and taken again, it does.
    convert(&mut host, &memory, 0, LARGE, Alias::Shared);
    convert(&mut host, &memory, 0, LARGE, Alias::Private);
    host.prepare(&memory, &place, BLOCK).unwrap();
    let folios = host.report().folios;
    assert_eq!((folios.large_whole, folios.small), (1, 0));
    assert_eq!(folios.small_freed, 2);
}

#[test]
fn small_backing_splits_each_block_once() {
    let (mut host, memory, place) = host(HostBacking::Size4K);
    host.prepare(&memory, &place, BLOCK).unwrap();
    let (last, gpa) = page(&host, 511);
    host.prepare(&memory, &last, gpa).unwrap();
    let (next, gpa) = page(&host, 512);
    host.prepare(&memory, &next, gpa).unwrap();
    let report = host.report();
    assert_eq!((report.folios.small, report.folios.large_allocated), (3, 0));
    assert_eq!(
        (report.direct_map.splits, report.direct_map.splits_as_linux),
        (2, 2)
    );
    assert_eq!(report.direct_map.blocks, 4);
}

/// QEMU discards the backing of what changes, not of what is so already.
#[test]
fn pages_that_are_shared_already_keep_their_contents() {
    let (mut host, memory, place) = host(HostBacking::Size2M);
    host.prepare(&memory, &place, BLOCK).unwrap();
    convert(&mut host, &memory, 5, SMALL, Alias::Shared);
    let (fifth, _) = page(&host, 5);
    let (sixth, _) = page(&host, 6);
    for spa in [fifth.spa, sixth.spa] {
        memory.write(spa, &[7; 8]);
    }
    convert(&mut host, &memory, 0, LARGE, Alias::Shared);
    assert_eq!(memory.read_u64(fifth.spa), 0x0707_0707_0707_0707);
    assert_ne!(memory.read_u64(sixth.spa), 0x0707_0707_0707_0707);
    assert_eq!(host.report().folios.large_freed, 1);
    assert_eq!(host.report().conversions.pages_to_shared, 512);
    assert_eq!(host.report().shared_pages, 512);
}
