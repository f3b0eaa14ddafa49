//! The guest in its L2 VM: what it stops for, and what it is answered.
//!
//! To itself the guest is an ordinary trust domain: what the module does for one, the paravisor does
//! for it. Everything here is decided without hardware; [`Domain`] is what L1 has below it.
//!
//! | module | owns |
//! |---|---|
//! | [`vp`] | what is kept of one of the guest's processors while it does not run |
//! | [`interrupts`] | the virtual APIC of one of them |
//! | `exits` | what each exit means |
//! | `tdcall` | the guest's TDCALLs |
//! | `memory` | acceptance and conversion of pages, accesses to pages that are not accepted |
//! | `vmcall` | requests to the host: which are passed on, and which of its answers |
//! | [`msr`] | which model-specific registers are the guest's |
//!
//! Invariants: a page becomes the guest's or the host's through the engine and nowhere else; an address
//! of the guest's is checked against the map before anybody uses it; whatever the guest does it gets a
//! status or an exception, and only the host's lies end the machine.

use core::sync::atomic::{AtomicU64, Ordering};

use accept::{Backend, Engine};
use protocols::addr::Gpa;
use protocols::launch::Touch;
use protocols::tdx::metadata::{FieldId, TdControls};
use protocols::tdx::{Status, TdAttributes};
use protocols::terminate::TurnstileReason;

use crate::ahead::Ahead;

mod exits;
pub mod interrupts;
mod memory;
pub mod msr;
mod tdcall;
#[cfg(test)]
mod tests;
mod vmcall;
pub mod vp;

/// R10 to R15 of a request to the host.
pub type HostRegisters = [u64; 6];

/// Bytes of a report's data.
pub const REPORT_DATA: usize = 64;
/// Bytes of a report.
pub const REPORT: usize = 1024;
/// Bytes of a measurement.
pub const MEASUREMENT: usize = 48;

/// A leaf of L1's secure EPT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// 0 for 4 KiB, 1 for 2 MiB.
    pub level: u32,
    /// The page is there and not accepted.
    pub pending: bool,
}

/// An address of the guest's could not be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unreachable;

/// The trust domain as L1 has it: the module, the host behind it, and the guest's memory.
pub trait Domain {
    /// The bit of an address that says "shared".
    fn shared_bit(&self) -> u64;

    /// RCX, RDX, R8, R9, R10 of TDG.VP.INFO.
    fn info(&self) -> [u64; 5];

    /// CPUID; none if it is the host's to answer.
    fn cpuid(&self, leaf: u32, subleaf: u32) -> Option<[u32; 4]>;

    /// TDG.VM.RD.
    ///
    /// # Errors
    /// The module's status.
    fn read_vm(&self, field: FieldId) -> Result<u64, Status>;

    /// TDG.SYS.RD.
    ///
    /// # Errors
    /// The module's status.
    fn read_sys(&self, field: FieldId) -> Result<u64, Status>;

    /// TDG.MEM.PAGE.ATTR.RD of a private page.
    ///
    /// # Errors
    /// The module's status.
    fn mapping(&self, page: Gpa) -> Result<Mapping, Status>;

    /// TDG.MR.REPORT about this trust domain.
    ///
    /// # Errors
    /// The module's status.
    fn report(&self, data: &[u8; REPORT_DATA]) -> Result<[u8; REPORT], Status>;

    /// TDG.MR.RTMR.EXTEND.
    fn extend(&self, register: u64, value: &[u8; MEASUREMENT]) -> Status;

    /// TDG.VP.VMCALL.
    ///
    /// # Errors
    /// The module's status.
    fn ask_host(&self, registers: HostRegisters) -> Result<HostRegisters, Status>;

    /// ReportFatalError: R12, R13, and the text in the order of its registers. A host that goes on has
    /// not ended the trust domain.
    fn report_fatal_error(&self, operands: [u64; 2], text: [u64; 8]);

    /// Reads accepted memory of the guest.
    ///
    /// # Errors
    /// [`Unreachable`].
    fn read(&self, gpa: Gpa, bytes: &mut [u8]) -> Result<(), Unreachable>;

    /// Writes accepted memory of the guest.
    ///
    /// # Errors
    /// [`Unreachable`].
    fn write(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), Unreachable>;
}

/// What the guest has set for all of its processors.
#[derive(Debug, Default)]
pub struct GuestTd {
    /// TDCS.TD_CTLS.
    controls: AtomicU64,
}

impl GuestTd {
    /// As a trust domain with these attributes starts: they say whether its pending pages raise #VE.
    #[must_use]
    pub fn new(attributes: TdAttributes) -> Self {
        let mut controls = TdControls::empty();
        let disabled = attributes.contains(TdAttributes::SEPT_VE_DISABLE);
        controls.set(TdControls::PENDING_VE_DISABLE, disabled);
        Self {
            controls: AtomicU64::new(controls.bits()),
        }
    }

    fn controls(&self) -> TdControls {
        TdControls::from_bits_retain(self.controls.load(Ordering::Relaxed))
    }

    fn set_controls(&self, controls: TdControls) {
        self.controls.store(controls.bits(), Ordering::Relaxed);
    }
}

/// What follows an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Next {
    /// The guest goes on.
    Resume,
    /// It waits for an interrupt; with its interrupts off if `blocked`.
    Wait {
        /// Its interrupts are off.
        blocked: bool,
    },
    /// The machine ends: the host lied, or the guest cannot go on.
    End(TurnstileReason),
}

/// The paravisor's answers to one guest. Shared by its processors.
pub struct Service<'a, B, D> {
    /// Owner of the map.
    pub engine: &'a Engine<'a, B>,
    /// What is accepted before the guest asks.
    pub ahead: &'a Ahead,
    /// What is below.
    pub domain: D,
    /// What the guest has set.
    pub td: &'a GuestTd,
    /// The policy for memory that is not accepted.
    pub touch: Touch,
}

impl<B: Backend, D: Domain> Service<'_, B, D> {
    /// The bit of an address that says "shared".
    fn shared(&self) -> u64 {
        self.domain.shared_bit()
    }
}
