//! #VE: what raises it, what it tells, and which registers do not.

use guest::harness::{Case, Finding, Verdict, case, expect};
use guest::insn;
use guest::memory::{self, private, shared};
use guest::tdcall::{call, host_rdmsr, host_wrmsr, ve_info, vm_rd, vm_wr};
use guest::trap::{self, Trap};
use protocols::addr::{Gpa, PAGE_SIZE};
use protocols::tdx::metadata::{FieldId, TdControls};
use protocols::tdx::ve::{EptViolation, ExitReason};
use protocols::tdx::vmcall::register::{RAX, RCX};
use protocols::tdx::{Leaf, Operand, Status};

use crate::launch::cpuid;

pub const CASES: &[Case] = &[
    case("ve_info_without_ve", "tdx.md §1 leaf 3", no_info),
    case(
        "cpuid_of_the_hypervisor",
        "tdx.md §5 CPUID unlisted",
        cpuid_hypervisor,
    ),
    case(
        "cpuid_faulting_leaves",
        "tdx.md §5 CPUID faulting",
        cpuid_faulting,
    ),
    case("cpuidve_set", "tdx.md §1 leaf 5", cpuidve),
    case("cpuidve_reserved", "tdx.md §1 leaf 5", cpuidve_reserved),
    case("hlt", "tdx.md §5 HLT", hlt),
    case("out", "tdx.md §5 IO", out),
    case("in_with_immediate_port", "tdx.md §5 IO", input),
    case("rdmsr_of_the_host", "tdx.md §5 MSRs #VE", rdmsr),
    case("wrmsr_of_the_host", "tdx.md §5 MSRs #VE", wrmsr),
    case("msr_native", "tdx.md §5 MSRs native", msr_native),
    case("msr_tsc", "tdx.md §5 TSC read, TSC write", msr_tsc),
    case(
        "msr_of_the_module",
        "MSRs that the module emulates",
        msr_module,
    ),
    case("msr_of_nobody", "tdx.md §5 MSRs #GP", msr_none),
    case("efer_has_no_svme", "tdx.md §5 EFER", efer),
    case("wbinvd", "tdx.md §5 WBINVD", wbinvd),
    case("invd", "tdx.md §5 INVD", invd),
    case("monitor", "tdx.md §5 MONITOR", monitor),
    case("mwait", "tdx.md §5 MWAIT", mwait),
    case("vmcall", "tdx.md §5 VMCALL", vmcall),
    case(
        "pending_read",
        "tdx.md §5 EPT violation on PENDING",
        pending_read,
    ),
    case(
        "pending_write",
        "tdx.md §5 EPT violation on PENDING",
        pending_write,
    ),
    case(
        "pending_fetch",
        "tdx.md §5 EPT violation on PENDING",
        pending_fetch,
    ),
    case(
        "pending_operand",
        "tdx.md §1: operands are accesses",
        pending_operand,
    ),
    case(
        "device_in_shared_memory",
        "tdx.md §5 shared EPT entries",
        device,
    ),
    case("second_ve_is_df", "tdx.md §5 VALID", second_ve),
    case("ve_info_is_read_once", "tdx.md §5 VALID", once),
    case("nmi_waits_for_ve_info", "tdx.md §5 NMI", nmi_waits),
    case(
        "pending_ve_disable",
        "tdx.md §3 TD_CTLS.PENDING_VE_DISABLE",
        ve_disable,
    ),
];

/// x2APIC identifier.
const APIC_ID: u32 = 0x802;
/// Page attribute table.
const PAT: u32 = 0x277;
/// Time stamp counter.
const TSC: u32 = 0x10;
const EFER: u32 = 0xC000_0080;
/// q35's high precision event timer.
const HPET: Gpa = Gpa::new(0xFED0_0000);

/// The information of the #VE before; it must be there.
pub fn take_info() -> Result<[u64; 5], Finding> {
    let (rax, info) = ve_info()?;
    expect("RAX of VEINFO.GET", rax, 0)?;
    Ok(info)
}

