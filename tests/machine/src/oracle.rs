//! The oracle: questions of a test guest, by plain VMMCALL (see [`protocols::oracle`]).
//!
//! It exists so that a test can prove that a refused request changed nothing. Without
//! `oracle=on` the CPU side raises #UD and never comes here.

use alloc::format;

use protocols::oracle::{
    Call, Counter, HOST_ACT_DONE, HOST_ACT_NOT_POSSIBLE, HostAct, PageFlags, Table,
};
use protocols::report::PvalidateResults;
use protocols::secrets::SecretsPage;
use protocols::tdx::Leaf;
use zerocopy::{FromZeros, IntoBytes};

use crate::counters::Tdcall;
use crate::ghcb::guest_request::Lie;
use crate::memory::PhysicalMemory;
use crate::platform::Platform;
use crate::settings::{Hostile, PlatformKind};
use crate::types::{Alias, Gpa, PageSize, Vmpl};

/// Registers after a call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Answer {
    /// RAX.
    pub rax: u64,
    /// RDX, if the call has a second result.
    pub rdx: Option<u64>,
}

impl Answer {
    const fn rax(rax: u64) -> Self {
        Self { rax, rdx: None }
    }
}

impl<P: PhysicalMemory> Platform<P> {
    /// Answers a plain VMMCALL with these registers; `None` (and so #UD) if the oracle is off
    /// or there is no such call.
    pub fn ask_oracle(&mut self, rax: u64, rcx: u64, rdx: u64) -> Option<Answer> {
        if !self.settings.oracle {
            return None;
        }
        Some(match Call::from_rax(rax)? {
            Call::PAGE => self.describe_page(Gpa::new(rcx)),
            Call::COUNTER => Answer::rax(self.read_counter(Counter(rcx))),
            Call::REFEREE => {
                let verdict = self.judge();
                if let Some(first) = verdict.as_ref().and_then(|v| v.first.first()) {
                    self.log(format!(
                        "referee: {:#x}: {} / {}",
                        first.gpa, first.map, first.rmp
                    ));
                }
                // Without a map there is nothing to agree with.
                Answer::rax(verdict.map_or(u64::MAX, |verdict| verdict.disagreements))
            }
            Call::HOST_ACT => {
                let done = self.act_as_host(Gpa::new(rcx), HostAct(rdx)).is_some();
                Answer::rax(if done {
                    HOST_ACT_DONE
                } else {
                    HOST_ACT_NOT_POSSIBLE
                })
            }
            Call::HOST_WOULD => Answer::rax(self.would_act(HostAct(rcx)).into()),
            Call::TABLE => Answer::rax(self.settings.table.unwrap_or(Table::ANY).0),
            _ => return None,
        })
    }

    fn describe_page(&self, gpa: Gpa) -> Answer {
        let Some(place) = self.host.layout().place(gpa) else {
            return Answer::rax(0);
        };
        let entry = self.host.rmp().entry(&place);
        let mut flags = PageFlags::empty();
        flags.set(PageFlags::ASSIGNED, entry.is_assigned());
        flags.set(PageFlags::VALIDATED, entry.is_validated());
        flags.set(PageFlags::SIZE_2M, entry.size() == PageSize::Size2M);
        flags.set(PageFlags::VMSA, entry.is_vmsa());
        flags.set(PageFlags::IMMUTABLE, entry.is_immutable());
        flags.set(
            PageFlags::HOST_PRIVATE,
            self.host.attribute(&place) == Alias::Private,
        );
        let masks = Vmpl::ALL.map(|vmpl| entry.permissions(vmpl).mask());
        Answer {
            rax: flags.bits(),
            rdx: Some(u64::from(u32::from_le_bytes(masks))),
        }
    }

