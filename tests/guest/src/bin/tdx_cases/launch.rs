//! What is there before the first case: processors, launched pages, the face of the processor.

use core::sync::atomic::{AtomicU64, Ordering};

use guest::harness::{Case, Finding, Verdict, case, expect, expect_not};
use guest::insn::{self, CpuidResult};
use guest::memory::{self, private};
use guest::tdcall::{accept, call, call_rax};
use guest::trap::Trap;
use protocols::addr::{Gpa, PageSize};
use protocols::oracle::PageFlags;
use protocols::tdx::vmcall::register::{R8, R9, R10, R11, RAX, RCX, RDX};
use protocols::tdx::{Leaf, Operand, Status, TdAttributes};

use crate::reset;

pub const CASES: &[Case] = &[
    case(
        "first_registers",
        "tdx.md §8 RBX, RCX, R8, RSI, others",
        first_registers,
    ),
    case("first_mode", "tdx.md §8 CR0, CR4, EFER", first_mode),
    case("first_rdx_is_the_signature", "tdx.md §8 RDX", first_rdx),
    case(
        "second_processor_starts_by_itself",
        "tdx.md §8 all vCPUs start at the same vector",
        second_started,
    ),
    case(
        "launched_pages_are_mapped",
        "tdx.md §3 MAPPED, §11 PAGE.ADD",
        launched_pages,
    ),
    case("vp_info", "tdx.md §1 leaf 1", vp_info),
    case("cpuid_says_tdx", "tdx.md §6 detection", cpuid_says_tdx),
    case("cpuid_says_intel", "tdx.md §6 detection", cpuid_says_intel),
    case(
        "cpuid_beyond_the_maximum",
        "docs/machine.md, TDX: CPUID",
        cpuid_beyond,
    ),
    case("unknown_leaf", "tdx.md §1 unknown leaf", unknown_leaf),
    case("version_of_a_leaf", "tdx.md §1 version", version),
    case(
        "reserved_bits_of_rax",
        "tdx.md §1 RAX reserved",
        reserved_rax,
    ),
    case(
        "tdcall_needs_its_prefix",
        "tdx.md §1 encoding",
        needs_prefix,
    ),
    case(
        "no_snp_instructions",
        "tdx.md §12: PVALIDATE is SNP's",
        no_snp,
    ),
    case(
        "memory_is_private_and_shared",
        "tdx.md §1 shared bit",
        two_aliases,
    ),
];

static SECOND_INDEX: AtomicU64 = AtomicU64::new(u64::MAX);
static SECOND_INFO: AtomicU64 = AtomicU64::new(u64::MAX);

/// The second processor tells what it knows of itself.
pub fn second(index: u64) {
    let info = call(Leaf::VP_INFO, &[]).map_or(u64::MAX, |after| after[R9]);
    SECOND_INDEX.store(index, Ordering::SeqCst);
    SECOND_INFO.store(info, Ordering::SeqCst);
}

fn first_registers() -> Verdict {
    let first = reset::first();
    let [eax, ecx, _edx, ebx, esp, ebp, esi, edi] = first.gprs;
    expect("EBX, ESI", [ebx, esi], [48, 0])?;
    expect("EAX, ESP, EBP, EDI", [eax, esp, ebp, edi], [0; 4])?;
    let [r8, rest @ ..] = reset::first_upper_registers();
    expect("R8 is RCX", r8, u64::from(ecx))?;
    expect("R9 to R15", rest, [0; 7])
}

fn first_mode() -> Verdict {
    let [cr0, cr4, efer] = reset::first().control;
    // That bit 4, ET, is one is all that a processor with a floating point unit can say.
    expect(
        "CR0, CR4, EFER",
        [cr0 & !0x10, cr4, efer],
        [0x21, 0x40, 0x901],
    )
}

fn first_rdx() -> Verdict {
    let signature = cpuid(1)?.eax;
    expect("EDX", reset::first().gprs[2], signature)
}

fn second_started() -> Verdict {
    // It may still be on its way; it needs no help.
    for _ in 0..100_000_000_u64 {
        if SECOND_INFO.load(Ordering::SeqCst) != u64::MAX {
            break;
        }
        core::hint::spin_loop();
    }
    expect("RSI of the second", SECOND_INDEX.load(Ordering::SeqCst), 1)?;
    expect("R9 of VP.INFO", SECOND_INFO.load(Ordering::SeqCst), 1)
}

