//! Two processors of the trust domain: one gets the other out of its L2 VM.

use core::hint;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use guest::harness::{Case, Finding, Verdict, case, expect};
use guest::{insn, tdcall, trap};
use protocols::tdx::Status;
use protocols::tdx::ve::ExitReason;
use protocols::tdx::vmcall::SubFunction;
use protocols::tdx::vmcall::register::R12;

use super::vm::{HLT, SPIN, Vm};

pub const CASES: &[Case] = &[
    case(
        "l2_kicked_by_another_processor",
        "tdx.md §7 routing: external interrupt",
        kicked,
    ),
    case(
        "l2_on_both_processors",
        "tdx.md §7: VMCS fields of each vCPU",
        both,
    ),
];

/// x2APIC interrupt command, which is the host's to carry out.
const ICR: u64 = 0x830;
const SECOND: u64 = 1 << 32;
/// x2APIC spurious interrupt vector, and the bit that switches the APIC on.
const SPURIOUS: u64 = 0x80F;
const APIC_ON: u64 = 0x1FF;
/// Vectors: there is work; come out.
const WORK: u64 = 0x32;
const KICK: u64 = 0x33;

/// What the second processor is asked for.
mod work {
    pub const NONE: u32 = 0;
    /// Run a VM that goes on for ever.
    pub const SPIN: u32 = 1;
    /// Run one that halts.
    pub const HALT: u32 = 2;
}

static ASKED: AtomicU32 = AtomicU32::new(work::NONE);
/// RAX of the exit, when there was one.
static ANSWER: AtomicU64 = AtomicU64::new(UNANSWERED);
const UNANSWERED: u64 = u64::MAX;
/// The VM was never entered, or could not be made.
const FAILED: u64 = u64::MAX - 1;

/// The second processor's life: it sleeps, and does what it is asked for when an interrupt comes.
pub fn serve() -> ! {
    trap::load();
    let _ = tdcall::host_wrmsr(SPURIOUS, APIC_ON);
    loop {
        // With interrupts off one that waits ends it all the same.
        let _ = tdcall::ask_host(SubFunction::HLT, &[(R12, 0)]);
        insn::open_interrupts();
        let code = match ASKED.swap(work::NONE, Ordering::SeqCst) {
            work::SPIN => SPIN,
            work::HALT => HLT,
            _ => continue,
        };
        ANSWER.store(run(code).unwrap_or(FAILED), Ordering::SeqCst);
    }
}

fn run(code: &[u8]) -> Result<u64, Finding> {
    let mut vm = Vm::of(code)?;
    loop {
        if let Some(exit) = vm.run_or_wait()? {
            return Ok(exit.status.with(exit.reason.0));
        }
        // The kick came before the entry.
        insn::open_interrupts();
    }
}

fn send(vector: u64) -> Verdict {
    expect("ICR", tdcall::host_wrmsr(ICR, SECOND | vector)?, 0)
}

/// Lets the second processor run this, and kicks it now and then if that is what it waits for.
fn ask(what: u32, kicks: bool) -> Result<u64, Finding> {
    ANSWER.store(UNANSWERED, Ordering::SeqCst);
    ASKED.store(what, Ordering::SeqCst);
    send(WORK)?;
    for turn in 1..200_000_000_u64 {
        let answer = ANSWER.load(Ordering::SeqCst);
        if answer != UNANSWERED {
            return Ok(answer);
        }
        if kicks && turn.is_multiple_of(1_000_000) {
            send(KICK)?;
        }
        hint::spin_loop();
    }
    Err(Finding::new(format_args!("the second processor is silent")))
}

fn kicked() -> Verdict {
    let why = Status::L2_EXIT_PENDING_INTERRUPT.with(ExitReason::EXTERNAL_INTERRUPT.0);
    expect("exit", ask(work::SPIN, true)?, why)
}

fn both() -> Verdict {
    let mut mine = Vm::of(HLT)?;
    expect(
        "the second's",
        ask(work::HALT, false)?,
        ExitReason::HLT.0.into(),
    )?;
    // What it has set is not this processor's.
    mine.expect_halt(0)
}
