//! Guest messages to the security processor: what is answered, and every way to be refused.
//!
//! Each key has its own count of messages, which goes on over all cases: a refused message does not count.

use core::sync::atomic::{AtomicU64, Ordering};

use guest::amd_sp::{Key, open, seal};
use guest::ghcb::Reply;
use guest::harness::{Case, Finding, Verdict, case, expect, expect_not};
use guest::memory::{self, page_of};
use protocols::addr::{Gpa, PAGE_SIZE};
use protocols::amd_sp::certificates::{ARK, ASK, CertificateEntry, VCEK};
use protocols::amd_sp::key::{GuestFields, KeyRequest, KeyResponse, TscInfoResponse};
use protocols::amd_sp::message::{MessageHeader, MessageType};
use protocols::amd_sp::report::{AttestationReport, KeySelect, ReportRequest, ReportResponse};
use protocols::amd_sp::{FirmwareStatus, GuestRequestOutcome, HostStatus};
use protocols::exit_code::ExitCode;
use protocols::ghcb::PageOperation;
use protocols::ghcb::page::{Field, MalformedReason, Response};
use protocols::secrets::SecretsPage;
use spin::Once;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::setup::{ghcb_page, valid_page};
use crate::start;

/// The table.
pub const CASES: &[Case] = &[
    case("request_report", "snp-launch.md §7, §8", report),
    case(
        "request_report_of_lower_levels",
        "snp-launch.md §7 VMPL rule",
        lower_levels,
    ),
    case(
        "request_report_of_higher_levels",
        "snp-launch.md §7 VMPL rule",
        higher_levels,
    ),
    case(
        "request_report_keys_and_reserved_bits",
        "snp-launch.md §7 KEY_SEL",
        key_select,
    ),
    case(
        "request_wrong_sequence_number",
        "snp-launch.md §7 sequence",
        wrong_sequence,
    ),
    case("request_replayed", "snp-launch.md §7 sequence", replayed),
    case("request_tampered", "snp-launch.md §7", tampered),
    case("request_with_another_key", "snp-launch.md §7", another_key),
    case("request_wrong_header", "snp-launch.md §7", wrong_header),
    case(
        "request_wrong_type_version_size",
        "snp-launch.md §7",
        wrong_message,
    ),
    case(
        "request_of_any_size_authenticates",
        "snp-launch.md §7",
        any_size,
    ),
    case("request_derived_key", "snp-launch.md §7 KEY", derived_key),
    case(
        "request_derived_key_rules",
        "snp-launch.md §7 KEY",
        derived_key_rules,
    ),
    case("request_tsc_info", "snp-launch.md §7 TSC_INFO", tsc_info),
    case("request_certificates", "ghcb.md §8", certificates),
    case("request_wrong_pages", "ghcb.md §8, reason 5", wrong_pages),
];

/// Pages of the messages: request, response, and four for certificates.
static PAGES: Once<Gpa> = Once::new();
/// The number of the last answer, by key.
static COUNTS: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];
/// Pages for certificates.
const ROOM: u64 = 4;
/// What the response page holds before a request.
const BLANK: u64 = 0xB1A2_B1A2_B1A2_B1A2;

const INVALID: FirmwareStatus = FirmwareStatus::INVALID_PARAM;
const BAD: FirmwareStatus = FirmwareStatus::BAD_MEASUREMENT;
const OFLOW: FirmwareStatus = FirmwareStatus::AEAD_OFLOW;

fn pages() -> Result<Gpa, Finding> {
    if let Some(&pages) = PAGES.get() {
        return Ok(pages);
    }
    let region = memory::fresh_region();
    for index in 0..2 + ROOM {
        guest::ghcb::change_page_state(page_of(region, index), PageOperation::SHARED)?;
    }
    Ok(*PAGES.call_once(|| region))
}

fn request_page() -> Result<Gpa, Finding> {
    pages()
}

fn response_page() -> Result<Gpa, Finding> {
    Ok(page_of(pages()?, 1))
}

fn certificate_pages() -> Result<Gpa, Finding> {
    Ok(page_of(pages()?, 2))
}

fn key(level: u8) -> Result<Key, Finding> {
    let mut key = [0; 32];
    let keys = start::launch().secrets_gpa + core::mem::offset_of!(SecretsPage, vmpck) as u64;
    memory::take_bytes(keys + u64::from(level) * 32, &mut key)?;
    Ok(key)
}

/// The number that is due.
fn due(level: u8) -> u64 {
    COUNTS[usize::from(level)].load(Ordering::Relaxed) + 1
}

