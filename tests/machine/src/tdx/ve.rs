//! #VE: which events raise it, and what it tells (§5).

use alloc::format;
use alloc::string::String;

use protocols::tdx::ve::{EptViolation, ExitReason, VeInfo};

use super::SHARED;
use crate::cpuid::{self, Context, Table};
use crate::memory::PhysicalMemory;
use crate::platform::Platform;
use crate::types::{Alias, Gpa, Kind, VcpuId, Vmpl};

/// How an event reaches L1.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Delivery {
    /// #VE.
    Ve,
    /// #DF: the information of the #VE before was not asked for.
    DoubleFault,
    /// The host gets it instead, and does not go on.
    Host(String),
}

/// What a trust domain may do with a model-specific register.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MsrClass {
    /// Use it without an exit.
    Native,
    /// Ask the host for it: #VE.
    Host,
    /// Read this of the module; what may be written has no effect.
    Fixed(u64),
    /// Nothing: #GP(0).
    None,
}

/// IA32_MISC_ENABLE of a trust domain: fast strings, no branch trace store, no PEBS, MONITOR. Linux
/// reads it before it can handle #VE.
const MISC_ENABLE: u64 = 1 | 1 << 11 | 1 << 12 | 1 << 18;
/// IA32_XAPIC_DISABLE_STATUS: the APIC has its x2APIC form only.
const XAPIC_DISABLED: u64 = 1;

/// The class of a register. `write` is looked at where it matters.
pub const fn msr_class(number: u32, write: bool) -> MsrClass {
    match number {
        // SPEC_CTRL, PRED_CMD, FLUSH_CMD, SYSENTER_CS, ESP and EIP, PAT, DS_AREA, XSS.
        0x48 | 0x49 | 0x10B | 0x174..=0x176 | 0x277 | 0x600 | 0xDA0 => MsrClass::Native,
        // TSC.
        0x10 if !write => MsrClass::Native,
        0x1A0 if !write => MsrClass::Fixed(MISC_ENABLE),
        0xBD if !write => MsrClass::Fixed(XAPIC_DISABLED),
        // DEBUGCTL: this processor has nothing to switch on. PERF_CAPABILITIES: none.
        0x1D9 => MsrClass::Fixed(0),
        0x345 if !write => MsrClass::Fixed(0),
        // x2APIC: TPR, PPR, EOI, ISR, TMR, IRR, SELF_IPI.
        0x808 | 0x80A | 0x80B | 0x810..=0x827 | 0x83F => MsrClass::Native,
        // EFER, STAR, LSTAR, FMASK, the bases of FS and GS, TSC_AUX.
        0xC000_0080..=0xC000_0082 | 0xC000_0084 | 0xC000_0100..=0xC000_0103 => MsrClass::Native,
        // SGXLEPUBKEYHASH, WBINVDP to SMM_MONITOR_CTL, SMBASE, BNDCFGS, PASID.
        0x8C..=0x8F | 0x98..=0x9B | 0x9E | 0xD90 | 0xD93 => MsrClass::None,
        // Performance monitoring, which this trust domain lacks.
        0xC1..=0xC8
        | 0x186..=0x18D
        | 0x1A6
        | 0x1A7
        | 0x309..=0x310
        | 0x329
        | 0x345
        | 0x38D..=0x392
        | 0x3F1
        | 0x3F2
        | 0x3F6
        | 0x3F7
        | 0x4C1..=0x4C8 => MsrClass::None,
        // UMWAIT_CONTROL, TSX_CTRL, XFD, TSC_DEADLINE, PKRS and the parts of extended state: features
        // that CPUID does not show.
        0xE1
        | 0x122
        | 0x1C4
        | 0x1C5
        | 0x560..=0x587
        | 0x6A0..=0x6A8
        | 0x6E0
        | 0x6E1
        | 0x985..=0x98A
        | 0x1200..=0x12FF
        | 0x14CE
        | 0x14CF
        | 0x1500..=0x16FF => MsrClass::None,
        // Reserved indices of x2APIC.
        0x800 | 0x801 | 0x804..=0x807 | 0x829..=0x82E | 0x831 | 0x840..=0x8FF => MsrClass::None,
        _ => MsrClass::Host,
    }
}

/// CPUID leaves that are the host's to answer, whatever the processor knows: caches and brand (2, 6,
/// 9, 0xC, 0x16, 0x17, 0x8000_0002 to 5), resources (0xF, 0x10, 0x1B), topology (0xB, 0x1F), and the
/// hypervisor's own range.
const fn is_hosts_leaf(leaf: u32) -> bool {
    matches!(
        leaf,
        0x2 | 0x6
            | 0x9
            | 0xB
            | 0xC
            | 0xF
            | 0x10
            | 0x16
            | 0x17
            | 0x1B
            | 0x1F
            | 0x4000_0000..=0x4FFF_FFFF
            | 0x8000_0002..=0x8000_0005
    )
}

