//! The start-up of a trust domain's processors, in order.
//!
//! Each step relies on those before it. A step that fails ends the machine with its reason. Memory is
//! accepted in two places only: the rest of the region and the carve-out; both have never been
//! accepted, and "already accepted" there is a lie of the host.
#![expect(
    unsafe_code,
    reason = "turns launch pages into references, makes the pools"
)]

use accept::{
    Backend, Block, Engine, Error, Frame, NotFlushed, OnNoChange, PageState, RegionLock,
    RegionLocks, ValidateFault,
};
use log::info;
use protocols::addr::{Gpa, PAGE_SIZE};
use protocols::launch::{AcceptPolicy, LaunchParams, ResetPage};
use protocols::tdvf::SectionKind;
use protocols::tdx::metadata::FieldId;
use protocols::tdx::{TdAttributes, shared_bit};
use protocols::terminate::TurnstileReason;

use super::apic::Ipi;
use super::entry::{self, Start};
use super::hob;
use super::l2::GuestTd;
use super::l2::interrupts::VirtualApic;
use super::run::{self, System, VcpuPages};
use super::runners::{Others, Runner};
use crate::ahead::Ahead;
use crate::boot::harden_processor;
use crate::boot::host::read_host_map;
use crate::boot::map::{make_engine, map_guest_memory, memory_with_state, publish_map};
use crate::entry::boot_stack_guard;
use crate::host_map::HostMap;
use crate::hypervisor::tdx;
use crate::launch::Launch;
use crate::memory::guest_map;
use crate::memory::layout::{MAX_VCPUS, OWN_WINDOW, PageRange};
use crate::memory::page_tables::{self, Owner};
use crate::memory::plan::{CarveOut, Plan};
use crate::memory::pool::Pool;
use crate::percpu::PerCpu;
use crate::platform::tdx::module::{self, Info, Module};
use crate::platform::tdx::{FlushOthers, TdxBackend};
use crate::terminate::terminate;
use crate::{console, exceptions, percpu, secondary};

/// Bits of guest-physical addresses: the page tables' and the map's, and the smaller of the two that
/// there are.
const GPA_WIDTH: u32 = 48;
/// Bytes of the carve-out for each processor, generously.
const BYTES_PER_VCPU: u64 = secondary::BYTES_PER_PROCESSOR + 3 * PAGE_SIZE;

/// Where processor 0 goes on. The reference is what the measured reset page says: launch parameters.
pub extern "C" fn boot_processor(params: &'static LaunchParams) -> ! {
    tdx::arrive();
    console::open();
    percpu::install_boot();
    exceptions::load();
    match start(params) {
        Ok(system) => run::run(system, 0),
        Err(reason) => terminate(reason),
    }
}

/// Where another processor goes on, on its own stack with its own block.
pub extern "C" fn other_processor(percpu: &'static PerCpu) -> ! {
    percpu.install();
    exceptions::load();
    harden_processor();
    match run::get() {
        Some(system) => run::run(system, percpu.index()),
        None => terminate(TurnstileReason::INTERNAL),
    }
}

