//! The attestation protocol: what is delivered, what is refused, and several processors at once.

pub mod lies;
mod place;

use core::sync::atomic::{AtomicU64, Ordering};

use guest::harness::{Case, Finding, Verdict, case, expect};
use guest::memory;
use guest::svsm::{self, Registers, call};
use protocols::addr::{Gpa, PAGE_SIZE, PageSize};
use protocols::amd_sp::certificates::{CertificateEntry, VCEK};
use protocols::launch::AcceptPolicy;
use protocols::svsm::attestation::{
    AttestationCall, Buffer, SERVICES_MANIFEST, ServicesManifest, ServicesOperation,
    SingleServiceOperation, TURNSTILE_SERVICE, TurnstileManifest,
};
use protocols::svsm::turnstile::{TurnstileCall, TurnstileCounter};
use protocols::svsm::{CallId, CoreCall, Protocol, ProtocolQuery, ResultCode};
use zerocopy::{FromZeros, IntoBytes};

use place::{
    CERTIFICATE_PAGE, END_PAGE, MANIFEST, Place, REPORT, REPORT_PAGE, SEED, ask, buffer, nonce_of,
    pass, pass_by, refused, sizes,
};

use crate::setup::{self, NO_MEMORY, unchanged};
use crate::team::{Member, Team};

/// The table.
pub const CASES: &[Case] = &[
    case("attest_query", "svsm.md §4.6", query),
    case("attest_services", "svsm.md §5", services),
    case("attest_single_service", "svsm.md §5", single_service),
    case(
        "attest_manifest_tells_totals",
        "docs/protocol.md §6",
        totals,
    ),
    case("attest_buffers_too_small", "svsm.md §5", too_small),
    case(
        "attest_without_certificates",
        "svsm.md §5",
        without_certificates,
    ),
    case("attest_foreign_buffers", "design.md I4", foreign_buffers),
    case(
        "attest_unaccepted_buffers",
        "design.md I4",
        unaccepted_buffers,
    ),
    case("attest_unaligned_buffers", "svsm.md §5", unaligned_buffers),
    case(
        "attest_overlapping_buffers",
        "docs/protocol.md §6",
        overlapping_buffers,
    ),
    case("attest_huge_buffers", "docs/protocol.md §6", huge_buffers),
    case(
        "attest_nonce_of_another_size",
        "docs/protocol.md §6",
        nonce_sizes,
    ),
    case("attest_nonce_anywhere", "svsm.md §5", nonces_anywhere),
    case("attest_reserved_words", "svsm.md §5", reserved_words),
    case(
        "attest_bad_operations",
        "svsm.md §5, design.md I7",
        bad_operations,
    ),
    case("attest_unknown_services", "svsm.md §5", unknown_services),
    case("attest_unknown_calls", "svsm.md §3", unknown_calls),
    case("smp_attest_all_at_once", "design.md I12", all_at_once),
];

fn query() -> Verdict {
    for (version, answer) in [(1, 1 << 32 | 1), (0, 0), (2, 0)] {
        let protocol = Protocol::ATTESTATION;
        let rcx = ProtocolQuery { protocol, version }.encode();
        let id = CallId::core(CoreCall::QUERY_PROTOCOL);
        let found = call(id, Registers::rcx(rcx))?;
        expect("RCX", found.registers.rcx, answer)?;
    }
    Ok(())
}

