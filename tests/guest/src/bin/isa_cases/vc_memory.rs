//! #VC that memory accesses get: 0x400 for devices, 0x404 for pages that are not validated, with
//! the address in CR2 whatever the instruction.

use guest::harness::{Case, Finding, Verdict, case, expect};
use guest::insn;
use guest::memory;
use guest::trap::{Trap, VMM_COMMUNICATION};
use protocols::addr::Gpa;
use protocols::exit_code::ExitCode;
use protocols::vmsa::{Segment, SegmentAttributes, Vmsa};

use crate::modes::{Block, Mode, block, place};

/// The table.
pub const CASES: &[Case] = &[
    case("vc_device_read", "snp-isa.md §9 (APM 15.35.4)", device_read),
    case(
        "vc_device_write",
        "snp-isa.md §9 (APM 15.35.4)",
        device_write,
    ),
    case(
        "vc_device_every_instruction",
        "snp-isa.md §9 (APM 15.35.4)",
        device_instructions,
    ),
    case("cr2_of_operands", "snp-isa.md §9 (CR2)", operands),
    case("cr2_of_stack_accesses", "snp-isa.md §9 (CR2)", stack),
    case("cr2_of_string_elements", "snp-isa.md §9 (CR2)", strings),
    case("cr2_of_segment_bases", "snp-isa.md §9 (CR2)", segment_bases),
    case("cr2_of_a_descriptor", "snp-isa.md §9 (CR2)", descriptor),
    case("cr2_behind_a_page_border", "snp-isa.md §9 (CR2)", border),
    case("cr2_of_a_fetch", "snp-isa.md §9 (CR2)", fetch),
    case("cr2_of_a_walk", "snp-isa.md §9 (CR2)", walk),
    case("cr2_in_smaller_modes", "snp-isa.md §9 (CR2)", smaller_modes),
];

/// The event timer: a device in every machine of the q35 kind.
const DEVICE: u64 = 0xFED0_0000;

fn device_read() -> Verdict {
    let result = insn::load(memory::shared(Gpa::new(DEVICE)));
    expect("read", result, Err(Trap::vc(ExitCode::NPF.0)))
}

fn device_write() -> Verdict {
    let result = insn::store(memory::shared(Gpa::new(DEVICE + 0xF0)), 0);
    expect("write", result, Err(Trap::vc(ExitCode::NPF.0)))
}

/// Where the C-bit cannot be expressed a device is where no memory is.
fn device_instructions() -> Verdict {
    const FORMS: &[&[u8]] = &[
        &[0x8B, 0x03],                   // mov eax, [ebx]
        &[0x89, 0x03],                   // mov [ebx], eax
        &[0xC7, 0x03, 0, 0, 0, 0],       // mov dword [ebx], 0
        &[0x0F, 0xB6, 0x03],             // movzx eax, byte [ebx]
        &[0x83, 0x0B, 0x01],             // or dword [ebx], 1
        &[0xF7, 0x03, 1, 0, 0, 0],       // test dword [ebx], 1
        &[0xFF, 0x33],                   // push dword [ebx]
        &[0xF3, 0xA5],                   // rep movsd from the device
        &[0xA1, 0x00, 0x00, 0xD0, 0xFE], // mov eax, [DEVICE]
    ];
    let block = block()?;
    for mode in [Mode::Protected32, Mode::Paged] {
        block.write_gates(mode, 0, 0)?;
        let mut state = block.state(mode, 0);
        (state.rbx, state.rsi) = (DEVICE, DEVICE);
        (state.rdi, state.rcx) = (block.at(place::DATA), 2);
        for form in FORMS {
            let stop = block.run(&state, form)?;
            let got = (stop.vector, stop.frame(4)?);
            let want = (u64::from(VMM_COMMUNICATION), [ExitCode::NPF.0, state.rip]);
            expect_of(form, "vector, error code, EIP", got, want)?;
        }
    }
    Ok(())
}

fn expect_of<T: PartialEq + core::fmt::Debug>(form: &[u8], what: &str, got: T, want: T) -> Verdict {
    if got == want {
        Ok(())
    } else {
        Err(Finding::new(format_args!(
            "{form:02x?}: {what}: got {got:x?}, want {want:x?}"
        )))
    }
}

