//! VMGEXIT: the platform answers; this is the CPU it needs for that.

use machine::Platform;
use machine::ghcb::{ApAction, Cpu, Reply};
use machine::platform::End;
use machine::settings::Trace;
use machine::types::{Gpa, VcpuId};
use protocols::exit_code::ExitCode;

use crate::metal::memory::DirectMap;
use crate::metal::vcpu::{Flow, Vcpu};
use crate::metal::world::Reason;
use crate::metal::{apic, cpu, memory, shared, smp};

/// A VMGEXIT of `length` bytes.
pub fn exit(vcpu: &mut Vcpu, length: u64) -> Flow {
    // The instruction is complete before the host sees the exit (APM 15.35.6).
    vcpu.skip(length);
    let traced = vcpu.trace >= Trace::Switches;
    let (id, vmpl) = (vcpu.id, vcpu.vmpl);
    let Served {
        result: (request, reply),
        after,
    } = serve(vcpu, |platform, host| {
        let request = traced.then(|| platform.describe_vmgexit(id, vmpl));
        (request, platform.vmgexit(id, vmpl, host))
    });
    if let Some(request) = request {
        let level = match request.is_request {
            true => Trace::Switches,
            false => Trace::All,
        };
        vcpu.trace_at(level, format_args!("VMGEXIT {}: {reply:?}", request.text));
    }
    if let Some(end) = after.carry_out(id) {
        return end;
    }
    let why = Reason {
        code: ExitCode::VMGEXIT.0,
        info_1: 0,
        info_2: 0,
    };
    match reply {
        Reply::Resume => Flow::Resume,
        Reply::Run(vmpl) => Flow::Run(vmpl, why),
        Reply::Ap(action) => start_or_stop(vcpu, action),
        Reply::Hold => Flow::Hold(why),
        Reply::Terminate { set, code } => Flow::End(End::Terminated {
            vmpl: vcpu.vmpl,
            set,
            code,
        }),
        Reply::Refused(why) => Flow::End(End::Refused(why)),
    }
}

fn start_or_stop(vcpu: &Vcpu, action: ApAction) -> Flow {
    smp::start_or_stop(vcpu.id, action);
    Flow::Resume
}

/// What [`serve`] gives back.
pub struct Served<R> {
    /// What the platform said.
    pub result: R,
    /// What is to be done with the machine's lock free again.
    pub after: After,
}

/// What a host did to devices that cannot be done with the machine's lock held.
pub struct After {
    /// Set when a port write ends the run.
    ended: Option<End>,
    /// An interrupt command.
    icr: Option<u64>,
}

impl After {
    /// The interrupt command, if there was one.
    pub const fn interrupt_command(&self) -> Option<u64> {
        self.icr
    }

    /// Does it; the end of the run, if it is that.
    pub fn carry_out(self, id: VcpuId) -> Option<Flow> {
        if let Some(end) = self.ended {
            return Some(Flow::End(end));
        }
        if let Some(value) = self.icr {
            apic::write_icr(id, value);
        }
        None
    }
}

/// Lets the platform answer a request of `vcpu`, as a host on this CPU.
pub fn serve<R>(
    vcpu: &mut Vcpu,
    ask: impl FnOnce(&mut Platform<DirectMap>, &mut dyn Cpu) -> R,
) -> Served<R> {
    let mut machine = shared::lock(vcpu.rip());
    let shared::Machine {
        platform,
        ports,
        cpuid,
        ..
    } = &mut *machine;
    let mut host = Host {
        vcpu,
        ports,
        cpuid,
        after: After {
            ended: None,
            icr: None,
        },
    };
    let result = ask(platform, &mut host);
    Served {
        result,
        after: host.after,
    }
}

/// The host's use of the CPU that exited.
struct Host<'a> {
    vcpu: &'a mut Vcpu,
    ports: &'a mut crate::metal::ports::Ports,
    cpuid: &'a machine::cpuid::Table,
    after: After,
}

impl Cpu for Host<'_> {
    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        // The guest patches OSXSAVE and the SVSM bit itself: it has the real table.
        let context = machine::cpuid::Context {
            svsm: false,
            ..super::cpuid_context(self.vcpu)
        };
        let found = self.cpuid.lookup(leaf, subleaf, &context);
        [found.eax, found.ebx, found.ecx, found.edx]
    }

    fn io_in(&mut self, port: u16, bytes: u8) -> u32 {
        self.ports.input(port, bytes)
    }

    fn io_out(&mut self, port: u16, bytes: u8, value: u32) {
        let ended = self.ports.output(port, bytes, value);
        self.after.ended = ended.or(self.after.ended.take());
    }

    fn rdmsr(&mut self, msr: u32) -> Option<u64> {
        match msr {
            cpu::msr::VM_HSAVE_PA => None,
            _ => Some(cpu::rdmsr(msr)),
        }
    }

    fn wrmsr(&mut self, msr: u32, value: u64) -> bool {
        match msr {
            cpu::msr::X2APIC_ICR => self.after.icr = Some(value),
            _ if cpu::is_forbidden_write(msr, value) => return false,
            _ => cpu::wrmsr(msr, value),
        }
        true
    }

    fn mmio_read(&mut self, gpa: Gpa, bytes: u8) -> u64 {
        memory::mmio_read(gpa.get(), bytes)
    }

    fn mmio_write(&mut self, gpa: Gpa, bytes: u8, value: u64) {
        memory::mmio_write(gpa.get(), bytes, value);
    }

    fn rdtsc(&mut self) -> u64 {
        cpu::tsc()
    }

    fn tsc_aux(&mut self) -> u32 {
        cpu::rdmsr(cpu::msr::TSC_AUX) as u32
    }

    fn rdpmc(&mut self, _counter: u32) -> Option<u64> {
        // TCG has no performance counters.
        None
    }

    fn dr7(&mut self) -> u64 {
        self.vcpu.save().dr7
    }

    fn set_dr7(&mut self, value: u64) {
        self.vcpu.save_mut().dr7 = value;
    }

    fn wbinvd(&mut self) {
        // Nothing is cached in TCG.
    }

    fn is_interrupted(&mut self) -> bool {
        apic::is_interrupted()
    }
}
