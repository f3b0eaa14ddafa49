//! One CPU: its VMCB, the world it runs, and the loop around VMRUN.
//!
//! A vCPU of the guest is a CPU of QEMU. It runs one VMPL at a time; which one is decided by
//! the guest's own requests. Between two exits the state lives in the VMCB, in `registers` and
//! in the CPU; at a world switch it moves to and from the VMSA ([`world`]).
//!
//! Invariants:
//! * the nested tables are chosen at every entry from the level and the paging mode, so a guest
//!   that changes its mode runs on the other view's mappings at most until its next exit;
//! * an event that an exit interrupted is injected again unless the exit itself delivered one.

#![expect(unsafe_code, reason = "the VMCB is shared with the CPU; VMRUN")]

use alloc::format;

use machine::guest::decode::MAX_LENGTH;
use machine::guest::deliver::{DeliveryError, Frame, VECTOR_VC};
use machine::guest::operand;
use machine::guest::walk::{Access, Paging};
use machine::platform::End;
use machine::settings::{Hostile, Reflection};
use machine::types::{Gpa, Kind, PageSize, Spa, VcpuId, Vmpl};
use protocols::exit_code::ExitCode;
use protocols::vmsa::{Efer, Segment, SegmentAttributes, Vmsa};

use super::console::log;
use super::guest_memory::{View, fetch};
use super::memory::OwnPages;
use super::npt::Mode;
use super::permissions::Permissions;
use super::smp::{Park, Request};
use super::svm::{self, Registers, Save, Vmcb, intercept, seg};
use super::world::{self, Reason};
use super::{cpu, exit, finish, shared, smp};

/// What an exit asks the run loop to do.
pub enum Flow {
    /// Enter the same world again.
    Resume,
    /// Leave the world for this reason and enter another.
    Run(Vmpl, Reason),
    /// Leave the world and wait until this CPU is told to go on.
    Hold(Reason),
    /// The run is over.
    End(End),
}

/// Fields of EVENTINJ and EXITINTINFO (APM 15.20).
mod event {
    pub const TYPE_INTERRUPT: u64 = 0;
    pub const TYPE_NMI: u64 = 2;
    pub const TYPE_EXCEPTION: u64 = 3;
    pub const TYPE_SHIFT: u32 = 8;
    pub const ERROR_VALID: u64 = 1 << 11;
    pub const VALID: u64 = 1 << 31;
}

const VECTOR_NMI: u64 = 2;
const VECTOR_UD: u64 = 6;
const VECTOR_DF: u64 = 8;
const VECTOR_GP: u64 = 13;
const VECTOR_PF: u64 = 14;

/// Bits of MISC registers the loop looks at.
const RFLAGS_RF: u64 = 1 << 16;
/// IF of RFLAGS.
pub const RFLAGS_IF: u64 = 1 << 9;
const CR0_PG: u64 = 1 << 31;
const EFER_LMA: u64 = 1 << 10;

/// How often a hostile host enters VMPL0 early, in exits of the guest.
const EARLY_RETURN_EVERY: u64 = 256;

/// One CPU.
pub struct Vcpu {
    /// Its number, which is its APIC id.
    pub id: VcpuId,
    /// The level that runs, or ran last.
    pub vmpl: Vmpl,
    /// Whether that level gets #VC for what hardware reflects.
    pub strict: bool,
    /// General registers.
    pub registers: Registers,
    /// Where the running VMSA is.
    vmsa: Spa,
    vmcb: OwnPages,
    park: Park,
    permissions: Permissions,
    reflection: Reflection,
    trace: bool,
    /// `hostile=early-return`.
    hostile: bool,
    /// Times a lower level was resumed, counted for a hostile host only.
    resumes: u64,
}

impl Vcpu {
    /// A CPU that has not run anything. Turns SVM on for the CPU this is called on.
    pub fn new(id: VcpuId, permissions: Permissions) -> Self {
        let host_save = OwnPages::new(1);
        svm::enable(&host_save);
        let guard = shared::lock(0);
        let settings = guard.platform.settings();
        Vcpu {
            id,
            vmpl: Vmpl::VMPL0,
            strict: true,
            registers: Registers::default(),
            vmsa: Spa::new(0),
            vmcb: OwnPages::new(1),
            park: Park::new(),
            permissions,
            reflection: settings.reflection,
            trace: settings.trace,
            hostile: settings.is_hostile(Hostile::EarlyReturn),
            resumes: 0,
        }
    }

