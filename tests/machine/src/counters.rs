//! What the machine counts while it runs, kept cheap until the report asks for it.
//!
//! Counters with few, known kinds are fields of the report's own types; exits and VMGEXITs
//! are counted by number here and get their names when the report is made. Everything is counted
//! for the vCPU that is served ([`Counters::serve`]) and summed up in the report.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};

use alloc::vec::Vec;

use protocols::report::{
    AcceptCounters, AcceptResults, CallCounters, PvalidateCounters, PvalidateResults,
    RmpadjustCounters, RmpadjustResults, VcpuCounters, Violations, VmplCounters,
};

use protocols::tdx::Leaf;
use protocols::tdx::vmcall::SubFunction;

use crate::calls::{self, Calls};
use crate::samples::Samples;
use crate::types::{PageSize, VcpuId, Vmpl};

/// A VMGEXIT by what was asked.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Vmgexit {
    /// MSR protocol; bits 11:0 of the request.
    Msr(u16),
    /// Page protocol; the exit code.
    Nae(u64),
}

/// A TDCALL by what was asked.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Tdcall {
    /// A leaf of the module.
    Module(Leaf),
    /// A request to the host: sub-function of TDG.VP.VMCALL.
    Host(SubFunction),
}

/// Exit codes below this are counted in a table, the others in a map: an exit is counted before
/// anything else is done about it.
const FREQUENT: usize = 0x90;

struct Level {
    fixed: VmplCounters,
    frequent_exits: [u64; FREQUENT],
    exits: BTreeMap<u64, u64>,
    vmgexits: BTreeMap<Vmgexit, u64>,
    tdcalls: BTreeMap<Tdcall, u64>,
    td_exits: BTreeMap<&'static str, u64>,
}

impl Default for Level {
    fn default() -> Self {
        Self {
            fixed: VmplCounters::default(),
            frequent_exits: [0; FREQUENT],
            exits: BTreeMap::new(),
            vmgexits: BTreeMap::new(),
            tdcalls: BTreeMap::new(),
            td_exits: BTreeMap::new(),
        }
    }
}

/// Starts of a lower level that came while VMPL0 ran, on one vCPU; of a trust domain's, interrupts that
/// another one sent it.
#[derive(Clone, Copy, Default)]
struct Starts {
    /// Pages VMPL0 or L1 had validated when the request came that waits now.
    since: Option<u64>,
    awaited: u64,
    most_pages: u64,
}

/// All counters of a run.
pub struct Counters {
    vcpus: Vec<[Level; Vmpl::COUNT]>,
    /// Of each vCPU, how long levels that were to be started waited for VMPL0.
    starts: Vec<Starts>,
    /// Index of the vCPU that is served.
    served: usize,
    /// SVSM calls.
    pub calls: Calls,
    /// Accepted memory over time.
    pub samples: Samples,
    /// Findings; all 0 in a good run.
    pub violations: Violations,
    /// Bytes VMPL0 has validated after the launch, minus those it has rescinded.
    pub validated_bytes: u64,
}

impl Counters {
    /// Counters of `vcpus` processors, at least one, of which the first is served.
    pub fn new(vcpus: u32) -> Self {
        Self {
            vcpus: (0..vcpus.max(1)).map(|_| Default::default()).collect(),
            starts: (0..vcpus.max(1)).map(|_| Starts::default()).collect(),
            served: 0,
            calls: Calls::new(vcpus),
            samples: Samples::default(),
            violations: Violations::default(),
            validated_bytes: 0,
        }
    }

    /// What is counted from now on is this vCPU's doing; a number there is no vCPU for is taken
    /// for the first.
    pub const fn serve(&mut self, vcpu: VcpuId) {
        self.served = if vcpu.index() < self.vcpus.len() {
            vcpu.index()
        } else {
            0
        };
    }

    fn served(&mut self) -> &mut [Level; Vmpl::COUNT] {
        &mut self.vcpus[self.served]
    }

    /// The counters of one level that have fixed kinds, of the vCPU that is served.
    pub fn vmpl(&mut self, vmpl: Vmpl) -> &mut VmplCounters {
        &mut self.served()[vmpl.index()].fixed
    }

    /// The same of all vCPUs together, to look at.
    pub fn level(&self, vmpl: Vmpl) -> VmplCounters {
        let mut sum = VmplCounters::default();
        for levels in &self.vcpus {
            add(&mut sum, &levels[vmpl.index()].fixed);
        }
        sum
    }

