//! What the protocols need from the rest of the paravisor.
//!
//! All methods are called on any processor at any time, with interrupts off.

use core::fmt;

use accept::{AdjustFault, Frame, Taken};
use protocols::addr::Gpa;
use protocols::vmsa::{Efer, SevFeatures};

/// An access to guest memory faulted: the page is not valid (#VC 0x404), or not mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unreachable;

/// The guest's memory as VMPL0 sees it, private, through accesses that survive a fault.
///
/// The protocols ask only for naturally aligned words, and only in pages that the map lets them
/// touch; an implementation need not check either, but must never reach anything that is not the
/// guest's.
pub trait GuestMemory {
    /// Reads one byte, once.
    ///
    /// # Errors
    /// [`Unreachable`].
    fn read_u8(&self, gpa: Gpa) -> Result<u8, Unreachable>;

    /// Reads eight bytes, once.
    ///
    /// # Errors
    /// [`Unreachable`].
    fn read_u64(&self, gpa: Gpa) -> Result<u64, Unreachable>;

    /// Writes one byte.
    ///
    /// # Errors
    /// [`Unreachable`]; nothing was written.
    fn write_u8(&self, gpa: Gpa, value: u8) -> Result<(), Unreachable>;

    /// Writes two bytes: the index that reports how far a list was worked off.
    ///
    /// # Errors
    /// [`Unreachable`]; nothing was written.
    fn write_u16(&self, gpa: Gpa, value: u16) -> Result<(), Unreachable>;
}

/// A processor, by its number in the registry. It proves nothing; the registry answers "none" for
/// numbers that it does not have.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct VcpuIndex(pub usize);

impl fmt::Debug for VcpuIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vCPU {}", self.0)
    }
}

/// The pages that the guest has lent for one of its processors.
#[derive(Debug, PartialEq, Eq)]
pub struct VcpuPages {
    /// Its VMSA.
    pub vmsa: Taken,
    /// Its calling area.
    pub calling_area: Taken,
}

/// There is no room for another VMSA, or the processor's present one is just being deleted; the
/// pages come back.
#[derive(Debug, PartialEq, Eq)]
pub struct TableFull(pub VcpuPages);

/// Why a VMSA cannot be deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeleteRefusal {
    /// No guest processor has its VMSA there.
    Unknown,
    /// It is the VMSA that the guest was started with.
    Startup,
    /// It runs, or a call of it is being worked on, on another processor. The second matters as
    /// much as the first: its calling area is in use.
    InUse,
}

/// The registry of the guest's processors.
///
/// It answers for the pages that are lent as VMSAs and calling areas: a page is on record until
/// the hardware state that it describes is undone.
pub trait Vcpus {
    /// Whether the VM has a processor with this APIC id.
    fn has_apic_id(&self, apic_id: u32) -> bool;

    /// SEV_FEATURES of the VMSA that the guest was started with.
    fn startup_features(&self) -> SevFeatures;

    /// The calling area of a processor; none if it has none. Only the processor itself changes
    /// it, and a processor whose call is being worked on is not deleted by another.
    fn calling_area(&self, vcpu: VcpuIndex) -> Option<Frame>;

    /// Puts another calling area in the place of a processor's present one, which is returned;
    /// none if it had none.
    fn exchange_calling_area(&self, vcpu: VcpuIndex, new: Taken) -> Option<Taken>;

    /// Records a new VMSA, which from now on is the one of the processor with this APIC id, and
    /// then makes it runnable: what can run is on record, so that a flush reaches it. If the
    /// processor has one already, the old one stays on record until it is deleted: the guest
    /// replaces the firmware's processors without deleting them.
    ///
    /// # Errors
    /// [`TableFull`].
    fn register(&self, apic_id: u32, pages: VcpuPages) -> Result<(), TableFull>;

    /// Begins to delete: makes the VMSA impossible to run (clears SVME until it stays clear) and
    /// hands out its pages. Until [`Vcpus::end_delete`] or [`Vcpus::undo_delete`] the VMSA can
    /// neither run nor be deleted by anybody else.
    ///
    /// # Errors
    /// [`DeleteRefusal`]; nothing changed.
    fn begin_delete(&self, caller: VcpuIndex, vmsa: Frame) -> Result<VcpuPages, DeleteRefusal>;

    /// Forgets a VMSA whose pages were given back.
    fn end_delete(&self, vmsa: Frame);

    /// Makes a VMSA that could not be given back runnable again.
    fn undo_delete(&self, pages: VcpuPages);

    /// Whether `vmsa` is the one that `vcpu` runs from.
    fn runs_from(&self, vcpu: VcpuIndex, vmsa: Frame) -> bool;
}

/// What a VMSA that the guest has written says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmsaClaims {
    /// The privilege level (APM table B-4, offset 0xCA).
    pub vmpl: u8,
    /// EFER.
    pub efer: Efer,
    /// SEV_FEATURES.
    pub sev_features: SevFeatures,
}

/// Access to the pages that are about to become VMSAs.
///
/// Called only with a page that was taken for [`accept::Role::Vmsa`]: the guest cannot write to it
/// any more, not even through a stale translation.
pub trait VmsaPages {
    /// The guest's privilege level.
    fn guest_vmpl(&self) -> u8;

    /// Reads what the page claims.
    ///
    /// # Errors
    /// [`Unreachable`]: a page that is on record as valid was lost.
    fn claims(&self, vmsa: Frame) -> Result<VmsaClaims, Unreachable>;

    /// Gives the page the VMSA attribute, and the guest read access (RMPADJUST).
    /// [`accept::Engine::give_back`] takes it away.
    ///
    /// The VMSA cannot run before [`Vcpus::register`] has it on record: its SVME is cleared first.
    /// And it owes a flush: its PCPU_ID, which the guest has written, says "none". With the
    /// number of the right CPU there its first VMRUN would go on with the translations that
    /// another VMSA has left behind.
    ///
    /// # Errors
    /// As the instruction reported; the page is as it was, but for PCPU_ID.
    fn make_vmsa(&self, vmsa: Frame) -> Result<(), AdjustFault>;

    /// Undoes [`VmsaPages::make_vmsa`] of a VMSA that was not registered.
    ///
    /// # Errors
    /// As the instruction reported; the page is a VMSA that cannot run.
    fn unmake_vmsa(&self, vmsa: Frame) -> Result<(), AdjustFault>;
}
