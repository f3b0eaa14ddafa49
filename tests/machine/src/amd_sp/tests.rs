use p384::ecdsa::VerifyingKey;
use p384::ecdsa::signature::Verifier;
use protocols::amd_sp::key::{GuestFields, KeyResponse};
use protocols::amd_sp::report::{AttestationReport, KeySelect, ReportResponse};

use super::*;

type Page = [u8; PAGE_SIZE as usize];

const KEYS: [[u8; 32]; 4] = [[1; 32], [2; 32], [3; 32], [4; 32]];
const TCB: u64 = 0x0A18_0000_0000_0004;

pub(crate) fn endorsement() -> Vec<u8> {
    let file = Endorsement {
        vcek: [7; 48],
        chip_id: [9; 64],
        tcb: TCB,
    };
    file.as_bytes().to_vec()
}

fn processor(chip: bool) -> SecurityProcessor {
    let guest = Guest {
        measurement: [0x4D; 48],
        policy: 0x3_0000,
        identity: Identity {
            guest_svn: 2,
            id_key_digest: [0x1D; 48],
            author_key_digest: Some([0xA0; 48]),
            ..Identity::default()
        },
        vmpck: KEYS,
        secrets_page: None,
        cpuid_fms: [0x19, 1, 1],
    };
    let chip = chip.then(|| Chip::parse(&endorsement()).unwrap());
    let mut next = 0;
    SecurityProcessor::new(guest, chip, &mut || {
        next += 1;
        next
    })
}

fn page(header: MessageHeader, payload: &[u8]) -> Page {
    let key = KEYS[usize::from(header.vmpck % 4)];
    let mut page = [0; PAGE_SIZE as usize];
    let sealed = seal::seal(&key, header, payload);
    page[..sealed.len()].copy_from_slice(&sealed);
    page
}

fn header(kind: MessageType, payload: &[u8], vmpck: u8, sequence: u64) -> MessageHeader {
    MessageHeader::new(kind, payload.len() as u16, vmpck, sequence)
}

fn open(answer: Answer, vmpck: u8) -> (MessageHeader, Vec<u8>) {
    let answer = answer.unwrap();
    let (header, rest) = MessageHeader::read_from_prefix(&answer).unwrap();
    let sealed = &rest[..usize::from(header.message_size)];
    let payload = seal::open(&KEYS[usize::from(vmpck)], &header, sealed).unwrap();
    (header, payload)
}

fn report_request(vmpl: u32) -> ReportRequest {
    ReportRequest {
        report_data: [0x44; 64],
        vmpl,
        key_select: KeySelect::ANY,
        reserved: [0; 24],
    }
}

fn report_page(vmpck: u8, sequence: u64, request: &ReportRequest) -> Page {
    let payload = request.as_bytes();
    page(
        header(MessageType::REPORT_REQUEST, payload, vmpck, sequence),
        payload,
    )
}

fn report(
    processor: &mut SecurityProcessor,
    vmpck: u8,
    sequence: u64,
    request: &ReportRequest,
) -> ReportResponse {
    let answer = processor.answer(&report_page(vmpck, sequence, request));
    let (header, payload) = open(answer, vmpck);
    assert_eq!(header.sequence, sequence + 1);
    assert_eq!(header.message_type, MessageType::REPORT_RESPONSE);
    ReportResponse::read_from_bytes(&payload).unwrap()
}

