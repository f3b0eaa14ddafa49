//! One test per row of `snp-isa.md` §3 (PVALIDATE), §4 (RMPADJUST), §5 (RMPQUERY).

use proptest::prelude::*;

use super::*;
use crate::access::Verdict;
use crate::rmp::UpdateError;
use crate::stale::Stay;
use crate::testing::{BLOCK, CPU0, Sparse, operands, platform};
use crate::types::{Kind, PAGE_SIZE, VcpuId};

const SMALL: PageSize = PageSize::Size4K;
const LARGE: PageSize = PageSize::Size2M;
/// RDX of RMPADJUST: VMPL1, all permissions.
const FULL_TO_1: u64 = 0xF01;

fn page(index: u64) -> Gpa {
    Gpa::new(BLOCK.get() + index * PAGE_SIZE)
}

#[test]
fn pvalidate_1_outside_long_mode_is_undefined() {
    let operands = Operands {
        long_mode: false,
        ..operands(BLOCK.get(), 0, 1)
    };
    let early = Request::decode(Opcode::Pvalidate, Vmpl::VMPL0, &operands);
    assert_eq!(early, Err(Instruction::UndefinedOpcode));
}

#[test]
fn pvalidate_2_needs_cpl0_and_vmpl0() {
    let user = Operands {
        cpl: 3,
        ..operands(BLOCK.get(), 0, 1)
    };
    let early = Request::decode(Opcode::Pvalidate, Vmpl::VMPL0, &user);
    assert_eq!(early, Err(Instruction::GeneralProtection));
    let lower = operands(BLOCK.get(), 0, 1);
    let early = Request::decode(Opcode::Pvalidate, Vmpl::VMPL1, &lower);
    assert_eq!(early, Err(Instruction::GeneralProtection));
    // The privilege comes before the operands.
    let both = operands(BLOCK.get() + PAGE_SIZE, 1, 1);
    let early = Request::decode(Opcode::Pvalidate, Vmpl::VMPL1, &both);
    assert_eq!(early, Err(Instruction::GeneralProtection));
}

#[test]
fn pvalidate_3_large_operands_are_aligned() {
    let mut platform = platform("");
    assert_eq!(
        platform.pval(page(1), LARGE, true),
        (status::FAIL_INPUT, false)
    );
    assert_eq!(platform.pval(page(1), SMALL, true), (0, false));
    // The low 12 bits are ignored.
    let operands = operands(page(2).get() + 0xABC, 0, 1);
    assert_eq!(
        platform.codes(Opcode::Pvalidate, Vmpl::VMPL0, operands),
        (0, false)
    );
}

#[test]
fn pvalidate_5_needs_a_private_mapping() {
    let mut platform = platform("");
    let request =
        Request::decode(Opcode::Pvalidate, Vmpl::VMPL0, &operands(BLOCK.get(), 0, 1)).unwrap();
    let result = platform.execute(Vmpl::VMPL0, &request, Alias::Shared, BLOCK);
    assert_eq!(result, Instruction::Refused(Denial::NotOwned));
    assert!(platform.refusals()[0].contains("C=0"));
}

#[test]
fn pvalidate_6_needs_memory_that_is_covered_and_mutable() {
    let mut platform = platform("");
    let result = platform.run(Opcode::Pvalidate, Vmpl::VMPL0, operands(0xA_0000, 0, 1));
    assert_eq!(result, Instruction::Refused(Denial::NotCovered));
    let place = platform.layout().place(BLOCK).unwrap();
    platform.host.assign_for_launch(&place, BLOCK).unwrap();
    let result = platform.run(Opcode::Pvalidate, Vmpl::VMPL0, operands(BLOCK.get(), 0, 1));
    assert_eq!(result, Instruction::Refused(Denial::Immutable));
}

#[test]
fn pvalidate_7_small_request_in_large_entry_is_split_silently() {
    let mut platform = platform("backing=2m");
    assert_eq!(platform.pval(BLOCK, LARGE, true), (0, false));
    assert_eq!(platform.pval(page(3), SMALL, false), (0, false));
    assert_eq!(platform.host.psmashes(), 1);
    // The other 511 keep their bits.
    assert_eq!(platform.pval(page(4), SMALL, true), (0, true));
    assert_eq!(
        platform.pval(BLOCK, LARGE, true),
        (status::FAIL_SIZE_MISMATCH, false)
    );
}

