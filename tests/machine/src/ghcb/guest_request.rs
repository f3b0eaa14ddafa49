//! SNP guest requests: the host's part (`ghcb.md` §8).
//!
//! The host copies the request page, has the security processor answer it, and copies the answer back. To an
//! extended request for a report it adds its table of certificates, if there is room for it; if there is not,
//! nobody is asked. All pages are shared memory, which the guest and devices may change meanwhile, so each is
//! copied once.
//!
//! With `hostile=messages-…` it lies when the test guest says so ([`Lie`]), once. Where there is none to say so it
//! has the lie of its name for every message, once it has carried one answer honestly.

use alloc::boxed::Box;
use alloc::format;

use protocols::amd_sp::message::{MessageHeader, MessageType};
use protocols::amd_sp::{FirmwareStatus, GuestRequestOutcome, HostStatus};
use protocols::exit_code::ExitCode;
use protocols::ghcb::page::Field;
use protocols::oracle::HostAct;
use zerocopy::FromBytes;

use super::Reply;
use super::page::{Exchange, Failure};
use crate::amd_sp::Answer;
use crate::memory::PhysicalMemory;
use crate::platform::Platform;
use crate::settings::Hostile;
use crate::types::{Gpa, PAGE_SIZE, Spa};

/// Bytes of an empty table of certificates: its end mark.
const EMPTY_TABLE: usize = 24;
/// Pages that a host which asks for too much asks for.
const ABSURD_PAGES: u64 = 0x1000;
/// Where the host flips a bit: in the payload.
const FLIPPED: usize = MessageHeader::SIZE + 1;

/// How the host lies about the next message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lie {
    /// It carries back the answer to an earlier message.
    Replay,
    /// It changes a bit of the answer.
    Tamper,
    /// The message is answered, and the answer does not get back.
    Lose,
    /// The message never gets to the firmware, and the guest hears that it did.
    Drop,
    /// It says "busy" and does nothing.
    Busy,
    /// It wants more room for certificates than anybody has.
    TooManyCertificates,
    /// It says that the firmware failed.
    Fail,
}

impl Lie {
    /// The lie that the test guest asks for.
    pub(crate) const fn of(act: HostAct) -> Option<Self> {
        Some(match act {
            HostAct::REPLAY_ANSWER => Self::Replay,
            HostAct::TAMPER_ANSWER => Self::Tamper,
            HostAct::LOSE_ANSWER => Self::Lose,
            HostAct::DROP_MESSAGE => Self::Drop,
            HostAct::SAY_BUSY => Self::Busy,
            HostAct::TOO_MANY_CERTIFICATES => Self::TooManyCertificates,
            HostAct::SAY_FAILED => Self::Fail,
            _ => return None,
        })
    }
}

/// What the host keeps about guest requests.
#[derive(Default)]
pub struct Courier {
    /// The table of certificates, if the host has one.
    pub certificates: Box<[u8]>,
    /// What it does to the next message.
    pub(crate) lie: Option<Lie>,
    /// The last answer that it carried.
    last: Option<Box<[u8]>>,
}

impl<P: PhysicalMemory> Platform<P> {
    pub(super) fn serve_guest_request(
        &mut self,
        code: ExitCode,
        exchange: &mut Exchange,
    ) -> Result<Reply, Failure> {
        let (request, response) = (Gpa::new(exchange.info_1()?), Gpa::new(exchange.info_2()?));
        let extended = code == ExitCode::EXTENDED_GUEST_REQUEST;
        let room = if extended {
            Some((
                Gpa::new(exchange.get(Field::RAX, "RAX")?),
                exchange.get(Field::RBX, "RBX")?,
            ))
        } else {
            None
        };
        let (Some(from), Some(to)) = (self.shared_page(request), self.shared_page(response)) else {
            let text = format!("guest request pages {request} and {response}: not both shared");
            return Err(Failure::input(text));
        };
        if request == response {
            let text = format!("guest request and response in one page, {request}");
            return Err(Failure::input(text));
        }
        let mut page = [0; PAGE_SIZE as usize];
        self.memory.read(from, &mut page);

        let lie = self.courier.lie.take().or_else(|| self.habitual_lie());
        let outcome = match lie {
            Some(Lie::Busy) => GuestRequestOutcome::of_host(HostStatus::BUSY),
            Some(Lie::Drop) => GuestRequestOutcome::OK,
            Some(Lie::Fail) => GuestRequestOutcome::of_firmware(FirmwareStatus::INVALID_PARAM),
            Some(Lie::TooManyCertificates) if room.is_some() => {
                exchange.put(Field::RBX, ABSURD_PAGES);
                GuestRequestOutcome::of_host(HostStatus::INVALID_LENGTH)
            }
            _ => match self.certify(&page, room, exchange)? {
                Some(refused) => refused,
                None => self.carry(&page, to, lie),
            },
        };
        exchange.put(Field::EXIT_INFO_2, outcome.encode());
        Ok(Reply::Resume)
    }

