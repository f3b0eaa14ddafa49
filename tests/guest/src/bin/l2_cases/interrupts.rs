//! Interrupts: the virtual APIC that the paravisor keeps for its guest, what comes to it from the host and
//! from the other processor, and how that processor is called out for a flush.

use core::hint;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use guest::harness::{Case, Finding, Verdict, case, expect};
use guest::memory::{self, page_of, private};
use guest::tdcall::{
    TIMER_MASKED, TIMER_PERIODIC, expect_accept, host_rdmsr, host_wrmsr, map_gpa, start_timer,
};
use guest::trap::Trap;
use guest::{insn, oracle, trap};
use protocols::addr::{PAGE_SIZE, PageSize};
use protocols::oracle::Counter;
use protocols::tdx::ve::ExitReason;
use protocols::tdx::vmcall::Status as HostStatus;

use crate::second::{
    self, ICR, LOOKS, PAGES_EACH, WORK, accept_every_other, ask, await_answer, hlt, send, work,
};
use crate::ve::take_info;

pub const CASES: &[Case] = &[
    case("apic_is_on", "decision 026", is_on),
    case("self_ipi", "tdx.md §5 native SELF_IPI", self_ipi),
    case("ipi_to_itself", "tdx.md §4 0x20", ipi_to_itself),
    case("ipi_while_it_runs", "tdx.md §7 status 1102", ipi_from_other),
    case("interrupts_by_priority", "SDM 3 chapter 31", by_priority),
    case("interrupts_nest", "SDM 3 chapter 31", nest),
    case("interrupts_wait_for_tpr", "SDM 3 chapter 31", tpr),
    case("end_of_interrupt", "SDM 3 chapter 31", end),
    case("timer", "tdx.md §4 0x20", timer),
    case("hlt_does_not_miss_what_waits", "tdx.md §4 0x0C", hlt_ready),
    case("hlt_ends_with_an_ipi", "tdx.md §4 0x0C", hlt_ipi),
    case(
        "sti_shadow_ends_with_the_tdcall",
        "SDM 3 table 26-3",
        shadow,
    ),
    case("exception_before_interrupt", "SDM 3 table 6-2", both),
    case("interrupted_delivery", "SDM 3 27.2.4", interrupted_delivery),
    case("interrupts_while_both_accept", "design.md §6", both_accept),
    case("flush_calls_out", "decision 026", flush_calls_out),
    case(
        "flush_call_is_not_the_guests",
        "decision 026",
        call_is_hidden,
    ),
    case(
        "flush_meets_a_refused_entry",
        "tdx.md §7 VP.ENTER check order",
        flush_with_ticks,
    ),
    case("spurious_vector_is_the_guests", "decision 026", spurious),
];

const TPR: u32 = 0x808;
const SPURIOUS: u64 = 0x80F;
const ISR: u32 = 0x810;
const IRR: u32 = 0x820;
const SELF_IPI: u32 = 0x83F;

const SHARED: u64 = 1 << 47;
/// Vector of spurious interrupts, as the paravisor has set it.
const NO_MESSAGE: u8 = 0xFF;
/// Vectors in the order they came, the last one in bits 7:0; those of [`WORK`] are not among them.
static ORDER: AtomicU64 = AtomicU64::new(0);
/// Where the last one came.
static CAME_AT: AtomicU64 = AtomicU64::new(0);

fn record(vector: u8, rip: u64) {
    if vector != WORK {
        let _ = ORDER.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |order| {
            Some(order << 8 | u64::from(vector))
        });
        CAME_AT.store(rip, Ordering::SeqCst);
    }
}

/// Calls `test` while interrupts are recorded.
fn recorded(test: impl FnOnce() -> Verdict) -> Verdict {
    // What is left of other cases.
    insn::open_interrupts();
    ORDER.store(0, Ordering::SeqCst);
    trap::on_interrupt(Some(record));
    let verdict = test();
    trap::on_interrupt(None);
    verdict
}

/// Demands these vectors since the last question, the last one in bits 7:0.
fn expect_order(want: u64) -> Verdict {
    expect("vectors in order", ORDER.swap(0, Ordering::SeqCst), want)
}

fn to_itself(vector: u8) -> Verdict {
    expect("SELF_IPI", insn::wrmsr(SELF_IPI, vector.into()), Ok(()))
}