    /// Counts a #VMEXIT by its exit code (APM-B, Appendix C).
    pub fn count_exit(&mut self, vmpl: Vmpl, code: u64) {
        let level = &mut self.served()[vmpl.index()];
        match level.frequent_exits.get_mut(code as usize) {
            Some(count) => *count += 1,
            None => *level.exits.entry(code).or_default() += 1,
        }
    }

    /// Counts a VMGEXIT.
    pub fn count_vmgexit(&mut self, vmpl: Vmpl, what: Vmgexit) {
        let level = &mut self.served()[vmpl.index()];
        *level.vmgexits.entry(what).or_default() += 1;
    }

    /// Pages that VMPL0 of a vCPU has validated, or L1 accepted.
    fn validated_on(&self, index: usize) -> u64 {
        let Some(levels) = self.vcpus.get(index) else {
            return 0;
        };
        let VmplCounters {
            pvalidate, accept, ..
        } = &levels[Vmpl::VMPL0.index()].fixed;
        let small = pvalidate.validate_4k.ok + accept.size_4k.ok;
        let large = pvalidate.validate_2m.ok + accept.size_2m.ok;
        small + large * PageSize::Size2M.pages()
    }

    /// A lower level of the vCPU that is served is to be started, and VMPL0 runs there.
    pub fn start_is_awaited(&mut self) {
        self.entry_is_awaited_on(self.served);
    }

    /// A lower level of a vCPU is to go on, and VMPL0 or L1 may be running there.
    pub fn entry_is_awaited_on(&mut self, index: usize) {
        let now = self.validated_on(index);
        if let Some(starts) = self.starts.get_mut(index)
            && starts.since.is_none()
        {
            starts.since = Some(now);
            starts.awaited += 1;
        }
    }

    /// Starts on any vCPU that came while VMPL0 or L1 ran there.
    pub fn awaited_starts(&self) -> u64 {
        self.starts.iter().map(|starts| starts.awaited).sum()
    }

    /// A lower level of the vCPU that is served runs, or is not to be started any more.
    pub fn start_is_over(&mut self) {
        let now = self.validated_on(self.served);
        if let Some(starts) = self.starts.get_mut(self.served)
            && let Some(since) = starts.since.take()
        {
            starts.most_pages = starts.most_pages.max(now - since);
        }
    }

    /// Counts a TDCALL.
    pub fn count_tdcall(&mut self, vmpl: Vmpl, what: Tdcall) {
        let level = &mut self.served()[vmpl.index()];
        *level.tdcalls.entry(what).or_default() += 1;
    }

    /// How many TDCALLs of a kind a level has made.
    pub fn tdcalls(&self, vmpl: Vmpl, is_meant: impl Fn(&Tdcall) -> bool) -> u64 {
        self.vcpus
            .iter()
            .flat_map(|levels| &levels[vmpl.index()].tdcalls)
            .filter(|(call, _)| is_meant(call))
            .map(|(_, count)| count)
            .sum()
    }

    /// Counts an exit to the host of a trust domain, by what it was about.
    pub fn count_td_exit(&mut self, vmpl: Vmpl, about: &'static str) {
        let level = &mut self.served()[vmpl.index()];
        *level.td_exits.entry(about).or_default() += 1;
    }

    /// How often a trust domain's level exited to the host in the midst of an instruction.
    pub fn td_exits(&self, vmpl: Vmpl) -> u64 {
        let of =
            |levels: &[Level; Vmpl::COUNT]| levels[vmpl.index()].td_exits.values().sum::<u64>();
        self.vcpus.iter().map(of).sum()
    }

    /// What the report says of each vCPU.
    pub fn report(&self) -> Vec<VcpuCounters> {
        self.vcpus
            .iter()
            .zip(self.calls.report())
            .zip(&self.starts)
            .zip(0..)
            .map(|(((levels, calls), starts), id)| VcpuCounters {
                id,
                levels: levels.each_ref().map(Level::report),
                calls,
                awaited_starts: starts.awaited,
                pages_while_awaited: starts.most_pages,
            })
            .collect()
    }
}

/// The levels of all vCPUs together.
pub fn sum_of_levels(vcpus: &[VcpuCounters]) -> [VmplCounters; Vmpl::COUNT] {
    let mut sum: [VmplCounters; Vmpl::COUNT] = Default::default();
    for vcpu in vcpus {
        for (sum, level) in sum.iter_mut().zip(&vcpu.levels) {
            add(sum, level);
        }
    }
    sum
}

