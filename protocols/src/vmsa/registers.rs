//! Fields of the VMSA that are more than a number: segments and sets of named bits.

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A segment register or descriptor table register.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Segment {
    /// Selector; 0 for descriptor tables.
    pub selector: u16,
    /// Packed descriptor bits.
    pub attributes: SegmentAttributes,
    /// Limit in bytes (granularity already applied).
    pub limit: u32,
    /// Linear base address.
    pub base: u64,
}

const _: () = assert!(size_of::<Segment>() == 16);

/// Descriptor bits packed into 12: type 3:0, S 4, DPL 6:5, P 7, AVL 8, L 9, D/B 10, G 11
/// (APM 15.5.1, appendix B).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct SegmentAttributes(pub u16);

impl SegmentAttributes {
    /// Present, code, read, accessed; 16 bit. Reset value of CS.
    pub const CODE16: Self = Self(0x009B);
    /// Present, code, read, accessed; 64 bit, 4 KiB granular.
    pub const CODE64: Self = Self(0x0A9B);
    /// Present, data, write, accessed; byte granular. Reset value of the data segments.
    pub const DATA16: Self = Self(0x0093);
    /// Present, data, write, accessed; 32 bit, 4 KiB granular.
    pub const DATA32: Self = Self(0x0C93);
    /// Present LDT. Reset value of LDTR.
    pub const LDT: Self = Self(0x0082);
    /// Present busy TSS. Reset value of TR.
    pub const TSS_BUSY: Self = Self(0x008B);

    /// Descriptor privilege level.
    #[must_use]
    pub const fn dpl(self) -> u8 {
        (self.0 >> 5 & 3) as u8
    }

    /// Whether a code segment is a 64-bit one.
    #[must_use]
    pub const fn is_long(self) -> bool {
        self.0 & 1 << 9 != 0
    }
}

