//! The start-up of the boot processor, in order.
//!
//! ```text
//! own exceptions -> launch parameters -> what the processor says -> what the host says
//!   -> log -> own memory -> the map -> the guest's memory and firmware -> the guest runs
//! ```
//!
//! Each step relies on those before it and on nothing else. A step that fails ends the machine
//! with its reason.
//!
//! | module | owns |
//! |---|---|
//! | [`host`] | what the host says, checked |
//! | [`own_memory`] | the rest of the region and the carve-out, validated |
//! | [`map`] | the map of the guest's memory and the engine, on all platforms |
#![expect(unsafe_code, reason = "turns launch pages into references")]

pub(crate) mod host;
pub(crate) mod map;
mod own_memory;

use accept::{Frame, RegionLock, RegionLocks};
use log::info;
use protocols::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE};
use protocols::cpuid::CpuidPage;
use protocols::ghcb::HypervisorFeatures;
use protocols::ghcb::psc;
use protocols::launch::{AcceptPolicy, LaunchParams, PlatformKind};
use protocols::secrets::SecretsPage;
use protocols::terminate::TurnstileReason;
use protocols::vmsa::{SevFeatures, SevStatus};
use x86_64::registers::control::{Cr0, Cr0Flags, Cr4, Cr4Flags};
use zeroize::Zeroize;

use crate::ahead::{Ahead, HostLied};
use crate::attestation::Line;
use crate::attestation::shared::SharedPages;
use crate::backend::WindowBackend;
use crate::cpuid::CpuidTable;
use crate::entry::boot_stack_guard;
use crate::guest::GUEST_VMPL;
use crate::guest::parameters::guest_memory_map;
use crate::guest::prepare::{GUEST_SEV_FEATURES, Preparation};
use crate::guest::vmsa::VmsaWindow;
use crate::hypervisor::ghcb::Ghcb;
use crate::hypervisor::{Hypervisor, Start, VcpuRequest, msr};
use crate::launch::Launch;
use crate::memory::layout::PageRange;
use crate::memory::page_tables;
use crate::memory::plan::{CarveOut, Plan};
use crate::memory::pool::Pool;
use crate::platform::snp::{self, Snp};
use crate::secondary::{self, vmsa_page};
use crate::system::{self, GuestRegistry, System};
use crate::terminate::terminate;
use crate::vcpus::{RECORDS_PER_VCPU, Record, Registry, Shown, Tables, Vcpu};
use crate::{attestation, console, exceptions, native, percpu, requests};

use host::{check_vp_count, read_apic_ids, read_host_map};
use map::{make_engine, map_guest_memory, memory_with_state, publish_map};
use own_memory::{list_page, shared_pages, validate_carve_out, validate_region};

/// Bytes of the carve-out for each processor: its context, and its share of tables, generously.
const BYTES_PER_VCPU: u64 = secondary::BYTES_PER_PROCESSOR + 1024;
/// Bytes of the carve-out for the line to the security processor.
const BYTES_OF_LINE: usize =
    attestation::CERTIFICATE_BYTES + size_of::<Line<SharedPages>>() + PAGE_SIZE as usize;
/// How often the boot processor looks whether the others have ended their last step.
const LOOKS_AT_OTHERS: u32 = 1 << 16;

/// Where the entry point continues.
///
/// The reference is what the image's launch context passes: a page that is measured, mapped,
/// never written, and there for ever; any bytes are parameters.
pub extern "C" fn boot_processor(params: &'static LaunchParams) -> ! {
    if params.platform == PlatformKind::NATIVE {
        native::boot_processor(params);
    }
    percpu::install_boot();
    exceptions::load();
    console::open();
    match start(params) {
        Ok((system, ghcb)) => requests::serve_from_start(system, 0, ghcb),
        Err(reason) => terminate(reason),
    }
}

