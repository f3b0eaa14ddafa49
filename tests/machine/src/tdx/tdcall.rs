//! TDCALL: which leaf, and what becomes of it (§1).

use alloc::string::String;

use protocols::tdx::metadata::{Features0, FieldId, L2Controls};
use protocols::tdx::vmcall::register::{COUNT, R8, R9, R10, R11, RAX, RCX, RDX};
use protocols::tdx::vmcall::{self, SubFunction};
use protocols::tdx::{Leaf, Operand, Status};

use super::l2::Entry;
use super::page::vmpl_of;
use super::vmcall::Answer;
use super::{GPA_WIDTH, Stop};
use crate::counters::Tdcall;
use crate::ghcb::Cpu;
use crate::memory::PhysicalMemory;
use crate::platform::{End, Platform};
use crate::types::{Gpa, VcpuId, Vmpl};

/// General registers, by number.
pub type Gprs = [u64; COUNT];

/// What the CPU knows about who executes the instruction.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// Privilege level.
    pub cpl: u8,
    /// 64-bit code.
    pub long_mode: bool,
}

/// What becomes of the instruction.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It completed, with results in the registers; step over it.
    Complete,
    /// It completed, and the processor halts until an interrupt comes; an NMI alone can wake it if
    /// `blocked`.
    Halt {
        /// The guest says that its interrupts are off.
        blocked: bool,
    },
    /// L1 is left and the L2 VM of this level entered; step over the instruction first.
    Enter(Vmpl),
    /// #UD: this is no trust domain.
    UndefinedOpcode,
    /// #GP(0).
    GeneralProtection,
    /// An operand lies in a page that is not accepted: as an access of the guest's to this address.
    Pending(Gpa),
    /// The run is over.
    End(End),
    /// The machine does not go on.
    Refused(String),
}

impl From<Stop> for Outcome {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Pending(gpa) => Self::Pending(gpa),
            Stop::End(end) => Self::End(end),
            Stop::Refused(why) => Self::Refused(why),
        }
    }
}

impl<P: PhysicalMemory> Platform<P> {
    /// Executes TDCALL of L1 on `vcpu`.
    pub fn tdcall(
        &mut self,
        vcpu: VcpuId,
        caller: Caller,
        gprs: &mut Gprs,
        cpu: &mut dyn Cpu,
    ) -> Outcome {
        if self.td().is_none() {
            return Outcome::UndefinedOpcode;
        }
        if caller.cpl != 0 || !caller.long_mode {
            return Outcome::GeneralProtection;
        }
        self.serve(vcpu);
        let rax = gprs[RAX];
        let leaf = Leaf(rax as u16);
        let version = rax >> 16;
        // The reserved bits are above the version.
        if version > u64::from(leaf == Leaf::VM_RD) {
            gprs[RAX] = Operand::RAX.invalid();
            return Outcome::Complete;
        }
        self.counters
            .count_tdcall(Vmpl::VMPL0, what(leaf, gprs[R11]));
        match leaf {
            Leaf::VP_VMCALL => return self.vp_vmcall(vcpu, gprs, cpu),
            Leaf::VP_ENTER => {
                return match self.vp_enter(vcpu, gprs, cpu.is_interrupted()) {
                    Ok(Entry::Enter(vmpl)) => Outcome::Enter(vmpl),
                    Ok(Entry::Status(status)) => {
                        gprs[RAX] = status;
                        Outcome::Complete
                    }
                    Err(stop) => stop.into(),
                };
            }
            _ => {}
        }
        match self.module_call(vcpu, leaf, version != 0, gprs) {
            Ok(status) => {
                gprs[RAX] = status;
                Outcome::Complete
            }
            Err(stop) => stop.into(),
        }
    }

    /// The leaves that the module serves alone.
    fn module_call(
        &mut self,
        vcpu: VcpuId,
        leaf: Leaf,
        version_1: bool,
        gprs: &mut Gprs,
    ) -> Result<u64, Stop> {
        match leaf {
            Leaf::VP_INFO => Ok(self.vp_info(vcpu, gprs)),
            Leaf::MR_RTMR_EXTEND => self.rtmr_extend(gprs),
            Leaf::VP_VEINFO_GET => Ok(self.veinfo_get(vcpu, gprs)),
            Leaf::MR_REPORT => self.mr_report(gprs),
            Leaf::VP_CPUIDVE_SET => Ok(self.cpuidve_set(vcpu, gprs)),
            Leaf::MEM_PAGE_ACCEPT => self.page_accept(gprs),
            Leaf::VM_RD => Ok(self.vm_rd(gprs, version_1)),
            Leaf::VM_WR => Ok(self.vm_wr(gprs)),
            Leaf::VP_RD => Ok(self.vp_rd(vcpu, gprs)),
            Leaf::VP_WR => Ok(self.vp_wr(vcpu, gprs)),
            Leaf::SYS_RD => Ok(sys_rd(gprs)),
            Leaf::MEM_PAGE_ATTR_RD => self.page_attr_rd(gprs),
            Leaf::MEM_PAGE_ATTR_WR => self.page_attr_wr(vcpu, gprs),
            Leaf::VP_INVEPT => Ok(self.invept(vcpu, gprs)),
            Leaf::VP_INVGLA => self.invgla(gprs),
            _ => Ok(Operand::RAX.invalid()),
        }
    }

