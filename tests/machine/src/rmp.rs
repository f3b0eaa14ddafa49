//! The reverse map table: one 16-byte entry per page, and the host instructions that change it.
//!
//! Entries have the format of Zen 3/4 (`snp-isa.md` §8; the permission masks in the upper
//! quadword are as the AMD-SP keeps them). The 2 MiB aligned entry of a large page speaks for
//! all 512; the others are left assigned with ASID 0, as on hardware.
//!
//! The table knows slots, not addresses: the layout maps a GPA to its slot. The reverse-map
//! check is still made, because every entry records the GPA it was assigned for.
//!
//! Who may call: `host_memory` (RMPUPDATE, PSMASH), `isa` (Validated, VMSA, permissions),
//! `launch` (immutable pages). Everybody may read.

use alloc::vec::Vec;

use protocols::snp;

use crate::layout::{Place, reserve};
use crate::types::{Gpa, PAGE_SIZE, PageSize, Vmpl};

/// ASID of the only guest. Any number but 0 (the hypervisor) and within 10 bits will do.
pub const GUEST_ASID: u16 = 1;

/// Permissions of a VMPL on a page (APM Table 15-36).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Permissions(u8);

impl Permissions {
    /// No access.
    pub const NONE: Self = Self(0);
    /// Data read.
    pub const READ: Self = Self(snp::Permissions::READ.bits());
    /// Data write; without [`Self::READ`] it gives nothing (APM 15.36.7).
    pub const WRITE: Self = Self(snp::Permissions::WRITE.bits());
    /// Instruction fetch at CPL 3.
    pub const EXECUTE_USER: Self = Self(snp::Permissions::EXECUTE_USER.bits());
    /// Instruction fetch at CPL 0 to 2.
    pub const EXECUTE_SUPERVISOR: Self = Self(snp::Permissions::EXECUTE_SUPERVISOR.bits());
    /// All of the four above: what "full" means on a platform without VMPL shadow stacks.
    pub const FULL: Self = Self(snp::Permissions::FULL.bits());

    /// The mask as an RMPADJUST operand has it; `None` if a bit is set that this platform
    /// does not have (supervisor shadow stack, or reserved).
    pub const fn from_mask(mask: u8) -> Option<Self> {
        if mask & !Self::FULL.0 == 0 {
            Some(Self(mask))
        } else {
            None
        }
    }

    /// The mask as it is in the RMP and in instruction operands.
    pub const fn mask(self) -> u8 {
        self.0
    }

    /// Whether all of `other` is contained.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether nothing is allowed.
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }
}

/// One RMP entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Entry {
    low: u64,
    permissions: [u8; 4],
    reserved: u32,
}

const _: () = assert!(size_of::<Entry>() == 16);

impl Entry {
    const ASSIGNED: u64 = 1 << 0;
    const LARGE: u64 = 1 << 1;
    const IMMUTABLE: u64 = 1 << 2;
    /// Of a secure EPT entry only: the host has blocked it ([`crate::tdx::sept`]).
    const BLOCKED: u64 = 1 << 3;
    const GPA: u64 = 0x0007_FFFF_FFFF_F000;
    const ASID_SHIFT: u32 = 51;
    const ASID: u64 = 0x3FF << Self::ASID_SHIFT;
    const VMSA: u64 = 1 << 61;
    const VALIDATED: u64 = 1 << 62;

    /// What RMPUPDATE writes for a page given to the guest: VMPL0 has all permissions, the
    /// others none, and Validated and VMSA are clear (APM 15.36.5–.7).
    const fn assigned(gpa: Gpa, size: PageSize, immutable: bool) -> Self {
        let large = match size {
            PageSize::Size4K => 0,
            PageSize::Size2M => Self::LARGE,
        };
        let immutable = if immutable { Self::IMMUTABLE } else { 0 };
        Self {
            low: Self::ASSIGNED
                | large
                | immutable
                | (gpa.get() & Self::GPA)
                | ((GUEST_ASID as u64) << Self::ASID_SHIFT),
            permissions: [Permissions::FULL.0, 0, 0, 0],
            reserved: 0,
        }
    }

