//! The SNP secrets page, and what an SVSM adds to the guest's copy of it (SNP ABI, SNP_LAUNCH_UPDATE, secrets page;
//! SVSM 4.1; Linux `struct snp_secrets_page`).
//!
//! The launched page holds the keys of all four VMPLs. The paravisor hands on a copy; the keys
//! of levels more privileged than the guest must not be in it
//! ([`SecretsPage::forget_keys_above`]).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::addr::Vmpl;

/// The page.
#[derive(Clone, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SecretsPage {
    /// Version of the layout, 3 or more.
    pub version: u32,
    /// Bit 0: launched by an initial migration image.
    pub imi_enabled: u32,
    /// Family, model, stepping.
    pub fms: u32,
    /// Reserved.
    pub reserved_00c: u32,
    /// Guest OS visible workarounds.
    pub gosvw: [u8; 16],
    /// VM platform communication keys of VMPL 0 to 3.
    pub vmpck: [[u8; 32]; Vmpl::COUNT],
    /// Low halves of the message counters of the four keys, kept by the guest.
    pub message_count: [u32; Vmpl::COUNT],
    /// AP jump table, kept by the guest.
    pub ap_jump_table: u64,
    /// Kept by the guest.
    pub guest_area: [u8; 0x48],
    /// Which VMSA fields are disguised.
    pub vmsa_tweak_bitmap: [u8; 64],
    /// First byte of the SVSM's memory.
    pub svsm_base: u64,
    /// Bytes of the SVSM's memory; 0 means that there is no SVSM.
    pub svsm_size: u64,
    /// Calling area of the boot processor, GPA.
    pub svsm_caa: u64,
    /// Highest version of the core protocol.
    pub svsm_max_version: u32,
    /// The level the guest runs at.
    pub svsm_guest_vmpl: u8,
    /// Reserved.
    pub svsm_reserved: [u8; 3],
    /// Correction of the secure TSC frequency.
    pub tsc_factor: u32,
    /// Reserved.
    pub reserved_164: [u8; 3740],
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<SecretsPage>() == 4096);
    assert!(offset_of!(SecretsPage, gosvw) == 0x010);
    assert!(offset_of!(SecretsPage, vmpck) == 0x020);
    assert!(offset_of!(SecretsPage, message_count) == 0x0A0);
    assert!(offset_of!(SecretsPage, ap_jump_table) == 0x0B0);
    assert!(offset_of!(SecretsPage, vmsa_tweak_bitmap) == 0x100);
    assert!(offset_of!(SecretsPage, svsm_base) == 0x140);
    assert!(offset_of!(SecretsPage, svsm_size) == 0x148);
    assert!(offset_of!(SecretsPage, svsm_caa) == 0x150);
    assert!(offset_of!(SecretsPage, svsm_max_version) == 0x158);
    assert!(offset_of!(SecretsPage, svsm_guest_vmpl) == 0x15C);
    assert!(offset_of!(SecretsPage, tsc_factor) == 0x160);
};

impl SecretsPage {
    /// Lowest version with the layout above.
    pub const MIN_VERSION: u32 = 3;

    /// Zeroes the keys and counters of all levels more privileged than `guest`.
    ///
    /// With the key of a more privileged level the guest could have attestation reports signed
    /// that say they come from that level.
    pub fn forget_keys_above(&mut self, guest: Vmpl) {
        for (key, count) in self
            .vmpck
            .iter_mut()
            .zip(&mut self.message_count)
            .take(guest.index())
        {
            *key = [0; 32];
            *count = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromZeros;

    #[test]
    fn only_keys_of_more_privileged_levels_are_forgotten() {
        let mut page = SecretsPage::new_zeroed();
        page.vmpck = [[1; 32], [2; 32], [3; 32], [4; 32]];
        page.message_count = [1, 2, 3, 4];
        page.forget_keys_above(Vmpl::VMPL2);
        assert_eq!(page.vmpck, [[0; 32], [0; 32], [3; 32], [4; 32]]);
        assert_eq!(page.message_count, [0, 0, 3, 4]);
        page.forget_keys_above(Vmpl::VMPL0);
        assert_eq!(page.vmpck[2], [3; 32]);
    }
}
