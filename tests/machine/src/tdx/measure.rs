//! MRTD: the measurement of the launch (§11).
//!
//! One running SHA-384 over blocks of 128 bytes: what was done, as text, and where; for contents
//! followed by 256 bytes of them. A page is added, then extended by its 16 chunks if it is measured.
//! Written apart from the image builder's, on purpose.

use protocols::tdx::report::Digest;
use sha2::{Digest as _, Sha384};

use crate::types::Gpa;

/// Bytes of a page that one TDH.MR.EXTEND takes in.
const CHUNK: usize = 256;

/// MRTD in the making.
#[derive(Clone)]
pub struct Mrtd(Sha384);

impl Mrtd {
    /// Before the first page.
    pub fn before_first_page() -> Self {
        Self(Sha384::new())
    }

    /// TDH.MEM.PAGE.ADD.
    pub fn add(&mut self, gpa: Gpa) {
        self.record(b"MEM.PAGE.ADD", gpa);
    }

    /// TDH.MR.EXTEND of every chunk of the page at `gpa`.
    pub fn extend_page(&mut self, gpa: Gpa, contents: &[u8; 4096]) {
        for (index, chunk) in contents.chunks_exact(CHUNK).enumerate() {
            self.record(b"MR.EXTEND", Gpa::new(gpa.get() + (index * CHUNK) as u64));
            self.0.update(chunk);
        }
    }

    fn record(&mut self, what: &[u8], gpa: Gpa) {
        let mut block = [0; 128];
        block[..what.len()].copy_from_slice(what);
        block[16..24].copy_from_slice(&gpa.get().to_le_bytes());
        self.0.update(block);
    }

    /// TDH.MR.FINALIZE.
    pub fn value(&self) -> Digest {
        self.0.clone().finalize().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(digest: Digest) -> std::string::String {
        digest
            .iter()
            .map(|byte| std::format!("{byte:02x}"))
            .collect()
    }

    /// Computed apart from this code with Python's hashlib from the sheet's table.
    #[test]
    fn mrtd_matches_an_independent_computation() {
        let mut mrtd = Mrtd::before_first_page();
        mrtd.add(Gpa::new(0xFFFF_F000));
        mrtd.extend_page(Gpa::new(0xFFFF_F000), &[0xA5; 4096]);
        mrtd.add(Gpa::new(0x1000));
        assert_eq!(
            hex(mrtd.value()),
            concat!(
                "8eca66ede9c510050d04efd640105d90d08e8709c09dc77f",
                "5f92a2c5332ef2d57f3ce2a65eca39139deb76ae8cf6a08e"
            )
        );
    }
}