    /// A counter's value; all ones for a counter that does not exist.
    fn read_counter(&self, counter: Counter) -> u64 {
        let level = self.counters.level(Vmpl::VMPL0);
        let pvalidate = |results: &PvalidateResults| results.total();
        let violations = &self.counters.violations;
        match counter {
            Counter::PVALIDATE_4K_VALIDATE => pvalidate(&level.pvalidate.validate_4k),
            Counter::PVALIDATE_2M_VALIDATE => pvalidate(&level.pvalidate.validate_2m),
            Counter::PVALIDATE_4K_RESCIND => pvalidate(&level.pvalidate.rescind_4k),
            Counter::PVALIDATE_2M_RESCIND => pvalidate(&level.pvalidate.rescind_2m),
            Counter::RMPADJUST => level.rmpadjust.size_4k.total() + level.rmpadjust.size_2m.total(),
            Counter::WORLD_SWITCHES => Vmpl::ALL
                .iter()
                .map(|&vmpl| self.counters.level(vmpl).world_switches)
                .sum(),
            Counter::INSTRUCTIONS => level.instructions,
            Counter::INSTRUCTIONS_OF_GUEST => self.counters.level(Vmpl::VMPL1).instructions,
            Counter::DOUBLE_VALIDATION => violations.double_validation,
            Counter::UNSCRUBBED_GRANT => violations.unscrubbed_grant,
            Counter::LIVE_RESCIND => violations.live_rescind,
            Counter::STALE_TRANSLATION => violations.stale_translation,
            Counter::IN_USE_RESCIND => violations.in_use_rescind,
            Counter::ACCEPT_4K => level.accept.size_4k.total(),
            Counter::ACCEPT_2M => level.accept.size_2m.total(),
            Counter::TDCALL => self.counters.tdcalls(Vmpl::VMPL0, |_| true),
            Counter::ATTR_WR => self.counters.tdcalls(Vmpl::VMPL0, |call| {
                *call == Tdcall::Module(Leaf::MEM_PAGE_ATTR_WR)
            }),
            Counter::TD_EXIT => self.counters.td_exits(Vmpl::VMPL0),
            Counter::AWAITED_STARTS => self.counters.awaited_starts(),
            Counter::KEYS_IN_LAUNCH_PAGE => self.keys_in_launch_page(),
            Counter::IMPLICIT_CONVERSION => Vmpl::ALL
                .iter()
                .map(|&vmpl| self.counters.level(vmpl).implicit_conversions)
                .sum(),
            _ => u64::MAX,
        }
    }

    /// How many of the guest's keys are still in the page that the launch put them in.
    fn keys_in_launch_page(&self) -> u64 {
        let Some(processor) = &self.security_processor else {
            return 0;
        };
        let spa = processor.secrets_page().and_then(|gpa| self.spa_of(gpa));
        let mut page = SecretsPage::new_zeroed();
        if let Some(spa) = spa {
            self.memory.read(spa, page.as_mut_bytes());
        }
        let there = page.vmpck.iter().zip(processor.keys());
        there.filter(|(found, key)| found == key).count() as u64
    }

    /// Whether this host is one that does such things.
    fn would_act(&self, act: HostAct) -> bool {
        match act {
            // A page that was taken out of a trust domain comes back pending, never as it was.
            HostAct::EXCHANGE => {
                self.kind() == PlatformKind::Snp && self.settings.is_hostile(Hostile::Remap)
            }
            HostAct::BLOCK | HostAct::HOLD => self.kind() == PlatformKind::Tdx,
            HostAct::TAMPER_ANSWER => self.settings.is_hostile(Hostile::MessagesTampered),
            HostAct::REPLAY_ANSWER => self.settings.is_hostile(Hostile::MessagesReplayed),
            HostAct::LOSE_ANSWER => self.settings.is_hostile(Hostile::MessagesLost),
            act if Lie::of(act).is_some() => {
                let hosts = [
                    Hostile::MessagesTampered,
                    Hostile::MessagesReplayed,
                    Hostile::MessagesLost,
                ];
                hosts.iter().any(|&host| self.settings.is_hostile(host))
            }
            HostAct::RE_ADD | HostAct::RE_ADD_2M => self.settings.is_hostile(Hostile::ReAdd),
            act => act.is_known(),
        }
    }