fn header(kind: MessageType, size: usize, level: u8) -> MessageHeader {
    MessageHeader::new(kind, size as u16, level, due(level))
}

/// Seals with the key that `header` names, and puts the message into the request page.
fn put<T: IntoBytes + FromBytes + Copy>(header: MessageHeader, payload: &T) -> Verdict {
    put_sealed(&key(header.vmpck % 4)?, header, payload)
}

fn put_sealed<T: IntoBytes + FromBytes + Copy>(
    key: &Key,
    header: MessageHeader,
    payload: &T,
) -> Verdict {
    let mut payload = *payload;
    let header = seal(key, header, payload.as_mut_bytes());
    let page = memory::shared(request_page()?);
    memory::put_bytes(page, header.as_bytes())?;
    memory::put_bytes(page + MessageHeader::SIZE as u64, payload.as_mut_bytes())
}

/// Sends what is in the request page; what came of it.
fn send() -> Result<GuestRequestOutcome, Finding> {
    let response = memory::shared(response_page()?);
    for offset in (0..PAGE_SIZE).step_by(8) {
        memory::write(response + offset, BLANK)?;
    }
    let infos = [request_page()?.get(), response_page()?.get()];
    let reply = ghcb_page().call(ExitCode::GUEST_REQUEST, infos, &[]);
    expect("response", reply.response, Response::NO_ACTION)?;
    Ok(GuestRequestOutcome::decode(reply.info_2))
}

/// What was sent is refused by the firmware, and nothing is written.
fn expect_refused(status: FirmwareStatus) -> Verdict {
    expect("outcome", send()?, GuestRequestOutcome::of_firmware(status))?;
    let response = memory::shared(response_page()?);
    for offset in (0..PAGE_SIZE).step_by(8) {
        expect("response page", memory::read(response + offset)?, BLANK)?;
    }
    Ok(())
}

/// The answer to a request that was sent with `level`'s key and its due number; it counts.
fn answer<T: FromZeros + FromBytes + IntoBytes>(
    kind: MessageType,
    level: u8,
) -> Result<T, Finding> {
    expect("outcome", send()?, GuestRequestOutcome::OK)?;
    take_answer(kind, level)
}

fn take_answer<T: FromZeros + FromBytes + IntoBytes>(
    kind: MessageType,
    level: u8,
) -> Result<T, Finding> {
    let page = memory::shared(response_page()?);
    let (mut header, mut payload) = (MessageHeader::new_zeroed(), T::new_zeroed());
    memory::take_bytes(page, header.as_mut_bytes())?;
    memory::take_bytes(page + MessageHeader::SIZE as u64, payload.as_mut_bytes())?;
    let number = due(level) + 1;
    let expected = MessageHeader {
        tag: header.tag,
        ..MessageHeader::new(kind.answer(), size_of::<T>() as u16, level, number)
    };
    expect("header of the answer", header, expected)?;
    expect(
        "the answer authenticates",
        open(&key(level)?, &header, payload.as_mut_bytes()),
        true,
    )?;
    COUNTS[usize::from(level)].store(number, Ordering::Relaxed);
    Ok(payload)
}

const DATA: [u8; 64] = [0xDA; 64];

const fn request(vmpl: u32) -> ReportRequest {
    ReportRequest {
        report_data: DATA,
        vmpl,
        key_select: KeySelect::ANY,
        reserved: [0; 24],
    }
}

fn put_report(level: u8, request: &ReportRequest) -> Verdict {
    put(
        header(
            MessageType::REPORT_REQUEST,
            size_of::<ReportRequest>(),
            level,
        ),
        request,
    )
}

fn ask_report(level: u8, request: &ReportRequest) -> Result<ReportResponse, Finding> {
    put_report(level, request)?;
    answer(MessageType::REPORT_REQUEST, level)
}

fn report() -> Verdict {
    let response = ask_report(0, &request(0))?;
    let (header, report) = (response.header, response.report);
    expect("status", header.status, FirmwareStatus::SUCCESS)?;
    expect("size", header.report_size as usize, AttestationReport::SIZE)?;
    expect("version", report.version, AttestationReport::VERSION)?;
    expect("VMPL", report.vmpl, 0)?;
    expect("algorithm", report.signature_algorithm, 1)?;
    expect("REPORT_DATA", report.report_data, DATA)?;
    expect("policy, bit 17", report.policy >> 17 & 1, 1)?;
    expect(
        "report id of a migration agent",
        report.report_id_ma,
        [0xFF; 32],
    )?;
    expect_not("MEASUREMENT", report.measurement, [0; 48])?;
    expect_not("report id", report.report_id, [0; 32])?;
    expect_not("chip id", report.chip_id, [0; 64])?;
    expect_not("R", report.signature.r, [0; 72])?;
    expect_not("S", report.signature.s, [0; 72])?;
    // What a launch determines stays as it is.
    let again = ask_report(0, &request(0))?.report;
    expect("signed part again", again.signed() == report.signed(), true)
}

