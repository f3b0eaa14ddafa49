//! TD partitioning (§7): the L2 VMs of a trust domain, their entry and their exits.
//!
//! Registers of an L2 VM lie in a page of the machine's own, one for each VM and processor, as L1's
//! do. An entry takes the general registers from L1's structure, and those that the processor has
//! only one set of from L1; an exit gives both back.
//!
//! Invariant: between an entry and its exit `inside` names the VM, and its interrupt status is in
//! `L2::status`; at any other time L1's structure has it.

pub mod apic;
mod fields;
pub mod interrupts;
pub mod msr;
pub mod vmcs;

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;

use protocols::tdx::l2::{
    EnterState, Exit, Flush, GlaList, decode_enter_operand, decode_invgla_operand,
};
use protocols::tdx::metadata::L2Controls;
use protocols::tdx::vmcall::register::{COUNT, RBP, RCX, RDX};
use protocols::tdx::vmcs::{Field, Interruptibility, interruption, msr_bitmaps};
use protocols::tdx::{L2Vm, Operand, Status};
use protocols::vmsa::{Efer, Vmsa};
use zerocopy::{FromBytes, IntoBytes};

use self::vmcs::Controls;
use super::page::{is_private, vmpl_of};
use super::sept::{State, Walk};
use super::tdcall::Gprs;
use super::{Stop, Td};
use crate::memory::PhysicalMemory;
use crate::platform::Platform;
use crate::types::{Alias, Gpa, PAGE_SIZE, PageSize, Spa, VcpuId, Vmpl};

/// One L2 VM on one processor.
#[derive(Clone)]
pub(super) struct L2 {
    /// L2_CTLS.
    pub ctls: L2Controls,
    controls: Controls,
    bitmaps: Box<[u64; msr_bitmaps::WORDS]>,
    /// Guest interrupt status while it runs.
    status: u16,
    /// It has run since its translations were dropped.
    used: bool,
    /// And rights to these pages were withdrawn since.
    stale: BTreeMap<Gpa, Stale>,
}

/// A right that was withdrawn, and that a processor may still use.
#[derive(Clone, Copy)]
struct Stale {
    /// Whose L1 has withdrawn it.
    by: VcpuId,
    /// That processor has gone on with its guest since, who takes the right for gone.
    relied_on: bool,
}

impl Default for L2 {
    fn default() -> Self {
        Self {
            ctls: L2Controls::empty(),
            controls: Controls::default(),
            bitmaps: Box::new([u64::MAX; msr_bitmaps::WORDS]),
            status: 0,
            used: false,
            stale: BTreeMap::new(),
        }
    }
}

/// What L1 has entered.
#[derive(Clone, Copy)]
pub(super) struct Inside {
    pub vm: L2Vm,
    /// L1's structure.
    state: Gpa,
}

/// How TDG.VP.ENTER ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Entry {
    /// In L1, with this status.
    Status(u64),
    /// In the VM.
    Enter(Vmpl),
}

/// What the CPU has to know to run an L2 VM.
#[derive(Clone, Debug)]
pub struct Running {
    /// Which VM.
    pub vm: L2Vm,
    /// L2_CTLS.
    pub ctls: L2Controls,
    /// The controls L1 has set.
    pub controls: Controls,
}

impl Td {
    /// What runs on `vcpu` if it is an L2 VM.
    fn inside(&self, vcpu: VcpuId) -> Option<(Inside, &L2)> {
        let vp = self.vps.get(vcpu.index())?;
        let inside = vp.inside?;
        Some((inside, vp.l2.get(inside.vm.index())?))
    }

    fn inside_mut(&mut self, vcpu: VcpuId) -> Option<(Inside, &mut L2)> {
        let vp = self.vps.get_mut(vcpu.index())?;
        let inside = vp.inside?;
        Some((inside, vp.l2.get_mut(inside.vm.index())?))
    }

