//! What the platform says to one access of a guest: the checks of `snp-isa.md` §9 in order.
//!
//! A guest access has passed the guest's own page tables and stands before the nested ones.
//! [`Platform::access`] is the host's page-fault handler and the RMP check in one: it makes the
//! conversions and assignments the host would make, then answers whether the access may be
//! mapped. [`Platform::peek`] and [`Platform::peek_region`] answer without doing anything, for
//! filling tables ahead.
//!
//! A mapping that is handed out grants what the RMP grants, so it stays valid until the page
//! is named by an invalidation.

use alloc::format;
use core::fmt;

use crate::layout::Place;
use crate::memory::PhysicalMemory;
use crate::platform::Platform;
use crate::rmp::{Entry, Permissions, Rmp, UpdateError};
use crate::types::{Alias, Gpa, Kind, PageSize, Spa, Vmpl};

/// A nested mapping the platform allows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mapping {
    /// Where the page is.
    pub spa: Spa,
    /// Data writes are allowed.
    pub write: bool,
    /// Instruction fetches are allowed, at any CPL: nested tables cannot tell user from
    /// supervisor, so a page needs both permissions.
    pub execute: bool,
}

/// Why an access was denied: it is the host's to handle, and no host could make it succeed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Denial {
    /// C=1 where there is no memory: not covered by the RMP.
    NotCovered,
    /// The RMP says that the page belongs to someone else, or was assigned for another GPA.
    NotOwned,
    /// The page is immutable: firmware has it.
    Immutable,
    /// The page is a VMSA that runs; the host cannot take it.
    InUse,
    /// The VMPL lacks a permission; the mask it has.
    Permissions(u8),
    /// The host has blocked the page.
    Blocked,
    /// A trust domain's code or page tables in shared memory.
    SharedCode,
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotCovered => f.write_str("private access where there is no memory"),
            Self::NotOwned => f.write_str("RMP: not owned by this guest at this address"),
            Self::Immutable => f.write_str("RMP: page is immutable"),
            Self::InUse => f.write_str("RMP: the page is a VMSA that runs"),
            Self::Blocked => f.write_str("secure EPT: the page is blocked"),
            Self::SharedCode => f.write_str("code or page tables in shared memory"),
            Self::Permissions(mask) => write!(f, "RMP: VMPL permissions are {mask:#x}"),
        }
    }
}

/// The platform's answer to an access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Map it and run on.
    Map(Mapping),
    /// #VC 0x404 at the accessing VMPL.
    NotValidated,
    /// A nested page fault that no host can resolve.
    Denied(Denial),
    /// C=0 where there is no memory: a device, mapped one to one.
    Mmio(Spa),
}

/// What a whole 2 MiB block is like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Region {
    /// Every page may be mapped like the first; `spa` counts up. One large nested entry will do.
    Uniform(Mapping),
    /// Ask page by page.
    Mixed,
}

/// The ownership checks on an RMP entry: covered, assigned, ASID, reverse map, mutable.
pub(crate) fn owner_fault(entry: &Entry, gpa: Gpa) -> Option<Denial> {
    let page = gpa.align_down(PageSize::Size4K);
    if Rmp::is_guest_owned(entry, page) {
        None
    } else if entry.is_assigned() && entry.is_immutable() {
        Some(Denial::Immutable)
    } else {
        Some(Denial::NotOwned)
    }
}

/// Whether `has` allows an access of this kind. Write without read gives no data access
/// (APM 15.36.7). A walk needs write, because TCG always walks with accessed/dirty updates.
const fn allows(has: Permissions, kind: Kind) -> bool {
    match kind {
        Kind::Read => has.contains(Permissions::READ),
        Kind::Write | Kind::Walk => can_write(has),
        Kind::Execute => can_execute(has),
    }
}

const fn can_write(has: Permissions) -> bool {
    has.contains(Permissions::READ) && has.contains(Permissions::WRITE)
}

const fn can_execute(has: Permissions) -> bool {
    has.contains(Permissions::EXECUTE_USER) && has.contains(Permissions::EXECUTE_SUPERVISOR)
}

const fn private_mapping(spa: Spa, has: Permissions) -> Mapping {
    Mapping {
        spa,
        write: can_write(has),
        execute: can_execute(has),
    }
}

/// Shared memory is never executable: a fetch is private whatever the C-bit says.
const fn shared_mapping(spa: Spa) -> Mapping {
    Mapping {
        spa,
        write: true,
        execute: false,
    }
}

