//! The saved state of a guest's processor, read and changed while it cannot run.
//!
//! A VMSA page is Owned and on record as such, so a fault on it means that the host took or
//! replaced it: I6, the machine ends. The host may still run the VMSA at any moment while its
//! EFER.SVME is set; [`GuestVmsa::stop`] comes before any look at it, and results are written
//! before [`GuestVmsa::release`].
//!
//! Before a processor lets its guest go on it removes the exit code ([`GuestVmsa::resume`]), which
//! the next exit writes. So a VMSA without one runs, or the host was asked to run it; and a call
//! is only ever taken from a VMSA that has stopped since the last one.

use core::mem::offset_of;

use accept::{AdjustFault, Frame};
use protocols::addr::{Gpa, PAGE_SIZE, PageSize};
use protocols::exit_code::ExitCode;
use protocols::terminate::TurnstileReason;
use protocols::vmsa::{Efer, SevFeatures, Vmsa};

use super::GUEST_VMPL;
use crate::memory::layout::PageRange;
use crate::memory::{access, guest_map};
use crate::platform::snp::Snp;
use crate::platform::{AccessFault, AdjustError, MappedBlock, Platform, Rights};
use crate::protocol::{Registers, Unreachable, VmsaClaims, VmsaPages};
use crate::system::{self, GuestEngine};
use crate::terminate::terminate;
use crate::vcpus::VmsaControl;

/// Exit code of a VMSA that has not stopped since it was last released; no processor writes it.
const NOT_STOPPED: ExitCode = ExitCode(0x5475_726E_7374_696C);

/// A VMSA page, by where it is mapped.
#[derive(Clone, Copy, Debug)]
pub struct GuestVmsa {
    address: u64,
}

impl GuestVmsa {
    /// Makes the processor impossible to run: VMRUN refuses a VMSA without SVME.
    pub fn stop(self) {
        on_record(self.try_stop());
    }

    fn try_stop(self) -> Result<(), AccessFault> {
        access::clear_bits(self.field(Vmsa::EFER_OFFSET), Efer::SVME.bits())
    }

    /// Whether the host could run it: not between [`GuestVmsa::stop`] and
    /// [`GuestVmsa::release`], unless it ran all the while and its exit has put the old EFER back.
    #[must_use]
    pub fn is_runnable(self) -> bool {
        Efer(self.load(Vmsa::EFER_OFFSET)).contains(Efer::SVME)
    }

    /// Lets the guest go on from here, as soon as the host runs it: until its next exit nobody
    /// takes a call from it, or deletes it.
    pub fn resume(self) {
        self.store(offset_of!(Vmsa, guest_exit_code), NOT_STOPPED.0);
        self.release();
    }

    /// Whether it has not stopped since [`GuestVmsa::resume`].
    #[must_use]
    pub fn is_awaited(self) -> bool {
        self.exit_code() == NOT_STOPPED
    }

    /// Whether it has never been run: then it has no exit code but the one of its making.
    #[must_use]
    pub fn is_untouched(self) -> bool {
        self.exit_code() == ExitCode(0)
    }

    /// Makes the processor runnable again. Everything the guest shall see is written already.
    pub fn release(self) {
        on_record(access::set_bits(
            self.field(Vmsa::EFER_OFFSET),
            Efer::SVME.bits(),
        ));
    }

    /// Why the processor stopped last.
    #[must_use]
    pub fn exit_code(self) -> ExitCode {
        ExitCode(self.load(offset_of!(Vmsa, guest_exit_code)))
    }

    /// The registers of a call; the processor is stopped.
    #[must_use]
    pub fn registers(self) -> Registers {
        Registers {
            rax: self.load(offset_of!(Vmsa, rax)),
            rcx: self.load(offset_of!(Vmsa, rcx)),
            rdx: self.load(offset_of!(Vmsa, rdx)),
            r8: self.load(offset_of!(Vmsa, r8)),
            r9: self.load(offset_of!(Vmsa, r9)),
        }
    }

    /// Writes the results of a call; the processor is stopped.
    pub fn set_registers(self, registers: &Registers) {
        self.store(offset_of!(Vmsa, rax), registers.rax);
        self.store(offset_of!(Vmsa, rcx), registers.rcx);
        self.store(offset_of!(Vmsa, rdx), registers.rdx);
        self.store(offset_of!(Vmsa, r8), registers.r8);
        self.store(offset_of!(Vmsa, r9), registers.r9);
    }

    /// Forces the next VMRUN to drop all translations (APM 15.36.15).
    pub fn owe_flush(self) {
        on_record(self.try_owe_flush());
    }

    /// No exit has happened yet, whatever the guest has written there.
    fn try_clear_exit_code(self) -> Result<(), AccessFault> {
        access::store_u64(self.field(offset_of!(Vmsa, guest_exit_code)), 0)
    }

    fn try_owe_flush(self) -> Result<(), AccessFault> {
        access::store_u64(self.field(offset_of!(Vmsa, pcpu_id)), 0)
    }

    /// Whether a flush owed since [`GuestVmsa::owe_flush`] has happened: the processor was run.
    #[must_use]
    pub fn has_flushed(self) -> bool {
        self.load(offset_of!(Vmsa, pcpu_id)) != 0
    }

    fn field(self, offset: usize) -> u64 {
        self.address + offset as u64
    }

