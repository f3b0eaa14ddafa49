//! TDG.MEM.PAGE.ACCEPT and the attributes: what becomes of pages.

use protocols::oracle::{Call, HOST_ACT_DONE, HOST_ACT_NOT_POSSIBLE, HostAct};

use super::*;

/// §2 rows 1 and 2.
#[test]
fn accept_looks_at_its_operand_first() {
    let mut td = td("");
    for rcx in [
        BLOCK.get() | 2,
        BLOCK.get() | 8,
        BLOCK.get() | 1 << 52,
        BLOCK.get() | 0x1000 | 1,
        BLOCK.get() | SHARED,
        BLOCK.get() | 1 << 48,
    ] {
        let gprs = td.call(Leaf::MEM_PAGE_ACCEPT, &[(RCX, rcx)]);
        assert_eq!(gprs[RAX], Operand::RCX.invalid(), "{rcx:#x}");
    }
    assert_eq!(td.state(BLOCK).0, State::Free);
    let accept = td.counters.level(L1).accept;
    assert_eq!((accept.size_4k.invalid, accept.size_2m.invalid), (5, 1));
}

/// §2 rows 3, 7, 9 and 10: zeroed once, then ALREADY_ACCEPTED with the level of the leaf.
#[test]
fn accept_zeroes_a_page_once() {
    for (backing, size, level) in [
        ("backing=4k", PageSize::Size4K, 0),
        ("backing=2m", PageSize::Size2M, 1),
    ] {
        let mut td = td(backing);
        assert_eq!(td.accept_td(BLOCK, size), OK);
        assert_eq!(td.state(BLOCK), (State::Mapped, size));
        assert_eq!(td.word(BLOCK), 0);
        td.memory().write_u64(td.spa_of(BLOCK).unwrap(), 5);
        assert_eq!(td.accept_td(BLOCK, size), already(level));
        assert_eq!(td.accept_td(BLOCK, PageSize::Size4K), already(level));
        assert_eq!(td.word(BLOCK), 5);
        assert_eq!(td.counters.violations.double_validation, 2);
        assert_eq!(td.counters.validated_bytes, size.bytes());
    }
}

/// §2 row 6: the block is held as pages, because the host backs it so or has split it.
#[test]
fn accept_of_a_block_in_pages_is_a_mismatch() {
    let mut small = td("backing=4k");
    assert_eq!(small.accept_td(BLOCK, PageSize::Size2M), MISMATCH);
    assert_eq!(small.state(BLOCK), (State::Pending, PageSize::Size4K));
    let mut large = td("backing=2m");
    let last = Gpa::new(BLOCK.get() + 511 * PAGE_SIZE);
    assert_eq!(large.accept_td(last, PageSize::Size4K), OK);
    assert_eq!(large.state(BLOCK), (State::Pending, PageSize::Size4K));
    assert_eq!(large.accept_td(BLOCK, PageSize::Size2M), MISMATCH);
    assert_eq!(large.accept_td(BLOCK, PageSize::Size4K), OK);
}

/// §2 rows 4 and 8: the host gives, splits and unblocks; the guest sees a longer instruction.
#[test]
fn what_is_missing_is_the_hosts_to_serve() {
    let mut td = td("backing=2m");
    assert_eq!(td.accept_td(BLOCK, PageSize::Size4K), OK);
    // Given as a block, then split.
    assert_eq!(td.counters.td_exits(L1), 2);
    let next = Gpa::new(BLOCK.get() + PAGE_SIZE);
    td.block(next);
    assert_eq!(td.state(next).0, State::PendingBlocked);
    assert_eq!(td.accept_td(next, PageSize::Size4K), OK);
    assert_eq!(td.counters.td_exits(L1), 3);
    td.block(next);
    assert_eq!(td.state(next).0, State::Blocked);
    assert_eq!(td.accept_td(next, PageSize::Size4K), already(0));
    let nowhere = Gpa::new(0x4000_0000);
    let mut gprs = [0; COUNT];
    (gprs[RAX], gprs[RCX]) = (6, nowhere.get());
    let outcome = td.tdcall(CPU0, KERNEL, &mut gprs, &mut FakeCpu::default());
    assert!(matches!(outcome, Outcome::Refused(_)), "{outcome:?}");
}

/// §2 consequences: a page that the host removed and put back is pending again, and a second accept
/// zeroes it without a word. The machine counts it.
#[test]
fn a_page_put_back_is_pending_and_accepted_silently() {
    let mut td = td("");
    assert_eq!(td.accept_td(BLOCK, PageSize::Size4K), OK);
    td.remove(BLOCK);
    let verdict = td.access(L1, Alias::Private, BLOCK, Kind::Read);
    assert_eq!(verdict, Verdict::NotValidated);
    assert_eq!(td.state(BLOCK).0, State::Pending);
    assert_eq!(td.counters.violations.double_validation, 0);
    assert_eq!(td.accept_td(BLOCK, PageSize::Size4K), OK);
    assert_eq!(td.counters.violations.double_validation, 1);
    // Given back and accepted anew it is a new page.
    let shared = BLOCK.get() | SHARED;
    td.host_call(SubFunction::MAP_GPA, &[(R12, shared), (R13, 0x1000)]);
    td.host_call(SubFunction::MAP_GPA, &[(R12, BLOCK.get()), (R13, 0x1000)]);
    assert_eq!(td.accept_td(BLOCK, PageSize::Size4K), OK);
    assert_eq!(td.counters.violations.double_validation, 1);
}

