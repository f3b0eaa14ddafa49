//! The map of the guest's memory and the engine over it, made from the plan: the same on all platforms.

use accept::{
    Backend, Engine, Frame, GivenBack, Map, PageState, Range, Region, RegionLock, RegionLocks,
};
use protocols::map::{MapDescriptor, MapRange};
use protocols::terminate::TurnstileReason;

use crate::descriptor;
use crate::guest::GUEST_VMPL;
use crate::launch::Launch;
use crate::memory::layout::{GUEST_WINDOW, OWN_WINDOW};
use crate::memory::page_tables::{self, Owner};
use crate::memory::plan::{Plan, regions_before, regions_touched};
use crate::memory::pool::Pool;

/// Bytes of all memory that has a state.
pub fn memory_with_state(plan: &Plan) -> u64 {
    plan.ranges().iter().map(|range| range.bytes()).sum()
}

/// Builds the guest window: all memory with a state, except what is the paravisor's.
pub fn map_guest_memory(
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

/// Makes the engine and records what is known before the guest exists.
pub fn make_engine<B: Backend>(
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

/// Shows the map to the referee, with what `complete` adds to it. The descriptor is a page, and it lies
/// on the stack: once.
#[inline(never)]
pub fn publish_map<B: Backend>(
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
