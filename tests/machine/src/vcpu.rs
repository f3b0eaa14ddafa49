//! The virtual CPUs as the host knows them: which VMSA each privilege level has, which one
//! runs, and its side of the GHCB protocol.
//!
//! A vCPU has up to four contexts, one per VMPL, of which one runs at a time. The GHCB MSR
//! and the registered GHCB page belong to the context, not to the vCPU.

use alloc::string::String;

use protocols::report::{Event, Stage, StageName};
use protocols::vmsa::{Efer, SevFeatures};

use crate::access::owner_fault;
use crate::calls;
use crate::memory::PhysicalMemory;
use crate::platform::Platform;
use crate::types::{Alias, Gpa, PageSize, Spa, VcpuId, Vmpl};

/// Position of the C-bit: the top bit of a four-level nested table, so that the two aliases
/// are its two halves (`tcg-svm.md` §4).
pub const C_BIT: u8 = 47;

/// How a context waits for a start-up IPI.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hold {
    /// By MSR request 0x006.
    Msr,
    /// By page request 0x8000_0004 with the GHCB at this address.
    Page(Gpa),
}

/// One VMPL of one vCPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct Context {
    /// Where its VMSA is; `None` if the host has not been given one.
    pub vmsa: Option<Gpa>,
    /// The GHCB MSR of this VMSA.
    pub ghcb_msr: u64,
    /// The registered GHCB page.
    pub registered: Option<Gpa>,
    /// Waiting for a start-up IPI.
    pub hold: Option<Hold>,
}

/// One virtual CPU.
#[derive(Clone, Debug, Default)]
pub struct Vcpu {
    pub(crate) contexts: [Context; Vmpl::COUNT],
    /// The VMSA that is between VMRUN and the next world switch, and so in use. Not the
    /// context's: that may be replaced or destroyed while the old one runs.
    pub(crate) running: Option<Gpa>,
    /// The VMPL that ran last.
    pub(crate) last: Option<Vmpl>,
}

/// Why a VMSA cannot be run (VMRUN would give VMEXIT_INVALID; APM Table 15-41).
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum EnterError {
    /// No such vCPU, or no VMSA was given for this VMPL.
    NoVmsa,
    /// The VMSA page is not guest-owned memory of that address.
    NotOwned(Gpa),
    /// RMP.VMSA is clear.
    NotVmsa(Gpa),
    /// EFER.SVME is clear: the paravisor stopped this context.
    NotRunnable(Gpa),
    /// The VMSA says another VMPL than the one asked for.
    WrongVmpl(Gpa),
    /// SEV_FEATURES is not what the machine supports (SNP only).
    Features(u64),
    /// The VMSA is in use by another vCPU.
    Busy(Gpa),
    /// A trust domain exits, and the host cannot help.
    TdExit(String),
}

/// Offsets in the VMSA (APM-B Table B-4).
mod vmsa {
    use core::mem::offset_of;

    use protocols::vmsa::Vmsa;

    pub const VMPL: u64 = offset_of!(Vmsa, vmpl) as u64;
    pub const EFER: u64 = offset_of!(Vmsa, efer) as u64;
    pub const SEV_FEATURES: u64 = offset_of!(Vmsa, sev_features) as u64;
    pub const RAX: u64 = offset_of!(Vmsa, rax) as u64;
    pub const RCX: u64 = offset_of!(Vmsa, rcx) as u64;
}
const EFER_SVME: u64 = Efer::SVME.bits();
/// The only SEV_FEATURES value this machine runs: SNPActive.
pub const SEV_FEATURES: u64 = SevFeatures::SNP_ACTIVE.bits();

impl<P: PhysicalMemory> Platform<P> {
    /// Whether a lower VMPL was ever run.
    pub(crate) const fn is_firmware_entered(&self) -> bool {
        self.stages[1]
    }

    /// Number of vCPUs.
    pub fn vcpu_count(&self) -> u32 {
        self.vcpus.len() as u32
    }

    /// One context, to look at.
    pub fn context(&self, vcpu: VcpuId, vmpl: Vmpl) -> Option<&Context> {
        self.vcpus
            .get(vcpu.index())
            .map(|v| &v.contexts[vmpl.index()])
    }