/// What the host does to an accepted page of its own accord does not make it a new one.
#[test]
fn only_the_guest_gives_a_page_back() {
    let mut td = td("oracle=on\nhostile=re-add,remap");
    assert_eq!(td.accept_td(BLOCK, PageSize::Size4K), OK);
    let act = |td: &mut Platform<Sparse>, act: HostAct| {
        let answer = td.ask_oracle(Call::HOST_ACT.rax(), BLOCK.get(), act.0);
        answer.unwrap().rax
    };
    assert_eq!(act(&mut td, HostAct::RE_ADD), HOST_ACT_DONE);
    assert_eq!(td.accept_td(BLOCK, PageSize::Size4K), OK);
    assert_eq!(td.counters.violations.double_validation, 1);
    for to in [Alias::Shared, Alias::Private] {
        td.convert(BLOCK, PageSize::Size4K, to).unwrap();
    }
    assert_eq!(td.accept_td(BLOCK, PageSize::Size4K), OK);
    assert_eq!(td.counters.violations.double_validation, 2);
    // No module puts a page back as it was.
    assert_eq!(act(&mut td, HostAct::EXCHANGE), HOST_ACT_NOT_POSSIBLE);
    assert_eq!(act(&mut td, HostAct::BLOCK), HOST_ACT_DONE);
    assert_eq!(td.state(BLOCK).0, State::Blocked);
}

/// §3, "Guest access" by state, and the shared half.
#[test]
fn accesses_by_state() {
    let mut td = td("");
    let read = |td: &mut Platform<Sparse>| td.access(L1, Alias::Private, BLOCK, Kind::Read);
    assert_eq!(read(&mut td), Verdict::NotValidated);
    td.accept_td(BLOCK, PageSize::Size4K);
    assert!(matches!(read(&mut td), Verdict::Map(m) if m.write && m.execute));
    td.block(BLOCK);
    assert_eq!(td.peek(L1, Alias::Private, BLOCK), None);
    assert!(
        matches!(read(&mut td), Verdict::Map(_)),
        "the host unblocks"
    );
    for kind in [Kind::Execute, Kind::Walk] {
        let verdict = td.access(L1, Alias::Shared, BLOCK, kind);
        assert_eq!(verdict, Verdict::Denied(Denial::SharedCode));
    }
    assert_eq!(td.alias_of_bit(true), Alias::Shared);
    assert_eq!(platform("").alias_of_bit(true), Alias::Private);
}

/// §3: attributes of L2 VMs, read back, before and after the page is accepted.
#[test]
fn attributes_give_a_page_to_an_l2_vm() {
    let mut td = td("");
    let all = full(L2Vm::Vm1);
    let mask = L2Vm::Vm1.field(PageAttributes::ALL_ACCESS);
    let gprs = td.write_attributes(BLOCK, PageSize::Size4K, all, mask);
    assert_eq!(gprs[RAX], OK);
    assert_eq!(gprs[RCX], BLOCK.get() | MAPPING_PENDING);
    assert_eq!(gprs[RDX], all);
    let peek = |td: &Platform<Sparse>| td.peek(L2, Alias::Private, BLOCK);
    assert_eq!(peek(&td), None);
    td.accept_td(BLOCK, PageSize::Size4K);
    assert!(peek(&td).is_some_and(|mapping| mapping.write));
    let gprs = td.call(Leaf::MEM_PAGE_ATTR_RD, &[(RCX, BLOCK.get())]);
    assert_eq!((gprs[RAX], gprs[RCX], gprs[RDX]), (OK, BLOCK.get(), all));
    // Only what the mask names changes.
    let read_only = L2Vm::Vm1.field(PageAttributes::READ | PageAttributes::VALID);
    let write = L2Vm::Vm1.field(PageAttributes::WRITE);
    let gprs = td.write_attributes(BLOCK, PageSize::Size4K, read_only, write);
    let rx = (PageAttributes::ALL_ACCESS - PageAttributes::WRITE) | PageAttributes::VALID;
    assert_eq!(gprs[RDX], L2Vm::Vm1.field(rx));
    // Nothing left: the alias goes.
    let gone = L2Vm::Vm1.field(PageAttributes::VALID);
    let gprs = td.write_attributes(BLOCK, PageSize::Size4K, gone, mask);
    assert_eq!((gprs[RAX], gprs[RDX]), (OK, gone));
    assert_eq!(
        td.call(Leaf::MEM_PAGE_ATTR_RD, &[(RCX, BLOCK.get())])[RDX],
        0
    );
    assert_eq!(peek(&td), None);
}

