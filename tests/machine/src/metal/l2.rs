//! Running an L2 VM of a trust domain: its intercepts, its interrupts, and the way back to L1.
//!
//! Invariant: while an L2 VM runs, physical interrupts exit whatever its RFLAGS.IF is, because they
//! are L1's; its own come from the virtual APIC, one at an entry.

use alloc::format;

use machine::guest::event::{Event, Kind as EventKind};
use machine::platform::End;
use machine::tdx::l2::interrupts::{Virtual, waits_for_interrupts};
use machine::tdx::l2::vmcs::Controls;
use machine::types::Vmpl;
use protocols::exit_code::ExitCode;
use protocols::tdx::Status;
use protocols::tdx::l2::Exit;
use protocols::tdx::metadata::L2Controls;
use protocols::tdx::ve::ExitReason;
use protocols::tdx::vmcs::{Interruptibility, PrimaryControls, interruption};

use super::permissions::L2Msrs;
use super::svm::{intercept, virq};
use super::vcpu::{Flow, RFLAGS_IF, Vcpu};
use super::world::Reason;

/// #PF, as bit of the exception bitmap.
const PAGE_FAULTS: u32 = 1 << 14;

/// What a CPU keeps of the L2 VM that it runs.
pub struct Cpu {
    msrs: L2Msrs,
    /// The controls that L1 has set.
    pub controls: Controls,
    ctls: L2Controls,
    /// Intercepts of control registers.
    cr: u32,
    /// NMIs are blocked.
    nmi_blocked: bool,
    /// The IRET that ends the blocking when it is executed.
    unblocking: Option<u64>,
}

impl Cpu {
    /// Of a CPU that has not run any.
    pub fn new() -> Self {
        Self {
            msrs: L2Msrs::new(),
            controls: Controls::default(),
            ctls: L2Controls::empty(),
            cr: 0,
            nmi_blocked: false,
            unblocking: None,
        }
    }

    /// Intercepts of control registers at a level.
    pub fn intercept_cr(&self, vmpl: Vmpl) -> u32 {
        if vmpl == Vmpl::VMPL0 { 0 } else { self.cr }
    }

    /// Whether the VM has shared memory.
    pub fn may_share(&self) -> bool {
        self.ctls.contains(L2Controls::ENABLE_SHARED_EPTP)
    }
}

impl Vcpu {
    /// The control area for an entry of an L2 VM.
    pub fn init_l2_control(&mut self) {
        let id = self.id;
        {
            let machine = self.lock();
            let platform = &machine.platform;
            if let Some(running) = platform.running_l2(id) {
                drop(machine);
                self.l2.controls = running.controls;
                self.l2.ctls = running.ctls;
            }
        }
        {
            let machine = self.lock();
            let platform = &machine.platform;
            self.l2
                .msrs
                .set(|number, write| platform.catches_l2_msr(id, number, write));
        }
        let controls = &self.l2.controls;
        let primary = controls.primary;
        let mut exceptions = controls.exceptions | intercept::EXCEPTION_UD;
        if controls.page_fault != [0; 2] {
            exceptions |= PAGE_FAULTS;
        }
        let mut misc1 = intercept::INTR
            | intercept::NMI
            | intercept::INIT
            | intercept::CPUID
            | intercept::HLT
            | intercept::INVD
            | intercept::INVLPGA
            | intercept::IOIO
            | intercept::MSR
            | intercept::SHUTDOWN;
        let mut misc2 =
            intercept::SVM | intercept::XSETBV | intercept::WBINVD | intercept::MONITOR_MWAIT;
        if primary.contains(PrimaryControls::RDTSC) {
            misc1 |= intercept::RDTSC;
            misc2 |= intercept::RDTSCP;
        }
        if primary.contains(PrimaryControls::RDPMC) {
            misc1 |= intercept::RDPMC;
        }
        let dr = if primary.contains(PrimaryControls::MOV_DR) {
            intercept::DR_ALL
        } else {
            0
        };
        let blocked = controls.interruptibility.contains(Interruptibility::NMI);
        let shadow = controls
            .interruptibility
            .intersects(Interruptibility::STI | Interruptibility::MOV_SS);
        if blocked {
            misc1 |= intercept::IRET;
        }
        let msrs = self.l2.msrs.physical();
        let ports = self.all_ports();
        self.l2.nmi_blocked = blocked;
        self.l2.unblocking = None;
        let control = &mut self.vmcb_mut().control;
        control.intercept_exceptions = exceptions;
        control.intercept_misc1 = misc1;
        control.intercept_misc2 = misc2;
        control.intercept_dr = dr;
        control.iopm_base = ports;
        control.msrpm_base = msrs;
        control.int_ctl = virq::MASKING;
        control.int_state = shadow.into();
    }

    /// The rest of an entry, when the VM's registers are there: the event that L1 wants delivered.
    pub fn begin_l2(&mut self) {
        use interruption::Kind;
        self.show_control_registers();
        let due = self.lock().platform.take_entry_event(self.id);
        let Some((event, error, length)) = due else {
            return;
        };
        let kind = match event.kind {
            Kind::EXTERNAL => EventKind::Interrupt,
            Kind::NMI => EventKind::Nmi,
            Kind::SOFTWARE_INTERRUPT => EventKind::Software,
            _ => EventKind::Exception,
        };
        // It returns to behind the instruction that it is an event of.
        if matches!(
            event.kind,
            Kind::SOFTWARE_INTERRUPT | Kind::SOFTWARE_EXCEPTION
        ) {
            let next = self.save().rip.wrapping_add(u64::from(length));
            self.save_mut().rip = next;
        }
        if kind == EventKind::Nmi {
            self.block_nmi();
        }
        let event = Event {
            kind,
            vector: event.vector,
            error: event.has_error.then_some(error),
        };
        self.vmcb_mut().control.event_inj = event.encode();
    }

