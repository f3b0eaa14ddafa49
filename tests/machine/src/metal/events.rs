//! Events for the guest: exceptions and NMIs by EVENTINJ, #VC in software, and what an exit
//! interrupted.
//!
//! Invariant: at most one event is due at an entry. A handler that delivers one replaces an
//! event that the exit interrupted, as a fault during delivery does on hardware.

use alloc::format;

use machine::guest::decode::MAX_LENGTH;
use machine::guest::deliver::{DeliveryError, Frame, VECTOR_VC};
use machine::guest::event::{Event, Interrupted, Kind as EventKind, vector};
use machine::guest::locate;
use machine::guest::operand::{self, CodeSize};
use machine::platform::End;
use machine::types::{Gpa, Kind};
use protocols::exit_code::ExitCode;
use protocols::vmsa::Segment;

use super::console::log;
use super::guest_memory::{View, fetch};
use super::shared;
use super::svm::{Registers, seg, virq};
use super::vcpu::{Flow, Vcpu};

impl Vcpu {
    /// Injects again what the exit interrupted. Handlers that deliver an event of their own
    /// replace it.
    pub fn keep_interrupted_event(&mut self) {
        let control = &mut self.vmcb_mut().control;
        control.event_inj = Event::decode(control.exit_int_info).map_or(0, Event::encode);
    }

    fn inject(&mut self, event: Event) {
        self.vmcb_mut().control.event_inj = event.encode();
    }

    /// Injects #UD.
    pub fn undefined_opcode(&mut self) -> Flow {
        self.inject(Event::exception(vector::UD, None));
        Flow::Resume
    }

    /// Injects #GP(0).
    pub fn general_protection(&mut self) -> Flow {
        self.inject(Event::exception(vector::GP, Some(0)));
        Flow::Resume
    }

    /// Injects #PF.
    pub fn page_fault(&mut self, address: u64, code: u32) -> Flow {
        self.save_mut().cr2 = address;
        self.inject(Event::exception(vector::PF, Some(code)));
        Flow::Resume
    }

    /// Injects an NMI that was meant for the guest.
    pub fn nmi(&mut self) -> Flow {
        self.inject(Event::NMI);
        Flow::Resume
    }

    /// The same, unless the guest is not to get one now: then it gets it later.
    pub fn nmi_unless_held(&mut self) -> Flow {
        if self.lock().platform.holds_nmi(self.id) {
            self.held_nmi = true;
            return Flow::Resume;
        }
        self.nmi()
    }

    /// Injects the NMI that was held off, if there is one and it is not to be held off any more.
    pub fn release_held_nmi(&mut self) {
        if self.held_nmi && !self.lock().platform.holds_nmi(self.id) {
            self.held_nmi = false;
            self.inject(Event::NMI);
        }
    }

    /// Delivers #VE. TCG delivers an exception without error code itself. An NMI that it displaces
    /// waits until the handler has asked what the #VE was about.
    pub fn ve(&mut self) -> Flow {
        match self.displaced() {
            Err(worse) => return worse,
            Ok(Some(event)) if event.kind == EventKind::Nmi => self.held_nmi = true,
            Ok(Some(event)) => self.deliver_later(event),
            Ok(None) => {}
        }
        self.inject(Event::exception(protocols::tdx::ve::VECTOR, None));
        Flow::Resume
    }

    /// The event that the exit interrupted and that has to follow the exception that is due now;
    /// `Err` if both together are something else.
    fn displaced(&mut self) -> Result<Option<Event>, Flow> {
        match Event::decode(self.vmcb().control.event_inj).map(Event::after_vc) {
            None | Some(Interrupted::Repeats) => Ok(None),
            Some(Interrupted::Pending(event)) => Ok(Some(event)),
            Some(Interrupted::DoubleFault) => Err(self.double_fault()),
            Some(Interrupted::Shutdown) => Err(Flow::End(End::Shutdown {
                vmpl: self.vmpl,
                rip: self.rip(),
            })),
        }
    }