    /// The VMCB.
    pub fn vmcb(&self) -> &Vmcb {
        // SAFETY: the page is this CPU's own, and the CPU writes it only inside VMRUN and
        // VMSAVE, when no reference is held.
        unsafe { &*self.vmcb.pointer() }
    }

    /// The VMCB, to change.
    pub fn vmcb_mut(&mut self) -> &mut Vmcb {
        // SAFETY: as in `vmcb`; `&mut self` makes it the only reference.
        unsafe { &mut *self.vmcb.pointer() }
    }

    /// The guest's state in the VMCB.
    pub fn save(&self) -> &Save {
        &self.vmcb().save
    }

    /// The guest's state in the VMCB, to change.
    pub fn save_mut(&mut self) -> &mut Save {
        &mut self.vmcb_mut().save
    }

    /// RIP, as refusals show it.
    pub fn rip(&self) -> u64 {
        self.save().rip
    }

    /// Privilege level inside the guest.
    pub fn cpl(&self) -> u8 {
        self.save().segments[seg::SS].attributes.dpl()
    }

    /// The registers that decide how an address is translated.
    pub fn paging(&self) -> Paging {
        let save = self.save();
        Paging {
            cr0: save.cr0,
            cr3: save.cr3,
            cr4: save.cr4,
            efer: save.efer,
        }
    }

    /// Whether the guest runs 64-bit code.
    pub fn is_64_bit(&self) -> bool {
        let save = self.save();
        save.efer & EFER_LMA != 0 && save.segments[seg::CS].attributes.is_long()
    }

    /// The view that fits the guest's paging mode.
    pub fn mode(&self) -> Mode {
        let save = self.save();
        if save.efer & EFER_LMA != 0 && save.cr0 & CR0_PG != 0 {
            Mode::Long
        } else {
            Mode::Flat
        }
    }

    /// Writes a trace line if the run is traced.
    pub fn trace(&self, text: core::fmt::Arguments<'_>) {
        if self.trace {
            log!(
                "trace vcpu{} {} rip={:#x} {text}",
                self.id.0,
                self.vmpl,
                self.rip()
            );
        }
    }

    /// Runs the guest on this CPU, starting with one level, until the run ends.
    pub fn run(&mut self, first: Vmpl) -> ! {
        let mut next = first;
        loop {
            self.enter_world(next);
            let flow = loop {
                if let Some(flow) = self.serve_request() {
                    break flow;
                }
                match self.step() {
                    Flow::Resume => {
                        if let Some(flow) = self.early_return() {
                            break flow;
                        }
                    }
                    flow => break flow,
                }
            };
            next = match flow {
                Flow::Resume => next,
                Flow::Run(vmpl, why) => {
                    self.leave_world(&why);
                    vmpl
                }
                Flow::Hold(why) => {
                    self.leave_world(&why);
                    self.wait_for_start()
                }
                Flow::End(end) => finish::end(end, self.rip()),
            };
        }
    }

    /// A hostile host enters VMPL0 now and then although the guest asked for nothing.
    fn early_return(&mut self) -> Option<Flow> {
        let control = &self.vmcb().control;
        let at_rest = control.event_inj == 0 && control.int_state & 1 == 0;
        if !self.hostile || self.vmpl == Vmpl::VMPL0 || !at_rest {
            return None;
        }
        self.resumes += 1;
        let intr = Reason {
            code: ExitCode::INTR.0,
            info_1: 0,
            info_2: 0,
        };
        self.resumes
            .is_multiple_of(EARLY_RETURN_EVERY)
            .then_some(Flow::Run(Vmpl::VMPL0, intr))
    }

