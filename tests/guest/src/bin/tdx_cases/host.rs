//! TDG.VP.VMCALL: what the module passes, and what the host answers.

use guest::harness::{Case, Finding, Verdict, case, expect, expect_not};
use guest::insn;
use guest::memory::{self, shared};
use guest::oracle;
use guest::tdcall::{
    self, MARK, TIMER_DIVIDER, TIMER_MASKED, ask_host, call, host_rdmsr, host_wrmsr, map_gpa,
    start_timer,
};
use protocols::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE};
use protocols::oracle::PageFlags;
use protocols::tdx::vmcall::register::{R10, R11, R12, R13, R14, R15, RAX, RBP, RCX};
use protocols::tdx::vmcall::{Direction, Status, SubFunction};
use protocols::tdx::{Leaf, Operand};

use crate::accept::accepted_page;

pub const CASES: &[Case] = &[
    case("vmcall_mask", "tdx.md §4 RCX bits 0, 1, 4, 63:32", mask),
    case(
        "vmcall_passes_what_is_named",
        "tdx.md §4 non-selected GPRs",
        passes,
    ),
    case("vmcall_rbp", "tdx.md §4 RCX bit 5", rbp),
    case("vmcall_of_another_interface", "tdx.md §4 R10≠0", hypercall),
    case("vmcall_unknown_function", "tdx.md §4 unsupported", unknown),
    case("host_cpuid", "tdx.md §4 0x0A", cpuid),
    case("host_port", "tdx.md §4 0x1E", port),
    case("host_port_operands", "tdx.md §4 0x1E", port_operands),
    case("host_rdmsr", "tdx.md §4 0x1F", rdmsr),
    case("host_wrmsr", "tdx.md §4 0x20", wrmsr),
    case("host_mmio", "tdx.md §4 0x30", mmio),
    case("host_mmio_operands", "tdx.md §4 0x30", mmio_operands),
    case("host_info", "tdx.md §4 0x10000", info),
    case("host_quote", "tdx.md §4 0x10002: no quoting service", quote),
    case("map_gpa_pages", "tdx.md §4 MapGPA", map_pages),
    case("map_gpa_block", "tdx.md §4 MapGPA", map_block),
    case("map_gpa_is_idempotent", "tdx.md §4 MapGPA", map_again),
    case("map_gpa_retry", "tdx.md §4 RETRY", map_retry),
    case("map_gpa_operands", "tdx.md §4 MapGPA", map_operands),
    case(
        "map_gpa_without_memory",
        "tdx.md §4 R11 = failing GPA",
        map_hole,
    ),
    case("hlt_ends_with_an_interrupt", "tdx.md §4 0x0C", hlt),
    case(
        "the_timers_clock_is_the_crystal",
        "docs/machine.md, TDX: host",
        timer_clock,
    ),
    case(
        "vectors_of_exceptions_never_arrive",
        "docs/machine.md, TDX: host",
        exception_vectors,
    ),
];

const INVALID: u64 = Status::INVALID_OPERAND.0;
const SHARED: u64 = 1 << 47;
/// Memory that is none: the PCI hole of q35 with `-m 4G`, no device at its start.
const NO_MEMORY: u64 = 0xE000_0000;
/// q35's high precision event timer.
const HPET: Gpa = Gpa::new(0xFED0_0000);
/// A port without effect: the scratch register of the second serial port.
const SCRATCH: u64 = 0x2FF;

fn mask() -> Verdict {
    [1 << 0, 1 << 1, 1 << 4, 1 << 32, 1 << 63]
        .into_iter()
        .try_for_each(|rcx| {
            let operands = [(RCX, rcx), (R10, 0), (R11, SubFunction::CPUID.0)];
            let after = call(Leaf::VP_VMCALL, &operands)?;
            expect("RAX", after[RAX], Operand::RCX.invalid())?;
            expect("R11", after[R11], SubFunction::CPUID.0)
        })
}

