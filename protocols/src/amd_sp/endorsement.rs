//! What the emulated security processor is given of a chip's identity: our own format.
//!
//! Whoever makes the certificates makes it with them, and the machine finds both in fw_cfg. A real chip has
//! it in fuses.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The file.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Endorsement {
    /// The private half of the VCEK: a scalar of P-384, big endian.
    pub vcek: [u8; 48],
    /// CHIP_ID.
    pub chip_id: [u8; 64],
    /// The version that the VCEK was made for, REPORTED_TCB.
    pub tcb: u64,
}

const _: () = assert!(size_of::<Endorsement>() == 120);
