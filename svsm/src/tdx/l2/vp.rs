//! What is kept of one of the guest's processors while it does not run.

use accept::Withdrawn;
use protocols::tdx::l2::EnterState;
use protocols::tdx::ve::{self, EptViolation, ExitReason, VeInfo};
use protocols::tdx::vmcall::register::COUNT;
use protocols::tdx::vmcs::interruption::{Event, Kind};
use x86_64::structures::idt::PageFaultErrorCode;

use super::interrupts::{IsException, VirtualApic};

/// Vector of #DF.
const DOUBLE_FAULT: u8 = 8;
/// Vector of #UD.
const INVALID_OPCODE: u8 = 6;
/// Vector of #GP.
const GENERAL_PROTECTION: u8 = 13;
/// Vector of #PF.
const PAGE_FAULT: u8 = 14;

/// An event to be delivered when the processor goes on: the fields of the entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Injection {
    /// Interruption information.
    pub information: u32,
    /// Error code, if the event has one.
    pub error: u32,
    /// Length of the instruction that it is an event of; 0 if it is not an instruction's.
    pub length: u32,
    /// CR2 from then on, if the event is a page fault. There is no field for it: the guest has L1's.
    pub address: Option<u64>,
}

/// What is to become of a block that the guest has no access to any more.
#[derive(Debug)]
pub(super) enum Debt {
    /// The host has it.
    Settle(Withdrawn),
    /// It goes back to the guest.
    Reinstate(Withdrawn),
}

/// One of the guest's processors.
#[derive(Debug)]
pub struct Vp {
    /// Its number.
    pub index: u32,
    /// Its registers, as the module takes and gives them.
    pub state: EnterState,
    /// Its virtual APIC.
    pub apic: &'static VirtualApic,
    /// What it has last written to the spurious-interrupt vector register.
    pub spurious: u32,
    /// It goes on behind an instruction that was carried out for it.
    pub stepped: bool,
    /// The event that it goes on with.
    pub injection: Option<Injection>,
    /// The information of a #VE that it has not asked for yet.
    pub(super) ve: Option<VeInfo>,
    /// Every CPUID raises #VE in supervisor mode, in user mode.
    pub(super) cpuid_ve: [bool; 2],
    /// A block whose lock could not be had at the end of a request of this processor's.
    pub(super) debt: Option<Debt>,
    /// Delivery of an event was interrupted by the exit: whether that was an exception.
    pub(super) vectoring: Option<bool>,
}

impl Vp {
    /// A processor with these registers and this APIC, on which the spurious-interrupt vector register
    /// has this value.
    #[must_use]
    pub const fn new(
        index: u32,
        state: EnterState,
        apic: &'static VirtualApic,
        spurious: u32,
    ) -> Self {
        Self {
            index,
            state,
            apic,
            spurious,
            stepped: false,
            injection: None,
            ve: None,
            cpuid_ve: [false; 2],
            debt: None,
            vectoring: None,
        }
    }

    /// Gives it an interrupt.
    ///
    /// # Errors
    ///
    /// [`IsException`].
    pub fn post(&mut self, vector: u8) -> Result<(), IsException> {
        self.state.interrupt_status = self.apic.post(self.state.interrupt_status, vector)?;
        Ok(())
    }

    /// Whether it has an interrupt that ends a HLT.
    #[must_use]
    pub fn is_interrupted(&self) -> bool {
        self.apic.is_deliverable(self.state.interrupt_status)
    }

    /// An event whose delivery the exit interrupted, with the length of its instruction: it is delivered
    /// again, unless another one is due. Then an interrupt waits once more; an exception has become a
    /// double fault, or comes again with the instruction that raised it, and so does INT n.
    pub(super) fn interrupted(&mut self, field: u64, length: u32) {
        let Some(event) = Event::decode(field as u32) else {
            return;
        };
        if self.injection.is_none() {
            self.injection = Some(Injection {
                information: event.encode(),
                error: (field >> 32) as u32,
                length: match event.kind {
                    Kind::SOFTWARE_INTERRUPT
                    | Kind::PRIVILEGED_SOFTWARE
                    | Kind::SOFTWARE_EXCEPTION => length,
                    _ => 0,
                },
                // Its own page faults have set CR2.
                address: None,
            });
        } else if event.kind == Kind::EXTERNAL {
            self.state.interrupt_status = self
                .apic
                .take_back(self.state.interrupt_status, event.vector);
        }
    }

    /// Its general registers.
    pub(super) const fn gprs(&mut self) -> &mut [u64; COUNT] {
        &mut self.state.gprs
    }

    /// Goes on behind an instruction.
    pub(super) const fn skip(&mut self, length: u32) {
        self.state.rip = self.state.rip.wrapping_add(length as u64);
        self.stepped = true;
    }

    /// #UD.
    pub(super) fn undefined_opcode(&mut self) {
        self.raise(INVALID_OPCODE, None);
    }

    /// #GP(0).
    pub(super) fn general_protection(&mut self) {
        self.raise(GENERAL_PROTECTION, Some(0));
    }

    /// #PF of an access to this linear address, whose translation has a reserved bit set.
    pub(super) fn reserved_bits(&mut self, address: u64, access: EptViolation, user: bool) {
        use PageFaultErrorCode as Error;
        let mut error = Error::PROTECTION_VIOLATION | Error::MALFORMED_TABLE;
        let is = |kind| access.contains(kind);
        error.set(Error::CAUSED_BY_WRITE, is(EptViolation::WRITE));
        error.set(Error::INSTRUCTION_FETCH, is(EptViolation::FETCH));
        error.set(Error::USER_MODE, user);
        self.raise(PAGE_FAULT, Some(error.bits() as u32));
        if let Some(event) = &mut self.injection {
            event.address = Some(address);
        }
    }

    /// #VE, or #DF if the information of the one before was not asked for.
    pub(super) fn virtualization(&mut self, info: VeInfo) {
        if self.ve.is_some() {
            return self.raise(DOUBLE_FAULT, Some(0));
        }
        self.ve = Some(info);
        self.raise(ve::VECTOR, None);
    }

    /// #VE for an instruction.
    pub(super) fn instruction_ve(
        &mut self,
        reason: ExitReason,
        qualification: u64,
        instruction: u64,
    ) {
        self.virtualization(VeInfo {
            reason,
            qualification,
            gla: 0,
            gpa: 0,
            instruction_length: (instruction >> 32) as u32,
            instruction_info: instruction as u32,
        });
    }

    /// An exception. One that comes while another is being delivered is a double fault; the processor
    /// makes a shutdown of one that comes during that.
    fn raise(&mut self, vector: u8, error: Option<u32>) {
        let (vector, error) = match self.vectoring {
            Some(true) => (DOUBLE_FAULT, Some(0)),
            _ => (vector, error),
        };
        self.injection = Some(Injection {
            information: Event {
                kind: Kind::EXCEPTION,
                vector,
                has_error: error.is_some(),
            }
            .encode(),
            error: error.unwrap_or(0),
            length: 0,
            address: None,
        });
    }
}