/// `what` raised #VE, for this reason.
fn expect_ve<T: PartialEq + core::fmt::Debug>(
    what: Result<T, Trap>,
    reason: ExitReason,
    qualification: u64,
    length: u64,
) -> Verdict {
    expect("exception", what.map(|_| ()), Err(Trap::VE))?;
    let wanted = [u64::from(reason.0), qualification, 0, 0, length];
    expect("information", take_info()?, wanted)
}

fn no_info() -> Verdict {
    expect("RAX", ve_info()?.0, Status::NO_VALID_VE_INFO.with(0))
}

fn cpuid_hypervisor() -> Verdict {
    expect_ve(insn::cpuid(0x4000_0000, 0), ExitReason::CPUID, 0, 2)?;
    expect_ve(insn::cpuid(0x4FFF_FFFF, 0), ExitReason::CPUID, 0, 2)
}

fn cpuid_faulting() -> Verdict {
    [2, 6, 0xB, 0x16, 0x1F, 0x8000_0002]
        .into_iter()
        .try_for_each(|leaf| expect_ve(insn::cpuid(leaf, 0), ExitReason::CPUID, 0, 2))
}

fn set_cpuidve(control: u64) -> Result<u64, Finding> {
    Ok(call(Leaf::VP_CPUIDVE_SET, &[(RCX, control)])?[RAX])
}

fn cpuidve() -> Verdict {
    expect("RAX", set_cpuidve(1)?, 0)?;
    let verdict = expect_ve(insn::cpuid(1, 0), ExitReason::CPUID, 0, 2);
    expect("RAX", set_cpuidve(0)?, 0)?;
    verdict?;
    cpuid(1).map(|_| ())
}

fn cpuidve_reserved() -> Verdict {
    expect("RAX", set_cpuidve(5)?, Operand::RCX.invalid())?;
    cpuid(1).map(|_| ())
}

fn hlt() -> Verdict {
    expect_ve(insn::halt_once(), ExitReason::HLT, 0, 1)
}

fn out() -> Verdict {
    expect_ve(insn::out8(0x80, 1), ExitReason::IO, 0x80_0000, 1)?;
    expect_ve(insn::out32(0xCF8, 1), ExitReason::IO, 0xCF8_0000 | 3, 1)
}

fn input() -> Verdict {
    // One byte, in, port in the instruction.
    expect_ve(
        insn::in8_cmos(),
        ExitReason::IO,
        0x71_0000 | 1 << 3 | 1 << 6,
        2,
    )
}

fn rdmsr() -> Verdict {
    expect_ve(insn::rdmsr(APIC_ID), ExitReason::RDMSR, 0, 2)
}

fn wrmsr() -> Verdict {
    expect_ve(insn::wrmsr(0x832, 0), ExitReason::WRMSR, 0, 2)
}

fn msr_native() -> Verdict {
    expect("PAT", insn::rdmsr(PAT), Ok(0x0007_0406_0007_0406))?;
    const KERNEL_GS_BASE: u32 = 0xC000_0102;
    expect("WRMSR", insn::wrmsr(KERNEL_GS_BASE, 0x1234), Ok(()))?;
    expect("RDMSR", insn::rdmsr(KERNEL_GS_BASE), Ok(0x1234))
}

fn msr_tsc() -> Verdict {
    expect("reading is native", insn::rdmsr(TSC).is_ok(), true)?;
    expect_ve(insn::wrmsr(TSC, 0), ExitReason::WRMSR, 0, 2)
}