fn launched_pages() -> Verdict {
    for address in [0x80_0000, 0xFFFF_F000] {
        let page = Gpa::new(address);
        guest::oracle::expect_flags(page, PageFlags::VALIDATED, PageFlags::VALIDATED)?;
        let status = accept(page, PageSize::Size4K)?;
        expect("RAX", status, Status::PAGE_ALREADY_ACCEPTED.with(0))?;
    }
    Ok(())
}

fn vp_info() -> Verdict {
    let after = call(Leaf::VP_INFO, &[])?;
    expect("RAX", after[RAX], 0)?;
    expect("RCX", after[RCX], 48)?;
    expect("RDX", after[RDX], TdAttributes::empty().bits())?;
    expect("R8", after[R8], 2 << 32 | 2)?;
    expect(
        "R9, R10, R11",
        [after[R9], after[R10], after[R11]],
        [0, 1, 0],
    )
}

/// CPUID that the module answers.
pub fn cpuid(leaf: u32) -> Result<CpuidResult, Finding> {
    insn::cpuid(leaf, 0).map_err(|trap| Finding::new(format_args!("CPUID {leaf:#x}: {trap:x?}")))
}

fn name(of: CpuidResult) -> [u8; 12] {
    let mut name = [0; 12];
    for (to, from) in name.chunks_exact_mut(4).zip([of.ebx, of.edx, of.ecx]) {
        to.copy_from_slice(&from.to_le_bytes());
    }
    name
}

fn cpuid_says_tdx() -> Verdict {
    expect("leaf 0x21", name(cpuid(0x21)?), *b"IntelTDX    ")
}

fn cpuid_says_intel() -> Verdict {
    expect("leaf 0", name(cpuid(0)?), *b"GenuineIntel")?;
    let family = cpuid(1)?.eax >> 8 & 0xF;
    expect("family", family, 6)
}

fn cpuid_beyond() -> Verdict {
    let highest = cpuid(0)?.eax;
    let last = cpuid(highest)?;
    expect("behind the highest leaf", cpuid(highest + 1)?, last)?;
    expect(
        "behind the highest extended leaf",
        cpuid(0x8000_00FF)?,
        last,
    )
}

fn unknown_leaf() -> Verdict {
    for leaf in [19, 28, 0x1234, 0xFFFF] {
        expect("RAX", call(Leaf(leaf), &[])?[RAX], Operand::RAX.invalid())?;
    }
    Ok(())
}

fn version() -> Verdict {
    for rax in [0x1_0001, 0x1_0006, 0x2_0007, 0x1_0008] {
        expect("RAX", call_rax(rax, &[])?[RAX], Operand::RAX.invalid())?;
    }
    Ok(())
}

fn reserved_rax() -> Verdict {
    for bit in [24, 32, 63] {
        let after = call_rax(1 | 1 << bit, &[])?;
        expect("RAX", after[RAX], Operand::RAX.invalid())?;
    }
    Ok(())
}

fn needs_prefix() -> Verdict {
    expect("0F 01 CC", insn::tdcall_without_prefix(), Err(Trap::UD))
}

fn no_snp() -> Verdict {
    expect("PVALIDATE", insn::pvalidate(0x80_0000, 0, 1), Err(Trap::UD))
}

fn two_aliases() -> Verdict {
    let page = memory::fresh_page();
    expect("RAX", accept(page, PageSize::Size4K)?, 0)?;
    memory::write(private(page), 0x1234)?;
    expect("private", memory::read(private(page))?, 0x1234)?;
    // A page of its own, on the other side.
    let other = memory::fresh_page();
    let (status, _) = guest::tdcall::map_gpa(other.get() | 1 << 47, 0x1000)?;
    expect("R10 of MapGPA", status, 0)?;
    memory::write(memory::shared(other), 0x4321)?;
    expect("shared", memory::read(memory::shared(other))?, 0x4321)?;
    expect_not("the private page", memory::read(private(page))?, 0x4321)
}