/// All steps of the start-up.
fn start(
    params: &'static LaunchParams,
) -> Result<(&'static System, &'static Ghcb), TurnstileReason> {
    let launch = Launch::check(params)?;
    let cpuid: &CpuidPage = launch_page(params.cpuid_gpa);
    let platform = check_processor(params, cpuid)?;
    harden_processor();
    page_tables::init(
        Gpa::new(params.page_table_root),
        launch.region(),
        launch.c_bit(),
    );
    page_tables::unmap(Gpa::new(boot_stack_guard()))?;

    msr::negotiate_version()?;
    let features = msr::negotiate_features()?;
    let vp_count = check_vp_count(params)?;
    let ghcbs = shared_pages(&launch, vp_count)?;
    // SAFETY: the pages at the end of the region were not launched, nothing validates them, and
    // the first is the boot processor's.
    let ghcb = unsafe { Ghcb::establish(ghcbs.start()) }?;
    let ghcb = percpu::current()
        .ok_or(TurnstileReason::INTERNAL)?
        .set_ghcb(ghcb);
    info!(
        "Turnstile {} at VMPL0, {vp_count} vCPU(s)",
        env!("CARGO_PKG_VERSION")
    );

    let host_map = read_host_map(&launch)?;
    let mut region_pool = validate_region(&platform, &launch, ghcbs)?;
    let locks = RegionLocks::count_for(vp_count);
    let others = locks * size_of::<RegionLock>()
        + vp_count * BYTES_PER_VCPU as usize
        + BYTES_OF_LINE
        + secondary::bytes_of_tables(vp_count) as usize;
    let place = match launch.params().igvm_parameter_gpa {
        0 => CarveOut::WithRegion,
        _ => CarveOut::Highest,
    };
    let plan = Plan::make(
        &host_map,
        launch.region(),
        ghcbs,
        launch.firmware(),
        others as u64,
        place,
    )?;
    let mut pool = validate_carve_out(&platform, &plan, &mut region_pool)?;
    map_guest_memory(&plan, &launch, &mut pool)?;

    let vmsas = VmsaWindow {
        region: launch.region(),
        platform,
        #[cfg(feature = "faults")]
        fault: params.fault,
    };
    let apic_ids = if features.contains(HypervisorFeatures::APIC_ID_LIST) {
        read_apic_ids(ghcb, list_page(ghcbs)?, vp_count, &mut pool)?
    } else {
        // QEMU and KVM number processors from 0 as long as the topology has no gaps.
        pool.slice(vp_count, |index| index as u32)?.1
    };
    let vcpus = make_vcpus(apic_ids, vmsas, &mut pool)?;
    let backend = WindowBackend::new(platform, vcpus.registry);
    let backend = system::backend(backend, params.fault);
    let engine = make_engine(backend, &launch, &plan, locks, &mut pool)?;
    let line = open_line(ghcbs, &mut pool)?;
    let system = system::publish(System {
        line,
        ahead: Ahead::new(launch.acceptance(), memory_with_state(&plan)),
        engine,
        registry: vcpus.registry,
        vmsas,
        ghcbs,
        fault: params.fault,
    });

    let preparation = Preparation {
        launch: &launch,
        plan: &plan,
        platform: &platform,
        engine: &system.engine,
    };
    preparation.grant_firmware()?;
    // SAFETY: nobody else has a reference to the page, and this is made once.
    let secrets: &mut SecretsPage = unsafe { own_launch_page(params.secrets_gpa) };
    let [own_key, ..] = &mut secrets.vmpck;
    line.take_key(own_key);
    let calling_area = preparation.fill_areas(secrets, cpuid)?;
    preparation.hand_over_data()?;
    // The guest has its copies now, and nobody here needs the others.
    secrets.vmpck.zeroize();
    let guest_map = guest_memory_map(&host_map, [launch.region(), plan.carve_out])?;
    preparation.fill_parameters(guest_map, vp_count as u32)?;

    let vmsa = vmsa_page(
        &platform,
        &preparation.reset_state(),
        GUEST_VMPL,
        &mut region_pool,
    )?;
    system
        .registry
        .record_startup(Frame::containing(vmsa.get()), calling_area);
    ghcb.create_vcpu(VcpuRequest {
        apic_id: system
            .registry
            .apic_id(0)
            .ok_or(TurnstileReason::INTERNAL)?,
        vmpl: GUEST_VMPL,
        vmsa,
        sev_features: GUEST_SEV_FEATURES.bits(),
        start: Start::Later,
    })?;
    let (_, contexts) = pool.slice(vp_count, |_| Gpa::new(0))?;
    for (index, context) in contexts.iter_mut().enumerate().skip(1) {
        *context = secondary::make(&platform, index, &mut pool)?;
    }
    publish_descriptor(system, &plan, vcpus.table)?;
    #[cfg(feature = "faults")]
    system
        .engine
        .backend()
        .prepare_control(&system.engine.map(), |frame| system.engine.state(frame))
        .map_err(|_| TurnstileReason::PVALIDATE)?;
    info!(
        "memory of ours: region {}, carve-out {}",
        launch.region(),
        plan.carve_out
    );
    accept_ahead(system, ghcb, contexts)?;
    info!("starting the firmware at {GUEST_VMPL}");
    console::quiet();
    Ok((system, ghcb))
}

