//! The engine's backend: blocks of guest memory to instructions on their mapping.
//!
//! No decisions are taken here. The engine calls with the region's lock held; every block lies
//! in a range of the map and therefore in the guest window.

use accept::{AdjustFault, Backend, Block, Broken, Fault, NotFlushed, Run, ValidateFault};
use protocols::addr::{Gpa, PAGE_SIZE, PageSize, Vmpl};

use crate::guest::GUEST_VMPL;
use crate::memory::guest_map;
use crate::platform::{
    AccessFault, AdjustError, FailedAt, MappedBlock, MappedRun, Platform, Rights, ValidateError,
};
use crate::system::GuestRegistry;

/// Status reported for a page that is not mapped and for an instruction that faulted (the
/// processor's FAIL_INPUT).
const FAIL_INPUT: u32 = 1;
/// The guest's level and all below it; the paravisor grants only to the first, but that may have
/// passed its rights on.
const LOWER_LEVELS: [Vmpl; 3] = [Vmpl::VMPL1, Vmpl::VMPL2, Vmpl::VMPL3];

/// The other processors a flush has to reach.
pub trait Others {
    /// Makes all of them drop their translations.
    ///
    /// # Errors
    /// [`NotFlushed`] when one could not be reached within its bound.
    fn flush_all(&self) -> Result<(), NotFlushed>;
}

impl Others for &GuestRegistry {
    fn flush_all(&self) -> Result<(), NotFlushed> {
        GuestRegistry::flush_all(self)
    }
}

/// There are none.
#[derive(Clone, Copy, Debug)]
pub struct Alone;

impl Others for Alone {
    fn flush_all(&self) -> Result<(), NotFlushed> {
        Ok(())
    }
}

/// A platform with the guest window as its view of memory.
pub struct WindowBackend<P, O = &'static GuestRegistry> {
    platform: P,
    registry: O,
}

impl<P: Platform, O: Others> WindowBackend<P, O> {
    /// A backend on `platform`; flushes reach all of `registry`.
    #[must_use]
    pub const fn new(platform: P, registry: O) -> Self {
        Self { platform, registry }
    }

    /// Makes a page that the guest has no access to any more a VMSA of the guest's level.
    ///
    /// The guest may read it from now on: OVMF and Linux take level and SEV features from the
    /// page when they ask the host to start the processor, after CREATE_VCPU (decision 006).
    ///
    /// # Errors
    ///
    /// As the instruction reported; nothing changed.
    pub fn make_vmsa(&self, page: Gpa) -> Result<(), AdjustFault> {
        let block = mapped(page, PageSize::Size4K).ok_or(AdjustFault::Failed(FAIL_INPUT))?;
        self.platform
            .adjust(block, GUEST_VMPL, Rights::ReadableVmsa)
            .map_err(adjust_fault)
    }

    /// Makes a VMSA an ordinary page again, which nobody below VMPL0 has rights to.
    ///
    /// # Errors
    ///
    /// As the instruction reported; nothing changed.
    pub fn unmake_vmsa(&self, page: Gpa) -> Result<(), AdjustFault> {
        let block = mapped(page, PageSize::Size4K).ok_or(AdjustFault::Failed(FAIL_INPUT))?;
        self.platform
            .adjust(block, GUEST_VMPL, Rights::None)
            .map_err(adjust_fault)
    }

    fn adjust(&self, block: Block, vmpl: Vmpl, rights: Rights) -> Result<(), AdjustFault> {
        let block = window(block).ok_or(AdjustFault::Failed(FAIL_INPUT))?;
        self.platform
            .adjust(block, vmpl, rights)
            .map_err(adjust_fault)
    }
}

impl<P: Platform, O: Others> Backend for WindowBackend<P, O> {
    fn validate(&self, block: Block) -> Result<(), ValidateFault> {
        let block = window(block).ok_or(ValidateFault::Failed(FAIL_INPUT))?;
        self.platform.validate(block).map_err(validate_fault)
    }

