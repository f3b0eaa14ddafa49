//! The SNP launch digest (SNP ABI, SNP_LAUNCH_UPDATE, structure PAGE_INFO).
//!
//! The digest starts as zeroes; each launched 4 KiB page replaces it by the SHA-384 of a
//! [`PageInfo`] that holds the digest so far. The layout is always here; hashing needs the
//! cargo feature `measure`.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A SHA-384 digest.
pub type Digest = [u8; 48];

/// The launch digest before the first page, and the contents of a page that is not measured.
pub const NO_DIGEST: Digest = [0; 48];

open_enum! {
    /// How a page is launched (SNP ABI, SNP_LAUNCH_UPDATE).
    pub struct PageType(u8) {
        /// Data; its contents are measured.
        NORMAL = 1,
        /// A VMSA; its contents are measured.
        VMSA = 2,
        /// Filled with zeroes by the security processor.
        ZERO = 3,
        /// Data that is not measured.
        UNMEASURED = 4,
        /// Filled with the secrets by the security processor.
        SECRETS = 5,
        /// CPUID values, checked by the security processor.
        CPUID = 6,
    }
}

impl PageType {
    /// Whether the page's contents enter the digest.
    #[must_use]
    pub const fn measures_contents(self) -> bool {
        matches!(self, Self::NORMAL | Self::VMSA)
    }
}

/// What is hashed for one page.
#[derive(Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PageInfo {
    /// The digest before this page.
    pub digest_before: Digest,
    /// SHA-384 of the page's contents, or zeroes if they are not measured.
    pub contents: Digest,
    /// Bytes of this structure.
    pub length: u16,
    /// How the page is launched.
    pub page_type: PageType,
    /// Bit 0: part of an initial migration image.
    pub imi_page: u8,
    /// Zero.
    pub reserved: u8,
    /// Permissions of VMPL 1, 2 and 3.
    pub vmpl_permissions: [u8; 3],
    /// Where the page is.
    pub gpa: u64,
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<PageInfo>() == 0x70);
    assert!(offset_of!(PageInfo, contents) == 0x30);
    assert!(offset_of!(PageInfo, length) == 0x60);
    assert!(offset_of!(PageInfo, page_type) == 0x62);
    assert!(offset_of!(PageInfo, imi_page) == 0x63);
    assert!(offset_of!(PageInfo, vmpl_permissions) == 0x65);
    assert!(offset_of!(PageInfo, gpa) == 0x68);
};

impl PageInfo {
    /// A page without permissions for lower VMPLs, which is how KVM launches all of them.
    #[must_use]
    pub const fn new(
        digest_before: Digest,
        page_type: PageType,
        gpa: u64,
        contents: Digest,
    ) -> Self {
        Self {
            digest_before,
            contents,
            length: size_of::<Self>() as u16,
            page_type,
            imi_page: 0,
            reserved: 0,
            vmpl_permissions: [0; 3],
            gpa,
        }
    }
}

#[cfg(feature = "measure")]
pub use hashing::{LaunchDigest, Mrtd, extend};

#[cfg(feature = "measure")]
mod hashing {
    use sha2::{Digest as _, Sha384};
    use zerocopy::IntoBytes;

    use super::{Digest, NO_DIGEST, PageInfo, PageType};

    /// The digest after the page that `info` describes.
    #[must_use]
    pub fn extend(info: &PageInfo) -> Digest {
        Sha384::digest(info.as_bytes()).into()
    }

    /// A launch digest in the making.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct LaunchDigest(Digest);

    impl LaunchDigest {
        /// Before the first page.
        #[must_use]
        pub const fn new() -> Self {
            Self(NO_DIGEST)
        }

        /// Adds one page. The contents are only looked at if the type is measured.
        pub fn add_page(&mut self, page_type: PageType, gpa: u64, contents: &[u8; 4096]) {
            let contents = if page_type.measures_contents() {
                Sha384::digest(contents).into()
            } else {
                NO_DIGEST
            };
            self.0 = extend(&PageInfo::new(self.0, page_type, gpa, contents));
        }

        /// The digest so far.
        #[must_use]
        pub const fn value(&self) -> Digest {
            self.0
        }
    }

