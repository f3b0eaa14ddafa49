//! The end: asking the host to stop the machine, with a reason.
//!
//! Works from the first instruction on, needs no GHCB page and no memory. A host that does not
//! stop the machine gets a processor that asks again for ever and does nothing else. A trust domain
//! reports a fatal error. On the native platform there is nobody to ask: QEMU's exit device is told.
#![expect(unsafe_code, reason = "leaves to the host")]

use log::error;
use protocols::ghcb::msr::Request;
use protocols::terminate::{Reason, TurnstileReason};
use x86_64::instructions::hlt;

use crate::console;
use crate::hypervisor::{native, tdx};
use crate::platform::snp;

/// Stops the machine for one of the paravisor's own reasons.
pub fn terminate(reason: TurnstileReason) -> ! {
    let reason = Reason::turnstile(reason);
    error!("terminating: {reason}");
    console::shut();
    if native::is_here() {
        native::stop();
    }
    if tdx::is_here() {
        tdx::stop(reason);
    }
    loop {
        snp::write_ghcb_msr(Request::Terminate(reason).encode());
        // SAFETY: the MSR holds a request of the MSR protocol.
        unsafe { snp::vmgexit() };
        hlt();
    }
}