    /// TDG.VP.VMCALL (§4): the host sees and changes the registers that RCX names, no others.
    fn vp_vmcall(&mut self, vcpu: VcpuId, gprs: &mut Gprs, cpu: &mut dyn Cpu) -> Outcome {
        let passed = gprs[RCX];
        if passed & !vmcall::PASSABLE != 0 {
            gprs[RAX] = Operand::RCX.invalid();
            return Outcome::Complete;
        }
        let is_passed = |number: usize| passed >> number & 1 != 0;
        let mut seen = [0; COUNT];
        for (number, value) in seen.iter_mut().enumerate().filter(|&(n, _)| is_passed(n)) {
            *value = gprs[number];
        }
        let answer = self.serve_vmcall(vcpu, &mut seen, cpu);
        for (number, value) in gprs.iter_mut().enumerate().filter(|&(n, _)| is_passed(n)) {
            *value = seen[number];
        }
        gprs[RAX] = Status::SUCCESS.with(0);
        match answer {
            Ok(Answer::Resume) => Outcome::Complete,
            Ok(Answer::Halt { blocked }) => Outcome::Halt { blocked },
            Err(stop) => stop.into(),
        }
    }

    /// TDG.VP.VMCALL of the L2 VM that runs on `vcpu`, straight to the host; `None` if it is L1's.
    pub fn l2_vmcall(
        &mut self,
        vcpu: VcpuId,
        gprs: &mut Gprs,
        cpu: &mut dyn Cpu,
    ) -> Option<Outcome> {
        self.serve(vcpu);
        let running = self.running_l2(vcpu)?;
        let leaf = Leaf(gprs[RAX] as u16);
        self.counters
            .count_tdcall(vmpl_of(running.vm), what(leaf, gprs[R11]));
        let straight = running.ctls.contains(L2Controls::ENABLE_TDVMCALL);
        let is_vmcall = gprs[RAX] == u64::from(Leaf::VP_VMCALL.0);
        (straight && is_vmcall).then(|| self.vp_vmcall(vcpu, gprs, cpu))
    }

    /// TDG.VP.INFO.
    fn vp_info(&self, vcpu: VcpuId, gprs: &mut Gprs) -> u64 {
        let vcpus = u64::from(self.vcpu_count());
        gprs[RCX] = u64::from(GPA_WIDTH);
        gprs[RDX] = self.td().map_or(0, |td| td.attributes.bits());
        gprs[R8] = vcpus << 32 | vcpus;
        gprs[R9] = u64::from(vcpu.0);
        // TDG.SYS.RD is there.
        gprs[R10] = 1;
        gprs[R11] = 0;
        Status::SUCCESS.with(0)
    }
}

/// TDG.SYS.RD: the only field is TDX_FEATURES0.
fn sys_rd(gprs: &mut Gprs) -> u64 {
    let field = FieldId(gprs[RDX]);
    gprs[R8] = 0;
    if field.is_single() && field.is(FieldId::TDX_FEATURES0) {
        gprs[R8] = Features0::TD_PARTITIONING.bits();
        gprs[RDX] = FieldId::NONE.0;
        Status::SUCCESS.with(0)
    } else {
        gprs[RDX] = FieldId::NONE.0;
        Status::METADATA_FIELD_ID_INCORRECT.with(0)
    }
}

/// What is counted. Leaves and sub-functions that nobody knows are one each, or a guest could fill
/// the machine's memory with them.
fn what(leaf: Leaf, r11: u64) -> Tdcall {
    const UNKNOWN_LEAF: Leaf = Leaf(u16::MAX);
    const UNKNOWN_FUNCTION: SubFunction = SubFunction(u64::MAX);
    if leaf == Leaf::VP_VMCALL {
        let function = SubFunction(r11);
        Tdcall::Host(if function.is_known() {
            function
        } else {
            UNKNOWN_FUNCTION
        })
    } else {
        Tdcall::Module(if leaf.is_known() { leaf } else { UNKNOWN_LEAF })
    }
}