    fn validate_run(&self, run: Run) -> Result<(), Broken<ValidateFault>> {
        let run = run_in_window(run).ok_or(Broken {
            done: 0,
            fault: ValidateFault::Failed(FAIL_INPUT),
        })?;
        self.platform
            .validate_run(run)
            .map_err(|failed| broken(failed, validate_fault))
    }

    fn rescind(&self, block: Block) -> Result<(), ValidateFault> {
        let block = window(block).ok_or(ValidateFault::Failed(FAIL_INPUT))?;
        self.platform.rescind(block).map_err(validate_fault)
    }

    fn scrub(&self, block: Block) -> Result<(), Fault> {
        let block = window(block).ok_or(Fault::NotMapped)?;
        self.platform.scrub(block).map_err(|fault| {
            if fault.is_not_validated() {
                Fault::NotValidated
            } else {
                Fault::NotMapped
            }
        })
    }

    fn grant(&self, block: Block) -> Result<(), AdjustFault> {
        self.adjust(block, GUEST_VMPL, Rights::Full)
    }

    fn grant_run(&self, run: Run) -> Result<(), Broken<AdjustFault>> {
        let run = run_in_window(run).ok_or(Broken {
            done: 0,
            fault: AdjustFault::Failed(FAIL_INPUT),
        })?;
        self.platform
            .adjust_run(run, GUEST_VMPL, Rights::Full)
            .map_err(|failed| broken(failed, adjust_fault))
    }

    fn revoke(&self, block: Block) -> Result<(), AdjustFault> {
        for (done, vmpl) in LOWER_LEVELS.into_iter().enumerate() {
            if let Err(fault) = self.adjust(block, vmpl, Rights::None) {
                if done > 0 {
                    // The guest's level is the only one that was granted anything by us. If
                    // this fails too, the page stays without rights: the guest loses a page it
                    // asked to lose.
                    let _ = self.grant(block);
                }
                return Err(fault);
            }
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), NotFlushed> {
        self.platform.flush_local();
        self.registry.flush_all()
    }
}

#[cfg(feature = "faults")]
impl<P: Platform> crate::faulty::OweFlush for WindowBackend<P> {
    fn owe_flush(&self) {
        self.platform.flush_local();
        self.registry.owe_flush();
    }
}

/// The block in the guest window.
fn window(block: Block) -> Option<MappedBlock> {
    let size = match block.size() {
        accept::PageSize::Size4K => PageSize::Size4K,
        accept::PageSize::Size2M => PageSize::Size2M,
    };
    mapped(Gpa::new(block.gpa()), size)
}

fn mapped(gpa: Gpa, size: PageSize) -> Option<MappedBlock> {
    let address = guest_map::address(gpa, size.bytes()).ok()?;
    MappedBlock::try_new(address, size)
}

/// The run in the guest window.
fn run_in_window(run: Run) -> Option<MappedRun> {
    let pages = run.pages() as u64;
    let address = guest_map::address(Gpa::new(run.first().gpa()), pages * PAGE_SIZE).ok()?;
    MappedRun::try_new(address, pages)
}

/// Which page of a run failed, as the engine has it.
fn broken<E, F>(failed: FailedAt<E>, fault: impl Fn(E) -> F) -> Broken<F> {
    Broken {
        done: failed.index as usize,
        fault: fault(failed.error),
    }
}

fn validate_fault(error: ValidateError) -> ValidateFault {
    match error {
        ValidateError::SizeMismatch => ValidateFault::SizeMismatch,
        ValidateError::NoChange => ValidateFault::AlreadyDone,
        ValidateError::Status(status) => ValidateFault::Failed(status),
        ValidateError::Fault(_) => ValidateFault::Failed(FAIL_INPUT),
    }
}

fn adjust_fault(error: AdjustError) -> AdjustFault {
    match error {
        AdjustError::SizeMismatch => AdjustFault::SizeMismatch,
        AdjustError::Status(status) => AdjustFault::Failed(status),
        AdjustError::Fault(fault) if fault.is_not_validated() => AdjustFault::NotValidated,
        AdjustError::Fault(AccessFault { .. }) => AdjustFault::Failed(FAIL_INPUT),
    }
}

const _: () = assert!(PAGE_SIZE == PageSize::Size4K.bytes());
