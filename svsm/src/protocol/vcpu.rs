//! REMAP_CA, CREATE_VCPU and DELETE_VCPU: pages that the guest lends as calling areas and VMSAs
//! (SVSM 6).
//!
//! A page is taken from the guest *before* anybody looks at what is in it: its state becomes Owned
//! under the region's lock, and for a VMSA the guest's access is revoked and flushed. What is
//! found good can then not change any more. Whatever fails afterwards gives the page back.

use accept::{AdjustFault, Backend, Error, Frame, NotReturned, Role, Taken};
use protocols::addr::LARGE_PAGE_SIZE;
use protocols::svsm::ResultCode;
use protocols::terminate::TurnstileReason;
use protocols::vmsa::Efer;

use super::environment::{
    DeleteRefusal, Deletion, GuestMemory, Inherited, NoRoom, NotPassedOn, Place, Replaced,
    Unreachable, VcpuIndex, VcpuPages, Vcpus, VmsaPages,
};
use super::{Finished, LOST, Service, Stop, pending_flag, stop_for};
use crate::attestation::Carrier;

/// How often a page is tried to be given back although another processor holds the lock.
const RETURN_TRIES: u32 = 64;

/// How often room is made for a VMSA: others may take what was made.
const REGISTER_TRIES: u32 = 16;

/// EAX of RMPADJUST: the VMSA is running (APM 15.36.12).
const STATUS_IN_USE: u32 = 3;

/// EAX of RMPADJUST on a small page that "mismatches", which no processor says.
const STATUS_SIZE_MISMATCH: u32 = 6;

