//! The start-up of the boot processor, in order.
//!
//! ```text
//! own exceptions -> launch parameters -> what the processor says -> what the host says
//!   -> log -> own memory -> the map -> the guest's memory and firmware -> the guest runs
//! ```
//!
//! Each step relies on those before it and on nothing else. A step that fails ends the machine
//! with its reason. Memory is validated in two places only: the rest of the region and the
//! carve-out; both have never been validated, and "already valid" there is a lie of the host.
#![expect(
    unsafe_code,
    reason = "turns launch pages into references, makes the pools"
)]

use accept::{
    Backend, Engine, Frame, GivenBack, Map, PageState, Range, Region, RegionLock, RegionLocks,
};
use log::info;
use protocols::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE, PageSize};
use protocols::cpuid::CpuidPage;
use protocols::ghcb::HypervisorFeatures;
use protocols::ghcb::msr::CpuidRegister;
use protocols::ghcb::psc;
use protocols::igvm_map::MemoryMapEntry;
use protocols::launch::{
    AcceptPolicy, GENERAL_VP_COUNT_OFFSET, LaunchParams, MEMORY_MAP_SIZE, PlatformKind,
};
use protocols::map::{MapDescriptor, MapRange};
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
use crate::host_map::HostMap;
use crate::hypervisor::ghcb::{self, Ghcb};
use crate::hypervisor::{Hypervisor, Start, VcpuRequest, msr};
use crate::launch::Launch;
use crate::memory::layout::{GUEST_WINDOW, MAX_VCPUS, OWN_WINDOW, PageRange};
use crate::memory::page_tables::{self, Owner};
use crate::memory::plan::{CarveOut, Plan, regions_before, regions_touched};
use crate::memory::pool::Pool;
use crate::platform::snp::{self, Snp};
use crate::platform::{MappedBlock, Platform, ValidateError};
use crate::secondary::{self, vmsa_page};
use crate::system::{self, GuestRegistry, System};
use crate::terminate::terminate;
use crate::vcpus::{RECORDS_PER_VCPU, Record, Registry, Shown, Tables, Vcpu};
use crate::{apic_ids, attestation, console, descriptor, exceptions, native, percpu, requests};

/// Bytes of the carve-out for each processor: its context, and its share of tables, generously.
const BYTES_PER_VCPU: u64 = secondary::BYTES_PER_PROCESSOR + 1024;
/// Bytes of the carve-out for the line to the security processor.
const BYTES_OF_LINE: usize =
    attestation::CERTIFICATE_BYTES + size_of::<Line<SharedPages>>() + PAGE_SIZE as usize;
/// How often the boot processor looks whether the others have ended their last step.
const LOOKS_AT_OTHERS: u32 = 1 << 16;
/// CPUID leaf whose EDX is the x2APIC id of the processor that executes it.
const X2APIC_ID_LEAF: u32 = 0xB;

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