    /// Does what another CPU asked for, if it changes what this one runs.
    ///
    /// A level that is more privileged than the one to be started is not interrupted: it finds
    /// the new VMSA when it asks for that level.
    fn serve_request(&mut self) -> Option<Flow> {
        let nothing = Reason {
            code: ExitCode::NMI.0,
            info_1: 0,
            info_2: 0,
        };
        match smp::request(self.id)? {
            Request::Start(vmpl) if !self.vmpl.is_more_privileged_than(vmpl) => {
                // The answer follows when the old world has been left.
                Some(Flow::Run(vmpl, nothing))
            }
            Request::Stop(vmpl) if vmpl == self.vmpl => Some(Flow::Hold(nothing)),
            Request::Start(_) | Request::Stop(_) | Request::Startup => {
                smp::answer(self.id);
                None
            }
        }
    }

    /// Waits, parked, until another CPU gives this one something to run.
    pub fn wait_for_start(&mut self) -> Vmpl {
        if smp::request(self.id).is_some_and(|request| matches!(request, Request::Stop(_))) {
            smp::answer(self.id);
        }
        smp::set_asleep(self.id, true);
        self.init_park();
        let next = loop {
            let started = match smp::request(self.id) {
                Some(Request::Start(vmpl)) => Some(vmpl),
                Some(Request::Startup) => smp::released_by_startup(self.id),
                Some(Request::Stop(_)) | None => None,
            };
            if let Some(vmpl) = started {
                break vmpl;
            }
            if smp::request(self.id).is_some() {
                smp::answer(self.id);
            }
            let at = self.vmcb.physical();
            // SAFETY: (1) the parked guest's nested tables map one page of its own code; (2) and
            // (3) as in `step`.
            unsafe { svm::vmrun(at, &mut self.registers) };
            svm::take_nmi();
            smp::was_kicked(self.id);
        };
        smp::set_asleep(self.id, false);
        next
    }

    /// The state of a CPU that waits for an NMI in real mode.
    fn init_park(&mut self) {
        let root = self.park.root;
        let data = Segment {
            selector: 0,
            attributes: SegmentAttributes::DATA16,
            limit: 0xFFFF,
            base: 0,
        };
        let vmcb = self.vmcb_mut();
        vmcb.control.intercept_misc1 = intercept::NMI | intercept::INIT | intercept::SHUTDOWN;
        vmcb.control.intercept_misc2 = intercept::SVM;
        vmcb.control.asid = 1;
        vmcb.control.np_enable = 1;
        vmcb.control.n_cr3 = root;
        vmcb.control.int_ctl = 0;
        vmcb.control.int_state = 0;
        vmcb.control.event_inj = 0;
        let save = &mut vmcb.save;
        save.segments = [data; 10];
        save.segments[seg::CS].attributes = SegmentAttributes::CODE16;
        save.cr0 = Vmsa::CR0_RESET;
        save.cr3 = 0;
        save.cr4 = 0;
        save.efer = Efer::SVME.0;
        save.rflags = 2;
        save.rip = 0;
        save.rsp = 0;
    }

    fn enter_world(&mut self, vmpl: Vmpl) {
        let entered = shared::lock(0).platform.enter(self.id, vmpl);
        let spa = match entered {
            Ok(spa) => spa,
            Err(error) => {
                let why = format!("vCPU {} cannot run {vmpl}: {error:?}", self.id.0);
                finish::end(End::Refused(why), self.rip())
            }
        };
        let vmsa = world::read(spa);
        self.vmpl = vmpl;
        self.vmsa = spa;
        self.strict = vmpl == Vmpl::VMPL0 || self.reflection == Reflection::Strict;
        // A request to start this level, or to replace its VMSA, has now been carried out.
        if smp::request(self.id) == Some(Request::Start(vmpl)) {
            smp::answer(self.id);
        }
        self.init_control();
        let at = self.vmcb.physical();
        let mut registers = Registers::default();
        world::enter(&vmsa, self.vmcb_mut(), at, &mut registers);
        self.registers = registers;
        self.trace(format_args!("enter"));
    }

    fn leave_world(&mut self, why: &Reason) {
        world::leave(
            self.vmsa,
            self.vmcb(),
            self.vmcb.physical(),
            &self.registers,
            why,
        );
        shared::lock(self.rip()).platform.leave(self.id);
    }

