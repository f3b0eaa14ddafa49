//! The other processors' contexts at VMPL0.
//!
//! The boot processor makes a VMSA of level 0 for each of them and tells the host about it.
//!
//! Where memory is accepted on request only, none is started: the host runs it when the guest, once
//! it has started that processor at its own level, makes its first call there. So the first thing a
//! secondary processor does is to serve a call, and until then it costs nothing.
//!
//! Where memory is accepted ahead of the guest they are started at once, to take part in that. They
//! give the processor back when there is nothing left to do, and wait for the first call as above.
#![expect(unsafe_code, reason = "the start of a processor on memory made for it")]

use protocols::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE, PageSize, Vmpl};
use protocols::terminate::TurnstileReason;
use protocols::vmsa::{Efer, Segment, SegmentAttributes, Vmsa};
use x86_64::registers::control::{Cr0, Cr3, Cr4, Efer as ProcessorEfer};

use crate::guest::prepare::GUEST_SEV_FEATURES;
use crate::hypervisor::ghcb::Ghcb;
use crate::hypervisor::{Hypervisor, Start, VcpuRequest};
use crate::memory::layout::STACK_WINDOW;
use crate::memory::page_tables;
use crate::memory::pool::Pool;
use crate::percpu::PerCpu;
use crate::platform::{MappedBlock, Platform, Rights};
use crate::system::System;
use crate::terminate::terminate;
use crate::{exceptions, requests, system};

/// Bytes of a secondary processor's stack.
const STACK_SIZE: u64 = 16 * 1024;
/// Bytes of memory that each secondary processor needs from the pool, alignment included.
pub const BYTES_PER_PROCESSOR: u64 =
    STACK_SIZE + (size_of::<PerCpu>() + size_of::<Vmsa>()) as u64 + 3 * PAGE_SIZE;

// What a processor may take (design.md §10); tables of its own come to another KiB.
const _: () = assert!(BYTES_PER_PROCESSOR + 1024 <= 128 << 10);

/// Selector of the code segment as the processor starts; its own GDT has the same.
const CODE_SELECTOR: u16 = 8;
/// Selector of the data segments.
const DATA_SELECTOR: u16 = 16;

/// Bytes from one stack to the next: the stack, and the page below it that is not mapped.
const STACK_STRIDE: u64 = STACK_SIZE + PAGE_SIZE;

/// Bytes of page tables that the stacks of `vcpus` processors need.
#[must_use]
pub const fn bytes_of_tables(vcpus: usize) -> u64 {
    // One table of each of the upper levels, and the lowest ones.
    let lowest = (vcpus as u64 * STACK_STRIDE).div_ceil(LARGE_PAGE_SIZE);
    (2 + lowest) * PAGE_SIZE
}

/// Maps a stack for processor `index`; returns its upper end. An overflow meets the page below,
/// which is not mapped, and ends with a double fault on the emergency stack.
pub(crate) fn map_stack(index: usize, pool: &mut Pool) -> Result<u64, TurnstileReason> {
    let memory = pool.bytes(STACK_SIZE)?;
    let bottom = STACK_WINDOW + index as u64 * STACK_STRIDE + PAGE_SIZE;
    for offset in (0..STACK_SIZE).step_by(PAGE_SIZE as usize) {
        let page = memory
            .checked_add(offset)
            .ok_or(TurnstileReason::INTERNAL)?;
        page_tables::map_page(bottom + offset, page, pool)?;
    }
    Ok(bottom + STACK_SIZE)
}

/// Makes the context of processor `index`; returns its VMSA.
///
/// # Errors
///
/// [`TurnstileReason::OUT_OF_MEMORY`], [`TurnstileReason::RMPADJUST`].
pub fn make(
    platform: &impl Platform,
    index: usize,
    pool: &mut Pool,
) -> Result<Gpa, TurnstileReason> {
    let percpu = pool.leak(PerCpu::new(index))?;
    let stack_top = map_stack(index, pool)?;
    vmsa_page(platform, &start_state(percpu, stack_top), Vmpl::VMPL1, pool)
}