/// Whether a vector is set in ISR or IRR.
fn is_set(base: u32, vector: u8) -> Result<bool, Finding> {
    match insn::rdmsr(base + u32::from(vector / 32)) {
        Ok(word) => Ok(word >> (vector % 32) & 1 != 0),
        Err(trap) => Err(Finding::new(format_args!("RDMSR of the APIC: {trap:x?}"))),
    }
}

/// Waits, with interrupts off, until a vector is requested.
fn await_request(vector: u8) -> Verdict {
    for _ in 0..LOOKS {
        if is_set(IRR, vector)? {
            return Ok(());
        }
    }
    Err(Finding::new(format_args!("vector {vector:#x} never came")))
}

/// Lets interrupts come until one is recorded, without leaving the processor otherwise.
fn await_any() {
    let mut looks = LOOKS;
    insn::open_interrupts_while(|| {
        looks -= 1;
        looks != 0 && ORDER.load(Ordering::SeqCst) == 0
    });
}

fn is_on() -> Verdict {
    expect("SVR", host_rdmsr(SPURIOUS)?, (0, 0x1FF))?;
    expect("nothing waits", insn::rdmsr(IRR + 1), Ok(0))
}

fn self_ipi() -> Verdict {
    recorded(|| {
        to_itself(0x31)?;
        expect("requested", is_set(IRR, 0x31)?, true)?;
        expect_order(0)?;
        insn::open_interrupts();
        expect_order(0x31)?;
        expect("requested", is_set(IRR, 0x31)?, false)
    })
}

fn ipi_to_itself() -> Verdict {
    recorded(|| {
        let (_, id) = host_rdmsr(0x802)?;
        send(id << 32, 0x84)?;
        await_request(0x84)?;
        // Twice before it is taken is once.
        send(id << 32, 0x84)?;
        insn::open_interrupts();
        let order = ORDER.load(Ordering::SeqCst);
        // The second may have come behind the first.
        if order == 0x8484 {
            return Ok(());
        }
        expect_order(0x84)
    })
}

fn ipi_from_other() -> Verdict {
    recorded(|| {
        ask(work::SEND)?;
        await_any();
        expect_order(work::SENT.into())?;
        await_answer()
    })
}

fn by_priority() -> Verdict {
    recorded(|| {
        for vector in [0x31, 0x72, 0x45, 0x78] {
            to_itself(vector)?;
        }
        insn::open_interrupts();
        expect_order(0x7872_4531)
    })
}

fn nest() -> Verdict {
    /// The service of 0x51 is interrupted by a higher class, and not by its own.
    fn serve(vector: u8, rip: u64) {
        record(vector, rip);
        if vector == 0x51 {
            let _ = insn::wrmsr(SELF_IPI, 0x58);
            let _ = insn::wrmsr(SELF_IPI, 0x61);
            let _ = host_wrmsr(ICR, host_rdmsr(0x802).map_or(0, |(_, id)| id) << 32 | 0x72);
            let _ = await_request(0x72);
            insn::open_interrupts();
            // Behind those that came in between.
            record(1, rip);
        }
    }
    ORDER.store(0, Ordering::SeqCst);
    trap::on_interrupt(Some(serve));
    let verdict = to_itself(0x51).and_then(|()| {
        insn::open_interrupts();
        expect_order(0x51_7261_0158)
    });
    trap::on_interrupt(None);
    verdict
}

fn tpr() -> Verdict {
    let set = |value: u64| expect("TPR", insn::wrmsr(TPR, value), Ok(()));
    recorded(|| {
        let (_, id) = host_rdmsr(0x802)?;
        set(0x50)?;
        to_itself(0x31)?;
        to_itself(0x61)?;
        send(id << 32, 0x42)?;
        await_request(0x42)?;
        insn::open_interrupts();
        expect_order(0x61)?;
        // 0x42 is in the class that is let through now.
        set(0x3F)?;
        insn::open_interrupts();
        expect_order(0x42)?;
        set(0)?;
        insn::open_interrupts();
        expect_order(0x31)
    })
}