#[test]
fn pvalidate_8_large_request_on_small_entry_changes_nothing() {
    let mut platform = platform("backing=4k");
    assert_eq!(
        platform.pval(BLOCK, LARGE, true),
        (status::FAIL_SIZE_MISMATCH, false)
    );
    for index in 0..512 {
        assert_eq!(
            platform.pval(page(index), SMALL, true),
            (0, false),
            "page {index}"
        );
    }
    assert_eq!(
        platform.pval(BLOCK, LARGE, false),
        (status::FAIL_SIZE_MISMATCH, false)
    );
    assert_eq!(platform.pval(page(7), SMALL, true), (0, true));
}

#[test]
fn pvalidate_8_a_block_that_the_guest_maps_elsewhere_is_a_mismatch() {
    let mut platform = platform("backing=2m");
    let request =
        Request::decode(Opcode::Pvalidate, Vmpl::VMPL0, &operands(BLOCK.get(), 1, 1)).unwrap();
    let result = platform.execute(Vmpl::VMPL0, &request, Alias::Private, page(1));
    assert_eq!(result, complete(status::FAIL_SIZE_MISMATCH));
}

#[test]
fn pvalidate_9_says_when_nothing_changes() {
    let mut platform = platform("backing=2m");
    for size in [SMALL, LARGE] {
        let gpa = if size == SMALL {
            Gpa::new(0x20_0000)
        } else {
            BLOCK
        };
        assert_eq!(platform.pval(gpa, size, false), (0, true));
        assert_eq!(platform.pval(gpa, size, true), (0, false));
        assert_eq!(platform.pval(gpa, size, true), (0, true));
        assert_eq!(platform.pval(gpa, size, false), (0, false));
    }
    assert_eq!(platform.counters.violations.double_validation, 2);
}

#[test]
fn pvalidate_10_flips_the_bit_for_every_access() {
    let mut platform = platform("");
    let read = |platform: &mut Platform<_>| {
        platform.access(Vmpl::VMPL0, Alias::Private, BLOCK, Kind::Read)
    };
    assert_eq!(read(&mut platform), Verdict::NotValidated);
    platform.pval(BLOCK, SMALL, true);
    assert!(matches!(read(&mut platform), Verdict::Map(_)));
    let _ = platform.take_invalidations();
    platform.pval(BLOCK, SMALL, false);
    let stale = platform.take_invalidations();
    assert_eq!(
        (stale[0].gpa, stale[0].bytes, stale[0].views),
        (BLOCK, PAGE_SIZE, Views::ALL)
    );
    assert_eq!(read(&mut platform), Verdict::NotValidated);
}

#[test]
fn pvalidate_does_not_clear_memory() {
    let mut platform = platform("backing=2m");
    platform.pval(BLOCK, LARGE, true);
    let spa = platform.spa_of(page(511)).unwrap();
    assert_ne!(platform.memory().read_u64(spa.plus(4088)), 0);
}

#[test]
fn progress_counts_what_vmpl0_validated() {
    let mut platform = platform("backing=2m");
    platform.pval(BLOCK, LARGE, true);
    platform.pval(Gpa::new(0x20_0000), LARGE, true);
    platform.pval(page(0), SMALL, false);
    assert_eq!(platform.counters.validated_bytes, (4 << 20) - PAGE_SIZE);
}

#[test]
fn a_rescind_under_permissions_is_a_violation() {
    let mut platform = platform("");
    platform.accept(BLOCK, FULL_TO_1);
    platform.pval(BLOCK, SMALL, false);
    assert_eq!(platform.counters.violations.live_rescind, 1);
}

#[test]
fn rmpadjust_1_is_privileged() {
    for (long_mode, cpl, expected) in [
        (false, 0, Instruction::UndefinedOpcode),
        (true, 3, Instruction::GeneralProtection),
    ] {
        let operands = Operands {
            long_mode,
            cpl,
            ..operands(BLOCK.get(), 0, FULL_TO_1)
        };
        assert_eq!(
            Request::decode(Opcode::Rmpadjust, Vmpl::VMPL0, &operands),
            Err(expected)
        );
    }
}

#[test]
fn rmpadjust_2_and_3_check_the_operands() {
    let mut platform = platform("");
    platform.pval(BLOCK, SMALL, true);
    let bad = [
        (page(1), LARGE, FULL_TO_1),         // misaligned
        (BLOCK, SMALL, 0xF04),               // no VMPL4
        (BLOCK, SMALL, 0x2001),              // reserved permission bit
        (BLOCK, SMALL, 0x1001),              // supervisor shadow stack: not on this platform
        (BLOCK, SMALL, 1 << 17 | FULL_TO_1), // reserved bit
        (BLOCK, LARGE, 1 << 16 | 1),         // a large VMSA
    ];
    for (gpa, size, rdx) in bad {
        assert_eq!(
            platform.adjust(gpa, size, rdx),
            status::FAIL_INPUT,
            "{rdx:#x}"
        );
    }
}

