//! Protocol and call numbers, discovery, and what is not a call at all.

use guest::harness::{Case, Verdict, case, expect, expect_not};
use guest::oracle;
use guest::svsm::{self, Answer, KEPT, Registers, call, call_with_pending};
use protocols::addr::{Gpa, PAGE_SIZE};
use protocols::oracle::Counter;
use protocols::svsm::{CallId, CoreCall, Protocol, ProtocolQuery, ResultCode};

use crate::setup::{self, unchanged};

/// The table.
pub const CASES: &[Case] = &[
    case("secrets_svsm_fields", "svsm.md §1", svsm_fields),
    case(
        "secrets_without_keys_above",
        "svsm.md §1, design.md I10",
        no_keys_above,
    ),
    case(
        "keys_are_gone_from_the_launch_page",
        "design.md I10",
        launch_page_is_wiped,
    ),
    case("paravisor_range_is_closed", "svsm.md §1", range_is_closed),
    case("query_core", "svsm.md §4.6", query_core),
    case(
        "query_core_other_version",
        "svsm.md §4.6",
        query_other_version,
    ),
    case("query_unknown_protocols", "svsm.md §4.6", query_unknown),
    case("unknown_protocol", "svsm.md §3", unknown_protocol),
    case("unknown_core_call", "svsm.md §3", unknown_call),
    case("deposit_and_withdraw", "svsm.md §4", deposit_and_withdraw),
    case("vtom_query", "svsm.md §4.7", vtom_query),
    case("vtom_configure", "svsm.md §4.7", vtom_configure),
    case("vtom_query_reserved_bits", "svsm.md §4.7", vtom_reserved),
    case("vtpm_query", "svsm.md §6, guests.md §1.1", vtpm_query),
    case("apic_protocol", "svsm.md §7", apic),
    case("no_call_pending", "svsm.md §2 step 4", nothing_pending),
    case("pending_is_neither_0_nor_1", "svsm.md §2", odd_pending),
    case("registers_are_kept", "svsm.md §2", registers_kept),
    case("upper_half_of_call_counts", "svsm.md §2", upper_half),
];

fn svsm_fields() -> Verdict {
    let (base, size) = setup::paravisor();
    expect_not("SVSM_SIZE", size, 0)?;
    expect(
        "SVSM_BASE and SVSM_SIZE in pages",
        (base.get() | size) % PAGE_SIZE,
        0,
    )?;
    expect(
        "SVSM_CAA",
        setup::first_calling_area(),
        Gpa::new(crate::reset::CALLING_AREA),
    )?;
    expect(
        "SVSM_MAX_VERSION, SVSM_GUEST_VMPL",
        setup::version_and_vmpl(),
        (1, 1),
    )
}

fn no_keys_above() -> Verdict {
    expect("VMPCK0", setup::vmpck(0), 0)?;
    expect_not("VMPCK1", setup::vmpck(1), 0)
}

/// The paravisor has its key elsewhere, the guest has its own.
fn launch_page_is_wiped() -> Verdict {
    let left = oracle::counter(Counter::KEYS_IN_LAUNCH_PAGE);
    expect("keys", left, 0)
}

fn range_is_closed() -> Verdict {
    let (base, size) = setup::paravisor();
    for gpa in (base.get()..base.get() + size).step_by(PAGE_SIZE as usize) {
        expect(
            "permissions of VMPL1",
            oracle::page(Gpa::new(gpa)).permissions[1],
            0,
        )?;
    }
    Ok(())
}

fn core(call_number: CoreCall) -> CallId {
    CallId::core(call_number)
}

fn query(protocol: Protocol, version: u32) -> Result<u64, guest::harness::Finding> {
    let rcx = ProtocolQuery { protocol, version }.encode();
    let answer = call(core(CoreCall::QUERY_PROTOCOL), Registers::rcx(rcx))?;
    // Also for what is not there: the answer is in RCX.
    expect("result", answer.result(), ResultCode::SUCCESS)?;
    Ok(answer.registers.rcx)
}

fn query_core() -> Verdict {
    expect("RCX", query(Protocol::CORE, 1)?, 1 << 32 | 1)
}

fn query_other_version() -> Verdict {
    for version in [0, 2, u32::MAX] {
        expect("RCX", query(Protocol::CORE, version)?, 0)?;
    }
    Ok(())
}

fn query_unknown() -> Verdict {
    for protocol in [2, 3, 4, 5, 0x8000_0000, u32::MAX] {
        expect("RCX", query(Protocol(protocol), 1)?, 0)?;
    }
    Ok(())
}

fn expect_result(id: CallId, registers: Registers, result: ResultCode) -> Verdict {
    unchanged(&[svsm::calling_area()], || {
        expect("result", call(id, registers)?.result(), result)
    })
}

