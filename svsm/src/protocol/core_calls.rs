//! The core protocol: which calls exist, and those that need no guest memory.

use accept::Backend;
use protocols::svsm::{
    CORE_PROTOCOL_VERSION, ConfigureVtom, CoreCall, Protocol, ProtocolQuery, ResultCode,
    attestation, turnstile,
};

use super::{Finished, GuestMemory, Registers, Service, Stop, VcpuIndex, Vcpus, VmsaPages};
use crate::attestation::Carrier;

/// The lowest version of the core protocol that is spoken here.
const CORE_PROTOCOL_MINIMUM: u32 = 1;

impl<B: Backend, M: GuestMemory, V: Vcpus, P: VmsaPages, C: Carrier> Service<'_, B, M, V, P, C> {
    pub(super) fn core(
        &self,
        caller: VcpuIndex,
        call: u32,
        registers: &mut Registers,
    ) -> Result<Finished, Stop> {
        match CoreCall(call) {
            CoreCall::REMAP_CA => self.remap_calling_area(caller, registers.rcx)?,
            CoreCall::PVALIDATE => self.pvalidate(caller, registers.rcx)?,
            CoreCall::CREATE_VCPU => {
                // The upper half of R8 has no meaning.
                let apic_id = registers.r8 as u32;
                self.create_vcpu(caller, registers.rcx, registers.rdx, apic_id)?;
            }
            CoreCall::DELETE_VCPU => return self.delete_vcpu(caller, registers.rcx),
            CoreCall::QUERY_PROTOCOL => registers.rcx = query_protocol(registers.rcx),
            CoreCall::CONFIGURE_VTOM => configure_vtom(registers)?,
            // Nothing here needs memory from the guest, so there is nothing to deposit or to
            // withdraw.
            _ => return Err(ResultCode::UNSUPPORTED_CALL.into()),
        }
        Ok(Finished::Returns)
    }
}

/// QUERY_PROTOCOL: RCX of the answer.
fn query_protocol(rcx: u64) -> u64 {
    let query = ProtocolQuery::decode(rcx);
    match query.protocol {
        Protocol::CORE => query.answer(CORE_PROTOCOL_MINIMUM, CORE_PROTOCOL_VERSION),
        Protocol::ATTESTATION => query.answer(attestation::VERSION, attestation::VERSION),
        Protocol::TURNSTILE => query.answer(turnstile::LOWEST_VERSION, turnstile::VERSION),
        _ => ProtocolQuery::UNAVAILABLE,
    }
}

/// CONFIGURE_VTOM: a virtual top of memory is not supported, which a query is told.
fn configure_vtom(registers: &mut Registers) -> Result<(), Stop> {
    match ConfigureVtom::decode(registers.rcx) {
        None => Err(ResultCode::INVALID_PARAMETER.into()),
        Some(ConfigureVtom::Configure { .. }) => Err(ResultCode::INVALID_REQUEST.into()),
        Some(ConfigureVtom::Query) => {
            // Not supported, and so no alignment, no lowest and no highest value.
            (registers.rcx, registers.rdx, registers.r8) = (0, 0, 0);
            Ok(())
        }
    }
}