    /// The lie of a host that nobody tells when to lie.
    fn habitual_lie(&self) -> Option<Lie> {
        if self.settings.oracle || self.courier.last.is_none() {
            return None;
        }
        let is_host = |(host, lie)| self.settings.is_hostile(host).then_some(lie);
        [
            (Hostile::MessagesTampered, Lie::Tamper),
            (Hostile::MessagesReplayed, Lie::Replay),
            (Hostile::MessagesLost, Lie::Lose),
        ]
        .into_iter()
        .find_map(is_host)
    }

    /// Has the message answered, and writes the answer to `to`.
    fn carry(
        &mut self,
        page: &[u8; PAGE_SIZE as usize],
        to: Spa,
        lie: Option<Lie>,
    ) -> GuestRequestOutcome {
        let answer: Answer = match &mut self.security_processor {
            Some(processor) => processor.answer(page),
            // A guest that is not launched by it.
            None => Err(FirmwareStatus::UNSUPPORTED),
        };
        let answer = match answer {
            Ok(answer) => answer.into_boxed_slice(),
            Err(status) => return GuestRequestOutcome::of_firmware(status),
        };
        let carried = match lie {
            Some(Lie::Lose) => None,
            Some(Lie::Replay) => self.courier.last.clone(),
            Some(Lie::Tamper) => {
                let mut answer = answer.clone();
                if let Some(byte) = answer.get_mut(FLIPPED) {
                    *byte ^= 1;
                }
                Some(answer)
            }
            _ => Some(answer.clone()),
        };
        if let Some(carried) = carried {
            self.memory.write(to, &carried);
        }
        self.courier.last = Some(answer);
        GuestRequestOutcome::OK
    }

    /// Writes the certificates, if the message asks for a report; what the guest is told if they do not fit.
    fn certify(
        &mut self,
        page: &[u8; PAGE_SIZE as usize],
        room: Option<(Gpa, u64)>,
        exchange: &mut Exchange,
    ) -> Result<Option<GuestRequestOutcome>, Failure> {
        let Some((gpa, pages)) = room else {
            return Ok(None);
        };
        let asks_for_report = MessageHeader::read_from_prefix(page)
            .is_ok_and(|(header, _)| header.message_type == MessageType::REPORT_REQUEST);
        let table = &self.courier.certificates;
        if !asks_for_report || (table.is_empty() && pages == 0) {
            return Ok(None);
        }
        let empty = [0; EMPTY_TABLE];
        let table: &[u8] = if table.is_empty() { &empty } else { table };
        let needed = (table.len() as u64).div_ceil(PAGE_SIZE);
        if pages < needed {
            exchange.put(Field::RBX, needed);
            return Ok(Some(GuestRequestOutcome::of_host(
                HostStatus::INVALID_LENGTH,
            )));
        }
        for (index, chunk) in table.chunks(PAGE_SIZE as usize).enumerate() {
            let at = gpa.checked_add(index as u64 * PAGE_SIZE);
            let spa = at.and_then(|at| self.shared_page(at)).ok_or_else(|| {
                Failure::input(format!("certificates at {gpa}: not {needed} shared pages"))
            })?;
            self.memory.write(spa, chunk);
        }
        Ok(None)
    }
}