/// All steps of the start-up.
fn start(params: &'static LaunchParams) -> Result<&'static System, TurnstileReason> {
    let launch = Launch::check(params)?;
    let domain = check_module()?;
    let vcpus = domain.vcpus as usize;
    harden_processor();
    page_tables::init(
        Gpa::new(params.page_table_root),
        launch.region(),
        launch.c_bit(),
    );
    page_tables::unmap(Gpa::new(boot_stack_guard()))?;
    info!(
        "Turnstile {} as L1 of a trust domain, {vcpus} vCPU(s)",
        env!("CARGO_PKG_VERSION")
    );

    let host_map = read_host_map(&launch)?;
    let mut region_pool = accept_region(&launch)?;
    let locks = RegionLocks::count_for(vcpus);
    let others = locks * size_of::<RegionLock>()
        + vcpus * BYTES_PER_VCPU as usize
        + secondary::bytes_of_tables(vcpus) as usize;
    let plan = Plan::make(
        &host_map,
        launch.region(),
        // No page of ours is shared with the host.
        PageRange::EMPTY,
        launch.firmware(),
        others as u64,
        CarveOut::Highest,
    )?;
    let mut pool = accept_carve_out(&plan, &mut region_pool)?;
    map_guest_memory(&plan, &launch, &mut pool)?;

    let (_, runners) = pool.slice(vcpus, |_| Runner::new())?;
    let runners: &'static [Runner] = runners;
    let others = Others {
        runners,
        sender: Ipi,
    };
    let backend = TdxBackend::new(Module, others);
    let engine = make_engine(backend, &launch, &plan, locks, &mut pool)?;

    replace_reset_page(&launch, vcpus)?;
    grant_firmware(&launch, &engine)?;
    let hob = prepare_areas(&launch, &plan, &host_map, &engine)?;
    let pages = make_pages(vcpus, &mut pool)?;
    let starts = make_starts(vcpus, &mut pool)?;
    let system = run::publish(System {
        engine,
        ahead: Ahead::new(launch.acceptance(), memory_with_state(&plan)),
        td: GuestTd::new(TdAttributes::from_bits_retain(domain.attributes)),
        touch: launch.acceptance().touch,
        runners,
        pages,
        hob,
    });
    // The guest's VM 1 has the place of VMPL1; there are no VMSAs.
    publish_map(&system.engine, &plan, |_| {})?;
    info!(
        "memory of ours: region {}, carve-out {}",
        launch.region(),
        plan.carve_out
    );
    if launch.acceptance().policy == AcceptPolicy::EAGER {
        info!("accepting memory before the guest starts");
    }
    info!("starting the firmware in an L2 VM");
    console::quiet();
    entry::release(starts);
    Ok(system)
}

/// What the module works on for each processor.
fn make_pages(vcpus: usize, pool: &mut Pool) -> Result<&'static [VcpuPages], TurnstileReason> {
    let shared = pool.bytes(PAGE_SIZE * vcpus as u64)?;
    let address = pool.address(shared);
    let (first_apic, apics) = pool.slice(vcpus, |_| VirtualApic::new())?;
    let apics: &'static [VirtualApic] = apics;
    let first = apics.first().ok_or(TurnstileReason::INTERNAL)?;
    let (_, pages) = pool.slice(vcpus, |index| {
        let offset = PAGE_SIZE * index as u64;
        VcpuPages {
            shared: Gpa::new(shared.get() + offset),
            address: address + offset,
            apic: apics.get(index).unwrap_or(first),
            virtual_apic: Gpa::new(first_apic.get() + offset),
        }
    })?;
    Ok(pages)
}

/// A stack and a block for each of the other processors.
fn make_starts(vcpus: usize, pool: &mut Pool) -> Result<&'static [Start], TurnstileReason> {
    // The first is nobody's: its processor is here.
    let nobody = Start {
        stack_top: 0,
        percpu: percpu::current().ok_or(TurnstileReason::INTERNAL)?,
    };
    let (_, starts) = pool.slice(vcpus, |_| nobody)?;
    for (index, start) in starts.iter_mut().enumerate().skip(1) {
        *start = Start {
            stack_top: secondary::map_stack(index, pool)?,
            percpu: pool.leak(PerCpu::new(index))?,
        };
    }
    Ok(starts)
}

/// No other processor runs the guest.
struct Nobody;

impl FlushOthers for Nobody {
    fn flush_others(&self) -> Result<(), NotFlushed> {
        Ok(())
    }
}

/// Asks the module what this trust domain is.
fn check_module() -> Result<Info, TurnstileReason> {
    let info = module::info().map_err(|_| TurnstileReason::TD_INFO)?;
    if info.gpa_width != GPA_WIDTH || info.index != 0 {
        return Err(TurnstileReason::TD_INFO);
    }
    tdx::set_shared_bit(shared_bit(GPA_WIDTH));
    if !(1..=MAX_VCPUS).contains(&(info.vcpus as usize)) {
        return Err(TurnstileReason::TD_INFO);
    }
    match module::read_vm(FieldId::NUM_L2_VMS) {
        Ok(1..) => Ok(info),
        _ => Err(TurnstileReason::TD_PARTITIONING),
    }
}

/// Accepts the part of the region that was not launched. The module zeroes what it accepts.
fn accept_region(launch: &Launch<'_>) -> Result<Pool, TurnstileReason> {
    let pages = launch.unlaunched();
    pages.blocks().try_for_each(accept_own)?;
    // SAFETY: the image maps the whole region one to one, writable where it is not launched; the
    // pages were accepted, and with that zeroed, just now, and nobody else gets them.
    Ok(unsafe { Pool::new(pages, 0) })
}

/// Accepts and maps the carve-out.
fn accept_carve_out(plan: &Plan, tables: &mut Pool) -> Result<Pool, TurnstileReason> {
    let pages = plan.carve_out;
    page_tables::map_large(OWN_WINDOW, pages, Owner::Paravisor, tables)?;
    pages.blocks().try_for_each(accept_own)?;
    // SAFETY: mapped, accepted and with that zeroed just now; the plan gives it to nobody else.
    Ok(unsafe { Pool::new(pages, OWN_WINDOW) })
}

