//! The oracle: questions of a test guest, by plain VMMCALL (see [`protocols::oracle`]).
//!
//! It exists so that a test can prove that a refused request changed nothing. Without
//! `oracle=on` the CPU side raises #UD and never comes here.

use alloc::format;

use protocols::oracle::{Call, Counter, HOST_ACT_DONE, HOST_ACT_NOT_POSSIBLE, HostAct, PageFlags};
use protocols::report::PvalidateResults;

use crate::memory::PhysicalMemory;
use crate::platform::Platform;
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
            Counter::DOUBLE_VALIDATION => violations.double_validation,
            Counter::UNSCRUBBED_GRANT => violations.unscrubbed_grant,
            Counter::LIVE_RESCIND => violations.live_rescind,
            Counter::IMPLICIT_CONVERSION => violations.implicit_conversion,
            _ => u64::MAX,
        }
    }

    /// Does to a page what only a host can; `None` if its state does not allow it.
    fn act_as_host(&mut self, gpa: Gpa, act: HostAct) -> Option<()> {
        let place = self.host.layout().place(gpa)?;
        let memory = &self.memory;
        let result = match act {
            HostAct::BACK_BY_2M => {
                if !self.host.is_block(&place, Alias::Private) {
                    return None;
                }
                self.host.assign(memory, &place, gpa, PageSize::Size2M)
            }
            HostAct::TAKE_AWAY => self.host.take_away(memory, &place, gpa, PageSize::Size4K),
            HostAct::CONVERT_TO_SHARED => {
                self.host
                    .convert(memory, &place, gpa, PageSize::Size4K, Alias::Shared)
            }
            _ => return None,
        };
        result.ok()
    }
}
