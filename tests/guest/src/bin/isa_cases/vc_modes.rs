//! Instructions that are reflected as #VC, in every mode of the processor: the code, the frame
//! and the state that the handler starts in.

use core::fmt::Debug;

use guest::harness::{Case, Finding, Verdict, case};
use guest::trap::VMM_COMMUNICATION;
use protocols::exit_code::ExitCode;
use protocols::vmsa::Vmsa;

use crate::modes::{Mode, Stop, block, place};

/// The table.
pub const CASES: &[Case] = &[
    case("vc_real_mode", "snp-isa.md §15, APM 8.6", real_mode),
    case("vc_protected_16", "snp-isa.md §15, APM 8.7", protected_16),
    case("vc_protected_32", "snp-isa.md §15, APM 8.7", protected_32),
    case(
        "vc_protected_32_user",
        "snp-isa.md §15, APM 8.7.3",
        protected_32_user,
    ),
    case("vc_two_level_paging", "snp-isa.md §15, APM 8.7", paged),
    case("vc_two_level_paging_user", "snp-isa.md §15", paged_user),
    case("vc_pae", "snp-isa.md §15, APM 8.7", pae),
    case(
        "vc_compatibility_mode",
        "snp-isa.md §15, APM 8.9",
        compatibility,
    ),
    case(
        "vc_compatibility_mode_user",
        "snp-isa.md §15, APM 8.9.3",
        compatibility_user,
    ),
    case("vc_long_mode", "snp-isa.md §15, APM 8.9", long),
    case("vc_long_mode_ist", "snp-isa.md §15, APM 8.9.4", long_ist),
    case("vc_long_mode_user", "snp-isa.md §15, APM 8.9.3", long_user),
    case(
        "vc_long_mode_user_ist",
        "snp-isa.md §15, APM 8.9.4",
        long_user_ist,
    ),
];

/// An instruction, the same bytes in all modes, and its code.
struct Reflected {
    bytes: &'static [u8],
    code: ExitCode,
    /// Whether level 3 may execute it.
    for_users: bool,
}

const fn reflected(bytes: &'static [u8], code: ExitCode, for_users: bool) -> Reflected {
    Reflected {
        bytes,
        code,
        for_users,
    }
}

/// DX is the scratch register of the second serial port, ECX the APIC base register for RDMSR
/// and WRMSR.
const INSTRUCTIONS: &[Reflected] = &[
    reflected(&[0x0F, 0xA2], ExitCode::CPUID, true),
    reflected(&[0xEC], ExitCode::IOIO, true), // in al, dx
    reflected(&[0xED], ExitCode::IOIO, true), // in (e)ax, dx
    reflected(&[0x66, 0xED], ExitCode::IOIO, true), // the other width
    reflected(&[0xE4, 0x80], ExitCode::IOIO, true), // in al, 0x80
    reflected(&[0xEE], ExitCode::IOIO, true), // out dx, al
    reflected(&[0x66, 0xEF], ExitCode::IOIO, true), // out dx, (e)ax
    reflected(&[0xE6, 0x80], ExitCode::IOIO, true), // out 0x80, al
    reflected(&[0x6C], ExitCode::IOIO, true), // insb
    reflected(&[0xF3, 0x6D], ExitCode::IOIO, true), // rep insw or insd
    reflected(&[0x6E], ExitCode::IOIO, true), // outsb
    reflected(&[0xF3, 0x6F], ExitCode::IOIO, true), // rep outsw or outsd
    reflected(&[0x0F, 0x31], ExitCode::RDTSC, true),
    reflected(&[0x0F, 0x01, 0xF9], ExitCode::RDTSCP, true),
    reflected(&[0x0F, 0x01, 0xD9], ExitCode::VMMCALL, true),
    reflected(&[0x0F, 0x32], ExitCode::MSR, false),
    reflected(&[0x0F, 0x30], ExitCode::MSR, false),
    reflected(&[0x0F, 0x33], ExitCode::RDPMC, false),
    reflected(&[0x0F, 0x08], ExitCode::INVD, false),
    reflected(&[0x0F, 0x09], ExitCode::WBINVD, false),
    reflected(&[0xF3, 0x0F, 0x09], ExitCode::WBINVD, false), // wbnoinvd
    reflected(&[0x0F, 0x21, 0xF8], ExitCode::READ_DR7, false),
    reflected(&[0x0F, 0x23, 0xF8], ExitCode::WRITE_DR7, false),
    reflected(&[0x0F, 0x01, 0xC8], ExitCode::MONITOR, false),
    reflected(&[0x0F, 0x01, 0xC9], ExitCode::MWAIT, false),
];

/// RFLAGS.RF, which is set in the frame of a fault.
const RF: u64 = 1 << 16;

/// Where the frame is expected, and with what in it.
type Check = fn(&Vmsa, &Stop, ExitCode) -> Verdict;

fn same<T: PartialEq + Debug>(code: ExitCode, what: &str, got: T, want: T) -> Verdict {
    if got == want {
        Ok(())
    } else {
        Err(Finding::new(format_args!(
            "{code:?}, {what}: got {got:x?}, want {want:x?}"
        )))
    }
}

