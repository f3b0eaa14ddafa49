//! A second privilege level: this program makes itself a VMSA for VMPL1, lets it run pieces of
//! its own code there and looks at what that level may and may not do.
//!
//! Both levels use the same image, page tables and descriptor tables; VMPL1 was granted the
//! image for that. A piece of work is handed over by a pointer in [`JOB`]; VMPL1 does it and
//! asks the host to run VMPL0 again. One processor: never do both levels run at once.

#![expect(
    unsafe_code,
    reason = "hands work to another privilege level, builds its VMSA"
)]

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicPtr, Ordering};

use guest::ghcb::{self, Reply};
use guest::harness::{Case, Finding, Verdict, case, expect};
use guest::insn::{self, Queried, SIZE_4K, attributes, rmpadjust, rmpquery};
use guest::memory::{self, page_of};
use guest::oracle;
use guest::trap::{self, CODE_SELECTOR, DATA_SELECTOR, Trap};
use protocols::addr::{Gpa, PAGE_SIZE, Vmpl};
use protocols::exit_code::ExitCode;
use protocols::ghcb::event::{ApCreation, ApRequest};
use protocols::ghcb::msr::{Request, Response};
use protocols::ghcb::page::Field;
use protocols::oracle::{Counter, PageFlags};
use protocols::vmsa::{Efer, Segment, SegmentAttributes, SevFeatures, Vmsa};
use spin::Once;
use zerocopy::IntoBytes;

use crate::setup::{
    FAIL_PERMISSION, FULL, VALIDATE, expect_rmpadjust, ghcb_page, small_region, valid_page,
};
use crate::start;

/// The table. The first case starts the level; [`END`] ends it.
pub const CASES: &[Case] = &[
    case(
        "vmpl1_starts",
        "ghcb.md §7 CREATE_ON_INIT, §3 code 0x016",
        starts,
    ),
    case(
        "vmpl1_ghcb_msr_at_reset",
        "ghcb.md §11.5, guests.md §8.3",
        msr_at_reset,
    ),
    case("vmpl1_runs_and_returns", "ghcb.md §11.9", runs_and_returns),
    case(
        "vmpl1_run_through_the_page",
        "ghcb.md §5 0x80000018",
        run_through_page,
    ),
    case(
        "vmpl1_state_is_in_the_vmsa",
        "snp-isa.md §11.1, §15",
        state_in_vmsa,
    ),
    case("vmpl1_vmsa_can_be_edited", "svsm.md §2 step 6", edited_vmsa),
    case("vmpl1_pvalidate", "snp-isa.md §3 row 2", pvalidate),
    case(
        "vmpl1_rmpadjust_own_level",
        "snp-isa.md §4 row 4",
        adjust_own_level,
    ),
    case(
        "vmpl1_rmpadjust_lower_level",
        "snp-isa.md §4 rows 10, 11",
        adjust_lower,
    ),
    case(
        "vmpl1_rmpadjust_more_than_it_has",
        "snp-isa.md §4 row 10",
        adjust_too_much,
    ),
    case(
        "vmpl1_rmpadjust_vmsa_mark_ignored",
        "snp-isa.md §4 row 11",
        adjust_vmsa,
    ),
    case(
        "vmpl1_rmpadjust_not_validated",
        "snp-isa.md §4 row 8",
        adjust_not_validated,
    ),
    case("vmpl1_rmpquery", "snp-isa.md §5", query),
    case("vmpl1_reads_what_it_may", "snp-isa.md §9, §10", reads),
    case("vmpl1_writes_what_it_may", "snp-isa.md §9, §10", writes),
    case("vmpl1_not_validated_page", "snp-isa.md §9", not_validated),
    case("vmpl1_page_rescinded_under_it", "snp-isa.md §9", rescinded),
    case("vmpl1_cannot_create_vmpl0", "ghcb.md §7", creates_vmpl0),
];

/// The level's end.
pub const END: &[Case] = &[case("vmpl1_destroyed", "ghcb.md §7 DESTROY", destroyed)];

const STACK_SIZE: usize = 32 << 10;

/// The stack of VMPL1.
#[repr(C, align(16))]
struct Stack(UnsafeCell<[u8; STACK_SIZE]>);

// SAFETY: only the stack pointer of VMPL1 refers to it.
unsafe impl Sync for Stack {}

static STACK: Stack = Stack(UnsafeCell::new([0; STACK_SIZE]));

/// The work VMPL1 is to do, a pointer to a `&mut dyn FnMut()` on the stack of VMPL0.
static JOB: AtomicPtr<&mut dyn FnMut()> = AtomicPtr::new(core::ptr::null_mut());

