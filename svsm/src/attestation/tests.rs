//! The line against a security processor and hosts of all kinds.

use std::cell::RefCell;
use std::collections::HashMap;
use std::vec::Vec;

use aes_gcm::aead::{Aead, Payload};
use aes_gcm::{Aes256Gcm, KeyInit};
use protocols::amd_sp::certificates::{CertificateEntry, VCEK};
use protocols::amd_sp::message::{MessageHeader, MessageType};
use protocols::amd_sp::report::{AttestationReport, ReportRequest, ReportResponse};
use protocols::amd_sp::{FirmwareStatus, GuestRequestOutcome, HostStatus};
use protocols::terminate::TurnstileReason;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::channel::{SealedAnswer, SealedRequest};
use super::*;

/// What the host does with one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Host {
    Honest,
    Busy,
    /// The firmware is asked, and the answer kept.
    Loses,
    /// The firmware is not asked, and the host says it was.
    Drops,
    /// A bit of the answer at this offset is changed.
    Tampers(usize),
    /// An earlier answer comes back.
    Replays(usize),
    /// It says that the firmware failed, without asking.
    Fails,
    /// It breaks the rules of the carrying.
    Breaks,
    /// It wants more pages for certificates.
    WantsRoom,
}

/// A security processor with a host around it.
pub(crate) struct Model {
    pub key: Key,
    count: u64,
    pub script: Vec<Host>,
    /// Everything the host has ever seen.
    pub seen: Vec<Vec<u8>>,
    answers: Vec<Vec<u8>>,
    pub status: FirmwareStatus,
    pub certificates: Vec<u8>,
    /// Requests that asked for certificates, and that did not.
    pub asked: (usize, usize),
}

/// A carrier to the model; what it is told is looked at by the test.
pub(crate) struct ToModel<'m>(pub &'m RefCell<Model>);

pub(crate) const KEY: Key = [0x5A; 32];

impl Model {
    pub(crate) fn new() -> Self {
        Self {
            key: KEY,
            count: 0,
            script: Vec::new(),
            seen: Vec::new(),
            answers: Vec::new(),
            status: FirmwareStatus::SUCCESS,
            certificates: table(100),
            asked: (0, 0),
        }
    }

    fn cipher(&self) -> Aes256Gcm {
        Aes256Gcm::new(&self.key.into())
    }

    /// What the firmware does: exact numbers, real seals.
    fn answer(&mut self, request: &[u8]) -> Result<Vec<u8>, FirmwareStatus> {
        let (header, payload) = MessageHeader::read_from_prefix(request).unwrap();
        let sealed = [payload, &header.tag[..16]].concat();
        let open = self.cipher().decrypt(
            &header.iv().into(),
            Payload {
                msg: &sealed,
                aad: header.authenticated(),
            },
        );
        let open = open.map_err(|_| FirmwareStatus::BAD_MEASUREMENT)?;
        if header.sequence != self.count + 1 {
            return Err(FirmwareStatus::AEAD_OFLOW);
        }
        assert_eq!(header.message_type, MessageType::REPORT_REQUEST);
        let request = ReportRequest::read_from_bytes(&open).unwrap();
        let mut response = ReportResponse::new_zeroed();
        response.header.status = self.status;
        response.header.report_size = AttestationReport::SIZE as u32;
        response.report.version = AttestationReport::VERSION;
        response.report.vmpl = request.vmpl;
        response.report.report_data = request.report_data;
        self.count += 2;
        let size = size_of::<ReportResponse>() as u16;
        let header = MessageHeader::new(MessageType::REPORT_RESPONSE, size, 0, self.count);
        let sealed = self
            .cipher()
            .encrypt(
                &header.iv().into(),
                Payload {
                    msg: response.as_bytes(),
                    aad: header.authenticated(),
                },
            )
            .unwrap();
        let (sealed, tag) = sealed.split_at(sealed.len() - 16);
        let mut header = header;
        header.tag[..16].copy_from_slice(tag);
        Ok([header.as_bytes(), sealed].concat())
    }

    /// No two messages that the host has seen have one number and different bytes.
    pub(crate) fn assert_no_number_twice(&self) {
        let mut by_number: HashMap<u64, &Vec<u8>> = HashMap::new();
        for message in &self.seen {
            let (header, _) = MessageHeader::read_from_prefix(message).unwrap();
            let first = by_number.entry(header.sequence).or_insert(message);
            assert_eq!(*first, message, "number {} twice", header.sequence);
        }
    }
}