    fn load(self, offset: usize) -> u64 {
        on_record(access::load_u64(self.field(offset)))
    }

    fn store(self, offset: usize, value: u64) {
        on_record(access::store_u64(self.field(offset), value));
    }
}

/// Where VMSA pages are mapped: those of the region one to one, the guest's in the window.
#[derive(Clone, Copy, Debug)]
pub struct VmsaWindow {
    /// The paravisor's region.
    pub region: PageRange,
    /// The processor.
    pub platform: Snp,
    /// The deliberate fault of a test build.
    #[cfg(feature = "faults")]
    pub fault: protocols::launch::Fault,
}

impl VmsaWindow {
    /// The VMSA in this page, which is on record as one.
    #[must_use]
    pub fn vmsa(self, page: Frame) -> GuestVmsa {
        let gpa = Gpa::new(page.gpa());
        let address = if self.holds(page) {
            gpa.get()
        } else {
            on_record(guest_map::address(gpa, PAGE_SIZE))
        };
        GuestVmsa { address }
    }

    /// Whether the page lies in the region.
    fn holds(&self, page: Frame) -> bool {
        (self.region.start()..self.region.end()).contains(&Gpa::new(page.gpa()))
    }
}

impl VmsaControl for VmsaWindow {
    fn stop(&self, vmsa: Frame) {
        self.vmsa(vmsa).stop();
    }

    fn release(&self, vmsa: Frame) {
        self.vmsa(vmsa).release();
    }

    fn owe_flush(&self, vmsa: Frame) {
        self.vmsa(vmsa).owe_flush();
    }

    fn has_flushed(&self, vmsa: Frame) -> bool {
        self.vmsa(vmsa).has_flushed()
    }

    fn is_awaited(&self, vmsa: Frame) -> bool {
        self.vmsa(vmsa).is_awaited()
    }

    fn is_untouched(&self, vmsa: Frame) -> bool {
        self.vmsa(vmsa).is_untouched()
    }

    #[cfg(feature = "faults")]
    fn rests(&self, vmsa: Frame) -> bool {
        self.fault == protocols::launch::Fault::IN_USE_VMSA
            || !self.is_awaited(vmsa) && !self.is_running(vmsa)
    }

    fn is_running(&self, vmsa: Frame) -> bool {
        let GuestVmsa { address } = self.vmsa(vmsa);
        let rights = if self.holds(vmsa) {
            Rights::Vmsa
        } else {
            Rights::ReadableVmsa
        };
        // The rights it has already: nothing changes, but the processor says "in use" of a VMSA
        // between VMRUN and the exit (APM 15.36.12).
        let asked = MappedBlock::try_new(address, PageSize::Size4K)
            .map(|block| self.platform.adjust(block, GUEST_VMPL, rights));
        match asked {
            Some(Ok(())) => false,
            Some(Err(AdjustError::Fault(fault))) => on_record(Err(fault)),
            Some(Err(AdjustError::SizeMismatch | AdjustError::Status(_))) | None => true,
        }
    }
}

/// Pages that the guest wants to be VMSAs.
#[derive(Clone, Copy)]
pub struct NewVmsas {
    /// Its backend has the instruction.
    pub engine: &'static GuestEngine,
}

impl VmsaPages for NewVmsas {
    fn guest_vmpl(&self) -> u8 {
        GUEST_VMPL.number()
    }

    fn claims(&self, vmsa: Frame) -> Result<VmsaClaims, Unreachable> {
        let page = guest_map::address(Gpa::new(vmsa.gpa()), PAGE_SIZE).map_err(|_| Unreachable)?;
        let load = |offset| access::load_u64(page + offset as u64).map_err(|_| Unreachable);
        Ok(VmsaClaims {
            vmpl: access::load_u8(page + offset_of!(Vmsa, vmpl) as u64).map_err(|_| Unreachable)?,
            efer: Efer(load(Vmsa::EFER_OFFSET)?),
            sev_features: SevFeatures(load(offset_of!(Vmsa, sev_features))?),
        })
    }

    fn make_vmsa(&self, vmsa: Frame) -> Result<(), AdjustFault> {
        let page = page_of(vmsa).map_err(|_| AdjustFault::NotValidated)?;
        page.try_stop()
            .and_then(|()| page.try_owe_flush())
            .and_then(|()| page.try_clear_exit_code())
            .map_err(|_| AdjustFault::NotValidated)?;
        let made = system::window_backend(self.engine).make_vmsa(Gpa::new(vmsa.gpa()));
        if made.is_err() {
            page.release();
        }
        made
    }

    fn unmake_vmsa(&self, vmsa: Frame) -> Result<(), AdjustFault> {
        system::window_backend(self.engine).unmake_vmsa(Gpa::new(vmsa.gpa()))?;
        page_of(vmsa)
            .map(GuestVmsa::release)
            .map_err(|_| AdjustFault::NotValidated)
    }
}

/// A page of the guest that is about to be a VMSA, or was not to become one.
fn page_of(vmsa: Frame) -> Result<GuestVmsa, AccessFault> {
    let address = guest_map::address(Gpa::new(vmsa.gpa()), PAGE_SIZE)?;
    Ok(GuestVmsa { address })
}

/// I6: a page that the map says is valid and ours faulted.
fn on_record<T>(result: Result<T, AccessFault>) -> T {
    result.unwrap_or_else(|_| terminate(TurnstileReason::NOT_VALIDATED))
}
