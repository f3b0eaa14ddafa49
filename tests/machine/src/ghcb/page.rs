//! The page protocol (`ghcb.md` §5, §11; `guests.md` §5.4).
//!
//! [`Exchange`] is one request: the page is copied once, everything is decided on the copy,
//! and what the guest is to see is written back at the end with the bits of exactly the
//! documented outputs. Errors follow the protocol: a malformed request comes back as
//! SW_EXITINFO1 = 2 with the reason, a faulting one as 1 with the exception.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use protocols::exit_code::ExitCode;
use protocols::ghcb::event::{ApRequest, EventInjection};
use protocols::ghcb::page::{
    Field, Ghcb, MalformedReason, Response, SHARED_BUFFER_OFFSET, SHARED_BUFFER_SIZE,
    USAGE_STANDARD,
};
use zerocopy::{FromZeros, IntoBytes};

use super::instructions::{serve_instruction, serve_port};
use super::{Cpu, Reply};
use crate::counters::Vmgexit;
use crate::memory::PhysicalMemory;
use crate::platform::Platform;
use crate::types::{Alias, Gpa, PAGE_SIZE, PageSize, Spa, VcpuId, Vmpl};
use crate::vcpu::Hold;

/// Bytes of one entry of the list of APIC ids; its first entry is their number.
const APIC_ID_BYTES: u64 = 4;

/// How a request ends if it does not simply succeed.
pub(super) enum Failure {
    /// SW_EXITINFO1 = 2.
    Malformed(MalformedReason, String),
    /// SW_EXITINFO1 = 1 with #GP(0).
    GeneralProtection,
    /// The host ends the run.
    Fatal(String),
}

impl Failure {
    pub(super) fn missing(what: &str) -> Self {
        Self::Malformed(
            MalformedReason::MISSING_INPUT,
            format!("{what} is not valid"),
        )
    }

    pub(super) fn input(what: String) -> Self {
        Self::Malformed(MalformedReason::INVALID_INPUT, what)
    }

    fn scratch(what: String) -> Self {
        Self::Malformed(MalformedReason::INVALID_SCRATCH, what)
    }
}

/// One request on a copy of the page.
pub(super) struct Exchange {
    gpa: Gpa,
    pub(super) request: Ghcb,
    reply: Ghcb,
}

impl Exchange {
    /// Length of the shared buffer.
    pub(super) const fn buffer_len(&self) -> usize {
        SHARED_BUFFER_SIZE
    }

    /// Bytes of the shared buffer as the guest sent them.
    pub(super) fn buffer(&self, offset: usize, len: usize) -> Option<&[u8]> {
        self.request
            .shared_buffer
            .get(offset..offset.checked_add(len)?)
    }

    /// Changes bytes of the shared buffer that the guest gets back.
    pub(super) fn write_buffer(&mut self, offset: usize, bytes: &[u8]) {
        let range = offset..offset + bytes.len();
        if let Some(target) = self.reply.shared_buffer.get_mut(range) {
            target.copy_from_slice(bytes);
        }
    }

    pub(super) fn get(&self, field: Field, name: &str) -> Result<u64, Failure> {
        self.request
            .get(field)
            .ok_or_else(|| Failure::missing(name))
    }

    pub(super) fn put(&mut self, field: Field, value: u64) {
        self.reply.set(field, value);
    }

    pub(super) fn info_1(&self) -> Result<u64, Failure> {
        self.get(Field::EXIT_INFO_1, "exit info 1")
    }

    pub(super) fn info_2(&self) -> Result<u64, Failure> {
        self.get(Field::EXIT_INFO_2, "exit info 2")
    }