#[test]
fn a_report_says_what_was_launched_and_is_signed_by_the_chip() {
    let mut processor = processor(true);
    let response = report(&mut processor, 1, 1, &report_request(2));
    assert_eq!(response.header.status, FirmwareStatus::SUCCESS);
    assert_eq!(response.header.report_size, 0x4A0);
    let report = response.report;
    assert_eq!((report.version, report.vmpl, report.guest_svn), (3, 2, 2));
    assert_eq!(report.key_info, 1, "there is an author key");
    assert_eq!(
        (report.id_key_digest, report.author_key_digest),
        ([0x1D; 48], [0xA0; 48])
    );
    assert_eq!(report.report_data, [0x44; 64]);
    assert_eq!(report.measurement, [0x4D; 48]);
    assert_eq!(report.policy, 0x3_0000);
    assert_eq!(report.chip_id, [9; 64]);
    assert_eq!((report.reported_tcb, report.launch_tcb), (TCB, TCB));
    assert_eq!(report.report_id_ma, [0xFF; 32]);
    assert_ne!(report.report_id, [0; 32]);

    let scalar = |bytes: &[u8; 72]| {
        assert_eq!(bytes[48..], [0; 24]);
        let mut scalar: [u8; 48] = bytes[..48].try_into().unwrap();
        scalar.reverse();
        scalar
    };
    let signature = p384::ecdsa::Signature::from_scalars(
        scalar(&report.signature.r),
        scalar(&report.signature.s),
    )
    .unwrap();
    let vcek = SigningKey::from_slice(&[7; 48]).unwrap();
    let public = VerifyingKey::from(&vcek);
    public.verify(report.signed(), &signature).unwrap();
    let mut forged = report;
    forged.measurement[0] ^= 1;
    public.verify(forged.signed(), &signature).unwrap_err();
    assert_eq!(report.signed().len(), AttestationReport::SIGNED);
}

#[test]
fn nobody_speaks_for_a_level_above_the_keys() {
    for vmpck in 0..4 {
        let mut processor = processor(true);
        for vmpl in 0..5 {
            let response = report(
                &mut processor,
                vmpck,
                1 + 2 * u64::from(vmpl),
                &report_request(vmpl),
            );
            let good = (u32::from(vmpck)..4).contains(&vmpl);
            let expected = if good {
                FirmwareStatus::SUCCESS
            } else {
                FirmwareStatus::INVALID_PARAM
            };
            assert_eq!(response.header.status, expected, "VMPCK{vmpck}, VMPL{vmpl}");
            assert_eq!(response.report.version != 0, good);
        }
    }
}

#[test]
fn reserved_bits_and_keys_that_are_not_there() {
    let mut processor = processor(true);
    let mut reserved = report_request(1);
    reserved.reserved[23] = 1;
    let select = |key_select| ReportRequest {
        key_select,
        ..report_request(1)
    };
    let rows = [
        (reserved, FirmwareStatus::INVALID_PARAM),
        (select(KeySelect(4)), FirmwareStatus::INVALID_PARAM),
        (select(KeySelect::VLEK), FirmwareStatus::INVALID_KEY),
        (select(KeySelect(3)), FirmwareStatus::INVALID_KEY),
        (select(KeySelect::VCEK), FirmwareStatus::SUCCESS),
    ];
    for (index, (request, expected)) in rows.into_iter().enumerate() {
        let response = report(&mut processor, 1, 1 + 2 * index as u64, &request);
        assert_eq!(response.header.status, expected, "row {index}");
    }
    let mut without = self::processor(false);
    let response = report(&mut without, 0, 1, &report_request(0));
    assert_eq!(response.header.status, FirmwareStatus::INVALID_KEY);
}

#[test]
fn sequence_numbers_go_by_two_for_each_key_and_never_back() {
    let mut processor = processor(true);
    let request = report_request(3);
    for sequence in [0, 2, 3, u64::MAX] {
        let refused = processor.answer(&report_page(1, sequence, &request));
        assert_eq!(refused, Err(FirmwareStatus::AEAD_OFLOW), "{sequence}");
    }
    let first = report_page(1, 1, &request);
    processor.answer(&first).unwrap();
    assert_eq!(
        processor.answer(&first),
        Err(FirmwareStatus::AEAD_OFLOW),
        "replayed"
    );
    report(&mut processor, 1, 3, &request);
    report(&mut processor, 0, 1, &request);
    processor.counts[2] = u64::MAX - 1;
    let last = processor.answer(&report_page(2, u64::MAX, &request));
    assert_eq!(last, Err(FirmwareStatus::AEAD_OFLOW), "exhausted");
}

