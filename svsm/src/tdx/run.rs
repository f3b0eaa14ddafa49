//! Running the guest on one processor: the L2 VM's fields, and the loop of entries and exits.
#![expect(unsafe_code, reason = "the page that module and loop share, and CR2")]

use core::arch::asm;

use accept::Engine;
use protocols::addr::{Gpa, PAGE_SIZE};
use protocols::launch::{AcceptPolicy, Touch};
use protocols::tdx::l2::EnterState;
use protocols::tdx::metadata::{FieldId, L2Controls};
use protocols::tdx::vmcall::SubFunction;
use protocols::tdx::vmcall::register::{R8, RBX, RCX, RDX, RSI};
use protocols::tdx::vmcs::{
    EntryControls, Field, Interruptibility, PrimaryControls, SecondaryControls, msr_bitmaps,
};
use protocols::tdx::{Leaf, MAPPING_PENDING, Status};
use protocols::terminate::TurnstileReason;
use spin::Once;

use super::apic::{self, Ipi};
use super::entry::LOOKS_AT_OTHERS;
use super::l2::interrupts::VirtualApic;
use super::l2::vp::{Injection, Vp};
use super::l2::{
    Domain, GuestTd, HostRegisters, MEASUREMENT, Mapping, Next, REPORT, REPORT_DATA, Service,
    Unreachable, msr,
};
use super::runners::{Others, Runner};
use crate::ahead::{Ahead, HostLied};
use crate::exceptions::interrupts;
use crate::hypervisor::tdx;
use crate::memory::{access, guest_map};
use crate::platform::tdx::module::{self, Module};
use crate::platform::tdx::{GUEST, Operands, Tdcall, TdxBackend};
use crate::terminate::terminate;

/// The engine on the guest's memory.
pub type GuestEngine = Engine<'static, TdxBackend<Module, Others<'static, Ipi>>>;

/// What all processors share.
pub struct System {
    /// Owner of the map.
    pub engine: GuestEngine,
    /// What is accepted before the guest asks.
    pub ahead: Ahead,
    /// What the guest has set.
    pub td: GuestTd,
    /// The policy for memory that is not accepted.
    pub touch: Touch,
    /// The processors.
    pub runners: &'static [Runner],
    /// Their pages, in the same order.
    pub pages: &'static [VcpuPages],
    /// Where the firmware finds its hand-off blocks.
    pub hob: Gpa,
}

static SYSTEM: Once<System> = Once::new();

/// Makes the parts known to all processors. Only the first call counts.
pub fn publish(system: System) -> &'static System {
    SYSTEM.call_once(|| system)
}

/// The parts, once they are published.
pub fn get() -> Option<&'static System> {
    SYSTEM.get()
}

/// Memory of ours that the module works on for one processor.
#[derive(Clone, Copy)]
pub struct VcpuPages {
    /// Guest-physical address of a page laid out as [`Shared`].
    pub shared: Gpa,
    /// Where that is mapped.
    pub address: u64,
    /// The virtual APIC.
    pub apic: &'static VirtualApic,
    /// Guest-physical address of its page.
    pub virtual_apic: Gpa,
}

/// The page that loop and module work on in turn.
#[repr(C, align(4096))]
struct Shared {
    state: EnterState,
    pad: [u8; REPORT - size_of::<EnterState>()],
    report: [u8; REPORT],
    report_data: [u8; REPORT_DATA],
    measurement: [u8; REPORT_DATA],
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<Shared>() == PAGE_SIZE as usize);
    // What the leaves want of alignment.
    assert!((offset_of!(Shared, state) as u64).is_multiple_of(EnterState::ALIGNMENT));
    assert!(offset_of!(Shared, report).is_multiple_of(REPORT));
    assert!(offset_of!(Shared, report_data).is_multiple_of(64));
    assert!(offset_of!(Shared, measurement).is_multiple_of(64));
};

/// The trust domain, as this processor has it.
struct Below {
    pages: VcpuPages,
}

impl Below {
    fn shared(&self) -> *mut Shared {
        self.pages.address as *mut Shared
    }

    fn gpa_of(&self, offset: usize) -> u64 {
        self.pages.shared.get() + offset as u64
    }
}

impl Domain for Below {
    fn shared_bit(&self) -> u64 {
        tdx::shared_bit()
    }

    fn info(&self) -> [u64; 5] {
        let outcome = Module.tdcall(Leaf::VP_INFO, Operands::default());
        [
            outcome.rcx,
            outcome.rdx,
            outcome.r8,
            outcome.r9,
            outcome.r10,
        ]
    }

