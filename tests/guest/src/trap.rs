//! Exceptions as values.
//!
//! Instructions that may fault are assembled with an entry in the table `.fixups`: address of
//! the instruction, address to go on at. The handler looks the faulting address up; if it is
//! listed, the exception is kept for [`taken`] and execution continues behind the
//! instruction, otherwise the guest panics. So a case can demand an exception, and one that
//! nobody expected never passes unnoticed.
//!
//! One virtual processor, no nesting: at most one exception is kept at a time.

#![expect(
    unsafe_code,
    reason = "builds and loads descriptor tables, edits interrupt frames"
)]

use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};

use protocols::exit_code::ExitCode;
use protocols::snp::VC_VECTOR;
use x86_64::VirtAddr;
use x86_64::registers::control::Cr2;
use x86_64::structures::DescriptorTablePointer;

/// Selector of the 64-bit code segment, as in the launch VMSA.
pub const CODE_SELECTOR: u16 = 0x08;
/// Selector of the data segment.
pub const DATA_SELECTOR: u16 = 0x10;

/// NMI.
pub const NMI: u8 = 2;
/// #UD.
pub const INVALID_OPCODE: u8 = 6;
/// #GP.
pub const GENERAL_PROTECTION: u8 = 13;
/// #PF.
pub const PAGE_FAULT: u8 = 14;
/// #VC.
pub const VMM_COMMUNICATION: u8 = VC_VECTOR;

/// #DF.
pub const DOUBLE_FAULT: u8 = 8;
/// #VE.
pub const VIRTUALIZATION: u8 = protocols::tdx::ve::VECTOR;

/// An exception that a listed instruction raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trap {
    /// Vector.
    pub vector: u8,
    /// Error code; 0 for vectors without one.
    pub error: u64,
    /// CR2 for #PF and for #VC 0x404, otherwise 0.
    pub address: u64,
}

impl Trap {
    /// #GP with error code 0.
    pub const GP: Self = Self {
        vector: GENERAL_PROTECTION,
        error: 0,
        address: 0,
    };
    /// #UD.
    pub const UD: Self = Self {
        vector: INVALID_OPCODE,
        error: 0,
        address: 0,
    };

    /// #VE; what it is about is asked of the module.
    pub const VE: Self = Self {
        vector: VIRTUALIZATION,
        error: 0,
        address: 0,
    };
    /// #DF.
    pub const DF: Self = Self {
        vector: DOUBLE_FAULT,
        error: 0,
        address: 0,
    };

    /// #VC with the given exit code.
    #[must_use]
    pub const fn vc(exit_code: u64) -> Self {
        Self {
            vector: VMM_COMMUNICATION,
            error: exit_code,
            address: 0,
        }
    }

    /// #VC "page not validated" (snp-isa.md §9: error code 0x404, address in CR2).
    #[must_use]
    pub const fn not_validated(address: u64) -> Self {
        Self {
            vector: VMM_COMMUNICATION,
            error: ExitCode::PAGE_NOT_VALIDATED.0,
            address,
        }
    }
}

