//! Calls that concern a processor which is inside the guest all the while: what it had in its
//! translations is gone when the call is answered, and its VMSA is nobody's to take.
//!
//! The second processor runs [`guest::reader`], at the same level as this program.

use guest::ghcb::{self, Reply};
use guest::harness::{Case, Finding, Verdict, case, expect};
use guest::memory;
use guest::reader::{self, expect_trap, read_from, traps, wait_for_reads};
use protocols::addr::{Gpa, PageSize, Vmpl};
use protocols::exit_code::ExitCode;
use protocols::ghcb::PageOperation;
use protocols::ghcb::event::{ApCreation, ApRequest};
use protocols::ghcb::page::Field;
use protocols::svsm::ResultCode;
use protocols::vmsa::SevFeatures;
use spin::Once;

use crate::setup::{self, accepted_page, accepted_region, done, expect_guests, rescind};
use crate::vcpus::{APIC_ID, create, delete, put_vmsa};

/// The table. The first case starts the processor, the last one ends it.
pub const CASES: &[Case] = &[
    case("running_starts", "svsm.md §4.2, ghcb.md §7 CREATE", starts),
    case(
        "running_loses_a_page",
        "svsm.md §5, design.md I3",
        loses_a_page,
    ),
    case(
        "running_loses_a_region",
        "svsm.md §5, design.md I3",
        loses_a_region,
    ),
    case(
        "running_page_becomes_vmsa",
        "svsm.md §4.2 step 2, design.md I3",
        page_becomes_vmsa,
    ),
    case("running_is_not_deleted", "svsm.md §4.3", not_deleted),
    case("running_ends", "ghcb.md §7 DESTROY, svsm.md §4.3", ends),
];

/// How often a call is repeated that waits for the running processor.
const PATIENCE: u32 = 1000;

/// The running processor's VMSA.
static VMSA: Once<Gpa> = Once::new();

fn vmsa() -> Result<Gpa, Finding> {
    VMSA.get()
        .copied()
        .ok_or_else(|| Finding::new(format_args!("the second processor did not start")))
}

/// Asks the host to start or stop the second processor.
fn ask(request: ApRequest, vmsa: Gpa) -> Result<Reply, Finding> {
    // Given back before it is shared: it may have been made ready, behind the guest's back.
    let page = accepted_page()?;
    done(&[rescind(page, PageSize::Size4K)])?;
    ghcb::change_page_state(page, PageOperation::SHARED)?;
    let page = ghcb::Page::at(page);
    page.register()?;
    let info = ApCreation {
        request,
        vmpl: Vmpl::VMPL1,
        apic_id: APIC_ID as u32,
    };
    let reply = page.call(
        ExitCode::AP_CREATION,
        [info.encode(), vmsa.get()],
        &[(Field::RAX, SevFeatures::SNP_ACTIVE.0)],
    );
    setup::reopen_console();
    Ok(reply)
}

/// Makes the second processor, and has the host start it.
pub fn starts() -> Verdict {
    reader::prepare();
    let (page, area) = (accepted_page()?, accepted_page()?);
    put_vmsa(page, &reader::vmsa())?;
    expect(
        "CREATE_VCPU",
        create(page.get(), area.get(), APIC_ID)?,
        ResultCode::SUCCESS,
    )?;
    expect("reply", ask(ApRequest::CREATE, page)?, Reply::DONE)?;
    VMSA.call_once(|| page);
    read_from(accepted_page()?)
}

const NOT_VALIDATED: u64 = ExitCode::PAGE_NOT_VALIDATED.0;

fn loses_a_page() -> Verdict {
    vmsa()?;
    let page = accepted_page()?;
    let before = traps();
    read_from(page)?;
    done(&[rescind(page, PageSize::Size4K)])?;
    expect_trap(before, NOT_VALIDATED, page.get())
}

fn loses_a_region() -> Verdict {
    vmsa()?;
    let region = accepted_region()?;
    let before = traps();
    read_from(memory::page_of(region, 300))?;
    done(&[rescind(region, PageSize::Size2M)])?;
    expect_trap(before, NOT_VALIDATED, memory::page_of(region, 300).get())
}

/// The page that becomes a VMSA is in the other processor's translations, with the right to
/// write to it.
fn page_becomes_vmsa() -> Verdict {
    vmsa()?;
    let (page, area) = (accepted_page()?, accepted_page()?);
    read_from(page)?;
    // It does not read on while the page has no rights at all: no host could resolve that. The
    // translation is there all the same.
    read_from(accepted_page()?)?;
    put_vmsa(page, &reader::vmsa())?;
    // BUSY while the other processor has not been out of the guest; it may lack a core of this computer.
    let created = (0..PATIENCE)
        .map(|_| create(page.get(), area.get(), APIC_ID))
        .find(|code| !matches!(code, Ok(ResultCode::BUSY)));
    expect(
        "CREATE_VCPU",
        created.transpose()?,
        Some(ResultCode::SUCCESS),
    )?;
    // It may read it still.
    read_from(page)?;
    read_from(accepted_page()?)?;
    expect("DELETE_VCPU", delete(page.get())?, ResultCode::SUCCESS)?;
    expect_guests(page)
}

fn not_deleted() -> Verdict {
    read_from(accepted_page()?)?;
    for _ in 0..3 {
        expect(
            "DELETE_VCPU",
            delete(vmsa()?.get())?,
            ResultCode::FAIL_IN_USE,
        )?;
        wait_for_reads()?;
    }
    Ok(())
}

/// Has the host stop the second processor, and deletes it.
pub fn ends() -> Verdict {
    let vmsa = vmsa()?;
    expect("reply", ask(ApRequest::DESTROY, vmsa)?, Reply::DONE)?;
    expect("DELETE_VCPU", delete(vmsa.get())?, ResultCode::SUCCESS)?;
    expect_guests(vmsa)
}
