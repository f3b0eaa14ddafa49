//! CREATE_VCPU and DELETE_VCPU. The processors made here are never started: a VMSA that only
//! stands there is all that the checks need.
//!
//! The machine must have a second processor, because a VMSA made for the one that runs would
//! replace it.

use core::mem::offset_of;

use guest::harness::{Case, Finding, Verdict, case, expect};
use guest::memory::{self, page_of};
use guest::oracle;
use guest::svsm::{self, Registers, call};
use protocols::addr::{Gpa, PAGE_SIZE, PageSize, Vmpl};
use protocols::oracle::PageFlags;
use protocols::svsm::{CallId, CoreCall, ResultCode};
use protocols::vmsa::{Efer, SevFeatures, Vmsa};
use zerocopy::IntoBytes;

use crate::setup::{
    NO_MEMORY, accepted_page, done, expect_guests, pages_unchanged, paravisor, rescind, unchanged,
    validate,
};

/// The table.
pub const CASES: &[Case] = &[
    case("create_and_delete", "svsm.md §4.2, §4.3", create_and_delete),
    case(
        "create_leaves_the_vmsa_readable",
        "svsm.md §4.2 steps 2, 4, §10",
        leaves_vmsa_readable,
    ),
    case(
        "create_leaves_the_calling_area_open",
        "svsm.md §4.2",
        area_open,
    ),
    case(
        "create_forgets_where_it_ran",
        "snp-isa.md §4 (APM 15.36.15), design.md I3",
        forgets_where_it_ran,
    ),
    case("create_again_after_delete", "svsm.md §4.3", again),
    case("delete_stops_the_vmsa", "svsm.md §4.3", delete_stops),
    case("create_vmsa_misaligned", "svsm.md §3", vmsa_misaligned),
    case("create_area_misaligned", "svsm.md §3", area_misaligned),
    case(
        "create_vmsa_2m_aligned",
        "svsm.md §4.2, snp-isa.md §11 erratum",
        large_aligned,
    ),
    case("create_vmsa_is_area", "svsm.md §4.2", same_page),
    case(
        "create_vmsa_unaccepted",
        "svsm.md §3, §4.2",
        vmsa_unaccepted,
    ),
    case(
        "create_area_unaccepted",
        "svsm.md §3, §4.2",
        area_unaccepted,
    ),
    case(
        "create_vmsa_in_paravisor",
        "svsm.md §4.2 step 1",
        vmsa_in_paravisor,
    ),
    case(
        "create_area_in_paravisor",
        "svsm.md §4.2 step 1",
        area_in_paravisor,
    ),
    case("create_vmsa_is_live_vmsa", "svsm.md §4.2 step 1", live_vmsa),
    case(
        "create_vmsa_is_live_area",
        "svsm.md §4.2 step 1",
        live_area_as_vmsa,
    ),
    case("create_area_is_live_area", "svsm.md §4.2 step 1", live_area),
    case(
        "create_where_no_memory_is",
        "svsm.md §4.2, design.md I7",
        no_memory,
    ),
    case("create_vmpl0", "svsm.md §4.2 step 3", vmpl0),
    case("create_other_vmpls", "svsm.md §4.2 step 3", other_vmpls),
    case("create_without_svme", "svsm.md §4.2 step 3", no_svme),
    case(
        "create_other_features",
        "svsm.md §4.2 step 3",
        other_features,
    ),
    case("create_unknown_apic_id", "svsm.md §4.2", unknown_apic_id),
    case("delete_unknown", "svsm.md §4.3", delete_unknown),
    case("delete_misaligned", "svsm.md §3, §4.3", delete_misaligned),
    case("delete_startup_vmsa", "svsm.md §4.3", delete_startup),
    case("delete_twice", "svsm.md §4.3", delete_twice),
];

/// A processor of the machine that nobody has started.
pub const APIC_ID: u64 = 1;

const PARAMETER: ResultCode = ResultCode::INVALID_PARAMETER;
const ADDRESS: ResultCode = ResultCode::INVALID_ADDRESS;

pub fn good_vmsa() -> Vmsa {
    let mut vmsa = Vmsa::at_reset(0xFFFF_FFF0);
    vmsa.vmpl = Vmpl::VMPL1.number();
    vmsa.sev_features = SevFeatures::SNP_ACTIVE;
    vmsa
}

