//! SVSM calls as the host sees them: a lower VMPL asks to run VMPL0 with a call in the registers
//! of its VMSA, and is resumed later with a result there.
//!
//! A call goes through [`Calls::ask`] (the VMGEXIT), [`Calls::open`] (the caller's VMSA holds its
//! registers) and [`Calls::close`] (the caller is resumed). Everything read from the guest is a
//! claim that is counted, nothing is decided by it; what the guest can choose (kinds of calls,
//! length of lists) is bounded.
//!
//! Who may call: the platform, with its lock held.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use protocols::report::{CallCounters, EntryResults, Histogram, ListEntries};
use protocols::svsm::{
    CallId, CoreCall, LIST_ALIGNMENT, PvalidateAction, PvalidateEntry, PvalidateHeader, ResultCode,
    entries_that_fit,
};
use zerocopy::{FromBytes, IntoBytes};

use crate::layout::Layout;
use crate::memory::PhysicalMemory;
use crate::types::{Gpa, PageSize, VcpuId, Vmpl};

/// Kinds of calls of one vCPU that are told apart; a guest can put anything into RAX.
const MAX_KINDS: usize = 32;

/// Result codes of one kind that are told apart; the paravisor's answers are as free as a call.
const MAX_RESULTS: usize = 32;

/// The rest of both.
const OTHER: u32 = u32::MAX;

/// A call and who makes it. Ordered as the report is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Kind {
    vmpl: u8,
    protocol: u32,
    call: u32,
}

impl Kind {
    const fn other(self) -> Self {
        Self {
            vmpl: self.vmpl,
            protocol: OTHER,
            call: OTHER,
        }
    }

    const fn id(self) -> CallId {
        CallId::decode((self.protocol as u64) << 32 | self.call as u64)
    }

    fn name(self) -> String {
        let CallId { protocol, call } = self.id();
        if (self.protocol, self.call) == (OTHER, OTHER) {
            return String::from("OTHER");
        }
        let protocol_name = protocol
            .name()
            .map_or_else(|| protocol.0.to_string(), String::from);
        let call_name = (CallId::core(CoreCall(call)) == self.id())
            .then(|| CoreCall(call).name())
            .flatten();
        match call_name {
            Some(name) => format!("{protocol_name}/{name}"),
            None => format!("{protocol_name}/{call:#x}"),
        }
    }
}

/// A PVALIDATE list as it was when the call was made.
#[derive(Clone, Copy, Debug)]
struct List {
    gpa: Gpa,
    next: u16,
}

/// A call that is not answered yet.
#[derive(Clone, Copy, Debug)]
struct Open {
    kind: Kind,
    /// The caller's VMSA: another one is not resumed with this call's answer.
    vmsa: Gpa,
    list: Option<List>,
    since: u64,
}

/// What is counted of one kind.
#[derive(Default)]
struct Counted {
    results: BTreeMap<u32, u64>,
    unanswered: u64,
    entries: ListEntries,
    latency: Latency,
}

/// The calls of one vCPU.
#[derive(Default)]
struct Vcpu {
    /// Who asked for VMPL0, and when; the registers are not in the VMSA yet.
    asked: Option<(Vmpl, u64)>,
    open: Option<Open>,
    counted: BTreeMap<Kind, Counted>,
}

/// The calls of all vCPUs.
pub struct Calls {
    vcpus: Vec<Vcpu>,
}

/// What the calls need of the platform: the bytes of guest memory.
pub(crate) struct Guest<'a, P> {
    pub(crate) layout: &'a Layout,
    pub(crate) memory: &'a P,
}

impl<P: PhysicalMemory> Guest<'_, P> {
    fn read<T: FromBytes + IntoBytes + Default>(&self, gpa: Gpa) -> Option<T> {
        let mut value = T::default();
        self.memory
            .read(self.layout.spa_of(gpa)?, value.as_mut_bytes());
        Some(value)
    }

    fn list(&self, gpa: Gpa) -> Option<PvalidateHeader> {
        let aligned = gpa.get().is_multiple_of(LIST_ALIGNMENT);
        if !aligned || entries_that_fit(gpa) == 0 {
            return None;
        }
        self.read(gpa)
    }
}

impl Calls {
    /// No calls of `vcpus` processors.
    pub fn new(vcpus: u32) -> Self {
        Self {
            vcpus: (0..vcpus).map(|_| Vcpu::default()).collect(),
        }
    }

