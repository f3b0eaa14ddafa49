//! Identifiers of the fields that TDG.VM.RD, TDG.VM.WR, TDG.VP.RD, TDG.VP.WR and TDG.SYS.RD know.
//!
//! An identifier has more in it than the name of a field: sizes, and the context, which the leaves
//! ignore because each has its own. Class and code are the name.

/// Bits 23:0 (code) and 61:56 (class).
const NAME: u64 = 0x3F00_0000_00FF_FFFF;
/// Bits 46:38 and 37:34: more than one field or element is meant.
const SEVERAL: u64 = 0x0000_7FFC_0000_0000;

/// A field identifier.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FieldId(pub u64);

impl FieldId {
    /// No field: what TDG.VM.RD version 1 takes for "the first one" and gives behind the last.
    pub const NONE: Self = Self(u64::MAX);

    /// TDCS.CONFIG_FLAGS: see [`ConfigFlags`].
    pub const CONFIG_FLAGS: Self = Self(0x1110_0003_0000_0016);
    /// TDCS.TD_CTLS: see [`TdControls`].
    pub const TD_CTLS: Self = Self(0x1110_0003_0000_0017);
    /// TDCS.NOTIFY_ENABLES: bit 0 asks for a #VE when the host single-steps the guest.
    pub const NOTIFY_ENABLES: Self = Self(0x9100_0000_0000_0010);
    /// TDCS.TOPOLOGY_ENUM_CONFIGURED: whether the host has told the topology.
    pub const TOPOLOGY_ENUM_CONFIGURED: Self = Self(0x9100_0000_0000_0019);
    /// TDCS.NUM_L2_VMS.
    pub const NUM_L2_VMS: Self = Self(0x9010_0001_0000_0005);
    /// TDX_FEATURES0 of the module.
    pub const TDX_FEATURES0: Self = Self(0x0A00_0003_0000_0008);

    /// TDVPS.L2_CTLS of an L2 VM: see [`L2Controls`].
    #[must_use]
    pub const fn l2_ctls(vm: super::L2Vm) -> Self {
        Self(0xA020_0003_0000_0050 + vm as u64)
    }

    /// Whether both name the same field.
    #[must_use]
    pub const fn is(self, other: Self) -> bool {
        self.0 & NAME == other.0 & NAME
    }

    /// The code: which field of its class.
    #[must_use]
    pub const fn code(self) -> u32 {
        (self.0 & 0xFF_FFFF) as u32
    }

    /// The class.
    #[must_use]
    pub const fn class(self) -> u64 {
        self.0 >> 56 & 0x3F
    }

    /// Whether one element of one field is meant.
    #[must_use]
    pub const fn is_single(self) -> bool {
        self.0 & SEVERAL == 0
    }
}

bitflags::bitflags! {
    /// TDCS.CONFIG_FLAGS.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ConfigFlags: u64 {
        /// Guest-physical addresses have 52 bits, not 48.
        const GPAW = 1 << 0;
        /// The guest may decide about [`TdControls::PENDING_VE_DISABLE`].
        const FLEXIBLE_PENDING_VE = 1 << 1;
        /// RBP is never passed to the host.
        const NO_RBP_MOD = 1 << 2;
    }

    /// TDX_FEATURES0.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features0: u64 {
        /// There can be L2 VMs.
        const TD_PARTITIONING = 1 << 7;
    }

    /// TDCS.TD_CTLS.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct TdControls: u64 {
        /// An access to a page that is not accepted goes to the host instead of raising #VE.
        const PENDING_VE_DISABLE = 1 << 0;
    }

    /// TDVPS.L2_CTLS.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct L2Controls: u64 {
        /// The L2 VM may use shared memory.
        const ENABLE_SHARED_EPTP = 1 << 0;
        /// TDG.VP.VMCALL of the L2 VM goes straight to the host.
        const ENABLE_TDVMCALL = 1 << 1;
        /// The L2 VM gets #VE.
        const ENABLE_EXTENDED_VE = 1 << 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_and_sizes_are_not_part_of_a_fields_name() {
        // Bit 63 and the context differ.
        assert!(FieldId(0x9110_0003_0000_0016).is(FieldId::CONFIG_FLAGS));
        assert!(FieldId(0x1100_0003_0000_0016).is(FieldId::CONFIG_FLAGS));
        assert!(!FieldId::TD_CTLS.is(FieldId::CONFIG_FLAGS));
        assert!(
            !FieldId::l2_ctls(crate::tdx::L2Vm::Vm1).is(FieldId::l2_ctls(crate::tdx::L2Vm::Vm2))
        );
    }

    #[test]
    fn several_elements_are_not_a_single_one() {
        assert!(FieldId::NUM_L2_VMS.is_single());
        assert!(!FieldId(FieldId::NUM_L2_VMS.0 | 1 << 34).is_single());
        assert!(!FieldId(FieldId::NUM_L2_VMS.0 | 1 << 38).is_single());
        assert!(!FieldId::NONE.is_single());
    }
}
