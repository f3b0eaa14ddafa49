//! The attestation protocol on the model: what is delivered, and what is refused without a trace.

use accept::{Block, Frame, OnNoChange, Role};
use protocols::amd_sp::GuestRequestOutcome;
use protocols::amd_sp::report::AttestationReport;
use protocols::exit_code::ExitCode;
use protocols::launch::{AcceptPolicy, Acceptance};
use protocols::svsm::ResultCode;
use protocols::svsm::attestation::{
    AttestationCall, Buffer, SERVICES_MANIFEST, ServicesManifest, ServicesOperation,
    SingleServiceOperation, TURNSTILE_SERVICE, TurnstileManifest,
};
use protocols::terminate::TurnstileReason;
use sha2::{Digest, Sha512};
use zerocopy::{FromBytes, IntoBytes};

use super::model::{AREA, BOOT, END, GUEST, GUEST_PAGES, LIST, OWN_PAGE, VMSA};
use super::world::{World, in_world, in_world_that_accepts, validate_4k};
use crate::attestation::channel::{SealedAnswer, SealedRequest};
use crate::attestation::tests::{Host, ToModel, table};
use crate::attestation::{self, CERTIFICATE_BYTES, Carrier};
use crate::protocol::{Answer, Registers, Service};

const NONCE: u64 = GUEST + 0xFE0;
const REPORT: u64 = GUEST + 0x2000;
const MANIFEST: u64 = GUEST + 0x3000;
const CERTIFICATES: u64 = GUEST + 0x4000;
const OUTPUTS_END: u64 = CERTIFICATES + 0x4000;
/// What the buffers hold before a call.
const BLANK: u8 = 0xB1;

const fn buffer(gpa: u64, size: u32) -> Buffer {
    Buffer {
        gpa,
        size,
        reserved: 0,
    }
}

/// What Linux passes; the nonce crosses pages.
const GOOD: ServicesOperation = ServicesOperation {
    report: buffer(REPORT, 0x1000),
    nonce: buffer(NONCE, 64),
    manifest: buffer(MANIFEST, 0x1000),
    certificates: buffer(CERTIFICATES, 0x4000),
};

const SINGLE: SingleServiceOperation = SingleServiceOperation {
    buffers: GOOD,
    service: TURNSTILE_SERVICE,
    manifest_version: 0,
    reserved: 0,
};

fn nonce() -> Vec<u8> {
    (0..64).collect()
}

/// Fills the pages that take part, and passes the operation at `at`.
fn ask_at(
    world: &World<'_>,
    call: AttestationCall,
    at: u64,
    operation: &[u8],
) -> (ResultCode, Registers) {
    world
        .machine
        .fill(REPORT, &vec![BLANK; (OUTPUTS_END - REPORT) as usize]);
    world.machine.fill(NONCE, &nonce());
    if at < END {
        world.machine.fill(at, operation);
    }
    let registers = Registers {
        rax: call.id().encode(),
        rcx: at,
        rdx: u64::MAX,
        r8: u64::MAX,
        r9: 9,
    };
    match world.call_raw(&registers) {
        Answer::Return(answer) => {
            assert_eq!(answer.r9, 9);
            (ResultCode::decode(answer.rax), answer)
        }
        other => panic!("{other:?}"),
    }
}

fn ask(world: &World<'_>, operation: &ServicesOperation) -> (ResultCode, Registers) {
    ask_at(world, AttestationCall::SERVICES, LIST, operation.as_bytes())
}

fn sizes(registers: &Registers) -> (u64, u64, u64) {
    (registers.rcx, registers.rdx, registers.r8)
}

/// No byte of the buffers was written.
fn assert_blank(world: &World<'_>) {
    let same = world.machine.holds(REPORT, OUTPUTS_END - REPORT, BLANK);
    assert!(same, "something was written");
}

/// The call is refused with `code`, its registers are as they were, nothing is written, and the security
/// processor was not asked.
fn refused(world: &World<'_>, operation: &ServicesOperation, code: ResultCode) {
    let asked = world.firmware.borrow().seen.len();
    let (result, registers) = world.nothing_changes(|| ask(world, operation));
    assert_eq!(result, code, "{operation:x?}");
    assert_eq!(sizes(&registers), (LIST, u64::MAX, u64::MAX));
    assert_blank(world);
    assert_eq!(world.firmware.borrow().seen.len(), asked);
}