    fn cpuid(&self, leaf: u32, subleaf: u32) -> Option<[u32; 4]> {
        /// CPUID(1).ECX: the processor's copy of CR4.OSXSAVE, which is L1's here. The guest has no
        /// extended state to switch on.
        const OSXSAVE: u32 = 1 << 27;
        let [eax, ebx, ecx, edx] = module::cpuid(leaf, subleaf)?;
        let ecx = if leaf == 1 { ecx & !OSXSAVE } else { ecx };
        Some([eax, ebx, ecx, edx])
    }

    fn read_vm(&self, field: FieldId) -> Result<u64, Status> {
        module::read_vm(field)
    }

    fn read_sys(&self, field: FieldId) -> Result<u64, Status> {
        module::read_sys(field)
    }

    fn mapping(&self, page: Gpa) -> Result<Mapping, Status> {
        let operands = Operands {
            rcx: page.get(),
            ..Operands::default()
        };
        let outcome = Module.tdcall(Leaf::MEM_PAGE_ATTR_RD, operands);
        match Status::of(outcome.rax) {
            Status::SUCCESS => Ok(Mapping {
                level: outcome.rcx as u32 & 7,
                pending: outcome.rcx & MAPPING_PENDING != 0,
            }),
            status => Err(status),
        }
    }

    fn report(&self, data: &[u8; REPORT_DATA]) -> Result<[u8; REPORT], Status> {
        // SAFETY: the page is this processor's, and the module has it only during the leaf.
        unsafe { (&raw mut (*self.shared()).report_data).write(*data) };
        let operands = Operands {
            rcx: self.gpa_of(core::mem::offset_of!(Shared, report)),
            rdx: self.gpa_of(core::mem::offset_of!(Shared, report_data)),
            ..Operands::default()
        };
        match Status::of(Module.tdcall(Leaf::MR_REPORT, operands).rax) {
            // SAFETY: as above; any bytes are a report.
            Status::SUCCESS => Ok(unsafe { (&raw const (*self.shared()).report).read() }),
            status => Err(status),
        }
    }

    fn extend(&self, register: u64, value: &[u8; MEASUREMENT]) -> Status {
        let to = core::mem::offset_of!(Shared, measurement);
        // SAFETY: as in `report`; the value is shorter than the place.
        unsafe {
            (&raw mut (*self.shared()).measurement)
                .cast::<[u8; MEASUREMENT]>()
                .write(*value);
        }
        let operands = Operands {
            rcx: self.gpa_of(to),
            rdx: register,
            ..Operands::default()
        };
        Status::of(Module.tdcall(Leaf::MR_RTMR_EXTEND, operands).rax)
    }

    fn ask_host(&self, registers: HostRegisters) -> Result<HostRegisters, Status> {
        module::vmcall(registers)
    }

    fn report_fatal_error(&self, operands: [u64; 2], text: [u64; 8]) {
        module::report_fatal_error(operands, text);
    }

    fn read(&self, gpa: Gpa, bytes: &mut [u8]) -> Result<(), Unreachable> {
        guest_map::address(gpa, bytes.len() as u64)
            .and_then(|address| access::copy_in(address, bytes))
            .map_err(|_| Unreachable)
    }

    fn write(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), Unreachable> {
        guest_map::write(gpa, bytes).map_err(|_| Unreachable)
    }
}

/// Runs the guest on processor `index` and answers it, for ever.
pub fn run(system: &'static System, index: usize) -> ! {
    let (Some(runner), Some(pages)) = (system.runners.get(index), system.pages.get(index)) else {
        terminate(TurnstileReason::INTERNAL)
    };
    let service = Service {
        engine: &system.engine,
        ahead: &system.ahead,
        domain: Below { pages: *pages },
        td: &system.td,
        touch: system.touch,
    };
    if set_fields(pages).is_err() {
        terminate(TurnstileReason::TD_FIELD);
    }
    match apic::switch_on() {
        Ok(id) => runner.set_apic_id(id),
        Err(reason) => terminate(reason),
    }
    accept_before_the_start(system);
    let state = first_state(index as u32, system.hob);
    let mut vp = Vp::new(index as u32, state, pages.apic, apic::SPURIOUS);
    loop {
        runner.set_spurious(vp.spurious);
        if prepare_entry(&mut vp).is_err() {
            terminate(TurnstileReason::TD_FIELD);
        }
        let flush = runner.enter();
        let state = service.domain.shared().cast::<EnterState>();
        // SAFETY: the structure is the first in the page, which is this processor's; the module reads
        // and writes it during the call and at no other time.
        let exit = unsafe {
            state.write(vp.state);
            let exit = module::enter(GUEST, flush, pages.shared);
            vp.state = state.read();
            exit
        };
        // Without an entry nothing was delivered, and nothing flushed.
        if exit.status == Status::PENDING_INTERRUPT {
            runner.not_entered(flush);
        } else {
            vp.injection = None;
            vp.stepped = false;
        }
        runner.leave();
        if matches!(
            exit.status,
            Status::PENDING_INTERRUPT | Status::L2_EXIT_PENDING_INTERRUPT
        ) {
            take_interrupts(&mut vp, runner);
        }
        match service.handle(&mut vp, &exit) {
            Next::Resume => {}
            Next::Wait { blocked } => wait(system, &mut vp, runner, blocked),
            Next::End(reason) => terminate(reason),
        }
    }
}