fn lower_levels() -> Verdict {
    for level in 0..4 {
        for vmpl in u32::from(level)..4 {
            let response = ask_report(level, &request(vmpl))?;
            expect("status", response.header.status, FirmwareStatus::SUCCESS)?;
            expect("VMPL", response.report.vmpl, vmpl)?;
        }
    }
    Ok(())
}

fn expect_no_report(level: u8, request: &ReportRequest, status: FirmwareStatus) -> Verdict {
    let response = ask_report(level, request)?;
    expect("status", response.header.status, status)?;
    expect(
        "no report",
        response.report,
        AttestationReport::new_zeroed(),
    )
}

fn higher_levels() -> Verdict {
    for level in 0..4 {
        for vmpl in 0..u32::from(level) {
            expect_no_report(level, &request(vmpl), INVALID)?;
        }
        expect_no_report(level, &request(4), INVALID)?;
        expect_no_report(level, &request(u32::MAX), INVALID)?;
    }
    Ok(())
}

fn key_select() -> Verdict {
    let select = |key_select| ReportRequest {
        key_select,
        ..request(0)
    };
    let response = ask_report(0, &select(KeySelect::VCEK))?;
    expect("status", response.header.status, FirmwareStatus::SUCCESS)?;
    expect_no_report(0, &select(KeySelect::VLEK), FirmwareStatus::INVALID_KEY)?;
    expect_no_report(0, &select(KeySelect(3)), FirmwareStatus::INVALID_KEY)?;
    expect_no_report(0, &select(KeySelect(1 << 2)), INVALID)?;
    let mut reserved = request(0);
    reserved.reserved[0] = 1;
    expect_no_report(0, &reserved, INVALID)
}

fn wrong_sequence() -> Verdict {
    let good = header(MessageType::REPORT_REQUEST, size_of::<ReportRequest>(), 2);
    let due = due(2);
    for sequence in [0, due - 1, due + 1, due + 2, due + (1 << 32), u64::MAX] {
        put(MessageHeader { sequence, ..good }, &request(2))?;
        expect_refused(OFLOW)?;
    }
    ask_report(2, &request(2)).map(|_| ())
}

fn replayed() -> Verdict {
    ask_report(1, &request(1))?;
    // The message is still in its page.
    for _ in 0..2 {
        expect_refused(OFLOW)?;
    }
    ask_report(1, &request(1)).map(|_| ())
}

fn flip(offset: u64) -> Verdict {
    let address = memory::shared(request_page()?) + (offset & !7);
    let bit = 1 << ((offset & 7) * 8);
    memory::write(address, memory::read(address)? ^ bit)
}

fn tampered() -> Verdict {
    // Tag, number, type, version, a reserved field that is covered, and the payload's ends.
    for offset in [0x00, 0x0F, 0x20, 0x34, 0x35, 0x38, 0x3D, 0x5F, 0x60, 0xBF] {
        put_report(0, &request(0))?;
        flip(offset)?;
        expect_refused(BAD)?;
        flip(offset)?;
        answer::<ReportResponse>(MessageType::REPORT_REQUEST, 0)?;
    }
    Ok(())
}

fn another_key() -> Verdict {
    for level in 0..4 {
        let header = header(
            MessageType::REPORT_REQUEST,
            size_of::<ReportRequest>(),
            level,
        );
        for other in (0..4).filter(|&other| other != level) {
            put_sealed(&key(other)?, header, &request(3))?;
            expect_refused(BAD)?;
        }
    }
    let none = MessageHeader {
        vmpck: 4,
        ..header(MessageType::REPORT_REQUEST, size_of::<ReportRequest>(), 0)
    };
    put(none, &request(0))?;
    expect_refused(INVALID)
}

fn wrong_header() -> Verdict {
    let good = header(MessageType::REPORT_REQUEST, size_of::<ReportRequest>(), 0);
    let sized = |message_size| MessageHeader {
        message_size,
        ..good
    };
    for wrong in [
        MessageHeader {
            algorithm: 0,
            ..good
        },
        MessageHeader {
            algorithm: 2,
            ..good
        },
        MessageHeader {
            header_version: 0,
            ..good
        },
        MessageHeader {
            header_version: 2,
            ..good
        },
        MessageHeader {
            header_size: 0,
            ..good
        },
        MessageHeader {
            header_size: 0x70,
            ..good
        },
        sized(0),
        sized(0x5F),
        sized(0x61),
        sized(0xFB0),
        sized(0xFFF0),
    ] {
        put(wrong, &request(0))?;
        expect_refused(INVALID)?;
    }
    Ok(())
}

