use super::*;
use crate::ghcb::Reply;
use crate::platform::{End, Platform};
use crate::testing::{BLOCK, CPU0, Sparse, platform};
use crate::types::PAGE_SIZE;
use protocols::vmsa::Vmsa;

const VMPL1: Vmpl = Vmpl::VMPL1;
const RAX: u64 = core::mem::offset_of!(Vmsa, rax) as u64;
const RCX: u64 = core::mem::offset_of!(Vmsa, rcx) as u64;

/// Where the VMSAs of VMPL0 and VMPL1 are, and one to replace the latter.
const VMSAS: [Gpa; 3] = [
    Gpa::new(BLOCK.get() + PAGE_SIZE),
    Gpa::new(BLOCK.get() + 2 * PAGE_SIZE),
    Gpa::new(BLOCK.get() + 3 * PAGE_SIZE),
];
/// A page with a PVALIDATE list.
const LIST: Gpa = Gpa::new(BLOCK.get() + 8 * PAGE_SIZE);

fn make_vmsa(platform: &mut Platform<Sparse>, at: Gpa, vmpl: Vmpl) {
    platform.accept(at, 1 << 16 | 1);
    let spa = platform.spa_of(at).unwrap();
    let put =
        |offset: usize, value: u64| platform.memory().write_u64(spa.plus(offset as u64), value);
    put(core::mem::offset_of!(Vmsa, efer), 1 << 12);
    put(core::mem::offset_of!(Vmsa, sev_features), 1);
    let level = spa.plus(core::mem::offset_of!(Vmsa, vmpl) as u64);
    platform.memory().write(level, &[vmpl.number()]);
}

/// A first vCPU with a paravisor and a guest, of which the guest runs.
fn ready() -> Platform<Sparse> {
    let mut platform = platform("");
    make_vmsa(&mut platform, VMSAS[0], Vmpl::VMPL0);
    make_vmsa(&mut platform, VMSAS[1], VMPL1);
    make_vmsa(&mut platform, VMSAS[2], VMPL1);
    platform.set_vmsa(CPU0, Vmpl::VMPL0, Some(VMSAS[0]));
    platform.set_vmsa(CPU0, VMPL1, Some(VMSAS[1]));
    platform.enter(CPU0, VMPL1).unwrap();
    platform
}

fn register(platform: &Platform<Sparse>, vmsa: Gpa, offset: u64, value: u64) {
    let spa = platform.spa_of(vmsa).unwrap();
    platform.memory().write_u64(spa.plus(offset), value);
}

/// The guest asks with these registers; the paravisor runs.
fn ask(platform: &mut Platform<Sparse>, rax: u64, rcx: u64) {
    let (reply, _) = platform.msr(VMPL1, 0x016);
    assert_eq!(reply, Reply::Run(Vmpl::VMPL0));
    register(platform, VMSAS[1], RAX, rax);
    register(platform, VMSAS[1], RCX, rcx);
    platform.leave(CPU0);
    platform.enter(CPU0, Vmpl::VMPL0).unwrap();
}

/// The paravisor answers; the guest runs.
fn answer(platform: &mut Platform<Sparse>, rax: u64) {
    register(platform, VMSAS[1], RAX, rax);
    platform.leave(CPU0);
    platform.enter(CPU0, VMPL1).unwrap();
}

fn calls(platform: &Platform<Sparse>) -> Vec<CallCounters> {
    let report = platform.report(End::PowerOff);
    assert_eq!(
        report.vcpus[0].calls, report.calls,
        "the second vCPU is idle"
    );
    report.calls
}

