//! Launch measurements, from files alone: the launch digest of SEV-SNP, MRTD of a trust domain.
//!
//! | module | measures |
//! |---|---|
//! | [`snp`] | an IGVM file on SEV-SNP, as QEMU and KVM launch it or as the file is written |
//! | [`tdx`] | an IGVM file on TDX |
//! | [`plain`] | an OVMF image that QEMU launches on SEV-SNP without IGVM |
//!
//! Each tells every [`Step`] on its way to a closure, so that what differs can be found: two lists of
//! steps part at the first page that is not the same.
//!
//! Nothing here trusts the file: what a measurement needs (places of data, declared areas) is checked on
//! the way, and a file that asks for more than [`MAX_PAGES`] pages is refused.

use std::sync::LazyLock;

use protocols::addr::PAGE_SIZE;
use protocols::measure::{Digest, NO_DIGEST, PageInfo, PageType, extend};
use serde::Serialize;
use sha2::{Digest as _, Sha384};

use crate::error::Error;

pub mod areas;
pub mod order;
pub mod plain;
pub mod snp;
pub mod tdx;

/// Most pages that are measured: 4 GiB. An image of some hundred bytes may name areas and pages without
/// data, so its length does not bound the work.
pub const MAX_PAGES: u64 = 1 << 20;

/// A page.
pub type Page = [u8; PAGE_SIZE as usize];

/// What was measured: one page.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    /// The header that asks for it, as offset in the file; none for what no header asks for.
    pub offset: Option<usize>,
    /// Guest-physical address.
    #[serde(serialize_with = "crate::show::as_hex")]
    pub gpa: u64,
    /// How the page is launched.
    pub kind: &'static str,
    /// SHA-384 of the contents, if they are measured.
    #[serde(serialize_with = "optional_hex")]
    pub contents: Option<Digest>,
    /// The measurement behind this page. That of TDX has no value before the end.
    #[serde(serialize_with = "optional_hex")]
    pub after: Option<Digest>,
}

#[expect(clippy::ref_option, reason = "serde calls it so")]
fn optional_hex<S: serde::Serializer>(
    digest: &Option<Digest>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match digest {
        Some(digest) => serializer.serialize_some(&crate::sidecar::hex(digest)),
        None => serializer.serialize_none(),
    }
}

/// Takes the steps, in order.
pub type Explain<'e> = &'e mut dyn FnMut(&Step);

/// Measures without telling how.
pub fn quietly(_: &Step) {}

/// A launch digest in the making that tells its steps.
struct Told<'e> {
    digest: Digest,
    pages: u64,
    explain: Explain<'e>,
}

impl<'e> Told<'e> {
    fn new(explain: Explain<'e>) -> Self {
        Self {
            digest: NO_DIGEST,
            pages: 0,
            explain,
        }
    }

    /// Adds a page. `data` may be shorter than a page; the rest is zero.
    fn add(
        &mut self,
        offset: Option<usize>,
        page_type: PageType,
        gpa: u64,
        data: &[u8],
    ) -> Result<(), Error> {
        self.pages += 1;
        bounded(self.pages)?;
        let contents = page_type.measures_contents().then(|| contents(data));
        self.digest = extend(&PageInfo::new(
            self.digest,
            page_type,
            gpa,
            contents.unwrap_or(NO_DIGEST),
        ));
        (self.explain)(&Step {
            offset,
            gpa,
            kind: page_type.name().unwrap_or("UNKNOWN"),
            contents,
            after: Some(self.digest),
        });
        Ok(())
    }
}

/// Refuses to go on for ever.
fn bounded(pages: u64) -> Result<(), Error> {
    if pages <= MAX_PAGES {
        return Ok(());
    }
    Err(Error::TooManyPages { limit: MAX_PAGES })
}

/// SHA-384 of a page that begins with `data` and is zero behind it.
fn contents(data: &[u8]) -> Digest {
    /// Half of most images are such pages.
    static ZERO: LazyLock<Digest> = LazyLock::new(|| Sha384::digest(whole_page(&[])).into());
    if data.is_empty() {
        return *ZERO;
    }
    Sha384::digest(whole_page(data)).into()
}

/// `data` with the zeroes that the format leaves out.
fn whole_page(data: &[u8]) -> Page {
    let mut page = [0; PAGE_SIZE as usize];
    let length = data.len().min(page.len());
    page[..length].copy_from_slice(&data[..length]);
    page
}