fn wrong_message() -> Verdict {
    let good = header(MessageType::REPORT_REQUEST, size_of::<ReportRequest>(), 0);
    for message_type in [0, 2, 6, 20, 0xFF].map(MessageType) {
        put(
            MessageHeader {
                message_type,
                ..good
            },
            &request(0),
        )?;
        expect_refused(INVALID)?;
    }
    for message_version in [0, 2, 0xFF] {
        put(
            MessageHeader {
                message_version,
                ..good
            },
            &request(0),
        )?;
        expect_refused(INVALID)?;
    }
    let short = [0_u8; 0x50];
    put(header(MessageType::REPORT_REQUEST, short.len(), 0), &short)?;
    expect_refused(INVALID)?;
    ask_report(0, &request(0)).map(|_| ())
}

/// A message of a type that does not exist is looked at behind its seal.
fn any_size() -> Verdict {
    const MOST: usize = 512;
    for size in (16..=MOST).step_by(16) {
        let page = memory::shared(request_page()?);
        let mut payload = [0x5A; MOST];
        let header = seal(
            &key(0)?,
            header(MessageType(0xFF), size, 0),
            &mut payload[..size],
        );
        memory::put_bytes(page, header.as_bytes())?;
        memory::put_bytes(page + MessageHeader::SIZE as u64, &payload[..size])?;
        let want = (size, GuestRequestOutcome::of_firmware(INVALID));
        expect("outcome", (size, send()?), want)?;
    }
    Ok(())
}

const PLAIN: KeyRequest = KeyRequest {
    root: 0,
    reserved: 0,
    fields: 0,
    vmpl: 1,
    guest_svn: 0,
    tcb: 0,
};

fn ask_key(level: u8, request: &KeyRequest) -> Result<KeyResponse, Finding> {
    let size = size_of::<KeyRequest>();
    put(header(MessageType::KEY_REQUEST, size, level), request)?;
    answer(MessageType::KEY_REQUEST, level)
}

fn derived_key() -> Verdict {
    let requests = [
        PLAIN,
        KeyRequest {
            root: KeyRequest::ROOT_VMRK,
            ..PLAIN
        },
        KeyRequest { vmpl: 2, ..PLAIN },
        KeyRequest {
            fields: GuestFields::MEASUREMENT.bits(),
            ..PLAIN
        },
        KeyRequest {
            fields: GuestFields::POLICY.bits(),
            ..PLAIN
        },
        KeyRequest {
            fields: GuestFields::TCB_VERSION.bits(),
            tcb: 1,
            ..PLAIN
        },
    ];
    let mut keys = [[0; 32]; 6];
    for (key, request) in keys.iter_mut().zip(&requests) {
        let response = ask_key(1, request)?;
        expect("status", response.status, FirmwareStatus::SUCCESS)?;
        *key = response.key;
        // The level that asks does not count, the level that is named does.
        expect("the same from VMPL0", ask_key(0, request)?.key, *key)?;
    }
    for (index, key) in keys.iter().enumerate() {
        expect(
            "a key like an earlier one",
            keys[..index].contains(key),
            false,
        )?;
    }
    Ok(())
}

fn derived_key_rules() -> Verdict {
    let rows = [
        (KeyRequest { vmpl: 0, ..PLAIN }, INVALID),
        (KeyRequest { vmpl: 4, ..PLAIN }, INVALID),
        (KeyRequest { root: 8, ..PLAIN }, INVALID),
        (
            KeyRequest {
                reserved: 1,
                ..PLAIN
            },
            INVALID,
        ),
        (
            KeyRequest {
                fields: 1 << 63,
                ..PLAIN
            },
            INVALID,
        ),
        (
            KeyRequest {
                fields: GuestFields::GUEST_SVN.bits(),
                guest_svn: 1,
                ..PLAIN
            },
            INVALID,
        ),
        (
            KeyRequest {
                fields: GuestFields::TCB_VERSION.bits(),
                tcb: u64::MAX,
                ..PLAIN
            },
            INVALID,
        ),
        (
            KeyRequest {
                root: 2 << 1,
                ..PLAIN
            },
            FirmwareStatus::INVALID_KEY,
        ),
    ];
    for (request, status) in &rows {
        let response = ask_key(1, request)?;
        expect("status", response.status, *status)?;
        expect("no key", response.key, [0; 32])?;
    }
    Ok(())
}

