//! What an L2 VM sees of memory: only what L1 has given, and only what is accepted.

use guest::harness::{Case, Verdict, case, expect};
use guest::memory::{self, page_of, private, shared};
use guest::oracle::{self};
use guest::tdcall::{expect_accept, map_gpa, write_attributes};
use protocols::addr::{Gpa, PAGE_SIZE, PageSize};
use protocols::oracle::HostAct;
use protocols::tdx::l2::ExtendedType;
use protocols::tdx::metadata::L2Controls;
use protocols::tdx::ve::ExitReason;
use protocols::tdx::vmcall::register::{RAX, RBX};
use protocols::tdx::{PageAttributes, Status};

use super::vm::{self, CALL, LOAD, STORE, Vm};
use crate::accept::accepted_block;

pub const CASES: &[Case] = &[
    case(
        "l2_page_not_given",
        "tdx.md §7: default no access",
        not_given,
    ),
    case("l2_page_given", "tdx.md §7 setup 6", given),
    case(
        "l2_write_to_a_page_for_reading",
        "tdx.md §7 routing: denied by L2 attributes",
        read_only,
    ),
    case(
        "l2_fetch_from_data",
        "tdx.md §7 routing: denied by L2 attributes",
        no_execute,
    ),
    case(
        "l2_page_withdrawn",
        "tdx.md §3 all of R, W, Xs, Xu = 0",
        withdrawn,
    ),
    case(
        "l2_page_pending",
        "tdx.md §7 routing: PENDING, R13 type 6",
        pending,
    ),
    case(
        "l2_page_pending_and_given",
        "tdx.md §3: active on ACCEPT",
        pending_given,
    ),
    case(
        "l2_page_never_added",
        "tdx.md §7 routing: the host maps first",
        fresh,
    ),
    case(
        "l2_page_removed_by_the_host",
        "tdx.md §2 consequences",
        removed,
    ),
    case("l2_page_blocked_by_the_host", "tdx.md §3 BLOCKED", blocked),
    case("l2_block_of_2m", "tdx.md §3 level 1", block),
    case(
        "l2_shared_memory",
        "tdx.md §7 ENABLE_SHARED_EPTP",
        shared_memory,
    ),
    case("l2_device", "tdx.md §7 routing: shared GPA", device),
    case("l2_page_made_shared", "tdx.md §4 MapGPA", made_shared),
];

/// A read, with the linear address told, of what it leads to.
const READ: u64 = 0x181;
const WRITE: u64 = 0x182;
const FETCH: u64 = 0x184;
/// The VM may read the page, write it, execute it.
const READABLE: u64 = 1 << 3;
const WRITABLE: u64 = 1 << 4;
const PENDING: u64 = ExtendedType::PENDING_EPT_VIOLATION.0;
const ALL: PageAttributes = PageAttributes::ALL_ACCESS;

/// A VM about to use `address` by this code.
fn user_of(code: &[u8], address: u64) -> Result<Vm, guest::harness::Finding> {
    let mut vm = Vm::of(code)?;
    vm.state.gprs[RBX] = address;
    vm.state.gprs[RAX] = 0x1357;
    Ok(vm)
}

fn not_given() -> Verdict {
    let mut vm = Vm::of(LOAD)?;
    let at = vm.kept() + 0x128;
    vm.state.gprs[RBX] = at;
    vm.expect_violation(at, READ, 0)?;
    vm.load(STORE)?;
    vm.expect_violation(at, WRITE, 0)?;
    vm.load(CALL)?;
    vm.expect_violation(at, FETCH, 0)
}

fn given() -> Verdict {
    let mut vm = Vm::of(STORE)?;
    let at = vm.kept() + 0x40;
    (vm.state.gprs[RBX], vm.state.gprs[RAX]) = (at, 0x1357);
    vm.expect_violation(at, WRITE, 0)?;
    vm::give(vm.vm, Gpa::new(vm.kept()), ALL)?;
    // It goes on where it was.
    vm.expect_halt(3)?;
    expect("what L1 sees", memory::read(at)?, 0x1357)
}

fn read_only() -> Verdict {
    let mut vm = Vm::of(LOAD)?;
    let at = vm.kept();
    vm::give(vm.vm, Gpa::new(at), PageAttributes::READ)?;
    memory::write(at, 0x2468)?;
    vm.state.gprs[RBX] = at;
    vm.expect_halt(3)?;
    expect("what L2 sees", vm.state.gprs[RAX], 0x2468)?;
    vm.load(STORE)?;
    vm.expect_violation(at, WRITE | READABLE, 0)
}

fn no_execute() -> Verdict {
    let mut vm = Vm::of(CALL)?;
    let at = vm.kept();
    let data = PageAttributes::READ | PageAttributes::WRITE;
    vm::give(vm.vm, Gpa::new(at), data)?;
    vm.state.gprs[RBX] = at;
    vm.expect_violation(at, FETCH | READABLE | WRITABLE, 0)
}