#[test]
fn what_does_not_authenticate_counts_for_nothing() {
    let mut processor = processor(true);
    let good = report_page(1, 1, &report_request(1));
    // The tag, every authenticated field that the checks before let through, the payload.
    for at in [0, 15, 0x20, 0x34, 0x35, 0x38, 0x3D, 0x5F, 0x60, 0xBF] {
        let mut tampered = good;
        tampered[at] ^= 1;
        let refused = processor.answer(&tampered);
        assert_eq!(
            refused,
            Err(FirmwareStatus::BAD_MEASUREMENT),
            "byte {at:#x}"
        );
    }
    // Another level's key.
    let mut other = good;
    other[0x3C] = 2;
    assert_eq!(
        processor.answer(&other),
        Err(FirmwareStatus::BAD_MEASUREMENT)
    );
    processor.answer(&good).unwrap();
}

#[test]
fn headers_are_checked_before_the_seal() {
    let mut processor = processor(true);
    let payload = report_request(1);
    let payload = payload.as_bytes();
    let good = header(MessageType::REPORT_REQUEST, payload, 1, 1);
    let sized = |message_size| MessageHeader {
        message_size,
        ..good
    };
    let wrong = [
        MessageHeader {
            algorithm: 2,
            ..good
        },
        MessageHeader {
            header_version: 2,
            ..good
        },
        MessageHeader {
            header_size: 0x50,
            ..good
        },
        MessageHeader { vmpck: 4, ..good },
        sized(0),
        sized(0x58),
        sized(0xFB0),
        sized(0xFFF0),
    ];
    for header in wrong {
        let refused = processor.answer(&page(header, payload));
        assert_eq!(refused, Err(FirmwareStatus::INVALID_PARAM), "{header:?}");
    }
    // Sealed well, but unknown, or too short for what it claims to be.
    let kinds = [
        MessageType(0),
        MessageType::REPORT_RESPONSE,
        MessageType(7),
        MessageType(19),
        MessageType(0xFF),
    ];
    let unknown = kinds.map(|message_type| MessageHeader {
        message_type,
        ..good
    });
    let versions = [0, 2, 0xFF].map(|message_version| MessageHeader {
        message_version,
        ..good
    });
    for header in unknown.into_iter().chain(versions) {
        let refused = processor.answer(&page(header, payload));
        assert_eq!(refused, Err(FirmwareStatus::INVALID_PARAM), "{header:?}");
    }
    let short = &payload[..0x50];
    let refused = processor.answer(&page(
        header(MessageType::REPORT_REQUEST, short, 1, 1),
        short,
    ));
    assert_eq!(refused, Err(FirmwareStatus::INVALID_PARAM));
    processor.answer(&page(good, payload)).unwrap();
}

fn key(
    processor: &mut SecurityProcessor,
    vmpck: u8,
    sequence: &mut u64,
    request: KeyRequest,
) -> Result<[u8; 32], FirmwareStatus> {
    let payload = request.as_bytes();
    let sealed = page(
        header(MessageType::KEY_REQUEST, payload, vmpck, *sequence),
        payload,
    );
    *sequence += 2;
    let (header, payload) = open(processor.answer(&sealed), vmpck);
    assert_eq!(header.message_type, MessageType::KEY_RESPONSE);
    let response = KeyResponse::read_from_bytes(&payload).unwrap();
    match response.status {
        FirmwareStatus::SUCCESS => Ok(response.key),
        status => {
            assert_eq!(response.key, [0; 32]);
            Err(status)
        }
    }
}

const PLAIN: KeyRequest = KeyRequest {
    root: 0,
    reserved: 0,
    fields: 0,
    vmpl: 1,
    guest_svn: 0,
    tcb: 0,
};