fn services() -> Verdict {
    let place = Place::new()?;
    place.put_nonce(1)?;
    place.blank()?;
    let (result, registers) = ask(&place.operation())?;
    expect("result", result, ResultCode::SUCCESS)?;
    let (manifest, certificates, report) = sizes(&registers);
    expect(
        "sizes of manifest and report",
        (manifest, report),
        (MANIFEST, REPORT),
    )?;
    expect(
        "certificates",
        (96..=4 * PAGE_SIZE).contains(&certificates),
        true,
    )?;
    let manifest: ServicesManifest = place.expect_answer(1)?;
    expect("GUID", manifest.header.guid, SERVICES_MANIFEST)?;
    expect("size", u64::from(manifest.header.size), MANIFEST)?;
    expect("entries", manifest.header.entries, 1)?;
    expect("service", manifest.entry.service, TURNSTILE_SERVICE)?;
    let mut first = CertificateEntry::new_zeroed();
    let table = place.page(CERTIFICATE_PAGE).get();
    memory::take_bytes(table, first.as_mut_bytes())?;
    expect("first certificate", first.guid, VCEK)?;
    // Behind what was told nothing is written, to the end of the line.
    let behind = (certificates).next_multiple_of(64);
    memory::expect_filled(table + behind, 4 * PAGE_SIZE - behind, SEED)?;
    let behind = REPORT.next_multiple_of(64);
    memory::expect_filled(
        place.page(REPORT_PAGE).get() + behind,
        PAGE_SIZE - behind,
        SEED,
    )
}

fn single() -> Result<(Place, SingleServiceOperation), Finding> {
    let place = Place::new()?;
    place.put_nonce(2)?;
    place.blank()?;
    let operation = SingleServiceOperation {
        buffers: place.operation(),
        service: TURNSTILE_SERVICE,
        manifest_version: TurnstileManifest::VERSION,
        reserved: 0,
    };
    Ok((place, operation))
}

fn own_manifest() -> Result<TurnstileManifest, Finding> {
    let (place, operation) = single()?;
    let (result, registers) = pass(AttestationCall::SINGLE_SERVICE, operation.as_bytes())?;
    expect("result", result, ResultCode::SUCCESS)?;
    expect(
        "manifest",
        registers.rcx,
        size_of::<TurnstileManifest>() as u64,
    )?;
    place.expect_answer(2)
}

fn single_service() -> Verdict {
    let manifest = own_manifest()?;
    expect("version", manifest.version, TurnstileManifest::VERSION)?;
    expect(
        "size",
        manifest.size as usize,
        size_of::<TurnstileManifest>(),
    )
}

fn counter(counter: TurnstileCounter) -> Result<u64, Finding> {
    let answer = call(TurnstileCall::COUNTER.id(), Registers::rcx(counter.0))?;
    expect("COUNTER", answer.result(), ResultCode::SUCCESS)?;
    Ok(answer.registers.rcx)
}

/// What the manifest says is what the paravisor's own protocol says.
fn totals() -> Verdict {
    let manifest = own_manifest()?;
    let census = |gpa, bytes| {
        let registers = Registers {
            rdx: bytes,
            ..Registers::rcx(gpa)
        };
        call(TurnstileCall::CENSUS.id(), registers).map(|answer| answer.registers)
    };
    // The machine has 4 GiB, some of them above 4 GiB.
    let (low, high) = (census(0, 4 << 30)?, census(4 << 30, 4 << 30)?);
    expect("unaccepted", manifest.unaccepted_bytes, low.rcx + high.rcx)?;
    expect("ahead", manifest.ahead_bytes, low.rdx + high.rdx)?;
    expect("accepted", manifest.accepted_bytes, low.r8 + high.r8)?;
    expect("owned", manifest.owned_bytes, low.r9 + high.r9)?;
    let sum = manifest.unaccepted_bytes
        + manifest.ahead_bytes
        + manifest.accepted_bytes
        + manifest.owned_bytes;
    expect("counted", manifest.counted_bytes, sum)?;
    expect("memory", manifest.memory_bytes, sum)?;
    let configuration = call(TurnstileCall::CONFIGURATION.id(), Registers::default())?.registers;
    let told = [
        u64::from(manifest.policy),
        manifest.budget,
        u64::from(manifest.order),
        u64::from(manifest.read_ahead),
    ];
    let Registers { rcx, rdx, r8, r9 } = configuration;
    expect(
        "policy, budget, order, read-ahead",
        told,
        [rcx, rdx, r8, r9],
    )?;
    expect("policy", AcceptPolicy(manifest.policy), AcceptPolicy::LAZY)?;
    let repeated = counter(TurnstileCounter::NO_CHANGE)?;
    expect("repeated requests", manifest.repeated_requests, repeated)?;
    expect("host lies", manifest.host_lies, 0)
}

