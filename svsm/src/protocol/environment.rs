//! What the protocols need from the rest of the paravisor.
//!
//! All methods are called on any processor at any time, with interrupts off.

use core::fmt;

use accept::{AdjustFault, FlushOwed, Frame, Taken};
use protocols::addr::Gpa;
use protocols::svsm::PvalidateEntry;
use protocols::vmsa::{Efer, SevFeatures};

/// An access to guest memory faulted: the page is not valid (#VC 0x404), or not mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unreachable;

/// The guest's memory as VMPL0 sees it, private, through accesses that survive a fault.
///
/// The protocols ask only for naturally aligned words and for stretches inside a page, and only in pages that the map lets them
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

    /// Reads a stretch, each byte once.
    ///
    /// # Errors
    /// [`Unreachable`]; some of it may have been read.
    fn read_bytes(&self, gpa: Gpa, bytes: &mut [u8]) -> Result<(), Unreachable>;

    /// Writes a stretch.
    ///
    /// # Errors
    /// [`Unreachable`]; some of it may be written.
    fn write_bytes(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), Unreachable>;
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
    /// Its calling area; none if a newer VMSA of the processor has it now.
    pub calling_area: Option<Taken>,
}

/// A calling area that a VMSA on record has lost to a newer one of its processor.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "goes to the newer VMSA, or back with Vcpus::return_area"]
pub struct Inherited {
    /// Who had it.
    pub from: Place,
    /// The area.
    pub area: Taken,
}

/// Why a calling area is not passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotPassedOn {
    /// No VMSA of the processor has it, or the caller calls from that one.
    NotThere,
    /// The VMSA that has it runs, or is looked at. Ask again.
    Busy,
}

/// The processor has as many VMSAs on record as there is room for; the pages come back.
#[derive(Debug, PartialEq, Eq)]
pub struct NoRoom(pub VcpuPages);

/// Where a VMSA is on record; only the registry makes and reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place(pub(crate) usize);

/// A VMSA that is being deleted, by whoever holds this.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "ends with Vcpus::end_delete or Vcpus::undo_delete"]
pub struct Deletion {
    /// Where it is on record.
    pub place: Place,
    /// Its pages.
    pub pages: VcpuPages,
}

/// What a processor owes from an earlier PVALIDATE: its rescinds were not known to be out of
/// everybody's reach when the bound on waiting was met, and the guest was told INCOMPLETE.
#[derive(Debug, PartialEq, Eq)]
pub struct Debt {
    /// The flush.
    pub flush: FlushOwed,
    /// The entry that is done, but could not be reported as done because it was the last one.
    pub done: Option<PvalidateEntry>,
}

/// Why a VMSA cannot be deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeleteRefusal {
    /// No guest processor has its VMSA there.
    Unknown,
    /// It is the VMSA that the guest was started with.
    Startup,
    /// It runs or is about to, or a call of it is being worked on, on another processor. The
    /// last matters as much as the first: its calling area is in use.
    InUse,
    /// Others looked at it all the time. Ask again.
    Busy,
}

/// What processors that the guest has not started have done ahead of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Steps {
    /// Regions looked at, on all processors.
    pub taken: u64,
    /// The most steps that ended between the making of a processor's first VMSA and that
    /// processor's going to run it.
    pub longest_wait: u64,
}

/// A VMSA that a newer one has replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replaced {
    /// This one.
    Here(Frame),
    /// There is none, and all places of the processor are taken: seen in the same look, because others may
    /// fill and empty places between two.
    None,
    /// There is none at the moment: a place is free, or somebody is just filling or emptying it.
    NotNow,
}

/// The registry of the guest's processors.
///
/// It answers for the pages that are lent as VMSAs and calling areas: a page is on record until
/// the hardware state that it describes is undone.
pub trait Vcpus {
    /// What was done ahead of the guest.
    fn steps(&self) -> Steps;

    /// Whether the VM has a processor with this APIC id.
    fn has_apic_id(&self, apic_id: u32) -> bool;