fn every_instruction(mode: Mode, cpl: u8, ist: u64, check: Check) -> Verdict {
    let block = block()?;
    block.write_gates(mode, ist, 0)?;
    let mut state = block.state(mode, cpl);
    state.rcx = 0x1B;
    state.rdx = 0x2FF;
    // Operands that TCG looks at before the intercept: a DR7 that is valid, no extensions.
    state.rax = 0x400;
    state.rsi = block.at(place::DATA);
    state.rdi = block.at(place::DATA);
    for instruction in INSTRUCTIONS {
        if cpl == 3 && !instruction.for_users {
            continue;
        }
        state.rcx = match instruction.code {
            ExitCode::MONITOR | ExitCode::MWAIT | ExitCode::RDPMC => 0,
            _ => 0x1B,
        };
        let stop = block.run(&state, instruction.bytes)?;
        let code = instruction.code;
        same(code, "vector", stop.vector, u64::from(VMM_COMMUNICATION))?;
        same(code, "CPL of the handler", stop.vmsa.ss.attributes.dpl(), 0)?;
        // An interrupt gate; nothing else in the flags changes.
        same(
            code,
            "RFLAGS of the handler",
            stop.vmsa.rflags & 0x3200,
            0x3000,
        )?;
        check(&state, &stop, code)?;
    }
    Ok(())
}

fn real_frame(state: &Vmsa, stop: &Stop, code: ExitCode) -> Verdict {
    same(code, "SP", stop.vmsa.rsp, state.rsp - 6)?;
    let want = [state.rip, u64::from(state.cs.selector), state.rflags];
    same(code, "IP, CS, FLAGS", stop.frame(2)?, want)
}

fn frame_16(state: &Vmsa, stop: &Stop, code: ExitCode) -> Verdict {
    same(code, "SP", stop.vmsa.rsp, state.rsp - 8)?;
    let want = [
        code.0,
        state.rip,
        u64::from(state.cs.selector),
        state.rflags,
    ];
    same(code, "frame", stop.frame(2)?, want)
}

fn frame_32(state: &Vmsa, stop: &Stop, code: ExitCode) -> Verdict {
    same(code, "ESP", stop.vmsa.rsp, state.rsp - 16)?;
    let want = [
        code.0,
        state.rip,
        u64::from(state.cs.selector),
        state.rflags | RF,
    ];
    same(code, "frame", stop.frame(4)?, want)
}

fn inner_frame_32(state: &Vmsa, stop: &Stop, code: ExitCode) -> Verdict {
    let top = block()?.at(place::INNER_TOP);
    same(code, "ESP", stop.vmsa.rsp, top - 24)?;
    let want = [
        code.0,
        state.rip,
        u64::from(state.cs.selector),
        state.rflags | RF,
        state.rsp,
        u64::from(state.ss.selector),
    ];
    same(code, "frame", stop.frame(4)?, want)
}

fn frame_64(top: u64, state: &Vmsa, stop: &Stop, code: ExitCode) -> Verdict {
    same(code, "RSP", stop.vmsa.rsp, top - 48)?;
    let want = [
        code.0,
        state.rip,
        u64::from(state.cs.selector),
        state.rflags | RF,
        state.rsp,
        u64::from(state.ss.selector),
    ];
    same(code, "frame", stop.frame(8)?, want)
}

fn same_stack(state: &Vmsa, stop: &Stop, code: ExitCode) -> Verdict {
    frame_64(state.rsp, state, stop, code)
}

fn inner_stack(state: &Vmsa, stop: &Stop, code: ExitCode) -> Verdict {
    frame_64(block()?.at(place::INNER_TOP), state, stop, code)?;
    same(code, "SS", stop.vmsa.ss.selector, 0)
}

fn ist_stack(state: &Vmsa, stop: &Stop, code: ExitCode) -> Verdict {
    frame_64(block()?.at(place::IST2_TOP), state, stop, code)
}

fn real_mode() -> Verdict {
    every_instruction(Mode::Real, 0, 0, real_frame)
}

fn protected_16() -> Verdict {
    every_instruction(Mode::Protected16, 0, 0, frame_16)
}

fn protected_32() -> Verdict {
    every_instruction(Mode::Protected32, 0, 0, frame_32)
}

fn protected_32_user() -> Verdict {
    every_instruction(Mode::Protected32, 3, 0, inner_frame_32)
}

fn paged() -> Verdict {
    every_instruction(Mode::Paged, 0, 0, frame_32)
}

fn paged_user() -> Verdict {
    every_instruction(Mode::Paged, 3, 0, inner_frame_32)
}

fn pae() -> Verdict {
    every_instruction(Mode::Pae, 0, 0, frame_32)
}

fn compatibility() -> Verdict {
    every_instruction(Mode::Compatibility, 0, 0, same_stack)
}

fn compatibility_user() -> Verdict {
    every_instruction(Mode::Compatibility, 3, 0, inner_stack)
}

fn long() -> Verdict {
    every_instruction(Mode::Long, 0, 0, same_stack)
}

fn long_ist() -> Verdict {
    every_instruction(Mode::Long, 0, 2, ist_stack)
}

fn long_user() -> Verdict {
    every_instruction(Mode::Long, 3, 0, inner_stack)
}

fn long_user_ist() -> Verdict {
    every_instruction(Mode::Long, 3, 2, ist_stack)
}