    fn init_control(&mut self) {
        let strict = self.strict;
        let iopm = self.permissions.ports(strict);
        let msrpm = self.permissions.msrs(strict);
        let control = &mut self.vmcb_mut().control;
        control.intercept_exceptions = intercept::EXCEPTION_UD;
        control.intercept_misc1 = intercept::NMI
            | intercept::INIT
            | intercept::CPUID
            | intercept::HLT
            | intercept::INVLPGA
            | intercept::IOIO
            | intercept::MSR
            | intercept::SHUTDOWN;
        control.intercept_misc2 = intercept::SVM | intercept::XSETBV;
        if strict {
            control.intercept_misc1 |= intercept::INVD;
            control.intercept_misc2 |= intercept::WBINVD | intercept::MONITOR_MWAIT;
        }
        control.iopm_base = iopm;
        control.msrpm_base = msrpm;
        control.asid = 1;
        control.int_ctl = 0;
        control.int_state = 0;
        control.np_enable = 1;
        control.event_inj = 0;
    }

    /// One VMRUN and what its exit asks for.
    fn step(&mut self) -> Flow {
        let mode = self.mode();
        let root = {
            let mut machine = shared::lock(self.rip());
            machine.reserve_tables();
            smp::enter_guest(self.id);
            machine.tables.root(self.vmpl, mode)
        };
        self.vmcb_mut().control.n_cr3 = root;
        cpu::match_cr4(self.save().cr4);
        world::mark_running(self.vmsa, self.id);
        let at = self.vmcb.physical();
        // SAFETY: (1) the nested tables hold only what the platform granted, never the reserved
        // range; (2) `init_control` intercepts the SVM instructions; (3) `new` enabled SVM.
        unsafe { svm::vmrun(at, &mut self.registers) };
        smp::left_guest(self.id);
        self.keep_interrupted_event();
        exit::handle(self)
    }

    /// Injects again what the exit interrupted. Handlers that deliver an event of their own
    /// replace it.
    fn keep_interrupted_event(&mut self) {
        let control = &mut self.vmcb_mut().control;
        let info = control.exit_int_info;
        control.event_inj = 0;
        if info & event::VALID == 0 {
            return;
        }
        let vector = info & 0xFF;
        let kind = info >> event::TYPE_SHIFT & 7;
        // TCG reports pass-through interrupts as exceptions (facts: tcg-svm.md §6).
        let kind = match kind {
            event::TYPE_EXCEPTION if vector >= 32 => event::TYPE_INTERRUPT,
            event::TYPE_EXCEPTION if vector == VECTOR_NMI => event::TYPE_NMI,
            other => other,
        };
        let error = if info & event::ERROR_VALID != 0 {
            event::ERROR_VALID | info >> 32 << 32
        } else {
            0
        };
        control.event_inj = event::VALID | kind << event::TYPE_SHIFT | vector | error;
    }

    fn inject_exception(&mut self, vector: u64, error: Option<u32>) {
        let error = error.map_or(0, |code| event::ERROR_VALID | u64::from(code) << 32);
        self.vmcb_mut().control.event_inj =
            event::VALID | event::TYPE_EXCEPTION << event::TYPE_SHIFT | vector | error;
    }

    /// Injects #UD.
    pub fn undefined_opcode(&mut self) -> Flow {
        self.inject_exception(VECTOR_UD, None);
        Flow::Resume
    }

    /// Injects #GP(0).
    pub fn general_protection(&mut self) -> Flow {
        self.inject_exception(VECTOR_GP, Some(0));
        Flow::Resume
    }

    /// Injects #PF.
    pub fn page_fault(&mut self, address: u64, code: u32) -> Flow {
        self.save_mut().cr2 = address;
        self.inject_exception(VECTOR_PF, Some(code));
        Flow::Resume
    }

    /// Injects an NMI that was meant for the guest.
    pub fn nmi(&mut self) -> Flow {
        self.vmcb_mut().control.event_inj =
            event::VALID | event::TYPE_NMI << event::TYPE_SHIFT | VECTOR_NMI;
        Flow::Resume
    }

    /// Steps over an instruction of known length.
    pub fn skip(&mut self, length: u64) -> Flow {
        let wide = self.is_64_bit();
        let next = self.save().rip.wrapping_add(length);
        self.resume_at(if wide { next } else { next & 0xFFFF_FFFF })
    }