fn withdrawn() -> Verdict {
    let mut vm = Vm::of(LOAD)?;
    let at = vm.kept();
    vm::give(vm.vm, Gpa::new(at), ALL)?;
    vm.state.gprs[RBX] = at;
    vm.expect_halt(3)?;
    vm::withdraw(vm.vm, Gpa::new(at))?;
    vm.restart();
    vm.expect_violation(at, READ, 0)
}

fn pending() -> Verdict {
    let page = memory::fresh_page();
    let mut vm = user_of(STORE, page.get() + 8)?;
    vm.expect_violation(page.get() + 8, WRITE, PENDING)?;
    // Accepted, it is still L1's.
    expect_accept(page, PageSize::Size4K, 0)?;
    vm.expect_violation(page.get() + 8, WRITE, 0)?;
    vm::give(vm.vm, page, ALL)?;
    vm.expect_halt(3)
}

fn pending_given() -> Verdict {
    let page = memory::fresh_page();
    let mut vm = user_of(LOAD, page.get())?;
    vm::give(vm.vm, page, ALL)?;
    vm.expect_violation(page.get(), READ, PENDING)?;
    expect_accept(page, PageSize::Size4K, 0)?;
    vm.expect_halt(3)?;
    expect("zero", vm.state.gprs[RAX], 0)
}

fn fresh() -> Verdict {
    // Nobody has asked the host for this page: it adds it, and the exit comes after that.
    let page = page_of(memory::fresh_region(), 77);
    let mut vm = user_of(CALL, page.get())?;
    vm.expect_violation(page.get(), FETCH, PENDING)
}

fn removed() -> Verdict {
    let mut vm = Vm::of(LOAD)?;
    let page = Gpa::new(vm.kept());
    vm::give(vm.vm, page, ALL)?;
    vm.state.gprs[RBX] = page.get();
    vm.expect_halt(3)?;
    oracle::host_act(page, HostAct::TAKE_AWAY)?;
    vm.restart();
    vm.expect_violation(page.get(), READ, PENDING)?;
    // A second accept succeeds, and the right is gone with the page.
    expect_accept(page, PageSize::Size4K, 0)?;
    vm.expect_violation(page.get(), READ, 0)
}

fn blocked() -> Verdict {
    let mut vm = Vm::of(LOAD)?;
    let page = Gpa::new(vm.kept());
    vm::give(vm.vm, page, ALL)?;
    oracle::host_act(page, HostAct::BLOCK)?;
    // The trust domain exits, and the host unblocks.
    vm.state.gprs[RBX] = page.get();
    vm.expect_halt(3)
}

fn block() -> Verdict {
    let block = accepted_block()?;
    let last = page_of(block, 511).get();
    let mut vm = user_of(STORE, last)?;
    vm.expect_violation(last, WRITE, 0)?;
    let new = vm.vm.field(ALL | PageAttributes::VALID);
    let (rax, ..) = write_attributes(block.get() | 1, new, vm.vm.field(ALL))?;
    expect("RAX of ATTR.WR", rax, 0)?;
    vm.expect_halt(3)?;
    expect("what L1 sees", memory::read(last)?, 0x1357)
}

fn make_shared(page: Gpa) -> Verdict {
    let done = map_gpa(page.get() | 1 << 47, PAGE_SIZE)?;
    expect("R10 of MapGPA", done.0, 0)
}

fn shared_memory() -> Verdict {
    let page = memory::fresh_page();
    make_shared(page)?;
    let mut vm = user_of(STORE, shared(page))?;
    vm.control(L2Controls::ENABLE_SHARED_EPTP)?;
    vm.expect_halt(3)?;
    expect("what L1 sees", memory::read(shared(page))?, 0x1357)
}

fn device() -> Verdict {
    // q35's high precision event timer.
    const HPET: Gpa = Gpa::new(0xFED0_0000);
    let mut vm = user_of(LOAD, shared(HPET))?;
    vm.control(L2Controls::ENABLE_SHARED_EPTP)?;
    let exit = vm.run()?;
    let why = (Status::L2_EXIT_HOST_ROUTED_ASYNC, ExitReason::EPT_VIOLATION);
    expect("why", (exit.status, exit.reason), why)?;
    expect("GPA", exit.gpa, HPET.get() | 1 << 47)?;
    expect("GLA", exit.gla, shared(HPET))?;
    expect("qualification", exit.qualification, READ)?;
    expect("RIP", vm.state.rip, vm.code())
}

fn made_shared() -> Verdict {
    let mut vm = Vm::of(LOAD)?;
    let page = Gpa::new(vm.kept());
    vm::give(vm.vm, page, ALL)?;
    memory::write(private(page), 0x99)?;
    vm.state.gprs[RBX] = page.get();
    vm.expect_halt(3)?;
    make_shared(page)?;
    // The host takes the use for a wish to have it private again; it is a new page then.
    vm.restart();
    vm.expect_violation(page.get(), READ, PENDING)
}
