//! Events through the GHCB page: what is served, and every way a request can be malformed.

use guest::ghcb::{Page, Reply};
use guest::harness::{Case, Verdict, case, expect, expect_not};
use guest::memory;

use protocols::exit_code::ExitCode;
use protocols::ghcb::HypervisorFeatures;
use protocols::ghcb::event::{IoDirection, IoInfo, IoWidth, MSR_READ, MSR_WRITE};
use protocols::ghcb::page::{Field, MalformedReason, Response, USAGE_STANDARD};

use crate::setup::{ghcb_page, shared_page};

/// The table.
pub const CASES: &[Case] = &[
    case("nae_features", "ghcb.md §5 0x8000FFFD", features),
    case("nae_outputs_are_marked", "ghcb.md §11.3", outputs_marked),
    case("nae_cpuid", "ghcb.md §5 0x72", cpuid),
    case(
        "nae_cpuid_without_rcx",
        "ghcb.md §5 0x72, §11.4",
        cpuid_missing,
    ),
    case("nae_ioio_in", "ghcb.md §5 0x7B", port_in),
    case("nae_ioio_out_in", "ghcb.md §5 0x7B", port_out_in),
    case(
        "nae_ioio_out_without_rax",
        "ghcb.md §5 0x7B, §11.4",
        port_out_missing,
    ),
    case(
        "nae_ioio_without_width",
        "ghcb.md §5, reason 5",
        port_no_width,
    ),
    case("nae_ioio_string", "ghcb.md §5 0x7B", port_string),
    case("nae_msr_read", "ghcb.md §5 0x7C", msr_read),
    case(
        "nae_msr_write_without_rdx",
        "ghcb.md §5 0x7C, §11.4",
        msr_write_missing,
    ),
    case("nae_rdtsc", "ghcb.md §5 0x6E", rdtsc),
    case("nae_mmio_read", "ghcb.md §5 0x80000001", mmio_read),
    case(
        "nae_mmio_scratch_outside",
        "ghcb.md §5, reason 3",
        mmio_scratch,
    ),
    case("nae_apic_ids", "ghcb.md §5 0x80000017", apic_ids),
    case(
        "nae_run_vmpl_without_vmsa",
        "ghcb.md §5 0x80000018, reason 5",
        run_vmpl,
    ),
    case("nae_unknown_event", "ghcb.md §5, reason 6", unknown_event),
    case("nae_not_registered", "ghcb.md §5, reason 1", not_registered),
    case("nae_usage", "ghcb.md §11.4, reason 2", usage),
    case(
        "nae_without_exit_code",
        "ghcb.md §11.4, reason 4",
        no_exit_code,
    ),
    case(
        "nae_without_exit_info",
        "ghcb.md §1, §11.4, reason 4",
        no_exit_info,
    ),
    case("nae_page_zero", "ghcb.md §11.2", page_zero),
];

fn call(event: ExitCode, infos: [u64; 2], fields: &[(Field, u64)]) -> Reply {
    ghcb_page().call(event, infos, fields)
}

fn expect_reply(got: Reply, want: Reply) -> Verdict {
    expect("reply", got, want)
}

fn expect_malformed(got: Reply, reason: MalformedReason) -> Verdict {
    expect_reply(got, Reply::malformed(reason))
}

fn features() -> Verdict {
    let want = HypervisorFeatures::NEEDED_BY_PARAVISOR | HypervisorFeatures::APIC_ID_LIST;
    let reply = call(ExitCode::HYPERVISOR_FEATURES, [0, 0], &[]);
    expect_reply(
        reply,
        Reply {
            response: Response::NO_ACTION,
            info_2: want.bits(),
        },
    )
}

fn outputs_marked() -> Verdict {
    // Garbage in registers that CPUID overwrites: a reply that leaves them shows here.
    let fields = [
        (Field::RAX, 0),
        (Field::RCX, 0),
        (Field::RBX, !0),
        (Field::RDX, !0),
    ];
    expect_reply(call(ExitCode::CPUID, [0, 0], &fields), Reply::DONE)?;
    let valid = ghcb_page().valid();
    for field in [
        Field::EXIT_INFO_1,
        Field::EXIT_INFO_2,
        Field::RAX,
        Field::RBX,
    ] {
        expect(
            "marked valid",
            (field, valid.contains(field)),
            (field, true),
        )?;
    }
    // An input is no output: the request's own marks are gone.
    expect(
        "exit code marked valid",
        valid.contains(Field::EXIT_CODE),
        false,
    )
}