impl<P: PhysicalMemory> Platform<P> {
    /// Decides an access of `vmpl` to the page of `gpa` in `alias`, doing what the host's
    /// fault handler would do on the way.
    ///
    /// `alias` is what the address said; with paging off it is private. Fetches and table walks
    /// of an SNP guest are taken as private whatever it is.
    pub fn access(&mut self, vmpl: Vmpl, alias: Alias, gpa: Gpa, kind: Kind) -> Verdict {
        let gpa = gpa.align_down(PageSize::Size4K);
        let alias = self.effective_alias(kind, alias);
        if alias == Alias::Shared && matches!(kind, Kind::Execute | Kind::Walk) {
            return Verdict::Denied(Denial::SharedCode);
        }
        let Some(place) = self.host.layout().place(gpa) else {
            return match alias {
                Alias::Shared => Verdict::Mmio(Spa::new(gpa.get())),
                Alias::Private => Verdict::Denied(Denial::NotCovered),
            };
        };
        if self.host.attribute(&place) != alias {
            if alias == Alias::Shared && self.host.layout().is_window(gpa) {
                // Firmware looks for a flash chip where its own private image is. What is there
                // on the shared side is what QEMU has: a ROM, or nothing.
                return Verdict::Mmio(Spa::new(gpa.get()));
            }
            if !self.convert_implicitly(vmpl, &place, gpa, alias, kind) {
                return Verdict::Denied(Denial::InUse);
            }
        }
        match alias {
            Alias::Shared => Verdict::Map(shared_mapping(place.spa)),
            Alias::Private => {
                if let Err(error) = self.host.prepare(&self.memory, &place, gpa) {
                    self.refuse(vmpl, Some(gpa), format!("host cannot assign: {error:?}"));
                    return Verdict::Denied(Denial::NotOwned);
                }
                self.check_private(vmpl, &place, gpa, kind)
            }
        }
    }

    fn check_private(&self, vmpl: Vmpl, place: &Place, gpa: Gpa, kind: Kind) -> Verdict {
        let entry = self.host.rmp().entry(place);
        if let Some(denial) = owner_fault(&entry, gpa) {
            return Verdict::Denied(denial);
        }
        if entry.is_blocked() {
            return Verdict::Denied(Denial::Blocked);
        }
        if !entry.is_validated() {
            return Verdict::NotValidated;
        }
        let has = entry.permissions(vmpl);
        if !allows(has, kind) {
            return Verdict::Denied(Denial::Permissions(has.mask()));
        }
        Verdict::Map(private_mapping(place.spa, has))
    }

    /// What KVM and QEMU do when a guest uses the other alias of a page than the attribute
    /// says (KVM_EXIT_MEMORY_FAULT): convert, losing the contents. False if it cannot.
    pub(crate) fn convert_implicitly(
        &mut self,
        vmpl: Vmpl,
        place: &Place,
        gpa: Gpa,
        to: Alias,
        kind: Kind,
    ) -> bool {
        // A page that nobody has validated loses nothing: OVMF's first GHCB becomes shared so.
        let harmless = to == Alias::Shared && !self.host.rmp().entry(place).is_validated();
        if !harmless {
            if vmpl == Vmpl::VMPL0 {
                self.counters.violations.implicit_conversion += 1;
            }
            let conversions = &mut self.counters.vmpl(vmpl).implicit_conversions;
            *conversions += 1;
            // The first few are told; a guest that lost its way would flood the log.
            if *conversions <= 8 {
                let what = format!("{kind:?} converts the page to {to:?}");
                self.refuse(vmpl, Some(gpa), what);
            }
        }
        self.host.count_range(to);
        match self.convert(gpa, PageSize::Size4K, to) {
            // The paravisor is not told, so its map cannot be right about this page.
            Ok(()) if vmpl != Vmpl::VMPL0 && to == Alias::Shared => self.host.give_away(place),
            Ok(()) => {}
            Err(error) => {
                self.refuse(vmpl, Some(gpa), format!("host cannot convert: {error:?}"));
                return false;
            }
        }
        true
    }

    /// Changes the attribute of a page or block for the guest, as RMPUPDATE lets the host.
    pub(crate) fn convert(
        &mut self,
        gpa: Gpa,
        size: PageSize,
        to: Alias,
    ) -> Result<(), UpdateError> {
        let place = self.host.layout().place(gpa).ok_or(UpdateError::Input)?;
        if self.is_vmsa_in_use(gpa, size) {
            return Err(UpdateError::InUse);
        }
        self.host.convert(&self.memory, &place, gpa, size, to)
    }

    /// The mapping that an access would be given, if it needs nothing done. For filling the
    /// tables of `vmpl` around a fault; `alias` is the C-bit alone.
    pub fn peek(&self, vmpl: Vmpl, alias: Alias, gpa: Gpa) -> Option<Mapping> {
        let place = self.host.layout().place(gpa)?;
        if self.host.attribute(&place) != alias {
            return None;
        }
        match alias {
            Alias::Shared => Some(shared_mapping(place.spa)),
            Alias::Private => self.peek_private(vmpl, &place, gpa),
        }
    }