impl Carrier for ToModel<'_> {
    fn carry(
        &self,
        request: &SealedRequest,
        certificates: bool,
        answer: &mut SealedAnswer,
    ) -> Result<GuestRequestOutcome, TurnstileReason> {
        let mut model = self.0.borrow_mut();
        model.seen.push(request.as_bytes().to_vec());
        if certificates {
            model.asked.0 += 1;
        } else {
            model.asked.1 += 1;
        }
        let does = if model.script.is_empty() {
            Host::Honest
        } else {
            model.script.remove(0)
        };
        match does {
            Host::Busy => return Ok(GuestRequestOutcome::of_host(HostStatus::BUSY)),
            Host::Drops => return Ok(GuestRequestOutcome::OK),
            Host::Breaks => return Err(TurnstileReason::GHCB_REPLY),
            Host::Fails => {
                return Ok(GuestRequestOutcome::of_firmware(
                    FirmwareStatus::INVALID_PARAM,
                ));
            }
            Host::WantsRoom if certificates => {
                return Ok(GuestRequestOutcome::of_host(HostStatus::INVALID_LENGTH));
            }
            _ => {}
        }
        let mut bytes = match model.answer(request.as_bytes()) {
            Ok(bytes) => bytes,
            Err(status) => return Ok(GuestRequestOutcome::of_firmware(status)),
        };
        model.answers.push(bytes.clone());
        match does {
            Host::Loses => return Ok(GuestRequestOutcome::OK),
            Host::Tampers(at) => bytes[at] ^= 1,
            Host::Replays(index) => bytes = model.answers[index].clone(),
            _ => {}
        }
        answer.as_mut_bytes().copy_from_slice(&bytes);
        Ok(GuestRequestOutcome::OK)
    }

    fn certificates(&self, into: &mut [u8]) {
        let table = &self.0.borrow().certificates;
        into.fill(0);
        into[..table.len()].copy_from_slice(table);
    }
}

/// A table with one certificate of so many bytes.
pub(crate) fn table(length: u32) -> Vec<u8> {
    let entry = CertificateEntry {
        guid: VCEK,
        offset: 48,
        length,
    };
    let mut table = entry.as_bytes().to_vec();
    table.resize(48, 0);
    table.resize(48 + length as usize, 0xCE);
    table
}

pub(crate) fn line(model: &RefCell<Model>) -> Line<ToModel<'_>> {
    line_of(ToModel(model))
}

/// A line with the model's key.
pub(crate) fn line_of<C: Carrier>(carrier: C) -> Line<C> {
    let line = Line::new(carrier, Vec::leak(std::vec![0; CERTIFICATE_BYTES]));
    line.take_key(&mut { KEY });
    line
}

/// The data in the report, and the certificates.
fn ask(line: &Line<ToModel<'_>>, data: u8, certificates: bool) -> Result<(u8, usize), Refusal> {
    line.report(&[data; 64], certificates, |report, table| {
        assert_eq!((report.vmpl, report.version), (0, 3));
        assert_eq!(report.report_data, [report.report_data[0]; 64]);
        (report.report_data[0], table.len())
    })
}

#[test]
fn reports_come_with_what_was_asked_for() {
    let model = RefCell::new(Model::new());
    let line = line(&model);
    assert_eq!(ask(&line, 1, false), Ok((1, 0)));
    assert_eq!(ask(&line, 2, true), Ok((2, 148)));
    assert_eq!(ask(&line, 2, true), Ok((2, 148)));
    assert_eq!(model.borrow().asked, (2, 1));
    assert_eq!(line.host_lies(), 0);
    model.borrow().assert_no_number_twice();
}

#[test]
fn the_key_is_wiped_where_it_was_and_only_the_first_counts() {
    let model = RefCell::new(Model::new());
    let line = Line::new(ToModel(&model), Vec::leak(std::vec![0; CERTIFICATE_BYTES]));
    assert_eq!(ask(&line, 1, false), Err(Refusal::Failed), "no key yet");
    let mut key = KEY;
    line.take_key(&mut key);
    assert_eq!(key, [0; 32]);
    line.take_key(&mut [9; 32]);
    assert_eq!(ask(&line, 1, false), Ok((1, 0)));
}

#[test]
fn a_host_without_room_or_sense_costs_the_certificates_only() {
    let model = RefCell::new(Model::new());
    let line = line(&model);
    model.borrow_mut().script = std::vec![Host::WantsRoom];
    assert_eq!(ask(&line, 1, true), Ok((1, 0)));
    assert_eq!(model.borrow().asked, (1, 1), "the same message, plainly");
    for nonsense in [std::vec![0xFF; 4096], Vec::new()] {
        model.borrow_mut().certificates = nonsense;
        assert_eq!(ask(&line, 2, true), Ok((2, 0)));
    }
    model.borrow().assert_no_number_twice();
}