/// Where VMPL1's state is kept.
static VMSA: Once<Gpa> = Once::new();

extern "C" fn work() -> ! {
    trap::load();
    loop {
        let job = JOB.swap(core::ptr::null_mut(), Ordering::Acquire);
        if !job.is_null() {
            // SAFETY: VMPL0 set the pointer right before it let this level run, and waits
            // until the work is done, so the closure is alive and nobody else uses it.
            unsafe { (*job)() };
        }
        ghcb::run_vmpl(0);
    }
}

#[unsafe(naked)]
extern "C" fn entry() -> ! {
    core::arch::naked_asm!("xor ebp, ebp", "call {work}", "ud2", work = sym work)
}

fn vmsa() -> Result<Gpa, Finding> {
    VMSA.get()
        .copied()
        .ok_or_else(|| Finding::new(format_args!("VMPL1 did not start")))
}

/// Has `job` done at VMPL1, whose result it returns.
pub fn at_vmpl1<T>(job: impl FnOnce() -> T) -> Result<T, Finding> {
    vmsa()?;
    let mut result = None;
    let mut once = Some(job);
    let mut thunk = || result = once.take().map(|job| job());
    let mut work: &mut dyn FnMut() = &mut thunk;
    // The compiler cannot see who uses the pointer; the lifetime is the contract of `JOB`.
    JOB.store((&raw mut work).cast(), Ordering::Release);
    expect(
        "reply to run VMPL1",
        ghcb::run_vmpl(1),
        Response::RunVmpl { error: 0 },
    )?;
    result.ok_or_else(|| Finding::new(format_args!("VMPL1 returned without doing its work")))
}

fn make_vmsa() -> Vmsa {
    let code = Segment {
        selector: CODE_SELECTOR,
        attributes: SegmentAttributes::CODE64,
        limit: u32::MAX,
        base: 0,
    };
    let data = Segment {
        selector: DATA_SELECTOR,
        attributes: SegmentAttributes::DATA32,
        ..code
    };
    let mut vmsa = Vmsa::at_reset(0);
    vmsa.cs = code;
    vmsa.ds = data;
    vmsa.es = data;
    vmsa.ss = data;
    vmsa.efer = Efer::SVME | Efer::LME | Efer::LMA;
    // Protection, extension type, numeric errors, write protection, paging.
    vmsa.cr0 = 0x8001_0031;
    vmsa.cr4 = 1 << 5;
    vmsa.cr3 = start::page_table_root();
    vmsa.rip = entry as *const () as u64;
    vmsa.rsp = STACK.0.get() as u64 + STACK_SIZE as u64;
    vmsa.vmpl = 1;
    vmsa.sev_features = SevFeatures::SNP_ACTIVE;
    vmsa
}

/// A page that holds `vmsa` and is marked as one.
pub fn vmsa_page(vmsa: &Vmsa) -> Result<Gpa, Finding> {
    let page = valid_page()?;
    for (index, word) in vmsa.as_bytes().chunks_exact(8).enumerate() {
        let word = u64::from_le_bytes(word.try_into().unwrap_or_default());
        memory::write(page.get() + index as u64 * 8, word)?;
    }
    expect_rmpadjust(page.get(), SIZE_4K, attributes(1, 0, true), 0)?;
    Ok(page)
}

fn starts() -> Verdict {
    let params = start::launch();
    for gpa in (params.region_gpa..params.image_end).step_by(PAGE_SIZE as usize) {
        expect_rmpadjust(gpa, SIZE_4K, attributes(1, FULL, false), 0)?;
    }
    let page = vmsa_page(&make_vmsa())?;
    let info = ApCreation {
        request: ApRequest::CREATE_ON_INIT,
        vmpl: Vmpl::VMPL1,
        apic_id: 0,
    };
    let features = [(Field::RAX, SevFeatures::SNP_ACTIVE.0)];
    let reply = ghcb_page().call(
        ExitCode::AP_CREATION,
        [info.encode(), page.get()],
        &features,
    );
    expect("reply to AP creation", reply, Reply::DONE)?;
    VMSA.call_once(|| page);
    Ok(())
}

/// Must be the first that VMPL1 does: its first request changes the register.
fn msr_at_reset() -> Verdict {
    let first = at_vmpl1(ghcb::msr)?;
    expect(
        "VMPL1's GHCB MSR",
        first,
        ghcb::msr_call(Request::SevInfo.encode()),
    )
}

