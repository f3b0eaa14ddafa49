//! Hand-off blocks: how a platform tells a firmware about memory (UEFI Platform Initialization,
//! volume 3, §5; TDVF, "TD HOB").

use crate::guid::Guid;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

open_enum! {
    /// What a block is.
    pub struct HobType(u16) {
        /// The first one.
        HANDOFF = 0x0001,
        /// A stretch of the address space.
        RESOURCE_DESCRIPTOR = 0x0003,
        /// What a GUID says.
        GUID_EXTENSION = 0x0004,
        /// The last one.
        END = 0xFFFF,
    }
}

open_enum! {
    /// What is in a stretch of the address space.
    pub struct ResourceType(u32) {
        /// Memory to be used.
        SYSTEM_MEMORY = 0,
        /// Memory that the guest has not accepted.
        UNACCEPTED = 7,
    }
}

bitflags::bitflags! {
    /// What is known about it.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ResourceAttributes: u32 {
        /// It is there.
        const PRESENT = 1 << 0;
        /// It holds defined values.
        const INITIALIZED = 1 << 1;
        /// It works.
        const TESTED = 1 << 2;
    }
}

/// Head of every block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// [`HobType`].
    pub kind: u16,
    /// Bytes, this head included.
    pub length: u16,
    /// Zero.
    pub reserved: u32,
}

/// The first block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Handoff {
    /// Head.
    pub header: Header,
    /// [`Handoff::VERSION`].
    pub version: u32,
    /// 0: a full boot.
    pub boot_mode: u32,
    /// Not used here.
    pub memory: [u64; 4],
    /// Address of the last block.
    pub end_of_list: u64,
}

impl Handoff {
    /// Version of the list.
    pub const VERSION: u32 = 9;
}

/// A stretch of the address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Resource {
    /// Head.
    pub header: Header,
    /// GUID of who owns it; zero.
    pub owner: [u64; 2],
    /// [`ResourceType`].
    pub kind: u32,
    /// [`ResourceAttributes`].
    pub attributes: u32,
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub bytes: u64,
}

open_enum! {
    /// What an image hands to OVMF (OVMF, `Include/IndustryStandard/IgvmData.h`).
    pub struct IgvmDataKind(u32) {
        /// Platform key, a list of signatures.
        PK = 0x100,
        /// Keys that may change the next two.
        KEK = 0x101,
        /// What may be started.
        DB = 0x102,
        /// What may not.
        DBX = 0x103,
        /// A program to be started with the kernel as what it starts.
        SHIM = 0x200,
        /// A kernel: any EFI program.
        KERNEL = 0x201,
    }
}

/// Something that the image hands to OVMF. (OVMF, `PlatformInitLib/Igvm.c`: the list ends at the first
/// block of another kind.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IgvmData {
    /// Head.
    pub header: Header,
    /// [`IgvmData::GUID`].
    pub name: Guid,
    /// First byte, page aligned.
    pub address: u64,
    /// Bytes.
    pub bytes: u64,
    /// What it is.
    pub kind: IgvmDataKind,
    /// Zero.
    pub flags: u32,
}

impl IgvmData {
    /// What says that a block is one of these.
    pub const GUID: Guid = Guid::from_text("3dd177ff-b632-4e25-bef3-065063d55fc4");

    /// The block for so many bytes at an address.
    #[must_use]
    pub const fn new(kind: IgvmDataKind, address: u64, bytes: u64) -> Self {
        Self {
            header: Header {
                kind: HobType::GUID_EXTENSION.0,
                length: size_of::<Self>() as u16,
                reserved: 0,
            },
            name: Self::GUID,
            address,
            bytes,
            kind,
            flags: 0,
        }
    }
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<IgvmData>() == 48);
    assert!(offset_of!(IgvmData, address) == 24);
    assert!(offset_of!(IgvmData, kind) == 40);
    assert!(size_of::<Header>() == 8);
    assert!(size_of::<Handoff>() == 56);
    assert!(offset_of!(Handoff, end_of_list) == 48);
    assert!(size_of::<Resource>() == 48);
    assert!(offset_of!(Resource, start) == 32);
};
