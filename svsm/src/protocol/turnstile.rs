//! Turnstile's own protocol: accepting a range, and what the engine knows (docs/protocol.md).
//!
//! It hands out nothing that the guest could not find out by asking for pages one by one, and it
//! accepts through the same door as PVALIDATE: the engine.

use core::ops::Range;

use accept::{Backend, Block, Frame, OnNoChange};
use protocols::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE};
use protocols::launch::Acceptance;
use protocols::svsm::ResultCode;
use protocols::svsm::turnstile::{LARGEST_LOOK, TurnstileCall, TurnstileCounter};
use protocols::terminate::TurnstileReason;

use super::{
    Finished, GuestMemory, Registers, Service, Stop, VcpuIndex, Vcpus, VmsaPages, WORK_BUDGET,
    stop_for,
};
use crate::attestation::Carrier;
use crate::unaccepted::{self, NoTable};

/// First byte that no guest-physical address reaches.
const ADDRESS_END: u64 = 1 << 52;

/// What a block costs of the work a call may do, if nothing changes: some 8,000 blocks per call.
const LOOK_COST: u64 = PAGE_SIZE;

impl<B: Backend, M: GuestMemory, V: Vcpus, P: VmsaPages, C: Carrier> Service<'_, B, M, V, P, C> {
    pub(super) fn turnstile(
        &self,
        caller: VcpuIndex,
        call: u32,
        registers: &mut Registers,
    ) -> Result<Finished, Stop> {
        match TurnstileCall(call) {
            TurnstileCall::ACCEPT => self.accept_range(caller, registers)?,
            TurnstileCall::CENSUS => self.census(registers)?,
            TurnstileCall::COUNTER => registers.rcx = self.counter(registers.rcx)?,
            TurnstileCall::CONTAINS_UNACCEPTED => {
                let Looked { gpa, bytes } = Looked::check(registers)?;
                registers.rcx = self.engine.contains_unaccepted(gpa, bytes).into();
            }
            TurnstileCall::CONFIGURATION => {
                let Acceptance {
                    policy,
                    order,
                    read_ahead,
                    ..
                } = self.ahead.acceptance();
                registers.rcx = policy.0.into();
                registers.rdx = self.ahead.budget();
                registers.r8 = order.0.into();
                registers.r9 = read_ahead.into();
            }
            TurnstileCall::UNACCEPTED_TABLE => self.unaccepted_table(registers)?,
            _ => return Err(ResultCode::UNSUPPORTED_CALL.into()),
        }
        Ok(Finished::Returns)
    }

    /// Accepts block after block. RCX and RDX name what is left, whatever the outcome, so that the
    /// call repeated as it stands goes on. Pages that are accepted already are passed over.
    fn accept_range(&self, caller: VcpuIndex, registers: &mut Registers) -> Result<(), Stop> {
        let (gpa, bytes) = (registers.rcx, registers.rdx);
        let whole_pages = (gpa | bytes).is_multiple_of(PAGE_SIZE) && bytes != 0;
        if !whole_pages || gpa.checked_add(bytes).is_none_or(|end| end > ADDRESS_END) {
            return Err(ResultCode::INVALID_PARAMETER.into());
        }
        let mut work = 0;
        while registers.rdx != 0 {
            let first = Frame::containing(registers.rcx);
            let large =
                registers.rcx.is_multiple_of(LARGE_PAGE_SIZE) && registers.rdx >= LARGE_PAGE_SIZE;
            let block = if large {
                Block::region_around(first)
            } else {
                Block::page(first)
            };
            let size = block.size().bytes();
            if work + size > WORK_BUDGET {
                return Err(ResultCode::INCOMPLETE.into());
            }
            match self.engine.accept(block, OnNoChange::Ignore) {
                Ok(done) => {
                    if done.changed_pages == 0 {
                        self.vcpus.count_unchanged(caller);
                    }
                    work += (u64::from(done.changed_pages) * PAGE_SIZE).max(LOOK_COST);
                }
                // BUSY says that nothing was done.
                Err(accept::Error::Busy) if work > 0 => {
                    return Err(ResultCode::INCOMPLETE.into());
                }
                Err(error) => return Err(stop_for(error, TurnstileReason::ALREADY_VALID)),
            }
            registers.rcx += size;
            registers.rdx -= size;
        }
        Ok(())
    }

    fn census(&self, registers: &mut Registers) -> Result<(), Stop> {
        let found = self.engine.census(Looked::check(registers)?.regions()?);
        registers.rcx = found.unaccepted;
        registers.rdx = found.ahead;
        registers.r8 = found.accepted;
        registers.r9 = found.owned;
        Ok(())
    }

    /// Writes the table of a range to the guest's own memory. Its pages are looked at before anything
    /// is written, and again, under the lock of their region, when they are written to.
    fn unaccepted_table(&self, registers: &mut Registers) -> Result<(), Stop> {
        let looked = Looked::check(registers)?;
        let regions = looked.regions()?;
        let (buffer, size) = (registers.r8, registers.r9);
        let end = buffer.checked_add(size);
        if !buffer.is_multiple_of(PAGE_SIZE) || end.is_none_or(|end| end > ADDRESS_END) {
            return Err(ResultCode::INVALID_PARAMETER.into());
        }
        let room = size.min(unaccepted::largest(looked.bytes));
        for offset in (0..room).step_by(PAGE_SIZE as usize) {
            self.guests(Gpa::new(buffer + offset)).check()?;
        }
        let written = unaccepted::write_table(self.engine, regions, room, |offset, piece| {
            let gpa = Gpa::new(buffer + offset);
            self.guests(gpa).write_bytes(gpa.offset_in_page(), piece)
        });
        match written {
            Ok(bytes) => {
                registers.rcx = bytes;
                Ok(())
            }
            Err(NoTable::TooSmall { needed }) => {
                registers.rcx = needed;
                Err(ResultCode::INVALID_PARAMETER.into())
            }
            Err(NoTable::NotTaken(stop)) => Err(stop),
        }
    }

    fn counter(&self, number: u64) -> Result<u64, Stop> {
        let engine = self.engine.counters();
        let steps = self.vcpus.steps();
        Ok(match TurnstileCounter(number) {
            TurnstileCounter::ACCEPTED_4K => engine.accepted_4k,
            TurnstileCounter::ACCEPTED_2M => engine.accepted_2m,
            TurnstileCounter::ACCEPTED_BYTES => engine.accepted_bytes(),
            TurnstileCounter::CLAIMED_BYTES => engine.claimed_bytes,
            TurnstileCounter::PREPARED_BYTES => engine.prepared_bytes,
            TurnstileCounter::RESCINDED_BYTES => engine.rescinded_bytes,
            TurnstileCounter::NO_CHANGE => self.vcpus.unchanged(),
            TurnstileCounter::SPLITS => engine.splits,
            TurnstileCounter::FAILURES => engine.failures,
            TurnstileCounter::CONTENDED => engine.contended,
            TurnstileCounter::BUSY => engine.busy,
            TurnstileCounter::STEPS => steps.taken,
            TurnstileCounter::LONGEST_WAIT => steps.longest_wait,
            TurnstileCounter::FAILED_STEPS => self.ahead.failed(),
            _ => return Err(ResultCode::INVALID_PARAMETER.into()),
        })
    }
}

/// A range that may be looked at: not empty, inside the address space, of bounded size.
struct Looked {
    gpa: u64,
    bytes: u64,
}

impl Looked {
    fn check(registers: &Registers) -> Result<Self, ResultCode> {
        let (gpa, bytes) = (registers.rcx, registers.rdx);
        let end = gpa.checked_add(bytes);
        let fits = (1..=LARGEST_LOOK).contains(&bytes) && end.is_some_and(|end| end <= ADDRESS_END);
        if fits {
            Ok(Self { gpa, bytes })
        } else {
            Err(ResultCode::INVALID_PARAMETER)
        }
    }

    /// The numbers of its regions, if it is whole regions.
    fn regions(&self) -> Result<Range<u64>, ResultCode> {
        let Self { gpa, bytes } = *self;
        if (gpa | bytes).is_multiple_of(LARGE_PAGE_SIZE) {
            Ok(gpa / LARGE_PAGE_SIZE..(gpa + bytes) / LARGE_PAGE_SIZE)
        } else {
            Err(ResultCode::INVALID_PARAMETER)
        }
    }
}