fn tsc_info() -> Verdict {
    for (byte, status) in [(0_u8, FirmwareStatus::SUCCESS), (1, INVALID)] {
        let payload = [byte; 128];
        put(header(MessageType::TSC_INFO_REQUEST, 128, 3), &payload)?;
        let response: TscInfoResponse = answer(MessageType::TSC_INFO_REQUEST, 3)?;
        expect("status", response.status, status)?;
        // The VMSAs here have none of both.
        expect(
            "scale and offset",
            (response.tsc_scale, response.tsc_offset),
            (0, 0),
        )?;
    }
    Ok(())
}

fn send_extended(pages: u64) -> Result<(GuestRequestOutcome, u64), Finding> {
    let infos = [request_page()?.get(), response_page()?.get()];
    let fields = [
        (Field::RAX, certificate_pages()?.get()),
        (Field::RBX, pages),
    ];
    let reply = ghcb_page().call(ExitCode::EXTENDED_GUEST_REQUEST, infos, &fields);
    expect("response", reply.response, Response::NO_ACTION)?;
    let needed = ghcb_page().output(Field::RBX).unwrap_or(0);
    Ok((GuestRequestOutcome::decode(reply.info_2), needed))
}

fn certificates() -> Verdict {
    put_report(0, &request(0))?;
    let too_small = GuestRequestOutcome::of_host(HostStatus::INVALID_LENGTH);
    let (outcome, needed) = send_extended(0)?;
    expect("outcome without room", outcome, too_small)?;
    expect("pages needed", (1..=ROOM).contains(&needed), true)?;
    expect(
        "one too few",
        send_extended(needed - 1)?,
        (too_small, needed),
    )?;
    // The very same message, which nobody has seen yet.
    let (outcome, _) = send_extended(needed)?;
    expect("outcome", outcome, GuestRequestOutcome::OK)?;
    let response: ReportResponse = take_answer(MessageType::REPORT_REQUEST, 0)?;
    expect("status", response.header.status, FirmwareStatus::SUCCESS)?;
    let table = memory::shared(certificate_pages()?);
    let mut entries = [CertificateEntry::new_zeroed(); 4];
    memory::take_bytes(table, entries.as_mut_bytes())?;
    let [first, second, third, end] = entries;
    expect(
        "GUIDs",
        [first.guid, second.guid, third.guid],
        [VCEK, ASK, ARK],
    )?;
    expect("end", end, CertificateEntry::new_zeroed())?;
    for entry in [first, second, third] {
        let inside = u64::from(entry.offset) + u64::from(entry.length) <= needed * PAGE_SIZE;
        expect("inside the pages", inside, true)?;
    }
    // Other messages bring none.
    memory::write(table, BLANK)?;
    put(
        header(MessageType::KEY_REQUEST, size_of::<KeyRequest>(), 0),
        &PLAIN,
    )?;
    expect("outcome", send_extended(0)?.0, GuestRequestOutcome::OK)?;
    take_answer::<KeyResponse>(MessageType::KEY_REQUEST, 0)?;
    expect("table", memory::read(table)?, BLANK)
}

fn wrong_pages() -> Verdict {
    put_report(0, &request(0))?;
    let (good, other) = (request_page()?.get(), response_page()?.get());
    let private = valid_page()?.get();
    let invalid = Reply::malformed(MalformedReason::INVALID_INPUT);
    let no_memory = 0xE000_0000;
    for infos in [
        [good, good],
        [private, other],
        [good, private],
        [good + 8, other],
        [good, other + 0x10],
        [no_memory, other],
        [0, other],
    ] {
        let reply = ghcb_page().call(ExitCode::GUEST_REQUEST, infos, &[]);
        expect("reply", reply, invalid)?;
    }
    let infos = [good, other];
    for (rax, rbx) in [(private, ROOM), (certificate_pages()?.get() + 8, ROOM)] {
        let fields = [(Field::RAX, rax), (Field::RBX, rbx)];
        let reply = ghcb_page().call(ExitCode::EXTENDED_GUEST_REQUEST, infos, &fields);
        expect("reply", reply, invalid)?;
    }
    let missing = Reply::malformed(MalformedReason::MISSING_INPUT);
    let reply = ghcb_page().call(ExitCode::EXTENDED_GUEST_REQUEST, infos, &[(Field::RBX, 1)]);
    expect("without RAX", reply, missing)?;
    answer::<ReportResponse>(MessageType::REPORT_REQUEST, 0).map(|_| ())
}