/// Tells the host about the other processors, and starts what the policy accepts before the guest
/// asks. Everything that they share is made.
fn accept_ahead(
    system: &'static System,
    ghcb: &Ghcb,
    contexts: &[Gpa],
) -> Result<(), TurnstileReason> {
    let acceptance = system.ahead.acceptance();
    let start = if acceptance.is_lazy() {
        Start::Later
    } else {
        make_private(system, ghcb)?;
        Start::Now
    };
    for (index, vmsa) in contexts.iter().enumerate().skip(1) {
        secondary::announce(system, ghcb, index, *vmsa, start)?;
    }
    if acceptance.policy == AcceptPolicy::EAGER {
        info!("accepting memory before the guest starts");
        while system
            .ahead
            .step(&system.engine)
            .map_err(|HostLied| TurnstileReason::ALREADY_VALID)?
        {}
        // The last steps of the others. A processor that the host has stopped is not waited for:
        // it holds the lock of its region, so nobody gets at that before it is done.
        for _ in 0..LOOKS_AT_OTHERS {
            if system.ahead.is_idle() {
                break;
            }
            msr::give_way()?;
        }
    }
    Ok(())
}

/// Has the host make memory private that may be accepted ahead of the guest: all regions in which
/// nothing is accepted yet, whatever the budget. Which of them that will be spent on is not known: the walk
/// passes over what the guest has asked for first and what another processor holds, and read-ahead goes
/// where the guest does. Once, before there is a guest: later, the guest may have made a page of a region
/// shared in the meantime. A guest that asks the host for the same again changes nothing.
fn make_private(system: &System, host: &impl Hypervisor) -> Result<(), TurnstileReason> {
    let mut batch = [Gpa::new(0); psc::MAX_ENTRIES];
    let mut filled = 0;
    for region in system.engine.regions_of_walk(system.ahead.order()) {
        let number = region.gpa() / LARGE_PAGE_SIZE;
        if system.engine.census(number..number + 1).unaccepted < LARGE_PAGE_SIZE {
            continue;
        }
        if let Some(slot) = batch.get_mut(filled) {
            *slot = Gpa::new(region.gpa());
            filled += 1;
        }
        if filled == batch.len() {
            host.make_private(&batch)?;
            filled = 0;
        }
    }
    host.make_private(batch.get(..filled).unwrap_or_default())
}

/// A page of the launch as a value that is written to.
///
/// # Safety
///
/// As long as the reference is used there is no other to the page.
unsafe fn own_launch_page<T: zerocopy::FromBytes + zerocopy::IntoBytes>(
    gpa: u64,
) -> &'static mut T {
    const { assert!(size_of::<T>() == PAGE_SIZE as usize) };
    // SAFETY: as in `launch_page`; the image maps the page writable, any bytes are a value of T and any value
    // of T is bytes, and nobody else has a reference by the caller's promise.
    unsafe { &mut *(gpa as *mut T) }
}