fn runs_and_returns() -> Verdict {
    let switches = || oracle::counter(Counter::WORLD_SWITCHES);
    let before = switches();
    let stack_of_vmpl0 = 0_u8;
    let distance = at_vmpl1(|| {
        let stack_of_vmpl1 = 0_u8;
        (&raw const stack_of_vmpl1 as u64).abs_diff(STACK.0.get() as u64)
    })?;
    expect("runs on its own stack", distance < STACK_SIZE as u64, true)?;
    core::hint::black_box(stack_of_vmpl0);
    expect("world switches", switches() - before, 2)
}

fn run_through_page() -> Verdict {
    vmsa()?;
    let reply = ghcb_page().call(ExitCode::RUN_VMPL, [1, 0], &[]);
    expect("reply", reply, Reply::DONE)
}

/// Reads a field of VMPL1's VMSA.
fn vmsa_field(offset: usize) -> Result<u64, Finding> {
    memory::read(vmsa()?.get() + offset as u64)
}

fn state_in_vmsa() -> Verdict {
    use core::mem::offset_of;
    at_vmpl1(|| ())?;
    let code = vmsa_field(offset_of!(Vmsa, guest_exit_code))?;
    expect("GUEST_EXITCODE", code, ExitCode::VMGEXIT.0)?;
    let params = start::launch();
    let rip = vmsa_field(offset_of!(Vmsa, rip))?;
    expect(
        "RIP inside the image",
        (params.region_gpa..params.image_end).contains(&rip),
        true,
    )?;
    let rsp = vmsa_field(offset_of!(Vmsa, rsp))?;
    let stack = STACK.0.get() as u64;
    expect(
        "RSP inside its stack",
        (stack..stack + STACK_SIZE as u64).contains(&rsp),
        true,
    )
}

fn edited_vmsa() -> Verdict {
    use core::mem::offset_of;
    const SENT: u64 = 0x1111_2222_3333_4444;
    const ANSWER: u64 = 0x5555_6666_7777_8888;
    let mut received = 0;
    let mut thunk = || {
        ghcb::set_msr(Request::RunVmpl { vmpl: 0 }.encode());
        received = insn::vmgexit_with_rax(SENT);
    };
    let mut work: &mut dyn FnMut() = &mut thunk;
    JOB.store((&raw mut work).cast(), Ordering::Release);
    vmsa()?;
    expect(
        "first reply",
        ghcb::run_vmpl(1),
        Response::RunVmpl { error: 0 },
    )?;
    // In the middle of the work: VMPL1 waits in its VMGEXIT.
    expect("RAX in the VMSA", vmsa_field(offset_of!(Vmsa, rax))?, SENT)?;
    memory::write(vmsa()?.get() + offset_of!(Vmsa, rax) as u64, ANSWER)?;
    expect(
        "second reply",
        ghcb::run_vmpl(1),
        Response::RunVmpl { error: 0 },
    )?;
    expect("RAX at VMPL1", received, ANSWER)
}

fn pvalidate() -> Verdict {
    let page = page_of(small_region()?, 1);
    let result = at_vmpl1(|| insn::pvalidate(page.get(), SIZE_4K, VALIDATE))?;
    expect("PVALIDATE at VMPL1", result, Err(Trap::GP))?;
    oracle::expect_validated(page, false)
}

/// A page VMPL1 may use with these permissions.
pub fn granted_page(permissions: u64) -> Result<Gpa, Finding> {
    let page = valid_page()?;
    memory::fill(page.get(), PAGE_SIZE, 0x9999)?;
    expect_rmpadjust(page.get(), SIZE_4K, attributes(1, permissions, false), 0)?;
    Ok(page)
}

const R: u64 = 1;
const W: u64 = 2;

fn adjust_own_level() -> Verdict {
    let page = granted_page(R | W)?;
    for level in [0, 1] {
        let result = at_vmpl1(|| rmpadjust(page.get(), SIZE_4K, attributes(level, R, false)))?;
        expect("RMPADJUST at VMPL1", result, Ok(FAIL_PERMISSION))?;
    }
    expect(
        "permissions",
        oracle::page(page).permissions,
        [0xF, 3, 0, 0],
    )
}

fn adjust_lower() -> Verdict {
    let page = granted_page(R | W)?;
    let result = at_vmpl1(|| rmpadjust(page.get(), SIZE_4K, attributes(2, R, false)))?;
    expect("RMPADJUST at VMPL1", result, Ok(0))?;
    expect(
        "permissions",
        oracle::page(page).permissions,
        [0xF, 3, 1, 0],
    )
}