fn report(world: &World<'_>) -> AttestationReport {
    let bytes = world.machine.bytes(REPORT, AttestationReport::SIZE);
    AttestationReport::read_from_bytes(&bytes).unwrap()
}

#[test]
fn all_services_with_certificates_as_linux_asks() {
    in_world(|world| {
        let (code, registers) = world.nothing_changes(|| ask(world, &GOOD));
        assert_eq!(code, ResultCode::SUCCESS);
        let size = size_of::<ServicesManifest>();
        assert_eq!(sizes(&registers), (size as u64, 148, 0x4A0));
        let manifest = world.machine.bytes(MANIFEST, size);
        let expected: [u8; 64] = Sha512::new()
            .chain_update(nonce())
            .chain_update(&manifest)
            .finalize()
            .into();
        assert_eq!(report(world).report_data, expected);
        assert_eq!(report(world).vmpl, 0);
        assert_eq!(world.machine.bytes(CERTIFICATES, 148), table(100));
        // Not a byte beyond what was told.
        for (end, next) in [
            (MANIFEST + size as u64, CERTIFICATES),
            (CERTIFICATES + 148, OUTPUTS_END),
            (REPORT + 0x4A0, MANIFEST),
        ] {
            assert!(world.machine.holds(end, next - end, BLANK));
        }
        let manifest = ServicesManifest::read_from_bytes(&manifest).unwrap();
        assert_eq!(manifest.header.guid, SERVICES_MANIFEST);
        assert_eq!((manifest.header.size, manifest.header.entries), (144, 1));
        assert_eq!(manifest.entry.service, TURNSTILE_SERVICE);
        assert_eq!((manifest.entry.offset, manifest.entry.size), (48, 96));
    });
}

#[test]
fn one_service_has_its_own_manifest_alone() {
    in_world(|world| {
        let (code, registers) = ask_at(
            world,
            AttestationCall::SINGLE_SERVICE,
            LIST,
            SINGLE.as_bytes(),
        );
        assert_eq!(code, ResultCode::SUCCESS);
        assert_eq!(sizes(&registers), (96, 148, 0x4A0));
        let manifest = world.machine.bytes(MANIFEST, 96);
        let data = Sha512::digest([nonce(), manifest].concat());
        assert_eq!(report(world).report_data, *data);
    });
}

#[test]
fn the_manifest_tells_policy_and_totals() {
    let policy = Acceptance {
        policy: AcceptPolicy::AHEAD,
        read_ahead: 3,
        ..Acceptance::LAZY
    };
    in_world_that_accepts(policy, |world| {
        world.accept_page_0();
        let again = world.pvalidate(&[validate_4k(0)]);
        assert_eq!(again, (ResultCode::FAIL_NO_CHANGE, 0));
        let told = |world: &World<'_>| {
            let single = AttestationCall::SINGLE_SERVICE;
            let (code, _) = ask_at(world, single, LIST, SINGLE.as_bytes());
            let bytes = world.machine.bytes(MANIFEST, 96);
            (code, TurnstileManifest::read_from_bytes(&bytes).unwrap())
        };
        let (code, manifest) = told(world);
        assert_eq!(code, ResultCode::SUCCESS);
        let accepted = (GUEST_PAGES + 1) << 12;
        let expected = TurnstileManifest {
            version: 0,
            size: 96,
            policy: AcceptPolicy::AHEAD.0,
            order: policy.order.0,
            budget: world.ahead.budget(),
            read_ahead: 3,
            reserved: 0,
            memory_bytes: END,
            counted_bytes: END,
            unaccepted_bytes: END - accepted - 0x3000,
            ahead_bytes: 0,
            accepted_bytes: accepted,
            owned_bytes: 0x3000,
            repeated_requests: 1,
            host_lies: 0,
        };
        assert_eq!(manifest, expected);
        world.firmware.borrow_mut().script = vec![Host::Drops];
        assert_eq!(told(world).0, ResultCode::INVALID_REQUEST);
        assert_eq!(told(world).1.host_lies, 1, "and the next one tells");
    });
}