    /// Does to a page what only a host can; `None` if its state does not allow it, or the host is
    /// not so hostile.
    fn act_as_host(&mut self, gpa: Gpa, act: HostAct) -> Option<()> {
        let place = self.host.layout().place(gpa)?;
        if !self.would_act(act) || self.is_vmsa_in_use(gpa, PageSize::Size4K) {
            return None;
        }
        if let Some(lie) = Lie::of(act) {
            self.courier.lie = Some(lie);
            return Some(());
        }
        if act == HostAct::HOLD {
            return self.hold(gpa);
        }
        let memory = &self.memory;
        let result = match act {
            HostAct::BACK_BY_2M => self.host.back_by_2m(memory, &place, gpa),
            HostAct::TAKE_AWAY => self.host.take_away(memory, &place, gpa, PageSize::Size4K),
            HostAct::CONVERT_TO_SHARED => {
                self.host
                    .convert(memory, &place, gpa, PageSize::Size4K, Alias::Shared)
            }
            HostAct::EXCHANGE => self.host.exchange(memory, &place, gpa),
            HostAct::RE_ADD => self.host.re_add(memory, &place, gpa, PageSize::Size4K),
            HostAct::RE_ADD_2M => self.host.re_add(memory, &place, gpa, PageSize::Size2M),
            HostAct::BLOCK => return self.host.block(&place, gpa).then_some(()),
            _ => return None,
        };
        result.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{BLOCK, Sparse, platform};

    fn ask(platform: &mut Platform<Sparse>, call: Call, rcx: u64, rdx: u64) -> Answer {
        platform.ask_oracle(call.rax(), rcx, rdx).unwrap()
    }

    fn flags(platform: &mut Platform<Sparse>) -> PageFlags {
        PageFlags::from_bits_truncate(ask(platform, Call::PAGE, BLOCK.get(), 0).rax)
    }

    #[test]
    fn it_is_silent_unless_asked_for() {
        assert_eq!(platform("").ask_oracle(Call::PAGE.rax(), 0, 0), None);
        assert_eq!(platform("oracle=on").ask_oracle(7, 0, 0), None);
    }

    #[test]
    fn a_page_is_described_in_full() {
        let mut platform = platform("oracle=on");
        assert_eq!(flags(&mut platform), PageFlags::HOST_PRIVATE);
        platform.accept(BLOCK, 0x301);
        let expected = PageFlags::HOST_PRIVATE | PageFlags::ASSIGNED | PageFlags::VALIDATED;
        assert_eq!(flags(&mut platform), expected);
        let answer = ask(&mut platform, Call::PAGE, BLOCK.get(), 0);
        assert_eq!(answer.rdx, Some(0x0000_030F));
        assert_eq!(ask(&mut platform, Call::PAGE, 0xFE00_0000, 0).rax, 0);
    }

    #[test]
    fn counters_are_those_of_vmpl0() {
        let mut platform = platform("oracle=on");
        platform.accept(BLOCK, 0xF01);
        platform.pval(BLOCK, PageSize::Size4K, true);
        let mut count = |counter: Counter| ask(&mut platform, Call::COUNTER, counter.0, 0).rax;
        assert_eq!(count(Counter::PVALIDATE_4K_VALIDATE), 2);
        assert_eq!(count(Counter::RMPADJUST), 1);
        assert_eq!(count(Counter::DOUBLE_VALIDATION), 1);
        assert_eq!(count(Counter(999)), u64::MAX);
        platform.counters().vmpl(Vmpl::VMPL0).instructions = 7;
        platform.counters().vmpl(Vmpl::VMPL1).instructions = 8;
        let mut count = |counter: Counter| ask(&mut platform, Call::COUNTER, counter.0, 0).rax;
        assert_eq!(count(Counter::INSTRUCTIONS), 7);
        assert_eq!(count(Counter::INSTRUCTIONS_OF_GUEST), 8);
        let leaves = [Leaf::MEM_PAGE_ATTR_WR, Leaf::VP_ENTER];
        for (level, leaf) in [Vmpl::VMPL0, Vmpl::VMPL0, Vmpl::VMPL1]
            .into_iter()
            .zip(leaves.into_iter().cycle())
        {
            platform
                .counters()
                .count_tdcall(level, Tdcall::Module(leaf));
        }
        let mut count = |counter: Counter| ask(&mut platform, Call::COUNTER, counter.0, 0).rax;
        assert_eq!(count(Counter::TDCALL), 2);
        assert_eq!(count(Counter::ATTR_WR), 1);
        assert_eq!(count(Counter::AWAITED_STARTS), 0);
        platform.count_awaited_start();
        // The same start: nobody has run yet.
        platform.count_awaited_start();
        platform.count_start();
        platform.count_awaited_start();
        let mut count = |counter: Counter| ask(&mut platform, Call::COUNTER, counter.0, 0).rax;
        assert_eq!(count(Counter::AWAITED_STARTS), 2);
    }

    #[test]
    fn host_acts_are_done_or_refused_by_the_pages_state() {
        let mut platform = platform("oracle=on");
        let act = |platform: &mut Platform<Sparse>, act: HostAct| {
            ask(platform, Call::HOST_ACT, BLOCK.get(), act.0).rax
        };
        assert_eq!(act(&mut platform, HostAct::BACK_BY_2M), HOST_ACT_DONE);
        assert!(flags(&mut platform).contains(PageFlags::SIZE_2M));
        assert_eq!(
            act(&mut platform, HostAct::BACK_BY_2M),
            HOST_ACT_NOT_POSSIBLE
        );
        assert_eq!(platform.pval(BLOCK, PageSize::Size2M, true), (0, false));
        assert_eq!(act(&mut platform, HostAct::TAKE_AWAY), HOST_ACT_DONE);
        assert_eq!(flags(&mut platform), PageFlags::HOST_PRIVATE);
        assert_eq!(
            act(&mut platform, HostAct::CONVERT_TO_SHARED),
            HOST_ACT_DONE
        );
        assert_eq!(flags(&mut platform), PageFlags::empty());
        // SEV-SNP has no secure EPT.
        for unknown in [HostAct::BLOCK, HostAct::HOLD, HostAct(9)] {
            assert_eq!(act(&mut platform, unknown), HOST_ACT_NOT_POSSIBLE);
        }
    }

    #[test]
    fn a_host_is_as_hostile_as_the_settings_say() {
        for (settings, willing) in [
            ("oracle=on", &[][..]),
            ("oracle=on\nhostile=remap", &[HostAct::EXCHANGE]),
            (
                "oracle=on\nhostile=re-add",
                &[HostAct::RE_ADD, HostAct::RE_ADD_2M],
            ),
            (
                "oracle=on\nhostile=messages-lost",
                &[
                    HostAct::LOSE_ANSWER,
                    HostAct::SAY_BUSY,
                    HostAct::DROP_MESSAGE,
                ],
            ),
        ] {
            for act in [
                HostAct::EXCHANGE,
                HostAct::RE_ADD,
                HostAct::RE_ADD_2M,
                HostAct::LOSE_ANSWER,
                HostAct::TAMPER_ANSWER,
                HostAct::SAY_BUSY,
                HostAct::DROP_MESSAGE,
            ] {
                let mut platform = platform(settings);
                let back = HostAct::BACK_BY_2M.0;
                ask(&mut platform, Call::HOST_ACT, BLOCK.get(), back);
                let would = ask(&mut platform, Call::HOST_WOULD, act.0, 0).rax;
                assert_eq!(would == 1, willing.contains(&act), "{settings} {act:?}");
                let did = ask(&mut platform, Call::HOST_ACT, BLOCK.get(), act.0).rax;
                assert_eq!(did == HOST_ACT_DONE, willing.contains(&act));
            }
        }
    }

    /// The three hosts of the issue: PVALIDATE would succeed with CF=0 on what was validated.
    #[test]
    fn a_second_validation_is_seen_whatever_the_host_did_between() {
        let hosts = [
            ("remap", HostAct::EXCHANGE, PageSize::Size4K),
            ("re-add", HostAct::RE_ADD, PageSize::Size4K),
            ("re-add", HostAct::RE_ADD_2M, PageSize::Size2M),
        ];
        for (hostile, act, size) in hosts {
            let mut platform = platform(&format!("oracle=on\nbacking=2m\nhostile={hostile}"));
            assert_eq!(platform.pval(BLOCK, size, true), (0, false));
            assert_eq!(platform.counters.violations.double_validation, 0);
            let answer = ask(&mut platform, Call::HOST_ACT, BLOCK.get(), act.0);
            assert_eq!(answer.rax, HOST_ACT_DONE);
            assert!(!flags(&mut platform).contains(PageFlags::VALIDATED));
            assert_eq!(platform.pval(BLOCK, size, true), (0, false), "CF=0");
            assert_eq!(platform.counters.violations.double_validation, 1, "{act:?}");
            // With a rescind between it is the first again.
            assert_eq!(platform.pval(BLOCK, size, false), (0, false));
            assert_eq!(platform.pval(BLOCK, size, true), (0, false));
            assert_eq!(platform.counters.violations.double_validation, 1);
        }
    }

    #[test]
    fn a_page_that_is_put_back_is_as_it_was() {
        let mut platform = platform("oracle=on\nbacking=2m\nhostile=remap");
        platform.accept(BLOCK, 0xF01);
        let spa = platform.spa_of(BLOCK).unwrap();
        platform.memory().write_u64(spa, 77);
        let exchange = HostAct::EXCHANGE.0;
        for (valid, masks) in [(false, 0xF), (true, 0xF0F), (false, 0xF)] {
            ask(&mut platform, Call::HOST_ACT, BLOCK.get(), exchange);
            assert_eq!(
                platform.memory().read_u64(spa) == 77,
                valid,
                "contents follow the page"
            );
            let page = ask(&mut platform, Call::PAGE, BLOCK.get(), 0);
            let flags = PageFlags::from_bits_truncate(page.rax);
            assert!(flags.contains(PageFlags::ASSIGNED));
            assert_eq!(flags.contains(PageFlags::VALIDATED), valid);
            assert_eq!(page.rdx, Some(masks));
            assert!(platform.has_news(), "mappings are withdrawn");
            let _ = platform.take_invalidations();
        }
    }

    #[test]
    fn without_a_map_there_is_no_agreement() {
        let mut platform = platform("oracle=on");
        assert_eq!(ask(&mut platform, Call::REFEREE, 0, 0).rax, u64::MAX);
    }
}