#[test]
fn calls_are_told_apart_by_number_and_answer() {
    let mut platform = ready();
    for (rax, result) in [
        (6, 0),
        (6, 0),
        (6, 0x8000_0005),
        (2 << 32 | 1, 0x8000_0001),
        (9, 0x8000_1234),
        (77 << 32, 0),
    ] {
        ask(&mut platform, rax, 0);
        answer(&mut platform, result);
    }
    let calls = calls(&platform);
    let told: Vec<(&str, Vec<(&str, u64)>)> = calls
        .iter()
        .map(|call| {
            let results = call.results.iter().map(|(name, n)| (name.as_str(), *n));
            (call.name.as_str(), results.collect())
        })
        .collect();
    assert_eq!(
        told,
        [
            (
                "CORE/QUERY_PROTOCOL",
                vec![("INVALID_PARAMETER", 1), ("SUCCESS", 2)]
            ),
            ("CORE/0x9", vec![("0x80001234", 1)]),
            ("VTPM/0x1", vec![("UNSUPPORTED_PROTOCOL", 1)]),
            ("77/0x0", vec![("SUCCESS", 1)]),
        ]
    );
    assert!(
        calls
            .iter()
            .all(|call| call.vmpl == 1 && call.unanswered == 0)
    );
    // The clock of the tests stands still: a duration of 0 is in the first bucket.
    assert_eq!(calls[0].latency.buckets, [3]);
    assert_eq!((calls[0].latency.count, calls[0].latency.max), (3, 0));
}

#[test]
fn a_list_is_counted_from_next_to_next() {
    let mut platform = ready();
    platform.accept(LIST, 1);
    let list = platform.spa_of(LIST).unwrap();
    let validate = PvalidateAction::Validate;
    let words = [
        // Six entries, of which the first is done already.
        6 | 1 << 16,
        PvalidateEntry::new(Gpa::new(0), PageSize::Size4K, validate, false).0,
        PvalidateEntry::new(Gpa::new(0), PageSize::Size2M, validate, false).0,
        PvalidateEntry::new(
            Gpa::new(0),
            PageSize::Size4K,
            PvalidateAction::Rescind,
            true,
        )
        .0,
        1 << 5,
        PvalidateEntry::new(Gpa::new(0), PageSize::Size4K, validate, false).0,
        PvalidateEntry::new(Gpa::new(0), PageSize::Size4K, validate, false).0,
    ];
    for (index, word) in (0..).zip(words) {
        platform.memory().write_u64(list.plus(index * 8), word);
    }
    ask(&mut platform, 1, LIST.get());
    platform.memory().write_u64(list, 6 | 3 << 16);
    answer(&mut platform, 0x8000_0000);
    ask(&mut platform, 1, LIST.get());
    platform.memory().write_u64(list, 6 | 4 << 16);
    answer(&mut platform, 0x8000_1006);
    let [call] = &calls(&platform)[..] else {
        panic!()
    };
    assert_eq!(call.name, "CORE/PVALIDATE");
    assert_eq!(call.results["INCOMPLETE"], 1);
    assert_eq!(call.results["FAIL_SIZE_MISMATCH"], 1);
    let of = |results: EntryResults| (results.done, results.refused);
    assert_eq!(of(call.entries.validate_2m), (1, 0));
    assert_eq!(of(call.entries.rescind_4k), (1, 0));
    assert_eq!(of(call.entries.validate_4k), (0, 1));
    assert_eq!(call.entries.malformed, 1);
}

#[test]
fn lists_that_claim_too_much_are_cut_at_their_page() {
    let mut platform = ready();
    platform.accept(LIST, 1);
    // At the page's end, misaligned, where no memory is; each claims 65535 entries.
    for at in [LIST.get() + 4080, LIST.get() + 4, 0xFE00_0000, !7] {
        if let Some(spa) = platform.spa_of(Gpa::new(at & 0xF_FFFF_FFFF_FFFF)) {
            platform.memory().write_u64(spa, 0xFFFF);
        }
        ask(&mut platform, 1, at);
        if let Some(spa) = platform.spa_of(Gpa::new(at & 0xF_FFFF_FFFF_FFFF)) {
            platform.memory().write_u64(spa, 0xFFFF | 0xFFFF << 16);
        }
        answer(&mut platform, 0);
    }
    let [call] = &calls(&platform)[..] else {
        panic!()
    };
    assert_eq!(call.results["SUCCESS"], 4);
    // Room for one entry behind the only head that can be read.
    assert_eq!(call.entries.rescind_4k.done, 1);
}