#[test]
fn buffers_that_are_too_small_are_told_what_they_need() {
    in_world(|world| {
        world.firmware.borrow_mut().certificates = table(5000);
        let needed = (144, 5048, 0x4A0);
        let with = |report: u32, manifest: u32, certificates: u32| ServicesOperation {
            report: buffer(REPORT, report),
            manifest: buffer(MANIFEST, manifest),
            certificates: buffer(CERTIFICATES, certificates),
            ..GOOD
        };
        for small in [
            with(0, 0x1000, 0x4000),
            with(0x49F, 0x1000, 0x4000),
            with(0x1000, 0, 0x4000),
            with(0x1000, 143, 0x4000),
            with(0x1000, 0x1000, 1),
            with(0x1000, 0x1000, 5047),
            with(1, 1, 1),
        ] {
            let (code, registers) = world.nothing_changes(|| ask(world, &small));
            assert_eq!(code, ResultCode::INVALID_PARAMETER, "{small:x?}");
            assert_eq!(sizes(&registers), needed);
            assert_blank(world);
        }
        let exact = with(0x4A0, 144, 5048);
        assert_eq!(ask(world, &exact).0, ResultCode::SUCCESS);
        // Not wanted is not too small.
        let (code, registers) = ask(world, &with(0x1000, 0x1000, 0));
        assert_eq!(code, ResultCode::SUCCESS);
        assert_eq!(sizes(&registers), (144, 0, 0x4A0));
        let nowhere = ServicesOperation {
            certificates: buffer(u64::MAX, 0),
            ..GOOD
        };
        assert_eq!(ask(world, &nowhere).0, ResultCode::SUCCESS);
        world.firmware.borrow().assert_no_number_twice();
    });
}

#[test]
fn huge_buffers_are_touched_no_further_than_needed() {
    in_world(|world| {
        let huge = |gpa| buffer(gpa, u32::MAX);
        let one = ServicesOperation {
            certificates: huge(CERTIFICATES),
            ..GOOD
        };
        assert_eq!(ask(world, &one).0, ResultCode::SUCCESS);
        let last = GUEST + (GUEST_PAGES - 4) * 0x1000;
        let at_the_end = ServicesOperation {
            certificates: buffer(last, CERTIFICATE_BYTES as u32 + 0x1000),
            ..GOOD
        };
        assert_eq!(ask(world, &at_the_end).0, ResultCode::SUCCESS);
        let over_the_end = ServicesOperation {
            certificates: buffer(last + 0x1000, CERTIFICATE_BYTES as u32),
            ..GOOD
        };
        refused(world, &over_the_end, ResultCode::INVALID_ADDRESS);
        // Two huge ones overlap.
        let two = ServicesOperation {
            report: huge(REPORT),
            ..GOOD
        };
        refused(world, &two, ResultCode::INVALID_PARAMETER);
    });
}

#[test]
fn i4_buffers_that_are_not_the_guests_are_refused() {
    in_world(|world| {
        let foreign = [
            OWN_PAGE,
            VMSA,
            AREA,
            0,
            0x60_0000,
            END,
            1 << 40,
            (1 << 52) - 0x4000,
            1 << 52,
            u64::MAX - 0xFFF,
        ];
        for gpa in foreign {
            let refuse = |operation| refused(world, &operation, ResultCode::INVALID_ADDRESS);
            refuse(ServicesOperation {
                report: buffer(gpa, 0x1000),
                ..GOOD
            });
            refuse(ServicesOperation {
                manifest: buffer(gpa, 0x1000),
                ..GOOD
            });
            refuse(ServicesOperation {
                certificates: buffer(gpa, 0x4000),
                ..GOOD
            });
            refuse(ServicesOperation {
                nonce: buffer(gpa, 64),
                ..GOOD
            });
        }
        // The second page of the nonce, the last of the certificates.
        refused(
            world,
            &ServicesOperation {
                nonce: buffer(GUEST + (GUEST_PAGES << 12) - 1, 64),
                ..GOOD
            },
            ResultCode::INVALID_ADDRESS,
        );
    });
}