fn too_small() -> Verdict {
    let place = Place::new()?;
    place.put_nonce(3)?;
    let good = place.operation();
    let (result, registers) = ask(&good)?;
    expect("result", result, ResultCode::SUCCESS)?;
    let needed = sizes(&registers);
    let [manifest, certificates, report] = [needed.0, needed.1, needed.2].map(|size| size as u32);
    let with = |sizes: [u32; 3]| {
        let mut operation = good;
        operation.manifest.size = sizes[0];
        operation.certificates.size = sizes[1];
        operation.report.size = sizes[2];
        operation
    };
    for sizes_given in [
        [0, certificates, report],
        [manifest - 1, certificates, report],
        [manifest, 1, report],
        [manifest, certificates - 1, report],
        [manifest, certificates, 0],
        [manifest, certificates, report - 1],
        [1, 1, 1],
    ] {
        place.blank()?;
        let (result, registers) = ask(&with(sizes_given))?;
        expect("result", result, ResultCode::INVALID_PARAMETER)?;
        expect("sizes needed", sizes(&registers), needed)?;
        place.expect_blank()?;
    }
    let (result, _) = ask(&with([manifest, certificates, report]))?;
    expect("exactly as needed", result, ResultCode::SUCCESS)
}

fn without_certificates() -> Verdict {
    let place = Place::new()?;
    place.put_nonce(4)?;
    place.blank()?;
    let operation = ServicesOperation {
        certificates: buffer(setup::paravisor().0, 0),
        ..place.operation()
    };
    let (result, registers) = ask(&operation)?;
    expect("result", result, ResultCode::SUCCESS)?;
    expect("sizes", sizes(&registers), (MANIFEST, 0, REPORT))?;
    place.expect_answer::<ServicesManifest>(4)?;
    let table = place.page(CERTIFICATE_PAGE).get();
    memory::expect_filled(table, 4 * PAGE_SIZE, SEED)
}

/// Calls `with` with an operation for each of the four buffers at `gpa`.
fn each_at(place: Place, gpa: Gpa, with: impl Fn(&ServicesOperation) -> Verdict) -> Verdict {
    let good = place.operation();
    with(&ServicesOperation {
        report: buffer(gpa, good.report.size),
        ..good
    })?;
    with(&ServicesOperation {
        nonce: buffer(gpa, 64),
        ..good
    })?;
    with(&ServicesOperation {
        manifest: buffer(gpa, good.manifest.size),
        ..good
    })?;
    with(&ServicesOperation {
        certificates: buffer(gpa, good.certificates.size),
        ..good
    })
}

fn foreign_buffers() -> Verdict {
    let place = Place::new()?;
    place.put_nonce(5)?;
    let (base, size) = setup::paravisor();
    for gpa in [
        base,
        Gpa::new(base.get() + size - PAGE_SIZE),
        svsm::calling_area(),
        NO_MEMORY,
        Gpa::new(1 << 45),
        Gpa::new((1 << 52) - PAGE_SIZE),
        Gpa::new(1 << 63),
    ] {
        each_at(place, gpa, |operation| {
            refused(place, operation, ResultCode::INVALID_ADDRESS)
        })?;
    }
    Ok(())
}

