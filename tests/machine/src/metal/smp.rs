//! The other CPUs: starting them, giving them something to run, getting their attention.
//!
//! Every CPU of QEMU is one vCPU of the guest. At boot all but the first are started once with
//! a real INIT and start-up IPI; from then on they are either inside a guest, inside the
//! machine, or parked (in a guest of one HLT, see [`Park`]). The only signal between CPUs is an
//! NMI: it is held off in the machine (GIF is 0) and ends any guest, parked ones included, so a
//! signal is never lost.
//!
//! Invariants:
//! * `in_guest` is set with the machine's lock held, before nested tables are chosen, and
//!   cleared after the exit: a CPU seen outside needs the lock before it can use any mapping;
//! * `exits` changes with every exit, so `in_guest` with the same `exits` is the same stay, with
//!   the translations it began to collect at its entry;
//! * a request to a CPU is carried out before the requester goes on, so a VMSA that was stopped
//!   or replaced is at rest when the guest hears so; only a requester that is itself asked for
//!   something gives way, and then its request waits at the other CPU;
//! * no request is lost: each waits in its CPU's queue until it is carried out.

#![expect(
    unsafe_code,
    reason = "the trampoline is copied to conventional memory"
)]

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::hint;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use machine::ghcb::{ApAction, ApKind};
use machine::stale::Stay;
use machine::types::{VcpuId, Vmpl};
use spin::{Mutex, Once};

use super::boot::{self, Page, TRAMPOLINE};
use super::console::log;
use super::cpu::Wait;
use super::cpu::{self, msr};
use super::permissions::Permissions;
use super::vcpu::Vcpu;
use super::{apic, descriptors, memory, shared};

/// Bytes of stack of a CPU.
const STACK: usize = 256 << 10;

/// What one CPU is asked to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// Run this level's VMSA.
    Start(Vmpl),
    /// Stop running this level.
    Stop(Vmpl),
    /// A start-up IPI arrived.
    Startup,
}

/// What the others know about a CPU.
#[derive(Default)]
struct Slot {
    /// Between VMRUN and the exit, or about to be.
    in_guest: AtomicBool,
    /// The level that runs there.
    vmpl: AtomicUsize,
    /// Exits so far: tells a CPU that has left from one that has entered again.
    exits: AtomicU64,
    /// An NMI of the machine is on its way or has arrived.
    kicked: AtomicBool,
    /// Parked, or held by a HLT with interrupts off: only another CPU can wake it.
    asleep: AtomicBool,
    /// Whether a request waits; looked at before the lock of `requests` is taken.
    pending: AtomicBool,
    /// What this CPU is asked to do, by any number of others, in the order they asked.
    requests: Mutex<VecDeque<Request>>,
    /// How many were carried out, which tells each asker when its own was. Changed with the
    /// lock of `requests` held.
    answered: AtomicU64,
}

static SLOTS: Once<Vec<Slot>> = Once::new();

fn slots() -> &'static [Slot] {
    SLOTS.get().map_or(&[], Vec::as_slice)
}

fn slot(id: VcpuId) -> &'static Slot {
    &slots()[id.index()]
}

/// Makes the table of CPUs, all of them asleep but the first.
pub fn init_table(vcpus: u32) {
    SLOTS.call_once(|| {
        (0..vcpus)
            .map(|n| Slot {
                asleep: AtomicBool::new(n != 0),
                ..Slot::default()
            })
            .collect()
    });
}

/// Starts all other CPUs, one after the other, and gives their trampoline's page back.
pub fn start_others(permissions: Permissions) {
    let vcpus = slots().len() as u32;
    if vcpus < 2 {
        return;
    }
    boot::with_identity_map(|| {
        let saved = boot::install_trampoline();
        for id in 1..vcpus {
            let stack: Box<[Page]> = (0..STACK / 4096).map(|_| Page::zeroed()).collect();
            let top = Box::leak(stack).as_ptr_range().end as u64;
            let start = Box::leak(Box::new(Start {
                id,
                permissions,
                ready: AtomicBool::new(false),
            }));
            boot::arm_trampoline(top, core::ptr::from_ref(start) as u64);
            send_ipi(id, DELIVERY_INIT | LEVEL_ASSERT, 0);
            send_ipi(id, DELIVERY_STARTUP, (TRAMPOLINE >> 12) as u8);
            while !start.ready.load(Ordering::Acquire) {
                hint::black_box(());
            }
        }
        boot::remove_trampoline(&saved);
    });
}

