//! The second processor: it sleeps, and does what the cases ask it for.

use core::hint;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use guest::harness::{Finding, Verdict, expect};
use guest::memory::page_of;
use guest::tdcall::{self, TIMER_MASKED, TIMER_PERIODIC, accept, host_wrmsr, start_timer};
use guest::{insn, trap};
use protocols::addr::{Gpa, PageSize};
use protocols::tdx::vmcall::SubFunction;
use protocols::tdx::vmcall::register::R12;

use crate::pair;

/// x2APIC interrupt command, which is the host's to carry out.
pub const ICR: u64 = 0x830;
/// The processor, as a destination.
const SECOND: u64 = 1 << 32;
/// Vector by which it is told that there is work.
pub const WORK: u8 = 0x3F;

/// How often something that happens by itself is looked for.
pub const LOOKS: u32 = 200_000_000;

/// What the second processor is asked for.
pub mod work {
    pub const NONE: u32 = 0;
    /// Send an interrupt to the first.
    pub const SEND: u32 = 1;
    /// Run without an exit, interrupts off, until told to stop.
    pub const SPIN: u32 = 2;
    /// The same with interrupts on.
    pub const SPIN_OPEN: u32 = 3;
    /// Accept every other page from the operand on.
    pub const ACCEPT: u32 = 4;

    /// Do jobs of [`crate::pair`] until there is none left.
    pub const PAIR: u32 = 5;
    /// As `SPIN_OPEN`, while a timer ticks so fast that interrupts of L1's meet its entries.
    pub const SPIN_TICKING: u32 = 6;

    /// The vector of `SEND`.
    pub const SENT: u8 = 0x93;
    /// The vector of `SPIN_TICKING`.
    pub const TICK: u8 = 0x57;
    /// Its timer's period, in cycles of 25 MHz.
    pub const TICK_LENGTH: u64 = 1_000;
    /// Result of one that runs on.
    pub const RUNNING: u64 = 1;
}

/// Pages that each of two processors accepts.
pub const PAGES_EACH: u64 = 64;

/// Accepts every other page from `first` on; how many were new. Interrupts come in between.
pub fn accept_every_other(first: Gpa) -> Result<u64, Finding> {
    let mut new = 0;
    for page in (0..PAGES_EACH).map(|page| page_of(first, 2 * page)) {
        // Busy: the other has the lock for too long.
        let status = loop {
            let status = accept(page, PageSize::Size4K)?;
            if status >> 32 != 0x8000_0200 {
                break status;
            }
        };
        new += u64::from(status == 0);
        insn::open_interrupts();
    }
    Ok(new)
}

static ASKED: AtomicU32 = AtomicU32::new(work::NONE);
static OPERAND: AtomicU64 = AtomicU64::new(0);
static RESULT: AtomicU64 = AtomicU64::new(0);
static STOP: AtomicU32 = AtomicU32::new(0);
/// Requests that are answered.
static ANSWERED: AtomicU32 = AtomicU32::new(0);

/// What the next request works on.
pub fn set_operand(page: Gpa) {
    OPERAND.store(page.get(), Ordering::SeqCst);
}

/// What the last request came to.
pub fn result() -> u64 {
    RESULT.load(Ordering::SeqCst)
}

/// Ends a request that goes on until then.
pub fn stop() {
    STOP.store(1, Ordering::SeqCst);
}

/// Sends an interrupt by the host. `destination` is the upper half of the command.
pub fn send(destination: u64, vector: u8) -> Verdict {
    let answer = host_wrmsr(ICR, destination | u64::from(vector))?;
    expect("ICR", answer, 0)
}

/// Waits for an interrupt.
pub fn hlt() -> Verdict {
    tdcall::ask_host(SubFunction::HLT, &[(R12, 0)]).map(|_| ())
}

/// Asks the second processor for something: an interrupt wakes it.
pub fn ask(what: u32) -> Verdict {
    RESULT.store(0, Ordering::SeqCst);
    STOP.store(0, Ordering::SeqCst);
    ANSWERED.store(0, Ordering::SeqCst);
    ASKED.store(what, Ordering::SeqCst);
    send(SECOND, WORK)
}

/// Waits until that is done.
pub fn await_answer() -> Verdict {
    for _ in 0..LOOKS {
        if ANSWERED.load(Ordering::SeqCst) != 0 {
            return Ok(());
        }
        hint::spin_loop();
    }
    Err(Finding::new(format_args!("the second processor is silent")))
}

/// The second processor's life: it sleeps, and does what it is asked for when an interrupt comes.
pub fn serve() -> ! {
    trap::load();
    loop {
        let _ = hlt();
        insn::open_interrupts();
        match ASKED.swap(work::NONE, Ordering::SeqCst) {
            work::NONE => continue,
            work::SEND => {
                let _ = send(0, work::SENT);
            }
            work::SPIN => {
                RESULT.store(work::RUNNING, Ordering::SeqCst);
                while !is_stopped() {
                    hint::spin_loop();
                }
            }
            work::SPIN_OPEN => {
                RESULT.store(work::RUNNING, Ordering::SeqCst);
                insn::open_interrupts_while(|| !is_stopped());
            }
            work::SPIN_TICKING => {
                let _ = tick_until_stopped();
            }
            work::PAIR => pair::serve(),
            work::ACCEPT => {
                let first = Gpa::new(OPERAND.load(Ordering::SeqCst));
                RESULT.store(accept_every_other(first).unwrap_or(0), Ordering::SeqCst);
            }
            _ => {}
        }
        ANSWERED.store(1, Ordering::SeqCst);
    }
}

/// Runs with interrupts on, one of which is never far.
fn tick_until_stopped() -> Verdict {
    start_timer(TIMER_PERIODIC | u64::from(work::TICK), work::TICK_LENGTH)?;
    RESULT.store(work::RUNNING, Ordering::SeqCst);
    insn::open_interrupts_while(|| !is_stopped());
    start_timer(TIMER_MASKED, 0)?;
    insn::open_interrupts();
    Ok(())
}

fn is_stopped() -> bool {
    STOP.load(Ordering::SeqCst) != 0
}
