//! What other CPUs ask of this one, and how it waits, parked, until they do.

#![expect(unsafe_code, reason = "VMRUN of the parked guest")]

use machine::types::Vmpl;
use protocols::exit_code::ExitCode;
use protocols::vmsa::{Efer, Segment, SegmentAttributes, Vmsa};

use super::{Flow, RFLAGS_IF, Vcpu};
use crate::metal::smp::{self, Request};
use crate::metal::svm::{self, intercept, seg};
use crate::metal::world::Reason;

impl Vcpu {
    /// Does what other CPUs asked for, up to what changes what this one runs.
    ///
    /// A level that is more privileged than the one to be started is not interrupted: it finds
    /// the new VMSA when it asks for that level, or when it gives the processor back.
    pub(super) fn serve_request(&mut self) -> Option<Flow> {
        let nothing = Reason {
            code: ExitCode::NMI.0,
            info_1: 0,
            info_2: 0,
        };
        while let Some(request) = smp::request(self.id) {
            match request {
                Request::Start(vmpl) if !self.vmpl.is_more_privileged_than(vmpl) => {
                    // The answer follows when the old world has been left.
                    return Some(Flow::Run(vmpl, nothing));
                }
                Request::Stop(vmpl) if vmpl == self.vmpl => return Some(Flow::Hold(nothing)),
                request => self.note(request),
            }
            smp::answer(self.id);
        }
        None
    }

    /// Keeps in mind what a request means for a level that does not run now.
    fn note(&mut self, request: Request) {
        match request {
            // Forgotten, it would never run: VMPL0 may have found nothing to run a moment ago
            // and be about to give the processor back.
            Request::Start(vmpl) => {
                self.due = Some(vmpl);
                self.lock().platform.count_awaited_start();
            }
            Request::Stop(vmpl) if self.due == Some(vmpl) => {
                self.due = None;
                self.lock().platform.count_start();
            }
            Request::Stop(_) | Request::Startup => {}
        }
    }

    /// Waits, parked, until another CPU gives this one something to run.
    ///
    /// A level that halted with interrupts off goes on when an NMI arrives.
    pub fn wait_for_start(&mut self) -> Vmpl {
        self.wait(false)
    }

    /// Waits, parked; with `interruptible` an interrupt makes the level go on that halted. It stays
    /// pending, and the level gets it.
    pub(super) fn wait(&mut self, interruptible: bool) -> Vmpl {
        smp::set_asleep(self.id, !interruptible);
        self.init_park();
        if interruptible {
            self.save_mut().rflags |= RFLAGS_IF;
            self.vmcb_mut().control.intercept_misc1 |= intercept::INTR;
        }
        let next = loop {
            if let Some(vmpl) = self.started() {
                break vmpl;
            }
            let at = self.vmcb.physical();
            // SAFETY: (1) the parked guest's nested tables map one page of its own code; (2) and
            // (3) as in `step`.
            unsafe { svm::vmrun(at, &mut self.registers) };
            if self.vmcb().control.exit_code == ExitCode::INTR.0 {
                break self.vmpl;
            }
            svm::take_nmi();
            if !smp::was_kicked(self.id) && self.halted {
                self.nmi_due = true;
                break self.vmpl;
            }
        };
        smp::set_asleep(self.id, false);
        next
    }

    /// What a parked CPU is to run, if others have said so by now. The request to start a level
    /// is answered when that has been entered.
    fn started(&mut self) -> Option<Vmpl> {
        while let Some(request) = smp::request(self.id) {
            match request {
                Request::Start(vmpl) => return Some(vmpl),
                Request::Startup => {
                    if let Some(vmpl) = smp::released_by_startup(self.id) {
                        return Some(vmpl);
                    }
                }
                Request::Stop(_) => self.note(request),
            }
            smp::answer(self.id);
        }
        self.due.take()
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
        vmcb.control.intercept_dr = 0;
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

    /// A request to start this level, or to replace its VMSA, has now been carried out.
    pub(super) fn answer_start_of(&self, vmpl: Vmpl) {
        if smp::request(self.id) == Some(Request::Start(vmpl)) {
            smp::answer(self.id);
        }
    }
}
