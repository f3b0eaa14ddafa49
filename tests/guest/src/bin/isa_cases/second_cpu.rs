//! A second processor that is inside the guest while this one changes the RMP: what it may
//! still use of what was withdrawn, what ends that, and who may touch its VMSA meanwhile.
//!
//! The second processor runs [`guest::reader`] at VMPL1.

use guest::ghcb::Reply;
use guest::harness::{Case, Finding, Verdict, case, expect};
use guest::insn::{Pvalidated, SIZE_4K, attributes, rmpadjust};
use guest::memory;
use guest::oracle;
use guest::reader::{self, expect_trap, reads, traps, wait_for_reads};
use protocols::addr::{Gpa, PAGE_SIZE, Vmpl};
use protocols::exit_code::ExitCode;
use protocols::ghcb::PageOperation;
use protocols::ghcb::event::{ApCreation, ApRequest};
use protocols::ghcb::page::{Field, MalformedReason};
use protocols::oracle::{Counter, HostAct};
use protocols::snp::{Permissions, ReturnCode};
use protocols::vmsa::SevFeatures;
use spin::Once;

use crate::setup::{FULL, RESCIND, expect_pvalidate, expect_rmpadjust, ghcb_page, valid_page};
use crate::start;
use crate::vmpl1::{at_vmpl1, granted_page, vmsa_page};

/// The table. VMPL1 exists on the first processor; the first case starts the second one, the
/// last one ends it.
pub const CASES: &[Case] = &[
    case("cpu2_starts", "ghcb.md §7 CREATE", starts),
    case(
        "cpu2_vmsa_in_use",
        "snp-isa.md §11, APM 15.36.12",
        vmsa_in_use,
    ),
    case(
        "cpu2_keeps_what_was_rescinded",
        "snp-isa.md §4 (APM 15.36.15), tcg-svm.md §7",
        keeps_what_was_rescinded,
    ),
    case(
        "cpu2_keeps_what_was_revoked",
        "snp-isa.md §4 (APM 15.36.15)",
        keeps_what_was_revoked,
    ),
    case(
        "cpu2_loses_what_the_host_takes",
        "snp-isa.md §6 RMPUPDATE",
        loses_what_the_host_takes,
    ),
    case(
        "cpu2_answer_before_the_flush",
        "docs/machine.md stale_translation",
        answer_before_the_flush,
    ),
    case(
        "cpu2_vmsa_before_the_flush",
        "docs/machine.md stale_translation",
        vmsa_before_the_flush,
    ),
    case("cpu2_gets_another_vmsa", "ghcb.md §7 CREATE", replaced),
    case("cpu2_destroyed", "ghcb.md §7 DESTROY", destroyed),
];

/// Where the second processor's state is kept.
static VMSA: Once<Gpa> = Once::new();

fn vmsa() -> Result<Gpa, Finding> {
    VMSA.get()
        .copied()
        .ok_or_else(|| Finding::new(format_args!("the second processor did not start")))
}

/// A page that VMPL1 may read and write, and that the second processor reads from now on.
fn page_in_use() -> Result<Gpa, Finding> {
    vmsa()?;
    let rights = Permissions::READ | Permissions::WRITE;
    let page = granted_page(rights.bits().into())?;
    reader::read_from(page)?;
    Ok(page)
}

fn revoke(page: Gpa) -> Verdict {
    expect_rmpadjust(page.get(), SIZE_4K, attributes(1, 0, false), 0)
}

fn rescind(page: Gpa) -> Verdict {
    expect_pvalidate(page.get(), SIZE_4K, RESCIND, Pvalidated::DONE)
}

/// Asks whether the second processor runs, which makes it leave once if it does.
fn flush() -> Verdict {
    const IN_USE: u32 = ReturnCode::FAIL_IN_USE.0;
    let attributes = attributes(1, 0, true);
    expect(
        "RMPADJUST of its VMSA",
        rmpadjust(vmsa()?.get(), SIZE_4K, attributes),
        Ok(IN_USE),
    )
}

const NOT_VALIDATED: u64 = ExitCode::PAGE_NOT_VALIDATED.0;

fn ask(request: ApRequest, vmsa: Gpa) -> Reply {
    let info = ApCreation {
        request,
        vmpl: Vmpl::VMPL1,
        apic_id: 1,
    };
    let features = [(Field::RAX, SevFeatures::SNP_ACTIVE.0)];
    ghcb_page().call(
        ExitCode::AP_CREATION,
        [info.encode(), vmsa.get()],
        &features,
    )
}

fn starts() -> Verdict {
    let params = start::launch();
    for gpa in (params.region_gpa..params.image_end).step_by(PAGE_SIZE as usize) {
        expect_rmpadjust(gpa, SIZE_4K, attributes(1, FULL, false), 0)?;
    }
    reader::prepare();
    let page = vmsa_page(&reader::vmsa())?;
    expect("reply", ask(ApRequest::CREATE, page), Reply::DONE)?;
    VMSA.call_once(|| page);
    page_in_use().map(drop)
}

