//! Which model-specific registers a trust domain has to itself, and which are nobody's (facts: tdx §5).
//!
//! The registers that are the guest's own are not intercepted. All others exit, and are the host's to
//! serve by the guest's request (#VE) unless there is no such register.

/// Registers of the interrupt controller that the paravisor itself uses.
pub mod x2apic {
    /// Identifier.
    pub const ID: u32 = 0x802;
    /// End of interrupt.
    pub const EOI: u32 = 0x80B;
    /// Spurious-interrupt vector, and the switch of the APIC.
    pub const SPURIOUS: u32 = 0x80F;
    /// Interrupt command.
    pub const ICR: u32 = 0x830;
}

/// Who serves an access that exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The host, when the guest asks it.
    Host,
    /// Nobody: #GP.
    None,
}

/// Ranges, first and last, that the guest reads and writes by itself: SPEC_CTRL, PRED_CMD, FLUSH_CMD,
/// SYSENTER_CS to EIP, DEBUGCTL, PAT, DS_AREA; TPR, PPR, EOI, ISR, TMR, IRR and SELF_IPI of x2APIC; XSS;
/// EFER, STAR, LSTAR, FMASK, the bases of FS and GS, TSC_AUX.
pub const NATIVE: [(u32, u32); 15] = [
    (0x48, 0x49),
    (0x10B, 0x10B),
    (0x174, 0x176),
    (0x1D9, 0x1D9),
    (0x277, 0x277),
    (0x600, 0x600),
    (0x808, 0x808),
    (0x80A, 0x80B),
    (0x810, 0x827),
    (0x83F, 0x83F),
    (0xDA0, 0xDA0),
    (0xC000_0080, 0xC000_0082),
    (0xC000_0084, 0xC000_0084),
    (0xC000_0100, 0xC000_0102),
    (0xC000_0103, 0xC000_0103),
];
/// Ranges that it reads by itself: the time stamp counter, and what the module answers:
/// XAPIC_DISABLE_STATUS, MISC_ENABLE (which Linux reads before it can handle #VE), PERF_CAPABILITIES.
pub const NATIVE_READ: [(u32, u32); 4] =
    [(0x10, 0x10), (0xBD, 0xBD), (0x1A0, 0x1A0), (0x345, 0x345)];

/// Ranges that a trust domain with the features of this one has not: SGXLEPUBKEYHASH, WBINVDP to
/// SMM_MONITOR_CTL, SMBASE, BNDCFGS, PASID; performance monitoring (PERF_CAPABILITIES can be read); UMWAIT,
/// TSX_CTRL, XFD, processor trace, shadow stacks, TSC_DEADLINE, PKRS, user interrupts, architectural LBRs; what
/// x2APIC leaves out. The machine has a list of its own (facts: tdx §5, which names but a few).
const NOBODY: [(u32, u32); 30] = [
    (0x8C, 0x8F),
    (0x98, 0x9B),
    (0x9E, 0x9E),
    (0xC1, 0xC8),
    (0xE1, 0xE1),
    (0x122, 0x122),
    (0x186, 0x18D),
    (0x1A6, 0x1A7),
    (0x1C4, 0x1C5),
    (0x309, 0x310),
    (0x329, 0x329),
    (0x345, 0x345),
    (0x38D, 0x392),
    (0x3F1, 0x3F2),
    (0x3F6, 0x3F7),
    (0x4C1, 0x4C8),
    (0x560, 0x587),
    (0x6A0, 0x6A8),
    (0x6E0, 0x6E1),
    (0x800, 0x801),
    (0x804, 0x807),
    (0x829, 0x82E),
    (0x831, 0x831),
    (0x840, 0x8FF),
    (0x985, 0x98A),
    (0xD90, 0xD90),
    (0xD93, 0xD93),
    (0x1200, 0x12FF),
    (0x14CE, 0x14CF),
    (0x1500, 0x16FF),
];

/// Who serves an access that exits.
#[must_use]
pub fn class(number: u32) -> Class {
    let nobodys = NOBODY
        .iter()
        .any(|&(first, last)| (first..=last).contains(&number));
    if nobodys { Class::None } else { Class::Host }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_register_is_both_the_guests_and_nobodys() {
        // PERF_CAPABILITIES is read only.
        let read = NATIVE_READ
            .into_iter()
            .filter(|&range| range != (0x345, 0x345));
        for (first, last) in NATIVE.into_iter().chain(read) {
            assert!(first <= last);
            assert!(
                (first..=last).all(|number| class(number) == Class::Host),
                "{first:#x}"
            );
        }
        for (number, wanted) in [
            (0x802, Class::Host),
            (0x830, Class::Host),
            (0x8FF, Class::None),
            (0x345, Class::None),
            // The first and the last of what comes and goes with features.
            (0xE1, Class::None),
            (0x16FF, Class::None),
            (0x1700, Class::Host),
        ] {
            assert_eq!(class(number), wanted, "{number:#x}");
        }
    }
}
