//! The request loop: each processor runs the guest, and serves its calls, for ever.
//!
//! The steps of one call (SVSM 5) and why in this order:
//!
//! 1. The guest's state is made unrunnable before anything of it is read, so the host cannot
//!    run it meanwhile and change what was checked.
//! 2. The host may come back without a call, or with the guest stopped at something else. Only
//!    a VMGEXIT with a pending call counts; everything else is resumed as it was.
//! 3. Exit code and registers are read once.
//! 4. The results are in the VMSA before the guest can run again.
//!
//! A processor may have several VMSAs (see [`crate::vcpus`]). Which of them the host has run is
//! not known; that a call was made from one shows in the VMSA itself, so all are asked.

use core::hint;

use protocols::terminate::TurnstileReason;

use crate::ahead::HostLied;
use crate::guest::GUEST_VMPL;
use crate::hypervisor::ghcb::Ghcb;
use crate::hypervisor::{Hypervisor, msr};
use crate::protocol::{Answer, VcpuIndex};
use crate::system::{GuestService, System};
use crate::terminate::terminate;
use crate::vcpus::{Arrival, Presence, Service};

/// How often a processor looks whether a deletion of its VMSA is over, before it gives way.
const LOOKS_BEFORE_GIVING_WAY: u32 = 1 << 10;

/// Runs the guest on the boot processor and serves its calls.
pub fn serve_from_start(system: &'static System, index: usize, ghcb: &'static Ghcb) -> ! {
    // A host that does not even start the guest is not waited for.
    ghcb.run_vmpl(GUEST_VMPL)
        .unwrap_or_else(|reason| terminate(reason));
    serve_after_call(system, index, ghcb)
}

/// The same for another processor, which starts because its guest has made a call, or to prepare
/// memory until the guest wants it.
pub fn serve_after_call(system: &'static System, index: usize, ghcb: &'static Ghcb) -> ! {
    let service = system.service();
    loop {
        answer_all(system, &service, index)
            .and_then(|next| run_guest(system, index, ghcb, next))
            .unwrap_or_else(|reason| terminate(reason));
    }
}

/// What a processor goes to run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    /// The VMSA whose call was answered: it is awaited, so it stays.
    Answered,
    /// Whatever the host was told to run.
    Offered,
}

/// Lets the host run the guest until it comes back.
fn run_guest(
    system: &System,
    index: usize,
    ghcb: &Ghcb,
    next: Next,
) -> Result<(), TurnstileReason> {
    let presence = match next {
        Next::Answered => Presence::Live,
        Next::Offered => system.registry.offer(index),
    };
    match presence {
        Presence::Live => {}
        // Looked at again: a processor that is given back now would not be started again if the
        // VMSA stays. The host gets it meanwhile, so whoever deletes comes to an end.
        Presence::Leaving => return msr::give_way(),
        // Not started yet, or it has deleted itself: there is nothing of the guest's to run, and
        // the time is used for one piece of memory before the next look.
        Presence::None => {
            let took_one = system
                .ahead
                .step(&system.engine)
                .map_err(|HostLied| TurnstileReason::ALREADY_VALID)?;
            if took_one {
                system.registry.count_step(index);
                return Ok(());
            }
            return msr::wait_for_start();
        }
    }
    system.registry.count_wait(index);
    let ended = ghcb.run_vmpl(GUEST_VMPL);
    if next == Next::Offered {
        system.registry.withdraw(index);
    }
    match ended {
        // Another processor of the guest may have had the host forget the VMSA, or may have
        // deleted it just now. Not to run is the guest's choice, and nothing is lost.
        Err(TurnstileReason::RUN_VMPL) => msr::wait_for_start(),
        ended => ended,
    }
}

/// Answers what was called from each of the processor's VMSAs.
fn answer_all(
    system: &System,
    service: &GuestService,
    index: usize,
) -> Result<Next, TurnstileReason> {
    let mut next = Next::Offered;
    for slot in system.registry.slots_of(index) {
        if let Some(arrived) = arrive(system, index, slot)?
            && answer(system, service, index, arrived)? == Next::Answered
        {
            next = Next::Answered;
        }
    }
    Ok(next)
}

/// Gets the VMSA in a slot to itself, if there is one. While another processor deletes it there
/// is nothing to do but to wait; the host gets the processor back meanwhile.
fn arrive(system: &System, index: usize, slot: usize) -> Result<Option<Service>, TurnstileReason> {
    loop {
        for _ in 0..LOOKS_BEFORE_GIVING_WAY {
            match system.registry.begin_service(index, slot) {
                Arrival::None => return Ok(None),
                Arrival::Serve(arrived) => return Ok(Some(arrived)),
                Arrival::Wait => hint::spin_loop(),
            }
        }
        msr::give_way()?;
    }
}

/// Stops the guest and answers its call, if it made one from this VMSA.
fn answer(
    system: &System,
    service: &GuestService,
    index: usize,
    arrived: Service,
) -> Result<Next, TurnstileReason> {
    let vmsa = system.vmsas.vmsa(arrived.vmsa);
    if vmsa.is_awaited() || vmsa.is_untouched() {
        // It runs, on another processor, or has not been run yet: nobody has called. One that was
        // never run stays as it is: the host was not asked to run it, so it may be deleted.
        system.registry.end_service(index, arrived);
        return Ok(Next::Offered);
    }
    vmsa.stop();
    let next = match service.handle(VcpuIndex(index), vmsa.exit_code(), &vmsa.registers()) {
        Answer::Terminate(reason) => return Err(reason),
        // The page may be anything of the guest's by now.
        Answer::Gone => {
            system.registry.forget_service(index);
            return Ok(Next::Offered);
        }
        // The host ran it on another processor while it called from this one: its exit has put
        // back what was stopped, and the call was made with the registers of an earlier exit.
        Answer::Return(_) | Answer::Resume if vmsa.is_runnable() => {
            return Err(TurnstileReason::GUEST_LOST);
        }
        Answer::Return(registers) => {
            vmsa.set_registers(&registers);
            vmsa.resume();
            Next::Answered
        }
        // As it was, with its exit code: it may be one that stands beside the one that called,
        // which the guest may delete.
        Answer::Resume => {
            vmsa.release();
            Next::Offered
        }
    };
    system.registry.end_service(index, arrived);
    Ok(next)
}