fn passes() -> Verdict {
    // R10 to R13 only: the answer's R14 and R15 do not arrive.
    let operands = [
        (RCX, 0x3C00),
        (R10, 0),
        (R11, SubFunction::CPUID.0),
        (R12, 0x4000_0000),
        (R13, 0),
    ];
    let after = call(Leaf::VP_VMCALL, &operands)?;
    expect("RAX, R10", (after[RAX], after[R10]), (0, 0))?;
    expect("R13", after[R13], u64::from(u32::from_le_bytes(*b"KVMK")))?;
    expect("R14, R15", (after[R14], after[R15]), (MARK, MARK))
}

fn rbp() -> Verdict {
    // NO_RBP_MOD is not set.
    let operands = [
        (RCX, 0x2C20),
        (R10, 0),
        (R11, SubFunction::GET_TD_VMCALL_INFO.0),
        (RBP, 5),
    ];
    let after = call(Leaf::VP_VMCALL, &operands)?;
    expect("RAX, RBP", (after[RAX], after[RBP]), (0, 5))
}

fn hypercall() -> Verdict {
    let operands = [(RCX, tdcall::PASSED), (R10, 9), (R11, 0)];
    let after = call(Leaf::VP_VMCALL, &operands)?;
    expect("R10", after[R10], 1000_i64.wrapping_neg().cast_unsigned())
}

fn unknown() -> Verdict {
    let after = ask_host(SubFunction(0x1_0FFF), &[])?;
    expect("R10", after[R10], Status::SUBFUNCTION_UNSUPPORTED.0)
}

fn cpuid() -> Verdict {
    let after = ask_host(SubFunction::CPUID, &[(R12, 0xB), (R13, 1)])?;
    expect("R10", after[R10], 0)?;
    // Two processors in the package, and this is the first.
    expect("EBX, EDX", (after[R13], after[R15]), (2, 0))
}

fn io(bytes: u64, direction: Direction, port: u64, data: u64) -> Result<(u64, u64), Finding> {
    let operands = [(R12, bytes), (R13, direction.0), (R14, port), (R15, data)];
    let after = ask_host(SubFunction::IO, &operands)?;
    Ok((after[R10], after[R11]))
}

fn port() -> Verdict {
    for value in [0x5A, 0xA5] {
        expect("OUT", io(1, Direction::WRITE, SCRATCH, value)?.0, 0)?;
        expect("IN", io(1, Direction::READ, SCRATCH, 0)?, (0, value))?;
    }
    Ok(())
}

fn port_operands() -> Verdict {
    for (bytes, direction, port) in [
        (0, Direction::READ, SCRATCH),
        (3, Direction::READ, SCRATCH),
        (8, Direction::READ, SCRATCH),
        (1, Direction(2), SCRATCH),
        (1, Direction::READ, 0x1_0000),
    ] {
        expect("R10", io(bytes, direction, port, 0)?.0, INVALID)?;
    }
    Ok(())
}

fn rdmsr() -> Verdict {
    // The x2APIC identifier of the first processor.
    expect("RDMSR", host_rdmsr(0x802)?, (0, 0))?;
    // The page VMRUN saves the host in is nobody's.
    expect("R10", host_rdmsr(0xC001_0117)?.0, INVALID)
}

/// x2APIC: spurious vector, with the bit that lets the table's entries work.
const SPURIOUS: u64 = 0x80F;
const APIC_ON: u64 = 1 << 8;
/// x2APIC: pending vectors 0x40 to 0x5F.
const PENDING_40: u32 = 0x822;

fn wrmsr() -> Verdict {
    expect("WRMSR", host_wrmsr(TIMER_DIVIDER, 0xB)?, 0)?;
    expect("RDMSR", host_rdmsr(TIMER_DIVIDER)?, (0, 0xB))?;
    expect("R10", host_wrmsr(0xC001_0117, 0)?, INVALID)
}

fn device(bytes: u64, direction: Direction, gpa: u64) -> Result<(u64, u64), Finding> {
    let operands = [(R12, bytes), (R13, direction.0), (R14, gpa), (R15, 0)];
    let after = ask_host(SubFunction::MMIO, &operands)?;
    Ok((after[R10], after[R11]))
}

