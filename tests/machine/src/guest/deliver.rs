//! Delivery of #VC in software: what the CPU does between an exception and its handler.
//!
//! Covers 64-bit gates (same level, inner level by RSP0, IST) and 32-bit gates at the same
//! level, which is what firmware has in its reset code. No access or dirty bits are set and no
//! segment limit is checked, as no guest that handles #VC depends on either.

use protocols::vmsa::{Segment, SegmentAttributes};

use crate::types::Alias;

use super::GuestMemory;
use super::walk::{Access, Paging, pages};

/// Vector of #VC (APM 8.2.24).
pub const VECTOR_VC: u8 = 29;

/// RFLAGS bits that delivery changes.
mod rflags {
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
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
    /// A table or stack that delivery needs is unmapped, or the gate is not usable: #DF.
    DoubleFault,
    /// Real mode, or a change of level outside long mode: nothing here can do that.
    Unsupported,
}

impl Frame {
    const fn cpl(&self) -> u8 {
        self.ss.attributes.dpl()
    }

    /// Pushes the frame of `vector` with `error` and points the registers at its handler.
    pub fn deliver(
        &mut self,
        memory: &mut impl GuestMemory,
        vector: u8,
        error: u32,
    ) -> Result<(), DeliveryError> {
        if self.paging.cr0 & 1 == 0 {
            return Err(DeliveryError::Unsupported);
        }
        if self.paging.has_c_bit() {
            self.deliver_64(memory, vector, error)
        } else {
            self.deliver_32(memory, vector, error)
        }
    }

    fn deliver_64(
        &mut self,
        memory: &mut impl GuestMemory,
        vector: u8,
        error: u32,
    ) -> Result<(), DeliveryError> {
        let offset = u64::from(vector) * 16;
        let gate: [u8; 16] = self.table(memory, self.idtr, offset)?;
        let gate = u128::from_le_bytes(gate);
        let kind = (gate >> 40 & 0x1F) as u8;
        let present = gate >> 47 & 1 == 1;
        if !present || !matches!(kind, 0xE | 0xF) {
            return Err(DeliveryError::DoubleFault);
        }
        let target =
            (gate & 0xFFFF) | (gate >> 48 & 0xFFFF) << 16 | (gate >> 64 & 0xFFFF_FFFF) << 32;
        let selector = (gate >> 16 & 0xFFFF) as u16;
        let ist = (gate >> 32 & 7) as u64;
        let code = self.code_segment(memory, selector)?;
        let level = code.attributes.dpl();
        if !code.attributes.is_long() || level > self.cpl() {
            return Err(DeliveryError::DoubleFault);
        }
        let inner = level < self.cpl();
        let stack = match ist {
            0 if !inner => self.rsp,
            // RSP0 is at 4 in the TSS, IST1 at 0x24 (APM figure 12-8).
            0 => self.tss(memory, 4 + 8 * u64::from(level))?,
            n => self.tss(memory, 0x24 + 8 * (n - 1))?,
        };
        let frame = [
            u64::from(error),
            self.rip,
            u64::from(self.cs.selector),
            self.rflags | rflags::RF,
            self.rsp,
            u64::from(self.ss.selector),
        ];
        let mut bytes = [0; 48];
        for (slot, value) in bytes.chunks_exact_mut(8).zip(frame) {
            slot.copy_from_slice(&value.to_le_bytes());
        }
        let bottom = (stack & !0xF).wrapping_sub(48);
        self.write_virtual(memory, bottom, &bytes)?;
        self.rsp = bottom;
        self.rip = target as u64;
        self.cs = code;
        if inner {
            // A null selector whose DPL still says the level: TCG takes CPL from there.
            self.ss = Segment {
                selector: u16::from(level),
                attributes: SegmentAttributes(0x93 | u16::from(level) << 5),
                limit: u32::MAX,
                base: 0,
            };
        }
        self.enter_flags(kind == 0xE);
        Ok(())
    }

    fn deliver_32(
        &mut self,
        memory: &mut impl GuestMemory,
        vector: u8,
        error: u32,
    ) -> Result<(), DeliveryError> {
        let gate: [u8; 8] = self.table(memory, self.idtr, u64::from(vector) * 8)?;
        let gate = u64::from_le_bytes(gate);
        let kind = (gate >> 40 & 0x1F) as u8;
        if gate >> 47 & 1 == 0 || !matches!(kind, 0xE | 0xF) {
            return Err(DeliveryError::DoubleFault);
        }
        let code = self.code_segment(memory, (gate >> 16 & 0xFFFF) as u16)?;
        if code.attributes.dpl() != self.cpl() {
            return Err(DeliveryError::Unsupported);
        }
        let frame = [
            error,
            self.rip as u32,
            u32::from(self.cs.selector),
            (self.rflags | rflags::RF) as u32,
        ];
        let mut bytes = [0; 16];
        for (slot, value) in bytes.chunks_exact_mut(4).zip(frame) {
            slot.copy_from_slice(&value.to_le_bytes());
        }
        let esp = (self.rsp as u32).wrapping_sub(16);
        self.write_virtual(memory, self.ss.base.wrapping_add(u64::from(esp)), &bytes)?;
        self.rsp = u64::from(esp);
        self.rip = gate & 0xFFFF | gate >> 48 << 16;
        self.cs = code;
        self.enter_flags(kind == 0xE);
        Ok(())
    }