    pub(crate) fn context_mut(&mut self, vcpu: VcpuId, vmpl: Vmpl) -> Option<&mut Context> {
        self.vcpus
            .get_mut(vcpu.index())
            .map(|v| &mut v.contexts[vmpl.index()])
    }

    /// RDMSR of the GHCB MSR.
    pub fn ghcb_msr(&self, vcpu: VcpuId, vmpl: Vmpl) -> u64 {
        self.context(vcpu, vmpl)
            .map_or(0, |context| context.ghcb_msr)
    }

    /// WRMSR of the GHCB MSR. Never intercepted, never refused (APM 15.35.7).
    pub fn set_ghcb_msr(&mut self, vcpu: VcpuId, vmpl: Vmpl, value: u64) {
        if let Some(context) = self.context_mut(vcpu, vmpl) {
            context.ghcb_msr = value;
        }
    }

    /// Gives a context its VMSA, or takes it, as the launch, AP creation and AP destruction do.
    ///
    /// The GHCB MSR and the registered GHCB belong to the vCPU's context and outlive its VMSA,
    /// as in KVM: OVMF starts its processors anew without telling where their GHCBs are.
    pub fn set_vmsa(&mut self, vcpu: VcpuId, vmpl: Vmpl, gpa: Option<Gpa>) {
        if let Some(context) = self.context_mut(vcpu, vmpl) {
            context.vmsa = gpa;
            context.hold = None;
        }
    }

    /// The checks of VMRUN on a VMSA. On success the VMSA counts as in use until
    /// [`Self::leave`], and the caller loads its state from the address returned.
    pub fn enter(&mut self, vcpu: VcpuId, vmpl: Vmpl) -> Result<Spa, EnterError> {
        if self.td().is_some() {
            self.serve(vcpu);
            let state = if vmpl == Vmpl::VMPL0 {
                self.store_l2(vcpu).map_err(EnterError::TdExit)?;
                self.td().and_then(|td| td.state_of(vcpu, vmpl))
            } else {
                self.load_l2(vcpu)
            };
            let spa = state.ok_or(EnterError::NoVmsa)?;
            let tsc = (self.clock)();
            self.note_entry(vcpu, vmpl, tsc)?;
            return Ok(spa);
        }
        let gpa = self
            .context(vcpu, vmpl)
            .and_then(|c| c.vmsa)
            .ok_or(EnterError::NoVmsa)?;
        let spa = self.check_vmsa(vcpu, vmpl, gpa).inspect_err(|error| {
            if matches!(error, EnterError::NotRunnable(_)) {
                self.counters.violations.run_without_svme += 1;
            }
        })?;
        self.serve(vcpu);
        let tsc = (self.clock)();
        // A lower level goes on: whatever VMPL0 withdrew on its behalf has to be gone.
        if vmpl != Vmpl::VMPL0
            && let Some(found) = self.stale.settle(vcpu)
        {
            self.count_stale(found, "was withdrawn, and the guest is told so,");
        }
        let guest = calls::Guest {
            layout: self.host.layout(),
            memory: &self.memory,
        };
        let rax = self.memory.read_u64(spa.plus(vmsa::RAX));
        let calls = &mut self.counters.calls;
        calls.close(vcpu, vmpl, gpa, rax, tsc, &guest);
        self.note_entry(vcpu, vmpl, tsc)?.running = Some(gpa);
        Ok(spa)
    }

    /// Counts the entry of a level, and tells if it is the first of its stage.
    fn note_entry(&mut self, vcpu: VcpuId, vmpl: Vmpl, tsc: u64) -> Result<&mut Vcpu, EnterError> {
        let Some(state) = self.vcpus.get_mut(vcpu.index()) else {
            return Err(EnterError::NoVmsa);
        };
        let switched = state.last.replace(vmpl) != Some(vmpl);
        if switched {
            self.counters.vmpl(vmpl).world_switches += 1;
        }
        if vmpl != Vmpl::VMPL0 {
            self.counters.start_is_over();
        }
        let stage = if vmpl == Vmpl::VMPL0 {
            StageName::Paravisor
        } else {
            StageName::Firmware
        };
        let seen = &mut self.stages[usize::from(stage == StageName::Firmware)];
        if !core::mem::replace(seen, true) {
            let sample = self.sample();
            self.counters.samples.offer(sample);
            let instructions = self.counters.level(Vmpl::VMPL0).instructions;
            self.events.push(Event::Stage(Stage {
                name: stage,
                tsc,
                instructions,
                validated_bytes: sample.validated_bytes,
            }));
        }
        self.vcpus.get_mut(vcpu.index()).ok_or(EnterError::NoVmsa)
    }

