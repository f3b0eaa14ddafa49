//! The ports by which a guest switches the machine off or resets it: they end the run, with a
//! report, before QEMU does it without one.
//!
//! A write is decoded as QEMU's q35 decodes it. Resets by other ways are not ports: a triple
//! fault and a termination request have outcomes of their own.

use alloc::format;

use crate::platform::End;

/// ACPI PM1a control register where OVMF puts it on q35, two bytes: SLP_TYP in bits 12:10, and
/// SLP_EN in bit 13, which makes it happen (ACPI 4.8.3.2.1).
pub const PM1A_CONTROL: u16 = 0x604;
const SLP_EN: u32 = 1 << 13;
const SLP_TYP_SHIFT: u32 = 10;
/// SLP_TYP of S5 in QEMU's tables.
const SOFT_OFF: u32 = 0;
/// Reset control register of the chipset (ICH9 13.7.5); bit 2 resets.
pub const RESET_CONTROL: u16 = 0xCF9;
const RESET_CPU: u32 = 1 << 2;
/// Data and command ports of the keyboard controller.
pub const KEYBOARD_DATA: u16 = 0x60;
/// See [`KEYBOARD_DATA`].
pub const KEYBOARD_COMMAND: u16 = 0x64;
/// Commands 0xF0 to 0xFF pulse output lines, those whose bit is 0; line 0 is the reset.
const PULSE: u32 = 0xF0;
const PULSE_RESET: u32 = 1;
/// The next data byte goes to the output port, whose bit 0 is the reset line, active low.
const WRITE_OUTPUT_PORT: u32 = 0xD1;
/// System control port A; bit 0 is a fast reset.
pub const PORT_92: u16 = 0x92;

/// Every port that [`Power::write`] has to see.
pub const WATCHED: [u16; 6] = [
    PM1A_CONTROL,
    PM1A_CONTROL + 1,
    RESET_CONTROL,
    KEYBOARD_DATA,
    KEYBOARD_COMMAND,
    PORT_92,
];

/// What the ports remember.
#[derive(Clone, Copy, Debug, Default)]
pub struct Power {
    output_port_is_next: bool,
}

impl Power {
    /// A write of `bytes` bytes; how the run ends, if it does.
    pub fn write(&mut self, port: u16, bytes: u8, value: u32) -> Option<End> {
        let value = value & u32::MAX >> (32 - 8 * u32::from(bytes.clamp(1, 4)));
        let reset = || Some(End::Reset(format!("reset through port {port:#x}")));
        match port {
            PM1A_CONTROL if bytes >= 2 => sleep(value),
            PM1A_CONTROL if bytes < 2 => None,
            // The upper byte alone.
            _ if port == PM1A_CONTROL + 1 => sleep(value << 8),
            RESET_CONTROL if value & RESET_CPU != 0 => reset(),
            KEYBOARD_COMMAND => {
                self.output_port_is_next = value & 0xFF == WRITE_OUTPUT_PORT;
                let pulses = value & PULSE == PULSE && value & PULSE_RESET == 0;
                pulses.then(reset).flatten()
            }
            KEYBOARD_DATA if core::mem::take(&mut self.output_port_is_next) => {
                (value & PULSE_RESET == 0).then(reset).flatten()
            }
            PORT_92 if value & 1 != 0 => reset(),
            _ => None,
        }
    }
}

/// A write to PM1a control. Other sleeping states would stop QEMU's processors where no report
/// can be written.
fn sleep(value: u32) -> Option<End> {
    if value & SLP_EN == 0 {
        return None;
    }
    Some(match value >> SLP_TYP_SHIFT & 7 {
        SOFT_OFF => End::PowerOff,
        other => End::Refused(format!(
            "the guest enters the ACPI sleeping state with SLP_TYP {other}; only switching off, \
             SLP_TYP {SOFT_OFF}, is modelled"
        )),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(port: u16, bytes: u8, value: u32) -> Option<End> {
        Power::default().write(port, bytes, value)
    }

    fn is_reset(end: Option<End>) -> bool {
        matches!(end, Some(End::Reset(_)))
    }

    #[test]
    fn soft_off_is_a_power_off_by_word_and_by_byte() {
        assert_eq!(write(PM1A_CONTROL, 2, 0x2000), Some(End::PowerOff));
        assert_eq!(write(PM1A_CONTROL, 2, 0x2001), Some(End::PowerOff));
        assert_eq!(write(PM1A_CONTROL, 4, 0x2000), Some(End::PowerOff));
        assert_eq!(write(PM1A_CONTROL + 1, 1, 0x20), Some(End::PowerOff));
        // SCI_EN, and the lower byte.
        assert_eq!(write(PM1A_CONTROL, 2, 1), None);
        assert_eq!(write(PM1A_CONTROL, 1, 0x2000), None);
    }

    #[test]
    fn a_suspend_is_not_a_power_off() {
        for end in [
            write(PM1A_CONTROL, 2, 0x2400),
            write(PM1A_CONTROL + 1, 1, 0x24),
        ] {
            assert!(matches!(end, Some(End::Refused(why)) if why.contains("SLP_TYP 1")));
        }
    }

    #[test]
    fn every_way_to_reset_is_seen() {
        assert!(is_reset(write(RESET_CONTROL, 1, 0x0E)));
        assert!(is_reset(write(RESET_CONTROL, 1, 0x06)));
        assert!(is_reset(write(PORT_92, 1, 1)));
        for command in [0xFE, 0xF0, 0xFC] {
            assert!(
                is_reset(write(KEYBOARD_COMMAND, 1, command)),
                "{command:#x}"
            );
        }
    }

    #[test]
    fn what_does_not_reset_goes_through() {
        // Linux writes the reset type before it resets.
        assert_eq!(write(RESET_CONTROL, 1, 0x02), None);
        // The A20 gate by two ways, and a pulse of no line.
        assert_eq!(write(PORT_92, 1, 2), None);
        assert_eq!(write(KEYBOARD_COMMAND, 1, 0xFF), None);
        assert_eq!(write(KEYBOARD_COMMAND, 1, 0xD1), None);
        assert_eq!(write(KEYBOARD_DATA, 1, 0), None);
        assert_eq!(write(0x80, 4, 0x2004), None);
    }

    #[test]
    fn the_output_port_resets_only_behind_its_command() {
        let mut power = Power::default();
        assert_eq!(power.write(KEYBOARD_COMMAND, 1, WRITE_OUTPUT_PORT), None);
        // A20 on, reset line high.
        assert_eq!(power.write(KEYBOARD_DATA, 1, 0xDF), None);
        assert_eq!(power.write(KEYBOARD_DATA, 1, 0), None);
        assert_eq!(power.write(KEYBOARD_COMMAND, 1, WRITE_OUTPUT_PORT), None);
        assert!(is_reset(power.write(KEYBOARD_DATA, 1, 0xDE)));
    }
}