/// Accepts memory of ours that was never accepted; 2 MiB fall back to 4 KiB.
fn accept_own(block: Block) -> Result<(), TurnstileReason> {
    let module = TdxBackend::new(Module, Nobody);
    match module.validate(block) {
        Ok(()) => Ok(()),
        Err(ValidateFault::AlreadyDone) => Err(TurnstileReason::ALREADY_VALID),
        Err(ValidateFault::SizeMismatch) if block.size() == accept::PageSize::Size2M => {
            (0..block.size().pages())
                .filter_map(|page| block.first().checked_add(page))
                .try_for_each(|frame| accept_own(Block::page(frame)))
        }
        Err(_) => Err(TurnstileReason::TD_ACCEPT),
    }
}

/// Puts the firmware's last page where the reset page was, as soon as no processor needs that.
///
/// The attack this stops: a host that starts a processor late lets it begin at the reset vector, as L1.
/// Were the page the guest's by then, the guest would be L1. So all processors that the module knows
/// of have to be here first; a host that keeps one back gets no guest.
fn replace_reset_page(launch: &Launch<'_>, vcpus: usize) -> Result<(), TurnstileReason> {
    let all_here = (0..entry::LOOKS_AT_OTHERS).any(|_| {
        core::hint::spin_loop();
        entry::processors_here() as usize >= vcpus
    });
    if !all_here {
        return Err(TurnstileReason::TD_PROCESSORS);
    }
    let source = launch.params().firmware_last_page as *const [u8; PAGE_SIZE as usize];
    // SAFETY: a launched page of the region, checked with the parameters; nobody writes to it.
    let last_page = unsafe { &*source };
    guest_map::write(Gpa::new(ResetPage::GPA), last_page).map_err(|_| TurnstileReason::INTERNAL)
}

/// Grants the launched firmware pages to the guest, 4 KiB each: so they were launched.
fn grant_firmware<B: Backend>(
    launch: &Launch<'_>,
    engine: &Engine<'_, B>,
) -> Result<(), TurnstileReason> {
    let firmware = launch.firmware();
    for page in firmware.frames() {
        engine
            .backend()
            .grant(Block::page(Frame::containing(page.get())))
            .map_err(|_| TurnstileReason::TD_ATTRIBUTES)?;
    }
    let first = Frame::containing(firmware.start().get());
    engine
        .record_launch(first, firmware.pages(), PageState::Accepted)
        .map_err(|_| TurnstileReason::INTERNAL)
}

/// Accepts the areas of the firmware's metadata, and lists memory in the one that is for that; where
/// that is. The list is a page, and it lies on the stack.
#[inline(never)]
fn prepare_areas<B: Backend>(
    launch: &Launch<'_>,
    plan: &Plan,
    host_map: &HostMap,
    engine: &Engine<'_, B>,
) -> Result<Gpa, TurnstileReason> {
    let mut accepted = [PageRange::EMPTY; LaunchParams::MAX_SECTIONS];
    let mut list_at = None;
    for (section, slot) in launch.sections().iter().zip(&mut accepted) {
        let pages = PageRange::try_from_bytes(section.gpa, section.size)
            .filter(|pages| plan.is_guest_memory(*pages, launch.region()))
            .ok_or(TurnstileReason::FIRMWARE)?;
        match SectionKind(section.kind.0) {
            SectionKind::TD_HOB => list_at = Some(pages),
            SectionKind::TEMP_MEM => {}
            // The firmware accepts it itself.
            SectionKind::PERM_MEM => continue,
            _ => return Err(TurnstileReason::FIRMWARE),
        }
        accept_pages(pages, engine)?;
        *slot = pages;
    }
    let place = list_at.ok_or(TurnstileReason::FIRMWARE)?;
    let hidden = [launch.region(), plan.carve_out];
    let list = hob::List::make(place.start().get(), host_map.memory(), &hidden, &accepted)?;
    if list.bytes().len() as u64 > place.bytes() {
        return Err(TurnstileReason::MAP_TOO_MANY);
    }
    guest_map::write(place.start(), list.bytes()).map_err(|_| TurnstileReason::NOT_VALIDATED)?;
    Ok(place.start())
}

fn accept_pages<B: Backend>(
    pages: PageRange,
    engine: &Engine<'_, B>,
) -> Result<(), TurnstileReason> {
    for page in pages.frames() {
        match engine.accept(Block::page(Frame::containing(page.get())), OnNoChange::Fail) {
            // No flush can be owed: the guest has never run.
            Ok(_) => {}
            Err(Error::HostLied) => return Err(TurnstileReason::ALREADY_VALID),
            Err(Error::Backend { .. }) => return Err(TurnstileReason::TD_ACCEPT),
            Err(_) => return Err(TurnstileReason::FIRMWARE),
        }
    }
    Ok(())
}