    fn enter_flags(&mut self, interrupt_gate: bool) {
        self.rflags &= !(rflags::TF | rflags::NT | rflags::RF | rflags::VM);
        if interrupt_gate {
            self.rflags &= !rflags::IF;
        }
    }

    fn code_segment(
        &self,
        memory: &impl GuestMemory,
        selector: u16,
    ) -> Result<Segment, DeliveryError> {
        // Handlers live in the GDT; a null or LDT selector would be #GP, hence #DF.
        if selector & !3 == 0 || selector & 4 != 0 {
            return Err(DeliveryError::DoubleFault);
        }
        let descriptor: [u8; 8] = self.table(memory, self.gdtr, u64::from(selector & !7))?;
        let descriptor = u64::from_le_bytes(descriptor);
        let attributes =
            SegmentAttributes((descriptor >> 40 & 0xFF | descriptor >> 52 << 8 & 0xF00) as u16);
        // Present, and a code segment.
        if attributes.0 & 0x98 != 0x98 {
            return Err(DeliveryError::DoubleFault);
        }
        let raw_limit = (descriptor & 0xFFFF | descriptor >> 32 & 0xF_0000) as u32;
        let granular = attributes.0 & 1 << 11 != 0;
        Ok(Segment {
            selector: selector & !3 | u16::from(attributes.dpl()),
            attributes,
            limit: if granular {
                raw_limit << 12 | 0xFFF
            } else {
                raw_limit
            },
            base: descriptor >> 16 & 0xFF_FFFF | descriptor >> 56 << 24,
        })
    }

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