    /// L1 has withdrawn a right of `vm` to `gpa` on processor `by`: processors that have run it may
    /// still use it until they drop its translations.
    pub(super) fn note_withdrawn(&mut self, by: VcpuId, vm: L2Vm, gpa: Gpa) {
        for vp in &mut self.vps {
            let l2 = &mut vp.l2[vm.index()];
            if l2.used {
                l2.stale.entry(gpa).or_insert(Stale {
                    by,
                    relied_on: false,
                });
            }
        }
    }

    /// L1 has given back what it had withdrawn, and who still uses it may.
    pub(super) fn note_restored(&mut self, vm: L2Vm, gpa: Gpa) {
        for vp in &mut self.vps {
            vp.l2[vm.index()].stale.remove(&gpa);
        }
    }

    /// `vcpu` enters `vm`. Whatever its L1 has withdrawn its guest takes for gone from now on: nobody
    /// may be in the VM who can still use it, and who is outside has to drop it before he comes back.
    /// The address of a right that is not gone.
    fn rely_on_withdrawals(&mut self, vcpu: VcpuId, vm: L2Vm) -> Option<Gpa> {
        let mut left = None;
        for (vp, id) in self.vps.iter_mut().zip(0..) {
            let enters = VcpuId(id) == vcpu;
            let inside = enters || vp.inside.is_some_and(|inside| inside.vm == vm);
            vp.l2[vm.index()].stale.retain(|&gpa, stale| {
                stale.relied_on |= stale.by == vcpu;
                let is_used = inside && stale.relied_on;
                if is_used {
                    left = Some(gpa);
                }
                !is_used
            });
        }
        left
    }

    /// The processor drops the translations of `vm`.
    pub(super) fn flush_l2(&mut self, vcpu: VcpuId, vm: L2Vm) {
        if let Some(vp) = self.vp(vcpu) {
            let l2 = &mut vp.l2[vm.index()];
            l2.used = vp.inside.is_some_and(|inside| inside.vm == vm);
            l2.stale.clear();
        }
    }
}

impl<P: PhysicalMemory> Platform<P> {
    /// TDG.VP.ENTER of L1. `interrupted` says that an interrupt waits for L1.
    pub(super) fn vp_enter(
        &mut self,
        vcpu: VcpuId,
        gprs: &Gprs,
        interrupted: bool,
    ) -> Result<Entry, Stop> {
        let (rcx, rdx) = (gprs[RCX], gprs[RDX]);
        if !is_private(rdx) || !rdx.is_multiple_of(EnterState::ALIGNMENT) {
            return Ok(Entry::Status(Operand::RDX.invalid()));
        }
        let Some((vm, flush)) = decode_enter_operand(rcx) else {
            return Ok(Entry::Status(Operand::RCX.invalid()));
        };
        let Some(controls) = self.l2(vcpu, vm).map(|l2| l2.controls.clone()) else {
            return Ok(Entry::Status(Operand::RCX.invalid()));
        };
        let Some(virtual_apic) = controls.virtual_apic else {
            return Ok(Entry::Status(Operand::L2_VAPIC_GPA.invalid()));
        };
        if interrupted {
            return Ok(Entry::Status(Status::PENDING_INTERRUPT.with(0)));
        }
        for gpa in [rdx, virtual_apic] {
            self.need_mapped(Gpa::new(gpa))?;
        }
        if let Some(status) = self.entry_fault(vcpu, vm, &controls) {
            return Ok(Entry::Status(status));
        }
        if flush == Flush::Ept
            && let Some(td) = self.td_mut()
        {
            td.flush_l2(vcpu, vm);
        }
        let Some(l2) = self.l2_mut(vcpu, vm) else {
            return Ok(Entry::Status(Operand::RCX.invalid()));
        };
        l2.used = true;
        let left = self
            .td_mut()
            .and_then(|td| td.rely_on_withdrawals(vcpu, vm));
        if let Some(gpa) = left {
            self.counters.violations.stale_translation += 1;
            let why = String::from("an L2 VM goes on with translations that L1 has withdrawn");
            self.refuse(Vmpl::VMPL0, Some(gpa), why);
        }
        if let Some(vp) = self.td_mut().and_then(|td| td.vp(vcpu)) {
            vp.inside = Some(Inside {
                vm,
                state: Gpa::new(rdx),
            });
        }
        Ok(Entry::Enter(vmpl_of(vm)))
    }