fn unaccepted_buffers() -> Verdict {
    let place = Place::new()?;
    place.put_nonce(6)?;
    let page = memory::fresh_page();
    each_at(place, page, |operation| {
        refused(place, operation, ResultCode::INVALID_ADDRESS)
    })?;
    // The last page that certificates may need is not accepted; those before it are.
    setup::done(&[setup::rescind(place.page(END_PAGE + 3), PageSize::Size4K)])?;
    let operation = ServicesOperation {
        certificates: buffer(place.page(END_PAGE), 4 * PAGE_SIZE as u32),
        ..place.operation()
    };
    refused(place, &operation, ResultCode::INVALID_ADDRESS)?;
    // The nonce begins in an accepted page and ends in that one.
    let operation = ServicesOperation {
        nonce: buffer(Gpa::new(place.page(END_PAGE + 3).get() - 32), 64),
        ..place.operation()
    };
    refused(place, &operation, ResultCode::INVALID_ADDRESS)?;
    setup::expect_not_accepted(page)
}

fn unaligned_buffers() -> Verdict {
    let place = Place::new()?;
    place.put_nonce(7)?;
    let good = place.operation();
    for offset in [1, 8, 0xFF8] {
        let at = |from: Buffer| buffer(Gpa::new(from.gpa + offset), 0x100);
        for operation in [
            ServicesOperation {
                report: at(good.report),
                ..good
            },
            ServicesOperation {
                manifest: at(good.manifest),
                ..good
            },
            ServicesOperation {
                certificates: at(good.certificates),
                ..good
            },
        ] {
            refused(place, &operation, ResultCode::INVALID_PARAMETER)?;
        }
    }
    Ok(())
}

fn overlapping_buffers() -> Verdict {
    let place = Place::new()?;
    place.put_nonce(8)?;
    let good = place.operation();
    for operation in [
        ServicesOperation {
            report: good.manifest,
            ..good
        },
        ServicesOperation {
            report: buffer(place.page(REPORT_PAGE), PAGE_SIZE as u32 + 1),
            ..good
        },
        ServicesOperation {
            manifest: buffer(place.page(CERTIFICATE_PAGE + 3), 0x100),
            ..good
        },
        ServicesOperation {
            nonce: buffer(Gpa::new(place.page(REPORT_PAGE).get() + 0x100), 64),
            ..good
        },
    ] {
        refused(place, &operation, ResultCode::INVALID_PARAMETER)?;
    }
    Ok(())
}

fn huge_buffers() -> Verdict {
    let place = Place::new()?;
    place.put_nonce(9)?;
    place.blank()?;
    let huge = ServicesOperation {
        certificates: buffer(place.page(CERTIFICATE_PAGE), u32::MAX),
        ..place.operation()
    };
    expect("result", ask(&huge)?.0, ResultCode::SUCCESS)?;
    place.expect_answer::<ServicesManifest>(9)?;
    let two = ServicesOperation {
        report: buffer(place.page(REPORT_PAGE), u32::MAX),
        ..huge
    };
    refused(place, &two, ResultCode::INVALID_PARAMETER)
}

fn nonce_sizes() -> Verdict {
    let place = Place::new()?;
    place.put_nonce(10)?;
    for size in [0, 1, 63, 65, 4096, 1 << 16 | 64, u32::MAX] {
        let operation = ServicesOperation {
            nonce: buffer(place.nonce(), size),
            ..place.operation()
        };
        refused(place, &operation, ResultCode::INVALID_PARAMETER)?;
    }
    Ok(())
}

/// In a page, up to its end, and over it by some words and by all but one.
fn nonces_anywhere() -> Verdict {
    let place = Place::new()?;
    for (number, offset) in (12..).zip([0, 0x7F8, 0xFC0, 0xFC8, 0xFF8]) {
        let nonce = Gpa::new(place.0.get() + offset);
        memory::put_bytes(nonce.get(), &nonce_of(number))?;
        place.blank()?;
        let operation = ServicesOperation {
            nonce: buffer(nonce, 64),
            ..place.operation()
        };
        expect("result", ask(&operation)?.0, ResultCode::SUCCESS)?;
        place.expect_answer::<ServicesManifest>(number)?;
    }
    Ok(())
}