    /// The vCPU that is served is to start a lower level, but runs VMPL0 and is not interrupted.
    pub fn count_awaited_start(&mut self) {
        self.counters.start_is_awaited();
    }

    /// A trust domain has sent this interrupt command: the guest of the vCPU that it is for goes on, if
    /// L1 has that vCPU. A guest that runs is interrupted; it may run because of this interrupt already.
    pub fn count_interrupt(&mut self, command: u64) {
        if let Some(to) = crate::tdx::vmcall::interrupts(command)
            && self.running_l2(to).is_none()
        {
            self.counters.entry_is_awaited_on(to.index());
        }
    }

    /// Nobody waits any more for the start that [`Self::count_awaited_start`] told of.
    pub fn count_start(&mut self) {
        self.counters.start_is_over();
    }

    fn check_vmsa(&self, vcpu: VcpuId, vmpl: Vmpl, gpa: Gpa) -> Result<Spa, EnterError> {
        let place = self
            .host
            .layout()
            .place(gpa)
            .ok_or(EnterError::NotOwned(gpa))?;
        let entry = self.host.rmp().entry(&place);
        let private = self.host.attribute(&place) == Alias::Private;
        if !private || owner_fault(&entry, gpa).is_some() || entry.size() != PageSize::Size4K {
            return Err(EnterError::NotOwned(gpa));
        }
        if !entry.is_vmsa() {
            return Err(EnterError::NotVmsa(gpa));
        }
        let elsewhere =
            |(index, other): (usize, &Vcpu)| index != vcpu.index() && other.running == Some(gpa);
        if self.vcpus.iter().enumerate().any(elsewhere) {
            return Err(EnterError::Busy(gpa));
        }
        let mut level = [0];
        self.memory.read(place.spa.plus(vmsa::VMPL), &mut level);
        if level[0] != vmpl.number() {
            return Err(EnterError::WrongVmpl(gpa));
        }
        let features = self.memory.read_u64(place.spa.plus(vmsa::SEV_FEATURES));
        if features != SEV_FEATURES {
            return Err(EnterError::Features(features));
        }
        if self.memory.read_u64(place.spa.plus(vmsa::EFER)) & EFER_SVME == 0 {
            return Err(EnterError::NotRunnable(gpa));
        }
        Ok(place.spa)
    }

    /// The caller has stored the state of the running VMSA back; it is no longer in use.
    pub fn leave(&mut self, vcpu: VcpuId) {
        let Some(state) = self.vcpus.get_mut(vcpu.index()) else {
            return;
        };
        let (Some(gpa), Some(vmpl)) = (state.running.take(), state.last) else {
            return;
        };
        let Some(spa) = self.spa_of(gpa) else {
            return;
        };
        let registers = (
            self.memory.read_u64(spa.plus(vmsa::RAX)),
            self.memory.read_u64(spa.plus(vmsa::RCX)),
        );
        let guest = calls::Guest {
            layout: self.host.layout(),
            memory: &self.memory,
        };
        let calls = &mut self.counters.calls;
        calls.open(vcpu, vmpl, gpa, registers, &guest);
    }