    /// What keeps the processor from running the VM: events that there are not, and a mode that EFER
    /// does not say.
    fn entry_fault(&self, vcpu: VcpuId, vm: L2Vm, controls: &Controls) -> Option<u64> {
        let [event, _, _] = controls.entry_event;
        let event_fits = interruption::Event::decode(event).is_none_or(|event| {
            use interruption::Kind;
            let error = matches!(event.vector, 8 | 10..=14 | 17);
            match event.kind {
                Kind::EXTERNAL | Kind::SOFTWARE_INTERRUPT => !event.has_error,
                Kind::NMI => event.vector == 2 && !event.has_error,
                Kind::EXCEPTION => event.vector < 32 && event.has_error == error,
                Kind::SOFTWARE_EXCEPTION => matches!(event.vector, 3 | 4) && !event.has_error,
                _ => false,
            }
        });
        let efer = self.l2_state(vcpu, vm)?.efer;
        let mode_fits = controls.ia32e == efer.contains(Efer::LMA);
        (!event_fits || !mode_fits).then_some(Status::TD_VMCS_FIELD_ERROR.with(0))
    }

    /// Demands that a page of L1's is there and accepted; the trust domain exits until it is.
    fn need_mapped(&mut self, gpa: Gpa) -> Result<Spa, Stop> {
        let settled = |walk: &Walk| match walk {
            Walk::Leaf(entry) | Walk::Larger(entry) if State::of(entry) == State::Mapped => {
                Some(())
            }
            _ => None,
        };
        let page = gpa.align_down(PageSize::Size4K);
        let (place, ()) = self.walk_until(page, PageSize::Size4K, "partitioning", settled)?;
        Ok(place.spa.plus(gpa.offset_in_page()))
    }

    fn l2(&self, vcpu: VcpuId, vm: L2Vm) -> Option<&L2> {
        self.td()?.vps.get(vcpu.index())?.l2.get(vm.index())
    }

    fn l2_mut(&mut self, vcpu: VcpuId, vm: L2Vm) -> Option<&mut L2> {
        self.td_mut()?.vp(vcpu)?.l2.get_mut(vm.index())
    }

    fn state_at(&self, vcpu: VcpuId, vmpl: Vmpl) -> Option<Spa> {
        self.td()?.state_of(vcpu, vmpl)
    }

    fn read_state(&self, at: Spa) -> Vmsa {
        let mut page = [0; PAGE_SIZE as usize];
        self.memory.read(at, &mut page);
        // All bit patterns are a VMSA, and the sizes are equal.
        Vmsa::read_from_bytes(&page).expect("a page")
    }

    fn l2_state(&self, vcpu: VcpuId, vm: L2Vm) -> Option<Vmsa> {
        Some(self.read_state(self.state_at(vcpu, vmpl_of(vm))?))
    }

    /// The registers of the VM that L1 has entered, made from what L1 gave. Called when L1's are in
    /// its page.
    pub(crate) fn load_l2(&mut self, vcpu: VcpuId) -> Option<Spa> {
        let inside = self.td()?.vps.get(vcpu.index())?.inside?;
        let at = self.state_at(vcpu, vmpl_of(inside.vm))?;
        let l1 = self.read_state(self.state_at(vcpu, Vmpl::VMPL0)?);
        let mut l2 = self.read_state(at);
        share(&l1, &mut l2);
        let mut given = EnterState::default();
        let from = self.spa_of(inside.state)?;
        self.memory
            .read(from, &mut given.as_mut_bytes()[..EnterState::USED]);
        set_gprs(&mut l2, &given.gprs);
        l2.rflags = given.rflags & 0xFFFF_FFFF | 2;
        l2.rip = given.rip;
        l2.ssp = given.ssp;
        self.memory.write(at, l2.as_bytes());
        let (_, running) = self.td_mut()?.inside_mut(vcpu)?;
        running.status = given.interrupt_status;
        Some(at)
    }

