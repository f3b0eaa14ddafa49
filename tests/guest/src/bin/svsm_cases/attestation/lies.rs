//! Hosts that lie about messages (`hostile=messages-…`).

use guest::harness::{Case, Finding, Verdict, case, expect};
use guest::memory;
use guest::oracle::{self, host_act};
use guest::svsm::{self, Registers, call};
use protocols::oracle::HostAct;
use protocols::svsm::ResultCode;
use protocols::svsm::attestation::{AttestationCall, ServicesManifest};
use zerocopy::IntoBytes;

use super::place::{MANIFEST, Place, REPORT, sizes};
use crate::setup;

/// With a host that lies about messages and later does not.
pub const LIES: &[Case] = &[
    case("attest_host_is_busy", "ghcb.md §8", busy),
    case("attest_host_drops_the_message", "ghcb.md §8", dropped),
    case("attest_host_says_it_failed", "ghcb.md §8", failed),
    case("attest_host_wants_more_room", "ghcb.md §8", more_room),
];

/// A lie that is not got over: the firmware has moved on, and its answer is gone.
pub const LAST_LIE: &[Case] = &[case(
    "attest_answer_is_not_the_firmwares",
    "ghcb.md §8",
    last_lie,
)];

/// Whether this host lies about messages.
pub fn is_host() -> bool {
    oracle::host_would(HostAct::DROP_MESSAGE)
}

/// The next message meets such a host; the address counts for nothing.
fn next_meets(act: HostAct) -> Verdict {
    host_act(svsm::calling_area(), act)
}

/// Asks once. What comes back, and the lies that the manifest of a good answer tells of.
fn ask_once(place: Place, number: u8) -> Result<(ResultCode, Registers, Option<u64>), Finding> {
    place.put_nonce(number)?;
    place.blank()?;
    let at = svsm::buffer().get();
    memory::put_bytes(at, place.operation().as_bytes())?;
    let registers = Registers {
        rcx: at,
        rdx: u64::MAX,
        r8: u64::MAX,
        r9: 0,
    };
    let answer = call(AttestationCall::SERVICES.id(), registers)?;
    let lies = if answer.result() == ResultCode::SUCCESS {
        let manifest: ServicesManifest = place.expect_answer(number)?;
        Some(manifest.turnstile.host_lies)
    } else {
        expect("registers", answer.registers, registers)?;
        place.expect_blank()?;
        None
    };
    Ok((answer.result(), answer.registers, lies))
}

/// A lie is answered with `code`, again if it is told again, and got over when it is not; then the manifest
/// tells of `noticed` lies more than before.
fn got_over(act: HostAct, code: ResultCode, noticed: u64) -> Verdict {
    let place = Place::new()?;
    let (_, _, before) = ask_once(place, 0x40)?;
    for number in [0x41, 0x42] {
        next_meets(act)?;
        expect("result", ask_once(place, number)?.0, code)?;
    }
    // The first two questions are never answered to anybody; the third is.
    let (result, _, after) = ask_once(place, 0x43)?;
    expect("result", result, ResultCode::SUCCESS)?;
    expect("host lies", after, before.map(|lies| lies + 2 * noticed))
}

fn busy() -> Verdict {
    got_over(HostAct::SAY_BUSY, ResultCode::BUSY, 0)
}

fn dropped() -> Verdict {
    got_over(HostAct::DROP_MESSAGE, ResultCode::INVALID_REQUEST, 1)
}

fn failed() -> Verdict {
    got_over(HostAct::SAY_FAILED, ResultCode::INVALID_REQUEST, 0)
}

/// The report comes without certificates.
fn more_room() -> Verdict {
    let place = Place::new()?;
    next_meets(HostAct::TOO_MANY_CERTIFICATES)?;
    let (result, registers, _) = ask_once(place, 0x50)?;
    expect("result", result, ResultCode::SUCCESS)?;
    expect("sizes", sizes(&registers), (MANIFEST, 0, REPORT))
}

/// The guest is told, now and for ever: a message cannot be made again, and no other may take its number.
fn last_lie() -> Verdict {
    let act = [
        HostAct::TAMPER_ANSWER,
        HostAct::REPLAY_ANSWER,
        HostAct::LOSE_ANSWER,
    ]
    .into_iter()
    .find(|&act| oracle::host_would(act))
    .ok_or_else(|| Finding::new(format_args!("this host has no such lie")))?;
    let place = Place::new()?;
    expect("before", ask_once(place, 0x60)?.0, ResultCode::SUCCESS)?;
    next_meets(act)?;
    for number in 0x61..0x66 {
        let result = ask_once(place, number)?.0;
        expect("result", result, ResultCode::INVALID_REQUEST)?;
    }
    // Everything else goes on.
    setup::accepted_page().map(|_| ())
}
