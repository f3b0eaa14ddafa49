//! TDX: pages are accepted and given to the guest's L2 VM by TDCALL.
//!
//! The logic is here and knows the instruction only as the trait [`Tdcall`], so that it is tested
//! on the host against a model of the secure EPT. Where the engine's steps have no instruction on
//! this platform they are empty: an accept zeroes the page (no scrub), and a page is removed by the
//! host (no rescind; the next accept tells whether it really went).

use accept::{AdjustFault, Backend, Block, Broken, Fault, NotFlushed, Run, ValidateFault};
use protocols::addr::{Gpa, PAGE_SIZE, PageSize};
use protocols::tdx::{L2Vm, Leaf, MAPPING_PENDING, PageAttributes, Status, page_operand};

pub mod map_gpa;
#[cfg(target_os = "none")]
pub mod module;
#[cfg(test)]
mod tests;

/// How often a call is repeated that finds its operand busy. Each repetition is a trip into the
/// module; what holds the operand for longer than so many is a host that means to.
const BUSY_LIMIT: u32 = 10_000;
/// How often attributes are written that do not read back as written.
const REPEAT_LIMIT: u32 = 4;

/// The operands of a call. By value: each repetition loads all of them anew.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Operands {
    /// RCX.
    pub rcx: u64,
    /// RDX.
    pub rdx: u64,
    /// R8.
    pub r8: u64,
    /// R9.
    pub r9: u64,
}

/// What a call returned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// RAX: the completion status.
    pub rax: u64,
    /// RCX.
    pub rcx: u64,
    /// RDX.
    pub rdx: u64,
    /// R8.
    pub r8: u64,
    /// R9.
    pub r9: u64,
    /// R10.
    pub r10: u64,
}

/// The instruction.
pub trait Tdcall {
    /// Executes TDCALL once.
    fn tdcall(&self, leaf: Leaf, operands: Operands) -> Outcome;
}

/// Makes sure that no vCPU of the guest uses an old translation any more.
pub trait FlushOthers {
    /// Returns when every other vCPU has left the guest since the call.
    ///
    /// # Errors
    /// [`NotFlushed`] when that takes too long.
    fn flush_others(&self) -> Result<(), NotFlushed>;
}

/// The engine's backend on TDX. The guest is L2 VM 1.
pub struct TdxBackend<T, F> {
    module: T,
    others: F,
}

/// The guest's VM.
pub const GUEST: L2Vm = L2Vm::Vm1;

impl<T: Tdcall, F: FlushOthers> TdxBackend<T, F> {
    /// A backend on `module`; flushes reach all other vCPUs by `others`.
    pub const fn new(module: T, others: F) -> Self {
        Self { module, others }
    }

    /// The instruction, for tests.
    pub const fn module(&self) -> &T {
        &self.module
    }

    /// Repeats a call while it finds its operand busy.
    #[inline]
    fn call(&self, leaf: Leaf, operands: Operands) -> (Status, Outcome) {
        let outcome = self.module.tdcall(leaf, operands);
        let status = Status::of(outcome.rax);
        // Success first: it is what 512 small pages in a row come to.
        if status != Status::SUCCESS && status.is_busy() {
            return self.call_again(leaf, operands);
        }
        (status, outcome)
    }

    #[cold]
    fn call_again(&self, leaf: Leaf, operands: Operands) -> (Status, Outcome) {
        let mut outcome = Outcome::default();
        for _ in 0..BUSY_LIMIT {
            core::hint::spin_loop();
            outcome = self.module.tdcall(leaf, operands);
            if !Status::of(outcome.rax).is_busy() {
                break;
            }
        }
        (Status::of(outcome.rax), outcome)
    }

    /// TDG.MEM.PAGE.ACCEPT. A page that the module calls accepted is not taken for success,
    /// whatever the level it is mapped at: who accepted it, and what it holds, is not known.
    #[inline]
    fn accept(&self, page: u64) -> Result<(), ValidateFault> {
        let operands = Operands {
            rcx: page,
            ..Operands::default()
        };
        match self.call(Leaf::MEM_PAGE_ACCEPT, operands).0 {
            Status::SUCCESS => Ok(()),
            Status::PAGE_SIZE_MISMATCH => Err(ValidateFault::SizeMismatch),
            Status::PAGE_ALREADY_ACCEPTED => Err(ValidateFault::AlreadyDone),
            other => Err(ValidateFault::Failed(other.0)),
        }
    }

    /// Sets what the guest's VM may do with a page, and sees to it that it is so.
    #[inline]
    fn set(&self, page: u64, access: Access) -> Result<(), AdjustFault> {
        if self.set_once(page, access)? {
            return Ok(());
        }
        self.set_again(page, access)
    }

