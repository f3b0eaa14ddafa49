//! The secure EPT, as far as the models need it: the module's side, which works on an entry for a
//! while and answers BUSY to others meanwhile, and the host's, which removes pages.

use std::sync::{Arc, Mutex, MutexGuard};

use accept::{
    AdjustFault, Backend, Block, Broken, Error, Fault, NotFlushed, OnNoChange, Run, ValidateFault,
};
use loom::sync::atomic::{AtomicU64, Ordering};
use protocols::tdx::{L2Vm, Leaf, MAPPING_PENDING, PageAttributes, Status};
use svsm::platform::tdx::{FlushOthers, Operands, Outcome, Tdcall, TdxBackend};

use crate::hardware::{GARBAGE, Guarded, Platform, REGIONS, pages};

/// The backend of the paravisor, on this module.
pub struct Tdx {
    backend: TdxBackend<Handle, Handle>,
    sept: Arc<Sept>,
}

/// The module as the backend has it, and its other vCPUs.
struct Handle(Arc<Sept>);

struct Sept {
    /// Touched where the other vCPU may come in.
    bus: AtomicU64,
    content: AtomicU64,
    /// Not loom's: what happens between two touches of the bus is one step.
    tree: Mutex<Tree>,
}

struct Tree {
    accepted: Vec<bool>,
    granted: Vec<bool>,
    /// Per region: somebody is at work on it.
    locked: [bool; REGIONS],
    double_accepts: usize,
    unlawful: Vec<&'static str>,
    stale: bool,
    /// A call has found its operand busy.
    met_busy: bool,
}

impl Tdx {
    /// Whether a call has found its operand busy.
    pub fn has_met_busy(&self) -> bool {
        self.sept.tree().met_busy
    }
}

impl Sept {
    fn tree(&self) -> MutexGuard<'_, Tree> {
        self.tree.lock().expect("no thread panicked")
    }

    /// A place where the other vCPU may come in.
    fn touch(&self) {
        self.bus.fetch_add(1, Ordering::Relaxed);
    }

    /// Locks a region's part of the tree, as module and host do; whether it was free.
    fn try_lock(&self, region: usize) -> bool {
        self.touch();
        !std::mem::replace(&mut self.tree().locked[region], true)
    }

    /// Ends the work on a region.
    fn unlock(&self, region: usize) {
        self.tree().locked[region] = false;
    }

    /// The host removes a page that the guest gives back: now or after whoever is at work there.
    fn remove(&self, page: usize) {
        while !self.try_lock(page / 512) {
            loom::thread::yield_now();
        }
        self.touch();
        let mut tree = self.tree();
        if tree.granted[page] {
            tree.unlawful.push("removed under the guest's hands");
        }
        tree.accepted[page] = false;
        drop(tree);
        self.unlock(page / 512);
    }

    fn accept(&self, pages: std::ops::Range<usize>) -> Status {
        let mut tree = self.tree();
        if tree.accepted[pages.clone()].contains(&true) {
            tree.double_accepts += 1;
            return Status::PAGE_ALREADY_ACCEPTED;
        }
        if tree.granted[pages.clone()].contains(&true) {
            tree.unlawful
                .push("accepted with the guest's access in place");
        }
        tree.accepted[pages].fill(true);
        Status::SUCCESS
    }

    /// RCX and RDX: the mapping and the attributes.
    fn write_attributes(&self, pages: std::ops::Range<usize>, operands: Operands) -> (u64, u64) {
        let mut tree = self.tree();
        let access = L2Vm::Vm1.attributes(operands.rdx) & PageAttributes::ALL_ACCESS;
        if access.is_empty() {
            tree.stale = true;
        }
        let is_pending = tree.accepted[pages.clone()].contains(&false);
        tree.granted[pages].fill(!access.is_empty());
        let pending = if is_pending { MAPPING_PENDING } else { 0 };
        let attributes = L2Vm::Vm1.field(access | PageAttributes::VALID);
        (operands.rcx | pending, attributes)
    }
}

