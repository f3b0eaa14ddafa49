//! The host's side of TDG.VP.VMCALL (§4), as KVM and QEMU answer.
//!
//! The host trusts nothing: it sees the registers that the guest passes, checks them, and writes R10
//! and what the sub-function returns.

use alloc::format;
use alloc::string::String;

use protocols::tdx::vmcall::register::{COUNT, R10, R11, R12, R13, R14, R15};
use protocols::tdx::vmcall::{Direction, FATAL_ERROR_TEXT, Status, SubFunction};

use super::page::is_private;
use super::tdcall::Gprs;
use super::{SHARED, Stop};
use crate::ghcb::Cpu;
use crate::memory::PhysicalMemory;
use crate::platform::{End, Platform};
use crate::settings::Hostile;
use crate::types::{Alias, Gpa, PAGE_SIZE, PageSize, VcpuId, Vmpl};

/// What follows an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// The guest goes on.
    Resume,
    /// The processor waits for an interrupt, or for an NMI if `blocked`.
    Halt {
        /// The guest has its interrupts off.
        blocked: bool,
    },
}

/// How much one MapGPA converts at most; the rest is to be asked for again.
const MAP_GPA_LIMIT: u64 = 16 << 20;

/// R10 for a hypercall of KVM's that there is not (KVM_ENOSYS).
const NO_HYPERCALL: u64 = 1000_i64.wrapping_neg().cast_unsigned();

impl<P: PhysicalMemory> Platform<P> {
    /// Answers a request; `seen` are the registers that the guest passes, the others zero.
    pub(super) fn serve_vmcall(
        &mut self,
        vcpu: VcpuId,
        seen: &mut Gprs,
        cpu: &mut dyn Cpu,
    ) -> Result<Answer, Stop> {
        if seen[R10] != 0 {
            // Not of the interface: a hypercall by R10's number.
            seen[R10] = NO_HYPERCALL;
            return Ok(Answer::Resume);
        }
        let mut answer = Answer::Resume;
        let status = match SubFunction(seen[R11]) {
            SubFunction::CPUID => {
                let [eax, ebx, ecx, edx] = cpu.cpuid(seen[R12] as u32, seen[R13] as u32);
                for (number, value) in [(R12, eax), (R13, ebx), (R14, ecx), (R15, edx)] {
                    seen[number] = u64::from(value);
                }
                Status::SUCCESS
            }
            SubFunction::HLT => {
                answer = Answer::Halt {
                    blocked: seen[R12] != 0,
                };
                Status::SUCCESS
            }
            SubFunction::IO => port_access(seen, cpu),
            SubFunction::RDMSR => match self.read_msr(vcpu, seen[R12] as u32, cpu) {
                Some(value) => {
                    seen[R11] = value;
                    Status::SUCCESS
                }
                None => Status::INVALID_OPERAND,
            },
            SubFunction::WRMSR if never_arrives(seen[R12], seen[R13]) => Status::SUCCESS,
            SubFunction::WRMSR => match self.write_msr(vcpu, seen[R12] as u32, seen[R13], cpu) {
                true => Status::SUCCESS,
                false => Status::INVALID_OPERAND,
            },
            SubFunction::MMIO => self.device_access(seen, cpu),
            SubFunction::GET_TD_VMCALL_INFO => get_info(seen),
            SubFunction::MAP_GPA => self.map_gpa(seen),
            SubFunction::GET_QUOTE => get_quote(seen),
            SubFunction::REPORT_FATAL_ERROR => return Err(Stop::End(fatal_error(seen))),
            _ => Status::SUBFUNCTION_UNSUPPORTED,
        };
        seen[R10] = status.0;
        Ok(answer)
    }

    fn read_msr(&mut self, vcpu: VcpuId, number: u32, cpu: &mut dyn Cpu) -> Option<u64> {
        let timer = self.td_mut().and_then(|td| td.vp(vcpu)).map(|vp| vp.timer);
        timer
            .and_then(|timer| timer.read(number, cpu))
            .unwrap_or_else(|| cpu.rdmsr(number))
    }

    fn write_msr(&mut self, vcpu: VcpuId, number: u32, value: u64, cpu: &mut dyn Cpu) -> bool {
        self.td_mut()
            .and_then(|td| td.vp(vcpu))
            .and_then(|vp| vp.timer.write(number, value, cpu))
            .unwrap_or_else(|| cpu.wrmsr(number, value))
    }

