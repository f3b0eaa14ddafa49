//! The guest's memory: acceptance, conversion, and accesses to pages that it has not accepted.

use accept::{Backend, Block, Error, Frame, OnNoChange, Operation, PageSize, PageState};
use protocols::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE};
use protocols::launch::{READ_AHEAD_LIMIT, Touch};
use protocols::tdx::l2::{Exit, ExtendedType};
use protocols::tdx::metadata::TdControls;
use protocols::tdx::ve::{EptViolation, ExitReason, VeInfo};
use protocols::tdx::vmcall::register::RCX;
use protocols::tdx::vmcall::{Status as HostStatus, SubFunction};
use protocols::tdx::{Operand, Status};
use protocols::terminate::TurnstileReason;

use super::tdcall::Done;
use super::vp::{Debt, Vp};
use super::{Domain, Next, Service};
use crate::ahead::HostLied;
use crate::memory::layout::largest_block;
use crate::platform::tdx::map_gpa::{Answer, Conversion};

/// How much one request converts at most; the guest asks for the rest again (I8).
pub const CONVERTED_AT_ONCE: u64 = 16 << 20;

/// How much one request accepts at most beyond what it asks for (I8).
const READ_AHEAD_ROOM: u64 = READ_AHEAD_LIMIT as u64 * LARGE_PAGE_SIZE;

/// Level of a 2 MiB page in operands and statuses.
const LEVEL_2M: u32 = 1;

/// Whether an address lies in the private half: no shared bit, and nothing above.
pub(super) const fn is_private(gpa: u64, shared: u64) -> bool {
    gpa < shared
}

/// The operand of a page leaf, decoded.
pub(super) struct PageOperand(Block);

impl PageOperand {
    /// Reserved bits, level and alignment, then whether it is private (facts: tdx §2, rows 1 and 2).
    fn decode(rcx: u64, shared: u64) -> Option<Self> {
        const LEVEL: u64 = 7;
        let gpa = rcx & !LEVEL;
        let size = match rcx & LEVEL {
            0 => PageSize::Size4K,
            1 => PageSize::Size2M,
            _ => return None,
        };
        if !is_private(gpa, shared) {
            return None;
        }
        let block = Block::try_new(Frame::starting_at(gpa)?, size).ok()?;
        Some(Self(block))
    }

    /// The page that an operand of TDG.MEM.PAGE.ATTR.RD names.
    pub(super) const fn page_of(raw: u64) -> u64 {
        raw & !(PAGE_SIZE - 1)
    }
}