    /// Delivers #VC with an exit code as its error code, in software.
    pub fn vc(&mut self, code: ExitCode) -> Flow {
        let due = match self.displaced() {
            Ok(due) => due,
            Err(worse) => return worse,
        };
        // TR is not among what VMRUN switches: fetch it, and keep it when it is loaded again.
        self.save_hidden_state();
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
            let mut machine = self.lock();
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
                if let Some(event) = due {
                    self.deliver_later(event);
                }
                Flow::Resume
            }
            Err(DeliveryError::DoubleFault) => self.double_fault(),
            Err(DeliveryError::PageFault { address, code }) => self.page_fault(address, code),
            Err(DeliveryError::Unsupported) => {
                let why = format!(
                    "{} got #VC {code:?} where it cannot be delivered",
                    self.vmpl
                );
                Flow::End(End::Refused(why))
            }
        }
    }

    /// Injects #DF.
    pub fn double_fault(&mut self) -> Flow {
        self.inject(Event::exception(vector::DF, Some(0)));
        Flow::Resume
    }

    /// An event whose delivery ended in #VC follows when the handler of #VC lets it: its source
    /// has handed it over and will not repeat it.
    fn deliver_later(&mut self, event: Event) {
        match event.kind {
            // The virtual interrupt waits for RFLAGS.IF, whatever the task priority: the
            // interrupt controller has looked at that already.
            EventKind::Interrupt => {
                self.vmcb_mut().control.int_ctl = virq::pending(event.vector);
            }
            // Nothing in the handler holds an NMI off.
            _ => self.inject(event),
        }
    }

    /// Says in the log in what state a guest was that shut its processor down: nothing is left of
    /// it afterwards, and the guest itself is past saying anything.
    pub fn tell_shutdown(&self) {
        self.save_hidden_state();
        let save = self.save();
        let table = |index: usize| {
            let Segment { base, limit, .. } = save.segments[index];
            format!("{base:#x}+{limit:#x}")
        };
        let (cs, ss) = (save.segments[seg::CS], save.segments[seg::SS]);
        log!(
            "vCPU {} {} shut down: CS {:#x} SS {:#x} (DPL {}) RIP {:#x} RSP {:#x} RFLAGS {:#x} \
             CR0 {:#x} CR2 {:#x} CR3 {:#x} CR4 {:#x} IDT {} GDT {} TR {} GS {:#x}; \
             EVENTINJ {:#x} EXITINTINFO {:#x}",
            self.id.0,
            self.vmpl,
            cs.selector,
            ss.selector,
            self.cpl(),
            save.rip,
            save.rsp,
            save.rflags,
            save.cr0,
            save.cr2,
            save.cr3,
            save.cr4,
            table(seg::IDTR),
            table(seg::GDTR),
            table(seg::TR),
            save.segments[seg::GS].base,
            self.injected,
            self.vmcb().control.exit_int_info,
        );
    }

    /// The virtual address of an access that faulted at `gpa`, which TCG does not report; 0 if
    /// no address that the instruction may have used leads there.
    pub fn faulting_address(&self, gpa: Gpa, kind: Kind) -> u64 {
        // FS, GS, LDTR and TR are in the CPU.
        self.save_hidden_state();
        let machine = shared::lock(self.rip());
        let (bytes, len) = fetch::<MAX_LENGTH>(&machine, self);
        let save = self.save();
        let registers = self.general_registers();
        let base = |index: usize| save.segments[index].base;
        let flat = |index: usize| if self.is_64_bit() { 0 } else { base(index) };
        let cpu = locate::Cpu {
            paging: self.paging(),
            context: operand::Context {
                bytes: &bytes[..len],
                size: self.code_size(),
                rip: self.rip(),
                registers: &registers,
                segments: [
                    flat(seg::ES),
                    flat(seg::CS),
                    flat(seg::SS),
                    flat(seg::DS),
                    base(seg::FS),
                    base(seg::GS),
                ],
            },
            tables: [seg::IDTR, seg::GDTR, seg::LDTR, seg::TR].map(|index| save.segments[index]),
        };
        cpu.locate(&View::new(&machine.platform, self.vmpl), gpa, kind)
            .unwrap_or(0)
    }

    /// RAX to R15 in the order of their numbers.
    pub fn general_registers(&self) -> [u64; 16] {
        let (r, save) = (&self.registers, self.save());
        let [r8, r9, r10, r11, r12, r13, r14, r15] = r.r8_15;
        [
            save.rax, r.rcx, r.rdx, r.rbx, save.rsp, r.rbp, r.rsi, r.rdi, r8, r9, r10, r11, r12,
            r13, r14, r15,
        ]
    }

    /// Sets them, but for RSP.
    pub fn set_general_registers(&mut self, values: &[u64; 16]) {
        let [rax, rcx, rdx, rbx, _, rbp, rsi, rdi, ref r8_15 @ ..] = *values;
        self.save_mut().rax = rax;
        self.registers = Registers {
            rbx,
            rcx,
            rdx,
            rsi,
            rdi,
            rbp,
            r8_15: *r8_15,
        };
    }

    /// How code is decoded: real mode and segments without D are 16 bits wide.
    fn code_size(&self) -> CodeSize {
        const DEFAULT_32: u16 = 1 << 10;
        let code = self.save().segments[seg::CS].attributes;
        if self.is_64_bit() {
            CodeSize::Bits64
        } else if code.0 & DEFAULT_32 != 0 {
            CodeSize::Bits32
        } else {
            CodeSize::Bits16
        }
    }
}
