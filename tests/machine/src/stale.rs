//! Translations that outlived the right behind them.
//!
//! PVALIDATE and RMPADJUST change the RMP; another CPU that is inside the guest at that moment
//! goes on with what its TLB holds until it leaves (`snp-isa.md` §4, APM 15.36.15). So a
//! paravisor that withdraws rights has to make every CPU leave, or see that it is out, before
//! it relies on the withdrawal: before the guest hears that the call is done, and before a page
//! becomes a VMSA.
//!
//! The book here says which CPU may hold what, and since which of its entries. The CPU side
//! writes it (it knows who is inside, and whose nested tables lost a mapping) and tells who has
//! left since; the judgement is made here.
//!
//! Invariant: a record whose holder has left since means nothing. [`Stale::forget_those_who_left`]
//! is asked before every look.

use alloc::vec::Vec;

use crate::types::{Gpa, VcpuId, Vmpl};

/// One stay of a CPU inside the guest: from an entry to the exit that follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stay {
    /// Whose.
    pub cpu: VcpuId,
    /// Its exits before this stay.
    pub exits: u64,
    /// The level that runs.
    pub vmpl: Vmpl,
}

/// What one CPU may still use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Record {
    holder: Stay,
    /// The CPU whose VMPL0 withdrew the right.
    by: VcpuId,
    start: u64,
    end: u64,
    /// The pages were validated since, so to have the right again is not to have had it always.
    anew: bool,
    /// The right is back, and nothing happened in between.
    undone: bool,
}

/// A stale translation that somebody relied on being gone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Finding {
    /// Who may still use it.
    pub holder: VcpuId,
    /// The first page.
    pub gpa: Gpa,
}

/// The book of stale translations.
#[derive(Default)]
pub struct Stale {
    records: Vec<Record>,
}

impl Stale {
    /// Whether nobody holds anything, as far as is known.
    pub const fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// VMPL0 of `by` withdrew `[gpa, gpa + bytes)` while `holder` was inside.
    pub fn note(&mut self, by: VcpuId, holder: Stay, gpa: Gpa, bytes: u64) {
        let (start, end) = (gpa.get(), gpa.get() + bytes);
        // Requests walk upwards, with several instructions for each page.
        let same = |record: &&mut Record| {
            record.holder == holder
                && record.by == by
                && !(record.anew || record.undone)
                && record.start <= start
                && start <= record.end
        };
        match self.records.iter_mut().rev().find(same) {
            Some(record) => record.end = record.end.max(end),
            None => self.records.push(Record {
                holder,
                by,
                start,
                end,
                anew: false,
                undone: false,
            }),
        }
    }

    /// Drops the records of stays that are over.
    pub fn forget_those_who_left(&mut self, is_inside: impl Fn(Stay) -> bool) {
        self.records.retain(|record| is_inside(record.holder));
    }

    /// `[gpa, gpa + bytes)` was validated: whoever holds an old translation could have written
    /// to what is scrubbed from now on, whatever rights are granted later.
    pub fn validated(&mut self, gpa: Gpa, bytes: u64) {
        let (start, end) = (gpa.get(), gpa.get() + bytes);
        for record in &mut self.records {
            record.anew |= record.start < end && start < record.end;
        }
    }

    /// Level `target` has all rights to `[gpa, gpa + bytes)` again. Where they were only
    /// withdrawn in between (a flush was in vain, and the withdrawal undone), a translation that
    /// outlived that allows no more than a new one, and nobody was told that it is gone. It stays
    /// on record: the next withdrawal has to get rid of it, and may find no mapping to note.
    pub fn restored(&mut self, target: Vmpl, gpa: Gpa, bytes: u64) {
        let (start, end) = (gpa.get(), gpa.get() + bytes);
        for record in &mut self.records {
            let inside = start <= record.start && record.end <= end;
            record.undone |= inside && record.holder.vmpl == target && !record.anew;
        }
    }

    /// VMPL0 of `by` withdraws rights to `[gpa, gpa + bytes)`, mapped or not: what was undone
    /// counts again.
    pub fn withdrawn(&mut self, by: VcpuId, gpa: Gpa, bytes: u64) {
        let (start, end) = (gpa.get(), gpa.get() + bytes);
        for record in &mut self.records {
            if record.undone && record.start < end && start < record.end {
                (record.undone, record.by) = (false, by);
            }
        }
    }

    /// A page of `[gpa, gpa + bytes)` that some CPU may still use.
    pub fn find(&self, gpa: Gpa, bytes: u64) -> Option<Finding> {
        self.overlapping(gpa, bytes).next().map(|record| Finding {
            holder: record.holder.cpu,
            gpa: Gpa::new(record.start.max(gpa.get())),
        })
    }

    /// Whether `cpu` may still use a page of `[gpa, gpa + bytes)`.
    pub fn is_held_by(&self, cpu: VcpuId, gpa: Gpa, bytes: u64) -> bool {
        self.overlapping(gpa, bytes)
            .any(|record| record.holder.cpu == cpu)
    }