    #[cold]
    fn set_again(&self, page: u64, access: Access) -> Result<(), AdjustFault> {
        for _ in 1..REPEAT_LIMIT {
            if self.set_once(page, access)? {
                return Ok(());
            }
        }
        Err(AdjustFault::Failed(Status::PAGE_ATTR_INVALID.0))
    }

    /// The same once; whether it reads back as written.
    #[inline]
    fn set_once(&self, page: u64, access: Access) -> Result<bool, AdjustFault> {
        let attributes = match access {
            Access::All => PageAttributes::ALL_ACCESS,
            Access::None => PageAttributes::empty(),
        };
        // The guest's translations are dropped with what they allowed.
        let flush = match access {
            Access::All => PageAttributes::empty(),
            Access::None => PageAttributes::VALID,
        };
        let operands = Operands {
            rcx: page,
            rdx: GUEST.field(attributes | PageAttributes::VALID),
            r8: GUEST.field(PageAttributes::ALL_ACCESS | flush),
            ..Operands::default()
        };
        let (status, outcome) = self.call(Leaf::MEM_PAGE_ATTR_WR, operands);
        match status {
            Status::SUCCESS => {}
            Status::PAGE_SIZE_MISMATCH => return Err(AdjustFault::SizeMismatch),
            other => return Err(AdjustFault::Failed(other.0)),
        }
        if outcome.rcx & MAPPING_PENDING != 0 {
            return Err(AdjustFault::NotValidated);
        }
        Ok(GUEST.attributes(outcome.rdx) & PageAttributes::ALL_ACCESS == attributes)
    }

    /// Gives a page to the guest.
    #[inline]
    fn give(&self, page: u64) -> Result<(), AdjustFault> {
        match self.set_once(page, Access::All) {
            Ok(true) => Ok(()),
            Ok(false) => self.not_given(page, self.set_again(page, Access::All)),
            failed => self.not_given(page, failed.map(drop)),
        }
    }

    /// What is left to do for a page that was not given, or not at once.
    #[cold]
    fn not_given(&self, page: u64, given: Result<(), AdjustFault>) -> Result<(), AdjustFault> {
        if given == Err(AdjustFault::NotValidated) {
            // The host took the page away and put another there. The module has noted the access
            // and would give it as soon as somebody accepts that page: it is taken back.
            let _ = self.set(page, Access::None);
        }
        given
    }
}

/// What the guest's VM may do with a page.
#[derive(Clone, Copy)]
enum Access {
    All,
    None,
}

impl<T: Tdcall, F: FlushOthers> Backend for TdxBackend<T, F> {
    const HOST_REMOVES: bool = true;

    fn validate(&self, block: Block) -> Result<(), ValidateFault> {
        self.accept(operand(block))
    }

    fn validate_run(&self, run: Run) -> Result<(), Broken<ValidateFault>> {
        page_by_page(run, |page| self.accept(page))
    }

    /// There is no such instruction: the host removes pages, and the engine does not ask for it.
    fn rescind(&self, _: Block) -> Result<(), ValidateFault> {
        Err(ValidateFault::Failed(Status::OPERAND_INVALID.0))
    }

    /// Nothing: the accept has zeroed the page.
    fn scrub(&self, _: Block) -> Result<(), Fault> {
        Ok(())
    }

    fn grant(&self, block: Block) -> Result<(), AdjustFault> {
        self.give(operand(block))
    }

    fn grant_run(&self, run: Run) -> Result<(), Broken<AdjustFault>> {
        page_by_page(run, |page| self.give(page))
    }

    fn revoke(&self, block: Block) -> Result<(), AdjustFault> {
        self.set(operand(block), Access::None)
    }

    fn flush(&self) -> Result<(), NotFlushed> {
        let operands = Operands {
            rcx: GUEST.invept_bit(),
            ..Operands::default()
        };
        match self.call(Leaf::VP_INVEPT, operands).0 {
            Status::SUCCESS => self.others.flush_others(),
            _ => Err(NotFlushed),
        }
    }
}

/// One call for each small page of a run, whose operand is its address.
#[inline]
fn page_by_page<F>(run: Run, call: impl Fn(u64) -> Result<(), F>) -> Result<(), Broken<F>> {
    let first = run.first().gpa();
    for done in 0..run.pages() {
        // Pages of one region: the sum is in it.
        let page = first.wrapping_add(done as u64 * PAGE_SIZE);
        call(page).map_err(|fault| Broken { done, fault })?;
    }
    Ok(())
}

/// The operand of a page leaf.
fn operand(block: Block) -> u64 {
    let size = match block.size() {
        accept::PageSize::Size4K => PageSize::Size4K,
        accept::PageSize::Size2M => PageSize::Size2M,
    };
    page_operand(Gpa::new(block.gpa()), size)
}