#[test]
fn rmpadjust_4_only_downwards() {
    let mut platform = platform("");
    platform.accept(BLOCK, FULL_TO_1);
    for (vmpl, target, expected) in [
        (Vmpl::VMPL0, 0, status::FAIL_PERMISSION),
        (Vmpl::VMPL1, 0, status::FAIL_PERMISSION),
        (Vmpl::VMPL1, 1, status::FAIL_PERMISSION),
        (Vmpl::VMPL1, 2, 0),
    ] {
        let operands = operands(BLOCK.get(), 0, 0x100 | target);
        assert_eq!(
            platform.codes(Opcode::Rmpadjust, vmpl, operands).0,
            expected
        );
    }
}

#[test]
fn rmpadjust_6_needs_covered_memory() {
    let mut platform = platform("");
    let result = platform.run(
        Opcode::Rmpadjust,
        Vmpl::VMPL0,
        operands(0xA_0000, 0, FULL_TO_1),
    );
    assert_eq!(result, Instruction::Refused(Denial::NotCovered));
}

#[test]
fn rmpadjust_7_small_request_in_large_entry_is_split_silently() {
    let mut platform = platform("backing=2m");
    platform.pval(BLOCK, LARGE, true);
    platform.scrub(BLOCK, LARGE);
    assert_eq!(platform.adjust(page(3), SMALL, FULL_TO_1), 0);
    assert_eq!(platform.host.psmashes(), 1);
    let write = |platform: &mut Platform<_>, gpa| {
        platform.access(Vmpl::VMPL1, Alias::Private, gpa, Kind::Write)
    };
    assert!(matches!(write(&mut platform, page(3)), Verdict::Map(_)));
    assert!(matches!(write(&mut platform, page(4)), Verdict::Denied(_)));
}

#[test]
fn rmpadjust_8_needs_a_validated_page_before_it_looks_at_the_size() {
    let mut platform = platform("");
    let result = platform.run(
        Opcode::Rmpadjust,
        Vmpl::VMPL0,
        operands(BLOCK.get(), 1, FULL_TO_1),
    );
    assert_eq!(result, Instruction::NotValidated);
}

#[test]
fn rmpadjust_9_large_request_on_small_entry_changes_nothing() {
    let mut platform = platform("");
    platform.pval(BLOCK, SMALL, true);
    platform.scrub(BLOCK, SMALL);
    assert_eq!(
        platform.adjust(BLOCK, LARGE, FULL_TO_1),
        status::FAIL_SIZE_MISMATCH
    );
    let place = platform.layout().place(BLOCK).unwrap();
    assert!(!platform.host.rmp().entry(&place).has_lower_permissions());
}

#[test]
fn rmpadjust_10_gives_only_what_the_giver_has() {
    let mut platform = platform("");
    platform.accept(BLOCK, 0x301);
    let to_2 = |mask: u64| operands(BLOCK.get(), 0, mask << 8 | 2);
    let mut adjust = |mask| platform.codes(Opcode::Rmpadjust, Vmpl::VMPL1, to_2(mask)).0;
    assert_eq!(adjust(0x7), status::FAIL_PERMISSION);
    assert_eq!(adjust(0x3), 0);
    assert_eq!(adjust(0x0), 0);
}

#[test]
fn rmpadjust_11_the_vmsa_bit_is_vmpl0s() {
    let mut platform = platform("");
    let vmsa = |platform: &Platform<_>| {
        let place = platform.layout().place(page(1)).unwrap();
        platform.host.rmp().entry(&place).is_vmsa()
    };
    platform.accept(page(1), FULL_TO_1);
    let at_1 = operands(page(1).get(), 0, 1 << 16 | 2);
    assert_eq!(platform.codes(Opcode::Rmpadjust, Vmpl::VMPL1, at_1).0, 0);
    assert!(!vmsa(&platform), "silently ignored off VMPL0");
    assert_eq!(platform.adjust(page(1), SMALL, 1 << 16 | 1), 0);
    assert!(vmsa(&platform));
    assert_eq!(platform.adjust(page(1), SMALL, 1), 0);
    assert!(!vmsa(&platform));
}

