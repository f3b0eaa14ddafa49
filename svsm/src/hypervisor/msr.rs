//! The GHCB MSR protocol: one request and one reply in a register (GHCB 2.3.1).
//!
//! Used before a processor has a GHCB page, and to get one. Every reply has to carry the code
//! that belongs to the request.
#![expect(unsafe_code, reason = "leaves to the host")]

use protocols::addr::Gpa;
use protocols::ghcb::msr::{CpuidRegister, Request, Response};
use protocols::ghcb::{HypervisorFeatures, PROTOCOL_VERSION, PageOperation};
use protocols::terminate::TurnstileReason;

use crate::platform::snp;

/// Sends a request and returns the reply. The GHCB's address, if one was in the MSR, is gone.
fn exchange(request: Request) -> Response {
    snp::write_ghcb_msr(request.encode());
    // SAFETY: the MSR holds a request of the MSR protocol.
    unsafe { snp::vmgexit() };
    Response::decode(snp::read_ghcb_msr())
}

/// Checks that the host speaks the one version SNP can use.
///
/// # Errors
///
/// [`TurnstileReason::GHCB_VERSION`], or [`TurnstileReason::GHCB_REPLY`].
pub fn negotiate_version() -> Result<(), TurnstileReason> {
    match exchange(Request::SevInfo) {
        Response::SevInfo {
            min_version,
            max_version,
            ..
        } => {
            if (min_version..=max_version).contains(&PROTOCOL_VERSION) {
                Ok(())
            } else {
                Err(TurnstileReason::GHCB_VERSION)
            }
        }
        _ => Err(TurnstileReason::GHCB_REPLY),
    }
}

/// Checks that the host offers all that a paravisor needs, and returns all it offers.
///
/// # Errors
///
/// [`TurnstileReason::GHCB_FEATURES`], or [`TurnstileReason::GHCB_REPLY`].
pub fn negotiate_features() -> Result<HypervisorFeatures, TurnstileReason> {
    match exchange(Request::Features) {
        Response::Features(features) => {
            if features.contains(HypervisorFeatures::NEEDED_BY_PARAVISOR) {
                Ok(features)
            } else {
                Err(TurnstileReason::GHCB_FEATURES)
            }
        }
        _ => Err(TurnstileReason::GHCB_REPLY),
    }
}

/// Asks the host for one register of a CPUID leaf (subleaf 0). For what is different on each
/// processor: everything else is in the CPUID page.
///
/// # Errors
///
/// [`TurnstileReason::GHCB_REPLY`].
pub fn cpuid(function: u32, register: CpuidRegister) -> Result<u32, TurnstileReason> {
    match exchange(Request::Cpuid { function, register }) {
        Response::Cpuid {
            value,
            register: answered,
        } if answered == register => Ok(value),
        _ => Err(TurnstileReason::GHCB_REPLY),
    }
}

/// Asks the host to share a page that is not validated.
///
/// # Errors
///
/// [`TurnstileReason::GHCB_PAGE_STATE`], or [`TurnstileReason::GHCB_REPLY`].
pub fn share_page(gpa: Gpa) -> Result<(), TurnstileReason> {
    let request = Request::PageState {
        frame: gpa.frame(),
        operation: PageOperation::SHARED,
    };
    match exchange(request) {
        Response::PageState { error: 0 } => Ok(()),
        Response::PageState { .. } => Err(TurnstileReason::GHCB_PAGE_STATE),
        _ => Err(TurnstileReason::GHCB_REPLY),
    }
}

/// Registers a GHCB page; the host has to confirm exactly this page.
///
/// # Errors
///
/// [`TurnstileReason::GHCB_REGISTER`], or [`TurnstileReason::GHCB_REPLY`].
pub fn register_ghcb(gpa: Gpa) -> Result<(), TurnstileReason> {
    match exchange(Request::RegisterGhcb { frame: gpa.frame() }) {
        Response::RegisterGhcb { frame } if frame == gpa.frame() => Ok(()),
        Response::RegisterGhcb { .. } => Err(TurnstileReason::GHCB_REGISTER),
        _ => Err(TurnstileReason::GHCB_REPLY),
    }
}

/// Gives the host a chance to run something else: a request whose answer is of no interest.
///
/// # Errors
///
/// [`TurnstileReason::GHCB_REPLY`].
pub fn give_way() -> Result<(), TurnstileReason> {
    match exchange(Request::SevInfo) {
        Response::SevInfo { .. } => Ok(()),
        _ => Err(TurnstileReason::GHCB_REPLY),
    }
}

/// Gives the processor back until somebody starts it. It may also come back for no reason.
///
/// # Errors
///
/// [`TurnstileReason::GHCB_REPLY`].
pub fn wait_for_start() -> Result<(), TurnstileReason> {
    match exchange(Request::ApResetHold) {
        Response::ApResetHold { .. } => Ok(()),
        _ => Err(TurnstileReason::GHCB_REPLY),
    }
}