    fn tss(&self, memory: &impl GuestMemory, offset: u64) -> Result<u64, DeliveryError> {
        self.table(memory, self.tr, offset).map(u64::from_le_bytes)
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
                .map_err(|_| DeliveryError::DoubleFault)?;
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
            let to = self
                .paging
                .translate(memory, at, access)
                .map_err(|_| DeliveryError::DoubleFault)?;
            // A stack in shared memory is the guest's own doing, but no guest does that.
            if to.alias == Alias::Shared || !memory.write(to.gpa, &data[part]) {
                return Err(DeliveryError::DoubleFault);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Pages;
    use super::*;

    const IDT: u64 = 0x10_0000;
    const GDT: u64 = 0x10_1000;
    const TSS: u64 = 0x10_2000;
    const STACK: u64 = 0x10_4000;
    const RSP0: u64 = 0x10_6000;
    const IST1: u64 = 0x10_8000;
    const HANDLER: u64 = 0xFFFF_8000_1234_5678;
    const CODE_64: u64 = 0x00AF_9B00_0000_FFFF;
    const CODE_32: u64 = 0x00CF_9B00_0000_FFFF;

    /// The first 2 MiB, private, and tables for a 64-bit or 32-bit handler.
    fn memory(ist: u64) -> Pages {
        let mut memory = Pages::default();
        memory.put(0x1000, 0x2007);
        memory.put(0x2000, 0x3007);
        memory.put(0x3000, 0x87 | 1 << crate::vcpu::C_BIT);
        let gate = IDT + 29 * 16;
        memory.put(
            gate,
            HANDLER & 0xFFFF | 0x18 << 16 | ist << 32 | 0x8E << 40 | (HANDLER >> 16 & 0xFFFF) << 48,
        );
        memory.put(gate + 8, HANDLER >> 32);
        memory.put(
            IDT + 29 * 8,
            0x4321 | 0x08 << 16 | 0x8F << 40 | 0x8765 << 48,
        );
        memory.put(GDT + 8, CODE_32);
        memory.put(GDT + 0x18, CODE_64);
        // The TSS keeps its stack pointers on odd multiples of 4.
        memory.put(TSS, RSP0 << 32);
        memory.put(TSS + 0x20, IST1 << 32);
        for top in [STACK, RSP0, IST1] {
            memory.put(top - 8, 0);
        }
        memory
    }

    fn table(base: u64) -> Segment {
        Segment {
            base,
            limit: 0xFFF,
            ..Segment::default()
        }
    }

    fn frame(cpl: u16) -> Frame {
        Frame {
            paging: Paging {
                cr0: 1 << 31 | 1,
                cr3: 0x1000,
                cr4: 1 << 5,
                efer: 0x500,
            },
            cs: Segment {
                selector: 0x33,
                attributes: SegmentAttributes::CODE64,
                ..table(0)
            },
            ss: Segment {
                selector: 0x2B,
                attributes: SegmentAttributes(0x93 | cpl << 5),
                ..table(0)
            },
            idtr: table(IDT),
            gdtr: table(GDT),
            tr: table(TSS),
            rflags: 0x302,
            rip: 0x1111,
            rsp: STACK - 0x18,
        }
    }

    fn pushed(memory: &Pages, rsp: u64) -> [u64; 6] {
        core::array::from_fn(|n| memory.get(rsp + 8 * n as u64))
    }

    #[test]
    fn same_level_pushes_onto_the_aligned_stack() {
        let mut memory = memory(0);
        let mut cpu = frame(0);
        cpu.deliver(&mut memory, VECTOR_VC, 0x72).unwrap();
        assert_eq!(cpu.rsp, STACK - 0x20 - 48);
        assert_eq!(
            pushed(&memory, cpu.rsp),
            [0x72, 0x1111, 0x33, 0x302 | rflags::RF, STACK - 0x18, 0x2B]
        );
        assert_eq!(
            (cpu.rip, cpu.cs.selector, cpu.ss.selector),
            (HANDLER, 0x18, 0x2B)
        );
        // An interrupt gate: IF and TF are cleared.
        assert_eq!(cpu.rflags, 2);
    }

    #[test]
    fn an_inner_level_gets_its_stack_from_the_tss() {
        let mut memory = memory(0);
        let mut cpu = frame(3);
        cpu.deliver(&mut memory, VECTOR_VC, 0x7B).unwrap();
        assert_eq!(cpu.rsp, RSP0 - 48);
        assert_eq!((cpu.ss.selector, cpu.ss.attributes.dpl()), (0, 0));
        assert_eq!(pushed(&memory, cpu.rsp)[5], 0x2B);
    }

    #[test]
    fn an_ist_is_taken_at_any_level() {
        for cpl in [0, 3] {
            let mut memory = memory(1);
            let mut cpu = frame(cpl);
            cpu.deliver(&mut memory, VECTOR_VC, 0x404).unwrap();
            assert_eq!(cpu.rsp, IST1 - 48, "CPL {cpl}");
        }
    }

    #[test]
    fn firmware_without_paging_gets_a_32_bit_frame() {
        let mut memory = memory(0);
        let mut cpu = frame(0);
        cpu.paging = Paging {
            cr0: 1,
            cr3: 0,
            cr4: 0,
            efer: 0,
        };
        cpu.rsp = STACK;
        cpu.deliver(&mut memory, VECTOR_VC, 0x72).unwrap();
        assert_eq!(cpu.rsp, STACK - 16);
        assert_eq!(memory.get(cpu.rsp), 0x72 | 0x1111 << 32);
        assert_eq!(memory.get(cpu.rsp + 8), 0x33 | (0x302 | rflags::RF) << 32);
        assert_eq!((cpu.rip, cpu.cs.selector), (0x8765_4321, 0x08));
        // A trap gate: IF stays.
        assert_eq!(cpu.rflags, 0x202);
    }

    #[test]
    fn what_cannot_be_delivered_is_a_double_fault() {
        let mut stackless = frame(0);
        stackless.rsp = 0x20_0000_0000;
        let mut short = frame(0);
        short.idtr.limit = 29 * 16 + 14;
        let mut no_handler = frame(0);
        no_handler.idtr.base = TSS;
        for mut cpu in [stackless, short, no_handler] {
            let error = cpu.deliver(&mut memory(0), VECTOR_VC, 0).unwrap_err();
            assert_eq!(error, DeliveryError::DoubleFault);
        }
    }

    #[test]
    fn a_stack_in_shared_memory_is_a_double_fault() {
        let mut memory = memory(0);
        memory.put(0x3000, 0x87);
        let error = frame(0).deliver(&mut memory, VECTOR_VC, 0).unwrap_err();
        assert_eq!(error, DeliveryError::DoubleFault);
    }

    #[test]
    fn real_mode_is_not_supported() {
        let mut cpu = frame(0);
        cpu.paging.cr0 = 0x10;
        let error = cpu.deliver(&mut memory(0), VECTOR_VC, 0).unwrap_err();
        assert_eq!(error, DeliveryError::Unsupported);
    }
}
