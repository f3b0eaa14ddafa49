//! `ghcb.md` §8: what the host carries, and what it says about it.

use aes_gcm::aead::AeadInPlace;
use aes_gcm::{Aes256Gcm, KeyInit};
use protocols::amd_sp::certificates::{CertificateEntry, VCEK};
use protocols::amd_sp::message::{MessageHeader, MessageType};
use protocols::amd_sp::report::{KeySelect, ReportRequest, ReportResponse};
use protocols::amd_sp::{FirmwareStatus, GuestRequestOutcome, HostStatus};
use protocols::oracle::{Call, HostAct};
use zerocopy::IntoBytes;

use super::*;
use crate::amd_sp::{Guest, Identity, SecurityProcessor};
use crate::types::PAGE_SIZE;

const REQUEST: u64 = GHCB.get() + PAGE_SIZE;
const RESPONSE: u64 = REQUEST + PAGE_SIZE;
const CERTIFICATES: u64 = RESPONSE + PAGE_SIZE;
const PLAIN: u64 = 0x8000_0011;
const EXTENDED: u64 = 0x8000_0012;

/// A platform whose guest is launched and has the pages shared. Its keys are zero, so a message that is sealed
/// elsewhere does not authenticate; what is carried is what matters here.
fn launched(settings: &str) -> Platform<Sparse> {
    let mut platform = ready(settings);
    for gpa in [REQUEST, RESPONSE, CERTIFICATES, CERTIFICATES + PAGE_SIZE] {
        platform.msr(VMPL1, 2 << 52 | gpa | 0x014);
    }
    let guest = Guest {
        measurement: [0; 48],
        policy: 0,
        identity: Identity::default(),
        vmpck: [[0; 32]; 4],
        secrets_page: None,
        cpuid_fms: [0; 3],
    };
    platform.security_processor = Some(SecurityProcessor::new(guest, None, &mut || 1));
    platform
}

fn put(platform: &Platform<Sparse>, gpa: u64, bytes: &[u8]) {
    let spa = platform.spa_of(Gpa::new(gpa)).unwrap();
    platform.memory().write(spa, bytes);
}

fn bytes(platform: &Platform<Sparse>, gpa: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    platform
        .memory()
        .read(platform.spa_of(Gpa::new(gpa)).unwrap(), &mut bytes);
    bytes
}

fn ask_for(platform: &mut Platform<Sparse>, kind: MessageType) {
    let header = MessageHeader::new(kind, 0x60, 1, 1);
    put(platform, REQUEST, header.as_bytes());
}

fn outcome(
    platform: &mut Platform<Sparse>,
    fields: &[(Field, u64)],
) -> (GuestRequestOutcome, Option<u64>) {
    let (info_1, info_2, page) = served(platform, fields);
    assert_eq!(info_1, 0);
    (GuestRequestOutcome::decode(info_2), page.get(Field::RBX))
}

fn extended(pages: u64) -> [(Field, u64); 5] {
    [
        (CODE, EXTENDED),
        (I1, REQUEST),
        (I2, RESPONSE),
        (Field::RAX, CERTIFICATES),
        (Field::RBX, pages),
    ]
}

const BAD: GuestRequestOutcome = GuestRequestOutcome::of_firmware(FirmwareStatus::BAD_MEASUREMENT);

#[test]
fn both_pages_are_shared_and_differ() {
    let mut platform = launched("");
    let fields = |a, b| [(CODE, PLAIN), (I1, a), (I2, b)];
    ask_for(&mut platform, MessageType::REPORT_REQUEST);
    assert_eq!(outcome(&mut platform, &fields(REQUEST, RESPONSE)).0, BAD);
    for (a, b) in [
        (REQUEST, REQUEST),
        (BLOCK.get(), RESPONSE),
        (REQUEST, BLOCK.get()),
        (REQUEST + 8, RESPONSE),
        (REQUEST, 0xFE00_0000),
    ] {
        assert_eq!(malformed(&mut platform, &fields(a, b)), 5);
    }
    assert_eq!(
        malformed(
            &mut platform,
            &[(CODE, EXTENDED), (I1, REQUEST), (I2, RESPONSE)]
        ),
        4
    );
}

#[test]
fn without_a_launch_there_is_no_firmware() {
    let mut platform = launched("");
    platform.security_processor = None;
    let fields = [(CODE, PLAIN), (I1, REQUEST), (I2, RESPONSE)];
    let unsupported = GuestRequestOutcome::of_firmware(FirmwareStatus::UNSUPPORTED);
    assert_eq!(outcome(&mut platform, &fields).0, unsupported);
}