/// Linux reads MISC_ENABLE before it has a handler for #VE.
fn msr_module() -> Verdict {
    const MISC_ENABLE: u32 = 0x1A0;
    const DEBUGCTL: u32 = 0x1D9;
    let misc = insn::rdmsr(MISC_ENABLE);
    expect(
        "XD_DISABLE, PMU, PEBS",
        misc.map(|value| value & (1 << 34 | 1 << 7 | 1 << 12)),
        Ok(1 << 12),
    )?;
    expect_ve(insn::wrmsr(MISC_ENABLE, 1), ExitReason::WRMSR, 0, 2)?;
    expect("XAPIC_DISABLE_STATUS", insn::rdmsr(0xBD), Ok(1))?;
    expect("PERF_CAPABILITIES", insn::rdmsr(0x345), Ok(0))?;
    expect("DEBUGCTL", insn::wrmsr(DEBUGCTL, 0), Ok(()))?;
    expect("DEBUGCTL", insn::rdmsr(DEBUGCTL), Ok(0))
}

fn msr_none() -> Verdict {
    // SGXLEPUBKEYHASH, SMM_MONITOR_CTL, SMBASE, PASID; what x2APIC leaves out.
    const OF_NO_TRUST_DOMAIN: [u32; 17] = [
        0x8C, 0x8D, 0x8E, 0x8F, 0x9B, 0x9E, 0xD93, 0x800, 0x801, 0x804, 0x807, 0x829, 0x82E, 0x831,
        0x840, 0x880, 0x8FF,
    ];
    // Registers of features that CPUID does not show: performance monitoring, UMWAIT, TSX_CTRL, XFD,
    // processor trace, shadow stacks, TSC_DEADLINE, PKRS, user interrupts, architectural LBRs.
    const WITHOUT_FEATURE: [u32; 17] = [
        0xC1, 0x186, 0x1A6, 0x309, 0x38F, 0x3F1, 0x4C1, 0xE1, 0x122, 0x1C4, 0x560, 0x6A0, 0x6E0,
        0x6E1, 0x985, 0x1200, 0x14CE,
    ];
    let all = OF_NO_TRUST_DOMAIN.into_iter().chain(WITHOUT_FEATURE);
    all.chain([0x16FF]).try_for_each(|number| {
        expect("RDMSR", insn::rdmsr(number), Err(Trap::GP))?;
        expect("WRMSR", insn::wrmsr(number, 0), Err(Trap::GP))
    })?;
    expect("PERF_CAPABILITIES", insn::wrmsr(0x345, 0), Err(Trap::GP))
}

fn efer() -> Verdict {
    // Long mode is active now.
    expect("EFER", insn::rdmsr(EFER), Ok(0xD01))?;
    expect("SVME", insn::wrmsr(EFER, 0x1D01), Err(Trap::GP))?;
    expect("EFER", insn::wrmsr(EFER, 0xD01), Ok(()))
}

fn wbinvd() -> Verdict {
    expect_ve(insn::wbinvd(), ExitReason::WBINVD, 0, 2)
}

fn invd() -> Verdict {
    expect_ve(insn::invd(), ExitReason::INVD, 0, 2)
}

fn monitor() -> Verdict {
    expect_ve(insn::monitor(), ExitReason::MONITOR, 0, 3)
}

fn mwait() -> Verdict {
    expect_ve(insn::mwait(), ExitReason::MWAIT, 0, 3)
}

fn vmcall() -> Verdict {
    expect_ve(insn::vmcall(), ExitReason::VMCALL, 0, 3)
}

/// The information of an EPT violation, without the instruction's.
fn expect_violation(qualification: EptViolation, gla: u64, gpa: u64) -> Verdict {
    let reason = u64::from(ExitReason::EPT_VIOLATION.0);
    let wanted = [reason, qualification.bits(), gla, gpa, 0];
    expect("information", take_info()?, wanted)
}

const TOLD: EptViolation = EptViolation::LINEAR_ADDRESS.union(EptViolation::FINAL);

fn pending_read() -> Verdict {
    let at = memory::fresh_page().get() + 0x128;
    expect("read", insn::load(at), Err(Trap::VE))?;
    expect_violation(TOLD | EptViolation::READ, at, at)
}