    /// Offset in the shared buffer that the scratch field points to, with room for `len`
    /// bytes. Version 2 allows no other place.
    pub(super) fn scratch(&self, len: usize) -> Result<usize, Failure> {
        let scratch = self.get(Field::SCRATCH, "scratch")?;
        let start = self.gpa.get() + SHARED_BUFFER_OFFSET as u64;
        scratch
            .checked_sub(start)
            .map(|offset| offset as usize)
            .filter(|&offset| {
                offset
                    .checked_add(len)
                    .is_some_and(|e| e <= SHARED_BUFFER_SIZE)
            })
            .ok_or_else(|| {
                Failure::scratch(format!(
                    "scratch {scratch:#x}+{len:#x} leaves the shared buffer"
                ))
            })
    }
}

impl<P: PhysicalMemory> Platform<P> {
    pub(super) fn page_request(
        &mut self,
        vcpu: VcpuId,
        vmpl: Vmpl,
        gpa: Gpa,
        cpu: &mut dyn Cpu,
    ) -> Reply {
        let Some(spa) = self.shared_page(gpa) else {
            // The host cannot even say so: it has no page to answer in.
            self.refuse(
                vmpl,
                Some(gpa),
                format!("VMGEXIT with GHCB {gpa}: no shared memory"),
            );
            return Reply::Resume;
        };
        let mut request = Ghcb::new_zeroed();
        self.memory.read(spa, request.as_mut_bytes());
        let mut reply = request.clone();
        reply.clear_valid();
        let mut exchange = Exchange {
            gpa,
            request,
            reply,
        };
        exchange.put(Field::EXIT_INFO_1, u64::from(Response::NO_ACTION.0));
        exchange.put(Field::EXIT_INFO_2, 0);

        let result = self.dispatch(vcpu, vmpl, &mut exchange, cpu);
        let outcome = match result {
            Ok(reply) => reply,
            Err(Failure::Malformed(reason, text)) => {
                self.refuse(vmpl, Some(gpa), format!("malformed VMGEXIT: {text}"));
                exchange.put(Field::EXIT_INFO_1, u64::from(Response::MALFORMED.0));
                exchange.put(Field::EXIT_INFO_2, reason.0);
                Reply::Resume
            }
            Err(Failure::GeneralProtection) => {
                const GP: u8 = 13;
                exchange.put(Field::EXIT_INFO_1, u64::from(Response::EXCEPTION.0));
                exchange.put(Field::EXIT_INFO_2, EventInjection::exception(GP, Some(0)).0);
                Reply::Resume
            }
            Err(Failure::Fatal(text)) => return Reply::Refused(text),
        };
        self.memory.write(spa, exchange.reply.as_bytes());
        outcome
    }

    /// System address of a page that is shared memory.
    pub(crate) fn shared_page(&self, gpa: Gpa) -> Option<Spa> {
        if gpa.get() == 0 || !gpa.is_aligned(PageSize::Size4K) {
            return None;
        }
        let place = self.host.layout().place(gpa)?;
        (self.host.attribute(&place) == Alias::Shared).then_some(place.spa)
    }