    /// Goes on at `rip`, the end of an emulated instruction.
    pub fn resume_at(&mut self, rip: u64) -> Flow {
        self.save_mut().rip = rip;
        self.save_mut().rflags &= !RFLAGS_RF;
        self.vmcb_mut().control.int_state = 0;
        Flow::Resume
    }

    /// Delivers #VC with an exit code as its error code, in software.
    pub fn vc(&mut self, code: ExitCode) -> Flow {
        // TR is not among what VMRUN switches: fetch it, and keep it when it is loaded again.
        svm::vmsave(self.vmcb.physical());
        let paging = self.paging();
        let save = self.save();
        let mut frame = Frame {
            paging,
            cs: save.segments[seg::CS],
            ss: save.segments[seg::SS],
            idtr: save.segments[seg::IDTR],
            gdtr: save.segments[seg::GDTR],
            tr: save.segments[seg::TR],
            rflags: save.rflags,
            rip: save.rip,
            rsp: save.rsp,
        };
        let delivered = {
            let mut machine = shared::lock(self.rip());
            machine.platform.counters().vmpl(self.vmpl).vc_injected += 1;
            frame.deliver(
                &mut View::new(&machine.platform, self.vmpl),
                VECTOR_VC,
                code.0 as u32,
            )
        };
        self.trace(format_args!("#VC {code:?}: {delivered:?}"));
        match delivered {
            Ok(()) => {
                let save = self.save_mut();
                save.segments[seg::CS] = frame.cs;
                save.segments[seg::SS] = frame.ss;
                save.rflags = frame.rflags;
                save.rip = frame.rip;
                save.rsp = frame.rsp;
                self.vmcb_mut().control.int_state = 0;
                self.vmcb_mut().control.event_inj = 0;
                Flow::Resume
            }
            Err(DeliveryError::DoubleFault) => {
                self.inject_exception(VECTOR_DF, Some(0));
                Flow::Resume
            }
            Err(DeliveryError::Unsupported) => {
                let why = format!(
                    "{} got #VC {code:?} where it cannot be delivered",
                    self.vmpl
                );
                Flow::End(End::Refused(why))
            }
        }
    }

    /// The virtual address of an access that faulted at `gpa`, which TCG does not report.
    ///
    /// A fetch was at RIP. For data the operands of the instruction are tried: the one that
    /// leads to the page is it; 0 if none does.
    pub fn faulting_address(&self, gpa: Gpa, kind: Kind) -> u64 {
        let machine = shared::lock(self.rip());
        let view = View::new(&machine.platform, self.vmpl);
        let paging = self.paging();
        let leads_there = |address: &u64| {
            let access = Access {
                execute: kind == Kind::Execute,
                ..Access::default()
            };
            let page = gpa.align_down(PageSize::Size4K);
            paging
                .translate(&view, *address, access)
                .is_ok_and(|to| to.gpa.align_down(PageSize::Size4K) == page)
        };
        let rip = self.rip();
        if kind == Kind::Execute {
            // The instruction may begin on the page before.
            return [rip, rip | 0xFFF, (rip | 0xFFF) + 1]
                .into_iter()
                .find(leads_there)
                .unwrap_or(0);
        }
        let (bytes, len) = fetch::<MAX_LENGTH>(&machine, self);
        let registers = self.general_registers();
        let segments = [
            self.save().segments[seg::FS].base,
            self.save().segments[seg::GS].base,
        ];
        operand::addresses(&bytes[..len], rip, &registers, segments)
            .into_iter()
            .find(leads_there)
            .unwrap_or(0)
    }

    /// RAX to R15 in the order of their numbers.
    fn general_registers(&self) -> [u64; 16] {
        let r = &self.registers;
        let [r8, r9, r10, r11, r12, r13, r14, r15] = r.r8_15;
        let save = self.save();
        [
            save.rax, r.rcx, r.rdx, r.rbx, save.rsp, r.rbp, r.rsi, r.rdi, r8, r9, r10, r11, r12,
            r13, r14, r15,
        ]
    }
}