fn pending_write() -> Verdict {
    let at = memory::fresh_page().get() + 0xFF8;
    expect("write", insn::store(at, 1), Err(Trap::VE))?;
    expect_violation(TOLD | EptViolation::WRITE, at, at)
}

#[expect(unsafe_code, reason = "a call that must fault")]
fn pending_fetch() -> Verdict {
    let at = memory::fresh_page().get();
    // SAFETY: the page is not accepted, so nothing is fetched from it.
    let result = unsafe { insn::call(at) };
    expect("fetch", result, Err(Trap::VE))?;
    expect_violation(TOLD | EptViolation::FETCH, at, at)
}

fn pending_operand() -> Verdict {
    let page = memory::fresh_page();
    let all =
        guest::tdcall::registers(&[(RAX, u64::from(Leaf::MR_RTMR_EXTEND.0)), (RCX, page.get())]);
    expect(
        "TDCALL",
        guest::tdcall::tdcall(all).map(|_| ()),
        Err(Trap::VE),
    )?;
    let [reason, _, _, gpa, _] = take_info()?;
    let wanted = (u64::from(ExitReason::EPT_VIOLATION.0), page.get());
    expect("reason, address", (reason, gpa), wanted)
}

fn device() -> Verdict {
    let at = shared(HPET);
    expect("read", insn::load(at), Err(Trap::VE))?;
    let gpa = HPET.get() | 1 << 47;
    expect_violation(TOLD | EptViolation::READ, at, gpa)
}

fn second_ve() -> Verdict {
    expect("first", insn::halt_once(), Err(Trap::VE))?;
    expect("second", insn::halt_once(), Err(Trap::DF))?;
    // The first one's information is still there.
    let [reason, ..] = take_info()?;
    expect("reason", reason, u64::from(ExitReason::HLT.0))
}

fn once() -> Verdict {
    expect("exception", insn::halt_once(), Err(Trap::VE))?;
    take_info()?;
    expect("RAX", ve_info()?.0, Status::NO_VALID_VE_INFO.with(0))
}

/// While the information of a #VE waits, an NMI could come between it and the question, and raise another.
fn nmi_waits() -> Verdict {
    const ICR: u64 = 0x830;
    const NMI: u64 = 4 << 8;
    let send = || {
        let (_, id) = host_rdmsr(APIC_ID.into())?;
        expect("ICR", host_wrmsr(ICR, id << 32 | NMI)?, 0)
    };
    trap::expect_nmis(true);
    let verdict = send().and_then(|()| {
        expect("at other times", trap::expect_nmis(true), 1)?;
        expect("exception", insn::halt_once(), Err(Trap::VE))?;
        let sent = send();
        // Each of these is a trip to the host and back.
        let trips = (0..10).try_for_each(|_| host_rdmsr(APIC_ID.into()).map(|_| ()));
        let early = trap::expect_nmis(true);
        take_info()?;
        let late = trap::expect_nmis(true);
        sent.and(trips)?;
        expect("before and after the question", (early, late), (0, 1))
    });
    trap::expect_nmis(false);
    verdict
}

fn ve_disable() -> Verdict {
    let bit = TdControls::PENDING_VE_DISABLE.bits();
    expect("TD_CTLS", vm_rd(FieldId::TD_CTLS.0)?, (0, 0))?;
    expect("switched on", vm_wr(FieldId::TD_CTLS.0, bit, bit)?, (0, 0))?;
    let read_back = vm_rd(FieldId::TD_CTLS.0)?;
    expect("switched off", vm_wr(FieldId::TD_CTLS.0, 0, bit)?, (0, bit))?;
    expect("TD_CTLS", read_back, (0, bit))?;
    // It is off again: an access raises #VE and does not end the run.
    let page = memory::fresh_page();
    expect(
        "read",
        insn::load(private(page) + PAGE_SIZE - 8),
        Err(Trap::VE),
    )?;
    take_info().map(|_| ())
}