/// Makes the interrupts that wait for this processor the guest's, but for those by which another
/// processor calls it out.
fn take_interrupts(vp: &mut Vp, runner: &Runner) {
    for vector in interrupts::take().iter() {
        if !runner.is_call(vector) {
            // Only exceptions are refused, and no vector of theirs is among those that are taken.
            let _ = vp.post(vector);
        }
    }
}

/// Under the policy eager, accepts memory with all other processors until there is none left.
fn accept_before_the_start(system: &System) {
    if system.ahead.acceptance().policy != AcceptPolicy::EAGER {
        return;
    }
    match system.ahead.steps_until_wanted(&system.engine, || false) {
        Ok(_) => {}
        Err(HostLied) => terminate(TurnstileReason::ALREADY_VALID),
    }
    // The last steps of the others. A processor that the host has stopped is not waited for: it holds
    // the lock of its region, so nobody gets at that before it is done.
    for _ in 0..LOOKS_AT_OTHERS {
        if system.ahead.is_idle() {
            break;
        }
        core::hint::spin_loop();
    }
}

/// The guest waits for an interrupt; unless it is `blocked`, one that it has already or that came first
/// is one. Meanwhile memory is accepted ahead of it, if that is the policy, one step from one look at
/// the interrupts to the next. With nothing left to accept, the host ends the wait for an interrupt of
/// L1's even if that came before the request, and it may end it for nothing, as in any trust domain.
fn wait(system: &System, vp: &mut Vp, runner: &Runner, blocked: bool) {
    let is_wanted = || {
        take_interrupts(vp, runner);
        !blocked && vp.is_interrupted()
    };
    match system.ahead.steps_until_wanted(&system.engine, is_wanted) {
        Ok(true) => return,
        Ok(false) => {}
        Err(HostLied) => terminate(TurnstileReason::ALREADY_VALID),
    }
    let request = [0, SubFunction::HLT.0, blocked.into(), 0, 0, 0];
    if module::vmcall(request).is_err() {
        terminate(TurnstileReason::TD_VMCALL);
    }
    take_interrupts(vp, runner);
}

/// What the VM goes on with: an event, and no shadow of an instruction that is behind it.
fn prepare_entry(vp: &mut Vp) -> Result<(), Status> {
    if let Some(Injection {
        information,
        error,
        length,
        address,
    }) = vp.injection
    {
        if let Some(address) = address {
            // SAFETY: L1 reads CR2 in its handler of page faults only, and one that it gets sets it anew.
            unsafe {
                asm!("mov cr2, {}", in(reg) address, options(nomem, nostack, preserves_flags))
            };
        }
        set(Field::ENTRY_ERROR_CODE, error.into())?;
        if length != 0 {
            set(Field::ENTRY_INSTRUCTION_LENGTH, length.into())?;
        }
        set(Field::ENTRY_INTERRUPTION, information.into())?;
    }
    // The module keeps the shadow of STI and MOV SS as it was at the exit. It matters to an interrupt.
    if vp.stepped && vp.is_interrupted() {
        let shadows = u64::from((Interruptibility::STI | Interruptibility::MOV_SS).bits());
        module::write_vp(Field::INTERRUPTIBILITY.id(GUEST), 0, shadows)?;
    }
    Ok(())
}

fn set(field: Field, value: u64) -> Result<(), Status> {
    module::write_vp(field.id(GUEST), value, u64::MAX)
}

/// The registers that a processor of a trust domain starts with (facts: tdx §8). RCX and R8 are the
/// host's to choose; here they say where the hand-off blocks are.
fn first_state(index: u32, hob: Gpa) -> EnterState {
    let mut state = EnterState {
        rip: 0xFFFF_FFF0,
        rflags: 2,
        ..EnterState::default()
    };
    let signature = module::cpuid(1, 0).map_or(0, |[eax, ..]| eax);
    for (register, value) in [
        (RBX, 48),
        (RCX, hob.get()),
        (R8, hob.get()),
        (RDX, signature.into()),
        (RSI, index.into()),
    ] {
        state.gprs[register] = value;
    }
    state
}

