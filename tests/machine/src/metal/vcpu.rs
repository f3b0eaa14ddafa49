//! One CPU: its VMCB, the world it runs, and the loop around VMRUN.
//!
//! A vCPU of the guest is a CPU of QEMU. It runs one VMPL at a time; which one is decided by
//! the guest's own requests. Between two exits the state lives in the VMCB, in `registers` and
//! in the CPU; at a world switch it moves to and from the VMSA ([`world`]).
//!
//! Invariants:
//! * the nested tables are chosen at every entry from the level and the paging mode, so a guest
//!   that changes its mode runs on the other view's mappings at most until its next exit;
//! * an event that an exit interrupted is injected again unless the exit itself delivered one
//!   (see [`events`](super::events)).

#![expect(unsafe_code, reason = "the VMCB is shared with the CPU; VMRUN")]

use alloc::format;
use alloc::string::ToString;
use core::cmp::Ordering;

use machine::describe;
use machine::guest::walk::Paging;
use machine::platform::End;
use machine::settings::{Hostile, PlatformKind, Reflection, Trace};
use machine::types::{Spa, VcpuId, Vmpl};
use machine::vcpu::EnterError;
use protocols::exit_code::ExitCode;
use protocols::report::Event;
use protocols::vmsa::Efer;

use super::apic;
use super::console;
use super::l2;
use super::memory::OwnPages;
use super::npt::Mode;
use super::permissions::Permissions;
use super::smp::Park;
use super::svm::{self, Registers, Save, Vmcb, intercept, seg, virq};
use super::world::{self, Reason, X87};
use super::{cpu, exit, finish, shared, smp};

mod waiting;

/// What an exit asks the run loop to do.
pub enum Flow {
    /// Enter the same world again.
    Resume,
    /// Leave the world for this reason and enter another.
    Run(Vmpl, Reason),
    /// Leave the world and wait until this CPU is told to go on.
    Hold(Reason),
    /// Leave the world and wait until an interrupt comes.
    Idle(Reason),
    /// The run is over.
    End(End),
}

