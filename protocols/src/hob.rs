//! Hand-off blocks: how a platform tells a firmware about memory (UEFI Platform Initialization,
//! volume 3, §5; TDVF, "TD HOB").

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

open_enum! {
    /// What a block is.
    pub struct HobType(u16) {
        /// The first one.
        HANDOFF = 0x0001,
        /// A stretch of the address space.
        RESOURCE_DESCRIPTOR = 0x0003,
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

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<Header>() == 8);
    assert!(size_of::<Handoff>() == 56);
    assert!(offset_of!(Handoff, end_of_list) == 48);
    assert!(size_of::<Resource>() == 48);
    assert!(offset_of!(Resource, start) == 32);
};
