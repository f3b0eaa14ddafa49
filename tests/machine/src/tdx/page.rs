//! TDG.MEM.PAGE.ACCEPT (§2), TDG.MEM.PAGE.ATTR.RD and ATTR.WR (§3).

use alloc::format;

use protocols::report::AcceptResults;
use protocols::tdx::vmcall::register::{R8, RCX, RDX};
use protocols::tdx::{L2Vm, MAPPING_PENDING, Operand, PageAttributes, Status};

use super::sept::{ACCEPT, State, Walk};
use super::tdcall::Gprs;
use super::{SHARED, Stop};
use crate::memory::PhysicalMemory;
use crate::platform::{Cause, Platform, Views};
use crate::rmp::{Entry, Permissions};
use crate::types::{Gpa, PageSize, VcpuId, Vmpl};

/// Levels of the page leaves.
mod level {
    pub const SIZE_4K: u64 = 0;
    pub const SIZE_2M: u64 = 1;
    pub const SIZE_1G: u64 = 2;
}

/// What the operand of a page leaf names.
struct PageOperand {
    gpa: Gpa,
    level: u64,
}

impl PageOperand {
    /// Row 1 of §2 (reserved bits, level, alignment) and row 2 (private, within the address width).
    fn decode(rcx: u64, highest_level: u64) -> Option<Self> {
        const LEVEL: u64 = 7;
        const RESERVED: u64 = 0xFF8 | !((1 << 52) - 1);
        let level = rcx & LEVEL;
        let gpa = rcx & !LEVEL;
        if rcx & RESERVED != 0 || level > highest_level {
            return None;
        }
        let aligned = gpa & ((1 << (12 + 9 * level)) - 1) == 0;
        (aligned && is_private(gpa)).then_some(Self {
            gpa: Gpa::new(gpa),
            level,
        })
    }

    /// The page size, if it is one that leaves of this machine have.
    const fn size(&self) -> Option<PageSize> {
        match self.level {
            level::SIZE_4K => Some(PageSize::Size4K),
            level::SIZE_2M => Some(PageSize::Size2M),
            _ => None,
        }
    }
}

/// Whether an address lies in the private half: no shared bit, and nothing above.
pub(super) const fn is_private(gpa: u64) -> bool {
    gpa < SHARED
}

const fn level_of(size: PageSize) -> u32 {
    size.encoding() as u32
}

/// How an accept ends that changes nothing.
enum Accept {
    Now,
    Busy,
    Already(PageSize),
    Mismatch,
}

impl<P: PhysicalMemory> Platform<P> {
    /// TDG.MEM.PAGE.ACCEPT of L1.
    pub(super) fn page_accept(&mut self, gprs: &Gprs) -> Result<u64, Stop> {
        let operand = PageOperand::decode(gprs[RCX], level::SIZE_2M);
        let Some((gpa, size)) = operand.and_then(|o| Some((o.gpa, o.size()?))) else {
            let size = match gprs[RCX] & 7 {
                level::SIZE_2M => PageSize::Size2M,
                _ => PageSize::Size4K,
            };
            self.count_accept(size).invalid += 1;
            return Ok(Operand::RCX.invalid());
        };
        let is_held = self.is_held(gpa, size);
        let settled = |walk: &Walk| match walk {
            // Row 3: a larger leaf that is accepted. A larger one that is not is row 4.
            Walk::Larger(entry) if State::of(entry) == State::Mapped => {
                Some(Accept::Already(PageSize::Size2M))
            }
            // Row 5: the walk has come to the entry, and asks for its lock.
            Walk::Table | Walk::Leaf(_) if is_held => Some(Accept::Busy),
            Walk::Table => Some(Accept::Mismatch),
            Walk::Leaf(entry) => match State::of(entry) {
                State::Mapped => Some(Accept::Already(size)),
                State::Pending => Some(Accept::Now),
                // Row 8.
                State::Free | State::Blocked | State::PendingBlocked => None,
            },
            Walk::Larger(_) | Walk::Missing => None,
        };
        match self.walk_until(gpa, size, ACCEPT, settled)? {
            (_, Accept::Busy) => {
                self.count_accept(size).busy += 1;
                Ok(Status::OPERAND_BUSY.with(Operand::RCX.0))
            }
            (_, Accept::Mismatch) => {
                self.count_accept(size).size_mismatch += 1;
                Ok(Status::PAGE_SIZE_MISMATCH.with(level_of(PageSize::Size2M)))
            }
            (_, Accept::Already(at)) => {
                self.count_accept(size).already_accepted += 1;
                self.note_double_accept(gpa, "a page that is accepted");
                Ok(Status::PAGE_ALREADY_ACCEPTED.with(level_of(at)))
            }
            (place, Accept::Now) => {
                let again = self
                    .host
                    .accept(&self.memory, &place, gpa, size)
                    .map_err(|error| Stop::Refused(format!("accept of {gpa}: {error:?}")))?;
                self.count_accept(size).ok += 1;
                if again {
                    self.note_double_accept(
                        gpa,
                        "a page that the host has put in an accepted one's place",
                    );
                }
                self.book_validated(size.bytes(), true);
                Ok(Status::SUCCESS.with(0))
            }
        }
    }

