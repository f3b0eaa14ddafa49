//! The line to the security processor: one for the VM, used by one processor at a time.
//!
//! | module | what it owns |
//! |---|---|
//! | this one | who may use the line; how many lies were noticed on it |
//! | [`channel`] | the order of messages |
//! | [`seal`] | the cipher |
//! | `shared` | the pages that the host sees |
//!
//! Nobody waits for the line: while one processor uses it, which includes a visit to the host that may never
//! end, the others answer BUSY at once (I12).

pub mod channel;
pub mod seal;
#[cfg(target_os = "none")]
pub mod shared;
#[cfg(test)]
pub(crate) mod tests;

use core::sync::atomic::{AtomicU64, Ordering};

use protocols::addr::PAGE_SIZE;
use protocols::amd_sp::certificates;
use protocols::amd_sp::report::AttestationReport;
use spin::Mutex;

use channel::Channel;
pub use channel::{Carrier, Certificates, Refusal};
use seal::Key;

/// Pages for certificates: what Linux offers, and what real tables fit in.
pub const CERTIFICATE_PAGES: u64 = 4;
/// Bytes in them.
pub const CERTIFICATE_BYTES: usize = (CERTIFICATE_PAGES * PAGE_SIZE) as usize;

/// What one processor at a time has.
struct Own {
    channel: Channel,
    /// A copy of the certificates, so that what was looked at is what is handed on.
    certificates: &'static mut [u8],
}

/// The line.
pub struct Line<C> {
    own: Mutex<Own>,
    host_lies: AtomicU64,
    carrier: C,
}

impl<C: Carrier> Line<C> {
    /// A line without a key. Certificates that do not fit into `certificates` are not handed on.
    #[must_use]
    pub fn new(carrier: C, certificates: &'static mut [u8]) -> Self {
        Self {
            own: Mutex::new(Own {
                channel: Channel::new(),
                certificates,
            }),
            host_lies: AtomicU64::new(0),
            carrier,
        }
    }

    /// Gives the line its key, which is wiped where it was. Only the first call counts.
    pub fn take_key(&self, key: &mut Key) {
        self.own.lock().channel.take_key(key);
    }

    /// How many answers were not the security processor's.
    #[must_use]
    pub fn host_lies(&self) -> u64 {
        self.host_lies.load(Ordering::Relaxed)
    }

    /// Has the security processor report on VMPL0 with `data`, and hands the report and the host's
    /// certificates (none if they are not wanted) to `deliver`.
    ///
    /// # Errors
    ///
    /// [`Refusal`].
    pub fn report<T>(
        &self,
        data: &[u8; 64],
        certificates: bool,
        deliver: impl FnOnce(&AttestationReport, &[u8]) -> T,
    ) -> Result<T, Refusal> {
        let Some(mut own) = self.own.try_lock() else {
            return Err(Refusal::Busy);
        };
        let Own {
            channel,
            certificates: copy,
        } = &mut *own;
        let (report, came) = channel
            .report(&self.carrier, data, certificates)
            .inspect_err(|refusal| {
                if *refusal == Refusal::HostLied {
                    self.host_lies.fetch_add(1, Ordering::Relaxed);
                }
            })?;
        let table = match came {
            Certificates::Given => {
                self.carrier.certificates(copy);
                let extent = certificates::extent(copy).unwrap_or(0);
                copy.get(..extent).unwrap_or_default()
            }
            Certificates::None => &[],
        };
        Ok(deliver(report, table))
    }
}