/// Bits of CR0 that stay ours: PE, NE, NW, CD.
const CR0_OURS: u64 = 1 << 0 | 1 << 5 | 1 << 29 | 1 << 30;
/// Bits of CR4 that stay ours: VMXE, SMXE.
const CR4_OURS: u64 = 1 << 13 | 1 << 14;

/// What does not come from [`first_state`]: the other registers of a trust domain's first state, and
/// what exits.
const FIELDS: &[(Field, u64)] = &[
    (Field::CR0, 0x21),
    (Field::CR3, 0),
    (Field::CR4, 0x2040),
    (Field::CR0_MASK, CR0_OURS),
    (Field::CR0_SHADOW, 0x21),
    (Field::CR4_MASK, CR4_OURS),
    (Field::CR4_SHADOW, 0),
    (Field::EFER, 0x901),
    (Field::PAT, 0x0007_0406_0007_0406),
    (Field::DR7, 0x400),
    (Field::DEBUGCTL, 0),
    (Field::SYSENTER_CS, 0),
    (Field::SYSENTER_ESP, 0),
    (Field::SYSENTER_EIP, 0),
    (Field::EXCEPTION_BITMAP, 0),
    (Field::INTERRUPTIBILITY, 0),
    (Field::ACTIVITY, 0),
    (Field::TPR_THRESHOLD, 0),
    (Field::ENTRY_INTERRUPTION, 0),
];

/// Access rights of code, data, LDTR and TR.
const RIGHTS: [u64; 8] = [
    0xC093, 0xC09B, 0xC093, 0xC093, 0xC093, 0xC093, 0x1_0082, 0x8B,
];
/// Limits of the segments, GDTR and IDTR, in the VMCS's order.
const LIMITS: [u64; 10] = [
    0xFFFF_FFFF,
    0xFFFF_FFFF,
    0xFFFF_FFFF,
    0xFFFF_FFFF,
    0xFFFF_FFFF,
    0xFFFF_FFFF,
    0,
    0xFFFF,
    0xFFFF,
    0,
];

/// Sets the fields of the guest's VM on this processor.
fn set_fields(pages: &VcpuPages) -> Result<(), Status> {
    for &(field, value) in FIELDS {
        set(field, value)?;
    }
    // Rows of like fields, two apart.
    let row = |first: Field, values: &[u64]| {
        (first.0..)
            .step_by(2)
            .zip(values)
            .try_for_each(|(field, &value)| set(Field(field), value))
    };
    row(Field::ES_SELECTOR, &[0; 8])?;
    row(Field::ES_RIGHTS, &RIGHTS)?;
    row(Field::ES_LIMIT, &LIMITS)?;
    row(Field::ES_BASE, &[0; 10])?;
    row(Field::EOI_EXIT_0, &[0; 4])?;

    let add = |field: Field, bits: u32| module::write_vp(field.id(GUEST), bits.into(), bits.into());
    let primary = PrimaryControls::HLT
        | PrimaryControls::MWAIT
        | PrimaryControls::RDPMC
        | PrimaryControls::TPR_SHADOW
        | PrimaryControls::IO
        | PrimaryControls::MSR_BITMAPS
        | PrimaryControls::MONITOR
        | PrimaryControls::SECONDARY;
    add(Field::PRIMARY_CONTROLS, primary.bits())?;
    let secondary = SecondaryControls::EPT
        | SecondaryControls::VIRTUALIZE_X2APIC
        | SecondaryControls::VPID
        | SecondaryControls::WBINVD
        | SecondaryControls::UNRESTRICTED
        | SecondaryControls::APIC_REGISTERS
        | SecondaryControls::VIRTUAL_INTERRUPTS;
    add(Field::SECONDARY_CONTROLS, secondary.bits())?;
    let entry = EntryControls::LOAD_PAT | EntryControls::LOAD_EFER;
    set(Field::ENTRY_CONTROLS, entry.bits().into())?;
    set(Field::VIRTUAL_APIC, pages.virtual_apic.get())?;

    for (ranges, write) in [
        (msr::NATIVE.as_slice(), false),
        (msr::NATIVE.as_slice(), true),
        (msr::NATIVE_READ.as_slice(), false),
    ] {
        for number in ranges.iter().flat_map(|&(first, last)| first..=last) {
            if let Some((word, bit)) = msr_bitmaps::place(number, write) {
                module::write_vp(msr_bitmaps::id(GUEST, word), 0, 1 << bit)?;
            }
        }
    }
    let controls = L2Controls::ENABLE_SHARED_EPTP.bits();
    module::write_vp(FieldId::l2_ctls(GUEST), controls, controls)
}