    /// The VM that `vcpu` runs stops, and L1 hears why.
    pub fn exit_l2(&mut self, vcpu: VcpuId, exit: Exit, interruptibility: Interruptibility) {
        self.serve(vcpu);
        let Some(td) = self.td_mut() else { return };
        if let Some((_, l2)) = td.inside_mut(vcpu) {
            l2.controls.interruptibility = interruptibility;
        }
        if let Some(vp) = td.vp(vcpu) {
            vp.exit = Some(exit);
        }
    }

    /// Gives L1 what the VM that stopped left behind: its registers in the structure, the reason in
    /// L1's registers. Called when the VM's are in its page. Nothing to be done if L1 was not
    /// stopped by an exit.
    pub(crate) fn store_l2(&mut self, vcpu: VcpuId) -> Result<(), String> {
        let Some(vp) = self.td_mut().and_then(|td| td.vp(vcpu)) else {
            return Ok(());
        };
        let (Some(inside), Some(mut exit)) = (vp.inside.take(), vp.exit.take()) else {
            return Ok(());
        };
        let status = vp.l2[inside.vm.index()].status;
        let (Some(l1_at), Some(mut l2)) = (
            self.state_at(vcpu, Vmpl::VMPL0),
            self.l2_state(vcpu, inside.vm),
        ) else {
            return Ok(());
        };
        let mut l1 = self.read_state(l1_at);
        share(&l2, &mut l1);
        let left = EnterState {
            gprs: gprs_of(&l2),
            rflags: l2.rflags,
            rip: l2.rip,
            ssp: l2.ssp,
            interrupt_status: status,
            padding: [0; 6],
        };
        if let Some(running) = self.l2_mut(vcpu, inside.vm) {
            running.controls.ia32e = l2.efer.contains(Efer::LMA);
        }
        // The host may have taken the page meanwhile.
        let to = match self.need_mapped(inside.state) {
            Ok(to) => to,
            Err(Stop::Refused(why)) => return Err(why),
            Err(_) => return Err(format!("no page for the registers of {:?}", inside.vm)),
        };
        self.memory.write(to, &left.as_bytes()[..EnterState::USED]);
        let cs = vmcs::read(&Controls::default(), &mut l2, Field::CS_RIGHTS).unwrap_or(0);
        exit.cs = u64::from(l2.cs.selector) | (cs & 0xFFFF) << 16 | u64::from(l2.cs.limit) << 32;
        exit.cs_base = l2.cs.base;
        exit.cpl = u64::from(l2.cpl);
        let mut gprs = gprs_of(&l1);
        exit.store(&mut gprs);
        // RBP is what the VM had there.
        gprs[RBP] = l2.rbp;
        let rsp = l1.rsp;
        set_gprs(&mut l1, &gprs);
        l1.rsp = rsp;
        self.memory.write(l1_at, l1.as_bytes());
        Ok(())
    }

    /// The host goes on with L1 although the L2 VM has stopped for nothing.
    pub fn count_early_return(&mut self) {
        self.counters.count_td_exit(Vmpl::VMPL1, "early-return");
    }

    /// The VM that runs on `vcpu`, if it is not L1.
    pub fn running_l2(&self, vcpu: VcpuId) -> Option<Running> {
        let (inside, l2) = self.td()?.inside(vcpu)?;
        Some(Running {
            vm: inside.vm,
            ctls: l2.ctls,
            controls: l2.controls.clone(),
        })
    }

    /// The event that L1 wants delivered, with its error code and instruction length. It is
    /// delivered once.
    pub fn take_entry_event(&mut self, vcpu: VcpuId) -> Option<(interruption::Event, u32, u32)> {
        let (_, l2) = self.td_mut()?.inside_mut(vcpu)?;
        let [field, error, length] = l2.controls.entry_event;
        l2.controls.entry_event[0] = field & !interruption::VALID;
        Some((interruption::Event::decode(field)?, error, length))
    }