    fn dispatch(
        &mut self,
        vcpu: VcpuId,
        vmpl: Vmpl,
        exchange: &mut Exchange,
        cpu: &mut dyn Cpu,
    ) -> Result<Reply, Failure> {
        let code = exchange.request.get(Field::EXIT_CODE);
        self.counters
            .count_vmgexit(vmpl, Vmgexit::Nae(code.unwrap_or(u64::MAX)));
        let registered = self
            .context(vcpu, vmpl)
            .and_then(|context| context.registered);
        if registered != Some(exchange.gpa) {
            let text = format!("GHCB {} is not registered", exchange.gpa);
            return Err(Failure::Malformed(MalformedReason::NOT_REGISTERED, text));
        }
        if exchange.request.usage != USAGE_STANDARD {
            let text = format!("usage {:#x}", exchange.request.usage);
            return Err(Failure::Malformed(MalformedReason::INVALID_USAGE, text));
        }
        let code = ExitCode(code.ok_or_else(|| Failure::missing("exit code"))?);
        exchange.info_1()?;
        exchange.info_2()?;
        match code {
            ExitCode::READ_DR7
            | ExitCode::WRITE_DR7
            | ExitCode::RDTSC
            | ExitCode::RDTSCP
            | ExitCode::RDPMC
            | ExitCode::CPUID
            | ExitCode::MSR
            | ExitCode::VMMCALL
            | ExitCode::WBINVD
            | ExitCode::INVD
            | ExitCode::MONITOR
            | ExitCode::MWAIT => serve_instruction(code, exchange, cpu).map(|()| Reply::Resume),
            ExitCode::IOIO => serve_port(exchange, cpu).map(|()| Reply::Resume),
            ExitCode::MMIO_READ | ExitCode::MMIO_WRITE => {
                self.serve_mmio(code == ExitCode::MMIO_WRITE, exchange, cpu)
            }
            // IRET is not intercepted, so there is no NMI window to open.
            ExitCode::NMI_COMPLETE => Ok(Reply::Resume),
            ExitCode::AP_RESET_HOLD => {
                if let Some(context) = self.context_mut(vcpu, vmpl) {
                    context.hold = Some(Hold::Page(exchange.gpa));
                }
                Ok(Reply::Hold)
            }
            ExitCode::AP_JUMP_TABLE => self.serve_jump_table(exchange),
            ExitCode::PAGE_STATE_CHANGE => {
                let offset = exchange.scratch(0)?;
                let outcome = self.change_page_states(vmpl, exchange, offset);
                exchange.put(Field::EXIT_INFO_2, outcome.0);
                Ok(Reply::Resume)
            }
            ExitCode::GUEST_REQUEST | ExitCode::EXTENDED_GUEST_REQUEST => {
                self.serve_guest_request(code, exchange)
            }
            ExitCode::AP_CREATION => {
                let (info_1, vmsa) = (exchange.info_1()?, exchange.info_2()?);
                // Everything but DESTROY needs RAX, and its absence is found first.
                let destroys = info_1 as u16 == ApRequest::DESTROY.0;
                let features = if destroys {
                    0
                } else {
                    exchange.get(Field::RAX, "RAX")?
                };
                self.create_ap(vmpl, info_1, vmsa, features)
                    .map_err(Failure::input)
            }
            ExitCode::GET_APIC_IDS => self.serve_apic_ids(exchange),
            ExitCode::RUN_VMPL => {
                let target = exchange.info_1()?;
                let target = self.can_run(vcpu, target).ok_or_else(|| {
                    Failure::input(format!("run VMPL{target}: there is no VMSA for it"))
                })?;
                Ok(Reply::Run(target))
            }
            ExitCode::HYPERVISOR_FEATURES => {
                exchange.put(Field::EXIT_INFO_2, self.hypervisor_features().bits());
                Ok(Reply::Resume)
            }
            ExitCode::TERMINATE => {
                let reason = protocols::ghcb::event::decode_terminate(exchange.info_1()?);
                Ok(Reply::Terminate {
                    set: reason.set.0,
                    code: reason.code,
                })
            }
            ExitCode::UNSUPPORTED_EVENT => Err(Failure::Fatal(format!(
                "{vmpl} reports an unsupported event: exit code {:#x}, info {:#x}",
                exchange.info_1()?,
                exchange.info_2()?
            ))),
            _ => {
                let text = format!("unknown exit code {:#x}", code.0);
                Err(Failure::Malformed(MalformedReason::INVALID_EVENT, text))
            }
        }
    }