    fn overlapping(&self, gpa: Gpa, bytes: u64) -> impl Iterator<Item = &Record> {
        let (start, end) = (gpa.get(), gpa.get() + bytes);
        self.records
            .iter()
            .filter(move |record| record.start < end && start < record.end)
    }

    /// The guest is told that what `by` withdrew is gone. What is not is returned, the first
    /// of it, and forgotten: it is told once.
    pub fn settle(&mut self, by: VcpuId) -> Option<Finding> {
        let first = self
            .records
            .iter()
            .find(|record| record.by == by && !record.undone)
            .map(|record| Finding {
                holder: record.holder.cpu,
                gpa: Gpa::new(record.start),
            });
        self.records
            .retain(|record| record.by != by || record.undone);
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::PAGE_SIZE;

    const A: VcpuId = VcpuId(0);
    const B: Stay = Stay {
        cpu: VcpuId(1),
        exits: 7,
        vmpl: Vmpl::VMPL1,
    };
    const PAGE: Gpa = Gpa::new(0x20_0000);

    fn page(index: u64) -> Gpa {
        Gpa::new(PAGE.get() + index * PAGE_SIZE)
    }

    #[test]
    fn an_answer_finds_what_its_own_call_withdrew_and_only_once() {
        let mut stale = Stale::default();
        stale.note(A, B, PAGE, PAGE_SIZE);
        assert_eq!(stale.settle(VcpuId(2)), None, "somebody else's call");
        let found = Finding {
            holder: B.cpu,
            gpa: PAGE,
        };
        assert_eq!(stale.settle(A), Some(found));
        assert_eq!(stale.settle(A), None);
    }

    #[test]
    fn a_withdrawal_that_was_undone_is_none() {
        let noted = || {
            let mut stale = Stale::default();
            stale.note(A, B, page(2), PAGE_SIZE);
            stale
        };
        let mut stale = noted();
        stale.restored(Vmpl::VMPL2, page(2), PAGE_SIZE);
        stale.restored(Vmpl::VMPL1, page(3), PAGE_SIZE);
        assert!(!stale.is_empty(), "another level, another page");
        stale.restored(Vmpl::VMPL1, page(2), PAGE_SIZE);
        assert_eq!(stale.settle(A), None);
        assert!(stale.find(page(2), PAGE_SIZE).is_some(), "not for a VMSA");
        // Withdrawn again, by another CPU: nothing was mapped, so nothing is noted anew.
        stale.withdrawn(VcpuId(2), page(2), PAGE_SIZE);
        assert_eq!(stale.settle(A), None);
        assert!(stale.settle(VcpuId(2)).is_some());
        // Validated, scrubbed and granted: the old translation could have been used meanwhile.
        let mut stale = noted();
        stale.validated(page(0), 8 * PAGE_SIZE);
        stale.restored(Vmpl::VMPL1, page(2), PAGE_SIZE);
        assert!(stale.settle(A).is_some());
        // Part of what was withdrawn is not all of it.
        let mut stale = noted();
        stale.note(A, B, page(3), PAGE_SIZE);
        stale.restored(Vmpl::VMPL1, page(2), PAGE_SIZE);
        assert!(stale.settle(A).is_some());
    }

    #[test]
    fn who_left_holds_nothing() {
        let mut stale = Stale::default();
        stale.note(A, B, PAGE, PAGE_SIZE);
        stale.forget_those_who_left(|stay| stay.exits == B.exits);
        assert!(!stale.is_empty(), "still the same stay");
        // The next stay of the same CPU is another one.
        stale.forget_those_who_left(|stay| stay.exits == B.exits + 1);
        assert!(stale.is_empty());
        assert_eq!(stale.settle(A), None);
    }

    #[test]
    fn pages_are_found_by_range() {
        let mut stale = Stale::default();
        stale.note(A, B, page(2), PAGE_SIZE);
        for (gpa, bytes, held) in [
            (page(2), PAGE_SIZE, true),
            (page(1), PAGE_SIZE, false),
            (page(3), PAGE_SIZE, false),
            (page(0), 8 * PAGE_SIZE, true),
        ] {
            assert_eq!(stale.find(gpa, bytes).is_some(), held, "{gpa} {bytes:#x}");
            assert_eq!(stale.is_held_by(B.cpu, gpa, bytes), held);
        }
        assert!(!stale.is_held_by(A, page(2), PAGE_SIZE));
        assert_eq!(stale.find(page(0), 8 * PAGE_SIZE).unwrap().gpa, page(2));
    }

    #[test]
    fn the_pages_of_one_call_are_one_record() {
        let mut stale = Stale::default();
        for index in 0..512 {
            // Revoked, then rescinded.
            stale.note(A, B, page(index), PAGE_SIZE);
            stale.note(A, B, page(index), PAGE_SIZE);
        }
        assert_eq!(stale.records.len(), 1);
        stale.note(A, B, page(513), PAGE_SIZE);
        assert_eq!(stale.records.len(), 2, "a gap is not covered");
        assert!(stale.find(page(512), PAGE_SIZE).is_none());
    }
}