    /// TDG.VP.INVEPT.
    pub(super) fn invept(&mut self, vcpu: VcpuId, gprs: &Gprs) -> u64 {
        let all: u64 = L2Vm::ALL.into_iter().map(L2Vm::invept_bit).sum();
        if gprs[RCX] & !all != 0 {
            return Operand::RCX.invalid();
        }
        for vm in L2Vm::ALL {
            if gprs[RCX] & vm.invept_bit() != 0
                && let Some(td) = self.td_mut()
            {
                td.flush_l2(vcpu, vm);
            }
        }
        Status::SUCCESS.with(0)
    }

    /// TDG.VP.INVGLA. What a linear address leads to is dropped with every exit here; operands are
    /// checked all the same. It does not drop what a physical one leads to.
    pub(super) fn invgla(&mut self, gprs: &mut Gprs) -> Result<u64, Stop> {
        let Some((_, is_list)) = decode_invgla_operand(gprs[RCX]) else {
            return Ok(Operand::RCX.invalid());
        };
        if is_list {
            let Some(list) = GlaList::decode(gprs[RDX]).filter(|list| is_private(list.gpa)) else {
                return Ok(Operand::RDX.invalid());
            };
            self.need_mapped(Gpa::new(list.gpa))?;
            let done = GlaList {
                gpa: list.gpa,
                first: list.first + list.count,
                count: 0,
            };
            gprs[RDX] = done.encode();
        }
        Ok(Status::SUCCESS.with(0))
    }

    /// The rights of the running VM to a page, as bits 5:3 of an exit qualification have them.
    pub fn ept_rights(&self, vmpl: Vmpl, gpa: Gpa) -> u64 {
        use crate::rmp::Permissions;
        let Some(place) = self.host.layout().place(gpa.align_down(PageSize::Size4K)) else {
            return 0;
        };
        let entry = self.host.rmp().entry(&place);
        if self.host.attribute(&place) != Alias::Private || State::of(&entry) != State::Mapped {
            return 0;
        }
        let has = entry.permissions(vmpl);
        [
            (Permissions::READ, 1 << 3),
            (Permissions::WRITE, 1 << 4),
            (Permissions::EXECUTE_SUPERVISOR, 1 << 5),
        ]
        .into_iter()
        .filter(|&(right, _)| has.contains(right))
        .map(|(_, bit)| bit)
        .sum()
    }
}

/// What the processor has only one set of: neither entry nor exit switches it.
fn share(from: &Vmsa, to: &mut Vmsa) {
    (to.star, to.lstar, to.cstar, to.sfmask) = (from.star, from.lstar, from.cstar, from.sfmask);
    to.kernel_gs_base = from.kernel_gs_base;
    (to.cr2, to.tsc_aux, to.spec_ctrl) = (from.cr2, from.tsc_aux, from.spec_ctrl);
    (to.dr, to.dr6, to.xcr0) = (from.dr, from.dr6, from.xcr0);
    (to.x87_dp, to.x87_rip, to.x87_ds, to.x87_cs) =
        (from.x87_dp, from.x87_rip, from.x87_ds, from.x87_cs);
    (to.x87_ftw, to.x87_fsw, to.x87_fcw, to.x87_fop) =
        (from.x87_ftw, from.x87_fsw, from.x87_fcw, from.x87_fop);
    to.mxcsr = from.mxcsr;
    (to.x87_registers, to.xmm) = (from.x87_registers, from.xmm);
}

const fn gprs_of(state: &Vmsa) -> [u64; COUNT] {
    [
        state.rax, state.rcx, state.rdx, state.rbx, state.rsp, state.rbp, state.rsi, state.rdi,
        state.r8, state.r9, state.r10, state.r11, state.r12, state.r13, state.r14, state.r15,
    ]
}

const fn set_gprs(state: &mut Vmsa, gprs: &[u64; COUNT]) {
    [
        state.rax, state.rcx, state.rdx, state.rbx, state.rsp, state.rbp, state.rsi, state.rdi,
        state.r8, state.r9, state.r10, state.r11, state.r12, state.r13, state.r14, state.r15,
    ] = *gprs;
}