fn end() -> Verdict {
    static IN_SERVICE: AtomicU32 = AtomicU32::new(0);
    fn serve(vector: u8, rip: u64) {
        record(vector, rip);
        let word = insn::rdmsr(ISR + u32::from(vector / 32)).unwrap_or(0);
        IN_SERVICE.fetch_or(word as u32, Ordering::SeqCst);
    }
    ORDER.store(0, Ordering::SeqCst);
    trap::on_interrupt(Some(serve));
    let verdict = to_itself(0x33).and_then(|()| {
        to_itself(0x35)?;
        insn::open_interrupts();
        // The same class: one after the other's end.
        expect_order(0x3533)?;
        expect(
            "in service then",
            IN_SERVICE.load(Ordering::SeqCst),
            1 << 0x13 | 1 << 0x15,
        )?;
        expect("in service now", insn::rdmsr(ISR + 1), Ok(0))
    });
    trap::on_interrupt(None);
    verdict
}

fn stop_timer() -> Verdict {
    start_timer(TIMER_MASKED, 0)?;
    insn::open_interrupts();
    Ok(())
}

fn timer() -> Verdict {
    static TICKS: AtomicU32 = AtomicU32::new(0);
    fn tick(vector: u8, _: u64) {
        if vector == 0x55 {
            TICKS.fetch_add(1, Ordering::SeqCst);
        }
    }
    trap::on_interrupt(Some(tick));
    let verdict = start_timer(TIMER_PERIODIC | 0x55, 25_000).and_then(|()| {
        let mut looks = LOOKS;
        insn::open_interrupts_while(|| {
            looks -= 1;
            looks != 0 && TICKS.load(Ordering::SeqCst) < 5
        });
        expect("five ticks", TICKS.load(Ordering::SeqCst) >= 5, true)
    });
    let stopped = stop_timer();
    trap::on_interrupt(None);
    verdict.and(stopped)
}

/// What waited when the guest halted ends that; nothing else would.
fn hlt_ready() -> Verdict {
    recorded(|| {
        to_itself(0x39)?;
        hlt()?;
        insn::open_interrupts();
        expect_order(0x39)
    })
}

fn hlt_ipi() -> Verdict {
    recorded(|| {
        ask(work::SEND)?;
        // Others than this may end it, too.
        while !is_set(IRR, work::SENT)? {
            hlt()?;
        }
        insn::open_interrupts();
        expect_order(work::SENT.into())?;
        await_answer()
    })
}

fn shadow() -> Verdict {
    recorded(|| {
        to_itself(0x3A)?;
        let behind = insn::tdcall_behind_sti();
        expect_order(0x3A)?;
        expect("it came at", CAME_AT.load(Ordering::SeqCst), behind)
    })
}

/// HLT in the shadow of STI raises #VE while an interrupt waits: first the one, then the other.
fn both() -> Verdict {
    recorded(|| {
        to_itself(0x3B)?;
        trap::keep_interrupts_off(true);
        let met = insn::halt_behind_sti();
        trap::keep_interrupts_off(false);
        expect("HLT", met, Err(Trap::VE))?;
        let [reason, ..] = take_info()?;
        expect("reason", reason, u64::from(ExitReason::HLT.0))?;
        expect_order(0)?;
        insn::open_interrupts();
        expect_order(0x3B)
    })
}

/// The gate of an interrupt lies in a page that is not accepted: the delivery ends in #VE, and the
/// interrupt comes when there is a gate.
fn interrupted_delivery() -> Verdict {
    const VECTOR: u8 = 0x91;
    const FIRST_BEHIND: u8 = 0x80;
    recorded(|| {
        let region = memory::fresh_region();
        let pages = [page_of(region, 0), page_of(region, 1)];
        expect_accept(pages[0], PageSize::Size4K, 0)?;
        let base = private(pages[1]) - u64::from(FIRST_BEHIND) * 16;
        let copy = |vectors: core::ops::RangeInclusive<u8>| {
            vectors.into_iter().try_for_each(|vector| {
                let at = base + u64::from(vector) * 16;
                let [low, high] = trap::gate(vector);
                memory::write(at, low)?;
                memory::write(at + 8, high)
            })
        };
        copy(0..=FIRST_BEHIND - 1)?;
        to_itself(VECTOR)?;
        trap::load_gates_at(base);
        // Otherwise it would be delivered again before anybody has asked what the #VE was about.
        trap::keep_interrupts_off(true);
        let met = insn::open_interrupts_guarded();
        trap::keep_interrupts_off(false);
        let info = take_info();
        let accepted = expect_accept(pages[1], PageSize::Size4K, 0);
        let copied = accepted.and_then(|()| copy(FIRST_BEHIND..=u8::MAX));
        let came_early = ORDER.load(Ordering::SeqCst);
        if copied.is_ok() {
            insn::open_interrupts();
        }
        trap::load();
        copied?;
        expect("delivery", met, Err(Trap::VE))?;
        let [reason, _, _, gpa, _] = info?;
        expect("reason", reason, u64::from(ExitReason::EPT_VIOLATION.0))?;
        expect("page", gpa & !(PAGE_SIZE - 1), pages[1].get())?;
        expect("without a gate", came_early, 0)?;
        expect_order(VECTOR.into())?;
        expect("in service", is_set(ISR, VECTOR)?, false)
    })
}

