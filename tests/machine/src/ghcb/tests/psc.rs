//! `ghcb.md` §6: page state changes by list.

use super::*;
use crate::types::{PAGE_SIZE, PageSize};

/// Sends a list; returns SW_EXITINFO2 and the list as it came back.
fn change(platform: &mut Platform<Sparse>, header: u64, entries: &[u64]) -> (u64, Vec<u64>) {
    let words: Vec<u8> = [header]
        .iter()
        .chain(entries)
        .flat_map(|word| word.to_le_bytes())
        .collect();
    let fields = [(CODE, 0x8000_0010), (Field::SCRATCH, BUFFER)];
    let (reply, page) = platform.ask(VMPL1, &fields, &words, &mut FakeCpu::default());
    assert_eq!(
        (reply, page.get(I1)),
        (Reply::Resume, Some(0)),
        "errors are in exit info 2"
    );
    let back = page.shared_buffer.chunks_exact(8).take(1 + entries.len());
    let back = back
        .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
        .collect();
    (page.get(I2).unwrap(), back)
}

const SHARE: u64 = 2 << 52;
const LARGE: u64 = 1 << 56;

#[test]
fn a_list_is_worked_to_its_last_entry() {
    let mut platform = ready("");
    let entries = [BLOCK.get() | SHARE | LARGE, 0x30_4000 | SHARE];
    let (error, back) = change(&mut platform, 1 << 16, &entries);
    assert_eq!(error, 0);
    assert_eq!(back, [1 << 16 | 2, entries[0] | 512, entries[1] | 1]);
    for gpa in [BLOCK.get(), BLOCK.get() + 511 * PAGE_SIZE, 0x30_4000] {
        assert_eq!(attribute(&platform, Gpa::new(gpa)), Alias::Shared);
    }
    // Again: tolerated, nothing left to do.
    assert_eq!(change(&mut platform, 1 << 16, &entries).0, 0);
}

/// OVMF does not clear the header's reserved word.
#[test]
fn a_list_may_lie_in_a_used_buffer() {
    let mut platform = ready("");
    let (error, back) = change(&mut platform, 0x8082 << 32, &[BLOCK.get() | SHARE]);
    assert_eq!((error, back[0]), (0, 0x8082 << 32 | 1));
}

#[test]
fn a_block_that_was_begun_is_finished_page_by_page() {
    let mut platform = ready("");
    change(&mut platform, 0, &[BLOCK.get() | SHARE | LARGE | 510]);
    assert_eq!(
        attribute(&platform, Gpa::new(BLOCK.get() + 509 * PAGE_SIZE)),
        Alias::Private
    );
    assert_eq!(
        attribute(&platform, Gpa::new(BLOCK.get() + 510 * PAGE_SIZE)),
        Alias::Shared
    );
}

#[test]
fn a_block_with_a_hole_is_changed_where_there_is_memory() {
    let mut platform = ready("");
    assert_eq!(change(&mut platform, 0, &[SHARE | LARGE]).0, 0);
    assert_eq!(attribute(&platform, Gpa::new(0x9_F000)), Alias::Shared);
    assert_eq!(attribute(&platform, Gpa::new(0x10_0000)), Alias::Shared);
}

#[test]
fn bad_lists_and_entries_stop_where_they_are() {
    let mut platform = ready("");
    let (error, _) = change(&mut platform, 253 << 16, &[BLOCK.get() | SHARE]);
    assert_eq!(error, 1 << 32 | 1);
    assert_eq!(attribute(&platform, BLOCK), Alias::Private);
    let bad = [
        BLOCK.get() | SHARE | LARGE | PAGE_SIZE, // frame not aligned to the size
        BLOCK.get() | SHARE | 2,                 // more done than there is
        BLOCK.get() | SHARE | 1 << 60,           // reserved
        BLOCK.get() | 9 << 52,                   // no such operation
    ];
    for entry in bad {
        let (error, back) = change(&mut platform, 2 << 16, &[0x30_4000 | SHARE, entry, SHARE]);
        assert_eq!(error, 1 << 32 | 2, "{entry:#x}");
        assert_eq!(back[0], 2 << 16 | 1, "current entry names the bad one");
        assert_eq!(back[2], entry);
    }
    let (error, _) = change(&mut platform, 0, &[0xFE00_0000 | 1 << 52]);
    assert_eq!(error, 0x100 << 32);
    let mut refusing = platform_with_ghcb("hostile=ghcb-psc");
    assert_eq!(
        change(&mut refusing, 0, &[BLOCK.get() | SHARE]).0,
        0x100 << 32
    );
}

