//! What an OVMF firmware image says about itself.

open_enum! {
    /// What an area of OVMF's SEV metadata is for (OVMF, `ResetVector/X64/OvmfSevMetadata.asm`).
    pub struct SectionKind(u32) {
        /// Memory that the firmware expects validated and zero before it runs.
        SEC_MEM = 1,
        /// The SNP secrets page.
        SECRETS = 2,
        /// The SNP CPUID page.
        CPUID = 3,
        /// The calling area of the boot processor, zero.
        SVSM_CAA = 4,
        /// Hashes of kernel, initrd and command line; zero when nobody supplies them.
        KERNEL_HASHES = 0x10,
    }
}