    /// MMIO: only where there is no memory.
    fn device_access(&self, seen: &mut Gprs, cpu: &mut dyn Cpu) -> Status {
        let (bytes, address) = (seen[R12], seen[R14]);
        let gpa = Gpa::new(address & !SHARED);
        let fits = matches!(bytes, 1 | 2 | 4 | 8)
            && address & SHARED != 0
            && address < SHARED << 1
            && address.is_multiple_of(bytes)
            && self.spa_of(gpa).is_none();
        if !fits {
            return Status::INVALID_OPERAND;
        }
        match Direction(seen[R13]) {
            Direction::READ => {
                seen[R11] = low_bytes(cpu.mmio_read(gpa, bytes as u8), bytes);
                Status::SUCCESS
            }
            Direction::WRITE => {
                cpu.mmio_write(gpa, bytes as u8, low_bytes(seen[R15], bytes));
                Status::SUCCESS
            }
            _ => Status::INVALID_OPERAND,
        }
    }

    /// MapGPA: by whole blocks where there are some, a bounded part at a time.
    fn map_gpa(&mut self, seen: &mut Gprs) -> Status {
        let (start, bytes) = (seen[R12], seen[R13]);
        let shared = start & SHARED;
        let to = if shared != 0 {
            Alias::Shared
        } else {
            Alias::Private
        };
        let within = start
            .checked_add(bytes)
            .filter(|&end| bytes != 0 && end - 1 < SHARED << 1 && (end - 1) & SHARED == shared);
        let Some(end) = within else {
            return Status::INVALID_OPERAND;
        };
        if !start.is_multiple_of(PAGE_SIZE) || !bytes.is_multiple_of(PAGE_SIZE) {
            return Status::ALIGN_ERROR;
        }
        if self.settings.is_hostile(Hostile::MapGpaRetry) {
            seen[R11] = start;
            return Status::RETRY;
        }
        self.host.count_range(to);
        let stop = end.min(start + MAP_GPA_LIMIT);
        let mut at = start;
        while at < stop {
            let gpa = Gpa::new(at & !SHARED);
            let Some(place) = self.host.layout().place(gpa) else {
                seen[R11] = at;
                return Status::INVALID_OPERAND;
            };
            let whole = gpa.is_aligned(PageSize::Size2M)
                && stop - at >= PageSize::Size2M.bytes()
                && place.block.is_some();
            let size = if whole {
                PageSize::Size2M
            } else {
                PageSize::Size4K
            };
            if to == Alias::Shared {
                self.forget_accepted(gpa, size);
            }
            if let Err(error) = self.convert(gpa, size, to) {
                self.refuse(
                    Vmpl::VMPL0,
                    Some(gpa),
                    format!("host cannot convert: {error:?}"),
                );
                seen[R11] = at;
                return Status::INVALID_OPERAND;
            }
            if to == Alias::Shared {
                self.host.note_validation(&place, size, false);
            }
            let counters = self.counters.vmpl(Vmpl::VMPL0);
            match to {
                Alias::Private => counters.psc_private_pages += size.pages(),
                Alias::Shared => counters.psc_shared_pages += size.pages(),
            }
            at += size.bytes();
        }
        if stop < end {
            seen[R11] = stop;
            return Status::RETRY;
        }
        Status::SUCCESS
    }

    /// What a trust domain gives away it has accepted no more: there is no rescind before.
    fn forget_accepted(&mut self, gpa: Gpa, size: PageSize) {
        let pages = (0..size.pages()).map(|page| Gpa::new(gpa.get() + page * PAGE_SIZE));
        let accepted = |gpa: &Gpa| {
            self.host.layout().place(*gpa).is_some_and(|place| {
                let entry = self.host.rmp().entry(&place);
                entry.is_assigned() && entry.is_validated()
            })
        };
        let bytes = pages.filter(accepted).count() as u64 * PAGE_SIZE;
        if bytes != 0 {
            self.book_validated(bytes, false);
        }
    }
}