impl<B: Backend, D: Domain> Service<'_, B, D> {
    /// TDG.MEM.PAGE.ACCEPT, through the engine. The engine splits what the host holds as small pages,
    /// so the guest meets a size mismatch only where it has accepted small pages itself.
    pub(super) fn accept(&self, vp: &mut Vp) -> Done {
        let Some(PageOperand(block)) = PageOperand::decode(vp.gprs()[RCX], self.shared()) else {
            return Operand::RCX.into();
        };
        match self.engine.accept(block, OnNoChange::Fail) {
            Ok(_) => self.read_ahead(block),
            Err(Error::NoChange) => self.already_accepted(block),
            // Nothing that the guest could accept: no memory, or not the guest's (I4).
            Err(Error::Owned | Error::OutOfRange | Error::NotAccepted) => Operand::RCX.into(),
            Err(Error::Busy) => busy(),
            Err(Error::HostLied) => Done::End(self.lie_about(block)),
            Err(Error::Backend { operation, status }) => not_accepted(operation, Status(status)),
        }
    }

    /// What the host lied in, by the block's first page: it was accepted before we did so, or it was
    /// ready and is another page now.
    fn lie_about(&self, block: Block) -> TurnstileReason {
        match self.domain.mapping(Gpa::new(block.gpa())) {
            Ok(mapping) if mapping.pending => TurnstileReason::NOT_VALIDATED,
            _ => TurnstileReason::ALREADY_VALID,
        }
    }

    /// The answer to an accept that is done, and the regions behind it, if the policy is so.
    fn read_ahead(&self, block: Block) -> Done {
        if block.size() == PageSize::Size2M
            && let Err(HostLied) = self
                .ahead
                .prepare_behind(self.engine, block, READ_AHEAD_ROOM)
        {
            return Done::End(TurnstileReason::ALREADY_VALID);
        }
        Status::SUCCESS.into()
    }

    /// The module's answer where a page of the block is accepted already: by the level that it is
    /// mapped at.
    fn already_accepted(&self, block: Block) -> Done {
        let first = block.first();
        let at = Gpa::new(block.gpa());
        let level = match self
            .engine
            .while_accepted(first, || self.domain.mapping(at))
        {
            // I6: the host has put another page there, and wants it accepted.
            Ok(Ok(mapping)) if mapping.pending => {
                return Done::End(TurnstileReason::NOT_VALIDATED);
            }
            Ok(Ok(mapping)) => mapping.level,
            Ok(Err(status)) => return refused(status),
            Err(Error::Busy) => return busy(),
            // The first page is not: only small pages can be accepted one by one.
            Err(_) => 0,
        };
        match block.size() {
            PageSize::Size2M if level != LEVEL_2M => {
                Done::Status(Status::PAGE_SIZE_MISMATCH.with(LEVEL_2M))
            }
            _ => Done::Status(Status::PAGE_ALREADY_ACCEPTED.with(level)),
        }
    }

    /// Copies from memory that the guest has accepted. The bytes lie in one page.
    pub(super) fn read_accepted(&self, gpa: u64, bytes: &mut [u8]) -> Result<(), Done> {
        let frame = Frame::containing(gpa);
        let read = self
            .engine
            .while_accepted(frame, || self.domain.read(Gpa::new(gpa), bytes));
        copied(read, gpa)
    }

    /// Copies to memory that the guest has accepted. The bytes lie in one page.
    pub(super) fn write_accepted(&self, gpa: u64, bytes: &[u8]) -> Result<(), Done> {
        let frame = Frame::containing(gpa);
        let written = self
            .engine
            .while_accepted(frame, || self.domain.write(Gpa::new(gpa), bytes));
        copied(written, gpa)
    }

    /// An access that the secure EPT does not allow.
    pub(super) fn access(&self, vp: &mut Vp, exit: &Exit) -> Next {
        let gpa = exit.gpa;
        let told = EptViolation::from_bits_retain(exit.qualification);
        // Bits above the width are reserved in the guest's tables.
        if gpa >= self.shared() << 1 && told.contains(EptViolation::LINEAR_ADDRESS) {
            vp.reserved_bits(exit.gla, told, exit.cpl & 3 == 3);
            return Next::Resume;
        }
        if !is_private(gpa, self.shared()) {
            // A device: the guest's handler asks for the access.
            vp.virtualization(violation(exit));
            return Next::Resume;
        }
        let frame = Frame::containing(gpa);
        match self.engine.state(frame) {
            Some(PageState::Accepted) => self.access_to_accepted(frame, exit),
            Some(PageState::Unaccepted | PageState::Ahead) if self.touch == Touch::ACCEPT => {
                self.accept_touched(frame)
            }
            // I4: what is the paravisor's is to the guest what no memory is.
            Some(_) | None => {
                if self.td.controls().contains(TdControls::PENDING_VE_DISABLE) {
                    return Next::End(TurnstileReason::L2_MEMORY);
                }
                vp.virtualization(violation(exit));
                Next::Resume
            }
        }
    }

    /// An operand of a leaf lies in a page that is not accepted: an access to it.
    pub(super) fn pending_operand(&self, vp: &mut Vp, gpa: u64) -> Next {
        let exit = Exit {
            qualification: EptViolation::READ.bits(),
            gpa,
            ..Exit::new(ExitReason::EPT_VIOLATION)
        };
        self.access(vp, &exit)
    }

    /// I6: a page that the map says is the guest's is pending. The host has removed it and put another
    /// there. Unless another processor of the guest's has accepted it meanwhile: then it is not pending
    /// any more, and the access is made again.
    fn access_to_accepted(&self, frame: Frame, exit: &Exit) -> Next {
        let page = Gpa::new(frame.gpa());
        match self
            .engine
            .while_accepted(frame, || self.domain.mapping(page))
        {
            Ok(Ok(mapping)) if mapping.pending => Next::End(TurnstileReason::NOT_VALIDATED),
            Ok(Ok(_)) => Next::Resume,
            Ok(Err(_)) if exit.extended_type() == ExtendedType::PENDING_EPT_VIOLATION => {
                Next::End(TurnstileReason::NOT_VALIDATED)
            }
            Ok(Err(_)) | Err(_) => Next::Resume,
        }
    }

    /// Accepts what the guest has touched: all of the 2 MiB around it if that is its memory.
    fn accept_touched(&self, frame: Frame) -> Next {
        let accepted = match self.engine.accept_around(frame) {
            Err(Error::Owned | Error::OutOfRange) => {
                self.engine.accept(Block::page(frame), OnNoChange::Ignore)
            }
            other => other,
        };
        match accepted {
            Ok(_) | Err(Error::Busy) => Next::Resume,
            Err(Error::HostLied) => Next::End(TurnstileReason::ALREADY_VALID),
            Err(_) => Next::End(TurnstileReason::TD_ACCEPT),
        }
    }

    /// MapGPA: the map changes first, then the host is asked; R10 and R11.
    ///
    /// # Errors
    ///
    /// Why the machine ends.
    pub(super) fn map_gpa(
        &self,
        vp: &mut Vp,
        start: u64,
        bytes: u64,
    ) -> Result<(HostStatus, u64), TurnstileReason> {
        let shared = self.shared();
        let alias = start & shared;
        let within = start
            .checked_add(bytes)
            .filter(|&end| bytes != 0 && end - 1 < shared << 1 && (end - 1) & shared == alias);
        let Some(end) = within else {
            return Ok((HostStatus::INVALID_OPERAND, 0));
        };
        if !start.is_multiple_of(PAGE_SIZE) || !bytes.is_multiple_of(PAGE_SIZE) {
            return Ok((HostStatus::ALIGN_ERROR, 0));
        }
        let stop = end.min(start + CONVERTED_AT_ONCE);
        let mut at = start;
        while at < stop {
            if vp.debt.is_some() {
                return Ok((HostStatus::RETRY, at));
            }
            let first = Frame::containing(at & !shared);
            let block = largest_block(first, (stop - at) / PAGE_SIZE);
            let (status, done) = if alias == 0 {
                self.to_private(block)?
            } else {
                self.to_shared(vp, block)?
            };
            at += done;
            if status != HostStatus::SUCCESS {
                return Ok((status, at));
            }
        }
        if stop < end {
            return Ok((HostStatus::RETRY, stop));
        }
        Ok((HostStatus::SUCCESS, 0))
    }

    /// Takes a block from the guest and has the host share it; status, and how many bytes are done.
    ///
    /// Until the host has answered, the block is nobody's: what another processor of the guest's asks
    /// for it is refused.
    fn to_shared(&self, vp: &mut Vp, block: Block) -> Result<(HostStatus, u64), TurnstileReason> {
        let bytes = block.size().bytes();
        let conversion =
            Conversion::to_shared(block.gpa(), bytes).ok_or(TurnstileReason::INTERNAL)?;
        let withdrawn = match self.engine.withdraw(block, OnNoChange::Ignore) {
            Ok(withdrawn) => withdrawn,
            Err(Error::Busy) => return Ok((HostStatus::RETRY, 0)),
            Err(Error::HostLied) => return Err(TurnstileReason::NOT_VALIDATED),
            Err(Error::Backend { .. }) => return Err(TurnstileReason::TD_ATTRIBUTES),
            Err(_) => return Ok((HostStatus::INVALID_OPERAND, 0)),
        };
        if let Some(owed) = withdrawn.flush()
            && self.engine.flush(owed).is_err()
        {
            // As if nobody had asked: any processor may ask again.
            vp.debt = self.engine.reinstate(withdrawn).map(Debt::Reinstate);
            return Ok((HostStatus::RETRY, 0));
        }
        // The guest has lost the pages: a host that does not take them now gets no second chance to
        // put others there.
        if self.convert(conversion)? != HostStatus::SUCCESS {
            return Err(TurnstileReason::TD_MAP_GPA);
        }
        vp.debt = self.engine.settle(withdrawn).map(Debt::Settle);
        Ok((HostStatus::SUCCESS, bytes))
    }

    /// Brings a block to its end that is still on its way, if its lock can be had.
    pub(super) fn pay(&self, vp: &mut Vp) {
        vp.debt = match vp.debt.take() {
            Some(Debt::Settle(block)) => self.engine.settle(block).map(Debt::Settle),
            Some(Debt::Reinstate(block)) => self.engine.reinstate(block).map(Debt::Reinstate),
            None => None,
        };
    }

    /// Has the host make a block private again. It stays unaccepted.
    fn to_private(&self, block: Block) -> Result<(HostStatus, u64), TurnstileReason> {
        let bytes = block.size().bytes();
        if self.engine.is_owned(block) != Ok(false) {
            return Ok((HostStatus::INVALID_OPERAND, 0));
        }
        let conversion =
            Conversion::to_private(block.gpa(), bytes).ok_or(TurnstileReason::INTERNAL)?;
        let status = self.convert(conversion)?;
        let done = if status == HostStatus::SUCCESS {
            bytes
        } else {
            0
        };
        Ok((status, done))
    }

    /// Asks the host for a conversion until it is done; its status otherwise.
    fn convert(&self, mut left: Conversion) -> Result<HostStatus, TurnstileReason> {
        let shared = self.shared();
        loop {
            let start = left.start() | left.alias_bit(shared);
            let asked = [0, SubFunction::MAP_GPA.0, start, left.bytes(), 0, 0];
            let [status, next, ..] = self
                .domain
                .ask_host(asked)
                .map_err(|_| TurnstileReason::TD_VMCALL)?;
            match left.take_answer(HostStatus(status), next, shared) {
                Answer::Done => return Ok(HostStatus::SUCCESS),
                Answer::Again => {}
                Answer::Refused(status) => return Ok(status),
                Answer::Stuck => return Err(TurnstileReason::TD_MAP_GPA),
            }
        }
    }
}