/// What the entry code pushed, lowest address first.
#[repr(C)]
struct Frame {
    registers: [u64; 15],
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

/// One line of `.fixups`.
#[repr(C)]
struct Fixup {
    instruction: u64,
    resume: u64,
}

/// Address whose first fetch may fail; 0 for none.
static WATCHED_FETCH: AtomicU64 = AtomicU64::new(0);
static KEPT: AtomicBool = AtomicBool::new(false);
static VECTOR: AtomicU64 = AtomicU64::new(0);
static ERROR: AtomicU64 = AtomicU64::new(0);
static ADDRESS: AtomicU64 = AtomicU64::new(0);

/// The exception of the last listed instruction, if it raised one. Taking it forgets it.
pub fn taken() -> Option<Trap> {
    KEPT.swap(false, Ordering::Relaxed).then(|| Trap {
        vector: VECTOR.load(Ordering::Relaxed) as u8,
        error: ERROR.load(Ordering::Relaxed),
        address: ADDRESS.load(Ordering::Relaxed),
    })
}

/// Makes an exception whose RIP is `target` go on at the return address on the stack: the
/// call of a subroutine that cannot be fetched. `None` ends it.
pub fn watch_fetch(target: Option<u64>) {
    WATCHED_FETCH.store(target.unwrap_or(0), Ordering::Relaxed);
}

/// Result of an instruction: the exception it raised, or `value`.
///
/// # Errors
///
/// The exception.
pub fn result<T>(value: T) -> Result<T, Trap> {
    match taken() {
        Some(trap) => Err(trap),
        None => Ok(value),
    }
}

fn resume_address(rip: u64) -> Option<u64> {
    unsafe extern "C" {
        static fixups_start: Fixup;
        static fixups_end: Fixup;
    }
    let start = &raw const fixups_start;
    let end = &raw const fixups_end;
    let count = (end as usize - start as usize) / size_of::<Fixup>();
    // SAFETY: the linker script places both symbols around one array of `Fixup`, which is
    // never written.
    let table = unsafe { core::slice::from_raw_parts(start, count) };
    table
        .iter()
        .find(|fixup| fixup.instruction == rip)
        .map(|fixup| fixup.resume)
}

/// The interrupts that came since this was asked last, as far as they have vectors below 64: bit n is
/// vector 32 + n.
pub fn interrupts() -> u32 {
    INTERRUPTS.swap(0, Ordering::Relaxed)
}

static INTERRUPTS: AtomicU32 = AtomicU32::new(0);

/// What is called for every interrupt before its end, with the vector and where it came: interrupts are
/// off. `None` ends it.
pub fn on_interrupt(hook: Option<fn(u8, u64)>) {
    let hook = hook.map_or(core::ptr::null_mut(), |hook| hook as *mut ());
    HOOK.store(hook, Ordering::SeqCst);
}

/// Whether NMIs are expected; one that is not ends the program. How many came since this was asked last.
pub fn expect_nmis(expected: bool) -> u32 {
    NMIS_EXPECTED.store(expected, Ordering::SeqCst);
    NMIS.swap(0, Ordering::SeqCst)
}

static NMIS_EXPECTED: AtomicBool = AtomicBool::new(false);
static NMIS: AtomicU32 = AtomicU32::new(0);

/// Whether interrupts are off behind an instruction that raised an exception with interrupts on.
pub fn keep_interrupts_off(off: bool) {
    STAY_OFF.store(off, Ordering::SeqCst);
}

static STAY_OFF: AtomicBool = AtomicBool::new(false);
const RFLAGS_IF: u64 = 1 << 9;

/// A function of [`on_interrupt`], or null.
static HOOK: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());

fn call_hook(vector: u8, rip: u64) {
    let hook = HOOK.load(Ordering::SeqCst);
    if !hook.is_null() {
        // SAFETY: `on_interrupt` alone stores here, and only functions of this type.
        let hook: fn(u8, u64) = unsafe { core::mem::transmute(hook) };
        hook(vector, rip);
    }
}

/// End of interrupt, x2APIC.
const X2APIC_EOI: u32 = 0x80B;

extern "C" fn on_exception(frame: &mut Frame) {
    let vector = frame.vector as u8;
    if vector >= FIRST_INTERRUPT {
        let bit = 1_u32.checked_shl(u32::from(vector - FIRST_INTERRUPT));
        INTERRUPTS.fetch_or(bit.unwrap_or(0), Ordering::Relaxed);
        call_hook(vector, frame.rip);
        // SAFETY: the interrupt came from this APIC, which is in x2APIC mode.
        unsafe { x86_64::registers::model_specific::Msr::new(X2APIC_EOI).write(0) };
        return;
    }
    if vector == NMI && NMIS_EXPECTED.load(Ordering::SeqCst) {
        NMIS.fetch_add(1, Ordering::SeqCst);
        return;
    }
    let has_address = vector == PAGE_FAULT
        || (vector == VMM_COMMUNICATION && frame.error == ExitCode::PAGE_NOT_VALIDATED.0);
    let address = if has_address { Cr2::read_raw() } else { 0 };
    let resume = if frame.rip == WATCHED_FETCH.load(Ordering::Relaxed) {
        // SAFETY: `watch_fetch` is used around one CALL, so the interrupted stack pointer is
        // at the return address that the CALL just pushed.
        let return_address = unsafe { (frame.rsp as *const u64).read() };
        frame.rsp += size_of::<u64>() as u64;
        return_address
    } else if let Some(resume) = resume_address(frame.rip) {
        resume
    } else {
        panic!(
            "exception {vector} error {:#x} at rip {:#x} rsp {:#x} address {address:#x}",
            frame.error, frame.rip, frame.rsp
        );
    };
    VECTOR.store(frame.vector, Ordering::Relaxed);
    ERROR.store(frame.error, Ordering::Relaxed);
    ADDRESS.store(address, Ordering::Relaxed);
    KEPT.store(true, Ordering::Relaxed);
    frame.rip = resume;
    if STAY_OFF.load(Ordering::SeqCst) {
        frame.rflags &= !RFLAGS_IF;
    }
}

/// The first vector of interrupts.
const FIRST_INTERRUPT: u8 = 32;
const VECTORS: usize = 256;
/// Bytes between two entry stubs.
const STUB_SIZE: usize = 16;

