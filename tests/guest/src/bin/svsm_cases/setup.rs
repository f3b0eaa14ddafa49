//! What the tables share: entries, pages in a wanted state, and the proof that nothing changed.

use core::mem::offset_of;

use core::sync::atomic::{AtomicU64, Ordering};

use guest::ghcb::{self, change_page_state};
use guest::harness::{Finding, Verdict, expect};
use guest::svsm::{self, Outcome, pvalidate_from};
use guest::{console, insn, memory, oracle};
use protocols::addr::{Gpa, PAGE_SIZE, PageSize};
use protocols::ghcb::PageOperation;
use protocols::ghcb::event::IoWidth;
use protocols::oracle::{Counter, PageFlags};
use protocols::secrets::SecretsPage;
use protocols::svsm::{PvalidateAction, PvalidateEntry, ResultCode};
use spin::Once;

use crate::reset;

/// The quadword at an offset in the secrets page.
fn secret(offset: usize) -> u64 {
    memory::read(reset::SECRETS + offset as u64)
        .unwrap_or_else(|finding| panic!("the secrets page cannot be read: {finding}"))
}

/// The calling area the secrets page names.
pub fn first_calling_area() -> Gpa {
    Gpa::new(secret(offset_of!(SecretsPage, svsm_caa)))
}

/// First byte and size of the paravisor's range, as the secrets page has them.
pub fn paravisor() -> (Gpa, u64) {
    (
        Gpa::new(secret(offset_of!(SecretsPage, svsm_base))),
        secret(offset_of!(SecretsPage, svsm_size)),
    )
}

/// Highest version of the core protocol and the guest's VMPL, as the secrets page has them.
pub fn version_and_vmpl() -> (u32, u8) {
    let word = secret(offset_of!(SecretsPage, svsm_max_version));
    (word as u32, (word >> 32) as u8)
}

/// The first quadword of a VMPCK in the guest's secrets page.
pub fn vmpck(level: usize) -> u64 {
    const SIZE: usize = 32;
    secret(offset_of!(SecretsPage, vmpck) + level * SIZE)
}

/// A port without effect: the scratch register of the second serial port.
const HARMLESS_PORT: u16 = 0x2FF;

/// The GHCB page that the console writes through where ports are reflected to the guest.
static CONSOLE_PAGE: Once<ghcb::Page> = Once::new();

/// Bytes that were ready when the console's page was given back: prepared, and never claimed.
static READY_GIVEN_BACK: AtomicU64 = AtomicU64::new(0);

/// How much of what was prepared went back to the host before any case ran.
pub fn ready_given_back() -> u64 {
    READY_GIVEN_BACK.load(Ordering::Relaxed)
}

/// Attaches the console: plain OUT where the host lets VMPL1 use its ports (`vc=direct`), the
/// GHCB where an OUT raises #VC (`vc=strict`).
pub fn open_console() {
    if insn::out8(HARMLESS_PORT, 0).is_ok() {
        console::attach(|port, width, value| {
            // It just worked, and there is no other way to complain if it no longer does.
            let _ = match width {
                IoWidth::Byte => insn::out8(port, value as u8),
                _ => insn::out32(port, value),
            };
        });
        return;
    }
    // Nobody has asked for this page, but it may have been made ready ahead (policies eager, ahead):
    // who shares a page rescinds it first. If that fails, the referee says so at the end.
    let page = memory::fresh_page();
    let before = oracle::counter(Counter::PVALIDATE_4K_RESCIND);
    let _ = pvalidate_from(0, &[ignoring(rescind(page, PageSize::Size4K))]);
    // Nothing is executed for a page that was not valid.
    if oracle::counter(Counter::PVALIDATE_4K_RESCIND) != before {
        READY_GIVEN_BACK.store(PAGE_SIZE, Ordering::Relaxed);
    }
    if change_page_state(page, PageOperation::SHARED).is_ok() {
        CONSOLE_PAGE.call_once(|| ghcb::Page::at(page));
        reopen_console();
        console::attach(|port, width, value| {
            if let Some(page) = CONSOLE_PAGE.get() {
                page.port_out(port, width, value);
            }
        });
    }
}

/// Registers the console's GHCB page again, after a case has registered another.
pub fn reopen_console() {
    if let Some(page) = CONSOLE_PAGE.get() {
        // Without it there is no console to complain on.
        let _ = page.register();
    }
}

/// Memory that is none: the PCI hole of q35 with `-m 4G`, no device at its start.
pub const NO_MEMORY: Gpa = Gpa::new(0xE000_0000);

/// An entry that validates.
pub const fn validate(gpa: Gpa, size: PageSize) -> PvalidateEntry {
    PvalidateEntry::new(gpa, size, PvalidateAction::Validate, false)
}

/// An entry that rescinds.
pub const fn rescind(gpa: Gpa, size: PageSize) -> PvalidateEntry {
    PvalidateEntry::new(gpa, size, PvalidateAction::Rescind, false)
}

/// The same entry, with "was so already" ignored.
pub const fn ignoring(entry: PvalidateEntry) -> PvalidateEntry {
    PvalidateEntry(entry.0 | 1 << 3)
}