#[test]
fn forms_that_mean_nothing_are_refused() {
    in_world(|world| {
        let refuse = |operation| refused(world, &operation, ResultCode::INVALID_PARAMETER);
        for offset in [1, 8, 0x800, 0xFFF] {
            refuse(ServicesOperation {
                report: buffer(REPORT + offset, 0x1000),
                ..GOOD
            });
            refuse(ServicesOperation {
                manifest: buffer(MANIFEST + offset, 0x1000),
                ..GOOD
            });
            refuse(ServicesOperation {
                certificates: buffer(CERTIFICATES + offset, 0x1000),
                ..GOOD
            });
        }
        // A nonce of another length would let the guest write the beginning of the manifest.
        for size in [0, 1, 63, 65, 128, 64 + (1 << 16), u32::MAX] {
            refuse(ServicesOperation {
                nonce: buffer(NONCE, size),
                ..GOOD
            });
        }
        for spoil in 0..4 {
            for bit in [0, 31] {
                let mut operation = GOOD;
                let buffer = match spoil {
                    0 => &mut operation.report,
                    1 => &mut operation.nonce,
                    2 => &mut operation.manifest,
                    _ => &mut operation.certificates,
                };
                buffer.reserved = 1 << bit;
                refuse(operation);
            }
        }
        // Each two of them.
        for operation in [
            ServicesOperation {
                report: buffer(MANIFEST, 0x1000),
                ..GOOD
            },
            ServicesOperation {
                report: buffer(REPORT, 0x1001),
                ..GOOD
            },
            ServicesOperation {
                manifest: buffer(CERTIFICATES + 0x3000, 0x1000),
                ..GOOD
            },
            ServicesOperation {
                report: buffer(CERTIFICATES + 0x1000, 1),
                ..GOOD
            },
            ServicesOperation {
                nonce: buffer(REPORT + 0x800, 64),
                ..GOOD
            },
            ServicesOperation {
                nonce: buffer(CERTIFICATES - 1, 64),
                ..GOOD
            },
        ] {
            refuse(operation);
        }
    });
}

#[test]
fn operations_lie_in_one_page_of_the_guests() {
    in_world(|world| {
        let services = AttestationCall::SERVICES;
        let bytes = GOOD.as_bytes();
        let code = |call, at, bytes: &[u8]| ask_at(world, call, at, bytes).0;
        assert_eq!(code(services, GUEST + 0xF80, bytes), ResultCode::SUCCESS);
        for at in [LIST + 1, LIST + 4, GUEST + 0xFC8, GUEST + 0xFF8] {
            assert_eq!(
                code(services, at, bytes),
                ResultCode::INVALID_PARAMETER,
                "{at:#x}"
            );
        }
        let single = AttestationCall::SINGLE_SERVICE;
        let at = GUEST + 0xFB0;
        assert_eq!(
            code(single, at, SINGLE.as_bytes()),
            ResultCode::INVALID_PARAMETER
        );
        for at in [OWN_PAGE, VMSA, 0x60_0000, END, 1 << 52, u64::MAX - 0xFFF] {
            assert_eq!(
                code(services, at, &[]),
                ResultCode::INVALID_ADDRESS,
                "{at:#x}"
            );
        }
        assert_eq!(
            code(AttestationCall(2), LIST, bytes),
            ResultCode::UNSUPPORTED_CALL
        );
        assert_eq!(
            code(AttestationCall(u32::MAX), 3, bytes),
            ResultCode::UNSUPPORTED_CALL
        );
    });
}

