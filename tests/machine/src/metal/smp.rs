//! The other CPUs: starting and stopping what they run, and getting their attention.

use alloc::format;

use machine::ghcb::ApAction;
use machine::types::{VcpuId, Vmpl};

use super::cpu;
use super::console::log;

/// Called with the lock held, right before a CPU enters its guest.
pub fn enter_guest(_id: VcpuId) {}

/// Called right after an exit.
pub fn left_guest(_id: VcpuId) {}

/// Returns when no CPU can use a mapping that was withdrawn before the call.
pub fn shoot_down() {}

/// Whether an NMI exit of this CPU was for the machine.
pub fn was_kicked(_id: VcpuId) -> bool {
    false
}

/// Whether no other CPU could ever wake this one.
pub fn is_alone_awake(_id: VcpuId) -> bool {
    true
}

/// Carries out AP creation or destruction.
pub fn start_or_stop(_from: VcpuId, action: ApAction) {
    log!("{}", format!("{action:?}"));
}

/// Calls `act` for each vCPU an interrupt command addresses.
pub fn for_each_target(_from: VcpuId, _icr: u64, _act: fn(VcpuId)) {}

/// INIT for one vCPU.
pub fn init(_id: VcpuId) {}

/// Start-up IPI for one vCPU.
pub fn startup(_id: VcpuId) {}

/// Waits until another CPU gives this one something to run.
pub fn wait_for_start(_id: VcpuId) -> Vmpl {
    cpu::stop()
}

/// Makes the table of CPUs.
pub fn init_table(_vcpus: u32) {}