    /// `vmpl` asked the host to run VMPL0.
    pub fn ask(&mut self, vcpu: VcpuId, vmpl: Vmpl, tsc: u64) {
        if let Some(vcpu) = self.vcpus.get_mut(vcpu.index()) {
            vcpu.asked = Some((vmpl, tsc));
        }
    }

    /// `vmpl` was left; its VMSA at `vmsa` holds RAX and RCX. A call is open if it asked for one.
    pub(crate) fn open<P: PhysicalMemory>(
        &mut self,
        vcpu: VcpuId,
        vmpl: Vmpl,
        vmsa: Gpa,
        (rax, rcx): (u64, u64),
        guest: &Guest<'_, P>,
    ) {
        let Some(vcpu) = self.vcpus.get_mut(vcpu.index()) else {
            return;
        };
        let Some((_, since)) = vcpu.asked.take().filter(|&(asked, _)| asked == vmpl) else {
            return;
        };
        vcpu.abandon();
        let id = CallId::decode(rax);
        let list = (id == CallId::core(CoreCall::PVALIDATE))
            .then(|| guest.list(Gpa::new(rcx)))
            .flatten();
        vcpu.open = Some(Open {
            kind: Kind {
                vmpl: vmpl.number(),
                protocol: id.protocol.0,
                call: id.call,
            },
            vmsa,
            list: list.map(|header| List {
                gpa: Gpa::new(rcx),
                next: header.next,
            }),
            since,
        });
    }

    /// `vmpl` is resumed with `rax` in its VMSA at `vmsa`.
    pub(crate) fn close<P: PhysicalMemory>(
        &mut self,
        vcpu: VcpuId,
        vmpl: Vmpl,
        vmsa: Gpa,
        rax: u64,
        tsc: u64,
        guest: &Guest<'_, P>,
    ) {
        let Some(vcpu) = self.vcpus.get_mut(vcpu.index()) else {
            return;
        };
        let Some(open) = vcpu.open.filter(|open| open.kind.vmpl == vmpl.number()) else {
            return;
        };
        if open.vmsa != vmsa {
            vcpu.abandon();
            return;
        }
        vcpu.open = None;
        let result = ResultCode::decode(rax);
        let counted = vcpu.kind(open.kind);
        let known = counted.results.len() < MAX_RESULTS || counted.results.contains_key(&result.0);
        *counted
            .results
            .entry(if known { result.0 } else { OTHER })
            .or_default() += 1;
        counted.latency.add(tsc.saturating_sub(open.since));
        if let Some(list) = open.list {
            count_entries(&mut counted.entries, list, result, guest);
        }
    }

    /// The calls of each vCPU as the report has them; those that are open count as unanswered.
    pub fn report(&self) -> Vec<Vec<CallCounters>> {
        self.vcpus.iter().map(Vcpu::report).collect()
    }
}

impl Vcpu {
    fn kind(&mut self, kind: Kind) -> &mut Counted {
        let known = self.counted.len() < MAX_KINDS || self.counted.contains_key(&kind);
        self.counted
            .entry(if known { kind } else { kind.other() })
            .or_default()
    }

    fn abandon(&mut self) {
        if let Some(open) = self.open.take() {
            self.kind(open.kind).unanswered += 1;
        }
    }

    fn report(&self) -> Vec<CallCounters> {
        let mut calls: Vec<CallCounters> = self
            .counted
            .iter()
            .map(|(&kind, counted)| counted.report(kind))
            .collect();
        if let Some(open) = self.open {
            let unanswered = CallCounters {
                unanswered: 1,
                ..Counted::default().report(open.kind)
            };
            merge(&mut calls, core::slice::from_ref(&unanswered));
        }
        calls
    }
}

impl Counted {
    fn report(&self, kind: Kind) -> CallCounters {
        CallCounters {
            vmpl: kind.vmpl,
            protocol: kind.protocol,
            call: kind.call,
            name: kind.name(),
            results: self
                .results
                .iter()
                .map(|(&code, &count)| (result_name(ResultCode(code)), count))
                .collect(),
            unanswered: self.unanswered,
            entries: self.entries,
            latency: self.latency.report(),
        }
    }
}

fn result_name(code: ResultCode) -> String {
    match code.name() {
        Some(name) => name.to_string(),
        None if code.0 == OTHER => String::from("OTHER"),
        None => format!("{:#010x}", code.0),
    }
}