    fn block_nmi(&mut self) {
        self.l2.nmi_blocked = true;
        self.vmcb_mut().control.intercept_misc1 |= intercept::IRET;
    }

    /// The VM is at an IRET, which unblocks NMIs when it is executed.
    pub fn unblock_nmi(&mut self) {
        self.l2.unblocking = Some(self.rip());
        self.l2.nmi_blocked = false;
        self.vmcb_mut().control.intercept_misc1 &= !intercept::IRET;
    }

    /// Writes of control registers exit: CR0 and CR4 because bits of them are L1's, CR8 because an
    /// interrupt may wait for it (and QEMU does not survive it then, see [`Vcpu::guard_cr8`]). Reads exit
    /// only if the VM is to see something else than there is.
    pub fn show_control_registers(&mut self) {
        let ([mask0, mask4], [shadow0, shadow4]) =
            (self.l2.controls.masks, self.l2.controls.shadows);
        let save = self.save();
        let differs = (save.cr0 ^ shadow0) & mask0 | (save.cr4 ^ shadow4) & mask4;
        self.l2.cr = intercept::CR0_WRITE | intercept::CR4_WRITE | intercept::CR8_WRITE;
        if differs != 0 {
            self.l2.cr |= intercept::CR_READ;
        }
        self.vmcb_mut().control.intercept_cr = self.l2.cr;
    }

    /// Before an entry: the virtual interrupt that is due. What there is instead of the entry.
    pub fn prepare_l2(&mut self) -> Option<Flow> {
        let control = &self.vmcb().control;
        let open = self.save().rflags & RFLAGS_IF != 0
            && control.int_state & 1 == 0
            && control.event_inj == 0;
        let mut wait = false;
        if waits_for_interrupts(&self.l2.controls) {
            if open {
                return Some(self.exit_to_l1(Exit::new(ExitReason::INTERRUPT_WINDOW), 0));
            }
            wait = true;
        } else {
            let found = self.lock().platform.virtual_interrupt(self.id, open);
            match found {
                Some(Virtual::Deliver(vector)) => {
                    let event = Event {
                        kind: EventKind::Interrupt,
                        vector,
                        error: None,
                    };
                    self.vmcb_mut().control.event_inj = event.encode();
                }
                Some(Virtual::Wait) => wait = true,
                Some(Virtual::None) => {}
                None => {
                    let why = format!("{}: its virtual-APIC page is gone", self.vmpl);
                    return Some(Flow::End(End::Refused(why)));
                }
            }
        }
        let tpr = u64::from(self.lock().platform.virtual_tpr(self.id) >> 4);
        let control = &mut self.vmcb_mut().control;
        control.int_ctl = virq::MASKING | tpr;
        control.intercept_misc1 &= !intercept::VINTR;
        if wait {
            // The vector is never delivered: the exit comes first.
            control.int_ctl |= virq::pending(u8::MAX);
            control.intercept_misc1 |= intercept::VINTR;
        }
        None
    }

    /// The VM writes a class to CR8. True if L1 is to hear of it.
    pub fn set_virtual_cr8(&mut self, class: u8) -> bool {
        self.lock().platform.set_virtual_tpr(self.id, class << 4)
    }

    /// Leaves the VM for L1, because of an instruction of `length` bytes, or 0. An event whose
    /// delivery the exit interrupted is L1's to deliver.
    pub fn exit_to_l1(&mut self, mut exit: Exit, length: u64) -> Flow {
        use interruption::Kind;
        exit.instruction |= length << 32;
        let interrupted = core::mem::take(&mut self.vmcb_mut().control.event_inj);
        if let Some(event) = Event::decode(interrupted) {
            let told = interruption::Event {
                kind: match event.kind {
                    EventKind::Interrupt => Kind::EXTERNAL,
                    EventKind::Nmi => Kind::NMI,
                    EventKind::Exception => Kind::EXCEPTION,
                    EventKind::Software => Kind::SOFTWARE_INTERRUPT,
                },
                vector: event.vector,
                has_error: event.error.is_some(),
            };
            exit.idt_vectoring =
                u64::from(told.encode()) | u64::from(event.error.unwrap_or(0)) << 32;
        }
        let mut state = Interruptibility::empty();
        state.set(
            Interruptibility::STI,
            self.vmcb().control.int_state & 1 != 0,
        );
        let blocked = self.l2.nmi_blocked || self.l2.unblocking == Some(self.rip());
        state.set(Interruptibility::NMI, blocked);
        self.vmcb_mut().control.int_ctl = 0;
        self.trace(format_args!("exit to L1: {exit:x?}"));
        self.lock().platform.exit_l2(self.id, exit, state);
        Flow::Run(
            Vmpl::VMPL0,
            Reason {
                code: ExitCode::INTR.0,
                info_1: 0,
                info_2: 0,
            },
        )
    }

    /// An interrupt waits for L1.
    pub fn interrupt_for_l1(&mut self) -> Flow {
        let exit = Exit {
            status: Status::L2_EXIT_PENDING_INTERRUPT,
            ..Exit::new(ExitReason::EXTERNAL_INTERRUPT)
        };
        self.exit_to_l1(exit, 0)
    }

    /// The host goes on with L1, for nothing.
    pub fn host_resumes_l1(&mut self) -> Flow {
        let exit = Exit {
            status: Status::L2_EXIT_HOST_ROUTED_ASYNC,
            ..Exit::new(ExitReason::EXTERNAL_INTERRUPT)
        };
        self.lock().platform.count_early_return();
        self.exit_to_l1(exit, 0)
    }
}
