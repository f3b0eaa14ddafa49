//! Which guest policies are launched (`snp-launch.md` §1).
//!
//! The host (Linux, KVM) looks at the bits that have a value of their own, the firmware at the version of its
//! ABI that the guest asks for.

use core::fmt;

use super::LaunchError;
use crate::amd_sp::FIRMWARE;

/// Bit that must be one (SNP ABI, guest policy).
const MUST_BE_ONE: u64 = 1 << 17;
/// Bits that mean nothing.
const RESERVED: u64 = !0 << 26;
/// The policy of a file that has none: QEMU's own, SMT allowed.
pub(super) const DEFAULT: u64 = 1 << 16 | MUST_BE_ONE;

/// A version of the firmware's ABI. The major number decides first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct AbiVersion {
    /// Bits 15:8 of a policy.
    pub major: u8,
    /// Bits 7:0.
    pub minor: u8,
}

impl AbiVersion {
    /// That of the firmware here.
    pub const OWN: Self = Self {
        major: FIRMWARE.major,
        minor: FIRMWARE.minor,
    };

    /// The least that a policy asks for.
    const fn asked_by(policy: u64) -> Self {
        let [minor, major, ..] = policy.to_le_bytes();
        Self { major, minor }
    }
}

impl fmt::Display for AbiVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// Checks the policy of a guest on SEV-SNP.
pub(super) fn check(policy: u64) -> Result<(), LaunchError> {
    if policy & MUST_BE_ONE == 0 || policy & RESERVED != 0 {
        return Err(LaunchError::Policy(policy));
    }
    let asked = AbiVersion::asked_by(policy);
    if asked > AbiVersion::OWN {
        return Err(LaunchError::Abi(asked));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use alloc::format;

    use super::*;

    #[test]
    fn the_firmware_is_as_new_as_the_guest_asks() {
        let asked =
            |major: u8, minor: u8| check(DEFAULT | u64::from(u16::from_le_bytes([minor, major])));
        let AbiVersion { major, minor } = AbiVersion::OWN;
        for (major, minor) in [(0, 0), (0, 255), (major, 0), (major, minor)] {
            assert_eq!(asked(major, minor), Ok(()), "{major}.{minor}");
        }
        for (major, minor) in [(major, minor + 1), (major + 1, 0), (255, 255)] {
            let refused = LaunchError::Abi(AbiVersion { major, minor });
            assert_eq!(asked(major, minor), Err(refused));
        }
        let text = format!("{}", LaunchError::Abi(AbiVersion { major: 9, minor: 7 }));
        for words in ["9.7", "1.55", "POLICY_FAILURE (0x07)"] {
            assert!(text.contains(words), "{text}");
        }
    }

    #[test]
    fn bits_with_a_value_of_their_own_have_it() {
        assert_eq!(check(DEFAULT), Ok(()));
        for policy in [1 << 16, DEFAULT | 1 << 26, DEFAULT | 1 << 63] {
            assert_eq!(check(policy), Err(LaunchError::Policy(policy)));
        }
    }
}
