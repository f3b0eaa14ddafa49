//! The attestation protocol (SVSM 7), and the one service that describes itself with it: the paravisor.
//!
//! RCX is the address of an operation; it names buffers for a report, a manifest of the services and
//! certificates, and where the caller's nonce is. RCX, RDX and R8 come back as the bytes of manifest,
//! certificates and report, also when a buffer is too small. The report's REPORT_DATA is
//! SHA-512(nonce ‖ manifest).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{CallId, Protocol};
use crate::guid::Guid;

/// The one version of the protocol.
pub const VERSION: u32 = 1;
/// Bytes of a nonce. Of any other length a guest could pass a manifest of its own as the end of a nonce, and
/// the hash would not tell.
pub const NONCE_SIZE: u16 = 64;
/// What the address of an operation is a multiple of.
pub const OPERATION_ALIGNMENT: u64 = 8;

open_enum! {
    /// Calls, lower half of RAX (SVSM 7).
    pub struct AttestationCall(u32) {
        /// A report on all services. RCX = GPA of a [`ServicesOperation`].
        SERVICES = 0,
        /// A report on one. RCX = GPA of a [`SingleServiceOperation`].
        SINGLE_SERVICE = 1,
    }
}

impl AttestationCall {
    /// RAX.
    #[must_use]
    pub const fn id(self) -> CallId {
        CallId {
            protocol: Protocol::ATTESTATION,
            call: self.0,
        }
    }
}

/// Where something is, or is to be put: a claim of the guest's.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Buffer {
    /// Its address.
    pub gpa: u64,
    /// Its bytes.
    pub size: u32,
    /// Reserved, zero.
    pub reserved: u32,
}

/// What SERVICES is passed. The nonce's size has 16 bits by the specification; what is above is reserved, so
/// that it may be read as 32 bits.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ServicesOperation {
    /// For the report; page aligned.
    pub report: Buffer,
    /// The nonce; anywhere.
    pub nonce: Buffer,
    /// For the manifest; page aligned.
    pub manifest: Buffer,
    /// For the certificates; page aligned. Of no size if they are not wanted.
    pub certificates: Buffer,
}

/// What SINGLE_SERVICE is passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SingleServiceOperation {
    /// As for all services.
    pub buffers: ServicesOperation,
    /// The service.
    pub service: Guid,
    /// Version of its manifest.
    pub manifest_version: u32,
    /// Reserved, zero.
    pub reserved: u32,
}

/// What the manifest of all services begins with; entries and the services' own manifests follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ManifestHeader {
    /// [`SERVICES_MANIFEST`].
    pub guid: Guid,
    /// Bytes of the whole manifest.
    pub size: u32,
    /// Number of entries.
    pub entries: u32,
}

/// One service in the manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ManifestEntry {
    /// The service.
    pub service: Guid,
    /// Where its own manifest begins, in bytes from the start of the whole.
    pub offset: u32,
    /// Bytes of its own manifest.
    pub size: u32,
}

/// What the manifest of all services begins with.
pub const SERVICES_MANIFEST: Guid = Guid::from_text("63849ebb-3d92-4670-a1ff-58f9c94b87bb");
/// The paravisor's own entry: [`TurnstileManifest`].
pub const TURNSTILE_SERVICE: Guid = Guid::from_text("0d8b1272-ffd4-4847-870f-9eaaf94c782e");

/// How memory is accepted and how far that has come (docs/protocol.md §6). Little endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TurnstileManifest {
    /// [`Self::VERSION`].
    pub version: u32,
    /// Bytes of this structure.
    pub size: u32,
    /// Number of the acceptance policy ([`crate::launch::AcceptPolicy`]).
    pub policy: u32,
    /// Number of the order ([`crate::launch::AcceptOrder`]).
    pub order: u32,
    /// Bytes that may be made ready before the guest asks.
    pub budget: u64,
    /// Regions of 2 MiB that are made ready behind a request.
    pub read_ahead: u32,
    /// Zero.
    pub reserved: u32,
    /// Bytes of memory that the map has a state for.
    pub memory_bytes: u64,
    /// Of these, bytes that were looked at for the next four: from the lowest address on, as many as one
    /// call may look at ([`super::turnstile::LARGEST_LOOK`]).
    pub counted_bytes: u64,
    /// Of the bytes counted: not accepted.
    pub unaccepted_bytes: u64,
    /// Of the bytes counted: made ready, not claimed.
    pub ahead_bytes: u64,
    /// Of the bytes counted: the guest's.
    pub accepted_bytes: u64,
    /// Of the bytes counted: the paravisor's, VMSAs and calling areas.
    pub owned_bytes: u64,
    /// Requests to accept what was accepted already: refused, nothing was validated.
    pub repeated_requests: u64,
    /// Lies of the host that were noticed. One about memory ends the VM, so nobody lives to report it; these
    /// are answers in the security processor's name that do not authenticate.
    pub host_lies: u64,
}

impl TurnstileManifest {
    /// The one version.
    pub const VERSION: u32 = 0;
}

/// The manifest of all services, as this paravisor makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ServicesManifest {
    /// One entry.
    pub header: ManifestHeader,
    /// It.
    pub entry: ManifestEntry,
    /// The paravisor's own.
    pub turnstile: TurnstileManifest,
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<ServicesOperation>() == 0x40);
    assert!(offset_of!(ServicesOperation, nonce) == 0x10);
    assert!(offset_of!(ServicesOperation, manifest) == 0x20);
    assert!(offset_of!(ServicesOperation, certificates) == 0x30);
    assert!(size_of::<SingleServiceOperation>() == 0x58);
    assert!(offset_of!(SingleServiceOperation, service) == 0x40);
    assert!(offset_of!(SingleServiceOperation, manifest_version) == 0x50);
    assert!(size_of::<ManifestHeader>() == 24);
    assert!(size_of::<ManifestEntry>() == 24);
    assert!(size_of::<TurnstileManifest>() == 96);
    assert!(offset_of!(TurnstileManifest, budget) == 16);
    assert!(offset_of!(TurnstileManifest, memory_bytes) == 32);
    assert!(offset_of!(TurnstileManifest, accepted_bytes) == 64);
    assert!(offset_of!(TurnstileManifest, host_lies) == 88);
    assert!(offset_of!(ServicesManifest, turnstile) == 48);
};

impl ServicesManifest {
    /// The manifest around the paravisor's own.
    #[must_use]
    pub const fn new(turnstile: TurnstileManifest) -> Self {
        Self {
            header: ManifestHeader {
                guid: SERVICES_MANIFEST,
                size: size_of::<Self>() as u32,
                entries: 1,
            },
            entry: ManifestEntry {
                service: TURNSTILE_SERVICE,
                offset: core::mem::offset_of!(Self, turnstile) as u32,
                size: size_of::<TurnstileManifest>() as u32,
            },
            turnstile,
        }
    }
}