fn cpuid() -> Verdict {
    let fields = [(Field::RAX, 0), (Field::RCX, 0)];
    expect_reply(call(ExitCode::CPUID, [0, 0], &fields), Reply::DONE)?;
    let page = ghcb_page();
    let name = |field| page.output(field).map(|value| (value as u32).to_le_bytes());
    expect("EBX", name(Field::RBX)?, *b"Auth")?;
    expect("EDX", name(Field::RDX)?, *b"enti")?;
    expect("ECX", name(Field::RCX)?, *b"cAMD")
}

fn cpuid_missing() -> Verdict {
    expect_malformed(
        call(ExitCode::CPUID, [0, 0], &[(Field::RAX, 0)]),
        MalformedReason::MISSING_INPUT,
    )
}

const COM2_SCRATCH: u16 = 0x2FF;
const COM2_LINE_STATUS: u16 = 0x2FD;

fn read_port(port: u16) -> Result<u64, guest::harness::Finding> {
    let info = IoInfo::single(port, IoDirection::In, IoWidth::Byte);
    // RAX comes as garbage: IN of a byte must replace it.
    expect_reply(
        call(ExitCode::IOIO, [info.0, 0], &[(Field::RAX, 0xFFFF_FF00)]),
        Reply::DONE,
    )?;
    ghcb_page().output(Field::RAX)
}

fn port_in() -> Verdict {
    const TRANSMITTER_EMPTY: u64 = 1 << 5;
    let status = read_port(COM2_LINE_STATUS)?;
    expect("bits above the byte", status >> 8, 0)?;
    expect(
        "transmitter empty",
        status & TRANSMITTER_EMPTY,
        TRANSMITTER_EMPTY,
    )
}

fn port_out_in() -> Verdict {
    let out = IoInfo::single(COM2_SCRATCH, IoDirection::Out, IoWidth::Byte);
    for value in [0x5A, 0xA5] {
        expect_reply(
            call(ExitCode::IOIO, [out.0, 0], &[(Field::RAX, value)]),
            Reply::DONE,
        )?;
        expect("scratch register", read_port(COM2_SCRATCH)?, value)?;
    }
    Ok(())
}

fn port_out_missing() -> Verdict {
    let out = IoInfo::single(COM2_SCRATCH, IoDirection::Out, IoWidth::Byte);
    expect_malformed(
        call(ExitCode::IOIO, [out.0, 0], &[]),
        MalformedReason::MISSING_INPUT,
    )
}

fn port_no_width() -> Verdict {
    let info = u64::from(COM2_SCRATCH) << 16;
    expect_malformed(
        call(ExitCode::IOIO, [info, 0], &[(Field::RAX, 0)]),
        MalformedReason::INVALID_INPUT,
    )
}

fn port_string() -> Verdict {
    const STRING_AND_REPEAT: u64 = 0b1100;
    let page = ghcb_page();
    let info = IoInfo::single(COM2_SCRATCH, IoDirection::Out, IoWidth::Byte).0 | STRING_AND_REPEAT;
    page.put_buffer(0, u64::from_le_bytes([1, 2, 3, 0x77, 5, 6, 7, 8]));
    let scratch = [(Field::SCRATCH, page.buffer().get())];
    // Four bytes: the register keeps the last.
    expect_reply(call(ExitCode::IOIO, [info, 4], &scratch), Reply::DONE)?;
    expect("scratch register", read_port(COM2_SCRATCH)?, 0x77)
}

const APIC_BASE: u64 = 0x1B;

fn msr_read() -> Verdict {
    const ENABLED: u64 = 1 << 11;
    let reply = call(ExitCode::MSR, [MSR_READ, 0], &[(Field::RCX, APIC_BASE)]);
    expect_reply(reply, Reply::DONE)?;
    expect(
        "upper half in RAX",
        ghcb_page().output(Field::RAX)? >> 32,
        0,
    )?;
    expect(
        "APIC enabled",
        ghcb_page().output(Field::RAX)? & ENABLED,
        ENABLED,
    )?;
    expect("RDX", ghcb_page().output(Field::RDX)?, 0)
}

fn msr_write_missing() -> Verdict {
    let fields = [(Field::RCX, APIC_BASE), (Field::RAX, 0)];
    expect_malformed(
        call(ExitCode::MSR, [MSR_WRITE, 0], &fields),
        MalformedReason::MISSING_INPUT,
    )
}