/// What a starting CPU is given.
struct Start {
    id: u32,
    permissions: Permissions,
    ready: AtomicBool,
}

/// Where the trampoline ends up, on the CPU's own stack.
pub extern "sysv64" fn other_start(start: u64) -> ! {
    // SAFETY: the address of the `Start` that `start_others` leaked for this CPU.
    let start = unsafe { &*(start as *const Start) };
    descriptors::load();
    apic::enable_x2apic();
    let id = VcpuId(start.id);
    let mut vcpu = Vcpu::new(id, start.permissions);
    start.ready.store(true, Ordering::Release);
    let first = vcpu.wait_for_start();
    vcpu.run(first)
}

const DELIVERY_NMI: u64 = 4 << 8;
const DELIVERY_INIT: u64 = 5 << 8;
const DELIVERY_STARTUP: u64 = 6 << 8;
const LEVEL_ASSERT: u64 = 1 << 14;

fn send_ipi(to: u32, command: u64, vector: u8) {
    cpu::wrmsr(
        msr::X2APIC_ICR,
        u64::from(to) << 32 | command | u64::from(vector),
    );
}

/// Gets the attention of a CPU. One that has an NMI of the machine before it gets no second: that
/// might arrive when the first has been answered, and be taken for the guest's own. It has yet to
/// exit for the first, and what this one is about was said before.
fn kick(id: usize) {
    if !slots()[id].kicked.swap(true, Ordering::SeqCst) {
        send_ipi(id as u32, DELIVERY_NMI, 0);
    }
}

/// Called with the machine's lock held, right before a CPU enters its guest.
pub fn enter_guest(id: VcpuId, vmpl: Vmpl) {
    let slot = slot(id);
    slot.vmpl.store(vmpl.index(), Ordering::SeqCst);
    slot.in_guest.store(true, Ordering::SeqCst);
}

/// Called right after an exit.
pub fn left_guest(id: VcpuId) {
    let slot = slot(id);
    slot.exits.fetch_add(1, Ordering::SeqCst);
    slot.in_guest.store(false, Ordering::SeqCst);
}

/// The CPUs other than `id` that are inside the guest, with the level each runs. With the
/// machine's lock held none can enter meanwhile, but any may leave.
pub fn inside(id: VcpuId) -> impl Iterator<Item = (Stay, usize)> {
    slots()
        .iter()
        .zip(0..)
        .filter(move |&(slot, n)| n != id.0 && slot.in_guest.load(Ordering::SeqCst))
        .map(|(slot, n)| {
            let stay = Stay {
                cpu: VcpuId(n),
                exits: slot.exits.load(Ordering::SeqCst),
                vmpl: Vmpl::ALL[slot.vmpl.load(Ordering::SeqCst)],
            };
            (stay, stay.vmpl.index())
        })
}

/// Whether a CPU has not left the guest since.
pub fn is_inside(stay: Stay) -> bool {
    let slot = slot(stay.cpu);
    slot.in_guest.load(Ordering::SeqCst) && slot.exits.load(Ordering::SeqCst) == stay.exits
}

/// Gets every other CPU that is inside the guest and `concerned` (by its number and level) out
/// of it once. With the machine's lock held none can enter again, so afterwards none of them
/// uses a mapping that was withdrawn before the call.
pub fn shoot_down(id: VcpuId, concerned: impl Fn(VcpuId, usize) -> bool) {
    let waiting: Vec<Stay> = inside(id)
        .filter(|&(stay, level)| concerned(stay.cpu, level))
        .map(|(stay, _)| stay)
        .collect();
    for stay in &waiting {
        kick(stay.cpu.index());
    }
    for stay in waiting {
        let mut wait = Wait::default();
        while is_inside(stay) {
            wait.turn();
        }
    }
}

/// Whether an NMI exit of this CPU was for the machine; the question is asked once per NMI, before
/// requests are looked for.
pub fn was_kicked(id: VcpuId) -> bool {
    slot(id).kicked.swap(false, Ordering::SeqCst)
}

/// Marks whether only another CPU can wake this one.
pub fn set_asleep(id: VcpuId, asleep: bool) {
    slot(id).asleep.store(asleep, Ordering::SeqCst);
}

/// Whether no other CPU is awake to wake this one.
pub fn is_alone_awake(id: VcpuId) -> bool {
    slots()
        .iter()
        .enumerate()
        .all(|(n, slot)| n == id.index() || slot.asleep.load(Ordering::SeqCst))
}

