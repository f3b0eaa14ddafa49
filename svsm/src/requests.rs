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

use protocols::terminate::TurnstileReason;

use crate::guest::GUEST_VMPL;
use crate::hypervisor::ghcb::Ghcb;
use crate::hypervisor::{Hypervisor, msr};
use crate::protocol::{Answer, VcpuIndex};
use crate::system::{GuestService, System};
use crate::terminate::terminate;

/// Runs the guest on processor `index` and serves its calls.
pub fn serve(system: &'static System, index: usize, ghcb: &'static Ghcb) -> ! {
    let service = system.service();
    loop {
        let ran = run_guest(system, index, ghcb);
        ran.and_then(|()| answer(system, &service, index))
            .unwrap_or_else(|reason| terminate(reason));
    }
}

/// The same for a processor that starts because its guest has made a call.
pub fn serve_after_call(system: &'static System, index: usize, ghcb: &'static Ghcb) -> ! {
    system.registry.leave_guest(index);
    answer(system, &system.service(), index).unwrap_or_else(|reason| terminate(reason));
    serve(system, index, ghcb)
}

/// Lets the host run the guest until it comes back.
fn run_guest(system: &System, index: usize, ghcb: &Ghcb) -> Result<(), TurnstileReason> {
    // Looked up anew each time: while the guest ran, another processor may have given this one
    // a new VMSA.
    let vmsa = system.registry.vmsa(index);
    if let Some(frame) = vmsa {
        system.vmsas.vmsa(frame).release();
    }
    system.registry.enter_guest(index);
    let ended = match vmsa {
        Some(_) => ghcb.run_vmpl(GUEST_VMPL),
        // It has deleted itself: there is nothing to run until it is created anew.
        None => msr::wait_for_start(),
    };
    system.registry.leave_guest(index);
    ended
}

/// Stops the guest and answers its call, if it made one.
fn answer(system: &System, service: &GuestService, index: usize) -> Result<(), TurnstileReason> {
    let Some(frame) = system.registry.vmsa(index) else {
        return Ok(());
    };
    let vmsa = system.vmsas.vmsa(frame);
    vmsa.stop();
    let answer = service.handle(VcpuIndex(index), vmsa.exit_code(), &vmsa.registers());
    match answer {
        Answer::Terminate(reason) => return Err(reason),
        // The page may be anything of the guest's by now.
        Answer::Gone => return Ok(()),
        // The host ran it on another processor while it called from this one: its exit has put
        // back what was stopped, and the call was made with the registers of an earlier exit.
        Answer::Return(_) | Answer::Resume if vmsa.is_runnable() => {
            return Err(TurnstileReason::GUEST_LOST);
        }
        Answer::Return(registers) => vmsa.set_registers(&registers),
        Answer::Resume => {}
    }
    Ok(())
}