    /// SEV_FEATURES of the VMSA that the guest was started with.
    fn startup_features(&self) -> SevFeatures;

    /// The calling area of the VMSA that a processor works on a call of; none if it does not.
    /// Only the processor itself changes it, and nobody else deletes the VMSA meanwhile.
    fn calling_area(&self, vcpu: VcpuIndex) -> Option<Frame>;

    /// Puts another calling area in the place of the one of [`Vcpus::calling_area`], which is
    /// returned; none if there was none.
    fn exchange_calling_area(&self, vcpu: VcpuIndex, new: Taken) -> Option<Taken>;

    /// Records a new VMSA of the processor with this APIC id, and then makes it runnable: what can
    /// run is on record, so that a flush reaches it. Those the processor has already stay on
    /// record: the guest replaces the firmware's processors without deleting them.
    ///
    /// # Errors
    /// [`NoRoom`].
    fn register(&self, apic_id: u32, pages: VcpuPages) -> Result<(), NoRoom>;

    /// Takes the calling area at `area` from the VMSA of this processor that has it, which from
    /// then on makes no calls. Kernels start a processor anew with the calling area it has, and
    /// delete the old VMSA afterwards.
    ///
    /// # Errors
    /// [`NotPassedOn`]; nothing changed.
    fn pass_on_area(
        &self,
        caller: VcpuIndex,
        apic_id: u32,
        area: Frame,
    ) -> Result<Inherited, NotPassedOn>;

    /// Undoes [`Vcpus::pass_on_area`]; the area comes back if its former owner is no more.
    fn return_area(&self, inherited: Inherited) -> Option<Taken>;

    /// Of the VMSAs of a processor that a newer one has replaced, the `nth` oldest.
    fn replaced(&self, apic_id: u32, nth: usize) -> Replaced;

    /// Begins to delete: makes the VMSA impossible to run and hands out its pages. Until
    /// [`Vcpus::end_delete`] or [`Vcpus::undo_delete`] the VMSA can neither run nor be deleted by
    /// anybody else.
    ///
    /// # Errors
    /// [`DeleteRefusal`]; nothing changed.
    fn begin_delete(&self, caller: VcpuIndex, vmsa: Frame) -> Result<Deletion, DeleteRefusal>;

    /// Forgets a VMSA whose pages were given back.
    fn end_delete(&self, place: Place);

    /// Makes a VMSA that could not be given back runnable again; that of the caller itself when
    /// its call returns.
    fn undo_delete(&self, caller: VcpuIndex, deletion: Deletion);

    /// Whether `vcpu` works on a call from `vmsa`.
    fn runs_from(&self, vcpu: VcpuIndex, vmsa: Frame) -> bool;

    /// What a processor owes, which it owes no more to the registry.
    fn take_debt(&self, vcpu: VcpuIndex) -> Option<Debt>;

    /// Remembers what a processor owes; it owes nothing else.
    fn put_debt(&self, vcpu: VcpuIndex, debt: Debt);

    /// A request of a processor has found its pages in the state it asked for. Called by the processor
    /// itself, and counted in memory that no other writes to: such an answer takes no lock and costs
    /// nobody else anything (design §10).
    fn count_unchanged(&self, vcpu: VcpuIndex);

    /// How often that was so, on all processors.
    fn unchanged(&self) -> u64;
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
    /// another VMSA has left behind. It has not stopped yet either: its exit code is 0.
    ///
    /// # Errors
    /// As the instruction reported; the page is as it was, but for PCPU_ID and the exit code.
    fn make_vmsa(&self, vmsa: Frame) -> Result<(), AdjustFault>;

    /// Undoes [`VmsaPages::make_vmsa`] of a VMSA that was not registered.
    ///
    /// # Errors
    /// As the instruction reported; the page is a VMSA that cannot run.
    fn unmake_vmsa(&self, vmsa: Frame) -> Result<(), AdjustFault>;
}
