//! Which processor states a launch takes.
//!
//! QEMU passes on only some fields of a VMSA and refuses files that set others (QEMU
//! `target/i386/sev.c`); KVM launches every VMSA at one address. On top of that the machine
//! refuses what it could not run.

use core::mem::offset_of;
use core::ops::Range;

use protocols::vmsa::{Efer, LAUNCH_GPA, Vmsa};

use super::LaunchError;
use crate::types::Gpa;
use crate::vcpu::SEV_FEATURES;

/// Where KVM launches VMSAs.
pub const VMSA_GPA: Gpa = Gpa::new(LAUNCH_GPA);

/// Fields that may be set (APM volume 2, appendix B, table B-4; QEMU
/// `check_vmsa_supported`). Ascending.
const ALLOWED: [Range<usize>; 13] = [
    0x000..0x0A0, // ES CS SS DS FS GS GDTR LDTR IDTR TR
    0x0D0..0x0D8, // EFER
    0x148..0x160, // CR4 CR3 CR0
    0x160..0x180, // DR7 DR6 RFLAGS RIP
    0x1D8..0x1E0, // RSP
    0x1F8..0x200, // RAX
    0x268..0x270, // G_PAT
    0x308..0x320, // RCX RDX RBX
    0x328..0x380, // RBP RSI RDI R8 to R15
    0x3B0..0x3B8, // SEV_FEATURES
    0x3E8..0x3F0, // XCR0
    0x408..0x40C, // MXCSR
    0x410..0x412, // x87 FCW
];

const EFER: usize = offset_of!(Vmsa, efer);
const FEATURES: usize = offset_of!(Vmsa, sev_features);

/// Checks the context of one virtual processor.
pub fn check(gpa: Gpa, vp_index: u16, vmsa: &[u8; 4096]) -> Result<(), LaunchError> {
    // Further processors are started by the guest; KVM would measure each of them.
    if vp_index != 0 {
        return Err(LaunchError::VpIndex(vp_index));
    }
    if gpa != VMSA_GPA {
        return Err(LaunchError::VmsaAddress(gpa));
    }
    let mut next = 0;
    for range in ALLOWED.into_iter().chain(core::iter::once(4096..4096)) {
        if let Some(offset) = first_non_zero(vmsa, next..range.start) {
            return Err(LaunchError::VmsaField(offset));
        }
        next = range.end;
    }
    if word(vmsa, FEATURES) != SEV_FEATURES {
        return Err(LaunchError::VmsaField(FEATURES));
    }
    if word(vmsa, EFER) & Efer::SVME.bits() == 0 {
        return Err(LaunchError::VmsaField(EFER));
    }
    Ok(())
}

/// Offset of the first byte in `range` that is set.
fn first_non_zero(vmsa: &[u8; 4096], range: Range<usize>) -> Option<usize> {
    let start = range.start;
    vmsa[range]
        .iter()
        .position(|&byte| byte != 0)
        .map(|offset| start + offset)
}

/// The 64-bit field at a constant offset.
fn word(vmsa: &[u8; 4096], offset: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&vmsa[offset..offset + 8]);
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> [u8; 4096] {
        let mut vmsa = [0; 4096];
        vmsa[FEATURES] = 1;
        vmsa[EFER + 1] = 0x10;
        vmsa
    }

    #[test]
    fn the_list_of_fields_is_sorted() {
        assert!(ALLOWED.windows(2).all(|pair| pair[0].end <= pair[1].start));
    }

    #[test]
    fn a_plain_state_is_taken() {
        assert_eq!(check(VMSA_GPA, 0, &good()), Ok(()));
    }

    /// `igvm.md` §8, "QEMU SNP VMSA rules".
    #[test]
    fn what_qemu_refuses_is_refused() {
        let mut feature = good();
        feature[FEATURES] |= 1 << 3;
        assert_eq!(
            check(VMSA_GPA, 0, &feature),
            Err(LaunchError::VmsaField(FEATURES))
        );
        for offset in [0xCA, 0x140, 0x2EC, 0x3B8, 0x3C8, 0x670, 0xFFF] {
            let mut vmsa = good();
            vmsa[offset] = 1;
            assert_eq!(
                check(VMSA_GPA, 0, &vmsa),
                Err(LaunchError::VmsaField(offset))
            );
        }
        let elsewhere = Gpa::new(0x1000);
        assert_eq!(
            check(elsewhere, 0, &good()),
            Err(LaunchError::VmsaAddress(elsewhere))
        );
        assert_eq!(check(VMSA_GPA, 1, &good()), Err(LaunchError::VpIndex(1)));
    }

    #[test]
    fn what_cannot_run_is_refused() {
        let mut vmsa = good();
        vmsa[EFER + 1] = 0;
        assert_eq!(check(VMSA_GPA, 0, &vmsa), Err(LaunchError::VmsaField(EFER)));
    }
}
