//! Delivery of #VC in software: what the CPU does between an exception and its handler.
//!
//! Covers long mode with compatibility mode (same level, inner level by RSP0, IST), protected
//! mode with 16-bit and 32-bit gates (same and inner level) and real mode. Not covered: task
//! gates, virtual-8086 mode, handlers in the LDT. No access or dirty bits are set, as no guest
//! that handles #VC depends on them.
//!
//! Invariant: registers change only when the whole frame has been pushed.

mod legacy;
mod long;
#[cfg(test)]
mod tests;

use protocols::vmsa::{Segment, SegmentAttributes};

use crate::types::Alias;

use super::GuestMemory;
use super::walk::{Access, Paging, pages};

/// Vector of #VC (APM 8.2.24).
pub const VECTOR_VC: u8 = 29;

/// RFLAGS bits that delivery looks at or changes.
mod rflags {
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
}

/// Gate types (APM 4.8.3): of 64 or 32 bits, and of 16 bits; a trap gate leaves IF alone.
mod gate {
    pub const TASK: u8 = 0x5;
    pub const INTERRUPT_16: u8 = 0x6;
    pub const TRAP_16: u8 = 0x7;
    pub const INTERRUPT: u8 = 0xE;
    pub const TRAP: u8 = 0xF;
}

/// The registers that delivery reads and writes.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// Translation registers.
    pub paging: Paging,
    /// CS.
    pub cs: Segment,
    /// SS.
    pub ss: Segment,
    /// IDTR.
    pub idtr: Segment,
    /// GDTR.
    pub gdtr: Segment,
    /// TR, which VMRUN does not switch: the caller has stored it.
    pub tr: Segment,
    /// RFLAGS.
    pub rflags: u64,
    /// RIP of the instruction that caused the exception.
    pub rip: u64,
    /// RSP.
    pub rsp: u64,
}

/// Why there was no delivery.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeliveryError {
    /// A gate, segment or stack is not usable, which is a contributory exception behind a
    /// contributory one: #DF (APM 8.2.9).
    DoubleFault,
    /// A table or stack is not mapped: #PF, which follows #VC as it follows any exception that
    /// is no page fault itself (APM table 8-3).
    PageFault {
        /// For CR2.
        address: u64,
        /// The error code of #PF.
        code: u32,
    },
    /// The guest's set-up is one that this module does not carry out.
    Unsupported,
}

impl Frame {
    const fn cpl(&self) -> u8 {
        self.ss.attributes.dpl()
    }

    /// Pushes the frame of `vector` with `error` and points the registers at its handler. In
    /// real mode no exception has an error code.
    pub fn deliver(
        &mut self,
        memory: &mut impl GuestMemory,
        vector: u8,
        error: u32,
    ) -> Result<(), DeliveryError> {
        if self.paging.cr0 & 1 == 0 {
            self.deliver_real(memory, vector)
        } else if self.rflags & rflags::VM != 0 {
            Err(DeliveryError::Unsupported)
        } else if self.paging.has_c_bit() {
            self.deliver_long(memory, vector, error)
        } else {
            self.deliver_protected(memory, vector, error)
        }
    }

    fn enter_flags(&mut self, interrupt_gate: bool) {
        self.rflags &= !(rflags::TF | rflags::NT | rflags::RF | rflags::VM);
        if interrupt_gate {
            self.rflags &= !rflags::IF;
        }
    }

    /// A segment of the GDT; a null selector, one into the LDT, or one that is not present
    /// cannot be used.
    fn segment(&self, memory: &impl GuestMemory, selector: u16) -> Result<Segment, DeliveryError> {
        const PRESENT: u16 = 1 << 7;
        const NO_SYSTEM: u16 = 1 << 4;
        const LDT: u16 = 4;
        if selector & !3 == 0 || selector & LDT != 0 {
            return Err(DeliveryError::DoubleFault);
        }
        let descriptor: [u8; 8] = self.table(memory, self.gdtr, u64::from(selector & !7))?;
        let descriptor = u64::from_le_bytes(descriptor);
        let attributes =
            SegmentAttributes((descriptor >> 40 & 0xFF | descriptor >> 52 << 8 & 0xF00) as u16);
        if attributes.0 & PRESENT == 0 || attributes.0 & NO_SYSTEM == 0 {
            return Err(DeliveryError::DoubleFault);
        }
        let raw_limit = (descriptor & 0xFFFF | descriptor >> 32 & 0xF_0000) as u32;
        let granular = attributes.0 & 1 << 11 != 0;
        Ok(Segment {
            selector,
            attributes,
            limit: if granular {
                raw_limit << 12 | 0xFFF
            } else {
                raw_limit
            },
            base: descriptor >> 16 & 0xFF_FFFF | descriptor >> 56 << 24,
        })
    }

    /// The handler's code segment, and the level it runs at: its own, or for a conforming
    /// segment the level of the interrupted code.
    fn handler(
        &self,
        memory: &impl GuestMemory,
        selector: u16,
    ) -> Result<(Segment, u8), DeliveryError> {
        const CODE: u16 = 1 << 3;
        const CONFORMING: u16 = 1 << 2;
        let mut code = self.segment(memory, selector)?;
        let dpl = code.attributes.dpl();
        if code.attributes.0 & CODE == 0 || dpl > self.cpl() {
            return Err(DeliveryError::DoubleFault);
        }
        let level = if code.attributes.0 & CONFORMING != 0 {
            self.cpl()
        } else {
            dpl
        };
        code.selector = selector & !3 | u16::from(level);
        Ok((code, level))
    }

    /// Bytes of a descriptor table or TSS, if they are within its limit.
    fn table<const N: usize>(
        &self,
        memory: &impl GuestMemory,
        table: Segment,
        offset: u64,
    ) -> Result<[u8; N], DeliveryError> {
        if offset + N as u64 - 1 > u64::from(table.limit) {
            return Err(DeliveryError::DoubleFault);
        }
        self.read_virtual(memory, table.base.wrapping_add(offset))
    }

    fn read_virtual<const N: usize>(
        &self,
        memory: &impl GuestMemory,
        address: u64,
    ) -> Result<[u8; N], DeliveryError> {
        let mut bytes = [0; N];
        for (at, part) in pages(address, N) {
            let to = self
                .paging
                .translate(memory, at, Access::default())
                .map_err(|fault| DeliveryError::PageFault {
                    address: at,
                    code: fault.code,
                })?;
            if !memory.read(to.gpa, &mut bytes[part]) {
                return Err(DeliveryError::DoubleFault);
            }
        }
        Ok(bytes)
    }

    fn write_virtual(
        &self,
        memory: &mut impl GuestMemory,
        address: u64,
        data: &[u8],
    ) -> Result<(), DeliveryError> {
        let access = Access {
            write: true,
            ..Access::default()
        };
        for (at, part) in pages(address, data.len()) {
            let to = self.paging.translate(memory, at, access).map_err(|fault| {
                DeliveryError::PageFault {
                    address: at,
                    code: fault.code,
                }
            })?;
            // A stack in shared memory is the guest's own doing, but no guest does that. One
            // that is not validated would be #VC behind #VC.
            if to.alias == Alias::Shared || !memory.write(to.gpa, &data[part]) {
                return Err(DeliveryError::DoubleFault);
            }
        }
        Ok(())
    }
}
