//! The reverse map table of SEV-SNP, as far as the models need it.

use std::sync::{Mutex, MutexGuard};

use accept::{AdjustFault, Backend, Block, Error, Fault, NotFlushed, OnNoChange, ValidateFault};
use loom::sync::atomic::{AtomicU64, Ordering};

use crate::hardware::{GARBAGE, Guarded, Platform, REGIONS, pages};

pub struct Rmp {
    /// Touched by each instruction.
    bus: AtomicU64,
    content: AtomicU64,
    /// Not loom's: instructions are atomic.
    table: Mutex<Table>,
}

struct Table {
    valid: Vec<bool>,
    granted: Vec<bool>,
    double_validations: usize,
    unlawful: Vec<&'static str>,
    stale: bool,
}

impl Rmp {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("no thread panicked")
    }

    fn instruction<T>(&self, act: impl FnOnce(&mut Table) -> T) -> T {
        self.bus.fetch_add(1, Ordering::Relaxed);
        act(&mut self.table())
    }
}

impl Platform for Rmp {
    fn new() -> Self {
        Self {
            bus: AtomicU64::new(0),
            content: AtomicU64::new(GARBAGE),
            table: Mutex::new(Table {
                valid: vec![false; REGIONS * 512],
                granted: vec![false; REGIONS * 512],
                double_validations: 0,
                unlawful: Vec::new(),
                stale: false,
            }),
        }
    }

    fn content(&self) -> &AtomicU64 {
        &self.content
    }

    fn page(&self, index: usize) -> (bool, bool) {
        let table = self.table();
        (table.valid[index], table.granted[index])
    }

    fn is_stale(&self) -> bool {
        self.table().stale
    }

    fn double_validations(&self) -> usize {
        self.table().double_validations
    }

    fn unlawful(&self) -> Vec<&'static str> {
        self.table().unlawful.clone()
    }

    fn accuse(&self, of: &'static str) {
        self.table().unlawful.push(of);
    }

    fn rescind(engine: &Guarded<'_>, block: Block, choice: OnNoChange) -> Result<(), Error> {
        let rescinded = engine.rescind(block, choice)?;
        if let Some(owed) = rescinded.flush {
            engine.flush(owed).expect("flushes do not fail here");
        }
        Ok(())
    }
}

impl Backend for &Rmp {
    fn validate(&self, block: Block) -> Result<(), ValidateFault> {
        self.instruction(|table| {
            if table.valid[pages(block)].contains(&true) {
                table.double_validations += 1;
                return Err(ValidateFault::AlreadyDone);
            }
            table.valid[pages(block)].fill(true);
            Ok(())
        })
    }

    fn rescind(&self, block: Block) -> Result<(), ValidateFault> {
        self.instruction(|table| {
            if table.valid[pages(block)].contains(&false) {
                return Err(ValidateFault::AlreadyDone);
            }
            if table.granted[pages(block)].contains(&true) {
                table.unlawful.push("rescinded while granted");
            }
            table.valid[pages(block)].fill(false);
            Ok(())
        })
    }

    fn scrub(&self, block: Block) -> Result<(), Fault> {
        if pages(block).contains(&0) {
            self.content.store(0, Ordering::Relaxed);
        }
        self.instruction(|table| {
            if table.granted[pages(block)].contains(&true) {
                table.unlawful.push("scrubbed under the guest's hands");
            }
            if table.valid[pages(block)].contains(&false) {
                return Err(Fault::NotValidated);
            }
            Ok(())
        })
    }

    fn grant(&self, block: Block) -> Result<(), AdjustFault> {
        self.instruction(|table| {
            if table.valid[pages(block)].contains(&false) {
                return Err(AdjustFault::NotValidated);
            }
            table.granted[pages(block)].fill(true);
            Ok(())
        })
    }

    fn revoke(&self, block: Block) -> Result<(), AdjustFault> {
        self.instruction(|table| {
            if table.valid[pages(block)].contains(&false) {
                return Err(AdjustFault::NotValidated);
            }
            table.granted[pages(block)].fill(false);
            table.stale = true;
            Ok(())
        })
    }

    fn flush(&self) -> Result<(), NotFlushed> {
        self.instruction(|table| table.stale = false);
        Ok(())
    }
}
