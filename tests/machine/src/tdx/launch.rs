//! The launch of a trust domain: what the host asks of the module, and the first state of its
//! processors (§8).

use alloc::vec;

use protocols::tdx::TdAttributes;
use protocols::tdx::metadata::TdControls;
use protocols::tdx::report::{Digest, RTMR_COUNT};
use protocols::vmsa::{Efer, Segment, SegmentAttributes, Vmsa};
use zerocopy::{FromZeros, IntoBytes};

use super::{GPA_WIDTH, Personality, Td, Vp};
use crate::cpuid::Context;
use crate::launch::{Environment, LaunchError};
use crate::memory::PhysicalMemory;
use crate::platform::Platform;
use crate::types::{PAGE_SIZE, VcpuId, Vmpl};

/// XFAM: x87 and SSE, all that the machine switches between worlds.
pub(super) const XFAM: u64 = 3;

/// Bits of the policy in an IGVM file for this platform (`igvm.md` §3).
mod policy {
    pub const DEBUG: u64 = 1 << 0;
    pub const SEPT_VE_DISABLE: u64 = 1 << 1;
    pub const MIGRATABLE: u64 = 1 << 2;
    pub const KNOWN: u64 = DEBUG | SEPT_VE_DISABLE | MIGRATABLE;
}

/// The attributes a policy asks for; `None` if a bit means nothing.
fn attributes(policy: u64) -> Option<TdAttributes> {
    if policy & !policy::KNOWN != 0 {
        return None;
    }
    let mut attributes = TdAttributes::empty();
    attributes.set(TdAttributes::DEBUG, policy & policy::DEBUG != 0);
    attributes.set(
        TdAttributes::SEPT_VE_DISABLE,
        policy & policy::SEPT_VE_DISABLE != 0,
    );
    attributes.set(TdAttributes::MIGRATABLE, policy & policy::MIGRATABLE != 0);
    Some(attributes)
}

impl<P: PhysicalMemory> Platform<P> {
    /// Makes the trust domain of the pages that were added: TDH.MNG.INIT, TDH.MR.FINALIZE, and
    /// TDH.VP.INIT for every processor. All of them start at once, at the same vector.
    pub(crate) fn finish_td(
        &mut self,
        policy: u64,
        mrtd: Digest,
        environment: &mut Environment<'_>,
    ) -> Result<(), LaunchError> {
        let attributes = attributes(policy).ok_or(LaunchError::Policy(policy))?;
        let vcpus = self.vcpu_count();
        let pages = u64::from(vcpus) * Vmpl::COUNT as u64;
        let states =
            (environment.allocate)(pages as usize).ok_or(LaunchError::OutOfMemory { pages })?;
        for index in 0..vcpus {
            let context = Context {
                osxsave: false,
                apic_id: index,
                svsm: false,
            };
            let signature = environment.td_cpuid.lookup(1, 0, &context).eax;
            let state = first_state(VcpuId(index), signature);
            // An L2 VM begins like this as well, until L1 says otherwise.
            for level in 0..Vmpl::COUNT as u64 {
                let page = u64::from(index) * Vmpl::COUNT as u64 + level;
                self.memory
                    .write(states.plus(page * PAGE_SIZE), state.as_bytes());
            }
        }
        let mut mac_key = [0; 32];
        for word in mac_key.chunks_exact_mut(8) {
            word.copy_from_slice(&(environment.random)().to_le_bytes());
        }
        let mut controls = TdControls::empty();
        controls.set(
            TdControls::PENDING_VE_DISABLE,
            attributes.contains(TdAttributes::SEPT_VE_DISABLE),
        );
        self.personality = Personality::Td(alloc::boxed::Box::new(Td {
            attributes,
            controls,
            notify_enables: 0,
            held: None,
            mrtd,
            rtmr: [[0; 48]; RTMR_COUNT],
            mac_key,
            vps: vec![Vp::default(); vcpus as usize],
            states,
        }));
        Ok(())
    }
}

/// The state of a processor before its first instruction, in the form the machine keeps registers
/// in. The host gives no value of its own in RCX and R8.
fn first_state(vcpu: VcpuId, cpuid_signature: u32) -> Vmsa {
    const CODE32: u16 = 0xC9B;
    const DATA32: u16 = 0xC93;
    const BUSY_TSS: u16 = 0x8B;
    const NOT_PRESENT_LDT: u16 = 0x02;
    let segment = |attributes, limit| Segment {
        selector: 0,
        attributes: SegmentAttributes(attributes),
        limit,
        base: 0,
    };
    let data = segment(DATA32, u32::MAX);
    let mut state = Vmsa::new_zeroed();
    state.cs = segment(CODE32, u32::MAX);
    state.ds = data;
    state.es = data;
    state.fs = data;
    state.gs = data;
    state.ss = data;
    state.ldtr = segment(NOT_PRESENT_LDT, 0);
    state.tr = segment(BUSY_TSS, 0xFFFF);
    state.gdtr = segment(0, 0xFFFF);
    state.idtr = segment(0, 0);
    // PE, NE.
    state.cr0 = 0x21;
    // MCE; that VMXE is set the guest does not see.
    state.cr4 = 0x40;
    state.efer = Efer(Efer::SCE.0 | Efer::LME.0 | Efer::NXE.0);
    state.rip = 0xFFFF_FFF0;
    state.rflags = 2;
    state.dr6 = 0xFFFF_0FF0;
    state.dr7 = 0x400;
    state.g_pat = 0x0007_0406_0007_0406;
    state.xcr0 = 1;
    state.mxcsr = 0x1F80;
    state.x87_fcw = 0x37F;
    state.rbx = u64::from(GPA_WIDTH);
    state.rdx = u64::from(cpuid_signature);
    state.rsi = u64::from(vcpu.0);
    state
}
