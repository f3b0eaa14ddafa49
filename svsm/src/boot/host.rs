//! What the host says when the machine starts, each word read once and checked before it is used.
#![expect(unsafe_code, reason = "reads pages that the launch or the host filled")]

use log::info;
use protocols::addr::{Gpa, PAGE_SIZE};
use protocols::ghcb::msr::CpuidRegister;
use protocols::igvm_map::MemoryMapEntry;
use protocols::launch::{GENERAL_VP_COUNT_OFFSET, LaunchParams, MEMORY_MAP_SIZE};
use protocols::terminate::TurnstileReason;

use crate::apic_ids;
use crate::host_map::HostMap;
use crate::hypervisor::{Hypervisor, ghcb, msr};
use crate::launch::Launch;
use crate::memory::layout::MAX_VCPUS;
use crate::memory::pool::Pool;

/// CPUID leaf whose EDX is the x2APIC id of the processor that executes it.
const X2APIC_ID_LEAF: u32 = 0xB;

/// Reads the host's number of processors, once.
pub fn check_vp_count(params: &LaunchParams) -> Result<usize, TurnstileReason> {
    let address = params.general_gpa + GENERAL_VP_COUNT_OFFSET as u64;
    // SAFETY: inside the general parameter page of the launch.
    let count = unsafe { (address as *const u32).read_volatile() } as usize;
    if (1..=MAX_VCPUS).contains(&count) {
        Ok(count)
    } else {
        Err(TurnstileReason::VP_COUNT)
    }
}

/// Asks the host for the APIC ids, and checks them.
pub fn read_apic_ids(
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
pub fn read_host_map(launch: &Launch<'_>) -> Result<HostMap, TurnstileReason> {
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