    /// The host keeps the entry of this page busy from now on, or lets go of it. One at a time.
    pub(crate) fn hold(&mut self, gpa: Gpa) -> Option<()> {
        let td = self.td_mut()?;
        td.held = match td.held {
            None => Some(gpa),
            Some(held) if held == gpa => None,
            Some(_) => return None,
        };
        Some(())
    }

    /// Whether the host is at work on an entry that a leaf on this page needs.
    fn is_held(&self, gpa: Gpa, size: PageSize) -> bool {
        self.td()
            .and_then(|td| td.held)
            .is_some_and(|held| held.align_down(size) == gpa)
    }

    fn count_accept(&mut self, size: PageSize) -> &mut AcceptResults {
        let accept = &mut self.counters.vmpl(Vmpl::VMPL0).accept;
        match size {
            PageSize::Size4K => &mut accept.size_4k,
            PageSize::Size2M => &mut accept.size_2m,
        }
    }

    /// The module makes a double accept safe only while the page stays (§2, consequences); software
    /// has to know what it has accepted.
    fn note_double_accept(&mut self, gpa: Gpa, what: &str) {
        self.counters.violations.double_validation += 1;
        self.refuse(Vmpl::VMPL0, Some(gpa), format!("accept of {what}"));
    }

    /// TDG.MEM.PAGE.ATTR.RD of L1: the leaf that there is, whatever its level.
    pub(super) fn page_attr_rd(&mut self, gprs: &mut Gprs) -> Result<u64, Stop> {
        let raw = gprs[RCX];
        (gprs[RCX], gprs[RDX]) = (0, 0);
        if !is_private(raw) {
            return Ok(Operand::RCX.invalid());
        }
        let gpa = Gpa::new(raw).align_down(PageSize::Size4K);
        let settled = |walk: &Walk| match walk {
            Walk::Leaf(entry) | Walk::Larger(entry) => usable(entry),
            Walk::Table | Walk::Missing => None,
        };
        let (_, entry) = self.walk_until(gpa, PageSize::Size4K, "attributes", settled)?;
        gprs[RCX] = mapping(gpa, &entry);
        gprs[RDX] = current_attributes(&entry);
        Ok(Status::SUCCESS.with(0))
    }

    /// TDG.MEM.PAGE.ATTR.WR of L1. The attributes are looked at before the page is.
    pub(super) fn page_attr_wr(&mut self, vcpu: VcpuId, gprs: &mut Gprs) -> Result<u64, Stop> {
        let (rcx, new, mask) = (gprs[RCX], gprs[RDX], gprs[R8]);
        (gprs[RCX], gprs[RDX]) = (0, 0);
        // L1's own field says nothing; then those of the VMs in their order.
        if new as u16 != 0 {
            return Ok(Operand::RDX.invalid());
        }
        if mask as u16 != 0 {
            return Ok(Operand::R8.invalid());
        }
        let nonsense = |vm: &&L2Vm| {
            let wanted = vm.attributes(new);
            !wanted.is_empty() && !wanted.contains(PageAttributes::VALID)
        };
        if L2Vm::ALL.iter().any(|vm| nonsense(&vm)) {
            return Ok(Operand::RDX.invalid());
        }
        let Some(operand) = PageOperand::decode(rcx, level::SIZE_1G) else {
            return Ok(Operand::RCX.invalid());
        };
        // The host has tables below every gigabyte.
        let Some(size) = operand.size() else {
            return Ok(Status::PAGE_SIZE_MISMATCH.with(level::SIZE_1G as u32));
        };
        let is_held = self.is_held(operand.gpa, size);
        let settled = |walk: &Walk| match walk {
            Walk::Table | Walk::Leaf(_) if is_held => {
                Some(Err(Status::OPERAND_BUSY.with(Operand::RCX.0)))
            }
            Walk::Table => Some(Err(Status::PAGE_SIZE_MISMATCH.with(operand.level as u32))),
            Walk::Leaf(entry) => usable(entry).map(Ok),
            Walk::Larger(_) | Walk::Missing => None,
        };
        let (place, entry) = match self.walk_until(operand.gpa, size, "attributes", settled)? {
            (place, Ok(entry)) => (place, entry),
            (_, Err(status)) => return Ok(status),
        };
        let changes =
            L2Vm::ALL.map(|vm| Change::of(&entry, vm, vm.attributes(new), vm.attributes(mask)));
        let [Some(first), Some(second), Some(third)] = changes else {
            // None of the VMs has got anything, and RDX says what they have.
            gprs[RDX] = current_attributes(&entry);
            return Ok(Status::PAGE_ATTR_INVALID.with(0));
        };
        for (vm, change) in L2Vm::ALL.into_iter().zip([first, second, third]) {
            gprs[RDX] |= vm.field(change.told);
            let level = vmpl_of(vm);
            if let Some(to) = change.to {
                let had = entry.permissions(level);
                self.host.rmp_mut().set_permissions(&place, level, to);
                if !to.contains(had) {
                    let cause = Cause::Instruction(Vmpl::VMPL0);
                    self.host
                        .invalidate(operand.gpa, size, Views::of(level), cause);
                    if let Some(td) = self.td_mut() {
                        td.note_withdrawn(vcpu, vm, operand.gpa);
                    }
                } else if to.contains(Permissions::FULL)
                    && let Some(td) = self.td_mut()
                {
                    td.note_restored(vm, operand.gpa);
                }
            }
            // In a mask, VALID asks for INVEPT.
            if vm.attributes(mask).contains(PageAttributes::VALID)
                && let Some(td) = self.td_mut()
            {
                td.flush_l2(vcpu, vm);
            }
        }
        gprs[RCX] = mapping(operand.gpa, &entry);
        Ok(Status::SUCCESS.with(0))
    }
}

