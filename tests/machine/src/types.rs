//! The words of the machine that are not wire formats: system addresses, aliases, accesses.
//!
//! Guest-physical addresses, page sizes and privilege levels are those of
//! [`protocols::addr`]. A [`Gpa`] never carries the C-bit; which half of the guest-physical
//! space an access used is an [`Alias`].

use core::fmt;

pub use protocols::addr::{Gpa, PAGE_SIZE, PageSize, Vmpl};

/// 4 KiB pages in a 2 MiB block.
pub const PAGES_PER_BLOCK: usize = protocols::addr::PAGES_PER_LARGE_PAGE as usize;

/// A system-physical address in bytes: what QEMU calls guest-physical.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Spa(u64);

impl Spa {
    /// Takes any number; whether there is memory is the layout's to say.
    pub const fn new(address: u64) -> Self {
        Self(address)
    }

    /// The address in bytes.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The address `bytes` further on; stays at the top instead of wrapping, so that an
    /// address made of guest input can become too large but never small again.
    #[inline(always)]
    pub const fn plus(self, bytes: u64) -> Self {
        Self(self.0.saturating_add(bytes))
    }
}

impl fmt::Display for Spa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for Spa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Spa({:#x})", self.0)
    }
}

/// The half of the guest-physical space an access went to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Alias {
    /// C-bit set, or paging off (when everything is private).
    Private,
    /// C-bit clear.
    Shared,
}

/// What an access wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Data read.
    Read,
    /// Data write, or read-modify-write.
    Write,
    /// Instruction fetch: private whatever the C-bit says (APM Table 15-39).
    Execute,
    /// Guest page-table walk with its accessed/dirty update: private whatever the C-bit says.
    Walk,
}

impl Kind {
    /// The half of the address space the access is checked in: the guest's C-bit counts for
    /// data only.
    pub const fn effective_alias(self, alias: Alias) -> Alias {
        match self {
            Self::Read | Self::Write => alias,
            Self::Execute | Self::Walk => Alias::Private,
        }
    }
}

/// Number of a virtual CPU; equals its index and its APIC id on this machine.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct VcpuId(pub u32);

impl VcpuId {
    /// As an index into per-vCPU tables.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_addresses_saturate_at_the_top() {
        assert_eq!(Spa::new(u64::MAX - 1).plus(PAGE_SIZE).get(), u64::MAX);
    }

    #[test]
    fn fetches_and_walks_ignore_the_c_bit() {
        assert_eq!(Kind::Execute.effective_alias(Alias::Shared), Alias::Private);
        assert_eq!(Kind::Walk.effective_alias(Alias::Shared), Alias::Private);
        assert_eq!(Kind::Write.effective_alias(Alias::Shared), Alias::Shared);
    }
}