/// Tells the host about the context of processor `index`, after which it may run.
///
/// # Errors
///
/// What the host's reply was.
pub fn announce(
    system: &System,
    host: &impl Hypervisor,
    index: usize,
    vmsa: Gpa,
    start: Start,
) -> Result<(), TurnstileReason> {
    let apic_id = system
        .registry
        .apic_id(index)
        .ok_or(TurnstileReason::INTERNAL)?;
    host.create_vcpu(VcpuRequest {
        apic_id,
        vmpl: Vmpl::VMPL0,
        vmsa,
        sev_features: GUEST_SEV_FEATURES.bits(),
        start,
    })
}

/// Puts a state into a page of the pool and makes that a VMSA.
///
/// RMPADJUST names a level below the caller's even for a VMSA of the caller's own level: `below`
/// is the level whose rights (none) it sets on the way.
///
/// # Errors
///
/// [`TurnstileReason::OUT_OF_MEMORY`], [`TurnstileReason::RMPADJUST`].
pub fn vmsa_page(
    platform: &impl Platform,
    state: &Vmsa,
    below: Vmpl,
    pool: &mut Pool,
) -> Result<Gpa, TurnstileReason> {
    let mut page = pool.page()?;
    if page.is_aligned(PageSize::Size2M) {
        // Processor erratum: no VMSA at a multiple of 2 MiB (facts: snp-isa §11).
        page = pool.page()?;
    }
    let address = pool.address(page);
    // SAFETY: the page was just taken from the pool and holds nothing.
    unsafe { (address as *mut Vmsa).write(state.clone()) };
    let block = MappedBlock::try_new(address, PageSize::Size4K).ok_or(TurnstileReason::INTERNAL)?;
    platform
        .adjust(block, below, Rights::Vmsa)
        .map_err(|_| TurnstileReason::RMPADJUST)?;
    Ok(page)
}

/// The state a secondary processor starts from: like the boot processor is now, at
/// [`start`] on its own stack with its own block.
fn start_state(percpu: &'static PerCpu, stack_top: u64) -> Vmsa {
    let data = Segment {
        selector: DATA_SELECTOR,
        attributes: SegmentAttributes::DATA32,
        limit: u32::MAX,
        base: 0,
    };
    let (table, flags) = Cr3::read_raw();
    let mut vmsa = Vmsa::at_reset(0);
    vmsa.cs = Segment {
        selector: CODE_SELECTOR,
        attributes: SegmentAttributes::CODE64,
        ..data
    };
    vmsa.es = data;
    vmsa.ss = data;
    vmsa.ds = data;
    vmsa.fs = data;
    vmsa.gs = Segment {
        base: core::ptr::from_ref(percpu) as u64,
        ..data
    };
    vmsa.efer = Efer(ProcessorEfer::read_raw()) | Efer::SVME;
    vmsa.cr0 = Cr0::read_raw();
    vmsa.cr3 = table.start_address().as_u64() | u64::from(flags);
    vmsa.cr4 = Cr4::read_raw();
    vmsa.rip = start as *const () as u64;
    // As if called: the stack is aligned before the return address is pushed.
    vmsa.rsp = stack_top - size_of::<u64>() as u64;
    vmsa.rdi = core::ptr::from_ref(percpu) as u64;
    vmsa.vmpl = Vmpl::VMPL0.number();
    vmsa.sev_features = GUEST_SEV_FEATURES;
    vmsa
}

/// Where a secondary processor starts: its guest has made a call, or there is memory to prepare.
extern "C" fn start(percpu: &'static PerCpu) -> ! {
    percpu.install();
    exceptions::load();
    let Some(system) = system::get() else {
        terminate(TurnstileReason::INTERNAL)
    };
    match establish_ghcb(system, percpu) {
        Ok(ghcb) => requests::serve_after_call(system, percpu.index(), ghcb),
        Err(reason) => terminate(reason),
    }
}

fn establish_ghcb(
    system: &System,
    percpu: &'static PerCpu,
) -> Result<&'static Ghcb, TurnstileReason> {
    let page = system
        .ghcbs
        .frames()
        .nth(percpu.index())
        .ok_or(TurnstileReason::INTERNAL)?;
    // SAFETY: the page belongs to this processor alone; nobody validates pages of this range.
    Ok(percpu.set_ghcb(unsafe { Ghcb::establish(page) }?))
}