/// PVALIDATE of one list from its start, which must end like this.
pub fn expect_pvalidate(entries: &[PvalidateEntry], result: ResultCode, next: u16) -> Verdict {
    expect(
        "PVALIDATE",
        svsm::pvalidate(entries)?,
        Outcome { result, next },
    )
}

/// PVALIDATE of one list that must succeed.
pub fn done(entries: &[PvalidateEntry]) -> Verdict {
    expect_pvalidate(entries, ResultCode::SUCCESS, entries.len() as u16)
}

/// A page that was accepted.
pub fn accepted_page() -> Result<Gpa, Finding> {
    let page = memory::fresh_page();
    done(&[validate(page, PageSize::Size4K)])?;
    Ok(page)
}

/// A 2 MiB region that was accepted.
pub fn accepted_region() -> Result<Gpa, Finding> {
    let region = memory::fresh_region();
    done(&[validate(region, PageSize::Size2M)])?;
    Ok(region)
}

/// All the guest's permissions on a page it owns, nothing below it.
pub const GUESTS: [u8; 4] = [0xF, 0xF, 0, 0];

/// Demands that the RMP says: the guest's page, validated, full permissions, no VMSA.
pub fn expect_guests(gpa: Gpa) -> Verdict {
    let page = oracle::page(gpa);
    let mask = PageFlags::ASSIGNED | PageFlags::VALIDATED | PageFlags::VMSA;
    expect(
        "RMP flags",
        page.flags & mask,
        PageFlags::ASSIGNED | PageFlags::VALIDATED,
    )?;
    expect("permissions", page.permissions, GUESTS)
}

/// Demands that the page is not validated and that the guest has no permissions on it.
pub fn expect_not_accepted(gpa: Gpa) -> Verdict {
    let page = oracle::page(gpa);
    expect(
        "validated",
        page.flags.contains(PageFlags::VALIDATED),
        false,
    )?;
    expect("permissions of VMPL1", page.permissions[1], 0)
}

/// Demands that `request` leaves the RMP entries of `pages` as they are and executes no
/// PVALIDATE.
pub fn pages_unchanged(pages: &[Gpa], request: impl FnOnce() -> Verdict) -> Verdict {
    const MAX: usize = 8;
    assert!(pages.len() <= MAX, "at most {MAX} pages are watched");
    let mut before = [oracle::Page {
        flags: PageFlags::empty(),
        permissions: [0; 4],
    }; MAX];
    for (slot, &gpa) in before.iter_mut().zip(pages) {
        *slot = oracle::page(gpa);
    }
    let executed = oracle::pvalidates();
    request()?;
    expect("PVALIDATEs executed", oracle::pvalidates(), executed)?;
    for (&was, &gpa) in before.iter().zip(pages) {
        expect("RMP entry", (gpa, oracle::page(gpa)), (gpa, was))?;
    }
    Ok(())
}

/// The same, and that the paravisor executes no RMPADJUST either: a request refused before
/// anything is tried.
pub fn unchanged(pages: &[Gpa], request: impl FnOnce() -> Verdict) -> Verdict {
    let adjusted = oracle::counter(Counter::RMPADJUST);
    pages_unchanged(pages, request)?;
    expect(
        "RMPADJUSTs executed",
        oracle::counter(Counter::RMPADJUST),
        adjusted,
    )
}

/// The rules whose breaking the machine counts.
const VIOLATIONS: [Counter; 6] = [
    Counter::DOUBLE_VALIDATION,
    Counter::UNSCRUBBED_GRANT,
    Counter::LIVE_RESCIND,
    Counter::IMPLICIT_CONVERSION,
    Counter::STALE_TRANSLATION,
    Counter::IN_USE_RESCIND,
];

/// What must hold after every case, in the machine's eyes: map and RMP agree on every page
/// (design.md I11), and the paravisor broke no rule on the way.
pub fn audit() -> Verdict {
    static SEEN: [AtomicU64; VIOLATIONS.len()] = [const { AtomicU64::new(0) }; VIOLATIONS.len()];

    // First the counters, all of them: what one case did must not be found in the next one's.
    let mut verdict = Ok(());
    for (violation, seen) in VIOLATIONS.into_iter().zip(&SEEN) {
        let now = oracle::counter(violation);
        let new = now - seen.swap(now, Ordering::Relaxed);
        verdict = verdict.and(expect("new violations", (violation, new), (violation, 0)));
    }
    verdict?;
    expect(
        "pages on which map and RMP disagree",
        oracle::disagreements(),
        0,
    )
}

/// A request that must fail with `result` and `next`, and leave `pages` alone.
pub fn refused(
    entries: &[PvalidateEntry],
    result: ResultCode,
    next: u16,
    pages: &[Gpa],
) -> Verdict {
    unchanged(pages, || expect_pvalidate(entries, result, next))
}

/// Demands that the page is as new: every line zero.
pub fn expect_zero_page(gpa: Gpa) -> Verdict {
    memory::expect_zero(memory::private(gpa), PAGE_SIZE)
}