/// Counts the entries of a list that were worked by a call: from `list.next` to the `next` that
/// the paravisor has written.
fn count_entries<P: PhysicalMemory>(
    counted: &mut ListEntries,
    list: List,
    result: ResultCode,
    guest: &Guest<'_, P>,
) {
    let Some(header) = guest.list(list.gpa) else {
        return;
    };
    let end = u64::from(header.entries).min(entries_that_fit(list.gpa));
    let next = u64::from(header.next).min(end);
    let entry = |index: u64| {
        let at = size_of::<PvalidateHeader>() as u64 + index * 8;
        guest.read::<PvalidateEntry>(list.gpa.checked_add(at)?)
    };
    for index in u64::from(list.next)..next {
        if let Some(results) = entry(index).and_then(|entry| results_of(counted, entry)) {
            results.done += 1;
        }
    }
    let failed = result != ResultCode::SUCCESS && !result.wants_retry();
    if failed
        && next < end
        && let Some(results) = entry(next).and_then(|entry| results_of(counted, entry))
    {
        results.refused += 1;
    }
}

/// Where an entry is counted; one without a meaning is counted here.
fn results_of(counted: &mut ListEntries, entry: PvalidateEntry) -> Option<&mut EntryResults> {
    let Ok(request) = entry.decode() else {
        counted.malformed += 1;
        return None;
    };
    Some(match (request.size, request.action) {
        (PageSize::Size4K, PvalidateAction::Validate) => &mut counted.validate_4k,
        (PageSize::Size2M, PvalidateAction::Validate) => &mut counted.validate_2m,
        (PageSize::Size4K, PvalidateAction::Rescind) => &mut counted.rescind_4k,
        (PageSize::Size2M, PvalidateAction::Rescind) => &mut counted.rescind_2m,
    })
}

/// A histogram in the making.
struct Latency {
    count: u64,
    total: u64,
    min: u64,
    max: u64,
    buckets: [u64; 64],
}

impl Default for Latency {
    fn default() -> Self {
        Self {
            count: 0,
            total: 0,
            min: u64::MAX,
            max: 0,
            buckets: [0; 64],
        }
    }
}

impl Latency {
    fn add(&mut self, ticks: u64) {
        self.count += 1;
        self.total = self.total.saturating_add(ticks);
        self.min = self.min.min(ticks);
        self.max = self.max.max(ticks);
        self.buckets[ticks.max(1).ilog2() as usize] += 1;
    }

    fn report(&self) -> Histogram {
        let used = self.buckets.iter().rposition(|&n| n != 0);
        Histogram {
            count: self.count,
            total: self.total,
            min: if self.count == 0 { 0 } else { self.min },
            max: self.max,
            buckets: self.buckets[..used.map_or(0, |last| last + 1)].to_vec(),
        }
    }
}

/// Adds calls to a sum of calls, which stays ordered.
pub(crate) fn merge(sum: &mut Vec<CallCounters>, more: &[CallCounters]) {
    let key = |call: &CallCounters| (call.vmpl, call.protocol, call.call);
    for call in more {
        match sum.binary_search_by_key(&key(call), key) {
            Err(at) => sum.insert(at, call.clone()),
            Ok(at) => {
                let into = &mut sum[at];
                for (name, count) in &call.results {
                    *into.results.entry(name.clone()).or_default() += count;
                }
                into.unanswered += call.unanswered;
                add_entries(&mut into.entries, &call.entries);
                add_histogram(&mut into.latency, &call.latency);
            }
        }
    }
}

fn add_entries(sum: &mut ListEntries, more: &ListEntries) {
    for (sum, more) in [
        (&mut sum.validate_4k, more.validate_4k),
        (&mut sum.validate_2m, more.validate_2m),
        (&mut sum.rescind_4k, more.rescind_4k),
        (&mut sum.rescind_2m, more.rescind_2m),
    ] {
        sum.done += more.done;
        sum.refused += more.refused;
    }
    sum.malformed += more.malformed;
}

fn add_histogram(sum: &mut Histogram, more: &Histogram) {
    if more.count == 0 {
        return;
    }
    sum.min = if sum.count == 0 {
        more.min
    } else {
        sum.min.min(more.min)
    };
    sum.max = sum.max.max(more.max);
    sum.count += more.count;
    sum.total = sum.total.saturating_add(more.total);
    let len = sum.buckets.len().max(more.buckets.len());
    let mut buckets = vec![0; len];
    for (at, bucket) in buckets.iter_mut().enumerate() {
        let of = |histogram: &Histogram| histogram.buckets.get(at).copied().unwrap_or(0);
        *bucket = of(sum) + of(more);
    }
    sum.buckets = buckets;
}

#[cfg(test)]
mod tests;
