//! The MSR protocol (`ghcb.md` §3): requests that need no page.

use alloc::format;

use protocols::ghcb::PageOperation;
use protocols::ghcb::msr::{CpuidRegister, Info, NO_FRAME, Request, Response};

use super::{Cpu, Reply};
use crate::counters::Vmgexit;
use crate::memory::PhysicalMemory;
use crate::platform::Platform;
use crate::settings::Hostile;
use crate::types::{Alias, Gpa, VcpuId, Vmpl};
use crate::vcpu::Hold;

/// A response code that no protocol version has, for the hostile host.
const UNKNOWN_RESPONSE: u64 = 0xEEE;

impl<P: PhysicalMemory> Platform<P> {
    pub(super) fn msr_request(
        &mut self,
        vcpu: VcpuId,
        vmpl: Vmpl,
        value: u64,
        cpu: &mut dyn Cpu,
    ) -> Reply {
        let info = Info::of(value);
        self.counters.count_vmgexit(vmpl, Vmgexit::Msr(info.0));
        let request = Request::decode(value);
        if self.settings.is_hostile(Hostile::GhcbUnknown)
            && !matches!(request, Request::Terminate(_))
        {
            self.set_ghcb_msr(vcpu, vmpl, UNKNOWN_RESPONSE);
            return Reply::Resume;
        }
        let response = match request {
            Request::SevInfo => Response::Unknown(self.sev_info()),
            Request::Cpuid { function, register } => {
                // The subleaf cannot be expressed and is 0.
                let values = cpu.cpuid(function, 0);
                let index = CpuidRegister::ALL.iter().position(|&r| r == register);
                let value = index.and_then(|i| values.get(i).copied()).unwrap_or(0);
                Response::Cpuid { value, register }
            }
            Request::ApResetHold => {
                if let Some(context) = self.context_mut(vcpu, vmpl) {
                    context.hold = Some(Hold::Msr);
                }
                self.set_ghcb_msr(
                    vcpu,
                    vmpl,
                    Response::ApResetHold { released: false }.encode(),
                );
                return Reply::Hold;
            }
            Request::PreferredGhcb => Response::PreferredGhcb { frame: NO_FRAME },
            Request::RegisterGhcb { frame } => Response::RegisterGhcb {
                frame: self.register_ghcb(vcpu, vmpl, frame),
            },
            Request::PageState { frame, operation } => Response::PageState {
                error: self.change_one_page(vmpl, Gpa::from_frame_truncating(frame), operation),
            },
            Request::RunVmpl { vmpl: target } => match self.can_run(vcpu, u64::from(target)) {
                Some(target) => {
                    self.set_ghcb_msr(vcpu, vmpl, Response::RunVmpl { error: 0 }.encode());
                    return Reply::Run(target);
                }
                None => {
                    self.refuse(
                        vmpl,
                        None,
                        format!("run VMPL{target}: there is no VMSA for it"),
                    );
                    Response::RunVmpl { error: 1 }
                }
            },
            Request::Features => Response::Features(self.hypervisor_features()),
            Request::Terminate(reason) => {
                return Reply::Terminate {
                    set: reason.set.0,
                    code: reason.code,
                };
            }
            // As KVM: the value stays as it is. The line tells what the guest tried.
            Request::GhcbPage { .. } | Request::Unknown(_) => {
                self.refuse(vmpl, None, format!("unknown GHCB MSR request {value:#x}"));
                return Reply::Resume;
            }
        };
        self.set_ghcb_msr(vcpu, vmpl, response.encode());
        Reply::Resume
    }

    /// Registers a GHCB and returns the frame to echo. The page has to be memory that is
    /// shared already, or that nobody has validated: OVMF registers its first GHCB before the
    /// first use makes the page shared. Stricter than KVM, which looks at the range only.
    fn register_ghcb(&mut self, vcpu: VcpuId, vmpl: Vmpl, frame: u64) -> u64 {
        let gpa = Gpa::from_frame_truncating(frame);
        let place = if gpa.frame() == frame {
            self.host.layout().place(gpa)
        } else {
            None
        };
        let usable = place.is_some_and(|place| {
            self.host.attribute(&place) == Alias::Shared
                || !self.host.rmp().entry(&place).is_validated()
        });
        if !usable {
            self.refuse(
                vmpl,
                Some(gpa),
                format!("GHCB frame {frame:#x} is memory in private use"),
            );
            return NO_FRAME;
        }
        if self.settings.is_hostile(Hostile::GhcbRegister) {
            return frame ^ 1;
        }
        if let Some(context) = self.context_mut(vcpu, vmpl) {
            context.registered = Some(gpa);
        }
        frame
    }

    /// The MSR form of a page state change. Returns the error field; KVM's generic error is
    /// bit 63 of the response.
    fn change_one_page(&mut self, vmpl: Vmpl, gpa: Gpa, operation: PageOperation) -> u32 {
        const GENERIC: u32 = 1 << 31;
        if self.settings.is_hostile(Hostile::GhcbPsc) {
            return GENERIC;
        }
        match self.change_page(vmpl, gpa, operation) {
            Ok(()) => 0,
            Err(()) => GENERIC,
        }
    }
}
