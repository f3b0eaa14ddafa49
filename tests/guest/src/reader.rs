//! A second processor with one occupation: it reads the word it is told to, over and over,
//! without an instruction that would make it leave the guest. So whatever translation it has it
//! keeps, until somebody else makes it leave.
//!
//! An exception ends the reading and is kept for [`expect_trap`]. The processor has an
//! interrupt table of its own, because [`crate::trap`] keeps the exceptions of one processor.

#![expect(
    unsafe_code,
    reason = "the code of another processor, and its interrupt table"
)]

use core::cell::UnsafeCell;
use core::mem::offset_of;
use core::sync::atomic::{AtomicU64, Ordering};

use protocols::addr::{Gpa, Vmpl};
use protocols::snp::VC_VECTOR;
use protocols::vmsa::{Efer, Segment, SegmentAttributes, SevFeatures, Vmsa};
use x86_64::registers::control::Cr3;

use crate::harness::{Finding, Verdict, expect};
use crate::trap::{CODE_SELECTOR, DATA_SELECTOR};

/// What the two processors tell each other. All fields are one word, written whole.
#[repr(C)]
struct Mailbox {
    /// Address to read; 0 for none.
    target: AtomicU64,
    /// Reads so far.
    reads: AtomicU64,
    /// Exceptions so far.
    traps: AtomicU64,
    /// Error code of the last exception.
    error: AtomicU64,
    /// CR2 at the last exception.
    address: AtomicU64,
}

static MAILBOX: Mailbox = Mailbox {
    target: AtomicU64::new(0),
    reads: AtomicU64::new(0),
    traps: AtomicU64::new(0),
    error: AtomicU64::new(0),
    address: AtomicU64::new(0),
};

/// The second processor's program. Its stack is used by exceptions only.
#[unsafe(naked)]
extern "C" fn read_on_and_on() -> ! {
    core::arch::naked_asm!(
        "2:",
        "mov rax, [rip + {mailbox} + {target}]",
        "test rax, rax",
        "jz 2b",
        "mov rcx, [rax]",
        "lock inc qword ptr [rip + {mailbox} + {reads}]",
        "jmp 2b",
        mailbox = sym MAILBOX,
        target = const offset_of!(Mailbox, target),
        reads = const offset_of!(Mailbox, reads),
    )
}

/// Its handler of #VC.
#[unsafe(naked)]
extern "C" fn on_vc() -> ! {
    core::arch::naked_asm!(
        "pop rax",
        "mov [rip + {mailbox} + {error}], rax",
        "mov rax, cr2",
        "mov [rip + {mailbox} + {address}], rax",
        "mov qword ptr [rip + {mailbox} + {target}], 0",
        "lea rax, [rip + {program}]",
        "mov [rsp], rax",
        "lock inc qword ptr [rip + {mailbox} + {traps}]",
        "iretq",
        mailbox = sym MAILBOX,
        error = const offset_of!(Mailbox, error),
        address = const offset_of!(Mailbox, address),
        target = const offset_of!(Mailbox, target),
        traps = const offset_of!(Mailbox, traps),
        program = sym read_on_and_on,
    )
}

const VECTORS: usize = VC_VECTOR as usize + 1;
const STACK_SIZE: usize = 4096;

/// What the second processor has for itself.
#[repr(C, align(16))]
struct Own {
    gates: UnsafeCell<[[u64; 2]; VECTORS]>,
    stack: UnsafeCell<[u8; STACK_SIZE]>,
}

// SAFETY: the gates are written once, before the processor starts; nothing but its stack
// pointer refers to the stack.
unsafe impl Sync for Own {}

static OWN: Own = Own {
    gates: UnsafeCell::new([[0; 2]; VECTORS]),
    stack: UnsafeCell::new([0; STACK_SIZE]),
};

