//! The few instructions the machine intercepts: which one it is and how long.
//!
//! TCG gives neither (facts: tcg-svm.md §2, §5). Redundant prefixes are allowed everywhere, as
//! the CPU allows them; of F2 and F3 the last one counts.

/// Longest instruction (APM volume 3, 1.2).
pub const MAX_LENGTH: usize = 15;

/// An intercepted instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Opcode {
    /// F2 0F 01 FF.
    Pvalidate,
    /// F3 0F 01 FE.
    Rmpadjust,
    /// F3 0F 01 FD.
    Rmpquery,
    /// 0F 01 D9 with F2 or F3.
    Vmgexit,
    /// 0F 01 D9 without.
    Vmmcall,
    /// 0F A2.
    Cpuid,
    /// 0F 32.
    Rdmsr,
    /// 0F 30.
    Wrmsr,
    /// F4.
    Hlt,
    /// 0F 08.
    Invd,
    /// 0F 09.
    Wbinvd,
    /// 0F 01 C8.
    Monitor,
    /// 0F 01 C9.
    Mwait,
    /// 0F 01 D1.
    Xsetbv,
    /// 0F 01 F9.
    Rdtscp,
    /// 66 0F 01 CC.
    Tdcall,
    /// 0F 01 C1: Intel's call to the hypervisor.
    Vmcall,
    /// Anything else.
    Other,
}

/// What stands at RIP.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Instruction {
    /// Which.
    pub opcode: Opcode,
    /// Bytes, prefixes included; for [`Opcode::Other`] meaningless.
    pub length: u64,
}

/// Decodes the instruction at the start of `bytes`, of which fewer than [`MAX_LENGTH`] may be
/// there at the end of mapped memory. `long` says that REX prefixes exist.
pub fn decode(bytes: &[u8], long: bool) -> Instruction {
    let mut repeat = None;
    let mut operand_size = false;
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        match byte {
            0xF2 | 0xF3 => repeat = Some(byte),
            0x66 => operand_size = true,
            0x26 | 0x2E | 0x36 | 0x3E | 0x64 | 0x65 | 0x67 | 0xF0 => {}
            0x40..=0x4F if long => {}
            _ => break,
        }
        at += 1;
    }
    let rest = bytes.get(at..).unwrap_or_default();
    let (opcode, length) = match *rest {
        [0xF4, ..] => (Opcode::Hlt, 1),
        [0x0F, 0x08, ..] => (Opcode::Invd, 2),
        [0x0F, 0x09, ..] => (Opcode::Wbinvd, 2),
        [0x0F, 0x30, ..] => (Opcode::Wrmsr, 2),
        [0x0F, 0x32, ..] => (Opcode::Rdmsr, 2),
        [0x0F, 0xA2, ..] => (Opcode::Cpuid, 2),
        [0x0F, 0x01, 0xCC, ..] if operand_size && repeat.is_none() => (Opcode::Tdcall, 3),
        [0x0F, 0x01, third, ..] => (group_0f01(third, repeat), 3),
        _ => (Opcode::Other, 0),
    };
    Instruction {
        opcode,
        length: (at + length) as u64,
    }
}

fn group_0f01(third: u8, repeat: Option<u8>) -> Opcode {
    match (third, repeat) {
        (0xC8, _) => Opcode::Monitor,
        (0xC9, _) => Opcode::Mwait,
        (0xD1, _) => Opcode::Xsetbv,
        (0xC1, None) => Opcode::Vmcall,
        (0xF9, _) => Opcode::Rdtscp,
        (0xD9, Some(_)) => Opcode::Vmgexit,
        (0xD9, None) => Opcode::Vmmcall,
        (0xFD, Some(0xF3)) => Opcode::Rmpquery,
        (0xFE, Some(0xF3)) => Opcode::Rmpadjust,
        (0xFF, Some(0xF2)) => Opcode::Pvalidate,
        _ => Opcode::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prefix_tells_vmgexit_from_vmmcall() {
        let d = |bytes: &[u8]| decode(bytes, true);
        assert_eq!(
            d(&[0x0F, 0x01, 0xD9]),
            Instruction {
                opcode: Opcode::Vmmcall,
                length: 3
            }
        );
        assert_eq!(d(&[0xF3, 0x0F, 0x01, 0xD9]).opcode, Opcode::Vmgexit);
        let odd = d(&[0x66, 0xF3, 0x48, 0x0F, 0x01, 0xD9]);
        assert_eq!(
            odd,
            Instruction {
                opcode: Opcode::Vmgexit,
                length: 6
            }
        );
    }

    #[test]
    fn host_instructions_are_not_guest_ones() {
        // PSMASH and RMPUPDATE differ from PVALIDATE and RMPADJUST by the prefix alone.
        assert_eq!(
            decode(&[0xF2, 0x0F, 0x01, 0xFF], true).opcode,
            Opcode::Pvalidate
        );
        assert_eq!(
            decode(&[0xF3, 0x0F, 0x01, 0xFF], true).opcode,
            Opcode::Other
        );
        assert_eq!(
            decode(&[0xF3, 0x0F, 0x01, 0xFE], true).opcode,
            Opcode::Rmpadjust
        );
        assert_eq!(
            decode(&[0xF2, 0x0F, 0x01, 0xFE], true).opcode,
            Opcode::Other
        );
        assert_eq!(decode(&[0x0F, 0x0B], true).opcode, Opcode::Other);
    }

    #[test]
    fn rdtscp_is_not_rdtsc() {
        assert_eq!(decode(&[0x0F, 0x01, 0xF9], true).opcode, Opcode::Rdtscp);
        assert_eq!(decode(&[0x0F, 0x31], true).opcode, Opcode::Other);
    }

    #[test]
    fn tdcall_needs_its_prefix_and_no_other() {
        let d = |bytes: &[u8]| decode(bytes, true).opcode;
        assert_eq!(d(&protocols::tdx::TDCALL), Opcode::Tdcall);
        assert_eq!(decode(&protocols::tdx::TDCALL, true).length, 4);
        assert_eq!(d(&[0x0F, 0x01, 0xCC]), Opcode::Other);
        assert_eq!(d(&[0x66, 0xF3, 0x0F, 0x01, 0xCC]), Opcode::Other);
        // SEAMCALL.
        assert_eq!(d(&[0x66, 0x0F, 0x01, 0xCF]), Opcode::Other);
        assert_eq!(d(&[0x0F, 0x01, 0xC1]), Opcode::Vmcall);
    }

    #[test]
    fn a_cut_off_instruction_is_no_instruction() {
        assert_eq!(decode(&[0xF2, 0x0F, 0x01], true).opcode, Opcode::Other);
        assert_eq!(decode(&[], true).opcode, Opcode::Other);
        assert_eq!(decode(&[0x66; 15], true).opcode, Opcode::Other);
    }

    #[test]
    fn rex_is_an_instruction_outside_long_mode() {
        assert_eq!(decode(&[0x48, 0x0F, 0xA2], false).opcode, Opcode::Other);
        assert_eq!(decode(&[0x48, 0x0F, 0xA2], true).length, 3);
    }
}