fn reserved_words() -> Verdict {
    let place = Place::new()?;
    place.put_nonce(11)?;
    for index in 0..4 {
        let mut operation = place.operation();
        let buffers = [
            &mut operation.report,
            &mut operation.nonce,
            &mut operation.manifest,
            &mut operation.certificates,
        ];
        buffers.into_iter().nth(index).expect("four").reserved = 1 << 16;
        refused(place, &operation, ResultCode::INVALID_PARAMETER)?;
    }
    Ok(())
}

fn bad_operations() -> Verdict {
    let place = Place::new()?;
    let services = AttestationCall::SERVICES.id();
    let single = AttestationCall::SINGLE_SERVICE.id();
    let (base, _) = setup::paravisor();
    let page = place.0.get();
    let parameter = ResultCode::INVALID_PARAMETER;
    let address = ResultCode::INVALID_ADDRESS;
    for (id, rcx, code) in [
        (services, page + 4, parameter),
        (services, page + 0xFC8, parameter),
        (services, page + 0xFF8, parameter),
        (single, page + 0xFB0, parameter),
        (services, base.get(), address),
        (services, base.get() + 0x1000, address),
        (services, memory::fresh_page().get(), address),
        (services, NO_MEMORY.get(), address),
        (single, 1 << 52, address),
        (services, 0u64.wrapping_sub(PAGE_SIZE), address),
    ] {
        unchanged(&[place.0], || {
            let answer = call(id, Registers::rcx(rcx))?;
            expect("result", answer.result(), code)?;
            expect("RCX", answer.registers.rcx, rcx)
        })?;
    }
    Ok(())
}

fn unknown_services() -> Verdict {
    let (place, good) = single()?;
    let vtpm = protocols::guid::Guid::from_text("c476f1eb-0123-45a5-9641-b4e7dde5bfe3");
    for operation in [
        SingleServiceOperation {
            service: vtpm,
            ..good
        },
        SingleServiceOperation {
            manifest_version: 1,
            ..good
        },
        SingleServiceOperation {
            reserved: 1,
            ..good
        },
    ] {
        let (result, registers) = pass(AttestationCall::SINGLE_SERVICE, operation.as_bytes())?;
        expect("result", result, ResultCode::INVALID_PARAMETER)?;
        let untouched = (svsm::buffer().get(), u64::MAX, u64::MAX);
        expect("RCX, RDX, R8", sizes(&registers), untouched)?;
        place.expect_blank()?;
    }
    Ok(())
}

fn unknown_calls() -> Verdict {
    for number in [2, 3, u32::MAX] {
        let registers = Registers::rcx(svsm::buffer().get());
        let answer = call(AttestationCall(number).id(), registers)?;
        expect("result", answer.result(), ResultCode::UNSUPPORTED_CALL)?;
        expect("registers", answer.registers, registers)?;
    }
    Ok(())
}

/// The region of the buffers, by member.
static PLACES: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];

/// Each gets reports about its own nonces, whoever else asks at the same time.
fn all_at_once() -> Verdict {
    const ROUNDS: u8 = 6;
    Team::with(|team| {
        for place in PLACES.iter().take(team.members()) {
            place.store(Place::new()?.0.get(), Ordering::SeqCst);
        }
        team.all(|Member { number, caller }| {
            let place = Place(Gpa::new(PLACES[number].load(Ordering::SeqCst)));
            for round in 0..ROUNDS {
                let nonce = number as u8 * ROUNDS + round;
                place.put_nonce(nonce)?;
                let operation = place.operation();
                let (result, registers) =
                    pass_by(caller, AttestationCall::SERVICES, operation.as_bytes())?;
                expect("result", result, ResultCode::SUCCESS)?;
                expect("report", registers.r8, REPORT)?;
                place.expect_answer::<ServicesManifest>(nonce)?;
            }
            Ok(())
        })
    })
}