    /// Whether the page or block holds a VMSA that runs right now: hardware marks its RMP entry
    /// from VMRUN to #VMEXIT and answers FAIL_INUSE to RMPADJUST and RMPUPDATE (APM 15.36.12).
    pub(crate) fn is_vmsa_in_use(&self, gpa: Gpa, size: PageSize) -> bool {
        let start = gpa.align_down(size);
        self.vcpus
            .iter()
            .filter_map(|vcpu| vcpu.running)
            .any(|vmsa| vmsa.align_down(size) == start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::{Denial, Verdict};
    use crate::stale::Stay;
    use crate::testing::{BLOCK, CPU0, Sparse, platform};
    use crate::types::{Kind, PAGE_SIZE};

    const VMSA: Gpa = Gpa::new(BLOCK.get() + PAGE_SIZE);

    /// A platform whose first vCPU has a VMSA at VMPL1 that VMRUN takes.
    fn ready() -> (Platform<Sparse>, Spa) {
        let mut platform = platform("");
        platform.accept(VMSA, 1 << 16 | 1);
        let spa = platform.spa_of(VMSA).unwrap();
        platform.memory().write(spa.plus(vmsa::VMPL), &[1]);
        platform.memory().write_u64(spa.plus(vmsa::EFER), EFER_SVME);
        platform
            .memory()
            .write_u64(spa.plus(vmsa::SEV_FEATURES), SEV_FEATURES);
        platform.set_vmsa(CPU0, Vmpl::VMPL1, Some(VMSA));
        (platform, spa)
    }

    /// `snp-isa.md` §11, APM Table 15-41.
    #[test]
    fn vmrun_checks_the_vmsa() {
        let (mut platform, spa) = ready();
        assert_eq!(platform.enter(CPU0, Vmpl::VMPL1), Ok(spa));
        platform.leave(CPU0);
        assert_eq!(platform.enter(CPU0, Vmpl::VMPL2), Err(EnterError::NoVmsa));
        assert_eq!(
            platform.enter(VcpuId(7), Vmpl::VMPL1),
            Err(EnterError::NoVmsa)
        );

        platform.memory().write_u64(spa.plus(vmsa::EFER), 0x500);
        assert_eq!(
            platform.enter(CPU0, Vmpl::VMPL1),
            Err(EnterError::NotRunnable(VMSA))
        );
        assert_eq!(platform.counters.violations.run_without_svme, 1);

        platform.memory().write_u64(spa.plus(vmsa::SEV_FEATURES), 9);
        assert_eq!(
            platform.enter(CPU0, Vmpl::VMPL1),
            Err(EnterError::Features(9))
        );

        platform.memory().write(spa.plus(vmsa::VMPL), &[0]);
        assert_eq!(
            platform.enter(CPU0, Vmpl::VMPL1),
            Err(EnterError::WrongVmpl(VMSA))
        );

        platform.adjust(VMSA, PageSize::Size4K, 1);
        assert_eq!(
            platform.enter(CPU0, Vmpl::VMPL1),
            Err(EnterError::NotVmsa(VMSA))
        );

        let place = platform.layout().place(VMSA).unwrap();
        let host = &mut platform.host;
        host.take_away(&platform.memory, &place, VMSA, PageSize::Size4K)
            .unwrap();
        assert_eq!(
            platform.enter(CPU0, Vmpl::VMPL1),
            Err(EnterError::NotOwned(VMSA))
        );
    }

    #[test]
    fn one_vmsa_runs_on_one_vcpu_at_a_time() {
        let (mut platform, spa) = ready();
        platform.set_vmsa(VcpuId(1), Vmpl::VMPL1, Some(VMSA));
        assert_eq!(platform.enter(CPU0, Vmpl::VMPL1), Ok(spa));
        assert_eq!(
            platform.enter(VcpuId(1), Vmpl::VMPL1),
            Err(EnterError::Busy(VMSA))
        );
        platform.leave(CPU0);
        assert_eq!(platform.enter(VcpuId(1), Vmpl::VMPL1), Ok(spa));
    }

    /// APM 15.36.12: from VMRUN to the exit nobody changes the entry of a VMSA's page.
    #[test]
    fn a_vmsa_in_use_is_refused_to_everybody() {
        let (mut platform, _) = ready();
        let ordinary = 0xF01;
        platform.enter(CPU0, Vmpl::VMPL1).unwrap();
        // Replaced in the books of the host, it runs on all the same.
        platform.set_vmsa(CPU0, Vmpl::VMPL1, None);
        let in_use = crate::isa::status::FAIL_IN_USE;
        assert_eq!(platform.adjust(VMSA, PageSize::Size4K, ordinary), in_use);
        assert!(
            platform
                .convert(VMSA, PageSize::Size4K, Alias::Shared)
                .is_err()
        );
        let denied = platform.access(Vmpl::VMPL0, Alias::Shared, VMSA, Kind::Read);
        assert_eq!(denied, Verdict::Denied(Denial::InUse));
        let place = platform.layout().place(VMSA).unwrap();
        assert!(platform.host.rmp().entry(&place).is_vmsa());
        assert_eq!(platform.host.attribute(&place), Alias::Private);
        platform.set_vmsa(VcpuId(1), Vmpl::VMPL1, Some(VMSA));
        assert_eq!(
            platform.enter(VcpuId(1), Vmpl::VMPL1),
            Err(EnterError::Busy(VMSA))
        );
        platform.leave(CPU0);
        assert_eq!(platform.adjust(VMSA, PageSize::Size4K, ordinary), 0);
        assert!(
            platform
                .convert(VMSA, PageSize::Size4K, Alias::Shared)
                .is_ok()
        );
    }

    #[test]
    fn a_running_vmsa_that_is_rescinded_is_a_violation() {
        let (mut platform, _) = ready();
        platform.enter(CPU0, Vmpl::VMPL1).unwrap();
        platform.pval(VMSA, PageSize::Size4K, false);
        assert_eq!(platform.counters.violations.in_use_rescind, 1);
        let (mut platform, _) = ready();
        platform.pval(VMSA, PageSize::Size4K, false);
        assert_eq!(platform.counters.violations.in_use_rescind, 0);
    }

    /// `snp-isa.md` §4, APM 15.36.15: what VMPL0 withdrew is in other CPUs' translations until
    /// they leave.
    #[test]
    fn an_answer_before_everybody_left_is_a_violation() {
        let (mut platform, _) = ready();
        let other = Stay {
            cpu: VcpuId(1),
            exits: 3,
            vmpl: Vmpl::VMPL1,
        };
        let answer = |platform: &mut Platform<Sparse>| {
            let before = platform.counters.violations.stale_translation;
            platform.enter(CPU0, Vmpl::VMPL1).unwrap();
            platform.leave(CPU0);
            platform.counters.violations.stale_translation - before
        };
        assert_eq!(answer(&mut platform), 0);
        platform.stale().note(CPU0, other, BLOCK, PAGE_SIZE);
        assert_eq!(answer(&mut platform), 1);
        assert_eq!(answer(&mut platform), 0, "told once");
        platform.stale().note(CPU0, other, BLOCK, PAGE_SIZE);
        platform.stale().forget_those_who_left(|_| false);
        assert_eq!(answer(&mut platform), 0);
        // Somebody else's withdrawal is for that CPU to settle.
        platform.stale().note(VcpuId(1), other, BLOCK, PAGE_SIZE);
        assert_eq!(answer(&mut platform), 0);
    }

    #[test]
    fn stages_are_told_once_and_switches_are_counted() {
        let (mut platform, _) = ready();
        let _ = platform.take_events();
        for _ in 0..3 {
            platform.enter(CPU0, Vmpl::VMPL1).unwrap();
            platform.leave(CPU0);
        }
        let events = platform.take_events();
        assert_eq!(
            events,
            [Event::Stage(Stage {
                name: StageName::Firmware,
                tsc: 42,
                instructions: 0,
                // The page of the VMSA.
                validated_bytes: PAGE_SIZE,
            })]
        );
        assert_eq!(platform.counters.level(Vmpl::VMPL1).world_switches, 1);
    }

    #[test]
    fn the_ghcb_outlives_the_vmsa() {
        let (mut platform, _) = ready();
        let context = platform.context(CPU0, Vmpl::VMPL1).unwrap();
        assert_eq!(context.ghcb_msr, platform.sev_info());
        platform.register_ghcb_page(Vmpl::VMPL1);
        let before = *platform.context(CPU0, Vmpl::VMPL1).unwrap();
        assert!(before.registered.is_some());
        for vmsa in [None, Some(VMSA)] {
            platform.set_vmsa(CPU0, Vmpl::VMPL1, vmsa);
            let context = platform.context(CPU0, Vmpl::VMPL1).unwrap();
            assert_eq!(context.registered, before.registered);
            assert_eq!(context.ghcb_msr, before.ghcb_msr);
        }
    }
}