/// RFLAGS.IF.
pub const RFLAGS_IF: u64 = 1 << 9;
const RFLAGS_RF: u64 = 1 << 16;
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
    /// What the platform is.
    pub kind: PlatformKind,
    /// Whether that level gets #VC for what KVM has reflected.
    pub strict: bool,
    /// General registers.
    pub registers: Registers,
    /// What the CPU holds of x87 between two levels.
    x87: X87,
    /// Where the running VMSA is.
    vmsa: Spa,
    vmcb: OwnPages,
    park: Park,
    permissions: Permissions,
    reflection: Reflection,
    /// What is traced.
    pub trace: Trace,
    /// EVENTINJ at the last entry.
    pub injected: u64,
    /// A level that was to be started while a more privileged one ran, and has not run since.
    due: Option<Vmpl>,
    /// Interrupts of each level that wait for RFLAGS.IF, as the VMCB has them.
    interrupts: [u64; Vmpl::COUNT],
    /// The level left last did so by a HLT with interrupts off.
    halted: bool,
    /// An NMI of the guest woke it.
    nmi_due: bool,
    /// An NMI waits until the information of a #VE has been asked for.
    pub held_nmi: bool,
    /// `hostile=early-return`.
    hostile: bool,
    /// Times a lower level was resumed, counted for a hostile host only.
    resumes: u64,
    /// Whether a tick is an instruction (`icount=on`).
    icount: bool,
    /// Instructions of the running level that are not in the counters yet.
    executed: u64,
    /// What an L2 VM of a trust domain needs besides.
    pub l2: l2::Cpu,
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
            kind: guard.platform.kind(),
            strict: true,
            registers: Registers::default(),
            x87: X87::held(),
            vmsa: Spa::new(0),
            vmcb: OwnPages::new(1),
            park: Park::new(),
            permissions,
            reflection: settings.reflection,
            trace: settings.trace,
            injected: 0,
            due: None,
            interrupts: [0; Vmpl::COUNT],
            halted: false,
            nmi_due: false,
            held_nmi: false,
            hostile: settings.is_hostile(Hostile::EarlyReturn),
            resumes: 0,
            icount: settings.icount,
            executed: 0,
            l2: l2::Cpu::new(),
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

    /// Whether an L2 VM of a trust domain runs.
    pub fn is_l2(&self) -> bool {
        self.kind == PlatformKind::Tdx && self.vmpl != Vmpl::VMPL0
    }

    /// Whether the guest runs 64-bit code.
    pub fn is_64_bit(&self) -> bool {
        let save = self.save();
        save.efer & EFER_LMA != 0 && save.segments[seg::CS].attributes.is_long()
    }

    /// The map that catches all ports.
    pub fn all_ports(&self) -> u64 {
        self.permissions.ports(true)
    }

    /// An NMI of the guest goes to L1 when that is entered.
    pub fn nmi_for_l1(&mut self) {
        self.nmi_due = true;
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

    /// The machine's lock. What is counted while it is held is this vCPU's doing.
    pub fn lock(&self) -> shared::Guard {
        let mut machine = shared::lock(self.rip());
        machine.platform.serve(self.id);
        machine
    }

    /// Moves what the level has executed to the counters.
    pub fn count_executed(&mut self) {
        let executed = core::mem::take(&mut self.executed);
        if executed != 0 {
            let mut machine = self.lock();
            machine.platform.counters().vmpl(self.vmpl).instructions += executed;
        }
    }

    /// Writes a line if all of the run is traced.
    pub fn trace(&self, text: core::fmt::Arguments<'_>) {
        self.trace_at(Trace::All, text);
    }

    /// Writes a line if this much of the run is traced. The machine's lock is not to be held.
    pub fn trace_at(&self, level: Trace, text: core::fmt::Arguments<'_>) {
        if self.trace >= level {
            console::event(&Event::Trace(protocols::report::Trace {
                tsc: cpu::tsc(),
                vcpu: self.id.0,
                vmpl: self.vmpl.number(),
                rip: self.rip(),
                text: text.to_string(),
            }));
        }
    }

    /// Runs the guest on this CPU, starting with one level, until the run ends.
    pub fn run(&mut self, first: Vmpl) -> ! {
        let mut next = first;
        loop {
            if !self.enter_world(next) {
                self.halted = false;
                next = self.wait_for_start();
                continue;
            }
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
                    self.halted = why.code == ExitCode::HLT.0;
                    self.wait_for_start()
                }
                Flow::Idle(why) => {
                    self.leave_world(&why);
                    self.halted = true;
                    self.wait(true)
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
        if self.is_l2() {
            let due = self.resumes.is_multiple_of(EARLY_RETURN_EVERY);
            return due.then(|| self.host_resumes_l1());
        }
        let intr = Reason {
            code: ExitCode::INTR.0,
            info_1: 0,
            info_2: 0,
        };
        self.resumes
            .is_multiple_of(EARLY_RETURN_EVERY)
            .then_some(Flow::Run(Vmpl::VMPL0, intr))
    }

    /// Enters a level; false if another CPU has had the host forget its VMSA since that was asked
    /// for. As under KVM the vCPU is then stopped, and waits for its next start.
    fn enter_world(&mut self, vmpl: Vmpl) -> bool {
        let entered = {
            let mut machine = shared::lock(0);
            machine.update_stale();
            machine.platform.enter(self.id, vmpl)
        };
        let spa = match entered {
            Ok(spa) => spa,
            Err(EnterError::NoVmsa) if vmpl != Vmpl::VMPL0 => {
                self.answer_start_of(vmpl);
                return false;
            }
            Err(error) => {
                let why = format!("vCPU {} cannot run {vmpl}: {error:?}", self.id.0);
                finish::end(End::Refused(why), self.rip())
            }
        };
        let vmsa = world::read(spa);
        let (left, left_rax) = (self.vmpl, self.save().rax);
        self.vmpl = vmpl;
        if self.due == Some(vmpl) {
            self.due = None;
        }
        self.vmsa = spa;
        self.strict = vmpl == Vmpl::VMPL0 || self.reflection != Reflection::Direct;
        self.answer_start_of(vmpl);
        self.init_control();
        if self.is_l2() {
            self.init_l2_control();
        }
        let at = self.vmcb.physical();
        let mut registers = Registers::default();
        let x87 = self.x87;
        world::enter(&vmsa, self.vmcb_mut(), at, &mut registers, &x87);
        self.registers = registers;
        self.halted = false;
        if self.is_l2() {
            self.begin_l2();
        }
        if core::mem::take(&mut self.nmi_due) {
            self.nmi_unless_held();
        }
        self.trace_entry(left, left_rax);
        true
    }

    /// The trace's line for a world switch: `left` ran here before, with this in RAX. Between the
    /// guest and VMPL0 RAX holds the call and its result (SVSM 5), if there was a call.
    fn trace_entry(&self, left: Vmpl, left_rax: u64) {
        if self.trace < Trace::Switches {
            return;
        }
        let text = match self.vmpl.number().cmp(&left.number()) {
            Ordering::Less => format!("enter from {left}, call {}", describe::call(left_rax)),
            Ordering::Greater => {
                let result = describe::result(self.save().rax);
                format!("enter from {left}, result {result}")
            }
            Ordering::Equal => "enter".to_string(),
        };
        self.trace_at(Trace::Switches, format_args!("{text}"));
    }

    fn leave_world(&mut self, why: &Reason) {
        self.interrupts[self.vmpl.index()] = virq::kept(self.vmcb().control.int_ctl);
        self.x87 = world::leave(
            self.vmsa,
            self.vmcb(),
            self.vmcb.physical(),
            &self.registers,
            why,
        );
        self.count_executed();
        shared::lock(self.rip()).platform.leave(self.id);
    }

    /// The control area of an ordinary entry, for a level that is strict or not.
    pub fn init_control(&mut self) {
        let strict = self.strict;
        let iopm = self.permissions.ports(strict);
        let is_td = self.kind == PlatformKind::Tdx;
        let msrpm = if is_td {
            self.permissions.td_msrs()
        } else {
            self.permissions.msrs(strict)
        };
        let interrupt = self.interrupts[self.vmpl.index()];
        let all = self.reflection == Reflection::All;
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
        control.intercept_cr = 0;
        control.intercept_dr = 0;
        if strict {
            control.intercept_misc1 |= intercept::INVD;
            control.intercept_misc2 |= intercept::WBINVD | intercept::MONITOR_MWAIT;
        }
        if strict && !is_td {
            control.intercept_dr = intercept::DR7;
            control.intercept_exceptions |= intercept::EXCEPTION_DB_AC;
            control.intercept_misc1 |= intercept::RDPMC;
        }
        if all && !is_td {
            control.intercept_misc1 |= intercept::RDTSC;
            control.intercept_misc2 |= intercept::RDTSCP;
        }
        control.iopm_base = iopm;
        control.msrpm_base = msrpm;
        control.asid = 1;
        control.int_ctl = interrupt;
        control.int_state = 0;
        control.np_enable = 1;
        control.event_inj = 0;
    }

    /// One VMRUN and what its exit asks for.
    fn step(&mut self) -> Flow {
        if self.is_l2()
            && let Some(flow) = self.prepare_l2()
        {
            return flow;
        }
        let mode = self.mode();
        let root = {
            let mut machine = shared::lock(self.rip());
            machine.reserve_tables();
            // With the lock held: who withdraws a right and then clears the mark must not see it
            // set again by an entry that came before.
            world::mark_running(self.vmsa, self.id);
            smp::enter_guest(self.id, self.vmpl);
            machine.tables.root(self.vmpl, mode)
        };
        self.vmcb_mut().control.n_cr3 = root;
        self.injected = self.vmcb().control.event_inj;
        let waits = virq::kept(self.vmcb().control.int_ctl) != 0;
        cpu::match_cr4(self.save().cr4);
        if !self.is_l2() {
            self.guard_cr8();
        }
        let hidden = self.hide_long_mode();
        let at = self.vmcb.physical();
        svm::host_interrupts(self.is_l2());
        // SAFETY: (1) the nested tables hold only what the platform granted, never the reserved
        // range; (2) `init_control` intercepts the SVM instructions; (3) `new` enabled SVM.
        let ticks = unsafe { svm::vmrun(at, &mut self.registers) };
        svm::host_interrupts(false);
        smp::left_guest(self.id);
        if waits {
            apic::look_again();
        }
        // QEMU may leave nested paging on (docs/machine.md): the first instruction after VMRUN
        // then faults in the guest's nested tables, and this second exit stores the machine's own
        // state over the guest's, which is lost. No guest has the machine's page tables.
        if self.save().cr3 & !0xFFF == cpu::cr3() {
            return Flow::End(End::EmulatorFault(self.id.0));
        }
        if self.icount {
            // The instruction that exits was not executed; one that the machine carries out is
            // counted when that is done.
            self.executed += ticks.saturating_sub(svm::VMRUN_TICKS);
        }
        if hidden {
            self.save_mut().efer |= Efer::LME.0;
            self.vmcb_mut().control.intercept_cr = self.l2.intercept_cr(self.vmpl);
        }
        self.keep_interrupted_event();
        exit::handle(self)
    }

    /// Takes FS, GS, TR, LDTR and the system call registers from the VMCB, whose copy was just written.
    pub fn load_hidden_state(&self) {
        svm::vmload(self.vmcb.physical());
    }

    /// One VMRUN on the nested tables at `root`.
    ///
    /// # Safety
    /// 1. The tables give the guest no memory of the machine; 2. [`Vcpu::init_control`] was called, so the
    ///    SVM instructions are intercepted.
    pub unsafe fn enter_on(&mut self, root: u64) {
        self.vmcb_mut().control.n_cr3 = root;
        cpu::match_cr4(self.save().cr4);
        let at = self.vmcb.physical();
        // SAFETY: (1) and (2) are the caller's promise; (3) `new` enabled SVM.
        unsafe { svm::vmrun(at, &mut self.registers) };
        self.keep_interrupted_event();
    }

    /// Takes LME out of EFER while the guest has neither paging nor PAE; says whether it did. TCG's
    /// #VMEXIT puts CR0 back before EFER and CR4: with the guest's LME and without its PAE it takes
    /// the host's paging for an error, and leaves the host without. The guest sees nothing of it: EFER
    /// is intercepted always, CR4 as long as LME is hidden.
    fn hide_long_mode(&mut self) -> bool {
        const CR4_PAE: u64 = 1 << 5;
        let save = self.save_mut();
        let hide =
            save.efer & Efer::LME.0 != 0 && save.cr0 & CR0_PG == 0 && save.cr4 & CR4_PAE == 0;
        if hide {
            save.efer &= !Efer::LME.0;
            self.vmcb_mut().control.intercept_cr |= intercept::CR4_WRITE;
        }
        hide
    }

    /// Catches MOV to CR8 as long as a virtual interrupt waits: TCG then raises it again, which it may do
    /// only under a lock that the instruction does not take, and QEMU aborts (docs/machine.md).
    fn guard_cr8(&mut self) {
        let control = &mut self.vmcb_mut().control;
        control.intercept_cr = if virq::kept(control.int_ctl) != 0 {
            intercept::CR8_WRITE
        } else {
            0
        };
    }

    /// Stores what VMRUN does not switch (TR among it) in the VMCB, to be read there.
    pub fn save_hidden_state(&self) {
        svm::vmsave(self.vmcb.physical());
    }

    /// Steps over an instruction of known length.
    pub fn skip(&mut self, length: u64) -> Flow {
        let wide = self.is_64_bit();
        self.executed += u64::from(self.icount);
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
}