    const fn has(&self, bit: u64) -> bool {
        self.low & bit != 0
    }

    const fn put(&mut self, bit: u64, value: bool) {
        if value {
            self.low |= bit;
        } else {
            self.low &= !bit;
        }
    }

    /// Assigned to a guest or to firmware; not the hypervisor's.
    pub const fn is_assigned(&self) -> bool {
        self.has(Self::ASSIGNED)
    }

    /// Locked against RMPUPDATE and against guest use until the launch is through with it.
    pub const fn is_immutable(&self) -> bool {
        self.has(Self::IMMUTABLE)
    }

    /// The host has blocked it: nobody in the trust domain can use it.
    pub const fn is_blocked(&self) -> bool {
        self.has(Self::BLOCKED)
    }

    /// Holds a VMSA.
    pub const fn is_vmsa(&self) -> bool {
        self.has(Self::VMSA)
    }

    /// The guest has accepted it.
    pub const fn is_validated(&self) -> bool {
        self.has(Self::VALIDATED)
    }

    /// Size of the page the entry describes.
    pub const fn size(&self) -> PageSize {
        if self.has(Self::LARGE) {
            PageSize::Size2M
        } else {
            PageSize::Size4K
        }
    }

    /// Guest address the page was assigned for.
    pub const fn gpa(&self) -> Gpa {
        Gpa::new(self.low & Self::GPA)
    }

    /// Owner; 0 is the hypervisor.
    pub const fn asid(&self) -> u16 {
        ((self.low & Self::ASID) >> Self::ASID_SHIFT) as u16
    }

    /// What `vmpl` may do.
    pub const fn permissions(&self, vmpl: Vmpl) -> Permissions {
        Permissions(self.permissions[vmpl.index()])
    }

    /// Whether any VMPL but 0 may do anything.
    pub const fn has_lower_permissions(&self) -> bool {
        let [_, one, two, three] = self.permissions;
        one | two | three != 0
    }
}

/// Why a host instruction was refused (`snp-isa.md` §2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UpdateError {
    /// 1: misaligned, or no such page.
    Input,
    /// 2: the entry is immutable.
    Permission,
    /// 3: the page is a VMSA that runs.
    InUse,
    /// 4: 4 KiB and 2 MiB entries would overlap.
    Overlap,
}

/// The table.
#[derive(Default)]
pub struct Rmp {
    entries: Vec<Entry>,
}

impl Rmp {
    /// A table without entries; [`Self::resize`] gives it some.
    pub const fn new() -> Self {
        Self {
            entries: Vec::new(),
        }
    }

    /// Adds hypervisor-owned entries up to `pages`.
    pub fn resize(&mut self, pages: usize) {
        if pages > self.entries.len() {
            reserve(&mut self.entries, pages);
            self.entries.resize(pages, Entry::default());
        }
    }

    /// The entry that speaks for the page at `place`: its own, or that of its large page.
    #[inline]
    pub fn entry(&self, place: &Place) -> Entry {
        self.entries[self.index(place)]
    }

    /// The page's own entry, which speaks for it only if no large page does.
    pub fn entry_at(&self, slot: usize) -> Entry {
        self.entries[slot]
    }

    #[inline]
    fn index(&self, place: &Place) -> usize {
        if let Some(block) = place.block {
            let head = &self.entries[block.index()];
            if head.low & (Entry::ASSIGNED | Entry::LARGE) == Entry::ASSIGNED | Entry::LARGE {
                return block.index();
            }
        }
        place.slot.index()
    }

    /// Whether the guest owns the page at `place` as `gpa`: the assigned, ASID, reverse-map
    /// and mutable checks of APM Table 15-39.
    #[inline]
    pub fn is_guest_owned(entry: &Entry, gpa: Gpa) -> bool {
        let base = gpa.align_down(entry.size());
        let wanted = Entry::assigned(base, PageSize::Size4K, false).low;
        let mask = Entry::ASSIGNED | Entry::IMMUTABLE | Entry::GPA | Entry::ASID;
        entry.low & mask == wanted
    }