    fn serve_mmio(
        &mut self,
        write: bool,
        exchange: &mut Exchange,
        cpu: &mut dyn Cpu,
    ) -> Result<Reply, Failure> {
        let gpa = Gpa::new(exchange.info_1()?);
        let len = exchange.info_2()?;
        if !matches!(len, 1 | 2 | 4 | 8) {
            return Err(Failure::input(format!("MMIO of {len:#x} bytes")));
        }
        let offset = exchange.scratch(len as usize)?;
        let last = gpa.checked_add(len - 1);
        let same_page = last.is_some_and(|last| last.frame() == gpa.frame());
        if !same_page {
            return Err(Failure::input(format!("MMIO at {gpa} crosses a page")));
        }
        let mut bytes = [0; 8];
        let count = len as usize;
        if write {
            let data = exchange.buffer(offset, count).unwrap_or_default();
            bytes[..data.len()].copy_from_slice(data);
        }
        match self.host.layout().place(gpa) {
            None if write => cpu.mmio_write(gpa, len as u8, u64::from_le_bytes(bytes)),
            None => bytes = cpu.mmio_read(gpa, len as u8).to_le_bytes(),
            // The host's emulator reaches shared memory as well as devices.
            Some(place) if self.host.attribute(&place) == Alias::Shared => {
                let spa = place.spa.plus(gpa.offset_in_page());
                if write {
                    self.memory.write(spa, &bytes[..count]);
                } else {
                    self.memory.read(spa, &mut bytes[..count]);
                }
            }
            Some(_) => return Err(Failure::input(format!("MMIO at {gpa}: private memory"))),
        }
        if !write {
            exchange.write_buffer(offset, &bytes[..count]);
        }
        Ok(Reply::Resume)
    }

    /// The SEV-ES jump table: the host only remembers the address.
    fn serve_jump_table(&mut self, exchange: &mut Exchange) -> Result<Reply, Failure> {
        match exchange.info_1()? {
            0 => self.ap_jump_table = exchange.info_2()?,
            1 => exchange.put(Field::EXIT_INFO_2, self.ap_jump_table),
            other => return Err(Failure::input(format!("AP jump table request {other:#x}"))),
        }
        Ok(Reply::Resume)
    }

    /// The list of APIC ids: how many pages it needs, or the list itself.
    fn serve_apic_ids(&mut self, exchange: &mut Exchange) -> Result<Reply, Failure> {
        let offered = exchange.get(Field::RAX, "RAX")?;
        let count = self.vcpu_count();
        let bytes = (u64::from(count) + 1) * APIC_ID_BYTES;
        let needed = bytes.div_ceil(PAGE_SIZE);
        if offered < needed {
            exchange.put(Field::RAX, needed);
            return Ok(Reply::Resume);
        }
        let gpa = Gpa::new(exchange.info_1()?);
        let mut list: Vec<u8> = count.to_le_bytes().to_vec();
        list.extend((0..count).flat_map(u32::to_le_bytes));
        for (page, chunk) in list.chunks(PAGE_SIZE as usize).enumerate() {
            let at = gpa.checked_add(page as u64 * PAGE_SIZE);
            let spa = at.and_then(|at| self.shared_page(at)).ok_or_else(|| {
                Failure::input(format!("APIC id list at {gpa}: not {needed} shared pages"))
            })?;
            self.memory.write(spa, chunk);
        }
        exchange.put(Field::RAX, needed);
        Ok(Reply::Resume)
    }

    /// Ends the wait of a context for a start-up IPI. `sipi` is false when the wait ends for
    /// another reason. Returns whether it waited.
    pub fn release_hold(&mut self, vcpu: VcpuId, vmpl: Vmpl, sipi: bool) -> bool {
        let Some(hold) = self
            .context_mut(vcpu, vmpl)
            .and_then(|context| context.hold.take())
        else {
            return false;
        };
        match hold {
            Hold::Msr => {
                let response = protocols::ghcb::msr::Response::ApResetHold { released: sipi };
                self.set_ghcb_msr(vcpu, vmpl, response.encode());
            }
            Hold::Page(gpa) => {
                if let Some(spa) = self.shared_page(gpa) {
                    let at = spa.plus(Field::EXIT_INFO_2.offset() as u64);
                    self.memory.write_u64(at, u64::from(sipi));
                }
            }
        }
        true
    }
}
