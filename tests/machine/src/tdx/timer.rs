//! The timer of a trust domain's APIC.
//!
//! Software in a trust domain takes the timer's clock for the crystal that CPUID(0x15) names, 25 MHz, and
//! KVM runs it at that. QEMU's runs at 1 GHz, which would end each wait 40 times too early: Linux then
//! finds that the time has not come, sets the timer again, and does nothing else on a slow computer.
//! So what the guest writes is kept here, and QEMU's timer gets as many nanoseconds as it means.

use crate::cpuid::TD_CRYSTAL_HZ;
use crate::ghcb::Cpu;

/// Initial count: writing it starts the timer.
const INITIAL: u32 = 0x838;
/// Current count.
const CURRENT: u32 = 0x839;
/// Divide configuration.
const DIVIDE: u32 = 0x83E;
/// Its bits 3, 1 and 0 (SDM volume 3, "Divide Configuration Register").
const DIVIDE_BITS: u64 = 0b1011;

/// Nanoseconds of a cycle, each of which QEMU's timer counts.
const CYCLE: u64 = 1_000_000_000 / TD_CRYSTAL_HZ as u64;
/// The largest shift that there is: a count of 128 cycles.
const MAX_SHIFT: u32 = 7;

/// What the guest has written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Timer {
    divide: u32,
    initial: u32,
}

/// The binary logarithm of what a divide configuration divides by.
const fn shift(divide: u32) -> u32 {
    let value = divide & 3 | divide >> 1 & 4;
    (value + 1) & MAX_SHIFT
}

/// The divide configuration for a shift.
const fn configuration(shift: u32) -> u64 {
    let value = shift.wrapping_sub(1) & MAX_SHIFT;
    (value & 3 | (value & 4) << 1) as u64
}

impl Timer {
    /// Nanoseconds of one count.
    const fn count(self) -> u64 {
        CYCLE << shift(self.divide)
    }

    /// What QEMU's timer is set to: shift and initial count. What does not fit (nine minutes) is cut off.
    fn scaled(self) -> (u32, u32) {
        let nanoseconds = u64::from(self.initial) * self.count();
        (0..=MAX_SHIFT)
            .find_map(|shift| Some((shift, u32::try_from(nanoseconds >> shift).ok()?)))
            .unwrap_or((MAX_SHIFT, u32::MAX))
    }

    /// RDMSR: none if the register is not the timer's, else what the guest reads.
    pub(super) fn read(self, number: u32, cpu: &mut dyn Cpu) -> Option<Option<u64>> {
        match number {
            INITIAL => Some(Some(self.initial.into())),
            DIVIDE => Some(Some(self.divide.into())),
            CURRENT => {
                let (shift, _) = self.scaled();
                let left = cpu.rdmsr(CURRENT).map(|left| left << shift);
                // The last count lasts until the end.
                Some(left.map(|nanoseconds| nanoseconds.div_ceil(self.count())))
            }
            _ => None,
        }
    }

    /// WRMSR: none if the register is not the timer's, else whether the guest may write that.
    pub(super) fn write(&mut self, number: u32, value: u64, cpu: &mut dyn Cpu) -> Option<bool> {
        match number {
            // Counts for what is started from now on.
            DIVIDE => Some(value & !DIVIDE_BITS == 0).inspect(|&fits| {
                if fits {
                    self.divide = value as u32;
                }
            }),
            INITIAL => Some(u32::try_from(value).is_ok_and(|initial| {
                self.initial = initial;
                let (shift, count) = self.scaled();
                cpu.wrmsr(DIVIDE, configuration(shift)) && cpu.wrmsr(INITIAL, count.into())
            })),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeCpu;

    /// SDM volume 3, "Divide Configuration Register".
    const DIVIDES: [(u32, u32); 8] = [
        (0b1011, 1),
        (0b0000, 2),
        (0b0001, 4),
        (0b0010, 8),
        (0b0011, 16),
        (0b1000, 32),
        (0b1001, 64),
        (0b1010, 128),
    ];

    #[test]
    fn divide_configurations() {
        for (divide, by) in DIVIDES {
            assert_eq!(1 << shift(divide), by, "{divide:#b}");
            assert_eq!(configuration(shift(divide)), divide.into());
        }
    }

    /// What QEMU's timer is set to, in nanoseconds.
    fn nanoseconds(divide: u64, initial: u64) -> u64 {
        let (mut timer, mut cpu) = (Timer::default(), FakeCpu::default());
        assert_eq!(timer.write(DIVIDE, divide, &mut cpu), Some(true));
        assert_eq!(timer.write(INITIAL, initial, &mut cpu), Some(true));
        let [("msr", 0x83E, _, set), ("msr", 0x838, _, count)] = cpu.writes[..] else {
            panic!("{:?}", cpu.writes);
        };
        assert!(u32::try_from(count).is_ok());
        count << shift(set as u32)
    }

    #[test]
    fn a_cycle_is_40_nanoseconds() {
        assert_eq!(nanoseconds(0b1011, 1), 40);
        assert_eq!(nanoseconds(0b0011, 6250), 4_000_000);
        // What needs a divider of QEMU's is as long, to less than a count of that.
        let long = u64::from(u32::MAX) * 40;
        let set = nanoseconds(0b1011, u32::MAX.into());
        assert!(set <= long && long - set < 128, "{set} for {long}");
        // Too long: as long as there is.
        assert_eq!(
            nanoseconds(0b1010, u32::MAX.into()),
            u64::from(u32::MAX) << 7
        );
        // Zero stops it.
        assert_eq!(nanoseconds(0b1011, 0), 0);
    }

    #[test]
    fn the_guest_reads_what_it_has_written() {
        let (mut timer, mut cpu) = (Timer::default(), FakeCpu::default());
        assert_eq!(timer.write(DIVIDE, 0b0011, &mut cpu), Some(true));
        assert_eq!(timer.write(INITIAL, 1000, &mut cpu), Some(true));
        assert_eq!(timer.read(DIVIDE, &mut cpu), Some(Some(0b0011)));
        assert_eq!(timer.read(INITIAL, &mut cpu), Some(Some(1000)));
        assert_eq!(timer.read(0x832, &mut cpu), None);
        assert_eq!(timer.write(0x832, 0, &mut cpu), None);
        for (number, value) in [(DIVIDE, 4), (DIVIDE, 16), (INITIAL, 1 << 32)] {
            assert_eq!(timer.write(number, value, &mut cpu), Some(false));
        }
        assert_eq!(timer.read(INITIAL, &mut cpu), Some(Some(1000)));
    }
}