/// Pages of one region, which one lock guards, accepted by both processors while a timer ticks.
fn both_accept() -> Verdict {
    static TICKS: AtomicU32 = AtomicU32::new(0);
    fn tick(vector: u8, _: u64) {
        if vector == 0x56 {
            TICKS.fetch_add(1, Ordering::SeqCst);
        }
    }
    let region = memory::fresh_region();
    second::set_operand(page_of(region, 1));
    trap::on_interrupt(Some(tick));
    let verdict = ask(work::ACCEPT).and_then(|()| {
        start_timer(TIMER_PERIODIC | 0x56, 50_000)?;
        let accepted = accept_every_other(region);
        let mut looks = LOOKS;
        insn::open_interrupts_while(|| {
            looks -= 1;
            looks != 0 && TICKS.load(Ordering::SeqCst) < 3
        });
        expect("accepted here", accepted?, PAGES_EACH)?;
        await_answer()
    });
    let stopped = stop_timer();
    trap::on_interrupt(None);
    verdict.and(stopped)?;
    expect("accepted there", second::result(), PAGES_EACH)?;
    expect("three ticks", TICKS.load(Ordering::SeqCst) >= 3, true)
}

/// Shares accepted pages, one after the other, while the second processor runs on and never leaves by
/// itself.
fn share_beside(work: u32, pages: u64) -> Verdict {
    let region = memory::fresh_region();
    ask(work)?;
    for _ in 0..LOOKS {
        if second::result() == work::RUNNING {
            break;
        }
        hint::spin_loop();
    }
    expect("runs", second::result(), work::RUNNING)?;
    let shared = (0..pages).try_for_each(|index| {
        let page = page_of(region, index);
        expect_accept(page, PageSize::Size4K, 0)?;
        memory::write(private(page), 7)?;
        // On a busy computer the other may take its time.
        for _ in 0..20 {
            let (status, at) = map_gpa(SHARED | page.get(), PAGE_SIZE)?;
            if HostStatus(status) != HostStatus::RETRY {
                return expect("MapGPA", (status, at), (0, 0));
            }
        }
        Err(Finding::new(format_args!("the flush never ends")))
    });
    second::stop();
    let answered = await_answer();
    shared.and(answered)
}

fn flush_calls_out() -> Verdict {
    share_beside(work::SPIN, 8)
}

/// The other's interrupts of its own keep it from being entered, again and again, when it owes a flush:
/// the entry that succeeds has to carry that out.
fn flush_with_ticks() -> Verdict {
    let before = oracle::counter(Counter::STALE_TRANSLATION);
    share_beside(work::SPIN_TICKING, 256)?;
    let after = oracle::counter(Counter::STALE_TRANSLATION);
    expect("stale translations", after, before)
}

fn call_is_hidden() -> Verdict {
    recorded(|| {
        share_beside(work::SPIN_OPEN, 8)?;
        // Nothing was delivered to the guest.
        expect_order(0)
    })
}

fn spurious() -> Verdict {
    recorded(|| {
        let (_, id) = host_rdmsr(0x802)?;
        send(id << 32, NO_MESSAGE)?;
        await_request(NO_MESSAGE)?;
        insn::open_interrupts();
        expect_order(NO_MESSAGE.into())
    })
}