/// A registered GHCB on a host that refuses page state changes.
fn platform_with_ghcb(settings: &str) -> Platform<Sparse> {
    let mut platform = platform(settings);
    let place = platform.layout().place(GHCB).unwrap();
    let host = &mut platform.host;
    host.convert(
        &platform.memory,
        &place,
        GHCB,
        PageSize::Size4K,
        Alias::Shared,
    )
    .unwrap();
    platform.msr(VMPL1, GHCB.get() | 0x012);
    platform
}

#[test]
fn hints_are_taken_as_done() {
    let mut platform = ready("backing=2m");
    platform.pval(BLOCK, PageSize::Size2M, true);
    assert_eq!(
        change(&mut platform, 0, &[BLOCK.get() | 3 << 52 | LARGE]).0,
        0
    );
    assert_eq!(platform.host.psmashes(), 0);
}

#[test]
fn a_page_shared_without_a_rescind_is_a_violation() {
    let mut platform = ready("");
    platform.pval(BLOCK, PageSize::Size4K, true);
    change(&mut platform, 0, &[BLOCK.get() | SHARE]);
    assert_eq!(platform.counters.violations.unrescinded_share, 1);
    let mut platform = ready("");
    platform.pval(BLOCK, PageSize::Size4K, true);
    platform.pval(BLOCK, PageSize::Size4K, false);
    change(&mut platform, 0, &[BLOCK.get() | SHARE]);
    assert_eq!(platform.counters.violations.unrescinded_share, 0);
}

#[test]
fn sharing_one_page_of_a_large_entry_splits_it_and_takes_just_that_page() {
    let mut platform = ready("backing=2m");
    platform.pval(BLOCK, PageSize::Size2M, true);
    platform.pval(BLOCK, PageSize::Size4K, false);
    let before = platform.host.rmp().count(crate::rmp::Entry::is_assigned);
    change(&mut platform, 0, &[BLOCK.get() | SHARE]);
    let after = platform.host.rmp().count(crate::rmp::Entry::is_assigned);
    assert_eq!(before - after, 1);
}

/// KVM makes one change of neighbouring entries that ask for the same.
#[test]
fn neighbouring_entries_are_one_range() {
    let mut platform = ready("");
    let before = platform.host.report().conversions;
    let page = |index: u64| BLOCK.get() + index * PAGE_SIZE;
    let entries = [
        page(0) | SHARE,
        page(1) | SHARE,
        page(2) | SHARE,
        // Not next to it; then another operation.
        page(4) | SHARE,
        page(5) | 1 << 52,
    ];
    let (error, back) = change(&mut platform, 4 << 16, &entries);
    assert_eq!((error, back[0]), (0, 4 << 16 | 5));
    assert!(back[1..].iter().all(|entry| entry & 0xFFF == 1));
    let after = platform.host.report().conversions;
    let shared = after.ranges_to_shared - before.ranges_to_shared;
    let private = after.ranges_to_private - before.ranges_to_private;
    assert_eq!((shared, private), (2, 1));
    assert_eq!(after.pages_to_shared - before.pages_to_shared, 4);
    assert_eq!(after.pages_to_private, before.pages_to_private);
    assert_eq!(after.invalidated_pages - before.invalidated_pages, 4);
}
