//! Random histories of the host's memory: the laws of the model hold after every step.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

/// Words fall into a hole: for histories in which only the bookkeeping matters.
struct Nowhere;

impl PhysicalMemory for Nowhere {
    fn read(&self, _: Spa, out: &mut [u8]) {
        out.fill(0);
    }
    fn write(&self, _: Spa, _: &[u8]) {}
    fn fill_scramble(&self, _: Spa, _: u64, _: u32) {}
}

/// One step of the host on the page (or its block) of a guest frame.
#[derive(Clone, Copy, Debug)]
enum Step {
    Use,
    Convert(PageSize, Alias),
    TakeAway(PageSize),
    Split,
    Validate,
}

/// Frames with memory: a block with a hole in its middle, two whole ones, half of one.
const RANGES: [core::ops::Range<u64>; 2] = [0..0xA0, 0x100..0x700];

fn frame() -> impl Strategy<Value = u64> {
    // Few different pages of each block, so that they meet.
    (0u64..4, prop_oneof![0u64..4, 508u64..512]).prop_map(|(block, page)| block * 512 + page)
}

fn step() -> impl Strategy<Value = Step> {
    let size = || prop_oneof![3 => Just(SMALL), 1 => Just(LARGE)];
    let alias = prop_oneof![Just(Alias::Private), Just(Alias::Shared)];
    prop_oneof![
        4 => Just(Step::Use),
        4 => (size(), alias).prop_map(|(size, to)| Step::Convert(size, to)),
        1 => size().prop_map(Step::TakeAway),
        1 => Just(Step::Split),
        2 => Just(Step::Validate),
    ]
}

fn places(host: &HostMemory) -> Vec<(Place, Gpa)> {
    RANGES
        .into_iter()
        .flatten()
        .map(|frame| Gpa::new(frame * PAGE_SIZE))
        .map(|gpa| (host.layout().place(gpa).unwrap(), gpa))
        .collect()
}

/// What of a page may only change if a step names the page.
fn state(host: &HostMemory, place: &Place) -> (Alias, bool, bool, u32) {
    let entry = host.rmp().entry(place);
    (
        host.attribute(place),
        entry.is_assigned(),
        entry.is_validated(),
        host.pages[place.slot.index()].generation,
    )
}

/// The laws of the module, looked at from scratch.
fn check(host: &HostMemory) {
    let report = host.report();
    let mut small = 0;
    let mut shared = 0;
    for (place, gpa) in places(host) {
        let entry = host.rmp().entry(&place);
        let folio = host.folios.size(&place);
        if entry.is_assigned() {
            assert_eq!(host.attribute(&place), Alias::Private, "{gpa}");
            assert!(folio.is_some(), "{gpa} is assigned and has no memory");
            assert!(entry.size() <= folio.unwrap(), "{gpa}");
        }
        small += u64::from(folio == Some(SMALL));
        shared += u64::from(host.attribute(&place) == Alias::Shared);
    }
    let folios = report.folios;
    assert_eq!((folios.small, report.shared_pages), (small, shared));
    assert_eq!(folios.small, folios.small_allocated - folios.small_freed);
    assert_eq!(folios.large, folios.large_allocated - folios.large_freed);
    assert!(folios.large_in_rmp <= folios.large_whole && folios.large_whole <= folios.large);
    assert!(folios.hole_pages <= folios.large * 511);
    assert_eq!(folios.hole_pages == 0, folios.large == folios.large_whole);
    let map = report.direct_map;
    assert!(map.splits <= map.splits_as_linux && map.splits_as_linux <= map.blocks);
}

fn run(backing: HostBacking, steps: &[(u64, Step)]) {
    let mut host = HostMemory::new(backing);
    for range in RANGES {
        let bytes = (range.end - range.start) * PAGE_SIZE;
        host.add_ram(Gpa::new(range.start * PAGE_SIZE), bytes)
            .unwrap();
    }
    for &(frame, step) in steps {
        let gpa = Gpa::new(frame * PAGE_SIZE);
        let Some(place) = host.layout().place(gpa) else {
            continue;
        };
        let before: Vec<_> = places(&host)
            .iter()
            .map(|(place, _)| state(&host, place))
            .collect();
        let mut named = None;
        let mut converts = false;
        match step {
            Step::Use if host.attribute(&place) == Alias::Private => {
                host.prepare(&Nowhere, &place, gpa).unwrap();
                // An entry may speak for the whole block.
                named = Some((host.rmp().entry(&place).size(), 0));
            }
            Step::Convert(size, to) if place.slots(size).is_some() => {
                let slots = place.slots(size).unwrap();
                converts = host.pages[slots]
                    .iter()
                    .any(|page| page.shared != (to == Alias::Shared));
                let same = host.convert(&Nowhere, &place, gpa, size, to);
                same.unwrap();
                named = Some((size, usize::from(converts)));
            }
            Step::TakeAway(size) if place.slots(size).is_some() => {
                host.take_away(&Nowhere, &place, gpa, size).unwrap();
                named = Some((size, 1));
            }
            Step::Split => {
                host.psmash(&place, gpa);
                host.take_invalidations();
            }
            Step::Validate if host.rmp().entry(&place).is_assigned() => {
                named = Some((host.rmp().entry(&place).size(), 0));
                host.rmp_mut().set_validated(&place, true);
            }
            _ => {}
        }
        check(&host);
        // Exactly what was named is withdrawn and changed, and nothing else.
        let pages = |size: PageSize| {
            let first = gpa.align_down(size).get() / PAGE_SIZE;
            first..first + size.pages()
        };
        let stale: BTreeSet<u64> = host
            .take_invalidations()
            .iter()
            .flat_map(|i| i.gpa.get() / PAGE_SIZE..(i.gpa.get() + i.bytes) / PAGE_SIZE)
            .collect();
        let expected: BTreeSet<u64> = match named {
            Some((size, 1)) => pages(size).collect(),
            _ => BTreeSet::new(),
        };
        assert_eq!(stale, expected, "{step:?} at {gpa}");
        for ((place, at), before) in places(&host).iter().zip(before) {
            let inside =
                named.is_some_and(|(size, _)| pages(size).contains(&(at.get() / PAGE_SIZE)));
            if !inside {
                assert_eq!(
                    state(&host, place),
                    before,
                    "{step:?} at {gpa} changed {at}"
                );
            } else if let (Step::Convert(_, to), true) = (step, converts) {
                assert_eq!(host.attribute(place), to);
                // What was so already is left alone.
                if before.0 == to {
                    assert_eq!(state(&host, place), before, "{at} was so already");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_laws_hold_after_every_step(
        large in any::<bool>(),
        steps in prop::collection::vec((frame(), step()), 1..60),
    ) {
        let backing = if large { HostBacking::Size2M } else { HostBacking::Size4K };
        run(backing, &steps);
    }
}