#[test]
fn a_caller_that_is_replaced_was_not_answered() {
    let mut platform = ready();
    ask(&mut platform, 2, 0);
    platform.set_vmsa(CPU0, VMPL1, Some(VMSAS[2]));
    platform.leave(CPU0);
    platform.enter(CPU0, VMPL1).unwrap();
    let [call] = &calls(&platform)[..] else {
        panic!()
    };
    assert_eq!(
        (call.name.as_str(), call.unanswered),
        ("CORE/CREATE_VCPU", 1)
    );
    assert!(call.results.is_empty() && call.latency.count == 0);
}

#[test]
fn a_call_that_the_run_ends_in_was_not_answered() {
    let mut platform = ready();
    ask(&mut platform, 1, LIST.get());
    answer(&mut platform, 0);
    ask(&mut platform, 1, LIST.get());
    let [call] = &calls(&platform)[..] else {
        panic!()
    };
    assert_eq!((call.results["SUCCESS"], call.unanswered), (1, 1));
}

/// A host that enters VMPL0 for nothing makes no calls.
#[test]
fn what_the_guest_did_not_ask_for_is_no_call() {
    let mut platform = ready();
    register(&platform, VMSAS[1], RAX, 1);
    for _ in 0..3 {
        platform.leave(CPU0);
        platform.enter(CPU0, Vmpl::VMPL0).unwrap();
        platform.leave(CPU0);
        platform.enter(CPU0, VMPL1).unwrap();
    }
    assert_eq!(calls(&platform), []);
}

#[test]
fn a_guest_cannot_make_more_kinds_than_there_is_room_for() {
    let mut platform = ready();
    for n in 0..100 {
        ask(&mut platform, n << 32, 0);
        answer(&mut platform, 0);
        ask(&mut platform, 0, 0);
        answer(&mut platform, 0x8000_2000 + n);
    }
    let calls = calls(&platform);
    assert_eq!(calls.len(), MAX_KINDS + 1);
    let other = calls.last().unwrap();
    assert_eq!((other.name.as_str(), other.protocol), ("OTHER", u32::MAX));
    assert_eq!(other.results["SUCCESS"], 100 - MAX_KINDS as u64);
    assert_eq!(calls[0].results.len(), MAX_RESULTS + 1);
    assert_eq!(calls[0].results["OTHER"], 100 + 1 - MAX_RESULTS as u64);
    let total: u64 = calls.iter().flat_map(|call| call.results.values()).sum();
    assert_eq!(total, 200);
}

#[test]
fn sums_are_those_of_the_parts() {
    let latency = |ticks: &[u64]| {
        let mut latency = Latency::default();
        ticks.iter().for_each(|&t| latency.add(t));
        latency.report()
    };
    let call = |call, ticks: &[u64]| CallCounters {
        call,
        unanswered: 1,
        results: [("SUCCESS".to_string(), ticks.len() as u64)].into(),
        latency: latency(ticks),
        ..CallCounters::default()
    };
    let mut sum = Vec::new();
    merge(&mut sum, &[call(1, &[]), call(4, &[1, 2])]);
    merge(&mut sum, &[call(3, &[9]), call(4, &[0, 1024, 3])]);
    let numbers: Vec<u32> = sum.iter().map(|call| call.call).collect();
    assert_eq!(numbers, [1, 3, 4]);
    assert_eq!(sum[2].results["SUCCESS"], 5);
    assert_eq!(sum[2].latency, latency(&[1, 2, 0, 1024, 3]));
    assert_eq!(sum[2].latency.buckets, [2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    assert_eq!(sum[0].latency, Histogram::default());
    assert_eq!(sum[2].unanswered, 2);
}
