//! The pages through which messages go: a request, an answer, certificates.
//!
//! They are shared with the host, so their contents may change at any moment; every word is read or written
//! once, by volatile accesses, and there is no reference to them.
#![expect(unsafe_code, reason = "volatile access to pages shared with the host")]

use protocols::addr::{Gpa, PAGE_SIZE};
use protocols::amd_sp::GuestRequestOutcome;
use protocols::terminate::TurnstileReason;
use zerocopy::IntoBytes;

use super::CERTIFICATE_PAGES;
use super::channel::{Carrier, SealedAnswer, SealedRequest};
use crate::hypervisor::ghcb::{self, Room};
use crate::memory::layout::PageRange;
use crate::percpu;

/// How many pages there are.
pub const PAGES: u64 = 2 + CERTIFICATE_PAGES;

/// The pages, in the order of the module's title.
pub struct SharedPages {
    first: Gpa,
}

impl SharedPages {
    /// Makes the pages shared.
    ///
    /// # Errors
    ///
    /// [`TurnstileReason::INTERNAL`] if they are not [`PAGES`]; one of the GHCB reasons.
    ///
    /// # Safety
    ///
    /// `pages` are pages of the region that were never validated and are nobody else's.
    pub unsafe fn establish(pages: PageRange) -> Result<Self, TurnstileReason> {
        if pages.pages() != PAGES {
            return Err(TurnstileReason::INTERNAL);
        }
        for page in pages.frames() {
            // SAFETY: the caller's promise.
            unsafe { ghcb::share(page) }?;
        }
        Ok(Self {
            first: pages.start(),
        })
    }

    const fn page(&self, index: u64) -> Gpa {
        Gpa::new(self.first.get() + index * PAGE_SIZE)
    }
}

impl Carrier for SharedPages {
    fn carry(
        &self,
        request: &SealedRequest,
        certificates: bool,
        answer: &mut SealedAnswer,
    ) -> Result<GuestRequestOutcome, TurnstileReason> {
        let host = percpu::current()
            .and_then(percpu::PerCpu::ghcb)
            .ok_or(TurnstileReason::INTERNAL)?;
        let (to, from) = (self.page(0), self.page(1));
        let room = Room {
            gpa: self.page(2),
            pages: CERTIFICATE_PAGES,
        };
        put(to, request.as_bytes());
        let outcome = host.guest_request(to, from, certificates.then_some(room))?;
        take(from, answer.as_mut_bytes());
        Ok(outcome)
    }

    fn certificates(&self, into: &mut [u8]) {
        let bytes = into.len().min((CERTIFICATE_PAGES * PAGE_SIZE) as usize);
        take(self.page(2), into.get_mut(..bytes).unwrap_or_default());
    }
}

const _: () = assert!(size_of::<SealedRequest>() <= PAGE_SIZE as usize);
const _: () = assert!(size_of::<SealedAnswer>() <= PAGE_SIZE as usize);

/// Writes `bytes` to the page at `gpa`, one after the other.
fn put(gpa: Gpa, bytes: &[u8]) {
    for (at, byte) in (gpa.get()..).zip(bytes) {
        // SAFETY: no caller writes beyond its pages, which are mapped one to one for ever.
        unsafe { (at as *mut u8).write_volatile(*byte) };
    }
}

/// Reads `bytes` from the pages at `gpa`, each once.
fn take(gpa: Gpa, bytes: &mut [u8]) {
    for (at, byte) in (gpa.get()..).zip(bytes) {
        // SAFETY: no caller reads beyond its pages, which are mapped one to one for ever.
        *byte = unsafe { (at as *const u8).read_volatile() };
    }
}
