//! Many vCPUs at work at once, for every platform alike.

use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use accept::{Backend, Error, OnNoChange};

use super::history::Hardware;
use super::{large, page, with_engine};

/// Looks at a lock that never run out.
pub const PATIENCE: u32 = 1 << 30;

/// Of six that ask for one region, one gets it.
pub fn one_of_many_wins_a_region<H: Hardware + Sync>(new: impl Fn(bool) -> H)
where
    for<'a> &'a H: Backend,
{
    for round in 0..12 {
        let hardware = new(round % 2 == 0);
        let (won, late) = (AtomicUsize::new(0), AtomicUsize::new(0));
        with_engine(&hardware, 1, PATIENCE, |engine| {
            let start = Barrier::new(6);
            thread::scope(|scope| {
                for _ in 0..6 {
                    scope.spawn(|| {
                        start.wait();
                        match engine.accept(large(0), OnNoChange::Fail) {
                            Ok(_) => won.fetch_add(1, Ordering::Relaxed),
                            Err(Error::NoChange) => late.fetch_add(1, Ordering::Relaxed),
                            Err(error) => panic!("{error:?}"),
                        };
                    });
                }
            });
            hardware.assert_agrees(engine);
        });
        assert_eq!((won.into_inner(), late.into_inner()), (1, 5));
        assert_eq!(hardware.double_validations(), 0);
        hardware.assert_lawful();
    }
}

/// Four that accept and give back around the border of two regions.
pub fn random_work_never_validates_twice<H: Hardware + Sync>(hardware: &H)
where
    for<'a> &'a H: Backend,
{
    // Where the host removes pages it is waited for without a lock, and others see the page meanwhile.
    let may_be_met_leaving = <&H as Backend>::HOST_REMOVES;
    with_engine(hardware, 2, PATIENCE, |engine| {
        thread::scope(|scope| {
            for seed in 1..=4u64 {
                scope.spawn(move || {
                    // A small generator is enough: the interleaving is the random part.
                    let mut dice = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                    for _ in 0..60 {
                        dice = dice
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(seed);
                        let draw = dice >> 33;
                        let block = match draw % 8 {
                            0 => large(draw >> 3 & 1),
                            _ => page(508 + (draw >> 3) % 8),
                        };
                        let choice = match draw >> 10 & 1 {
                            0 => OnNoChange::Fail,
                            _ => OnNoChange::Ignore,
                        };
                        let result = match draw >> 11 & 1 {
                            0 => engine.accept(block, choice).map(drop),
                            _ => hardware.rescind(engine, block, choice),
                        };
                        match result {
                            Ok(()) | Err(Error::NoChange) => {}
                            Err(Error::Owned) if may_be_met_leaving => {}
                            Err(error) => panic!("{error:?}"),
                        }
                    }
                });
            }
        });
        hardware.assert_agrees(engine);
        hardware.assert_lawful();
    });
    assert_eq!(hardware.double_validations(), 0);
}