fn mmio() -> Verdict {
    // The timer's period in femtoseconds is the upper half of its first register.
    let (status, period) = device(4, Direction::READ, (HPET.get() + 4) | SHARED)?;
    expect("R10", status, 0)?;
    expect_not("period", period, 0)?;
    let (status, whole) = device(8, Direction::READ, HPET.get() | SHARED)?;
    expect("R10, upper half", (status, whole >> 32), (0, period))
}

fn mmio_operands() -> Verdict {
    let hpet = HPET.get() | SHARED;
    for (bytes, direction, gpa) in [
        (4, Direction::READ, HPET.get()),
        (3, Direction::READ, hpet),
        (16, Direction::READ, hpet),
        (4, Direction::READ, hpet + 2),
        (4, Direction(7), hpet),
        (4, Direction::READ, hpet | 1 << 48),
        // Memory is no device.
        (4, Direction::READ, memory::fresh_page().get() | SHARED),
    ] {
        expect("R10", device(bytes, direction, gpa)?.0, INVALID)?;
    }
    Ok(())
}

fn info() -> Verdict {
    let after = ask_host(SubFunction::GET_TD_VMCALL_INFO, &[(R12, 0)])?;
    expect("R10", after[R10], 0)?;
    expect("R11 to R14", [R11, R12, R13, R14].map(|n| after[n]), [0; 4])
}

fn quote() -> Verdict {
    let page = memory::fresh_page();
    let ask = |at| {
        Ok::<_, Finding>(ask_host(SubFunction::GET_QUOTE, &[(R12, at), (R13, PAGE_SIZE)])?[R10])
    };
    expect("private buffer", ask(page.get())?, INVALID)?;
    expect("misaligned buffer", ask(page.get() | SHARED | 8)?, INVALID)?;
    expect(
        "R10",
        ask(page.get() | SHARED)?,
        Status::SUBFUNCTION_UNSUPPORTED.0,
    )
}

fn is_private(page: Gpa) -> bool {
    oracle::page(page).flags.contains(PageFlags::HOST_PRIVATE)
}

fn map_pages() -> Verdict {
    let region = memory::fresh_region();
    let at = memory::page_of(region, 3);
    expect("R10", map_gpa(at.get() | SHARED, 2 * PAGE_SIZE)?.0, 0)?;
    let private = [2, 3, 4, 5].map(|n| is_private(memory::page_of(region, n)));
    expect("private", private, [true, false, false, true])?;
    memory::write(shared(at), 1)?;
    expect("R10", map_gpa(at.get(), 2 * PAGE_SIZE)?.0, 0)?;
    expect("private again", is_private(at), true)
}

fn map_block() -> Verdict {
    let region = memory::fresh_region();
    expect("R10", map_gpa(region.get() | SHARED, LARGE_PAGE_SIZE)?.0, 0)?;
    expect("private", is_private(memory::page_of(region, 511)), false)?;
    expect("R10", map_gpa(region.get(), LARGE_PAGE_SIZE)?.0, 0)?;
    expect("private", is_private(memory::page_of(region, 511)), true)
}

fn map_again() -> Verdict {
    // What is private already stays as it is.
    let page = accepted_page(0xD1)?;
    expect("R10", map_gpa(page.get(), PAGE_SIZE)?.0, 0)?;
    expect("content", memory::read(memory::private(page))?, 0xD1)
}

fn map_retry() -> Verdict {
    let start = memory::fresh_regions(12);
    let bytes = 12 * LARGE_PAGE_SIZE;
    let first = start.get() | SHARED;
    let (status, next) = map_gpa(first, bytes)?;
    expect("R10", status, Status::RETRY.0)?;
    expect("progress", next > first && next < first + bytes, true)?;
    expect("whole pages", next % PAGE_SIZE, 0)?;
    expect(
        "done",
        is_private(Gpa::new((next & !SHARED) - PAGE_SIZE)),
        false,
    )?;
    expect("not done", is_private(Gpa::new(next & !SHARED)), true)?;
    expect("R10", map_gpa(next, first + bytes - next)?.0, 0)?;
    expect(
        "done",
        is_private(Gpa::new(start.get() + bytes - PAGE_SIZE)),
        false,
    )
}

