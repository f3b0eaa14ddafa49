//! How fast the time stamp counter counts: measured once against the interval timer.

use super::cpu;

/// Counts of the interval timer in a second.
const TIMER_HZ: u64 = 1_193_182;
/// What is waited for: 10 ms.
const COUNT: u16 = 11_932;

const PORT_CHANNEL_2: u16 = 0x42;
const PORT_MODE: u16 = 0x43;
/// Bit 0 lets channel 2 count, bit 1 is the speaker, bit 5 is channel 2's output.
const PORT_GATE: u16 = 0x61;
/// Channel 2, low byte then high byte, output rises at the end of the count.
const MODE_ONE_SHOT: u32 = 0xB0;

/// Ticks after which a timer that does not exist is given up: seconds on any processor.
const PATIENCE: u64 = 1 << 34;

/// Measurements made at most; the host may take the processor away in the middle of one.
const TRIES: usize = 16;
/// A measurement is good enough if it is certain to one part in so many.
const PRECISION: u64 = 100;

/// How long a count took, in ticks.
struct Measured {
    ticks: u64,
    /// By how much that may be wrong, up and down together.
    doubt: u64,
}

/// Ticks of the time stamp counter in a second; 0 if there is no interval timer. The firmware
/// sets the timer up anew, so nothing is put back but the gate.
pub fn tsc_hz() -> u64 {
    let gate = cpu::port_in(PORT_GATE, 1);
    let mut best: Option<Measured> = None;
    for _ in 0..TRIES {
        let Some(found) = measure(gate & !2 | 1) else {
            break;
        };
        if best.as_ref().is_none_or(|best| found.doubt < best.doubt) {
            best = Some(found);
        }
        if best
            .as_ref()
            .is_some_and(|best| best.doubt * PRECISION <= best.ticks)
        {
            break;
        }
    }
    cpu::port_out(PORT_GATE, 1, gate);
    best.map_or(0, |best| best.ticks * TIMER_HZ / u64::from(COUNT))
}

/// Lets the timer count once.
fn measure(gate: u32) -> Option<Measured> {
    let before = cpu::tsc();
    cpu::port_out(PORT_GATE, 1, gate);
    cpu::port_out(PORT_MODE, 1, MODE_ONE_SHOT);
    cpu::port_out(PORT_CHANNEL_2, 1, u32::from(COUNT) & 0xFF);
    cpu::port_out(PORT_CHANNEL_2, 1, u32::from(COUNT) >> 8);
    let armed = cpu::tsc();
    // When the timer was last seen counting, at the earliest.
    let mut counting = armed;
    loop {
        let asked = cpu::tsc();
        let ended = cpu::port_in(PORT_GATE, 1) & 1 << 5 != 0;
        let answered = cpu::tsc();
        if ended {
            // It began between `before` and `armed`, and ended between `counting` and now.
            let (shortest, longest) = (counting - armed, answered - before);
            return Some(Measured {
                ticks: shortest.midpoint(longest),
                doubt: longest - shortest,
            });
        }
        if answered - armed > PATIENCE {
            return None;
        }
        counting = asked;
    }
}
