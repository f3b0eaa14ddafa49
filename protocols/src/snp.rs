//! SEV-SNP instructions, permissions, faults, MSRs and CPUID bits (APM 15.34 to 15.36).

use bitflags::bitflags;

use crate::addr::{PageSize, Vmpl};

/// Vector of #VC; its error code is an [`crate::exit_code::ExitCode`].
pub const VC_VECTOR: u8 = 29;

/// MSR numbers (APM 15.34 to 15.36).
pub mod msr {
    /// The GHCB MSR: GHCB address or a request of [`crate::ghcb::msr`].
    pub const GHCB: u32 = 0xC001_0130;
    /// SEV_STATUS, read only: [`crate::vmsa::SevStatus`].
    pub const SEV_STATUS: u32 = 0xC001_0131;
}

/// Instruction bytes (APM volume 3; checked against GNU binutils 2.40).
pub mod opcode {
    /// PVALIDATE.
    pub const PVALIDATE: [u8; 4] = [0xF2, 0x0F, 0x01, 0xFF];
    /// RMPADJUST.
    pub const RMPADJUST: [u8; 4] = [0xF3, 0x0F, 0x01, 0xFE];
    /// RMPQUERY.
    pub const RMPQUERY: [u8; 4] = [0xF3, 0x0F, 0x01, 0xFD];
    /// VMGEXIT.
    pub const VMGEXIT: [u8; 4] = [0xF3, 0x0F, 0x01, 0xD9];
    /// VMMCALL; with a repeat prefix in front it is VMGEXIT.
    pub const VMMCALL: [u8; 3] = [0x0F, 0x01, 0xD9];
}

open_enum! {
    /// EAX of PVALIDATE, RMPADJUST and RMPQUERY (APM 15.36, volume 3).
    pub struct ReturnCode(u32) {
        /// Done. For PVALIDATE, CF = 1 says that nothing changed.
        SUCCESS = 0,
        /// An operand is invalid.
        FAIL_INPUT = 1,
        /// The level has no right to do this.
        FAIL_PERMISSION = 2,
        /// The page is in use.
        FAIL_IN_USE = 3,
        /// 4 KiB and 2 MiB entries overlap.
        FAIL_OVERLAP = 4,
        /// 2 MiB asked, 4 KiB found.
        FAIL_SIZE_MISMATCH = 6,
    }
}

/// Operands of PVALIDATE besides the virtual address in RAX (APM volume 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pvalidate {
    /// Size, ECX bit 0.
    pub size: PageSize,
    /// Validate or rescind, EDX bit 0.
    pub validate: bool,
}

impl Pvalidate {
    /// ECX.
    #[must_use]
    pub const fn ecx(self) -> u32 {
        self.size.encoding() as u32
    }

    /// EDX.
    #[must_use]
    pub const fn edx(self) -> u32 {
        self.validate as u32
    }

    /// Reads ECX and EDX; only their low bits count.
    #[must_use]
    pub const fn decode(ecx: u32, edx: u32) -> Self {
        let size = if ecx & 1 == 0 {
            PageSize::Size4K
        } else {
            PageSize::Size2M
        };
        Self {
            size,
            validate: edx & 1 != 0,
        }
    }
}

bitflags! {
    /// What a VMPL may do with a page (APM table 15-36). Unknown bits are kept.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Permissions: u8 {
        /// Read.
        const READ = 1 << 0;
        /// Write.
        const WRITE = 1 << 1;
        /// Execute in user mode.
        const EXECUTE_USER = 1 << 2;
        /// Execute in supervisor mode.
        const EXECUTE_SUPERVISOR = 1 << 3;
        /// Supervisor shadow stack.
        const SHADOW_STACK = 1 << 4;
        const _ = !0;
    }
}

impl Permissions {
    /// Read, write and both kinds of execution: what a guest gets of its own memory.
    pub const FULL: Self = Self::READ
        .union(Self::WRITE)
        .union(Self::EXECUTE_USER)
        .union(Self::EXECUTE_SUPERVISOR);
}

/// RDX of RMPADJUST, and RDX after RMPQUERY: target level 7:0, permissions 15:8, VMSA 16
/// (APM volume 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RmpAdjust(pub u64);

impl RmpAdjust {
    const VMSA: u64 = 1 << 16;

    /// Sets the permissions of `target`, and whether the page is a VMSA.
    #[must_use]
    pub const fn new(target: Vmpl, permissions: Permissions, vmsa: bool) -> Self {
        let vmsa = if vmsa { Self::VMSA } else { 0 };
        Self(target.number() as u64 | (permissions.bits() as u64) << 8 | vmsa)
    }