fn map_operands() -> Verdict {
    let page = memory::fresh_page().get();
    let align = Status::ALIGN_ERROR.0;
    for (start, bytes, want) in [
        (page, 0, INVALID),
        (page, u64::MAX, INVALID),
        (SHARED - PAGE_SIZE, 2 * PAGE_SIZE, INVALID),
        (1 << 48, PAGE_SIZE, INVALID),
        (page + 8, PAGE_SIZE, align),
        (page, 0x800, align),
    ] {
        expect("R10", map_gpa(start, bytes)?.0, want)?;
    }
    expect("private", is_private(Gpa::new(page)), true)
}

fn map_hole() -> Verdict {
    let hole = NO_MEMORY | SHARED;
    expect("MapGPA", map_gpa(hole, PAGE_SIZE)?, (INVALID, hole))
}

fn hlt() -> Verdict {
    const VECTOR: u64 = 0x40;
    // One shot, after a while; interrupts are off, so it stays pending and is seen to be.
    expect("spurious vector", host_wrmsr(SPURIOUS, APIC_ON | 0xFF)?, 0)?;
    start_timer(VECTOR, 25_000)?;
    let after = ask_host(SubFunction::HLT, &[(R12, 0)])?;
    expect("R10", after[R10], 0)?;
    expect("pending", insn::rdmsr(PENDING_40), Ok(1))
}

/// Linux takes what CPUID(0x15) calls the crystal for the clock of the timer, and sets it by that.
fn timer_clock() -> Verdict {
    const TIMER_CURRENT: u64 = 0x839;
    const CYCLES: u64 = 500_000;
    let told =
        insn::cpuid(0x15, 0).map_err(|trap| Finding::new(format_args!("CPUID 0x15: {trap:x?}")))?;
    expect("crystal", told.ecx, 25_000_000)?;
    // The requests are not of no time: it began to count between two of these, and was read between two. Who
    // waits in between for a core of this computer makes the bounds wider, and nothing wrong.
    let before = insn::time_stamp();
    start_timer(TIMER_MASKED, 1 << 31)?;
    let started = insn::time_stamp();
    let (asked, left, answered) = loop {
        let asked = insn::time_stamp();
        let (status, left) = host_rdmsr(TIMER_CURRENT)?;
        expect("RDMSR", status, 0)?;
        if left <= (1 << 31) - CYCLES {
            break (asked, left, insn::time_stamp());
        }
    };
    let cycles = |ticks: u64| ticks / u64::from(told.ebx);
    let (shortest, longest) = (cycles(asked - started), cycles(answered - before));
    start_timer(TIMER_MASKED, 0)?;
    let counted = (1 << 31) - left;
    let fits = counted / 2 < longest && shortest < counted * 2;
    if !fits {
        return Err(Finding::new(format_args!(
            "{counted} were counted while {shortest} to {longest} cycles passed"
        )));
    }
    Ok(())
}

fn exception_vectors() -> Verdict {
    const ICR: u64 = 0x830;
    /// The requested vectors below 32, and those with 0x41.
    const REQUESTED: [u32; 2] = [0x820, 0x822];
    expect("spurious vector", host_wrmsr(SPURIOUS, APIC_ON | 0xFF)?, 0)?;
    let (_, id) = host_rdmsr(0x802)?;
    for command in [16, 20, 31, 1 << 8 | 18, 0x41] {
        expect("ICR", host_wrmsr(ICR, id << 32 | command)?, 0)?;
    }
    let arrived = (0..1_000_000).any(|_| insn::rdmsr(REQUESTED[1]) == Ok(3));
    expect("0x40, 0x41 arrived", arrived, true)?;
    expect("below 32", insn::rdmsr(REQUESTED[0]), Ok(0))?;
    insn::open_interrupts();
    expect("taken", insn::rdmsr(REQUESTED[1]), Ok(0))
}