/// Fills the page at `gpa`, which is the guest's, with a VMSA.
pub fn put_vmsa(gpa: Gpa, vmsa: &Vmsa) -> Verdict {
    for (index, word) in vmsa.as_bytes().chunks_exact(8).enumerate() {
        let word = u64::from_le_bytes(word.try_into().unwrap_or_default());
        memory::write(gpa.get() + index as u64 * 8, word)?;
    }
    Ok(())
}

/// A page of the guest's with a good VMSA in it.
fn vmsa_page() -> Result<Gpa, Finding> {
    let page = accepted_page()?;
    put_vmsa(page, &good_vmsa())?;
    Ok(page)
}

pub fn create(vmsa: u64, area: u64, apic_id: u64) -> Result<ResultCode, Finding> {
    let registers = Registers {
        rcx: vmsa,
        rdx: area,
        r8: apic_id,
        r9: 0,
    };
    Ok(call(CallId::core(CoreCall::CREATE_VCPU), registers)?.result())
}

pub fn delete(vmsa: u64) -> Result<ResultCode, Finding> {
    Ok(call(CallId::core(CoreCall::DELETE_VCPU), Registers::rcx(vmsa))?.result())
}

/// Makes a processor, lets `check` look at its VMSA and calling area, and deletes it again.
pub fn with_vcpu(check: impl FnOnce(Gpa, Gpa) -> Verdict) -> Verdict {
    let (vmsa, area) = (vmsa_page()?, accepted_page()?);
    expect(
        "CREATE_VCPU",
        create(vmsa.get(), area.get(), APIC_ID)?,
        ResultCode::SUCCESS,
    )?;
    let verdict = check(vmsa, area);
    // Also after a finding: a VMSA left behind would disturb other cases.
    let deleted = delete(vmsa.get())?;
    verdict?;
    expect("DELETE_VCPU", deleted, ResultCode::SUCCESS)
}

fn create_and_delete() -> Verdict {
    let mut pages = [Gpa::new(0); 2];
    with_vcpu(|vmsa, area| {
        pages = [vmsa, area];
        Ok(())
    })?;
    for page in pages {
        expect_guests(page)?;
        memory::fill(page.get(), PAGE_SIZE, 0x1212)?;
        done(&[
            rescind(page, PageSize::Size4K),
            validate(page, PageSize::Size4K),
        ])?;
    }
    Ok(())
}

fn leaves_vmsa_readable() -> Verdict {
    with_vcpu(|vmsa, _| {
        let page = oracle::page(vmsa);
        let mask = PageFlags::VALIDATED | PageFlags::VMSA;
        expect("RMP flags", page.flags & mask, mask)?;
        // Reading, as OVMF and Linux do (decision 006), and nothing else.
        expect("permissions", page.permissions, [0xF, 0x1, 0, 0])?;
        let features = memory::read(vmsa.get() + offset_of!(Vmsa, sev_features) as u64)?;
        expect(
            "SEV_FEATURES as read by the guest",
            features,
            SevFeatures::SNP_ACTIVE.0,
        )
    })
}

fn area_open() -> Verdict {
    with_vcpu(|_, area| {
        expect_guests(area)?;
        memory::fill(area.get() + 8, PAGE_SIZE - 64, 0x3434)?;
        memory::expect_filled(area.get() + 8, PAGE_SIZE - 64, 0x3434)
    })
}

/// The attack: a VMSA that says it ran last on this CPU goes on with the translations another
/// VMSA has left there, because VMRUN flushes only for a PCPU_ID of 0.
fn forgets_where_it_ran() -> Verdict {
    let (vmsa, area) = (accepted_page()?, accepted_page()?);
    let mut content = good_vmsa();
    (content.tlb_id, content.pcpu_id) = (1, 1);
    put_vmsa(vmsa, &content)?;
    expect(
        "CREATE_VCPU",
        create(vmsa.get(), area.get(), APIC_ID)?,
        ResultCode::SUCCESS,
    )?;
    let pcpu_id = memory::read(vmsa.get() + offset_of!(Vmsa, pcpu_id) as u64)?;
    expect("DELETE_VCPU", delete(vmsa.get())?, ResultCode::SUCCESS)?;
    expect("PCPU_ID", pcpu_id, 0)
}