impl Tdcall for Handle {
    fn tdcall(&self, leaf: Leaf, operands: Operands) -> Outcome {
        let sept = &self.0;
        let status = |status: Status| Outcome {
            rax: status.with(0),
            ..Outcome::default()
        };
        if leaf == Leaf::VP_INVEPT {
            sept.touch();
            return status(Status::SUCCESS);
        }
        let first = (operands.rcx >> 12) as usize % (REGIONS * 512);
        let count = if operands.rcx & 7 == 0 { 1 } else { 512 };
        let pages = first..first + count;
        if !sept.try_lock(first / 512) {
            sept.tree().met_busy = true;
            // Who asks again lets the others go on: only they can end the wait.
            loom::thread::yield_now();
            return status(Status::OPERAND_BUSY);
        }
        if leaf == Leaf::MEM_PAGE_ACCEPT && first == 0 {
            // Zeroed while the page is nobody's.
            sept.content.store(0, Ordering::Relaxed);
        }
        sept.touch();
        let outcome = match leaf {
            Leaf::MEM_PAGE_ACCEPT => status(sept.accept(pages)),
            Leaf::MEM_PAGE_ATTR_WR => {
                let (rcx, rdx) = sept.write_attributes(pages, operands);
                Outcome {
                    rcx,
                    rdx,
                    ..status(Status::SUCCESS)
                }
            }
            _ => status(Status::OPERAND_INVALID),
        };
        sept.unlock(first / 512);
        outcome
    }
}

impl FlushOthers for Handle {
    fn flush_others(&self) -> Result<(), NotFlushed> {
        self.0.touch();
        self.0.tree().stale = false;
        Ok(())
    }
}

impl Platform for Tdx {
    fn new() -> Self {
        let sept = Arc::new(Sept {
            bus: AtomicU64::new(0),
            content: AtomicU64::new(GARBAGE),
            tree: Mutex::new(Tree {
                accepted: vec![false; REGIONS * 512],
                granted: vec![false; REGIONS * 512],
                locked: [false; REGIONS],
                double_accepts: 0,
                unlawful: Vec::new(),
                stale: false,
                met_busy: false,
            }),
        });
        let handle = || Handle(Arc::clone(&sept));
        Self {
            backend: TdxBackend::new(handle(), handle()),
            sept,
        }
    }

    fn content(&self) -> &AtomicU64 {
        &self.sept.content
    }

    fn page(&self, index: usize) -> (bool, bool) {
        let tree = self.sept.tree();
        (tree.accepted[index], tree.granted[index])
    }

    fn is_stale(&self) -> bool {
        self.sept.tree().stale
    }

    fn double_validations(&self) -> usize {
        self.sept.tree().double_accepts
    }

    fn unlawful(&self) -> Vec<&'static str> {
        self.sept.tree().unlawful.clone()
    }

    fn accuse(&self, of: &'static str) {
        self.sept.tree().unlawful.push(of);
    }

    /// As the paravisor does for MapGPA.
    fn rescind(engine: &Guarded<'_>, block: Block, choice: OnNoChange) -> Result<(), Error> {
        let withdrawn = engine.withdraw(block, choice)?;
        if let Some(owed) = withdrawn.flush() {
            engine.flush(owed).expect("flushes do not fail here");
        }
        for page in pages(block) {
            engine.backend().is_taken(block);
            engine.backend().shared.hardware.sept.remove(page);
        }
        // Who holds the lock ends, and the paravisor asks again until then.
        let mut left = engine.settle(withdrawn);
        while let Some(withdrawn) = left {
            loom::thread::yield_now();
            left = engine.settle(withdrawn);
        }
        Ok(())
    }
}

impl Backend for &Tdx {
    const HOST_REMOVES: bool = <TdxBackend<Handle, Handle> as Backend>::HOST_REMOVES;

    fn validate(&self, block: Block) -> Result<(), ValidateFault> {
        self.backend.validate(block)
    }
    fn validate_run(&self, run: Run) -> Result<(), Broken<ValidateFault>> {
        self.backend.validate_run(run)
    }
    fn grant_run(&self, run: Run) -> Result<(), Broken<AdjustFault>> {
        self.backend.grant_run(run)
    }
    fn rescind(&self, block: Block) -> Result<(), ValidateFault> {
        self.backend.rescind(block)
    }
    fn scrub(&self, block: Block) -> Result<(), Fault> {
        self.backend.scrub(block)
    }
    fn grant(&self, block: Block) -> Result<(), AdjustFault> {
        self.backend.grant(block)
    }
    fn revoke(&self, block: Block) -> Result<(), AdjustFault> {
        self.backend.revoke(block)
    }
    fn flush(&self) -> Result<(), NotFlushed> {
        self.backend.flush()
    }
}