/// Bytes of all memory that has a state.
pub(crate) fn memory_with_state(plan: &Plan) -> u64 {
    plan.ranges().iter().map(|range| range.bytes()).sum()
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

/// Has the host make memory private that will be accepted ahead of the guest: all regions in which
/// nothing is accepted yet. Once, before there is a guest: later, the guest may have made a page of
/// a region shared in the meantime. A guest that asks the host for the same again changes nothing.
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

/// Reads the host's number of processors, once.
pub(crate) fn check_vp_count(params: &LaunchParams) -> Result<usize, TurnstileReason> {
    let address = params.general_gpa + GENERAL_VP_COUNT_OFFSET as u64;
    // SAFETY: inside the general parameter page of the launch.
    let count = unsafe { (address as *const u32).read_volatile() } as usize;
    if (1..=MAX_VCPUS).contains(&count) {
        Ok(count)
    } else {
        Err(TurnstileReason::VP_COUNT)
    }
}

/// The pages at the end of the region that are shared and not validated: a GHCB per processor,
/// those for guest messages, and one for the list of APIC ids.
fn shared_pages(launch: &Launch<'_>, vp_count: usize) -> Result<PageRange, TurnstileReason> {
    let end = launch.region().end_frame();
    let count = vp_count as u64 + attestation::shared::PAGES + 1;
    PageRange::try_from_frames(end - count, end)
        .filter(|pages| launch.unlaunched().contains(*pages))
        .ok_or(TurnstileReason::LAUNCH_PARAMS)
}

/// The last of [`shared_pages`].
fn list_page(shared: PageRange) -> Result<Gpa, TurnstileReason> {
    shared.frames().next_back().ok_or(TurnstileReason::INTERNAL)
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

/// Asks the host for the APIC ids, and checks them.
fn read_apic_ids(
    host: &impl Hypervisor,
    list: Gpa,
    vp_count: usize,
    pool: &mut Pool,
) -> Result<&'static [u32], TurnstileReason> {
    const { assert!((1 + MAX_VCPUS) * size_of::<u32>() <= PAGE_SIZE as usize) };
    // SAFETY: the page is the one of the region that is set aside for the list.
    unsafe { ghcb::share(list) }?;
    host.list_apic_ids(list)?;
    // Read once each: the host may change them at any time.
    // SAFETY: inside the page, which is mapped; any bytes are a number.
    let word = |index: usize| unsafe { (list.get() as *const u32).add(index).read_volatile() };
    let claimed = word(0);
    let (_, ids) = pool.slice(vp_count, |index| word(1 + index))?;
    let own = msr::cpuid(X2APIC_ID_LEAF, CpuidRegister::Edx)?;
    apic_ids::check(ids, claimed, own)?;
    Ok(ids)
}

/// Checks the host's memory map.
pub(crate) fn read_host_map(launch: &Launch<'_>) -> Result<HostMap, TurnstileReason> {
    let count = MEMORY_MAP_SIZE as usize / size_of::<MemoryMapEntry>();
    let first = launch.params().memory_map_gpa as *const MemoryMapEntry;
    // SAFETY: the area is in the launched part of the region, private, and any bytes are
    // entries.
    let entries = (0..count).map(|index| unsafe { first.add(index).read_volatile() });
    // The windows end there, too.
    let limit = Gpa::new(1 << launch.c_bit().map_or(46, |bit| bit.min(46)));
    let host_map = HostMap::check(entries, limit, launch.region())?;
    for memory in host_map.memory() {
        info!("memory {memory}");
    }
    Ok(host_map)
}

/// Validates and zeros the part of the region that was not launched, but for the GHCBs.
fn validate_region(
    platform: &Snp,
    launch: &Launch<'_>,
    ghcbs: PageRange,
) -> Result<Pool, TurnstileReason> {
    let (pages, _) = launch.unlaunched().without(ghcbs);
    for page in pages.frames() {
        validate_own(platform, page.get(), PageSize::Size4K)?;
    }
    // SAFETY: the image maps the whole region one to one, writable where it is not launched;
    // the pages were validated and zeroed just now, and nobody else gets them.
    Ok(unsafe { Pool::new(pages, 0) })
}

/// Maps, validates and zeros the carve-out.
fn validate_carve_out(
    platform: &Snp,
    plan: &Plan,
    tables: &mut Pool,
) -> Result<Pool, TurnstileReason> {
    let pages = plan.carve_out;
    page_tables::map_large(OWN_WINDOW, pages, Owner::Paravisor, tables)?;
    for gpa in (pages.start().get()..pages.end().get()).step_by(LARGE_PAGE_SIZE as usize) {
        validate_own(platform, OWN_WINDOW + gpa, PageSize::Size2M)?;
    }
    // SAFETY: mapped, validated and zeroed just now; the plan gives it to nobody else.
    Ok(unsafe { Pool::new(pages, OWN_WINDOW) })
}

/// Validates and zeros memory of ours that was never validated; 2 MiB fall back to 4 KiB.
fn validate_own(platform: &Snp, address: u64, size: PageSize) -> Result<(), TurnstileReason> {
    let block = MappedBlock::try_new(address, size).ok_or(TurnstileReason::INTERNAL)?;
    match platform.validate(block) {
        Ok(()) => platform
            .scrub(block)
            .map_err(|_| TurnstileReason::NOT_VALIDATED),
        Err(ValidateError::NoChange) => Err(TurnstileReason::ALREADY_VALID),
        Err(ValidateError::SizeMismatch) if size == PageSize::Size2M => (address
            ..address + size.bytes())
            .step_by(PAGE_SIZE as usize)
            .try_for_each(|page| validate_own(platform, page, PageSize::Size4K)),
        Err(_) => Err(TurnstileReason::PVALIDATE),
    }
}

/// Builds the guest window: all memory with a state, except what is the paravisor's.
pub(crate) fn map_guest_memory(
    plan: &Plan,
    launch: &Launch<'_>,
    pool: &mut Pool,
) -> Result<(), TurnstileReason> {
    for (outer, _) in plan.groups() {
        let (below, rest) = outer.without(launch.region());
        for piece in [below, rest] {
            let (lower, upper) = piece.without(plan.carve_out);
            page_tables::map_large(GUEST_WINDOW, lower, Owner::Guest, pool)?;
            page_tables::map_large(GUEST_WINDOW, upper, Owner::Guest, pool)?;
        }
    }
    Ok(())
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

/// Makes the engine and records what is known before the guest exists.
pub(crate) fn make_engine<B: Backend>(
    backend: B,
    launch: &Launch<'_>,
    plan: &Plan,
    locks: usize,
    pool: &mut Pool,
) -> Result<Engine<'static, B>, TurnstileReason> {
    let mut made = [None; MapDescriptor::MAX_RANGES];
    let mut slots = made.iter_mut();
    for (outer, group) in plan.groups() {
        let (_, regions) = pool.slice(regions_touched(outer) as usize, |_| Region::new())?;
        let regions: &'static [Region] = regions;
        for (pages, slot) in group.iter().zip(slots.by_ref()) {
            // Ranges that share a region share its record: their pages in it are different
            // ones, and its lock is the same.
            let start = regions_before(outer, *pages) as usize;
            let own = regions.get(start..start + regions_touched(*pages) as usize);
            let first = Frame::containing(pages.start().get());
            let range = Range::try_new(first, pages.pages(), own.unwrap_or_default())
                .map_err(|_| TurnstileReason::INTERNAL)?;
            let needed = GivenBack::needed(range.regions().len());
            let (_, flags) = pool.slice(needed, |_| GivenBack::new())?;
            let range = range.with_given_back(flags);
            *slot = Some(range.map_err(|_| TurnstileReason::INTERNAL)?);
        }
    }
    let first = made
        .first()
        .copied()
        .flatten()
        .ok_or(TurnstileReason::MAP_EMPTY)?;
    let (_, ranges) = pool.slice(plan.ranges().len(), |index| {
        made.get(index).copied().flatten().unwrap_or(first)
    })?;
    let map = Map::try_new(ranges).map_err(|_| TurnstileReason::INTERNAL)?;
    let (_, locks) = pool.slice(locks, |_| RegionLock::new())?;
    let locks = RegionLocks::try_new(locks).map_err(|_| TurnstileReason::INTERNAL)?;
    let engine = Engine::new(backend, map, locks);

    let (region, _) = launch.region().without(plan.ghcbs);
    for owned in [region, plan.carve_out] {
        engine
            .record_launch(
                Frame::containing(owned.start().get()),
                owned.pages(),
                PageState::Owned,
            )
            .map_err(|_| TurnstileReason::INTERNAL)?;
    }
    Ok(engine)
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

/// Shows the map to the referee, with what `complete` adds to it. The descriptor is a page, and it lies
/// on the stack: once.
#[inline(never)]
pub(crate) fn publish_map<B: Backend>(
    engine: &Engine<'_, B>,
    plan: &Plan,
    complete: impl FnOnce(&mut MapDescriptor),
) -> Result<(), TurnstileReason> {
    let mut shown = MapDescriptor::new();
    let ranges = engine.map().ranges();
    let mut ranges = ranges.iter();
    for (outer, group) in plan.groups() {
        let first = ranges.next().ok_or(TurnstileReason::INTERNAL)?;
        ranges.by_ref().take(group.len() - 1).for_each(drop);
        let range = MapRange {
            gpa: outer.start().get(),
            pages: outer.pages(),
            states_gpa: first.regions().as_ptr() as u64 - OWN_WINDOW,
        };
        if !shown.push_range(range) {
            return Err(TurnstileReason::MAP_TOO_MANY);
        }
    }
    shown.guest_vmpl = GUEST_VMPL.number().into();
    complete(&mut shown);
    descriptor::publish(shown);
    Ok(())
}
