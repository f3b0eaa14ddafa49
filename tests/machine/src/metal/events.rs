//! Events for the guest: exceptions and NMIs by EVENTINJ, #VC in software, and what an exit
//! interrupted.
//!
//! Invariant: at most one event is due at an entry. A handler that delivers one replaces an
//! event that the exit interrupted, as a fault during delivery does on hardware.

use alloc::format;

use machine::guest::decode::MAX_LENGTH;
use machine::guest::deliver::{DeliveryError, Frame, VECTOR_VC};
use machine::guest::operand;
use machine::guest::walk::Access;
use machine::platform::End;
use machine::types::{Gpa, Kind, PageSize};
use protocols::exit_code::ExitCode;

use super::guest_memory::{View, fetch};
use super::shared;
use super::svm::seg;
use super::vcpu::{Flow, Vcpu};

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

impl Vcpu {
    /// Injects again what the exit interrupted. Handlers that deliver an event of their own
    /// replace it.
    pub fn keep_interrupted_event(&mut self) {
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

    /// Delivers #VC with an exit code as its error code, in software.
    pub fn vc(&mut self, code: ExitCode) -> Flow {
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
