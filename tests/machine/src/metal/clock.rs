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

/// Ticks of the time stamp counter in a second; 0 if there is no interval timer. The firmware
/// sets the timer up anew, so nothing is put back but the gate.
pub fn tsc_hz() -> u64 {
    let gate = cpu::port_in(PORT_GATE, 1);
    cpu::port_out(PORT_GATE, 1, gate & !2 | 1);
    cpu::port_out(PORT_MODE, 1, MODE_ONE_SHOT);
    cpu::port_out(PORT_CHANNEL_2, 1, u32::from(COUNT) & 0xFF);
    cpu::port_out(PORT_CHANNEL_2, 1, u32::from(COUNT) >> 8);
    let start = cpu::tsc();
    let ticks = loop {
        let ticks = cpu::tsc() - start;
        if cpu::port_in(PORT_GATE, 1) & 1 << 5 != 0 {
            break Some(ticks);
        }
        if ticks > PATIENCE {
            break None;
        }
    };
    cpu::port_out(PORT_GATE, 1, gate);
    ticks.map_or(0, |ticks| ticks * TIMER_HZ / u64::from(COUNT))
}