    /// RMPUPDATE to guest-owned. `gpa` is the address of the page or block at `place`.
    pub fn assign(
        &mut self,
        place: &Place,
        gpa: Gpa,
        size: PageSize,
        immutable: bool,
    ) -> Result<(), UpdateError> {
        if !gpa.is_aligned(size) {
            return Err(UpdateError::Input);
        }
        let slots = place.slots(size).ok_or(UpdateError::Input)?;
        if self.entry(place).is_immutable() {
            return Err(UpdateError::Permission);
        }
        let mine = &self.entries[slots.clone()];
        let overlap = match size {
            // Assigning 4 KiB inside a large page needs a PSMASH first.
            PageSize::Size4K => self.entry(place).size() == PageSize::Size2M,
            // A large page needs 512 pages nobody owns.
            PageSize::Size2M => mine.iter().any(Entry::is_assigned),
        };
        if overlap {
            return Err(UpdateError::Overlap);
        }
        let first = slots.start;
        if size == PageSize::Size2M {
            // Sub-entries: assigned, ASID 0, so that no 4 KiB use of them can pass a check.
            self.entries[slots].fill(Entry {
                low: Entry::ASSIGNED,
                ..Entry::default()
            });
        }
        self.entries[first] = Entry::assigned(gpa, size, immutable);
        Ok(())
    }

    /// RMPUPDATE to hypervisor-owned. Clears Validated, VMSA and all permissions.
    pub fn unassign(&mut self, place: &Place, size: PageSize) -> Result<(), UpdateError> {
        let slots = place.slots(size).ok_or(UpdateError::Input)?;
        let entry = self.entry(place);
        if entry.is_immutable() {
            return Err(UpdateError::Permission);
        }
        if size == PageSize::Size4K && entry.is_assigned() && entry.size() == PageSize::Size2M {
            return Err(UpdateError::Overlap);
        }
        if self.entries[slots.clone()].iter().any(Entry::is_immutable) {
            return Err(UpdateError::Permission);
        }
        self.entries[slots].fill(Entry::default());
        Ok(())
    }

    /// PSMASH: one large entry becomes 512 small ones that keep all other fields
    /// (APM 15.36.11). False if the entry is not large.
    pub fn psmash(&mut self, place: &Place) -> bool {
        let head = self.entry(place);
        let Some(slots) = place.slots(PageSize::Size2M) else {
            return false;
        };
        if !head.is_assigned() || head.size() == PageSize::Size4K {
            return false;
        }
        let base = head.gpa().get();
        for (page, entry) in self.entries[slots].iter_mut().enumerate() {
            let gpa = base + page as u64 * PAGE_SIZE;
            let keep = head.low & !(Entry::GPA | Entry::LARGE);
            *entry = Entry {
                low: keep | (gpa & Entry::GPA),
                ..head
            };
        }
        true
    }

    /// Whether none of the 512 pages of the block is assigned.
    pub fn is_block_free(&self, place: &Place) -> bool {
        place
            .slots(PageSize::Size2M)
            .is_some_and(|slots| !self.entries[slots].iter().any(Entry::is_assigned))
    }

    /// Whether the 512 pages of the block at `gpa` are small pages of the guest with the same
    /// state: validated, same VMSA bit, same permissions.
    pub fn is_block_uniform(&self, place: &Place, gpa: Gpa) -> bool {
        let Some(slots) = place.slots(PageSize::Size2M) else {
            return false;
        };
        let entries = &self.entries[slots];
        let base = gpa.align_down(PageSize::Size2M).get();
        let first = entries[0];
        entries.iter().enumerate().all(|(page, entry)| {
            entry.low == first.low + page as u64 * PAGE_SIZE
                && entry.permissions == first.permissions
        }) && Self::is_guest_owned(&first, Gpa::new(base))
    }

    /// Puts the page that `entry` describes at `place`, which must not be in a large page.
    pub(crate) fn put_entry(&mut self, place: &Place, entry: Entry) {
        let index = self.index(place);
        self.entries[index] = entry;
    }

    /// Sets Validated of the entry that speaks for `place`.
    pub(crate) fn set_validated(&mut self, place: &Place, value: bool) {
        let index = self.index(place);
        self.entries[index].put(Entry::VALIDATED, value);
    }