fn read_tsc() -> Result<u64, guest::harness::Finding> {
    expect_reply(call(ExitCode::RDTSC, [0, 0], &[]), Reply::DONE)?;
    let page = ghcb_page();
    Ok(page.output(Field::RDX)? << 32 | page.output(Field::RAX)?)
}

fn rdtsc() -> Verdict {
    let first = read_tsc()?;
    expect("time goes on", read_tsc()? > first, true)
}

/// HPET, general capabilities: the low half holds vendor 0x8086 and revision 1 in QEMU.
const HPET: u64 = 0xFED0_0000;

fn mmio_read() -> Verdict {
    let page = ghcb_page();
    page.put_buffer(8, !0);
    let scratch = [(Field::SCRATCH, page.buffer().get() + 8)];
    expect_reply(call(ExitCode::MMIO_READ, [HPET, 4], &scratch), Reply::DONE)?;
    let value = page.take_buffer(8);
    expect("vendor", value >> 16 & 0xFFFF, 0x8086)?;
    expect("bytes behind the value", value >> 32, 0xFFFF_FFFF)
}

fn mmio_scratch() -> Verdict {
    let page = ghcb_page();
    let behind = page.buffer().get() + 2032 - 4;
    for scratch in [behind, page.gpa().get() + 0x7F8, 0, shared_page()?.get()] {
        let reply = call(ExitCode::MMIO_READ, [HPET, 8], &[(Field::SCRATCH, scratch)]);
        expect_malformed(reply, MalformedReason::INVALID_SCRATCH)?;
    }
    Ok(())
}

fn apic_ids() -> Verdict {
    expect_reply(
        call(ExitCode::GET_APIC_IDS, [0, 0], &[(Field::RAX, 0)]),
        Reply::DONE,
    )?;
    let pages = ghcb_page().output(Field::RAX)?;
    expect("pages needed", pages, 1)?;
    let list = shared_page()?;
    let reply = call(
        ExitCode::GET_APIC_IDS,
        [list.get(), 0],
        &[(Field::RAX, pages)],
    );
    expect_reply(reply, Reply::DONE)?;
    let head = memory::read(memory::shared(list))?;
    expect_not("number of processors", head as u32, 0)?;
    expect("first APIC ID", head >> 32, 0)
}

fn run_vmpl() -> Verdict {
    for vmpl in [2, 3, 4, 1 << 32] {
        let reply = call(ExitCode::RUN_VMPL, [vmpl, 0], &[]);
        expect_malformed(reply, MalformedReason::INVALID_INPUT)?;
    }
    Ok(())
}

fn unknown_event() -> Verdict {
    for code in [0x8000_1234, 0x10, 0x1_8000_0010] {
        let reply = call(ExitCode(code), [0, 0], &[]);
        expect_malformed(reply, MalformedReason::INVALID_EVENT)?;
    }
    Ok(())
}

fn not_registered() -> Verdict {
    let other = Page::at(shared_page()?);
    expect_malformed(
        other.call(ExitCode::HYPERVISOR_FEATURES, [0, 0], &[]),
        MalformedReason::NOT_REGISTERED,
    )
}

fn usage() -> Verdict {
    let page = ghcb_page();
    page.prepare(1, &EVENT);
    expect_malformed(page.send(), MalformedReason::INVALID_USAGE)
}

const EVENT: [(Field, u64); 3] = [
    (Field::EXIT_CODE, ExitCode::HYPERVISOR_FEATURES.0),
    (Field::EXIT_INFO_1, 0),
    (Field::EXIT_INFO_2, 0),
];

fn expect_missing(fields: &[(Field, u64)]) -> Verdict {
    let page = ghcb_page();
    page.prepare(USAGE_STANDARD, fields);
    expect_malformed(page.send(), MalformedReason::MISSING_INPUT)
}

fn no_exit_code() -> Verdict {
    expect_missing(&EVENT[1..])
}

fn no_exit_info() -> Verdict {
    expect_missing(&EVENT[..2])?;
    expect_missing(&[EVENT[0], EVENT[2]])
}

fn page_zero() -> Verdict {
    let page = ghcb_page();
    page.prepare(USAGE_STANDARD, &EVENT);
    let marks = page.valid();
    guest::ghcb::set_msr(0);
    guest::insn::vmgexit();
    expect("the MSR", guest::ghcb::msr(), 0)?;
    // Nothing was served: the marks of the request are still there.
    expect("marks", page.valid(), marks)
}