/// The calls of all vCPUs together.
pub fn sum_of_calls(vcpus: &[VcpuCounters]) -> Vec<CallCounters> {
    let mut sum = Vec::new();
    for vcpu in vcpus {
        calls::merge(&mut sum, &vcpu.calls);
    }
    sum
}

impl Level {
    fn report(&self) -> VmplCounters {
        let mut counters = self.fixed.clone();
        // Several codes share a name, so this adds up instead of collecting.
        let frequent = self
            .frequent_exits
            .iter()
            .zip(0u64..)
            .filter(|&(&n, _)| n != 0);
        for (&n, code) in frequent.chain(self.exits.iter().map(|(code, n)| (n, *code))) {
            *counters.exits.entry(exit_name(code)).or_default() += n;
        }
        counters.vmgexits = self
            .vmgexits
            .iter()
            .map(|(&what, &n)| (vmgexit_name(what), n))
            .collect();
        counters.tdcalls = self
            .tdcalls
            .iter()
            .map(|(&what, &n)| (tdcall_name(what), n))
            .collect();
        counters.td_exits = self
            .td_exits
            .iter()
            .map(|(&about, &n)| (about.to_string(), n))
            .collect();
        counters
    }
}

/// Adds every field; a new one does not compile until it is added here.
fn add(sum: &mut VmplCounters, more: &VmplCounters) {
    let VmplCounters {
        world_switches,
        instructions,
        vmgexits,
        exits,
        pvalidate,
        rmpadjust,
        rmpquery,
        npf,
        vc_injected,
        psc_private_pages,
        psc_shared_pages,
        implicit_conversions,
        accept,
        tdcalls,
        td_exits,
        ve_injected,
    } = more;
    for (sum, more) in [
        (&mut sum.world_switches, world_switches),
        (&mut sum.instructions, instructions),
        (&mut sum.rmpquery, rmpquery),
        (&mut sum.npf, npf),
        (&mut sum.vc_injected, vc_injected),
        (&mut sum.psc_private_pages, psc_private_pages),
        (&mut sum.psc_shared_pages, psc_shared_pages),
        (&mut sum.implicit_conversions, implicit_conversions),
        (&mut sum.ve_injected, ve_injected),
    ] {
        *sum += more;
    }
    for (sum, more) in [
        (&mut sum.vmgexits, vmgexits),
        (&mut sum.exits, exits),
        (&mut sum.tdcalls, tdcalls),
        (&mut sum.td_exits, td_exits),
    ] {
        for (name, count) in more {
            *sum.entry(name.clone()).or_default() += count;
        }
    }
    add_pvalidate(&mut sum.pvalidate, pvalidate);
    add_rmpadjust(&mut sum.rmpadjust, rmpadjust);
    add_accept(&mut sum.accept, accept);
}

fn add_accept(sum: &mut AcceptCounters, more: &AcceptCounters) {
    for (sum, more) in [
        (&mut sum.size_4k, more.size_4k),
        (&mut sum.size_2m, more.size_2m),
    ] {
        let AcceptResults {
            ok,
            already_accepted,
            size_mismatch,
            invalid,
            busy,
        } = more;
        sum.busy += busy;
        sum.ok += ok;
        sum.already_accepted += already_accepted;
        sum.size_mismatch += size_mismatch;
        sum.invalid += invalid;
    }
}

fn add_pvalidate(sum: &mut PvalidateCounters, more: &PvalidateCounters) {
    for (sum, more) in [
        (&mut sum.validate_4k, more.validate_4k),
        (&mut sum.validate_2m, more.validate_2m),
        (&mut sum.rescind_4k, more.rescind_4k),
        (&mut sum.rescind_2m, more.rescind_2m),
    ] {
        let PvalidateResults {
            ok,
            no_change,
            size_mismatch,
            fail_input,
        } = more;
        sum.ok += ok;
        sum.no_change += no_change;
        sum.size_mismatch += size_mismatch;
        sum.fail_input += fail_input;
    }
}

fn add_rmpadjust(sum: &mut RmpadjustCounters, more: &RmpadjustCounters) {
    for (sum, more) in [
        (&mut sum.size_4k, more.size_4k),
        (&mut sum.size_2m, more.size_2m),
    ] {
        let RmpadjustResults {
            ok,
            fail_input,
            fail_permission,
            fail_in_use,
            size_mismatch,
        } = more;
        sum.ok += ok;
        sum.fail_input += fail_input;
        sum.fail_permission += fail_permission;
        sum.fail_in_use += fail_in_use;
        sum.size_mismatch += size_mismatch;
    }
}