    /// Sets the permissions of one VMPL.
    pub(crate) fn set_permissions(&mut self, place: &Place, vmpl: Vmpl, value: Permissions) {
        let index = self.index(place);
        self.entries[index].permissions[vmpl.index()] = value.0;
    }

    /// Sets whether the host has blocked the entry.
    pub(crate) fn set_blocked(&mut self, place: &Place, value: bool) {
        let index = self.index(place);
        self.entries[index].put(Entry::BLOCKED, value);
    }

    /// Sets the VMSA bit.
    pub(crate) fn set_vmsa(&mut self, place: &Place, value: bool) {
        let index = self.index(place);
        self.entries[index].put(Entry::VMSA, value);
    }

    /// What SNP_LAUNCH_UPDATE does to a Pre-Guest page: mutable, validated, perhaps a VMSA.
    pub(crate) fn finish_launch(&mut self, place: &Place, vmsa: bool) {
        let index = self.index(place);
        let entry = &mut self.entries[index];
        entry.put(Entry::IMMUTABLE, false);
        entry.put(Entry::VALIDATED, true);
        entry.put(Entry::VMSA, vmsa);
    }

    /// Number of 4 KiB pages for which `what` holds, a large entry counting 512 times.
    pub fn count(&self, what: impl Fn(&Entry) -> bool) -> u64 {
        let mut count = 0;
        let mut index = 0;
        while let Some(entry) = self.entries.get(index) {
            let pages = if entry.is_assigned() {
                entry.size().pages()
            } else {
                1
            };
            if what(entry) {
                count += pages;
            }
            index += pages as usize;
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;
    use crate::types::Spa;

    const BASE: Gpa = Gpa::new(0x20_0000);

    fn table() -> (Layout, Rmp) {
        let mut layout = Layout::new();
        layout.add_ram(Gpa::new(0), 0x80_0000).unwrap();
        layout
            .add_window(Gpa::new(0xFFFF_F000), 0x1000, Spa::new(0x90_0000))
            .unwrap();
        let mut rmp = Rmp::new();
        rmp.resize(layout.pages());
        (layout, rmp)
    }

    fn page(layout: &Layout, index: u64) -> (Place, Gpa) {
        let gpa = Gpa::new(BASE.get() + index * PAGE_SIZE);
        (layout.place(gpa).unwrap(), gpa)
    }

    /// `snp-isa.md` §8: the bit positions of the Zen format.
    #[test]
    fn the_entry_has_the_zen_format() {
        let entry = Entry::assigned(Gpa::new(0x1234_5000), PageSize::Size2M, true);
        assert_eq!(entry.low, 0x1234_5000 | 0b111 | 1 << 51);
        let mut entry = entry;
        entry.put(Entry::VMSA, true);
        entry.put(Entry::VALIDATED, true);
        assert_eq!(entry.low >> 61, 0b11);
    }

    /// §6: assignment gives VMPL0 everything, others nothing, and clears Validated and VMSA.
    #[test]
    fn assignment_resets_the_page() {
        let (layout, mut rmp) = table();
        let (place, gpa) = page(&layout, 3);
        for _ in 0..2 {
            rmp.assign(&place, gpa, PageSize::Size4K, false).unwrap();
            let entry = rmp.entry(&place);
            assert!(Rmp::is_guest_owned(&entry, gpa));
            assert!(!entry.is_validated() && !entry.is_vmsa());
            assert_eq!(entry.permissions(Vmpl::VMPL0), Permissions::FULL);
            assert!(!entry.has_lower_permissions());
            rmp.set_validated(&place, true);
            rmp.set_vmsa(&place, true);
            rmp.set_permissions(&place, Vmpl::VMPL1, Permissions::FULL);
        }
    }

    /// §9: the reverse-map check.
    #[test]
    fn a_page_is_owned_for_one_address_only() {
        let (layout, mut rmp) = table();
        let (place, gpa) = page(&layout, 0);
        rmp.assign(&place, gpa, PageSize::Size4K, false).unwrap();
        let entry = rmp.entry(&place);
        assert!(Rmp::is_guest_owned(&entry, gpa));
        assert!(!Rmp::is_guest_owned(
            &entry,
            Gpa::new(gpa.get() + PAGE_SIZE)
        ));
    }

    /// §6: fail codes 1, 2 and 4.
    #[test]
    fn rmpupdate_refuses_what_hardware_refuses() {
        let (layout, mut rmp) = table();
        let (third, third_gpa) = page(&layout, 3);
        let (first, first_gpa) = page(&layout, 0);
        assert_eq!(
            rmp.assign(&third, third_gpa, PageSize::Size2M, false),
            Err(UpdateError::Input)
        );
        rmp.assign(&third, third_gpa, PageSize::Size4K, true)
            .unwrap();
        assert_eq!(
            rmp.assign(&third, third_gpa, PageSize::Size4K, false),
            Err(UpdateError::Permission)
        );
        assert_eq!(
            rmp.unassign(&third, PageSize::Size4K),
            Err(UpdateError::Permission)
        );
        assert_eq!(
            rmp.assign(&first, first_gpa, PageSize::Size2M, false),
            Err(UpdateError::Overlap)
        );
        rmp.finish_launch(&third, false);
        rmp.unassign(&third, PageSize::Size4K).unwrap();
        rmp.assign(&first, first_gpa, PageSize::Size2M, false)
            .unwrap();
        assert_eq!(
            rmp.assign(&third, third_gpa, PageSize::Size4K, false),
            Err(UpdateError::Overlap)
        );
        assert_eq!(
            rmp.unassign(&third, PageSize::Size4K),
            Err(UpdateError::Overlap)
        );
    }

    /// §7: PSMASH keeps everything but the size and the address.
    #[test]
    fn psmash_copies_all_other_fields() {
        let (layout, mut rmp) = table();
        let (place, gpa) = page(&layout, 0);
        rmp.assign(&place, gpa, PageSize::Size2M, false).unwrap();
        rmp.set_validated(&place, true);
        rmp.set_permissions(&place, Vmpl::VMPL2, Permissions::READ);
        assert!(rmp.psmash(&place));
        assert!(!rmp.psmash(&place));
        for index in [0, 1, 511] {
            let (place, gpa) = page(&layout, index);
            let entry = rmp.entry(&place);
            assert_eq!(entry.size(), PageSize::Size4K);
            assert_eq!(entry.gpa(), gpa);
            assert!(entry.is_validated() && Rmp::is_guest_owned(&entry, gpa));
            assert_eq!(entry.permissions(Vmpl::VMPL2), Permissions::READ);
        }
        assert!(rmp.is_block_uniform(&place, gpa));
        let (fifth, _) = page(&layout, 5);
        rmp.set_validated(&fifth, false);
        assert!(!rmp.is_block_uniform(&place, gpa));
    }

    /// §8: the aligned entry is authoritative; §17: pages are counted, not entries.
    #[test]
    fn a_large_entry_speaks_for_512_pages() {
        let (layout, mut rmp) = table();
        let (place, gpa) = page(&layout, 0);
        rmp.assign(&place, gpa, PageSize::Size2M, false).unwrap();
        let (last, last_gpa) = page(&layout, 511);
        assert!(Rmp::is_guest_owned(&rmp.entry(&last), last_gpa));
        assert_eq!(rmp.count(Entry::is_assigned), 512);
        assert!(!rmp.is_block_free(&last));
        rmp.unassign(&last, PageSize::Size2M).unwrap();
        assert_eq!(rmp.count(Entry::is_assigned), 0);
        assert!(rmp.is_block_free(&place));
    }

    #[test]
    fn a_window_page_is_never_large() {
        let (layout, mut rmp) = table();
        let gpa = Gpa::new(0xFFFF_F000);
        let place = layout.place(gpa).unwrap();
        assert!(rmp.assign(&place, gpa, PageSize::Size2M, false).is_err());
        rmp.assign(&place, gpa, PageSize::Size4K, false).unwrap();
        assert!(Rmp::is_guest_owned(&rmp.entry(&place), gpa));
    }
}