fn expect_unsupported_protocol(protocol: Protocol) -> Verdict {
    for number in [0, 1, 2, u32::MAX] {
        let id = CallId {
            protocol,
            call: number,
        };
        let registers = Registers::rcx(svsm::buffer().get());
        expect_result(id, registers, ResultCode::UNSUPPORTED_PROTOCOL)?;
    }
    Ok(())
}

fn unknown_protocol() -> Verdict {
    for protocol in [4, 5, 0x8000_0000, u32::MAX] {
        expect_unsupported_protocol(Protocol(protocol))?;
    }
    Ok(())
}

fn unknown_call() -> Verdict {
    for number in [8, 0x100, u32::MAX] {
        let id = CallId {
            protocol: Protocol::CORE,
            call: number,
        };
        expect_result(id, Registers::default(), ResultCode::UNSUPPORTED_CALL)?;
    }
    Ok(())
}

fn deposit_and_withdraw() -> Verdict {
    for call_number in [CoreCall::DEPOSIT_MEM, CoreCall::WITHDRAW_MEM] {
        let registers = Registers::rcx(svsm::buffer().get());
        expect_result(core(call_number), registers, ResultCode::UNSUPPORTED_CALL)?;
    }
    Ok(())
}

const VTOM_QUERY: u64 = 1;

fn vtom_query() -> Verdict {
    let answer = call(core(CoreCall::CONFIGURE_VTOM), Registers::rcx(VTOM_QUERY))?;
    expect("result", answer.result(), ResultCode::SUCCESS)?;
    // Bit 1 would say that vTOM is supported.
    expect("RCX", answer.registers.rcx, 0)
}

fn vtom_configure() -> Verdict {
    const ENABLE: u64 = 1 << 1;
    let registers = Registers::rcx(ENABLE | 0x8000_0000);
    expect_result(
        core(CoreCall::CONFIGURE_VTOM),
        registers,
        ResultCode::INVALID_REQUEST,
    )
}

fn vtom_reserved() -> Verdict {
    for bit in [1, 12, 63] {
        let registers = Registers::rcx(VTOM_QUERY | 1 << bit);
        expect_result(
            core(CoreCall::CONFIGURE_VTOM),
            registers,
            ResultCode::INVALID_PARAMETER,
        )?;
    }
    Ok(())
}

fn vtpm_query() -> Verdict {
    expect_unsupported_protocol(Protocol::VTPM)
}

fn apic() -> Verdict {
    expect_unsupported_protocol(Protocol::APIC)
}

const REGISTERS: Registers = Registers {
    rcx: 0xC1,
    rdx: 0xD2,
    r8: 0x83,
    r9: 0x94,
};

fn nothing_pending() -> Verdict {
    let rax = core(CoreCall::QUERY_PROTOCOL).encode();
    unchanged(&[svsm::calling_area()], || {
        let answer = call_with_pending(0, rax, REGISTERS)?;
        expect(
            "registers",
            answer,
            Answer {
                rax,
                registers: REGISTERS,
                pending: 0,
            },
        )
    })
}

fn odd_pending() -> Verdict {
    let rax = core(CoreCall::QUERY_PROTOCOL).encode();
    for pending in [2, 0x80, 0xFF] {
        unchanged(&[svsm::calling_area()], || {
            let answer = call_with_pending(pending, rax, REGISTERS)?;
            expect("result", answer.result(), ResultCode::INVALID_FORMAT)?;
            expect("other registers", answer.registers, REGISTERS)
        })?;
    }
    Ok(())
}

fn registers_kept() -> Verdict {
    let kept = svsm::kept_registers(core(CoreCall::QUERY_PROTOCOL), 1)?;
    expect("R10-R15, RSI, RDI", kept, KEPT)
}

/// Core call 1 with a bit in the upper half is another protocol, not PVALIDATE.
fn upper_half() -> Verdict {
    let page = guest::memory::fresh_page();
    let list = svsm::List::in_calling_area();
    let entry = setup::validate(page, protocols::addr::PageSize::Size4K);
    list.put_entries(&[entry])?;
    list.put_head(1, 0)?;
    unchanged(&[page], || {
        let id = CallId {
            protocol: Protocol(1 << 31),
            call: CoreCall::PVALIDATE.0,
        };
        let answer = call(id, Registers::rcx(svsm::buffer().get()))?;
        expect("result", answer.result(), ResultCode::UNSUPPORTED_PROTOCOL)?;
        expect("head of the list", list.head()?, (1, 0))
    })?;
    // It may have been made ready, but nobody has given it to the guest.
    expect("permissions of VMPL1", oracle::page(page).permissions[1], 0)
}