/// Writes the processor's interrupt table. Once, before it starts.
pub fn prepare() {
    let gate = on_vc as *const () as u64;
    let mut gates = [[0; 2]; VECTORS];
    // Present, DPL 0, 64-bit interrupt gate, no stack switch.
    gates[usize::from(VC_VECTOR)] = [
        (gate & 0xFFFF)
            | u64::from(CODE_SELECTOR) << 16
            | 0x8E00 << 32
            | (gate >> 16 & 0xFFFF) << 48,
        gate >> 32,
    ];
    // SAFETY: no reference to the table exists, and the processor that uses it does not run.
    unsafe { OWN.gates.get().write(gates) };
}

/// The state it starts from: VMPL1, 64-bit mode, memory and segments as on this processor.
#[must_use]
pub fn vmsa() -> Vmsa {
    let code = Segment {
        selector: CODE_SELECTOR,
        attributes: SegmentAttributes::CODE64,
        limit: u32::MAX,
        base: 0,
    };
    let data = Segment {
        selector: DATA_SELECTOR,
        attributes: SegmentAttributes::DATA32,
        ..code
    };
    let table = |base, limit| Segment {
        selector: 0,
        attributes: SegmentAttributes::default(),
        limit,
        base,
    };
    let mut vmsa = Vmsa::at_reset(0);
    vmsa.cs = code;
    vmsa.ds = data;
    vmsa.es = data;
    vmsa.ss = data;
    let gdt = x86_64::instructions::tables::sgdt();
    vmsa.gdtr = table(gdt.base.as_u64(), gdt.limit.into());
    let limit = size_of::<[[u64; 2]; VECTORS]>() as u32 - 1;
    vmsa.idtr = table(OWN.gates.get() as u64, limit);
    vmsa.efer = Efer::SVME | Efer::LME | Efer::LMA;
    // Protection, extension type, numeric errors, write protection, paging.
    vmsa.cr0 = 0x8001_0031;
    vmsa.cr4 = 1 << 5;
    let (root, flags) = Cr3::read_raw();
    vmsa.cr3 = root.start_address().as_u64() | u64::from(flags);
    vmsa.rip = read_on_and_on as *const () as u64;
    vmsa.rsp = OWN.stack.get() as u64 + STACK_SIZE as u64;
    vmsa.vmpl = Vmpl::VMPL1.number();
    vmsa.sev_features = SevFeatures::SNP_ACTIVE;
    vmsa
}

/// How often [`wait_for`] looks, which takes seconds. Both processors get their share of the
/// host's time, so the number of looks is also a measure of what the other one could do.
const LOOKS: u64 = 1 << 28;

/// Waits without leaving the guest. PAUSE would not do: every emulated one takes QEMU's big lock.
fn wait_for(what: &str, so: impl Fn() -> bool) -> Verdict {
    for _ in 0..LOOKS {
        if so() {
            return Ok(());
        }
    }
    Err(Finding::new(format_args!("{what}: never happened")))
}

/// Reads so far.
pub fn reads() -> u64 {
    MAILBOX.reads.load(Ordering::SeqCst)
}

/// Waits until it has read its target often again.
///
/// # Errors
///
/// A finding when it does not.
pub fn wait_for_reads() -> Verdict {
    let before = reads();
    wait_for("reads by the second processor", || reads() > before + 1000)
}

/// Makes it read this page from now on, and waits until it does.
///
/// # Errors
///
/// A finding when it does not.
pub fn read_from(page: Gpa) -> Verdict {
    MAILBOX.target.store(page.get(), Ordering::SeqCst);
    wait_for_reads()
}

/// Exceptions so far.
pub fn traps() -> u64 {
    MAILBOX.traps.load(Ordering::SeqCst)
}

/// Waits for an exception beyond the first `traps`, which must have this error code and CR2.
///
/// # Errors
///
/// A finding with what was met, or that nothing was.
pub fn expect_trap(traps: u64, error: u64, address: u64) -> Verdict {
    wait_for("an exception", || self::traps() > traps)?;
    let met = (
        MAILBOX.error.load(Ordering::SeqCst),
        MAILBOX.address.load(Ordering::SeqCst),
    );
    expect("error code and CR2", met, (error, address))
}