fn again() -> Verdict {
    let (vmsa, area) = (vmsa_page()?, accepted_page()?);
    for _ in 0..3 {
        put_vmsa(vmsa, &good_vmsa())?;
        expect(
            "CREATE_VCPU",
            create(vmsa.get(), area.get(), APIC_ID)?,
            ResultCode::SUCCESS,
        )?;
        expect("DELETE_VCPU", delete(vmsa.get())?, ResultCode::SUCCESS)?;
        expect_guests(vmsa)?;
    }
    Ok(())
}

fn delete_stops() -> Verdict {
    let mut page = Gpa::new(0);
    with_vcpu(|vmsa, _| {
        page = vmsa;
        Ok(())
    })?;
    let efer = Efer(memory::read(page.get() + Vmsa::EFER_OFFSET as u64)?);
    expect(
        "EFER.SVME of the deleted VMSA",
        efer.contains(Efer::SVME),
        false,
    )
}

/// CREATE_VCPU that must fail and leave both pages as they are.
fn refused(vmsa: u64, area: u64, apic_id: u64, result: ResultCode) -> Verdict {
    let page = |address: u64| Gpa::new(address & !(PAGE_SIZE - 1));
    pages_unchanged(&[page(vmsa), page(area)], || {
        expect("CREATE_VCPU", create(vmsa, area, apic_id)?, result)
    })
}

fn vmsa_misaligned() -> Verdict {
    let (vmsa, area) = (vmsa_page()?, accepted_page()?);
    for offset in [1, 8, 0x800] {
        refused(vmsa.get() + offset, area.get(), APIC_ID, PARAMETER)?;
    }
    Ok(())
}

fn area_misaligned() -> Verdict {
    let (vmsa, area) = (vmsa_page()?, accepted_page()?);
    for offset in [1, 8, 0x800] {
        refused(vmsa.get(), area.get() + offset, APIC_ID, PARAMETER)?;
    }
    Ok(())
}

fn large_aligned() -> Verdict {
    let region = memory::fresh_region();
    done(&[validate(region, PageSize::Size4K)])?;
    put_vmsa(region, &good_vmsa())?;
    refused(region.get(), accepted_page()?.get(), APIC_ID, PARAMETER)
}

fn same_page() -> Verdict {
    let page = vmsa_page()?.get();
    refused(page, page, APIC_ID, ADDRESS)
}

fn vmsa_unaccepted() -> Verdict {
    let page = memory::fresh_page();
    refused(page.get(), accepted_page()?.get(), APIC_ID, ADDRESS)
}

fn area_unaccepted() -> Verdict {
    let vmsa = vmsa_page()?;
    refused(vmsa.get(), memory::fresh_page().get(), APIC_ID, ADDRESS)?;
    expect_guests(vmsa)
}

fn inside_paravisor() -> [u64; 2] {
    let (base, size) = paravisor();
    [base.get() + PAGE_SIZE, base.get() + size - PAGE_SIZE]
}

fn vmsa_in_paravisor() -> Verdict {
    let area = accepted_page()?;
    for page in inside_paravisor() {
        refused(page, area.get(), APIC_ID, ADDRESS)?;
    }
    Ok(())
}

fn area_in_paravisor() -> Verdict {
    let vmsa = vmsa_page()?;
    for page in inside_paravisor() {
        refused(vmsa.get(), page, APIC_ID, ADDRESS)?;
    }
    Ok(())
}

fn live_vmsa() -> Verdict {
    let area = accepted_page()?;
    with_vcpu(|vmsa, _| refused(vmsa.get(), area.get(), APIC_ID, ADDRESS))
}

fn live_area_as_vmsa() -> Verdict {
    let area = accepted_page()?;
    refused(svsm::calling_area().get(), area.get(), APIC_ID, ADDRESS)?;
    with_vcpu(|_, live| refused(live.get(), area.get(), APIC_ID, ADDRESS))
}

fn live_area() -> Verdict {
    let page = vmsa_page()?;
    refused(page.get(), svsm::calling_area().get(), APIC_ID, ADDRESS)?;
    with_vcpu(|vmsa, live| {
        // That of another processor; its own a processor may keep (decision 009).
        refused(page.get(), live.get(), 0, ADDRESS)?;
        refused(page.get(), vmsa.get(), APIC_ID, ADDRESS)
    })
}

fn no_memory() -> Verdict {
    let (vmsa, area) = (vmsa_page()?.get(), accepted_page()?.get());
    for bad in [
        NO_MEMORY.get() + PAGE_SIZE,
        1 << 45 | PAGE_SIZE,
        vmsa | 1 << 47,
        !0xFFF,
    ] {
        refused(bad, area, APIC_ID, ADDRESS)?;
        refused(vmsa, bad, APIC_ID, ADDRESS)?;
    }
    Ok(())
}

