//! The secure EPT: what an entry of the table of owned pages means in a trust domain.
//!
//! | state | entry | by |
//! |---|---|---|
//! | FREE | not assigned | TDH.MEM.PAGE.REMOVE, a conversion to shared |
//! | PENDING | assigned, not validated | TDH.MEM.PAGE.AUG, at the first use or accept of a private page |
//! | MAPPED | assigned, validated | TDG.MEM.PAGE.ACCEPT, TDH.MEM.PAGE.ADD at the launch |
//! | BLOCKED, PENDING_BLOCKED | and blocked | TDH.MEM.RANGE.BLOCK; undone when the page is used |
//!
//! A 2 MiB leaf is an entry of that size. A 2 MiB entry that is not a leaf but has a table below it
//! is a block in which some page has an entry of its own. The permissions of VMPL1 to 3 are the
//! attributes of the three L2 VMs; a page can be given to one while it is still pending, and is its
//! as soon as it is accepted. States of exported pages belong to migration, which there is not.
//!
//! The host serves every exit: it gives a page that is missing, in the granularity of its backing,
//! splits one that is larger than asked for (TDH.MEM.PAGE.DEMOTE), and unblocks.

use alloc::format;

use super::Stop;
use crate::layout::Place;
use crate::memory::PhysicalMemory;
use crate::platform::Platform;
use crate::rmp::Entry;
use crate::types::{Alias, Gpa, Kind, PageSize, Vmpl};

/// The state of a leaf.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// No page.
    Free,
    /// A page that the trust domain has not accepted.
    Pending,
    /// A page of the trust domain.
    Mapped,
    /// As before, and blocked by the host.
    Blocked,
    /// Not accepted, and blocked by the host.
    PendingBlocked,
}

impl State {
    /// The state that an entry stands for.
    pub const fn of(entry: &Entry) -> Self {
        if !entry.is_assigned() {
            return Self::Free;
        }
        match (entry.is_validated(), entry.is_blocked()) {
            (false, false) => Self::Pending,
            (false, true) => Self::PendingBlocked,
            (true, false) => Self::Mapped,
            (true, true) => Self::Blocked,
        }
    }
}

/// Where a walk to a level ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Walk {
    /// At a leaf of the level.
    Leaf(Entry),
    /// Before, at a leaf that is larger.
    Larger(Entry),
    /// At an entry of the level that has a table below it.
    Table,
    /// At nothing.
    Missing,
}

/// What an exit is about that TDG.MEM.PAGE.ACCEPT leads to.
pub const ACCEPT: &str = "accept";

/// How often the host is asked about one operand: it may have to make the page private, give it,
/// split it and unblock it.
const HOST_TURNS: u32 = 4;

impl<P: PhysicalMemory> Platform<P> {
    /// Walks to the entry of `size` for the page at `place`.
    pub(super) fn walk_sept(&self, place: &Place, size: PageSize) -> Walk {
        let rmp = self.host.rmp();
        let entry = rmp.entry(place);
        if entry.is_assigned() && entry.size() == PageSize::Size2M {
            return match size {
                PageSize::Size2M => Walk::Leaf(entry),
                PageSize::Size4K => Walk::Larger(entry),
            };
        }
        let below = match (size, place.block) {
            (PageSize::Size4K, _) if entry.is_assigned() => return Walk::Leaf(entry),
            (PageSize::Size4K, _) => false,
            (PageSize::Size2M, Some(_)) => !rmp.is_block_free(place),
            (PageSize::Size2M, None) => entry.is_assigned(),
        };
        if below { Walk::Table } else { Walk::Missing }
    }

    /// Walks for L1 until `settled` has an answer, leaving the rest to the host: the trust domain
    /// exits, the host does what is missing, the instruction is executed again.
    pub(super) fn walk_until<T>(
        &mut self,
        gpa: Gpa,
        size: PageSize,
        about: &'static str,
        settled: impl Fn(&Walk) -> Option<T>,
    ) -> Result<(Place, T), Stop> {
        let Some(place) = self.host.layout().place(gpa) else {
            let why = format!("the trust domain exits ({about} of {gpa}): there is no memory");
            return Err(Stop::Refused(why));
        };
        for _ in 0..=HOST_TURNS {
            let walk = self.walk_sept(&place, size);
            if let Some(answer) = settled(&walk) {
                return Ok((place, answer));
            }
            self.counters.count_td_exit(Vmpl::VMPL0, about);
            self.serve_exit(&place, gpa, &walk, about)?;
        }
        let why = format!("the trust domain exits ({about} of {gpa}): the host does not help");
        Err(Stop::Refused(why))
    }

    /// What the host does about an exit.
    fn serve_exit(
        &mut self,
        place: &Place,
        gpa: Gpa,
        walk: &Walk,
        about: &str,
    ) -> Result<(), Stop> {
        if self.host.attribute(place) == Alias::Shared {
            // Who accepts a page wants it private and has lost nothing in it.
            let converted = match about {
                ACCEPT => {
                    self.host.count_range(Alias::Private);
                    self.convert(gpa, PageSize::Size4K, Alias::Private).is_ok()
                }
                _ => self.convert_implicitly(Vmpl::VMPL0, place, gpa, Alias::Private, Kind::Read),
            };
            if !converted {
                return Err(Stop::Refused(format!("the host cannot make {gpa} private")));
            }
            return Ok(());
        }
        match walk {
            Walk::Larger(entry) if !entry.is_blocked() => {
                self.host.psmash(place, gpa);
                Ok(())
            }
            _ => self
                .host
                .prepare(&self.memory, place, gpa)
                .map_err(|error| {
                    Stop::Refused(format!("the host cannot give {gpa} a page: {error:?}"))
                }),
        }
    }
}
