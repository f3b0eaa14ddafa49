//! The launch digest, as the AMD-SP computes it (`snp-launch.md` §3).
//!
//! Written apart from the one of the image builder, on purpose: two implementations that
//! agree are a test, one used twice is not.

use sha2::{Digest as _, Sha384};

use crate::tdx::measure::Mrtd;
use crate::types::Gpa;

/// A SHA-384 value.
pub type Digest = [u8; 48];

/// Page types of SNP_LAUNCH_UPDATE (SNP ABI; `snp-launch.md` §2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PageType {
    /// Contents measured.
    Normal = 1,
    /// Contents measured, and the page becomes a VMSA.
    Vmsa = 2,
    /// Only address and type measured.
    Unmeasured = 4,
    /// Only address and type measured; written by the AMD-SP.
    Secrets = 5,
    /// Only address and type measured; checked by the AMD-SP.
    Cpuid = 6,
}

/// The measurement of a launch in the making, on either platform.
pub enum Measurement {
    /// The AMD-SP's.
    Snp(LaunchDigest),
    /// The TDX module's.
    Td(Mrtd),
}

impl Measurement {
    /// Takes in one page.
    pub fn extend(&mut self, kind: PageType, gpa: Gpa, contents: &[u8; 4096]) {
        match self {
            Self::Snp(digest) => digest.extend(kind, gpa, contents),
            Self::Td(mrtd) => {
                mrtd.add(gpa);
                if kind == PageType::Normal {
                    mrtd.extend_page(gpa, contents);
                }
            }
        }
    }

    /// The measurement of the pages so far.
    pub fn value(&self) -> Digest {
        match self {
            Self::Snp(digest) => digest.value(),
            Self::Td(mrtd) => mrtd.value(),
        }
    }
}

/// Bytes of the record hashed for every page.
const RECORD: usize = 0x70;

/// A digest in the making.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LaunchDigest {
    current: Digest,
    /// Hash of a page of zeroes: half of a firmware image is made of them.
    zero_page: Digest,
}

impl LaunchDigest {
    /// Before the first page.
    pub fn before_first_page() -> Self {
        Self {
            current: [0; 48],
            zero_page: Sha384::digest([0; 4096]).into(),
        }
    }

    /// Takes in one page. `contents` are looked at for measured types only.
    pub fn extend(&mut self, kind: PageType, gpa: Gpa, contents: &[u8; 4096]) {
        let contents = match kind {
            PageType::Normal | PageType::Vmsa if contents.iter().all(|&byte| byte == 0) => {
                self.zero_page
            }
            PageType::Normal | PageType::Vmsa => Sha384::digest(contents).into(),
            PageType::Unmeasured | PageType::Secrets | PageType::Cpuid => [0; 48],
        };
        let mut hash = Sha384::new();
        hash.update(self.current);
        hash.update(contents);
        hash.update((RECORD as u16).to_le_bytes());
        // Type; then no initial migration image, and no permissions for lower VMPLs.
        hash.update([kind as u8, 0, 0, 0, 0, 0]);
        hash.update(gpa.get().to_le_bytes());
        self.current = hash.finalize().into();
    }

    /// The digest of the pages so far.
    pub const fn value(&self) -> Digest {
        self.current
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_has_its_documented_size() {
        assert_eq!(48 + 48 + 2 + 6 + 8, RECORD);
    }

    #[test]
    fn type_address_contents_and_order_all_count() {
        let page = |byte| [byte; 4096];
        let digest = |pages: &[(PageType, u64, u8)]| {
            let mut digest = LaunchDigest::before_first_page();
            for &(kind, gpa, byte) in pages {
                digest.extend(kind, Gpa::new(gpa), &page(byte));
            }
            digest.value()
        };
        let base = digest(&[(PageType::Normal, 0x1000, 1), (PageType::Normal, 0x2000, 2)]);
        for other in [
            [(PageType::Normal, 0x2000, 2), (PageType::Normal, 0x1000, 1)],
            [(PageType::Normal, 0x1000, 1), (PageType::Normal, 0x2000, 3)],
            [(PageType::Normal, 0x1000, 1), (PageType::Normal, 0x3000, 2)],
            [
                (PageType::Normal, 0x1000, 1),
                (PageType::Unmeasured, 0x2000, 2),
            ],
        ] {
            assert_ne!(digest(&other), base);
        }
        assert_eq!(
            digest(&[(PageType::Secrets, 0x1000, 1)]),
            digest(&[(PageType::Secrets, 0x1000, 2)])
        );
    }
}