#[test]
fn a_derived_key_depends_on_what_was_asked_for_and_on_nothing_else() {
    let mut processor = processor(true);
    let mut sequence = 1;
    let requests = [
        PLAIN,
        KeyRequest { root: 1, ..PLAIN },
        KeyRequest { vmpl: 2, ..PLAIN },
        KeyRequest { vmpl: 3, ..PLAIN },
        KeyRequest {
            fields: GuestFields::POLICY.bits(),
            ..PLAIN
        },
        KeyRequest {
            fields: GuestFields::MEASUREMENT.bits(),
            ..PLAIN
        },
        KeyRequest {
            fields: GuestFields::GUEST_SVN.bits(),
            guest_svn: 1,
            ..PLAIN
        },
        KeyRequest {
            fields: GuestFields::GUEST_SVN.bits(),
            guest_svn: 2,
            ..PLAIN
        },
        KeyRequest {
            fields: GuestFields::TCB_VERSION.bits(),
            tcb: TCB,
            ..PLAIN
        },
    ];
    let keys = requests.map(|request| key(&mut processor, 1, &mut sequence, request).unwrap());
    for (index, one) in keys.iter().enumerate() {
        assert!(!keys[..index].contains(one), "key {index} was there before");
    }
    // The same again, and what was not selected does not count.
    let again = requests.map(|request| key(&mut processor, 1, &mut sequence, request).unwrap());
    assert_eq!(keys, again);
    let unselected = KeyRequest {
        guest_svn: 99,
        tcb: u64::MAX,
        ..PLAIN
    };
    let same = key(&mut processor, 1, &mut sequence, unselected).unwrap();
    assert_eq!(same, keys[0]);
}

#[test]
fn a_derived_key_is_refused_by_the_rules() {
    let invalid = Err(FirmwareStatus::INVALID_PARAM);
    let rows = [
        (KeyRequest { vmpl: 0, ..PLAIN }, invalid),
        (KeyRequest { vmpl: 4, ..PLAIN }, invalid),
        (KeyRequest { root: 8, ..PLAIN }, invalid),
        (
            KeyRequest {
                reserved: 1,
                ..PLAIN
            },
            invalid,
        ),
        (
            KeyRequest {
                fields: 1 << 6,
                ..PLAIN
            },
            invalid,
        ),
        (
            KeyRequest {
                fields: GuestFields::GUEST_SVN.bits(),
                guest_svn: 3,
                ..PLAIN
            },
            invalid,
        ),
        (
            KeyRequest {
                fields: GuestFields::TCB_VERSION.bits(),
                tcb: TCB + 1,
                ..PLAIN
            },
            invalid,
        ),
        (
            KeyRequest { root: 4, ..PLAIN },
            Err(FirmwareStatus::INVALID_KEY),
        ),
    ];
    let mut processor = processor(true);
    let mut sequence = 1;
    for (request, expected) in rows {
        assert_eq!(
            key(&mut processor, 1, &mut sequence, request),
            expected,
            "{request:x?}"
        );
    }
    let mut without = self::processor(false);
    let mut sequence = 1;
    assert_eq!(
        key(&mut without, 1, &mut sequence, PLAIN),
        Err(FirmwareStatus::INVALID_KEY)
    );
    let of_launch = KeyRequest { root: 1, ..PLAIN };
    assert!(key(&mut without, 1, &mut sequence, of_launch).is_ok());
}

#[test]
fn the_time_stamp_counter_is_not_a_secure_one() {
    let mut processor = processor(false);
    for (sequence, byte, expected) in [
        (1, 0, FirmwareStatus::SUCCESS),
        (3, 1, FirmwareStatus::INVALID_PARAM),
    ] {
        let payload = [byte; TSC_INFO_REQUEST_SIZE];
        let sealed = page(
            header(MessageType::TSC_INFO_REQUEST, &payload, 3, sequence),
            &payload,
        );
        let (_, payload) = open(processor.answer(&sealed), 3);
        let response = TscInfoResponse::read_from_bytes(&payload).unwrap();
        assert_eq!(response.status, expected);
        assert_eq!((response.tsc_scale, response.tsc_factor), (0, 0));
    }
}

#[test]
fn a_file_that_is_no_identity_is_none() {
    let good = endorsement();
    assert!(Chip::parse(&good).is_some());
    assert!(Chip::parse(&good[1..]).is_none());
    let mut zero = good;
    zero[..48].fill(0);
    assert!(Chip::parse(&zero).is_none(), "zero is no scalar");
}