impl<B: Backend, M: GuestMemory, V: Vcpus, P: VmsaPages, C: Carrier> Service<'_, B, M, V, P, C> {
    /// Moves the caller's calling area to the page at `gpa`.
    pub(super) fn remap_calling_area(&self, caller: VcpuIndex, gpa: u64) -> Result<(), Stop> {
        let new = calling_area_at(gpa)?;
        let old = self.vcpus.calling_area(caller);
        if old == Some(new) {
            return Ok(());
        }
        let new = self.take(new, Role::CallingArea)?;
        if self.memory.write_u8(pending_flag(new.frame()), 0).is_err() {
            // Accepted a moment ago and gone now: as with any argument page, the guest's error.
            self.give_back(new)?;
            return Err(ResultCode::INVALID_ADDRESS.into());
        }
        // The old area is ours for the last time: afterwards it may be anything of the guest's.
        if let Some(old) = old {
            self.memory
                .write_u8(pending_flag(old), 0)
                .map_err(|Unreachable| LOST)?;
        }
        match self.vcpus.exchange_calling_area(caller, new) {
            Some(old) => self.give_back(old),
            None => Ok(()),
        }
    }

    /// Makes the page at `vmsa` the VMSA of a processor with the calling area at `area`.
    pub(super) fn create_vcpu(
        &self,
        caller: VcpuIndex,
        vmsa: u64,
        area: u64,
        apic_id: u32,
    ) -> Result<(), Stop> {
        let vmsa_frame = Frame::starting_at(vmsa).ok_or(ResultCode::INVALID_PARAMETER)?;
        let area_frame = calling_area_at(area)?;
        // Processor erratum: such a VMSA makes the host take false RMP faults, and hosts refuse it.
        if vmsa.is_multiple_of(LARGE_PAGE_SIZE) || !self.vcpus.has_apic_id(apic_id) {
            return Err(ResultCode::INVALID_PARAMETER.into());
        }
        let vmsa = self.take(vmsa_frame, Role::Vmsa)?;
        let (area, heir_of) = match self.area_for(caller, apic_id, area_frame) {
            Ok(area) => area,
            Err(stop) => {
                self.give_back(vmsa)?;
                return Err(stop);
            }
        };
        let pages = VcpuPages {
            vmsa,
            calling_area: Some(area),
        };
        let made = self
            .inspect(vmsa_frame)
            .and_then(|()| self.make_vmsa(vmsa_frame));
        let (pages, stop) = match made {
            Ok(()) => match self.register(caller, apic_id, pages)? {
                Ok(()) => return Ok(()),
                Err((NoRoom(pages), code)) => {
                    self.vmsa_pages
                        .unmake_vmsa(vmsa_frame)
                        .map_err(stop_for_adjust)?;
                    (pages, code.into())
                }
            },
            Err(stop @ Stop::Machine(_)) => return Err(stop),
            Err(stop) => (pages, stop),
        };
        self.give_back(pages.vmsa)?;
        self.give_back_area(pages.calling_area, heir_of)?;
        Err(stop)
    }

    /// The page at `area` as the calling area of a new VMSA: one of the guest's pages, or the
    /// area that another VMSA of the same processor has had so far. Which one that was is told
    /// in the second case.
    fn area_for(
        &self,
        caller: VcpuIndex,
        apic_id: u32,
        area: Frame,
    ) -> Result<(Taken, Option<Place>), Stop> {
        match self.take(area, Role::CallingArea) {
            Err(Stop::Result(ResultCode::INVALID_ADDRESS)) => {}
            taken => return taken.map(|area| (area, None)),
        }
        match self.vcpus.pass_on_area(caller, apic_id, area) {
            Ok(Inherited { from, area }) => Ok((area, Some(from))),
            Err(NotPassedOn::NotThere) => Err(ResultCode::INVALID_ADDRESS.into()),
            Err(NotPassedOn::Busy) => Err(ResultCode::BUSY.into()),
        }
    }

    /// Gives a calling area back to whoever had it before.
    fn give_back_area(&self, area: Option<Taken>, heir_of: Option<Place>) -> Result<(), Stop> {
        let left = match (area, heir_of) {
            (Some(area), Some(from)) => self.vcpus.return_area(Inherited { from, area }),
            (area, _) => area,
        };
        left.map_or(Ok(()), |area| self.give_back(area))
    }

    /// Records a VMSA. Where there is no room, the oldest replaced VMSA of the processor that can
    /// be deleted is deleted on the guest's behalf: kernels replace VMSAs without deleting them,
    /// and one that was replaced and does not run is of no use (decision 009).
    fn register(
        &self,
        caller: VcpuIndex,
        apic_id: u32,
        pages: VcpuPages,
    ) -> Result<Result<(), (NoRoom, ResultCode)>, Stop> {
        let mut refused = match self.vcpus.register(apic_id, pages) {
            Ok(()) => return Ok(Ok(())),
            Err(refused) => refused,
        };
        let mut kept = 0;
        let mut code = ResultCode::INVALID_REQUEST;
        for _ in 0..REGISTER_TRIES {
            let old = match self.vcpus.replaced(apic_id, kept) {
                Replaced::Here(old) => old,
                absent => {
                    if absent == Replaced::NotNow {
                        code = ResultCode::BUSY;
                    }
                    return Ok(match self.vcpus.register(apic_id, refused.0) {
                        Ok(()) => Ok(()),
                        Err(refused) => Err((refused, code)),
                    });
                }
            };
            if self.vcpus.runs_from(caller, old) {
                kept += 1;
                continue;
            }
            match self.delete(caller, old) {
                Ok(()) => {}
                Err(stop @ Stop::Machine(_)) => return Err(stop),
                Err(Stop::Result(refusal)) => {
                    // Others make and delete VMSAs of this processor: that passes.
                    let passes = [ResultCode::BUSY, ResultCode::INVALID_PARAMETER];
                    if passes.contains(&refusal) {
                        code = ResultCode::BUSY;
                    }
                    kept += 1;
                    continue;
                }
            }
            refused = match self.vcpus.register(apic_id, refused.0) {
                Ok(()) => return Ok(Ok(())),
                Err(refused) => refused,
            };
        }
        // Others were quicker each time.
        Ok(Err((refused, ResultCode::BUSY)))
    }

    /// Whether the page, which the guest cannot reach any more, would make a good VMSA.
    fn inspect(&self, vmsa: Frame) -> Result<(), Stop> {
        let claims = self.vmsa_pages.claims(vmsa).map_err(|Unreachable| LOST)?;
        // The level: a VMSA of level 0 would be a second paravisor. SVME: without it the guest
        // meant nothing runnable. The features: with others the guest could, for instance, have
        // its exceptions reflected to nobody, or its registers hidden from us.
        let good = claims.vmpl == self.vmsa_pages.guest_vmpl()
            && claims.efer.contains(Efer::SVME)
            && claims.sev_features == self.vcpus.startup_features();
        if good {
            Ok(())
        } else {
            Err(ResultCode::INVALID_PARAMETER.into())
        }
    }

    fn make_vmsa(&self, vmsa: Frame) -> Result<(), Stop> {
        self.vmsa_pages.make_vmsa(vmsa).map_err(stop_for_adjust)
    }

    /// Gives the VMSA at `gpa` and its calling area back to the guest.
    pub(super) fn delete_vcpu(&self, caller: VcpuIndex, gpa: u64) -> Result<Finished, Stop> {
        let frame = Frame::starting_at(gpa).ok_or(ResultCode::INVALID_PARAMETER)?;
        let own = self.vcpus.runs_from(caller, frame);
        self.delete(caller, frame)?;
        Ok(if own {
            Finished::CallerGone
        } else {
            Finished::Returns
        })
    }

    fn delete(&self, caller: VcpuIndex, frame: Frame) -> Result<(), Stop> {
        let Deletion { place, pages } =
            self.vcpus
                .begin_delete(caller, frame)
                .map_err(|refusal| match refusal {
                    DeleteRefusal::Unknown | DeleteRefusal::Startup => {
                        ResultCode::INVALID_PARAMETER
                    }
                    DeleteRefusal::InUse => ResultCode::FAIL_IN_USE,
                    DeleteRefusal::Busy => ResultCode::BUSY,
                })?;
        let VcpuPages { vmsa, calling_area } = pages;
        if let Err(NotReturned { taken, error }) = self.engine.give_back(vmsa) {
            let pages = VcpuPages {
                vmsa: taken,
                calling_area,
            };
            self.vcpus.undo_delete(caller, Deletion { place, pages });
            return Err(match error {
                Error::Backend {
                    status: STATUS_IN_USE,
                    ..
                } => ResultCode::FAIL_IN_USE.into(),
                error => stop_for(error, TurnstileReason::NOT_VALIDATED),
            });
        }
        let returned = self.give_back_area(calling_area, None);
        self.vcpus.end_delete(place);
        returned
    }

    fn take(&self, frame: Frame, role: Role) -> Result<Taken, Stop> {
        self.engine.take(frame, role).map_err(|error| match error {
            // The page is the guest's on record, but lost: an argument page, so the guest's error.
            Error::HostLied => ResultCode::INVALID_ADDRESS.into(),
            error => stop_for(error, TurnstileReason::NOT_VALIDATED),
        })
    }

    /// Gives a page back. One that the platform does not let us give stays Owned: the guest has
    /// lost a page, nobody has gained one.
    fn give_back(&self, page: Taken) -> Result<(), Stop> {
        let mut page = page;
        for _ in 0..RETURN_TRIES {
            match self.engine.give_back(page) {
                Ok(()) => return Ok(()),
                Err(NotReturned {
                    taken,
                    error: Error::Busy,
                }) => page = taken,
                Err(NotReturned {
                    error: Error::HostLied,
                    ..
                }) => return Err(LOST),
                Err(NotReturned { taken, error }) => {
                    log::error!("{:?} cannot be given back: {error:?}", taken.frame());
                    return Ok(());
                }
            }
        }
        log::error!(
            "{:?} cannot be given back: its region stays locked",
            page.frame()
        );
        Ok(())
    }
}

/// The page at `gpa` as a calling area. The first page of memory cannot be one: the table that
/// shows calling areas says 0 for "none", and a processor without one is not answered.
fn calling_area_at(gpa: u64) -> Result<Frame, ResultCode> {
    match Frame::starting_at(gpa) {
        Some(_) if gpa == 0 => Err(ResultCode::INVALID_ADDRESS),
        Some(frame) => Ok(frame),
        None => Err(ResultCode::INVALID_PARAMETER),
    }
}

/// What a caller is told when the attribute of a VMSA page could not be set.
fn stop_for_adjust(fault: AdjustFault) -> Stop {
    match fault {
        AdjustFault::NotValidated => LOST,
        AdjustFault::SizeMismatch => ResultCode::of_instruction(STATUS_SIZE_MISMATCH).into(),
        AdjustFault::Failed(status) => ResultCode::of_instruction(status).into(),
    }
}