/// §11: a VMSA is in use from VMRUN to #VMEXIT.
#[test]
fn rmpadjust_on_a_running_vmsa_is_in_use() {
    let mut platform = platform("");
    platform.accept(page(1), 1 << 16 | 1);
    platform.set_vmsa(VcpuId(1), Vmpl::VMPL1, Some(page(1)));
    let spa = platform.spa_of(page(1)).unwrap();
    platform.memory().write(spa.plus(0xCA), &[1]);
    platform.memory().write_u64(spa.plus(0xD0), 0x1000);
    platform.memory().write_u64(spa.plus(0x3B0), 1);
    assert_eq!(platform.enter(VcpuId(1), Vmpl::VMPL1), Ok(spa));
    assert_eq!(platform.adjust(page(1), SMALL, 1), status::FAIL_IN_USE);
    platform.leave(VcpuId(1));
    assert_eq!(platform.adjust(page(1), SMALL, 1), 0);
    let _ = CPU0;
}

#[test]
fn rmpadjust_makes_only_reductions_stale_and_only_for_its_target() {
    let mut platform = platform("");
    platform.pval(BLOCK, SMALL, true);
    platform.scrub(BLOCK, SMALL);
    let _ = platform.take_invalidations();
    platform.adjust(BLOCK, SMALL, FULL_TO_1);
    assert!(platform.take_invalidations().is_empty());
    platform.adjust(BLOCK, SMALL, 0x101);
    let stale = platform.take_invalidations();
    assert_eq!(stale.len(), 1);
    assert!(stale[0].views.contains(Vmpl::VMPL1) && !stale[0].views.contains(Vmpl::VMPL0));
}

#[test]
fn a_grant_without_scrub_is_a_violation_down_to_one_line() {
    for size in [SMALL, LARGE] {
        let mut platform = platform("backing=2m");
        platform.pval(BLOCK, size, true);
        let last_line = size.bytes() - 64;
        let spa = platform.spa_of(BLOCK).unwrap();
        platform.memory().write(spa, &vec![0; last_line as usize]);
        assert_eq!(platform.adjust(BLOCK, size, FULL_TO_1), 0);
        assert_eq!(platform.counters.violations.unscrubbed_grant, 1);
        let expected = format!("{:#x}", BLOCK.get() + last_line);
        assert!(
            platform
                .refusals()
                .iter()
                .any(|line| line.contains(&expected))
        );
    }
}

#[test]
fn a_revoke_of_an_unscrubbed_page_is_none() {
    let mut platform = platform("");
    platform.pval(BLOCK, SMALL, true);
    assert_eq!(platform.adjust(BLOCK, SMALL, 1), 0);
    assert_eq!(platform.counters.violations.unscrubbed_grant, 0);
}

#[test]
fn rmpquery_shows_mask_vmsa_and_size() {
    let mut platform = platform("backing=2m");
    platform.pval(BLOCK, LARGE, true);
    platform.scrub(BLOCK, LARGE);
    platform.adjust(BLOCK, LARGE, 0x701);
    let done = |instruction| match instruction {
        Instruction::Complete(done) => (done.eax, done.rcx, done.rdx),
        other => panic!("{other:?}"),
    };
    let at = operands(page(9).get(), 0, 1);
    let large = done(platform.run(Opcode::Rmpquery, Vmpl::VMPL0, at));
    assert_eq!(large, (0, Some(1), Some(0x701)));
    platform.adjust(page(9), SMALL, 1 << 16 | 1);
    let small = done(platform.run(Opcode::Rmpquery, Vmpl::VMPL1, at));
    assert_eq!(small, (0, Some(0), Some(1 << 16 | 1)));
}

/// `svsm.md` §5: rights are revoked and flushed before VMPL0 looks at a page that becomes a VMSA.
#[test]
fn rmpadjust_of_a_vmsa_that_somebody_may_still_write_is_a_violation() {
    let mut platform = platform("");
    let other = Stay {
        cpu: VcpuId(1),
        exits: 9,
        vmpl: Vmpl::VMPL1,
    };
    let vmsa = 1 << 16 | 1;
    for index in 1..4 {
        platform.accept(page(index), FULL_TO_1);
    }
    platform.stale().note(CPU0, other, page(1), PAGE_SIZE);
    let violations = |platform: &Platform<Sparse>| platform.counters.violations.stale_translation;
    assert_eq!(platform.adjust(page(2), SMALL, vmsa), 0);
    assert_eq!(platform.adjust(page(1), SMALL, FULL_TO_1), 0, "no VMSA");
    assert_eq!(violations(&platform), 0);
    assert_eq!(platform.adjust(page(1), SMALL, vmsa), 0);
    assert_eq!(violations(&platform), 1);
    platform.stale().forget_those_who_left(|_| false);
    assert_eq!(platform.adjust(page(3), SMALL, vmsa), 0);
    assert_eq!(violations(&platform), 1);
}