/// While it runs its VMSA is nobody's to change: not VMPL0's, not the host's.
fn vmsa_in_use() -> Verdict {
    let page = page_in_use()?;
    flush()?;
    flush()?;
    expect(
        "host takes it away",
        oracle::host_act(vmsa()?, HostAct::TAKE_AWAY).is_err(),
        true,
    )?;
    expect(
        "host makes it shared",
        guest::ghcb::change_page_state(vmsa()?, PageOperation::SHARED).is_err(),
        true,
    )?;
    oracle::expect_validated(vmsa()?, true)?;
    wait_for_reads()?;
    memory::expect_filled(page.get(), PAGE_SIZE, 0x9999)
}

fn keeps_what_was_rescinded() -> Verdict {
    let page = page_in_use()?;
    let before = traps();
    revoke(page)?;
    rescind(page)?;
    oracle::expect_validated(page, false)?;
    // It is gone, and the other processor reads it all the same.
    wait_for_reads()?;
    expect("exceptions so far", traps(), before)?;
    flush()?;
    expect_trap(before, NOT_VALIDATED, page.get())
}

/// The same for a page that stays validated. The end of this one is not tried: a VMPL that
/// uses a page without the right to ends the run.
fn keeps_what_was_revoked() -> Verdict {
    let page = page_in_use()?;
    revoke(page)?;
    wait_for_reads()?;
    let rights = attributes(1, FULL, false);
    expect_rmpadjust(page.get(), SIZE_4K, rights, 0)?;
    flush()?;
    wait_for_reads()
}

/// The host does not wait for anybody's flush: what it takes is gone for all.
fn loses_what_the_host_takes() -> Verdict {
    let page = page_in_use()?;
    let before = traps();
    revoke(page)?;
    rescind(page)?;
    wait_for_reads()?;
    oracle::host_act(page, HostAct::TAKE_AWAY)?;
    expect_trap(before, NOT_VALIDATED, page.get())
}

fn stale() -> u64 {
    oracle::counter(Counter::STALE_TRANSLATION)
}

fn answer_before_the_flush() -> Verdict {
    let page = page_in_use()?;
    let (before, trapped) = (stale(), traps());
    at_vmpl1(|| ())?;
    expect("without a withdrawal", stale(), before)?;
    revoke(page)?;
    rescind(page)?;
    at_vmpl1(|| ())?;
    expect("answered too early", stale(), before + 1)?;
    at_vmpl1(|| ())?;
    expect("told once", stale(), before + 1)?;
    flush()?;
    expect_trap(trapped, NOT_VALIDATED, page.get())?;

    let page = page_in_use()?;
    let trapped = traps();
    revoke(page)?;
    rescind(page)?;
    flush()?;
    at_vmpl1(|| ())?;
    expect("answered after the flush", stale(), before + 1)?;
    expect_trap(trapped, NOT_VALIDATED, page.get())
}

/// VMPL0 makes a VMSA of a page the other processor can still write to.
fn vmsa_before_the_flush() -> Verdict {
    let make = |page: Gpa| expect_rmpadjust(page.get(), SIZE_4K, attributes(1, 0, true), 0);
    let page = page_in_use()?;
    // From here on it reads another page, without having left: a read of this one after the
    // flush would be a use without the right to.
    page_in_use()?;
    let before = stale();
    revoke(page)?;
    make(page)?;
    expect("made too early", stale(), before + 1)?;
    revoke(page)?;
    flush()?;
    make(page)?;
    expect("made after the flush", stale(), before + 1)?;
    let other = valid_page()?;
    make(other)?;
    expect("a page nobody had", stale(), before + 1)
}

/// A running processor is given another state: the old VMSA is free, the new one in use.
fn replaced() -> Verdict {
    let old = vmsa()?;
    let new = vmsa_page(&reader::vmsa())?;
    page_in_use()?;
    expect("reply", ask(ApRequest::CREATE, new), Reply::DONE)?;
    wait_for_reads()?;
    let adjust = |page: Gpa| rmpadjust(page.get(), SIZE_4K, attributes(1, 0, true));
    expect(
        "RMPADJUST of the new one",
        adjust(new),
        Ok(ReturnCode::FAIL_IN_USE.0),
    )?;
    expect("RMPADJUST of the old one", adjust(old), Ok(0))?;
    // And back.
    expect("reply", ask(ApRequest::CREATE, old), Reply::DONE)?;
    wait_for_reads()?;
    expect("RMPADJUST of the new one", adjust(new), Ok(0))?;
    flush()
}

fn destroyed() -> Verdict {
    page_in_use()?;
    expect("reply", ask(ApRequest::DESTROY, vmsa()?), Reply::DONE)?;
    let before = reads();
    let adjust = rmpadjust(vmsa()?.get(), SIZE_4K, attributes(1, 0, false));
    expect("RMPADJUST of its VMSA", adjust, Ok(0))?;
    expect("reads since", reads(), before)?;
    // Without its mark it is no VMSA any more.
    let refused = Reply::malformed(MalformedReason::INVALID_INPUT);
    expect("reply", ask(ApRequest::CREATE, vmsa()?), refused)
}
