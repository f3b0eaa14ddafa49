//! What the guest may be told about the map.
#![cfg(not(loom))]

mod model;

use accept::{
    Census, Engine, Extent, GivenBack, Map, OnNoChange, PageState, Range, Region, RegionLock,
    RegionLocks, Role,
};
use model::{Model, frame, large, page};
use proptest::prelude::*;

const REGIONS: u64 = 6;
const UNIT: u64 = 2 << 20;

/// Runs `test` with an engine on `pages` pages from page `first`.
fn with_range(model: &Model, first: u64, pages: u64, test: impl FnOnce(&Engine<'_, &Model>)) {
    let needed = Range::regions_needed(frame(first), pages).expect("a range");
    let states: Vec<Region> = (0..needed).map(|_| Region::new()).collect();
    let flags: Vec<GivenBack> = (0..GivenBack::needed(states.len()))
        .map(|_| GivenBack::new())
        .collect();
    let range = Range::try_new(frame(first), pages, &states).expect("a good range");
    let ranges = [range.with_given_back(&flags).expect("good flags")];
    let locks = [const { RegionLock::new() }; RegionLocks::MINIMUM];
    test(&Engine::new(
        model,
        Map::try_new(&ranges).expect("a good map"),
        RegionLocks::try_new(&locks).expect("good locks"),
    ));
}

/// The bits of all units from address 0.
fn bits(engine: &Engine<'_, &Model>) -> Vec<bool> {
    let mut bytes = [0xff; 2];
    let extent = Extent {
        base: 0,
        units: REGIONS,
    };
    engine.unaccepted_bits(extent, &mut bytes);
    assert_eq!(
        u16::from_le_bytes(bytes) >> REGIONS,
        0,
        "bits without a unit"
    );
    (0..REGIONS)
        .map(|unit| bytes[unit as usize / 8] >> (unit % 8) & 1 == 1)
        .collect()
}

#[test]
fn edges_are_accepted_up_front_and_the_rest_is_told() {
    let model = Model::new(REGIONS as usize, true);
    // From page 10 of unit 0 to page 99 of unit 5; unit 2 has an accepted page, unit 3 an owned one.
    with_range(&model, 10, 5 * 512 + 90, |engine| {
        for number in [2 * 512 + 5, 3 * 512 + 6] {
            engine
                .accept(page(number), OnNoChange::Fail)
                .expect("accepted");
        }
        let _area = engine
            .take(frame(3 * 512 + 6), Role::CallingArea)
            .expect("lent");
        engine.prepare(large(4)).expect("prepared");
        let changed_pages = engine.round_out().expect("rounded");
        assert_eq!(changed_pages, 502 + 511 + 511 + 100);
        assert_eq!(
            bits(engine),
            [false, true, false, false, true, false],
            "what is ready ahead is unaccepted to the guest"
        );
        let from = |base, units| Some(Extent { base, units });
        assert_eq!(engine.unaccepted_extent(0..u64::MAX), from(UNIT, 4));
        assert_eq!(engine.unaccepted_extent(0..4), from(UNIT, 1));
        assert_eq!(engine.unaccepted_extent(2..5), from(4 * UNIT, 1));
        assert_eq!(engine.unaccepted_extent(2..4), None);
        assert_eq!(engine.state(frame(3 * 512 + 6)), Some(PageState::Owned));
        assert_eq!(engine.round_out(), Ok(0));
        assert_eq!(
            engine.census(0..REGIONS),
            Census {
                unaccepted: UNIT,
                ahead: UNIT,
                accepted: (502 + 512 + 511 + 100) * 4096,
                owned: 4096
            }
        );
        assert_eq!(engine.census(1..2).unaccepted, UNIT);
        for unit in [1, 4] {
            engine
                .accept(large(unit), OnNoChange::Fail)
                .expect("nothing of it was accepted");
        }
        assert_eq!(engine.unaccepted_extent(0..u64::MAX), None);
    });
    model.assert_lawful();
}

#[test]
fn a_short_bitmap_is_filled_as_far_as_it_goes() {
    let model = Model::new(16, true);
    with_range(&model, 0, 16 * 512, |engine| {
        let extent = engine.unaccepted_extent(0..u64::MAX).expect("all of it");
        assert_eq!(extent, Extent { base: 0, units: 16 });
        let mut one = [0];
        engine.unaccepted_bits(extent, &mut one);
        assert_eq!(one, [0xff]);
        // The third unit is the first bit of a table that begins there.
        engine.accept(large(3), OnNoChange::Fail).expect("accepted");
        let mut part = [0; 2];
        engine.unaccepted_bits(
            Extent {
                base: 2 * UNIT,
                units: 9,
            },
            &mut part,
        );
        assert_eq!(part, [0xfd, 0x01]);
    });
}

#[test]
fn memory_that_begins_elsewhere_is_told_from_there() {
    let model = Model::new(REGIONS as usize, true);
    // Units 2 to 5.
    with_range(&model, 2 * 512, 4 * 512, |engine| {
        engine.accept(large(3), OnNoChange::Fail).expect("accepted");
        assert_eq!(engine.census(3..4).accepted, UNIT);
        assert_eq!(engine.census(4..6).unaccepted, 2 * UNIT);
        assert_eq!(engine.census(0..3).unaccepted, UNIT);
        let expected = [false, false, true, false, true, true];
        assert_eq!(bits(engine), expected);
    });
}

proptest! {
    #[test]
    fn the_guest_is_told_of_every_page_it_may_not_touch(
        accepted in prop::collection::vec(0..REGIONS, 0..5),
        gpa in 0..REGIONS * UNIT,
        bytes in 1..3 * UNIT,
        whole in any::<bool>(),
    ) {
        let model = Model::new(REGIONS as usize, true);
        with_range(&model, 0, REGIONS * 512, |engine| {
            for unit in &accepted {
                engine.accept(large(*unit), OnNoChange::Ignore).expect("accepted");
            }
            // Half of the cases end with a unit, where the guard counts.
            let end = if whole { (gpa + bytes).next_multiple_of(UNIT) } else { gpa + bytes };
            let guarded = if end % UNIT == 0 { end + UNIT } else { end };
            let expected = (0..REGIONS)
                .filter(|unit| !accepted.contains(unit))
                .any(|unit| unit * UNIT < guarded && gpa < (unit + 1) * UNIT);
            assert_eq!(engine.contains_unaccepted(gpa, end - gpa), expected);
            let told = bits(engine);
            for unit in 0..REGIONS {
                assert_eq!(told[unit as usize], !accepted.contains(&unit));
            }
        });
    }
}