/// Runs an instruction that must get #VC 0x404 with this CR2.
fn expect_cr2(block: &Block, state: &Vmsa, width: u64, form: &[u8], cr2: u64) -> Verdict {
    let stop = block.run(state, form)?;
    let [error] = stop.frame(width)?;
    let got = (stop.vector, error, stop.vmsa.cr2);
    let code = ExitCode::PAGE_NOT_VALIDATED.0;
    expect_of(
        form,
        "vector, error code, CR2",
        got,
        (u64::from(VMM_COMMUNICATION), code, cr2),
    )
}

/// 64-bit mode with a handler that has a stack of its own.
fn long() -> Result<(&'static Block, Vmsa), Finding> {
    let block = block()?;
    block.write_gates(Mode::Long, 2, 2)?;
    let mut state = block.state(Mode::Long, 0);
    // SSE is on.
    state.cr4 |= 1 << 9;
    (state.rsi, state.rdi) = (block.at(place::DATA), block.at(place::DATA));
    Ok((block, state))
}

fn operands() -> Verdict {
    let (block, mut state) = long()?;
    let hole = block.at(place::HOLE);
    let far = hole.to_le_bytes();
    let absolute = [
        0xA0, far[0], far[1], far[2], far[3], far[4], far[5], far[6], far[7],
    ];
    let forms: [(&[u8], u64); 16] = [
        (&[0x8B, 0x03], 0x120),                         // mov eax, [rbx]
        (&[0x88, 0x03], 0x120),                         // mov [rbx], al
        (&[0x48, 0x8B, 0x44, 0x8B, 0x10], 0x530),       // mov rax, [rbx + rcx*4 + 16]
        (&[0x67, 0x8B, 0x03], 0x120),                   // mov eax, [ebx]
        (&[0x0F, 0xB6, 0x03], 0x120),                   // movzx eax, byte [rbx]
        (&[0x48, 0x0F, 0xAB, 0x0B], 0x140),             // bts [rbx], rcx
        (&[0xF0, 0x48, 0x0F, 0xC7, 0x0B], 0x120),       // lock cmpxchg16b [rbx]
        (&[0x0F, 0x38, 0xF0, 0x03], 0x120),             // movbe eax, [rbx]
        (&[0x66, 0x0F, 0x3A, 0x20, 0x03, 0x01], 0x120), // pinsrb xmm0, [rbx], 1
        (&[0x0F, 0x29, 0x03], 0x120),                   // movaps [rbx], xmm0
        (&[0xDB, 0x2B], 0x120),                         // fld tbyte [rbx]
        (&[0xD7], 0x125),                               // xlatb
        (&[0xFF, 0x13], 0x120),                         // call [rbx]
        (&[0xFF, 0x23], 0x120),                         // jmp [rbx]
        (&[0x0F, 0x01, 0x13], 0x120),                   // lgdt [rbx]
        (&absolute, 0),                                 // mov al, [hole]
    ];
    state.rbx = hole + 0x120;
    state.rcx = 0x100;
    state.rax = 5;
    for (form, offset) in forms {
        expect_cr2(block, &state, 8, form, hole + offset)?;
    }
    Ok(())
}

fn stack() -> Verdict {
    let (block, mut state) = long()?;
    let hole = block.at(place::HOLE);
    state.rsp = hole + 0x200;
    let forms: [(&[u8], u64); 7] = [
        (&[0x50], 0x1F8),                   // push rax
        (&[0x66, 0x50], 0x1FE),             // push ax
        (&[0x58], 0x200),                   // pop rax
        (&[0xE8, 0, 0, 0, 0], 0x1F8),       // call
        (&[0xC3], 0x200),                   // ret
        (&[0x9C], 0x1F8),                   // pushfq
        (&[0xC8, 0x10, 0x00, 0x00], 0x1F8), // enter 16, 0
    ];
    for (form, offset) in forms {
        expect_cr2(block, &state, 8, form, hole + offset)?;
    }
    let (block, mut state) = long()?;
    state.rbx = hole + 0x300;
    // pop [rbx]: the stack is there, the operand is not.
    expect_cr2(block, &state, 8, &[0x8F, 0x03], hole + 0x300)?;
    state.rbp = hole + 0x400;
    // leave
    expect_cr2(block, &state, 8, &[0xC9], hole + 0x400)
}

