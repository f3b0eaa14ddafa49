//! From the launch VMSA to the table of cases.

#![expect(unsafe_code, reason = "first instructions of the program, page tables")]

use core::arch::naked_asm;
use core::cell::UnsafeCell;

use guest::console::{self, Console, Exit};
use guest::memory::SHARED_ALIAS;
use guest::{ghcb, harness, trap};
use protocols::launch::LaunchParams;
use protocols::terminate::{Reason, ReasonSet};
use spin::Once;

use crate::setup;

const STACK_SIZE: usize = 64 << 10;

/// The stack of VMPL0.
#[repr(C, align(16))]
struct Stack(UnsafeCell<[u8; STACK_SIZE]>);

// SAFETY: only the stack pointer refers to it, and VMPL0 runs on one virtual processor.
unsafe impl Sync for Stack {}

static STACK: Stack = Stack(UnsafeCell::new([0; STACK_SIZE]));

/// Entry point of the image: RDI = launch parameters, RSP = 0.
#[unsafe(naked)]
#[unsafe(no_mangle)]
#[unsafe(link_section = ".text.start")]
extern "C" fn start() -> ! {
    naked_asm!(
        "cld",
        "lea rsp, [rip + {stack} + {size}]",
        "xor ebp, ebp",
        "call {main}",
        "ud2",
        stack = sym STACK,
        size = const STACK_SIZE,
        main = sym main,
    )
}

/// Reasons for ending before there is a console: a set of this program's own.
const fn early(code: u8) -> Reason {
    Reason {
        set: ReasonSet(15),
        code,
    }
}

/// The launch parameter page is not what this program understands.
const NO_LAUNCH_PARAMS: Reason = early(1);
/// No GHCB page could be set up.
const NO_GHCB: Reason = early(2);

static LAUNCH: Once<&'static LaunchParams> = Once::new();

/// What the image builder said about this launch.
pub fn launch() -> &'static LaunchParams {
    LAUNCH.get().expect("set before the first case")
}

/// The value of the GHCB MSR before anyone wrote it.
static FIRST_GHCB_MSR: Once<u64> = Once::new();

/// The value of the GHCB MSR before anyone wrote it.
pub fn first_ghcb_msr() -> u64 {
    *FIRST_GHCB_MSR.get().expect("set before the first case")
}

extern "C" fn main(params: &'static LaunchParams) -> ! {
    trap::install();
    FIRST_GHCB_MSR.call_once(ghcb::msr);
    if !params.is_understood() {
        ghcb::terminate(NO_LAUNCH_PARAMS);
    }
    LAUNCH.call_once(|| params);
    map_everything(params.c_bit);
    if setup::open_ghcb().is_err() {
        ghcb::terminate(NO_GHCB);
    }
    console::attach(|port, width, value| setup::ghcb_page().port_out(port, width, value));
    let tally = harness::run(
        &[
            crate::launch::CASES,
            crate::pvalidate::CASES,
            crate::rmpadjust::CASES,
            crate::access::CASES,
            crate::msr_protocol::CASES,
            crate::nae::CASES,
            crate::guest_request::CASES,
            crate::psc::CASES,
            crate::ap_creation::CASES,
            crate::vmpl1::CASES,
            crate::second_cpu::CASES,
            crate::vmpl1::END,
            // From here on VMPL1 is a new one.
            crate::vc_modes::CASES,
            crate::vc_memory::CASES,
            crate::vc_events::CASES,
        ],
        || Ok(()),
        &mut Console,
    );
    console::exit(if tally.failed == 0 {
        Exit::Passed
    } else {
        Exit::Failed
    })
}

#[repr(C, align(4096))]
struct Table(UnsafeCell<[u64; 512]>);

// SAFETY: written by `map_everything` only, before the table is in use.
unsafe impl Sync for Table {}

static ROOT: Table = Table(UnsafeCell::new([0; 512]));
static PRIVATE: Table = Table(UnsafeCell::new([0; 512]));
static SHARED: Table = Table(UnsafeCell::new([0; 512]));

/// Present, writable, accessed: an entry that points to a table.
const TABLE: u64 = 0x23;
/// Present, writable, accessed, dirty, large: 1 GiB of memory.
const LARGE: u64 = 0xE3;

static PAGE_TABLE_ROOT: Once<u64> = Once::new();

/// CR3 of this program.
pub fn page_table_root() -> u64 {
    *PAGE_TABLE_ROOT.get().expect("set before the first case")
}

/// Leaves the measured tables for own ones that map everything twice (see
/// [`guest::memory`]).
fn map_everything(c_bit: u32) {
    let c_bit = 1_u64 << c_bit;
    let address = |table: &Table| table.0.get() as u64 | c_bit;
    PAGE_TABLE_ROOT.call_once(|| address(&ROOT));
    let mut root = [0; 512];
    root[0] = address(&PRIVATE) | TABLE;
    root[(SHARED_ALIAS >> 39) as usize] = address(&SHARED) | TABLE;
    // SAFETY: nobody else refers to the tables. The new mapping contains the old one: this
    // program at its own addresses, private.
    unsafe {
        PRIVATE
            .0
            .get()
            .write(core::array::from_fn(|i| (i as u64) << 30 | c_bit | LARGE));
        SHARED
            .0
            .get()
            .write(core::array::from_fn(|i| (i as u64) << 30 | LARGE));
        ROOT.0.get().write(root);
        core::arch::asm!("mov cr3, {}", in(reg) address(&ROOT), options(nostack));
    }
}
