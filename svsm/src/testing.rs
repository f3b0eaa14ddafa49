//! What several tests stand on.

use accept::{AdjustFault, Backend, Block, Fault, NotFlushed, ValidateFault};

/// A platform on which everything works.
pub struct Willing;

impl Backend for Willing {
    fn validate(&self, _: Block) -> Result<(), ValidateFault> {
        Ok(())
    }
    fn rescind(&self, _: Block) -> Result<(), ValidateFault> {
        Ok(())
    }
    fn scrub(&self, _: Block) -> Result<(), Fault> {
        Ok(())
    }
    fn grant(&self, _: Block) -> Result<(), AdjustFault> {
        Ok(())
    }
    fn revoke(&self, _: Block) -> Result<(), AdjustFault> {
        Ok(())
    }
    fn flush(&self) -> Result<(), NotFlushed> {
        Ok(())
    }
}