#[test]
fn certificates_need_room_before_anybody_is_asked() {
    let mut platform = launched("");
    let entry = CertificateEntry {
        guid: VCEK,
        offset: 48,
        length: 5000,
    };
    let mut table = vec![0xAB; 5048];
    table[..24].copy_from_slice(entry.as_bytes());
    table[24..48].fill(0);
    platform.courier.certificates = table.clone().into();
    ask_for(&mut platform, MessageType::REPORT_REQUEST);
    let before = bytes(&platform, CERTIFICATES, 4096);
    let too_small = GuestRequestOutcome::of_host(HostStatus::INVALID_LENGTH);
    for pages in [0, 1] {
        assert_eq!(
            outcome(&mut platform, &extended(pages)),
            (too_small, Some(2))
        );
    }
    assert_eq!(bytes(&platform, CERTIFICATES, 4096), before);
    assert_eq!(outcome(&mut platform, &extended(2)), (BAD, None));
    assert_eq!(bytes(&platform, CERTIFICATES, table.len()), table);
    // The third page is private: it would be the guest's mistake if the table reached it.
    assert_eq!(outcome(&mut platform, &extended(3)), (BAD, None));
    let private = [
        (CODE, EXTENDED),
        (I1, REQUEST),
        (I2, RESPONSE),
        (Field::RAX, CERTIFICATES + PAGE_SIZE),
        (Field::RBX, 2),
    ];
    assert_eq!(malformed(&mut platform, &private), 5);
}

#[test]
fn a_host_without_certificates_gives_an_empty_table_and_other_messages_none() {
    let mut platform = launched("");
    put(&platform, CERTIFICATES, &[0xEE; 32]);
    ask_for(&mut platform, MessageType::KEY_REQUEST);
    assert_eq!(outcome(&mut platform, &extended(1)), (BAD, None));
    assert_eq!(bytes(&platform, CERTIFICATES, 32), [0xEE; 32]);
    ask_for(&mut platform, MessageType::REPORT_REQUEST);
    assert_eq!(outcome(&mut platform, &extended(0)), (BAD, None));
    assert_eq!(outcome(&mut platform, &extended(1)), (BAD, None));
    assert_eq!(
        bytes(&platform, CERTIFICATES, 25)[..],
        [&[0; 24][..], &[0xEE]].concat()
    );
}

#[test]
fn the_host_lies_once_and_only_if_it_is_such_a_host() {
    let fields = [(CODE, PLAIN), (I1, REQUEST), (I2, RESPONSE)];
    let busy = GuestRequestOutcome::of_host(HostStatus::BUSY);
    for (settings, first) in [
        ("oracle=on", BAD),
        ("oracle=on\nhostile=messages-lost", busy),
    ] {
        let mut platform = launched(settings);
        ask_for(&mut platform, MessageType::REPORT_REQUEST);
        platform.ask_oracle(Call::HOST_ACT.rax(), BLOCK.get(), HostAct::SAY_BUSY.0);
        assert_eq!(outcome(&mut platform, &fields).0, first, "{settings}");
        assert_eq!(outcome(&mut platform, &fields).0, BAD);
    }
}

/// A request for a report as the guest seals it: number `sequence` under its key, which is zero.
fn put_sealed(platform: &Platform<Sparse>, sequence: u64) {
    let request = ReportRequest {
        report_data: [0; 64],
        vmpl: 1,
        key_select: KeySelect::ANY,
        reserved: [0; 24],
    };
    let mut payload = request.as_bytes().to_vec();
    let size = payload.len() as u16;
    let mut header = MessageHeader::new(MessageType::REPORT_REQUEST, size, 1, sequence);
    let tag = Aes256Gcm::new(&[0; 32].into())
        .encrypt_in_place_detached(&header.iv().into(), header.authenticated(), &mut payload)
        .unwrap();
    header.tag[..tag.len()].copy_from_slice(&tag);
    put(platform, REQUEST, &[header.as_bytes(), &payload].concat());
}

#[test]
fn without_a_test_guest_the_host_is_honest_once() {
    const ANSWER: usize = MessageHeader::SIZE + size_of::<ReportResponse>();
    let fields = [(CODE, PLAIN), (I1, REQUEST), (I2, RESPONSE)];
    let answers = |settings: &str| {
        let mut platform = launched(settings);
        [1, 3, 5].map(|sequence| {
            put_sealed(&platform, sequence);
            put(&platform, RESPONSE, &[0; ANSWER]);
            assert_eq!(outcome(&mut platform, &fields).0, GuestRequestOutcome::OK);
            bytes(&platform, RESPONSE, ANSWER)
        })
    };
    let honest = answers("");
    let [first, second, third] = honest.clone();
    let changed = |mut answer: Vec<u8>| {
        answer[MessageHeader::SIZE + 1] ^= 1;
        answer
    };
    let nothing = vec![0; ANSWER];
    let tampered = [first.clone(), changed(second.clone()), changed(third)];
    assert_eq!(answers("hostile=messages-tampered"), tampered);
    let replayed = [first.clone(), first.clone(), second];
    assert_eq!(answers("hostile=messages-replayed"), replayed);
    let lost = [first, nothing.clone(), nothing];
    assert_eq!(answers("hostile=messages-lost"), lost);
    // Where there is one, it waits for the word.
    assert_eq!(answers("oracle=on\nhostile=messages-tampered"), honest);
}
