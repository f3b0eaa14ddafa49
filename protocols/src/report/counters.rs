//! What the processors did: counters per level, and per processor.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use super::CallCounters;
use crate::addr::Vmpl;

/// What one virtual processor did and caused.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VcpuCounters {
    /// Its number, which is its APIC id.
    pub id: u32,
    /// Its VMPL 0 to 3.
    pub levels: [VmplCounters; Vmpl::COUNT],
    /// The calls it made.
    pub calls: Vec<CallCounters>,
    /// Requests to start a lower level here that came while VMPL0 ran.
    pub awaited_starts: u64,
    /// The most pages that VMPL0 validated here while such a request waited for it.
    pub pages_while_awaited: u64,
}

/// What one VMPL did and caused, on one processor or on all of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VmplCounters {
    /// How often the level was entered from another one.
    pub world_switches: u64,
    /// Instructions that the level executed; 0 unless they are counted, which takes a QEMU that
    /// counts them (`-icount shift=0`) and one processor.
    pub instructions: u64,
    /// VMGEXITs by request (`msr:0x014`, `nae:0x80000010`, …).
    pub vmgexits: BTreeMap<String, u64>,
    /// Intercepts by exit (`cpuid`, `io`, `npf`, …).
    pub exits: BTreeMap<String, u64>,
    /// PVALIDATE by size, action and result.
    pub pvalidate: PvalidateCounters,
    /// RMPADJUST by size and result.
    pub rmpadjust: RmpadjustCounters,
    /// RMPQUERY, any result.
    pub rmpquery: u64,
    /// Nested page faults.
    pub npf: u64,
    /// #VC exceptions delivered.
    pub vc_injected: u64,
    /// Pages made private by page state change requests.
    pub psc_private_pages: u64,
    /// Pages made shared by page state change requests.
    pub psc_shared_pages: u64,
    /// Pages the host converted because the level accessed them through the wrong alias.
    pub implicit_conversions: u64,
    /// TDG.MEM.PAGE.ACCEPT by size and result.
    pub accept: AcceptCounters,
    /// TDCALLs by leaf (`VP_INFO`, `VP_VMCALL/IO`, …).
    pub tdcalls: BTreeMap<String, u64>,
    /// Exits to the host in the midst of an instruction, by what it was about (`accept`,
    /// `attributes`, `operand`, `access`).
    pub td_exits: BTreeMap<String, u64>,
    /// #VE exceptions delivered.
    pub ve_injected: u64,
}

/// TDG.MEM.PAGE.ACCEPT by size. What asks for neither is counted as 4 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AcceptCounters {
    /// 4 KiB.
    pub size_4k: AcceptResults,
    /// 2 MiB.
    pub size_2m: AcceptResults,
}

/// TDG.MEM.PAGE.ACCEPT by result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AcceptResults {
    /// SUCCESS.
    pub ok: u64,
    /// PAGE_ALREADY_ACCEPTED.
    pub already_accepted: u64,
    /// PAGE_SIZE_MISMATCH.
    pub size_mismatch: u64,
    /// OPERAND_INVALID.
    pub invalid: u64,
    /// OPERAND_BUSY.
    #[serde(default)]
    pub busy: u64,
}

impl AcceptResults {
    /// How often the leaf was executed.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.ok + self.already_accepted + self.size_mismatch + self.invalid + self.busy
    }
}

/// PVALIDATE by size and action.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PvalidateCounters {
    /// 4 KiB, validate.
    pub validate_4k: PvalidateResults,
    /// 2 MiB, validate.
    pub validate_2m: PvalidateResults,
    /// 4 KiB, rescind.
    pub rescind_4k: PvalidateResults,
    /// 2 MiB, rescind.
    pub rescind_2m: PvalidateResults,
}

/// PVALIDATE by result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PvalidateResults {
    /// EAX = 0, CF = 0.
    pub ok: u64,
    /// EAX = 0, CF = 1: nothing changed.
    pub no_change: u64,
    /// EAX = 6.
    pub size_mismatch: u64,
    /// EAX = 1.
    pub fail_input: u64,
}

impl PvalidateResults {
    /// How often the instruction was executed.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.ok + self.no_change + self.size_mismatch + self.fail_input
    }
}

/// RMPADJUST by size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RmpadjustCounters {
    /// 4 KiB.
    pub size_4k: RmpadjustResults,
    /// 2 MiB.
    pub size_2m: RmpadjustResults,
}

/// RMPADJUST by result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RmpadjustResults {
    /// EAX = 0.
    pub ok: u64,
    /// EAX = 1.
    pub fail_input: u64,
    /// EAX = 2.
    pub fail_permission: u64,
    /// EAX = 3.
    pub fail_in_use: u64,
    /// EAX = 6.
    pub size_mismatch: u64,
}

impl RmpadjustResults {
    /// How often the instruction was executed.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.ok + self.fail_input + self.fail_permission + self.fail_in_use + self.size_mismatch
    }
}