/// §3 errors: fields before the address, then the page, then the combination.
#[test]
fn attributes_are_checked_in_order() {
    let mut td = td("backing=2m");
    let all = full(L2Vm::Vm2);
    let mask = L2Vm::Vm2.field(PageAttributes::ALL_ACCESS);
    let bad_address = Gpa::new(BLOCK.get() | SHARED);
    let rows = [
        (bad_address, 1, 0, Operand::RDX.invalid()),
        (bad_address, 0, 1, Operand::R8.invalid()),
        (
            bad_address,
            L2Vm::Vm3.field(PageAttributes::READ),
            0,
            Operand::RDX.invalid(),
        ),
        (bad_address, all, mask, Operand::RCX.invalid()),
    ];
    for (gpa, new, mask, want) in rows {
        let gprs = td.write_attributes(gpa, PageSize::Size4K, new, mask);
        assert_eq!((gprs[RAX], gprs[RCX], gprs[RDX]), (want, 0, 0), "{new:#x}");
    }
    // A larger leaf is split by the host; then the block is one of pages.
    td.accept_td(BLOCK, PageSize::Size2M);
    assert_eq!(
        td.write_attributes(BLOCK, PageSize::Size4K, all, mask)[RAX],
        OK
    );
    assert_eq!(td.state(BLOCK), (State::Mapped, PageSize::Size4K));
    assert_eq!(
        td.write_attributes(BLOCK, PageSize::Size2M, all, mask)[RAX],
        MISMATCH
    );
    // Write without read, and features that there are not.
    let unknown = PageAttributes::from_bits_retain(1 << 4) | PageAttributes::READ;
    for wanted in [PageAttributes::WRITE, unknown] {
        let new = L2Vm::Vm1.field(wanted | PageAttributes::VALID);
        let mask = L2Vm::Vm1.field(PageAttributes::from_bits_retain(0x7FFF));
        let gprs = td.write_attributes(BLOCK, PageSize::Size4K, new, mask);
        assert_eq!(
            (gprs[RAX], gprs[RDX]),
            (Status::PAGE_ATTR_INVALID.with(0), 0)
        );
    }
}

/// §3: what is wrong for one VM changes nothing for any, and RDX tells what all of them have.
#[test]
fn illegal_attributes_of_one_vm_leave_those_of_all() {
    let mut td = td("");
    let [one, two, three] = L2Vm::ALL;
    let read = PageAttributes::READ | PageAttributes::VALID;
    let now = full(one) | three.field(read);
    let all = PageAttributes::ALL_ACCESS;
    let mask = one.field(all) | two.field(all) | three.field(all);
    td.accept_td(BLOCK, PageSize::Size4K);
    let gprs = td.write_attributes(BLOCK, PageSize::Size4K, now, mask);
    assert_eq!((gprs[RAX], gprs[RDX]), (OK, now));
    let lone_write = PageAttributes::WRITE | PageAttributes::VALID;
    let wanted = one.field(read) | two.field(lone_write) | full(three);
    let gprs = td.write_attributes(BLOCK, PageSize::Size4K, wanted, mask);
    let invalid = Status::PAGE_ATTR_INVALID.with(0);
    assert_eq!((gprs[RAX], gprs[RCX], gprs[RDX]), (invalid, 0, now));
    let gprs = td.call(Leaf::MEM_PAGE_ATTR_RD, &[(RCX, BLOCK.get())]);
    assert_eq!(gprs[RDX], now);
}

/// §2: a walk that ends early (rows 3 and 4) never asks for the entry's lock (row 5), which comes before
/// what the entry says (row 6).
#[test]
fn the_lock_is_asked_for_when_the_walk_is_over() {
    let busy = Status::OPERAND_BUSY.with(Operand::RCX.0);
    let page = Gpa::new(BLOCK.get() + 3 * PAGE_SIZE);
    let mut accepted = td("backing=2m");
    accepted.accept_td(BLOCK, PageSize::Size2M);
    accepted.hold(page).unwrap();
    assert_eq!(accepted.accept_td(page, PageSize::Size4K), already(1));
    let mut pending = td("backing=2m");
    pending.hold(page).unwrap();
    assert_eq!(pending.accept_td(page, PageSize::Size4K), busy);
    // The host has given the block and has split it.
    assert_eq!(pending.counters.td_exits(L1), 2);
    assert_eq!(pending.state(page), (State::Pending, PageSize::Size4K));
    assert_eq!(pending.accept_td(BLOCK, PageSize::Size2M), busy);
    pending.hold(page).unwrap();
    assert_eq!(pending.accept_td(BLOCK, PageSize::Size2M), MISMATCH);
    let accept = pending.counters.level(L1).accept;
    assert_eq!((accept.size_4k.busy, accept.size_2m.busy), (1, 1));
    let mut attributes = td("backing=2m");
    attributes.accept_td(BLOCK, PageSize::Size2M);
    attributes.hold(page).unwrap();
    let all = full(L2Vm::Vm1);
    let gprs = attributes.write_attributes(page, PageSize::Size4K, all, all);
    assert_eq!((gprs[RAX], gprs[RDX]), (busy, 0));
    assert_eq!(attributes.state(page), (State::Mapped, PageSize::Size4K));
}