fn strings() -> Verdict {
    let (block, state) = long()?;
    let hole = block.at(place::HOLE);
    let from = Vmsa {
        rsi: hole + 0x40,
        rcx: 4,
        ..state.clone()
    };
    let to = Vmsa {
        rdi: hole + 0x80,
        rcx: 4,
        ..state.clone()
    };
    for form in [&[0xA4][..], &[0xF3, 0x48, 0xA5], &[0xAC], &[0xA7]] {
        expect_cr2(block, &from, 8, form, hole + 0x40)?;
    }
    for form in [&[0xA4][..], &[0xF3, 0x48, 0xA5], &[0xF3, 0xAA], &[0xA7]] {
        expect_cr2(block, &to, 8, form, hole + 0x80)?;
    }
    // The fourth element is the first that is not there.
    let partly = Vmsa {
        rdi: block.at(place::NOT_VALID) - 24,
        rcx: 8,
        ..state
    };
    let form = [0xF3, 0x48, 0xAB];
    expect_cr2(block, &partly, 8, &form, block.at(place::NOT_VALID))
}

fn segment_bases() -> Verdict {
    let (block, mut state) = long()?;
    let hole = block.at(place::HOLE);
    state.rbx = 0x120;
    (state.fs.base, state.gs.base) = (hole, hole + 0x400);
    expect_cr2(block, &state, 8, &[0x64, 0x8B, 0x03], hole + 0x120)?;
    expect_cr2(block, &state, 8, &[0x65, 0x8B, 0x03], hole + 0x520)
}

/// A segment load reads the local descriptor table.
fn descriptor() -> Verdict {
    let (block, mut state) = long()?;
    let hole = block.at(place::HOLE);
    state.ldtr = Segment {
        selector: 0x40,
        attributes: SegmentAttributes::LDT,
        limit: 0xFFF,
        base: hole,
    };
    state.rax = 8 | 4;
    // mov fs, eax
    expect_cr2(block, &state, 8, &[0x8E, 0xE0], hole + 8)
}

fn border() -> Verdict {
    let (block, mut state) = long()?;
    let border = block.at(place::NOT_VALID);
    state.rbx = border - 4;
    expect_cr2(block, &state, 8, &[0x48, 0x8B, 0x03], border)?;
    expect_cr2(block, &state, 8, &[0x48, 0x89, 0x03], border)
}

fn fetch() -> Verdict {
    let (block, mut state) = long()?;
    state.rbx = block.at(place::HOLE) + 0x123;
    // jmp rbx
    expect_cr2(block, &state, 8, &[0xFF, 0xE3], state.rbx)
}

/// The page table of the second half TiB is not valid.
fn walk() -> Verdict {
    let (block, mut state) = long()?;
    state.rbx = 1 << 39 | 0x1234;
    expect_cr2(block, &state, 8, &[0x48, 0x8B, 0x03], state.rbx)
}

fn smaller_modes() -> Verdict {
    let block = block()?;
    let hole = block.at(place::HOLE);
    for mode in [Mode::Protected32, Mode::Paged, Mode::Pae] {
        block.write_gates(mode, 0, 0)?;
        let mut state = block.state(mode, 0);
        state.rbx = hole + 0x123;
        expect_cr2(block, &state, 4, &[0x8A, 0x03], hole + 0x123)?;
        expect_cr2(block, &state, 4, &[0xFF, 0x33], hole + 0x123)?;
    }
    block.write_gates(Mode::Protected16, 0, 0)?;
    let mut state = block.state(Mode::Protected16, 0);
    state.ds.base = hole;
    (state.rbx, state.rsi) = (0x100, 0x23);
    // mov al, [bx + si]
    expect_cr2(block, &state, 2, &[0x8A, 0x00], hole + 0x123)
}