fn adjust_too_much() -> Verdict {
    let page = granted_page(R)?;
    let result = at_vmpl1(|| rmpadjust(page.get(), SIZE_4K, attributes(2, R | W, false)))?;
    expect("RMPADJUST at VMPL1", result, Ok(FAIL_PERMISSION))?;
    expect(
        "permissions",
        oracle::page(page).permissions,
        [0xF, 1, 0, 0],
    )
}

fn adjust_vmsa() -> Verdict {
    let page = granted_page(R | W)?;
    let result = at_vmpl1(|| rmpadjust(page.get(), SIZE_4K, attributes(2, R, true)))?;
    expect("RMPADJUST at VMPL1", result, Ok(0))?;
    oracle::expect_flags(page, PageFlags::VMSA, PageFlags::empty())
}

fn adjust_not_validated() -> Verdict {
    let page = page_of(small_region()?, 1).get();
    let result = at_vmpl1(|| rmpadjust(page, SIZE_4K, attributes(2, R, false)))?;
    expect("RMPADJUST at VMPL1", result, Err(Trap::not_validated(page)))
}

fn query() -> Verdict {
    let page = granted_page(R | W)?;
    expect_rmpadjust(page.get(), SIZE_4K, attributes(2, R, false), 0)?;
    let want = Queried {
        eax: 0,
        attributes: attributes(2, R, false),
        size: SIZE_4K,
    };
    expect(
        "RMPQUERY for VMPL2",
        at_vmpl1(|| rmpquery(page.get(), 2))?,
        Ok(want),
    )?;
    let code = at_vmpl1(|| rmpquery(page.get(), 0))?.map(|answer| answer.eax);
    expect("RMPQUERY for VMPL0", code, Ok(FAIL_PERMISSION))
}

fn reads() -> Verdict {
    let page = granted_page(R)?;
    at_vmpl1(|| memory::expect_filled(page.get(), PAGE_SIZE, 0x9999))?
}

fn writes() -> Verdict {
    let page = granted_page(R | W)?;
    at_vmpl1(|| memory::fill(page.get(), PAGE_SIZE, 0xAAAA))??;
    memory::expect_filled(page.get(), PAGE_SIZE, 0xAAAA)
}

fn not_validated() -> Verdict {
    let page = page_of(small_region()?, 1).get();
    let result = at_vmpl1(|| insn::load(page))?;
    expect("read at VMPL1", result, Err(Trap::not_validated(page)))
}

fn rescinded() -> Verdict {
    let page = granted_page(R)?.get();
    // VMPL1 has the page in its translations when it goes away.
    at_vmpl1(|| memory::read(page))??;
    expect_rmpadjust(page, SIZE_4K, attributes(1, 0, false), 0)?;
    let result = insn::pvalidate(page, SIZE_4K, crate::setup::RESCIND);
    expect("PVALIDATE", result, Ok(insn::Pvalidated::DONE))?;
    let result = at_vmpl1(|| insn::load(page))?;
    expect("read at VMPL1", result, Err(Trap::not_validated(page)))
}

/// VMPL1 asks for a new VMPL0: it would own the machine.
fn creates_vmpl0() -> Verdict {
    let vmsa = vmsa()?;
    let page = ghcb::Page::at(crate::setup::shared_page()?);
    let reply = at_vmpl1(|| {
        page.register()?;
        let info = ApCreation {
            request: ApRequest::CREATE,
            vmpl: Vmpl::VMPL0,
            apic_id: 0,
        };
        let features = [(Field::RAX, SevFeatures::SNP_ACTIVE.0)];
        Ok(page.call(
            ExitCode::AP_CREATION,
            [info.encode(), vmsa.get()],
            &features,
        ))
    })??;
    expect(
        "reply",
        reply,
        Reply::malformed(protocols::ghcb::page::MalformedReason::INVALID_INPUT),
    )
}

fn destroyed() -> Verdict {
    let vmsa = vmsa()?;
    let info = ApCreation {
        request: ApRequest::DESTROY,
        vmpl: Vmpl::VMPL1,
        apic_id: 0,
    };
    let reply = ghcb_page().call(ExitCode::AP_CREATION, [info.encode(), vmsa.get()], &[]);
    expect("reply", reply, Reply::DONE)?;
    match ghcb::run_vmpl(1) {
        Response::RunVmpl { error } => guest::harness::expect_not("error", error, 0),
        other => Err(Finding::new(format_args!(
            "reply {other:x?}, want RUN_VMPL"
        ))),
    }
}
