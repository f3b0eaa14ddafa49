//! One flow after the other, with a failure at each of its calls in turn, for every platform alike:
//! the map stays true (I9, I11). What exactly remains on SEV-SNP is in `failures.rs`.

use accept::{Backend, Engine, Error, OnNoChange, Role};

use super::history::Hardware;
use super::{frame, large, page, with_engine};

/// No flow makes so many calls: three instructions at most for each page, and once more to undo them.
const MOST_CALLS: usize = 6 * 512;
/// Calls that are failed one by one; of later ones, in the midst of 512 alike, one in [`STRIDE`].
const FIRST_CALLS: usize = 8;
const STRIDE: usize = 61;

type Flow<H> = (
    &'static str,
    fn(&Engine<'_, &H>),
    fn(&H, &Engine<'_, &H>) -> Result<(), Error>,
);

/// Small pages of the region in every state that a request may meet.
fn mixed<H>(engine: &Engine<'_, &H>)
where
    for<'a> &'a H: Backend,
{
    engine.prepare(page(1)).expect("prepared");
    engine.accept(page(2), OnNoChange::Fail).expect("accepted");
}

fn all_accepted<H>(engine: &Engine<'_, &H>)
where
    for<'a> &'a H: Backend,
{
    engine.accept(large(0), OnNoChange::Fail).expect("accepted");
}

fn flows<H: Hardware>() -> [Flow<H>; 6]
where
    for<'a> &'a H: Backend,
{
    [
        (
            "accept",
            |_| {},
            |_, engine| engine.accept(large(0), OnNoChange::Fail).map(drop),
        ),
        ("accept the rest", mixed, |_, engine| {
            engine.accept(large(0), OnNoChange::Ignore).map(drop)
        }),
        ("prepare the rest", mixed, |_, engine| {
            engine.prepare(large(0)).map(drop)
        }),
        ("rescind", all_accepted, |hardware, engine| {
            hardware.rescind(engine, large(0), OnNoChange::Fail)
        }),
        ("rescind what there is", mixed, |hardware, engine| {
            hardware.rescind(engine, large(0), OnNoChange::Ignore)
        }),
        ("lend and give back", mixed, |_, engine| {
            let taken = engine.take(frame(2), Role::Vmsa)?;
            engine.give_back(taken).map_err(|failed| failed.error)
        }),
    ]
}

/// Fails each call of each flow, once and from then on, on a platform that `new` makes with large or
/// with small pages.
pub fn the_map_stays_true<H: Hardware>(new: impl Fn(bool) -> H)
where
    for<'a> &'a H: Backend,
{
    for (name, prepare, flow) in flows::<H>() {
        for (on_large, on_and_on) in [(true, false), (true, true), (false, false), (false, true)] {
            let mut call = 0;
            loop {
                assert!(call < MOST_CALLS, "{name} fails without a failure");
                let hardware = new(on_large);
                let result = with_engine(&hardware, 1, 1000, |engine| {
                    prepare(engine);
                    hardware.fail_in(call, on_and_on);
                    let result = flow(&hardware, engine);
                    hardware.stop_failing();
                    hardware.assert_agrees(engine);
                    result
                });
                hardware.assert_lawful();
                assert_eq!(hardware.double_validations(), 0, "{name}, call {call}");
                match result {
                    Ok(()) => break,
                    Err(error) => assert!(
                        matches!(error, Error::Backend { .. }),
                        "{name}, call {call}: {error:?}"
                    ),
                }
                call += if call < FIRST_CALLS { 1 } else { STRIDE };
            }
            assert!(call > 0, "{name} makes calls");
        }
    }
}