/// Defines a bit set over a wire integer with the zerocopy traits of that integer; unknown
/// bits are kept.
macro_rules! wire_flags {
    (
        $(#[$meta:meta])* pub struct $name:ident($repr:ty) {
            $( $(#[$flag_meta:ident $($args:tt)*])* const $flag:ident = $value:expr; )+
        }
    ) => {
        $(#[$meta])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable,
            KnownLayout,
        )]
        #[repr(transparent)]
        pub struct $name(pub $repr);

        bitflags! {
            impl $name: $repr {
                $( $(#[$flag_meta $($args)*])* const $flag = $value; )+
                // Bits without a name are kept: they may mean something to newer parties.
                const _ = !0;
            }
        }
    };
}

wire_flags! {
    /// EFER (APM 3.1.7), the bits a VMSA needs.
    pub struct Efer(u64) {
        /// SYSCALL enabled.
        const SCE = 1 << 0;
        /// Long mode enabled.
        const LME = 1 << 8;
        /// Long mode active.
        const LMA = 1 << 10;
        /// No-execute enabled.
        const NXE = 1 << 11;
        /// SVM enabled; VMRUN refuses a VMSA without it (APM 15.36.16).
        const SVME = 1 << 12;
    }
}

wire_flags! {
    /// SEV_FEATURES, VMSA offset 0x3B0 (APM appendix B, table B-4).
    pub struct SevFeatures(u64) {
        /// SEV-SNP is active.
        const SNP_ACTIVE = 1 << 0;
        /// Virtual top of memory.
        const VTOM = 1 << 1;
        /// #VC is reflected to a higher VMPL.
        const REFLECT_VC = 1 << 2;
        /// Only #HV may be injected.
        const RESTRICTED_INJECTION = 1 << 3;
        /// Injection fields come from the VMSA.
        const ALTERNATE_INJECTION = 1 << 4;
        /// Debug registers are swapped.
        const DEBUG_VIRTUALIZATION = 1 << 5;
        /// The host may not use IBS.
        const PREVENT_HOST_IBS = 1 << 6;
        /// Branch target buffer isolation.
        const BTB_ISOLATION = 1 << 7;
        /// Supervisor shadow stack permission of VMPLs.
        const VMPL_SSS = 1 << 8;
        /// Secure TSC.
        const SECURE_TSC = 1 << 9;
        /// VMGEXIT parameter.
        const VMGEXIT_PARAMETER = 1 << 10;
        /// Performance counters virtualized.
        const PMC_VIRTUALIZATION = 1 << 11;
        /// IBS virtualized.
        const IBS_VIRTUALIZATION = 1 << 12;
        /// Guest intercept control.
        const GUEST_INTERCEPT_CONTROL = 1 << 13;
        /// Register protection of the VMSA.
        const VMSA_REGISTER_PROTECTION = 1 << 14;
        /// SMT protection.
        const SMT_PROTECTION = 1 << 15;
        /// Secure AVIC.
        const SECURE_AVIC = 1 << 16;
        /// Branch prediction barrier on entry.
        const IBPB_ON_ENTRY = 1 << 21;
    }
}

wire_flags! {
    /// SEV_STATUS, MSR 0xC001_0131 (APM 15.34.10). Bit n + 2 mirrors bit n of
    /// [`SevFeatures`]; only the two extra bits and SNP are named here.
    pub struct SevStatus(u64) {
        /// SEV is active.
        const SEV = 1 << 0;
        /// SEV-ES is active.
        const SEV_ES = 1 << 1;
        /// SEV-SNP is active.
        const SEV_SNP = 1 << 2;
    }
}

impl SevStatus {
    /// What SEV_STATUS reads with these features in the VMSA.
    #[must_use]
    pub const fn of(features: SevFeatures) -> Self {
        Self(Self::SEV.0 | Self::SEV_ES.0 | features.0 << 2)
    }

    /// The features as SEV_STATUS shows them.
    #[must_use]
    pub const fn features(self) -> SevFeatures {
        SevFeatures(self.0 >> 2)
    }
}

wire_flags! {
    /// VINTR_CTRL, VMSA offset 0x3B8 (APM appendix B). Bits 7:0 are V_TPR, 19:16 the
    /// priority, 39:32 the vector.
    pub struct VintrControl(u64) {
        /// An interrupt is pending.
        const V_IRQ = 1 << 8;
        /// Virtual GIF.
        const V_GIF = 1 << 9;
        /// Interrupt shadow.
        const INTERRUPT_SHADOW = 1 << 10;
        /// An NMI is pending.
        const V_NMI = 1 << 11;
        /// NMIs are masked.
        const V_NMI_MASK = 1 << 12;
        /// Ignore V_TPR.
        const V_IGNORE_TPR = 1 << 20;
        /// NMI virtualization.
        const V_NMI_ENABLE = 1 << 26;
        /// The processor cannot be run (APM 15.36.16).
        const BUSY = 1 << 63;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_mirrors_features() {
        assert_eq!(SevStatus::of(SevFeatures::SNP_ACTIVE).0, 7);
        let features = SevFeatures::SNP_ACTIVE | SevFeatures::SECURE_TSC;
        assert_eq!(SevStatus::of(features).0, 7 | 1 << 11);
        assert_eq!(SevStatus::of(features).features(), features);
    }

    #[test]
    fn unknown_feature_bits_are_kept() {
        let odd = SevFeatures(1 << 40 | 1);
        assert_eq!(odd.difference(SevFeatures::SNP_ACTIVE).0, 1 << 40);
        assert_eq!(SevFeatures::from_bits_retain(odd.bits()), odd);
    }

    #[test]
    fn attributes_unpack() {
        assert!(SegmentAttributes::CODE64.is_long());
        assert!(!SegmentAttributes::DATA32.is_long());
        assert_eq!(SegmentAttributes(0xF3).dpl(), 3);
    }
}