/// The first request to this CPU, if there is one. It stays in the queue until [`answer`].
pub fn request(id: VcpuId) -> Option<Request> {
    let slot = slot(id);
    if !slot.pending.load(Ordering::SeqCst) {
        return None;
    }
    slot.requests.lock().front().copied()
}

/// Says that the first request has been carried out.
pub fn answer(id: VcpuId) {
    let slot = slot(id);
    let mut requests = slot.requests.lock();
    if requests.pop_front().is_some() {
        slot.answered.fetch_add(1, Ordering::SeqCst);
    }
    let more = !requests.is_empty();
    slot.pending.store(more, Ordering::SeqCst);
}

/// Asks a CPU and waits until it has answered, or this CPU is asked something itself: two that
/// ask each other would wait for ever. Never with the machine's lock held.
fn ask(from: VcpuId, to: VcpuId, request: Request) {
    let Some(slot) = slots().get(to.index()).filter(|_| to != from) else {
        return;
    };
    let mine = {
        let mut requests = slot.requests.lock();
        requests.push_back(request);
        slot.pending.store(true, Ordering::SeqCst);
        slot.answered.load(Ordering::SeqCst) + requests.len() as u64
    };
    kick(to.index());
    let mut wait = Wait::default();
    let is_asked = || self::slot(from).pending.load(Ordering::SeqCst);
    while slot.answered.load(Ordering::SeqCst) < mine && !is_asked() {
        wait.turn();
    }
}

/// Carries out AP creation or destruction.
pub fn start_or_stop(from: VcpuId, action: ApAction) {
    let request = match action.kind {
        ApKind::Start => Request::Start(action.vmpl),
        ApKind::Stop => Request::Stop(action.vmpl),
    };
    ask(from, action.target, request);
}

/// Lets every CPU but the first run its first level.
pub fn release_others() {
    for id in 1..slots().len() as u32 {
        ask(VcpuId(0), VcpuId(id), Request::Start(Vmpl::VMPL0));
    }
}

/// Calls `act` for each vCPU an x2APIC interrupt command addresses.
pub fn for_each_target(from: VcpuId, icr: u64, act: fn(VcpuId, VcpuId)) {
    /// Destination shorthand: 2 is all, 3 is all but the sender.
    const ALL: u64 = 2;
    let shorthand = icr >> 18 & 3;
    let destination = (icr >> 32) as u32;
    for n in 0..slots().len() as u32 {
        let addressed = match shorthand {
            0 => destination == n || destination == u32::MAX,
            shorthand => shorthand >= ALL,
        };
        if addressed && n != from.0 {
            act(from, VcpuId(n));
        }
    }
}

/// INIT for one vCPU. An SNP guest's vCPU cannot be reset by the host; firmware sends INIT out
/// of habit before the start-up IPI, which is what counts.
pub fn init(_from: VcpuId, to: VcpuId) {
    log!("INIT for vCPU {} is not emulated", to.0);
}

/// Start-up IPI for one vCPU.
pub fn startup(from: VcpuId, to: VcpuId) {
    ask(from, to, Request::Startup);
}

/// Releases what a start-up IPI releases: the context of this vCPU that waits for it.
pub fn released_by_startup(id: VcpuId) -> Option<Vmpl> {
    let mut machine = shared::lock(0);
    Vmpl::ALL
        .into_iter()
        .find(|&vmpl| machine.platform.release_hold(id, vmpl, true))
}

/// The parked guest: real mode, one page with a HLT and a jump back to it.
///
/// A CPU waits for an NMI inside it, because in the machine itself GIF is 0 and a HLT would
/// sleep through every signal. Its nested tables map that page alone.
pub struct Park {
    /// Root of its nested page tables.
    pub root: u64,
}

impl Park {
    /// Builds the page and its tables.
    pub fn new() -> Self {
        /// HLT; JMP back.
        const CODE: [u8; 3] = [0xF4, 0xEB, 0xFD];
        const TABLE: u64 = 0x27;
        let pages: [memory::OwnPages; 5] = core::array::from_fn(|_| memory::OwnPages::new(1));
        for pair in pages.windows(2) {
            // SAFETY: pages just allocated; each table's first entry leads to the next page.
            unsafe { pair[0].pointer::<u64>().write(pair[1].physical() | TABLE) };
        }
        // SAFETY: the last page, just allocated.
        unsafe { pages[4].pointer::<[u8; 3]>().write(CODE) };
        Park {
            root: pages[0].physical(),
        }
    }
}