    /// MRTD of a trust domain in the making (TDX module, TDH.MEM.PAGE.ADD and TDH.MR.EXTEND): one
    /// SHA-384 over a record of what was done to each page, and its contents by 256 bytes.
    #[derive(Clone, Debug, Default)]
    pub struct Mrtd(Sha384);

    impl Mrtd {
        /// Before the first page.
        #[must_use]
        pub fn new() -> Self {
            Self::default()
        }

        /// Adds one page, and its contents if they are measured.
        pub fn add_page(&mut self, gpa: u64, contents: Option<&[u8; 4096]>) {
            self.record("MEM.PAGE.ADD", gpa);
            let chunks = contents.into_iter().flat_map(|page| page.chunks(256));
            for (at, chunk) in (gpa..).step_by(256).zip(chunks) {
                self.record("MR.EXTEND", at);
                self.0.update(chunk);
            }
        }

        /// Text in 16 bytes, an address, zeroes up to 128 bytes.
        fn record(&mut self, what: &str, gpa: u64) {
            let mut block = [0; 128];
            let (name, rest) = block.split_at_mut(16);
            name.iter_mut()
                .zip(what.bytes())
                .for_each(|(to, from)| *to = from);
            rest[..8].copy_from_slice(&gpa.to_le_bytes());
            self.0.update(block);
        }

        /// The measurement so far.
        #[must_use]
        pub fn value(&self) -> Digest {
            self.0.clone().finalize().into()
        }
    }

    impl Default for LaunchDigest {
        fn default() -> Self {
            Self::new()
        }
    }
}

#[cfg(all(test, feature = "measure"))]
mod tests {
    use super::*;
    use std::format;
    use std::string::String;

    fn hex(digest: Digest) -> String {
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Computed apart from this code with Python's hashlib from the layout in the SNP ABI.
    #[test]
    fn digests_match_an_independent_computation() {
        let mut digest = LaunchDigest::new();
        digest.add_page(PageType::NORMAL, 0x800_0000, &[0xA5; 4096]);
        assert_eq!(
            hex(digest.value()),
            concat!(
                "475f48f45c58947e2dc412e3799984bd3363aced27859517",
                "1ba234a56b5d5aeb24271f698590fda584019c54bfa9fb02"
            )
        );
        digest.add_page(PageType::SECRETS, 0x800_1000, &[0xA5; 4096]);
        assert_eq!(
            hex(digest.value()),
            concat!(
                "8bd9e2b352bdc47fe027b0a5cdbc4f0275ce9a7260df014f",
                "6e7866a0d6e4c6d2ba32370262f0556ab1b5d5a93f138ab0"
            )
        );
        digest.add_page(PageType::VMSA, crate::vmsa::LAUNCH_GPA, &[0; 4096]);
        assert_eq!(
            hex(digest.value()),
            concat!(
                "a009f1ffab7767f5328cbf4da58660eaa9ec1e6c58970b26",
                "463b7025fad5b6b771c3ea3a98400f5ba982fff3054b1ea3"
            )
        );
    }

    /// As above, from the records of the TDX module.
    #[test]
    fn mrtd_matches_an_independent_computation() {
        let mut mrtd = Mrtd::new();
        mrtd.add_page(0xFFFF_F000, Some(&[0xA5; 4096]));
        mrtd.add_page(0x1000, None);
        assert_eq!(
            hex(mrtd.value()),
            concat!(
                "8eca66ede9c510050d04efd640105d90d08e8709c09dc77f",
                "5f92a2c5332ef2d57f3ce2a65eca39139deb76ae8cf6a08e"
            )
        );
    }

    #[test]
    fn contents_that_are_not_measured_do_not_count() {
        for page_type in [
            PageType::ZERO,
            PageType::UNMEASURED,
            PageType::SECRETS,
            PageType::CPUID,
        ] {
            let mut one = LaunchDigest::new();
            let mut other = LaunchDigest::new();
            one.add_page(page_type, 0, &[1; 4096]);
            other.add_page(page_type, 0, &[2; 4096]);
            assert_eq!(one, other);
            other.add_page(page_type, 0x1000, &[2; 4096]);
            assert_ne!(one, other);
        }
    }
}
