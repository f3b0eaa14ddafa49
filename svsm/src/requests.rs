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
use crate::hypervisor::Hypervisor;
use crate::hypervisor::ghcb::Ghcb;
use crate::protocol::{Answer, VcpuIndex};
use crate::system::System;
use crate::terminate::terminate;

/// Runs the guest on processor `index` and serves its calls.
pub fn serve(system: &'static System, index: usize, ghcb: &'static Ghcb) -> ! {
    let service = system.service();
    loop {
        // Looked up anew each time: while the guest ran, another processor may have given this
        // one a new VMSA.
        match system.registry.vmsa(index) {
            Some(frame) => system.vmsas.vmsa(frame).release(),
            // It has deleted itself. There is nothing to run, and nobody to answer.
            None => terminate(TurnstileReason::GUEST_LOST),
        }
        system.registry.enter_guest(index);
        if let Err(reason) = ghcb.run_vmpl(GUEST_VMPL) {
            terminate(reason);
        }
        system.registry.leave_guest(index);
        let Some(frame) = system.registry.vmsa(index) else {
            continue;
        };
        let vmsa = system.vmsas.vmsa(frame);
        vmsa.stop();
        match service.handle(VcpuIndex(index), vmsa.exit_code(), &vmsa.registers()) {
            Answer::Return(registers) => vmsa.set_registers(&registers),
            Answer::Resume | Answer::Gone => {}
            Answer::Terminate(reason) => terminate(reason),
        }
    }
}
