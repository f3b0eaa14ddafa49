//! From the stopped processor to the answer: what counts as a call, and which calls exist.

use protocols::exit_code::ExitCode;
use protocols::svsm::{CallId, CoreCall, Protocol, ProtocolQuery, ResultCode};
use protocols::terminate::TurnstileReason;

use super::model::{AREA, END, OWN_PAGE, Page};
use super::world::{core_registers, in_world};
use crate::protocol::{Answer, Registers, VcpuIndex};

fn registers(protocol: Protocol, call: u32) -> Registers {
    Registers {
        rax: CallId { protocol, call }.encode(),
        rcx: 5,
        rdx: 6,
        r8: 7,
        r9: 8,
    }
}

#[test]
fn an_exit_without_a_call_is_resumed_unchanged() {
    in_world(|world| {
        let query = core_registers(CoreCall::QUERY_PROTOCOL, [1, 0, 0]);
        // The host comes here for nothing, with and without a VMGEXIT.
        assert_eq!(world.exit(ExitCode::VMGEXIT, &query), Answer::Resume);
        world.machine.fill(AREA, &[1]);
        for exit in [
            ExitCode::INTR,
            ExitCode::HLT,
            ExitCode::NPF,
            ExitCode::INVALID,
        ] {
            assert_eq!(world.exit(exit, &query), Answer::Resume);
        }
        assert_eq!(world.machine.bytes(AREA, 1), [1], "the call still waits");
    });
}

#[test]
fn a_malformed_pending_flag_is_refused_and_cleared() {
    in_world(|world| {
        for flag in [2, 0x80, 0xff] {
            world.machine.fill(AREA, &[flag]);
            let query = core_registers(CoreCall::QUERY_PROTOCOL, [1, 0, 0]);
            let answer = world.exit(ExitCode::VMGEXIT, &query);
            let expected = Registers {
                rax: ResultCode::INVALID_FORMAT.encode(),
                ..query
            };
            assert_eq!(answer, Answer::Return(expected));
            assert_eq!(world.machine.bytes(AREA, 1), [0]);
        }
    });
}

#[test]
fn a_lost_calling_area_ends_the_machine() {
    in_world(|world| {
        let page = world.machine.page(AREA);
        world.machine.set_page(AREA, Page::default());
        let query = core_registers(CoreCall::QUERY_PROTOCOL, [1, 0, 0]);
        let answer = world.exit(ExitCode::VMGEXIT, &query);
        assert_eq!(answer, Answer::Terminate(TurnstileReason::NOT_VALIDATED));
        world.machine.set_page(AREA, page);
    });
}

#[test]
fn other_protocols_are_not_supported() {
    in_world(|world| {
        let others = [
            Protocol::VTPM,
            Protocol::APIC,
            Protocol::UEFI_MM,
            Protocol(5),
            Protocol(0x8000_0000),
            Protocol(u32::MAX),
        ];
        for protocol in others {
            for call in [0, 1, u32::MAX] {
                let before = registers(protocol, call);
                let (code, after) = world.nothing_changes(|| world.call(before));
                assert_eq!(code, ResultCode::UNSUPPORTED_PROTOCOL, "{protocol:?}");
                assert_eq!(after, before, "registers are preserved");
            }
        }
    });
}

#[test]
fn unknown_core_calls_are_not_supported() {
    in_world(|world| {
        for call in [
            CoreCall::DEPOSIT_MEM.0,
            CoreCall::WITHDRAW_MEM.0,
            8,
            9,
            u32::MAX,
        ] {
            let before = registers(Protocol::CORE, call);
            let (code, after) = world.nothing_changes(|| world.call(before));
            assert_eq!(code, ResultCode::UNSUPPORTED_CALL, "call {call}");
            assert_eq!(after, before);
        }
    });
}

#[test]
fn a_query_tells_the_versions_of_the_protocols_that_there_are() {
    in_world(|world| {
        for (protocol, version, answer) in [
            (Protocol::CORE, 1, 1 << 32 | 1),
            (Protocol::CORE, 0, 0),
            (Protocol::CORE, 2, 0),
            (Protocol::CORE, u32::MAX, 0),
            (Protocol::VTPM, 1, 0),
            (Protocol::ATTESTATION, 1, 1 << 32 | 1),
            (Protocol::ATTESTATION, 2, 0),
            (Protocol(77), 1, 0),
        ] {
            let rcx = ProtocolQuery { protocol, version }.encode();
            let before = core_registers(CoreCall::QUERY_PROTOCOL, [rcx, 1, 2]);
            let (code, after) = world.nothing_changes(|| world.call(before));
            assert_eq!(code, ResultCode::SUCCESS);
            assert_eq!(
                after,
                Registers {
                    rcx: answer,
                    ..before
                },
                "{protocol:?} {version}"
            );
        }
    });
}

#[test]
fn a_virtual_top_of_memory_is_not_supported_and_says_so() {
    in_world(|world| {
        let before = core_registers(CoreCall::CONFIGURE_VTOM, [1, 3, 4]);
        let (code, after) = world.call(before);
        assert_eq!(code, ResultCode::SUCCESS);
        assert_eq!(
            after,
            Registers {
                rcx: 0,
                rdx: 0,
                r8: 0,
                ..before
            }
        );
        for (rcx, code) in [
            (3, ResultCode::INVALID_PARAMETER),
            (1 | 1 << 63, ResultCode::INVALID_PARAMETER),
            (2 | 0x20, ResultCode::INVALID_PARAMETER),
            (0x800, ResultCode::INVALID_PARAMETER),
            (2 | 0x4000_0000, ResultCode::INVALID_REQUEST),
            (0, ResultCode::INVALID_REQUEST),
        ] {
            let refused =
                world.nothing_changes(|| world.core(CoreCall::CONFIGURE_VTOM, [rcx, 3, 4]));
            assert_eq!(refused, code, "{rcx:#x}");
        }
    });
}

#[test]
fn a_processor_without_a_calling_area_cannot_call() {
    in_world(|world| {
        let query = core_registers(CoreCall::QUERY_PROTOCOL, [1, 0, 0]);
        for index in [1, 2, usize::MAX] {
            let answer = world.exit_on(VcpuIndex(index), ExitCode::VMGEXIT, &query);
            assert_eq!(answer, Answer::Resume);
        }
    });
}

#[test]
fn any_registers_are_survived() {
    // A guest that throws dice: whatever it says, the answer is a code and the map stays true.
    in_world(|world| {
        let mut dice = 0x1234_5678_9abc_def1u64;
        let mut roll = || {
            dice ^= dice << 13;
            dice ^= dice >> 7;
            dice ^= dice << 17;
            dice
        };
        let addresses = [
            AREA,
            OWN_PAGE,
            END,
            u64::MAX,
            0,
            1 << 52,
            0x10_0000,
            0x10_0008,
        ];
        for _ in 0..20_000 {
            let mut word = || match roll() % 4 {
                0 => roll(),
                1 => roll() % 16,
                _ => addresses[roll() as usize % addresses.len()].wrapping_add(roll() % 3 * 8),
            };
            let registers = Registers {
                rax: word() % 10,
                rcx: word(),
                rdx: word(),
                r8: word() % 4,
                r9: word(),
            };
            assert!(
                matches!(world.call_raw(&registers), Answer::Return(_)),
                "{registers:x?}"
            );
        }
    });
}