/// What a copy under the engine's lock came to.
fn copied(result: Result<Result<(), super::Unreachable>, Error>, gpa: u64) -> Result<(), Done> {
    match result {
        Ok(Ok(())) => Ok(()),
        Err(Error::NotAccepted) => Err(Done::Pending(gpa)),
        Err(Error::Busy) => Err(busy()),
        // The host has taken the page: an access of ours to it does not come back.
        Ok(Err(super::Unreachable)) => Err(Done::End(TurnstileReason::NOT_VALIDATED)),
        Err(_) => Err(Operand::RCX.into()),
    }
}

pub(super) fn busy() -> Done {
    Done::Status(Status::OPERAND_BUSY.with(Operand::RCX.0))
}

/// Why L1 was refused a page, as the guest would hear it of the module: its entry was busy for longer than
/// the paravisor asks (I12), the host's right of way or not, or it is no page.
pub(super) fn refused(status: Status) -> Done {
    if status.is_busy() {
        return busy();
    }
    Operand::RCX.into()
}

/// An accept that was not carried out. Where the page is accepted but could not be given to the guest's VM,
/// of which the guest knows nothing, the next request gives it: busy.
fn not_accepted(operation: Operation, status: Status) -> Done {
    match operation {
        Operation::Grant => busy(),
        _ => refused(status),
    }
}

/// The information of a #VE for an access.
const fn violation(exit: &Exit) -> VeInfo {
    VeInfo {
        reason: exit.reason,
        qualification: exit.qualification,
        gla: exit.gla,
        gpa: exit.gpa,
        instruction_length: 0,
        instruction_info: 0,
    }
}
