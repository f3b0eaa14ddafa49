//! What each exit of the guest's means (facts: tdx §5, §7).

use accept::Backend;
use protocols::tdx::Status;
use protocols::tdx::l2::Exit;
use protocols::tdx::ve::ExitReason;
use protocols::tdx::vmcall::register::{RAX, RBX, RCX, RDX};
use protocols::tdx::vmcs::interruption::{Event, Kind};
use protocols::terminate::TurnstileReason;

use super::msr::{self, Class};
use super::vp::{Injection, Vp};
use super::{Domain, Next, Service};

/// Bit of the access rights in an exit's CS that says "64-bit code", as a bit of the register.
const CODE64: u64 = 1 << (16 + 13);

/// The VMX instructions that have reasons in a row.
const FIRST_VMX: u32 = ExitReason::VMCLEAR.0;
const LAST_VMX: u32 = ExitReason::VMXON.0;

impl<B: Backend, D: Domain> Service<'_, B, D> {
    /// Answers an exit.
    pub fn handle(&self, vp: &mut Vp, exit: &Exit) -> Next {
        self.pay(vp);
        let vectoring = Event::decode(exit.idt_vectoring as u32);
        vp.vectoring = vectoring.map(|event| event.kind == Kind::EXCEPTION);
        let next = match exit.status {
            // A device is the host's to route to us: the same to the guest.
            Status::SUCCESS | Status::L2_EXIT_HOST_ROUTED_ASYNC => self.handle_reason(vp, exit),
            Status::L2_EXIT_PENDING_INTERRUPT | Status::L2_EXIT_HOST_ROUTED_TDVMCALL => {
                Next::Resume
            }
            // The guest was not entered, and the other registers say nothing.
            Status::PENDING_INTERRUPT => return Next::Resume,
            _ => return Next::End(TurnstileReason::TD_ENTER),
        };
        vp.interrupted(exit.idt_vectoring, exit.instruction_length());
        next
    }

    fn handle_reason(&self, vp: &mut Vp, exit: &Exit) -> Next {
        match exit.reason {
            // Only 64-bit code at level 0 has the instruction.
            ExitReason::TDCALL if exit.cpl & 3 != 0 || exit.cs & CODE64 == 0 => {
                vp.general_protection();
                Next::Resume
            }
            ExitReason::TDCALL => self.tdcall(vp, exit.instruction_length()),
            ExitReason::CPUID => self.cpuid(vp, exit),
            ExitReason::EPT_VIOLATION => self.access(vp, exit),
            ExitReason::RDMSR | ExitReason::WRMSR => {
                let number = vp.gprs()[RCX] as u32;
                match msr::class(number) {
                    Class::None => vp.general_protection(),
                    Class::Host => vp.instruction_ve(exit.reason, 0, exit.instruction),
                }
                Next::Resume
            }
            ExitReason::IO => {
                vp.instruction_ve(exit.reason, exit.qualification, exit.instruction);
                Next::Resume
            }
            ExitReason::HLT
            | ExitReason::INVD
            | ExitReason::WBINVD
            | ExitReason::PCONFIG
            | ExitReason::VMCALL
            | ExitReason::MWAIT
            | ExitReason::MONITOR => {
                vp.instruction_ve(exit.reason, 0, exit.instruction);
                Next::Resume
            }
            // What L1 keeps of these the guest may not change, and it has no extended state to switch on.
            // A switch of tasks exits always, wherever the guest's tables have a gate for one; to carry it
            // out is the module's as little as ours, so the gate is one that there is not.
            ExitReason::CR_ACCESS
            | ExitReason::XSETBV
            | ExitReason::RDPMC
            | ExitReason::TASK_SWITCH => {
                vp.general_protection();
                Next::Resume
            }
            ExitReason::TRIPLE_FAULT => Next::End(TurnstileReason::L2_SHUTDOWN),
            ExitReason::ENTRY_FAILED_STATE => Next::End(TurnstileReason::TD_ENTER),
            // An exception that nobody asked to see is the guest's.
            ExitReason::EXCEPTION_OR_NMI if Event::decode(exit.interruption as u32).is_some() => {
                vp.injection = Some(Injection {
                    information: exit.interruption as u32,
                    error: (exit.interruption >> 32) as u32,
                    length: 0,
                    address: None,
                });
                Next::Resume
            }
            ExitReason::EXTERNAL_INTERRUPT
            | ExitReason::INTERRUPT_WINDOW
            | ExitReason::NMI_WINDOW
            | ExitReason::TPR_BELOW_THRESHOLD
            | ExitReason::VIRTUALIZED_EOI => Next::Resume,
            // These exit whatever L1 has set, at any privilege level, and do not exist in a trust domain.
            ExitReason::GETSEC
            | ExitReason::RSM
            | ExitReason::INVEPT
            | ExitReason::INVVPID
            | ExitReason::ENCLS
            | ExitReason::ENCLV
            | ExitReason::SEAMCALL
            | ExitReason(FIRST_VMX..=LAST_VMX) => {
                vp.undefined_opcode();
                Next::Resume
            }
            _ => Next::End(TurnstileReason::L2_EXIT),
        }
    }

    /// CPUID: the module's answer is L1's; what is the host's is #VE.
    fn cpuid(&self, vp: &mut Vp, exit: &Exit) -> Next {
        let [supervisor, user] = vp.cpuid_ve;
        let wanted = if exit.cpl & 3 == 3 { user } else { supervisor };
        let (leaf, subleaf) = (vp.gprs()[RAX] as u32, vp.gprs()[RCX] as u32);
        let answer = if wanted {
            None
        } else {
            self.domain.cpuid(leaf, subleaf)
        };
        match answer {
            Some(values) => {
                for (register, value) in [RAX, RBX, RCX, RDX].into_iter().zip(values) {
                    vp.gprs()[register] = value.into();
                }
                vp.skip(exit.instruction_length());
            }
            None => vp.instruction_ve(exit.reason, 0, exit.instruction),
        }
        Next::Resume
    }
}