#[test]
fn unknown_services_versions_and_reserved_words() {
    in_world(|world| {
        let mut vtpm = SINGLE;
        vtpm.service = protocols::guid::Guid::from_text("c476f1eb-0123-45a5-9641-b4e7dde5bfe3");
        let version = SingleServiceOperation {
            manifest_version: 1,
            ..SINGLE
        };
        let reserved = SingleServiceOperation {
            reserved: 1,
            ..SINGLE
        };
        for operation in [vtpm, version, reserved] {
            let single = AttestationCall::SINGLE_SERVICE;
            let (code, registers) = ask_at(world, single, LIST, operation.as_bytes());
            assert_eq!(code, ResultCode::INVALID_PARAMETER);
            assert_eq!(sizes(&registers), (LIST, u64::MAX, u64::MAX));
            assert_blank(world);
        }
    });
}

#[test]
fn the_guest_is_told_the_truth_about_its_host() {
    in_world(|world| {
        for (host, code) in [
            (Host::Busy, ResultCode::BUSY),
            (Host::Fails, ResultCode::INVALID_REQUEST),
            (Host::Breaks, ResultCode::INVALID_REQUEST),
            (Host::Drops, ResultCode::INVALID_REQUEST),
            (Host::Tampers(0x70), ResultCode::INVALID_REQUEST),
        ] {
            world.firmware.borrow_mut().script = vec![host];
            let (result, registers) = world.nothing_changes(|| ask(world, &GOOD));
            assert_eq!(result, code, "{host:?}");
            assert_eq!(sizes(&registers), (LIST, u64::MAX, u64::MAX));
            assert_blank(world);
        }
        world.firmware.borrow().assert_no_number_twice();
    });
}

#[test]
fn another_processor_s_report_is_not_waited_for() {
    in_world(|world| {
        let meanwhile = world
            .line
            .report(&[0; 64], false, |_, _| ask(world, &GOOD).0);
        assert_eq!(meanwhile, Ok(ResultCode::BUSY));
        assert_eq!(ask(world, &GOOD).0, ResultCode::SUCCESS);
    });
}

/// A host that lets another processor of the guest act while a message is on its way.
struct Meanwhile<'a, F> {
    inner: ToModel<'a>,
    act: F,
}

impl<F: Fn()> Carrier for Meanwhile<'_, F> {
    fn carry(
        &self,
        request: &SealedRequest,
        certificates: bool,
        answer: &mut SealedAnswer,
    ) -> Result<GuestRequestOutcome, TurnstileReason> {
        (self.act)();
        self.inner.carry(request, certificates, answer)
    }

    fn certificates(&self, into: &mut [u8]) {
        self.inner.certificates(into);
    }
}

/// The attack: the buffers are good when the call is checked; while the security processor is at work another
/// processor gives one away, or makes it a VMSA. The report must not be written there.
#[test]
fn i4_a_buffer_that_is_given_away_meanwhile_is_not_written_to() {
    for gpa in [REPORT, MANIFEST, CERTIFICATES] {
        for lend in [false, true] {
            in_world(|world| {
                let page = Frame::containing(gpa);
                let act = || {
                    if lend {
                        // It is never given back.
                        let _taken = world.engine.take(page, Role::Vmsa).unwrap();
                    } else {
                        let done = world.engine.rescind(Block::page(page), OnNoChange::Fail);
                        world.engine.flush(done.unwrap().flush.unwrap()).unwrap();
                    }
                };
                let inner = ToModel(world.firmware);
                let line = attestation::tests::line_of(Meanwhile { inner, act });
                let machine = world.machine;
                let service =
                    Service::new(world.engine, machine, machine, machine, world.ahead, &line);
                machine.fill(REPORT, &vec![BLANK; (OUTPUTS_END - REPORT) as usize]);
                machine.fill(NONCE, &nonce());
                machine.fill(LIST, GOOD.as_bytes());
                machine.fill(AREA, &[1]);
                let registers = Registers {
                    rax: AttestationCall::SERVICES.id().encode(),
                    rcx: LIST,
                    ..Registers::default()
                };
                let answer = service.handle(BOOT, ExitCode::VMGEXIT, &registers);
                let refused = Registers {
                    rax: ResultCode::INVALID_ADDRESS.encode(),
                    ..registers
                };
                assert_eq!(answer, Answer::Return(refused), "{gpa:#x}");
                assert!(machine.holds(gpa, 4096, BLANK), "{gpa:#x} was written to");
            });
        }
    }
}