fn tdcall_name(what: Tdcall) -> String {
    match what {
        Tdcall::Module(leaf) => leaf
            .name()
            .map_or_else(|| String::from("unknown"), String::from),
        Tdcall::Host(function) => match function.name() {
            Some(name) => format!("VP_VMCALL/{name}"),
            None => String::from("VP_VMCALL/unknown"),
        },
    }
}

fn vmgexit_name(what: Vmgexit) -> String {
    match what {
        Vmgexit::Msr(code) => format!("msr:{code:#05x}"),
        Vmgexit::Nae(code) => format!("nae:{code:#x}"),
    }
}

/// Short names of the exits this machine takes (`tcg-svm.md` §5).
fn exit_name(code: u64) -> String {
    let name = match code & 0xFFFF_FFFF {
        0x00..=0x0F => "cr-read",
        0x10..=0x1F => "cr-write",
        0x20..=0x2F => "dr-read",
        0x30..=0x3F => "dr-write",
        0x46 => "ud",
        0x40..=0x5F => "exception",
        0x60 => "intr",
        0x61 => "nmi",
        0x63 => "init",
        0x64 => "vintr",
        0x66..=0x6D => "descriptor-table",
        0x6E => "rdtsc",
        0x6F => "rdpmc",
        0x72 => "cpuid",
        0x76 => "invd",
        0x78 => "hlt",
        0x7B => "io",
        0x7C => "msr",
        0x7F => "shutdown",
        0x81 => "vmmcall",
        0x80..=0x86 => "svm-instruction",
        0x89 => "wbinvd",
        0x8A => "monitor",
        0x8B => "mwait",
        0x8D => "xsetbv",
        0x400 => "npf",
        0x403 => "vmgexit",
        0xFFFF_FFFF => "invalid",
        _ => return format!("exit-{code:#x}"),
    };
    name.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_names_in_the_report() {
        let mut counters = Counters::new(1);
        counters.count_exit(Vmpl::VMPL1, 0x72);
        counters.count_exit(Vmpl::VMPL1, 0x72);
        counters.count_exit(Vmpl::VMPL1, 0x81);
        counters.count_exit(Vmpl::VMPL1, 0x999);
        counters.count_exit(Vmpl::VMPL1, 0x10);
        counters.count_exit(Vmpl::VMPL1, 0x14);
        counters.count_vmgexit(Vmpl::VMPL1, Vmgexit::Msr(0x14));
        counters.count_vmgexit(Vmpl::VMPL1, Vmgexit::Nae(0x8000_0010));
        let report = sum_of_levels(&counters.report());
        assert_eq!(report[1].exits["cpuid"], 2);
        assert_eq!(report[1].exits["vmmcall"], 1);
        assert_eq!(report[1].exits["cr-write"], 2);
        assert_eq!(report[1].exits["exit-0x999"], 1);
        assert_eq!(report[1].vmgexits["msr:0x014"], 1);
        assert_eq!(report[1].vmgexits["nae:0x80000010"], 1);
        assert!(report[0].exits.is_empty());
    }

    #[test]
    fn each_vcpu_has_its_own_and_the_sum_has_all() {
        let mut counters = Counters::new(2);
        for (vcpu, times) in [(0, 1), (1, 2), (7, 4)] {
            counters.serve(VcpuId(vcpu));
            for _ in 0..times {
                counters.count_exit(Vmpl::VMPL1, 0x72);
                counters.vmpl(Vmpl::VMPL1).npf += 1;
                counters.vmpl(Vmpl::VMPL0).pvalidate.validate_2m.ok += 1;
                counters.vmpl(Vmpl::VMPL0).rmpadjust.size_4k.ok += 1;
            }
        }
        let vcpus = counters.report();
        let exits = |id: usize| vcpus[id].levels[1].exits["cpuid"];
        assert_eq!((vcpus.len(), vcpus[1].id), (2, 1));
        assert_eq!((exits(0), exits(1)), (5, 2), "7 is nobody");
        let sum = sum_of_levels(&vcpus);
        assert_eq!((sum[1].exits["cpuid"], sum[1].npf), (7, 7));
        assert_eq!(sum[0].pvalidate.validate_2m.ok, 7);
        assert_eq!(sum[0].rmpadjust.size_4k.ok, 7);
        assert_eq!(counters.level(Vmpl::VMPL1).npf, 7);
    }
}
