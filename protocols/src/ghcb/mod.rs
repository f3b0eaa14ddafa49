//! The GHCB: how a guest asks its host for something (GHCB, protocol version 2).
//!
//! - [`page`]: the shared page, its fields and valid bits.
//! - [`msr`]: requests that fit into the GHCB MSR.
//! - [`psc`]: the page state change list.
//! - [`event`]: encodings of the page's exit information (AP creation, port access, …).
//!
//! The page is shared memory. Each side copies what it needs once and then looks at its copy;
//! nothing in a reply proves anything about memory.

pub mod event;
pub mod msr;
pub mod page;
pub mod psc;

use bitflags::bitflags;

/// The protocol version of this crate and the only one SNP can use (GHCB, protocol negotiation).
pub const PROTOCOL_VERSION: u16 = 2;

bitflags! {
    /// What the host offers (GHCB, hypervisor features: MSR response 0x081 and event 0x8000_FFFD). Unknown
    /// bits are kept.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct HypervisorFeatures: u64 {
        /// SEV-SNP: GHCB registration, page state changes, guest requests.
        const SNP = 1 << 0;
        /// AP creation.
        const AP_CREATION = 1 << 1;
        /// Restricted injection: doorbell page and IPI.
        const RESTRICTED_INJECTION = 1 << 2;
        /// Timer under restricted injection.
        const HV_TIMER = 1 << 3;
        /// List of APIC IDs.
        const APIC_ID_LIST = 1 << 4;
        /// Run another VMPL.
        const MULTI_VMPL = 1 << 5;
        /// Page state changes for SEV-ES guests.
        const SEV_ES_PAGE_STATE_CHANGE = 1 << 6;
        /// Trusted I/O.
        const TRUSTED_IO = 1 << 7;
        /// A registered GHCB can be given up.
        const GHCB_UNREGISTER = 1 << 8;
        const _ = !0;
    }
}

impl HypervisorFeatures {
    /// What a paravisor cannot do without (SVSM 2).
    pub const NEEDED_BY_PARAVISOR: Self =
        Self::SNP.union(Self::AP_CREATION).union(Self::MULTI_VMPL);
}

open_enum! {
    /// What a page state change does (GHCB, SNP page state change); 4 bits on the wire.
    pub struct PageOperation(u8) {
        /// Assign to the guest.
        PRIVATE = 1,
        /// Give to the host.
        SHARED = 2,
        /// Hint: split the RMP entry.
        PSMASH = 3,
        /// Hint: merge RMP entries.
        UNSMASH = 4,
    }
}