/// Whatever the host does, no number is used for two messages, and once it is honest again reports come.
#[test]
fn no_host_has_a_number_used_twice() {
    let rows = [
        (Host::Busy, Refusal::Busy, 0),
        (Host::Drops, Refusal::HostLied, 1),
        (Host::Fails, Refusal::Failed, 0),
        (Host::Breaks, Refusal::Failed, 0),
    ];
    for (host, refusal, lies) in rows {
        let model = RefCell::new(Model::new());
        let line = line(&model);
        assert_eq!(ask(&line, 1, true), Ok((1, 148)));
        model.borrow_mut().script = std::vec![host, host];
        assert_eq!(ask(&line, 2, true), Err(refusal), "{host:?}");
        // Another guest's question meanwhile does not get a message of its own.
        assert_eq!(ask(&line, 3, false), Err(refusal));
        assert_eq!(line.host_lies(), 2 * lies);
        let before = model.borrow().seen.len();
        // Now the first is answered, then the second asked.
        assert_eq!(ask(&line, 3, false), Ok((3, 0)));
        assert_eq!(model.borrow().seen.len(), before + 2);
        // The same question again takes the answer that was due.
        model.borrow_mut().script = std::vec![host];
        assert_eq!(ask(&line, 4, false), Err(refusal));
        let before = model.borrow().seen.len();
        assert_eq!(ask(&line, 4, true), Ok((4, 148)));
        assert_eq!(model.borrow().seen.len(), before + 1);
        model.borrow().assert_no_number_twice();
    }
}

#[test]
fn a_changed_old_or_lost_answer_is_no_answer_and_the_line_stays_closed() {
    let changed = [0, 15, 0x20, 0x30, 0x34, 0x36, 0x3C, 0x5F, 0x60, 0x51F];
    let hosts = changed
        .map(Host::Tampers)
        .into_iter()
        .chain([Host::Replays(0), Host::Loses]);
    for host in hosts {
        let model = RefCell::new(Model::new());
        let line = line(&model);
        assert_eq!(ask(&line, 1, false), Ok((1, 0)));
        model.borrow_mut().script = std::vec![host];
        assert_eq!(ask(&line, 2, false), Err(Refusal::HostLied), "{host:?}");
        assert_eq!(line.host_lies(), 1);
        // The firmware has moved on, and says so; no other message is made.
        for data in [2, 3, 3] {
            assert_eq!(ask(&line, data, true), Err(Refusal::Failed));
        }
        model.borrow().assert_no_number_twice();
    }
}

/// Bytes 16 to 31 of the tag field are no part of the tag, and a reserved word lies outside of the seal; a host
/// that changes them changes nothing.
#[test]
fn bytes_that_mean_nothing_count_for_nothing() {
    let model = RefCell::new(Model::new());
    let line = line(&model);
    for (data, at) in [(1, 16), (2, 31), (3, 0x28), (4, 0x2F)] {
        model.borrow_mut().script = std::vec![Host::Tampers(at)];
        assert_eq!(ask(&line, data, false), Ok((data, 0)));
    }
}

#[test]
fn random_hosts_never_see_a_number_twice() {
    // A fixed sequence of a linear congruential generator: any would do.
    let mut state = 7_u32;
    let mut next = |below: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) % below
    };
    for _ in 0..60 {
        let model = RefCell::new(Model::new());
        let line = line(&model);
        for _ in 0..12 {
            let host = match next(10) {
                0 => Host::Busy,
                1 => Host::Drops,
                2 => Host::Fails,
                3 => Host::Breaks,
                4 if next(4) == 0 => Host::Loses,
                5 if next(4) == 0 => Host::Tampers(next(1312) as usize),
                6 => Host::WantsRoom,
                _ => Host::Honest,
            };
            model.borrow_mut().script = std::vec![host];
            let data = next(3) as u8;
            if let Ok((told, _)) = ask(&line, data, next(2) == 0) {
                assert_eq!(told, data, "a report on another question");
            }
        }
        model.borrow().assert_no_number_twice();
    }
}

#[test]
fn what_the_firmware_refuses_is_refused_and_the_line_goes_on() {
    let model = RefCell::new(Model::new());
    let line = line(&model);
    model.borrow_mut().status = FirmwareStatus::INVALID_KEY;
    assert_eq!(ask(&line, 1, false), Err(Refusal::Failed));
    model.borrow_mut().status = FirmwareStatus::SUCCESS;
    assert_eq!(ask(&line, 1, false), Ok((1, 0)));
    assert_eq!(line.host_lies(), 0);
}

#[test]
fn one_processor_at_a_time_and_nobody_waits() {
    let model = RefCell::new(Model::new());
    let line = line(&model);
    let inner = line.report(&[1; 64], false, |_, _| ask(&line, 2, false));
    assert_eq!(inner, Ok(Err(Refusal::Busy)));
    assert_eq!(ask(&line, 2, false), Ok((2, 0)));
}