/// The answer of the module to CPUID; `None` is #VE. Beyond the maximum of its range a leaf is taken
/// for the highest basic one.
fn module_answer(table: &Table, leaf: u32, subleaf: u32, context: &Context) -> Option<cpuid::Leaf> {
    if is_hosts_leaf(leaf) {
        return None;
    }
    let highest = |base| table.lookup(base, 0, context).eax;
    let basic = highest(0);
    let beyond = match leaf {
        0x8000_0000.. => leaf > highest(0x8000_0000),
        _ => leaf > basic,
    };
    let leaf = if beyond { basic } else { leaf };
    table
        .has(leaf, subleaf)
        .then(|| table.lookup(leaf, subleaf, context))
}

/// Why an access faulted, as the exit qualification has it.
fn qualification(kind: Kind, gla: Option<u64>) -> u64 {
    let access = match kind {
        Kind::Read => EptViolation::READ | EptViolation::FINAL,
        Kind::Write => EptViolation::WRITE | EptViolation::FINAL,
        Kind::Execute => EptViolation::FETCH | EptViolation::FINAL,
        Kind::Walk => EptViolation::READ,
    };
    let told = if gla.is_some() {
        EptViolation::LINEAR_ADDRESS
    } else {
        // Without a linear address there is nothing to be on the way to.
        EptViolation::empty()
    };
    (access | told).bits()
}

/// The information of an EPT violation. `gla` is unknown for an operand of TDCALL.
pub fn ept_violation(gpa: Gpa, alias: Alias, kind: Kind, gla: Option<u64>) -> VeInfo {
    let shared = match alias {
        Alias::Shared => SHARED,
        Alias::Private => 0,
    };
    VeInfo {
        reason: ExitReason::EPT_VIOLATION,
        qualification: qualification(kind, gla),
        gla: gla.unwrap_or(0),
        gpa: gpa.get() | shared,
        instruction_length: 0,
        instruction_info: 0,
    }
}

/// The information of an instruction.
pub const fn instruction(reason: ExitReason, qualification: u64, length: u32) -> VeInfo {
    VeInfo {
        reason,
        qualification,
        gla: 0,
        gpa: 0,
        instruction_length: length,
        instruction_info: 0,
    }
}

impl<P: PhysicalMemory> Platform<P> {
    /// Raises #VE on `vcpu`: keeps the information for TDG.VP.VEINFO.GET.
    pub fn raise_ve(&mut self, vcpu: VcpuId, info: VeInfo) -> Delivery {
        self.serve(vcpu);
        let Some(vp) = self.td_mut().and_then(|td| td.vp(vcpu)) else {
            return Delivery::Host(String::from("#VE outside a trust domain"));
        };
        if vp.ve.is_some() {
            return Delivery::DoubleFault;
        }
        vp.ve = Some(info);
        self.counters.vmpl(Vmpl::VMPL0).ve_injected += 1;
        Delivery::Ve
    }

    /// L1 used a page that it has not accepted.
    pub fn pending_access(&mut self, vcpu: VcpuId, info: VeInfo) -> Delivery {
        self.serve(vcpu);
        if self.td().is_some_and(|td| td.pending_goes_to_host()) {
            self.counters.count_td_exit(Vmpl::VMPL0, "access");
            // KVM gives up the VM.
            return Delivery::Host(format!(
                "the trust domain used {:#x}, which it has not accepted",
                info.gpa
            ));
        }
        self.raise_ve(vcpu, info)
    }

    /// Whether an NMI has to wait: until the information of a #VE is asked for.
    pub fn holds_nmi(&self, vcpu: VcpuId) -> bool {
        self.td()
            .and_then(|td| td.vps.get(vcpu.index()))
            .is_some_and(|vp| vp.ve.is_some())
    }

    /// CPUID of L1; `None` is #VE.
    pub fn td_cpuid(
        &self,
        vcpu: VcpuId,
        cpl: u8,
        table: &Table,
        (leaf, subleaf): (u32, u32),
        context: &Context,
    ) -> Option<cpuid::Leaf> {
        let asked_for_ve = self
            .td()
            .and_then(|td| td.vps.get(vcpu.index()))
            .is_none_or(|vp| vp.cpuid_ve[usize::from(cpl != 0)]);
        if asked_for_ve {
            return None;
        }
        module_answer(table, leaf, subleaf, context)
    }
}