    fn peek_private(&self, vmpl: Vmpl, place: &Place, gpa: Gpa) -> Option<Mapping> {
        match self.check_private(vmpl, place, gpa, Kind::Read) {
            Verdict::Map(mapping) => Some(mapping),
            _ => None,
        }
    }

    /// Whether the whole block of `gpa` can be mapped at once. The block's first page is
    /// looked at first, so that a refusal is cheap.
    pub fn peek_region(&self, vmpl: Vmpl, alias: Alias, gpa: Gpa) -> Region {
        let base = gpa.align_down(PageSize::Size2M);
        let Some(mapping) = self.peek(vmpl, alias, base) else {
            return Region::Mixed;
        };
        let Some(place) = self.host.layout().place(base) else {
            return Region::Mixed;
        };
        let rmp = self.host.rmp();
        let uniform = match alias {
            Alias::Shared => self.host.is_block(&place, Alias::Shared),
            Alias::Private => {
                place.block.is_some()
                    && (rmp.entry(&place).size() == PageSize::Size2M
                        || rmp.is_block_uniform(&place, base))
            }
        };
        if uniform {
            Region::Uniform(mapping)
        } else {
            Region::Mixed
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{BLOCK, Sparse, platform};
    use crate::types::PAGE_SIZE;

    const GUEST: Vmpl = Vmpl::VMPL1;
    const DEVICE: Gpa = Gpa::new(0xFEE0_0000);

    fn access(platform: &mut Platform<Sparse>, alias: Alias, kind: Kind) -> Verdict {
        platform.access(GUEST, alias, BLOCK, kind)
    }

    /// §9: nothing behind the page: devices live in the shared alias.
    #[test]
    fn without_memory_shared_is_a_device_and_private_is_refused() {
        let mut platform = platform("");
        let shared = platform.access(GUEST, Alias::Shared, DEVICE, Kind::Read);
        assert_eq!(shared, Verdict::Mmio(Spa::new(DEVICE.get())));
        for (alias, kind) in [(Alias::Private, Kind::Read), (Alias::Shared, Kind::Execute)] {
            let verdict = platform.access(GUEST, alias, DEVICE, kind);
            assert_eq!(verdict, Verdict::Denied(Denial::NotCovered));
        }
    }

    /// §9 priority: ownership before Validated before VMPL.
    #[test]
    fn the_order_of_the_checks() {
        let mut platform = platform("");
        let place = platform.layout().place(BLOCK).unwrap();
        platform.host.assign_for_launch(&place, BLOCK).unwrap();
        let verdict = access(&mut platform, Alias::Private, Kind::Read);
        assert_eq!(verdict, Verdict::Denied(Denial::Immutable));
        platform.host.rmp_mut().finish_launch(&place, false);
        platform.host.rmp_mut().set_validated(&place, false);
        assert_eq!(
            access(&mut platform, Alias::Private, Kind::Read),
            Verdict::NotValidated
        );
        platform.host.rmp_mut().set_validated(&place, true);
        let verdict = access(&mut platform, Alias::Private, Kind::Read);
        assert_eq!(verdict, Verdict::Denied(Denial::Permissions(0)));
    }

    /// §10: what each permission mask allows.
    #[test]
    fn vmpl_permissions_decide_by_kind() {
        // mask, read, write, execute, walk
        for (mask, expected) in [
            (0x1, [true, false, false, false]),
            (0x2, [false, false, false, false]),
            (0x3, [true, true, false, true]),
            (0x4, [false, false, false, false]),
            (0x5, [true, false, false, false]),
            (0xC, [false, false, true, false]),
            (0xD, [true, false, true, false]),
            (0xF, [true, true, true, true]),
        ] {
            let mut platform = platform("");
            platform.accept(BLOCK, mask << 8 | 1);
            let kinds = [Kind::Read, Kind::Write, Kind::Execute, Kind::Walk];
            let allowed = kinds
                .map(|kind| matches!(access(&mut platform, Alias::Private, kind), Verdict::Map(_)));
            assert_eq!(allowed, expected, "mask {mask:#x}");
        }
    }

    #[test]
    fn a_mapping_grants_what_the_rmp_grants() {
        let mut platform = platform("");
        platform.accept(BLOCK, 0x101);
        let verdict = access(&mut platform, Alias::Private, Kind::Read);
        let spa = Spa::new(BLOCK.get());
        assert_eq!(
            verdict,
            Verdict::Map(Mapping {
                spa,
                write: false,
                execute: false
            })
        );
        platform.adjust(BLOCK, PageSize::Size4K, 0xF01);
        let verdict = access(&mut platform, Alias::Private, Kind::Read);
        assert_eq!(
            verdict,
            Verdict::Map(Mapping {
                spa,
                write: true,
                execute: true
            })
        );
    }

    /// §9: fetches and walks ignore the C-bit; data does not, and the host converts.
    #[test]
    fn the_wrong_alias_converts_for_data_only() {
        let mut platform = platform("");
        let conversions =
            |platform: &Platform<Sparse>| platform.counters.level(GUEST).implicit_conversions;
        platform.accept(BLOCK, 0xF01);
        for kind in [Kind::Execute, Kind::Walk] {
            assert!(matches!(
                access(&mut platform, Alias::Shared, kind),
                Verdict::Map(_)
            ));
        }
        assert_eq!(conversions(&platform), 0);
        let verdict = access(&mut platform, Alias::Shared, Kind::Read);
        assert!(matches!(
            verdict,
            Verdict::Map(Mapping { execute: false, .. })
        ));
        assert_eq!(conversions(&platform), 1);
        let spa = platform.spa_of(BLOCK).unwrap();
        assert_ne!(platform.memory().read_u64(spa), 0, "the contents are lost");
        // And back: the host gives a fresh page, which the guest has not validated.
        assert_eq!(
            access(&mut platform, Alias::Private, Kind::Read),
            Verdict::NotValidated
        );
        assert_eq!(conversions(&platform), 2);
        // It was the guest's; VMPL0's would be a violation.
        assert_eq!(platform.counters.violations.implicit_conversion, 0);
        let other = Gpa::new(BLOCK.get() + PAGE_SIZE);
        platform.accept(other, 1);
        platform.access(Vmpl::VMPL0, Alias::Shared, other, Kind::Read);
        assert_eq!(platform.counters.violations.implicit_conversion, 1);
    }

    #[test]
    fn peeking_changes_nothing_and_agrees_with_access() {
        let mut platform = platform("");
        assert_eq!(platform.peek(GUEST, Alias::Private, BLOCK), None);
        assert!(
            !platform
                .host
                .rmp()
                .entry(&platform.layout().place(BLOCK).unwrap())
                .is_assigned()
        );
        platform.accept(BLOCK, 0x301);
        let peeked = platform.peek(GUEST, Alias::Private, BLOCK).unwrap();
        let verdict = access(&mut platform, Alias::Private, Kind::Read);
        assert_eq!(verdict, Verdict::Map(peeked));
        assert_eq!(platform.peek(GUEST, Alias::Shared, BLOCK), None);
        assert_eq!(platform.peek(GUEST, Alias::Shared, DEVICE), None);
    }

    #[test]
    fn a_region_is_uniform_only_if_every_page_is() {
        for settings in ["backing=2m", "backing=4k"] {
            let mut platform = platform(settings);
            for page in 0..512 {
                platform.accept(Gpa::new(BLOCK.get() + page * PAGE_SIZE), 0xF01);
                if page >= 510 {
                    let region = platform.peek_region(GUEST, Alias::Private, BLOCK);
                    assert_eq!(matches!(region, Region::Uniform(_)), page == 511);
                }
            }
            let middle = Gpa::new(BLOCK.get() + 77 * PAGE_SIZE);
            platform.adjust(middle, PageSize::Size4K, 0x101);
            let region = platform.peek_region(GUEST, Alias::Private, middle);
            assert_eq!(region, Region::Mixed);
            assert!(matches!(
                platform.peek_region(Vmpl::VMPL0, Alias::Private, middle),
                Region::Mixed
            ));
        }
        let mut platform = platform("backing=2m");
        platform.pval(BLOCK, PageSize::Size2M, true);
        let region = platform.peek_region(Vmpl::VMPL0, Alias::Private, BLOCK);
        assert!(matches!(region, Region::Uniform(mapping) if mapping.spa.get() == BLOCK.get()));
        // The block at 0 has a hole.
        assert_eq!(
            platform.peek_region(GUEST, Alias::Shared, Gpa::new(0)),
            Region::Mixed
        );
    }

    #[test]
    fn conversions_name_what_is_stale() {
        let mut platform = platform("");
        platform.accept(BLOCK, 0xF01);
        let _ = platform.take_invalidations();
        access(&mut platform, Alias::Shared, Kind::Write);
        let stale = platform.take_invalidations();
        assert!(
            stale
                .iter()
                .any(|s| s.gpa == BLOCK && s.views.contains(GUEST))
        );
    }
}