    /// Number of the target level as given; may be one that does not exist.
    #[must_use]
    pub const fn target(self) -> u8 {
        self.0 as u8
    }

    /// The permissions.
    #[must_use]
    pub const fn permissions(self) -> Permissions {
        Permissions::from_bits_retain((self.0 >> 8) as u8)
    }

    /// Whether one of bits 63:17 is set.
    #[must_use]
    pub const fn has_reserved_bits(self) -> bool {
        self.0 >> 17 != 0
    }

    /// Whether the page is to be a VMSA.
    #[must_use]
    pub const fn is_vmsa(self) -> bool {
        self.0 & Self::VMSA != 0
    }
}

bitflags! {
    /// EXITINFO1 of a nested page fault (APM 15.25.6 and 15.36.10).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct NestedFault: u64 {
        /// The page was present.
        const PRESENT = 1 << 0;
        /// A write.
        const WRITE = 1 << 1;
        /// In user mode (as the nested walk sees it).
        const USER = 1 << 2;
        /// A reserved bit was set: MMIO.
        const RESERVED = 1 << 3;
        /// An instruction fetch.
        const FETCH = 1 << 4;
        /// A shadow stack access.
        const SHADOW_STACK = 1 << 6;
        /// An RMP or VMPL check failed.
        const RMP = 1 << 31;
        /// On the final address.
        const FINAL_ADDRESS = 1 << 32;
        /// While walking the guest's page tables.
        const GUEST_WALK = 1 << 33;
        /// The access was to private memory.
        const ENCRYPTED = 1 << 34;
        /// The sizes of instruction and RMP entry differ.
        const SIZE_MISMATCH = 1 << 35;
        /// The VMPL had no permission.
        const VMPL = 1 << 36;
        const _ = !0;
    }
}

/// CPUID leaf with the SEV features (APM volume 3, appendix E).
pub const CPUID_SEV_LEAF: u32 = 0x8000_001F;

bitflags! {
    /// EAX of [`CPUID_SEV_LEAF`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct SevCpuid: u32 {
        /// SME.
        const SME = 1 << 0;
        /// SEV.
        const SEV = 1 << 1;
        /// SEV-ES.
        const SEV_ES = 1 << 3;
        /// SEV-SNP.
        const SEV_SNP = 1 << 4;
        /// VMPLs.
        const VMPL = 1 << 5;
        /// RMPQUERY.
        const RMPQUERY = 1 << 6;
        /// An SVSM is present; set by software only (SVSM 4.2).
        const SVSM = 1 << 28;
        const _ = !0;
    }
}

/// EBX of [`CPUID_SEV_LEAF`]: C-bit position 5:0, address bits lost 11:6, VMPLs 15:12, cache
/// flush on validation not needed 31.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SevCpuidEbx(pub u32);

impl SevCpuidEbx {
    /// Bit 31: no need to touch every page after validating it.
    pub const COHERENCY_SFW_NO: u32 = 1 << 31;

    /// Position of the C-bit.
    #[must_use]
    pub const fn c_bit(self) -> u32 {
        self.0 & 0x3F
    }

    /// How many VMPLs there are.
    #[must_use]
    pub const fn vmpl_count(self) -> u32 {
        self.0 >> 12 & 0xF
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rmpadjust_has_the_documented_bits() {
        let adjust = RmpAdjust::new(Vmpl::VMPL1, Permissions::FULL, false);
        assert_eq!(adjust.0, 0x0F01);
        let vmsa = RmpAdjust::new(Vmpl::VMPL2, Permissions::empty(), true);
        assert_eq!(vmsa.0, 0x1_0002);
        assert!(vmsa.is_vmsa() && !vmsa.has_reserved_bits());
        assert!(RmpAdjust(1 << 17).has_reserved_bits());
        assert_eq!(RmpAdjust(0xFF07).target(), 7);
        assert_eq!(RmpAdjust(0xFF07).permissions().bits(), 0xFF);
    }

    #[test]
    fn pvalidate_uses_the_low_bits_only() {
        let operands = Pvalidate {
            size: PageSize::Size2M,
            validate: true,
        };
        assert_eq!((operands.ecx(), operands.edx()), (1, 1));
        assert_eq!(Pvalidate::decode(0xFFFF_FFFF, 0x101), operands);
        assert_eq!(
            Pvalidate::decode(2, 2),
            Pvalidate {
                size: PageSize::Size4K,
                validate: false
            }
        );
    }

    #[test]
    fn the_sev_leaf_unpacks() {
        let ebx = SevCpuidEbx(47 | 4 << 12 | SevCpuidEbx::COHERENCY_SFW_NO);
        assert_eq!((ebx.c_bit(), ebx.vmpl_count()), (47, 4));
    }
}