/// A revocation whose flush was in vain is undone, and the guest told to try again.
#[test]
fn rmpadjust_gives_back_what_was_withdrawn_and_pvalidate_does_not() {
    let mut platform = platform("");
    let other = Stay {
        cpu: VcpuId(1),
        exits: 9,
        vmpl: Vmpl::VMPL1,
    };
    platform.accept(page(1), FULL_TO_1);
    platform.stale().note(CPU0, other, page(1), PAGE_SIZE);
    assert_eq!(platform.adjust(page(1), SMALL, FULL_TO_1), 0);
    assert_eq!(platform.stale().settle(CPU0), None);
    platform.stale().note(CPU0, other, page(2), PAGE_SIZE);
    platform.accept(page(2), FULL_TO_1);
    assert!(platform.stale().settle(CPU0).is_some());
}

#[test]
fn rmpquery_does_not_look_up() {
    let mut platform = platform("");
    platform.accept(BLOCK, FULL_TO_1);
    let code = |platform: &mut Platform<_>, rdx| {
        platform
            .codes(Opcode::Rmpquery, Vmpl::VMPL1, operands(BLOCK.get(), 0, rdx))
            .0
    };
    assert_eq!(code(&mut platform, 0), status::FAIL_PERMISSION);
    assert_eq!(code(&mut platform, 9), status::FAIL_INPUT);
    assert_eq!(code(&mut platform, 1), 0);
}

#[test]
fn flags_follow_the_code() {
    let all = 0xFFFF;
    let done = |eax, carry| Completion {
        carry,
        ..Completion::code(eax)
    };
    // Bits: OF 11, SF 7, ZF 6, AF 4, PF 2, CF 0.
    let touched = 0x8D5;
    assert_eq!(done(0, false).flags(all) & touched, 0x44);
    assert_eq!(done(0, true).flags(0) & touched, 0x45);
    assert_eq!(done(6, false).flags(all) & touched, 0x04);
    assert_eq!(done(1, false).flags(all) & touched, 0x00);
    assert_eq!(done(1, false).flags(all) & !touched, all & !touched);
}

#[test]
fn every_completion_is_counted() {
    let mut platform = platform("");
    platform.pval(BLOCK, LARGE, true);
    platform.pval(BLOCK, SMALL, true);
    platform.pval(BLOCK, SMALL, true);
    platform.pval(BLOCK, SMALL, false);
    let early = operands(page(1).get(), 1, 1);
    platform.count_early(Opcode::Pvalidate, Vmpl::VMPL0, &early, status::FAIL_INPUT);
    let counted = platform.counters.level(Vmpl::VMPL0).pvalidate;
    assert_eq!(counted.validate_2m.size_mismatch, 1);
    assert_eq!(counted.validate_2m.fail_input, 1);
    assert_eq!(
        (counted.validate_4k.ok, counted.validate_4k.no_change),
        (1, 1)
    );
    assert_eq!(counted.rescind_4k.ok, 1);
}

/// §6: RMPUPDATE of a validated page ends its validation, and the next access tells the guest.
#[test]
fn a_page_taken_away_comes_back_unvalidated() {
    let mut platform = platform("");
    platform.accept(BLOCK, FULL_TO_1);
    let place = platform.layout().place(BLOCK).unwrap();
    let host = &mut platform.host;
    assert_eq!(
        host.take_away(&platform.memory, &place, BLOCK, SMALL),
        Ok::<_, UpdateError>(())
    );
    let verdict = platform.access(Vmpl::VMPL1, Alias::Private, BLOCK, Kind::Read);
    assert_eq!(verdict, Verdict::NotValidated);
}

proptest! {
    // Each case fills megabytes with the pattern.
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever is executed, in whatever order and sizes: an instruction never both fails and
    /// changes Validated, and the count of validated pages is what the replies add up to.
    #[test]
    fn validated_pages_are_what_the_replies_say(
        two_m: bool,
        steps in prop::collection::vec((0u64..512, any::<bool>(), any::<bool>()), 1..40),
    ) {
        let mut platform = platform(if two_m { "backing=2m" } else { "" });
        let mut expected = 0i64;
        for (index, large, validate) in steps {
            let size = if large { LARGE } else { SMALL };
            let gpa = if large { BLOCK } else { page(index) };
            let (eax, carry) = platform.pval(gpa, size, validate);
            prop_assert!(eax == 0 || !carry);
            if eax == 0 && !carry {
                let pages = size.pages() as i64;
                expected += if validate { pages } else { -pages };
            }
            let counted = platform.host.rmp().count(Entry::is_validated);
            prop_assert_eq!(counted as i64, expected);
        }
    }
}