/// A page with a VMSA that `spoil` has made bad must be refused and stay the guest's.
fn refused_content(spoil: impl FnOnce(&mut Vmsa)) -> Verdict {
    let (page, area) = (accepted_page()?, accepted_page()?);
    let mut vmsa = good_vmsa();
    spoil(&mut vmsa);
    put_vmsa(page, &vmsa)?;
    refused(page.get(), area.get(), APIC_ID, PARAMETER)?;
    expect_guests(page)?;
    expect_guests(area)?;
    // And it can be written again: the content was at fault, not the page.
    put_vmsa(page, &good_vmsa())?;
    expect(
        "CREATE_VCPU",
        create(page.get(), area.get(), APIC_ID)?,
        ResultCode::SUCCESS,
    )?;
    expect("DELETE_VCPU", delete(page.get())?, ResultCode::SUCCESS)
}

/// The attack that CREATE_VCPU has to stop: a second VMPL0 of the guest's own making.
fn vmpl0() -> Verdict {
    refused_content(|vmsa| vmsa.vmpl = 0)
}

fn other_vmpls() -> Verdict {
    for vmpl in [2, 3, 4, 0xFF] {
        refused_content(|vmsa| vmsa.vmpl = vmpl)?;
    }
    Ok(())
}

fn no_svme() -> Verdict {
    refused_content(|vmsa| vmsa.efer.remove(Efer::SVME))
}

fn other_features() -> Verdict {
    let snp = SevFeatures::SNP_ACTIVE;
    refused_content(|vmsa| vmsa.sev_features = SevFeatures::empty())?;
    refused_content(|vmsa| vmsa.sev_features = snp | SevFeatures::VTOM)?;
    refused_content(|vmsa| vmsa.sev_features = snp | SevFeatures::VMSA_REGISTER_PROTECTION)?;
    refused_content(|vmsa| vmsa.sev_features = SevFeatures(snp.0 | 1 << 63))
}

fn unknown_apic_id() -> Verdict {
    let (vmsa, area) = (vmsa_page()?, accepted_page()?);
    for apic_id in [0x1000, 0xFFFF_FFFF] {
        refused(vmsa.get(), area.get(), apic_id, PARAMETER)?;
    }
    Ok(())
}

/// DELETE_VCPU that must fail and do nothing.
fn delete_refused(vmsa: u64, watched: Gpa) -> Verdict {
    unchanged(&[watched], || {
        expect("DELETE_VCPU", delete(vmsa)?, PARAMETER)
    })
}

fn delete_unknown() -> Verdict {
    let accepted = vmsa_page()?;
    delete_refused(accepted.get(), accepted)?;
    expect_guests(accepted)?;
    let area = svsm::calling_area();
    delete_refused(area.get(), area)?;
    let (base, _) = paravisor();
    delete_refused(base.get(), base)?;
    for address in [memory::fresh_page().get(), NO_MEMORY.get(), 1 << 45, !0xFFF] {
        delete_refused(address, accepted)?;
    }
    Ok(())
}

fn delete_misaligned() -> Verdict {
    with_vcpu(|vmsa, _| delete_refused(vmsa.get() + 8, vmsa))
}

/// The VMSA this program runs from, which only the machine can tell it.
fn own_vmsa() -> Result<Gpa, Finding> {
    let (base, size) = paravisor();
    (0..size / PAGE_SIZE)
        .map(|index| page_of(base, index))
        .find(|&gpa| oracle::page(gpa).flags.contains(PageFlags::VMSA))
        .ok_or_else(|| Finding::new(format_args!("no VMSA in the paravisor's range")))
}

fn delete_startup() -> Verdict {
    let vmsa = own_vmsa()?;
    delete_refused(vmsa.get(), vmsa)
}

fn delete_twice() -> Verdict {
    let (vmsa, area) = (vmsa_page()?, accepted_page()?);
    expect(
        "CREATE_VCPU",
        create(vmsa.get(), area.get(), APIC_ID)?,
        ResultCode::SUCCESS,
    )?;
    expect("DELETE_VCPU", delete(vmsa.get())?, ResultCode::SUCCESS)?;
    delete_refused(vmsa.get(), vmsa)
}