// Vectors 8, 10-14, 17, 21, 29 and 30 come with an error code (bit set below); the others get
// a zero in its place so that all frames look alike. Interrupts have none.
global_asm!(
    ".balign {size}",
    "trap_stubs:",
    ".set vector, 0",
    ".rept {vectors}",
    ".balign {size}",
    ".if vector >= 32 || (({with_error} >> vector) & 1) == 0",
    "push 0",
    ".endif",
    "push vector",
    "jmp {common}",
    ".set vector, vector + 1",
    ".endr",
    size = const STUB_SIZE,
    vectors = const VECTORS,
    with_error = const (1_u32 << 8 | 0x1F << 10 | 1 << 17 | 1 << 21 | 1 << 29 | 1 << 30),
    common = sym common_entry,
);

#[unsafe(naked)]
extern "C" fn common_entry() {
    core::arch::naked_asm!(
        "push rax; push rbx; push rcx; push rdx; push rsi; push rdi; push rbp",
        "push r8; push r9; push r10; push r11; push r12; push r13; push r14; push r15",
        "cld",
        "mov rdi, rsp",
        // A frame without error code in 64-bit mode starts on a 16-byte boundary and grew by
        // 22 words: aligned for the call.
        "call {handler}",
        "pop r15; pop r14; pop r13; pop r12; pop r11; pop r10; pop r9; pop r8",
        "pop rbp; pop rdi; pop rsi; pop rdx; pop rcx; pop rbx; pop rax",
        "add rsp, 16",
        "iretq",
        handler = sym on_exception,
    );
}

/// Memory for a descriptor table, written once by [`install`] before it is loaded.
struct Table<T>(UnsafeCell<T>);

// SAFETY: written only by `install`, which runs once, before the processor uses the table.
unsafe impl<T> Sync for Table<T> {}

/// One 16-byte interrupt gate (APM volume 2, figure 8-2).
#[derive(Clone, Copy)]
#[repr(C)]
struct Gate {
    low: u64,
    high: u64,
}

static IDT: Table<[Gate; VECTORS]> = Table(UnsafeCell::new([Gate { low: 0, high: 0 }; VECTORS]));

/// Flat segments; the accessed bit is set so that loading a selector writes nothing.
static GDT: [u64; 3] = [0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF];

/// Loads GDT and IDT. From here on exceptions are values or panics.
pub fn install() {
    unsafe extern "C" {
        static trap_stubs: u8;
    }
    let stubs = (&raw const trap_stubs) as u64;
    let mut gates = [Gate { low: 0, high: 0 }; VECTORS];
    for (vector, gate) in gates.iter_mut().enumerate() {
        let entry = stubs + (vector * STUB_SIZE) as u64;
        // Present, DPL 0, 64-bit interrupt gate, no stack switch.
        gate.low = (entry & 0xFFFF)
            | u64::from(CODE_SELECTOR) << 16
            | 0x8E00 << 32
            | (entry >> 16 & 0xFFFF) << 48;
        gate.high = entry >> 32;
    }
    // SAFETY: no other reference to the table exists, see `Table`.
    unsafe { IDT.0.get().write(gates) };
    load();
}

/// One of the gates that [`install`] made.
pub fn gate(vector: u8) -> [u64; 2] {
    // SAFETY: the table is not written any more.
    let Gate { low, high } = unsafe { (*IDT.0.get())[usize::from(vector)] };
    [low, high]
}

/// Takes the gates from a table elsewhere until [`load`] is called.
pub fn load_gates_at(base: u64) {
    let idt = DescriptorTablePointer {
        limit: (size_of::<[Gate; VECTORS]>() - 1) as u16,
        base: VirtAddr::new(base),
    };
    // SAFETY: the caller has put copies of the gates there; one that is missing ends the program.
    unsafe { x86_64::instructions::tables::lidt(&idt) };
}

/// Loads the tables that [`install`] made, for a second context (another VMPL) of the guest.
pub fn load() {
    let idt = DescriptorTablePointer {
        limit: (size_of::<[Gate; VECTORS]>() - 1) as u16,
        base: VirtAddr::from_ptr(IDT.0.get()),
    };
    let gdt = DescriptorTablePointer {
        limit: (size_of_val(&GDT) - 1) as u16,
        base: VirtAddr::from_ptr(&raw const GDT),
    };
    // SAFETY: both tables are static; the selectors loaded exist in the GDT with the meaning
    // they have in the launch VMSA, so code and stack stay valid.
    unsafe {
        x86_64::instructions::tables::lgdt(&gdt);
        x86_64::instructions::tables::lidt(&idt);
        asm!(
            "push {code}",
            "lea {scratch}, [rip + 2f]",
            "push {scratch}",
            "retfq",
            "2:",
            "mov ss, {data:x}",
            "mov ds, {data:x}",
            "mov es, {data:x}",
            code = const CODE_SELECTOR,
            data = in(reg) u32::from(DATA_SELECTOR),
            scratch = out(reg) _,
        );
    }
}