/// What ATTR.WR does for one VM.
struct Change {
    /// The VM's permissions from now on, if they change.
    to: Option<Permissions>,
    /// The VM's field of RDX as it comes back.
    told: PageAttributes,
}

impl Change {
    /// `None` if the attributes would be such that there are not together.
    fn of(entry: &Entry, vm: L2Vm, new: PageAttributes, mask: PageAttributes) -> Option<Self> {
        if !new.contains(PageAttributes::VALID) {
            return Some(Self {
                to: None,
                told: PageAttributes::empty(),
            });
        }
        let has = entry.permissions(vmpl_of(vm));
        let now = attributes_of(entry, vm);
        // VALID is no part of what the mask selects.
        let mask = mask - PageAttributes::VALID;
        let wanted = (now - mask) | (new & mask) | PageAttributes::VALID;
        let access = wanted - PageAttributes::VALID;
        if (access & PageAttributes::ALL_ACCESS).is_empty() {
            return Some(Self {
                to: (!has.is_none()).then_some(Permissions::NONE),
                told: PageAttributes::VALID,
            });
        }
        // W needs R; what else there is belongs to features that this processor does not have.
        let lone_write =
            access.contains(PageAttributes::WRITE) && !access.contains(PageAttributes::READ);
        let unknown = !(access - PageAttributes::ALL_ACCESS).is_empty();
        (!lone_write && !unknown).then(|| Self {
            to: Some(permissions(access)),
            told: wanted,
        })
    }
}

/// The entry, if ATTR.RD and ATTR.WR work on its state.
fn usable(entry: &Entry) -> Option<Entry> {
    matches!(State::of(entry), State::Pending | State::Mapped).then_some(*entry)
}

/// RCX as ATTR.RD and ATTR.WR give it back.
fn mapping(gpa: Gpa, entry: &Entry) -> u64 {
    let pending = match State::of(entry) {
        State::Pending => MAPPING_PENDING,
        _ => 0,
    };
    gpa.align_down(entry.size()).get() | u64::from(level_of(entry.size())) | pending
}

/// The level whose permissions are a VM's.
pub(super) const fn vmpl_of(vm: L2Vm) -> Vmpl {
    match vm {
        L2Vm::Vm1 => Vmpl::VMPL1,
        L2Vm::Vm2 => Vmpl::VMPL2,
        L2Vm::Vm3 => Vmpl::VMPL3,
    }
}

/// Pairs of the same right as an attribute and as a permission: the two execute rights have each
/// other's place.
const RIGHTS: [(PageAttributes, Permissions); 4] = [
    (PageAttributes::READ, Permissions::READ),
    (PageAttributes::WRITE, Permissions::WRITE),
    (
        PageAttributes::EXECUTE_SUPERVISOR,
        Permissions::EXECUTE_SUPERVISOR,
    ),
    (PageAttributes::EXECUTE_USER, Permissions::EXECUTE_USER),
];

/// The attributes of a VM; none if it has no alias of the page.
fn attributes_of(entry: &Entry, vm: L2Vm) -> PageAttributes {
    let has = entry.permissions(vmpl_of(vm));
    if has.is_none() {
        return PageAttributes::empty();
    }
    RIGHTS
        .into_iter()
        .filter(|&(_, permission)| has.contains(permission))
        .fold(PageAttributes::VALID, |all, (attribute, _)| all | attribute)
}

/// Those of all VMs, as RDX has them.
fn current_attributes(entry: &Entry) -> u64 {
    L2Vm::ALL
        .iter()
        .map(|&vm| vm.field(attributes_of(entry, vm)))
        .sum()
}

fn permissions(attributes: PageAttributes) -> Permissions {
    let mask = RIGHTS
        .into_iter()
        .filter(|&(attribute, _)| attributes.contains(attribute))
        .fold(0, |mask, (_, permission)| mask | permission.mask());
    Permissions::from_mask(mask).unwrap_or(Permissions::NONE)
}