/// Whether a write is an interrupt command whose vector is an exception's. A host may send it; the module
/// keeps such vectors from a trust domain, for which exceptions are the processor's alone.
fn never_arrives(number: u64, value: u64) -> bool {
    const X2APIC_ICR: u64 = 0x830;
    const FIRST_VECTOR: u64 = 32;
    /// Delivery modes that have a vector: fixed and lowest priority.
    const LOWEST_PRIORITY: u64 = 1;
    number == X2APIC_ICR && value >> 8 & 7 <= LOWEST_PRIORITY && value & 0xFF < FIRST_VECTOR
}

/// The processor that an interrupt command is for, if it sends an interrupt to one alone.
pub(crate) const fn interrupts(command: u64) -> Option<VcpuId> {
    /// Delivery mode, logical destination, shorthand: all zero for a fixed interrupt to one APIC id.
    const NOT_ONE: u64 = 7 << 8 | 1 << 11 | 3 << 18;
    if command & NOT_ONE != 0 {
        return None;
    }
    Some(VcpuId((command >> 32) as u32))
}

/// IN and OUT.
fn port_access(seen: &mut Gprs, cpu: &mut dyn Cpu) -> Status {
    let bytes = seen[R12];
    let port = u16::try_from(seen[R14]);
    let (Ok(port), 1 | 2 | 4) = (port, bytes) else {
        return Status::INVALID_OPERAND;
    };
    match Direction(seen[R13]) {
        Direction::READ => {
            seen[R11] = low_bytes(u64::from(cpu.io_in(port, bytes as u8)), bytes);
            Status::SUCCESS
        }
        Direction::WRITE => {
            cpu.io_out(port, bytes as u8, low_bytes(seen[R15], bytes) as u32);
            Status::SUCCESS
        }
        _ => Status::INVALID_OPERAND,
    }
}

/// The lowest `bytes` (1 to 8) of a value.
const fn low_bytes(value: u64, bytes: u64) -> u64 {
    value & (u64::MAX >> (64 - 8 * bytes))
}

/// GetTdVmCallInfo: nothing beyond the base interface.
fn get_info(seen: &mut Gprs) -> Status {
    if seen[R12] != 0 {
        return Status::INVALID_OPERAND;
    }
    for number in [R11, R12, R13, R14] {
        seen[number] = 0;
    }
    Status::SUCCESS
}

/// GetQuote: there is no quoting service here, and the host says so.
fn get_quote(seen: &Gprs) -> Status {
    let (buffer, bytes) = (seen[R12], seen[R13]);
    let shared = !is_private(buffer) && buffer < SHARED << 1;
    if !shared || !buffer.is_multiple_of(PAGE_SIZE) || bytes == 0 {
        return Status::INVALID_OPERAND;
    }
    Status::SUBFUNCTION_UNSUPPORTED
}

/// ReportFatalError: the code, and text up to the first zero.
fn fatal_error(seen: &[u64; COUNT]) -> End {
    let text: String = FATAL_ERROR_TEXT
        .into_iter()
        .flat_map(|number| seen[number].to_le_bytes())
        .take_while(|&byte| byte != 0)
        .map(|byte| match byte {
            b' '..=b'~' => char::from(byte),
            _ => '.',
        })
        .collect();
    End::FatalError {
        vmpl: Vmpl::VMPL0,
        code: seen[R12],
        text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupt_for_one_processor_is_known() {
        assert_eq!(interrupts(1 << 32 | 0x3F), Some(VcpuId(1)));
        for value in [
            1 << 32 | 4 << 8,
            1 << 32 | 1 << 11 | 0x3F,
            1 << 18 | 0x3F,
            3 << 18 | 0x3F,
        ] {
            assert_eq!(interrupts(value), None, "{value:#x}");
        }
    }

    #[test]
    fn vectors_of_exceptions_are_kept_back_and_nothing_else_is() {
        // Fixed and lowest priority; for all, and for one.
        for value in [0, 20, 31, 1 << 8 | 14, 2 << 18 | 16, 7 << 32 | 31] {
            assert!(never_arrives(0x830, value), "{value:#x}");
        }
        // Interrupts, NMI, INIT, start-up, and other registers.
        for (number, value) in [
            (0x830, 32),
            (0x830, 255),
            (0x830, 4 << 8),
            (0x830, 5 << 8),
            (0x830, 6 << 8 | 8),
            (0x832, 20),
        ] {
            assert!(!never_arrives(number, value), "{number:#x} {value:#x}");
        }
    }
}