/// A page of the launch as a value that lives for ever.
fn launch_page<T: zerocopy::FromBytes>(gpa: u64) -> &'static T {
    const { assert!(size_of::<T>() == PAGE_SIZE as usize) };
    // SAFETY: callers pass addresses from checked launch parameters: page aligned, inside the
    // launched part of the region, private, mapped, and written by nobody any more. Any bytes
    // are a value of T.
    unsafe { &*(gpa as *const T) }
}

/// Checks SEV_STATUS, the CPUID page and the C-bit; from here on CPUID works.
fn check_processor(
    params: &LaunchParams,
    cpuid: &'static CpuidPage,
) -> Result<Snp, TurnstileReason> {
    if snp::sev_status() != SevStatus::of(SevFeatures::SNP_ACTIVE) {
        return Err(TurnstileReason::SEV_STATUS);
    }
    let table = CpuidTable::check(cpuid)?;
    if table.c_bit() != params.c_bit {
        return Err(TurnstileReason::C_BIT);
    }
    exceptions::set_cpuid_table(table);
    Ok(Snp {
        cache_coherent: table.is_cache_coherent(),
    })
}

/// Turns on what keeps mistakes of ours from becoming holes, and the instructions that large pages are
/// scrubbed with.
pub(crate) fn harden_processor() {
    // SAFETY: the launch tables map text read-only and everything of ours as supervisor pages,
    // so none of these makes running code fault.
    unsafe {
        Cr0::update(|flags| flags.insert(Cr0Flags::WRITE_PROTECT));
        Cr4::update(|flags| {
            flags.insert(
                Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION
                    | Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION
                    | Cr4Flags::OSFXSR,
            );
        });
    }
}

/// Opens the line to the security processor, on the pages of [`shared_pages`] before the last.
fn open_line(
    shared: PageRange,
    pool: &mut Pool,
) -> Result<&'static Line<SharedPages>, TurnstileReason> {
    let end = shared.end_frame() - 1;
    let pages = PageRange::try_from_frames(end - attestation::shared::PAGES, end)
        .ok_or(TurnstileReason::INTERNAL)?;
    // SAFETY: the pages are those of the region that are set aside for messages; nobody validates them.
    let carrier = unsafe { SharedPages::establish(pages) }?;
    let (_, certificates) = pool.slice(attestation::CERTIFICATE_BYTES, |_| 0)?;
    pool.leak(Line::new(carrier, certificates))
}

/// The registry and where its public table is.
struct MadeVcpus {
    registry: &'static GuestRegistry,
    table: Gpa,
}

fn make_vcpus(
    apic_ids: &[u32],
    vmsas: VmsaWindow,
    pool: &mut Pool,
) -> Result<MadeVcpus, TurnstileReason> {
    let vp_count = apic_ids.len();
    let (_, vcpus) = pool.slice(vp_count, |index| {
        Vcpu::new(apic_ids.get(index).copied().unwrap_or_default())
    })?;
    let (_, slots) = pool.slice(vp_count * RECORDS_PER_VCPU, |_| Record::none())?;
    let (table, shown) = pool.slice(vp_count * RECORDS_PER_VCPU, |_| Shown::none())?;
    let registry = Registry::new(
        Tables {
            vcpus,
            slots,
            shown,
        },
        vmsas,
        GUEST_SEV_FEATURES,
    );
    Ok(MadeVcpus {
        registry: pool.leak(registry)?,
        table,
    })
}

/// Shows map and registry to the referee.
fn publish_descriptor(
    system: &System,
    plan: &Plan,
    vcpu_table: Gpa,
) -> Result<(), TurnstileReason> {
    publish_map(&system.engine, plan, |shown| {
        shown.vcpu_count = system.registry.shown_count() as u32;
        shown.vcpu_table_gpa = vcpu_table.get();
    })
}
