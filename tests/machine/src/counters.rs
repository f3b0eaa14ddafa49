//! What the machine counts while it runs, kept cheap until the report asks for it.
//!
//! Counters with few, known kinds are fields of the report's own types; exits and VMGEXITs
//! are counted by number here and get their names when the report is made.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};

use protocols::report::{Violations, VmplCounters};

use crate::types::Vmpl;

/// A VMGEXIT by what was asked.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Vmgexit {
    /// MSR protocol; bits 11:0 of the request.
    Msr(u16),
    /// Page protocol; the exit code.
    Nae(u64),
}

/// Exit codes below this are counted in a table, the others in a map: an exit is counted before
/// anything else is done about it.
const FREQUENT: usize = 0x90;

struct Level {
    fixed: VmplCounters,
    frequent_exits: [u64; FREQUENT],
    exits: BTreeMap<u64, u64>,
    vmgexits: BTreeMap<Vmgexit, u64>,
}

impl Default for Level {
    fn default() -> Self {
        Self {
            fixed: VmplCounters::default(),
            frequent_exits: [0; FREQUENT],
            exits: BTreeMap::new(),
            vmgexits: BTreeMap::new(),
        }
    }
}

/// All counters of a run.
#[derive(Default)]
pub struct Counters {
    levels: [Level; Vmpl::COUNT],
    /// Findings; all 0 in a good run.
    pub violations: Violations,
    /// Bytes VMPL0 has validated after the launch, minus those it has rescinded.
    pub validated_bytes: u64,
}

impl Counters {
    /// The counters of one level that have fixed kinds.
    pub const fn vmpl(&mut self, vmpl: Vmpl) -> &mut VmplCounters {
        &mut self.levels[vmpl.index()].fixed
    }

    /// The same, to look at.
    pub const fn level(&self, vmpl: Vmpl) -> &VmplCounters {
        &self.levels[vmpl.index()].fixed
    }

    /// Counts a #VMEXIT by its exit code (APM-B, Appendix C).
    pub fn count_exit(&mut self, vmpl: Vmpl, code: u64) {
        let level = &mut self.levels[vmpl.index()];
        match level.frequent_exits.get_mut(code as usize) {
            Some(count) => *count += 1,
            None => *level.exits.entry(code).or_default() += 1,
        }
    }

    /// Counts a VMGEXIT.
    pub fn count_vmgexit(&mut self, vmpl: Vmpl, what: Vmgexit) {
        *self.levels[vmpl.index()].vmgexits.entry(what).or_default() += 1;
    }

    /// All levels as the report has them.
    pub fn report(&self) -> [VmplCounters; Vmpl::COUNT] {
        self.levels.each_ref().map(|level| {
            let mut counters = level.fixed.clone();
            // Several codes share a name, so this adds up instead of collecting.
            let frequent = level
                .frequent_exits
                .iter()
                .zip(0u64..)
                .filter(|&(&n, _)| n != 0);
            for (&n, code) in frequent.chain(level.exits.iter().map(|(code, n)| (n, *code))) {
                *counters.exits.entry(exit_name(code)).or_default() += n;
            }
            counters.vmgexits = level
                .vmgexits
                .iter()
                .map(|(&what, &n)| (vmgexit_name(what), n))
                .collect();
            counters
        })
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
        let mut counters = Counters::default();
        counters.count_exit(Vmpl::VMPL1, 0x72);
        counters.count_exit(Vmpl::VMPL1, 0x72);
        counters.count_exit(Vmpl::VMPL1, 0x81);
        counters.count_exit(Vmpl::VMPL1, 0x999);
        counters.count_exit(Vmpl::VMPL1, 0x10);
        counters.count_exit(Vmpl::VMPL1, 0x14);
        counters.count_vmgexit(Vmpl::VMPL1, Vmgexit::Msr(0x14));
        counters.count_vmgexit(Vmpl::VMPL1, Vmgexit::Nae(0x8000_0010));
        let report = counters.report();
        assert_eq!(report[1].exits["cpuid"], 2);
        assert_eq!(report[1].exits["vmmcall"], 1);
        assert_eq!(report[1].exits["cr-write"], 2);
        assert_eq!(report[1].exits["exit-0x999"], 1);
        assert_eq!(report[1].vmgexits["msr:0x014"], 1);
        assert_eq!(report[1].vmgexits["nae:0x80000010"], 1);
        assert!(report[0].exits.is_empty());
    }
}
