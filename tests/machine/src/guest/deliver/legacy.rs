//! Protected mode outside long mode, and real mode.

use protocols::vmsa::Segment;

use crate::guest::GuestMemory;

use super::{DeliveryError, Frame, gate, rflags};

/// D/B of a data segment: the stack pointer has 32 bits.
const BIG: u16 = 1 << 10;
const EXPAND_DOWN: u16 = 1 << 2;
const WRITABLE: u16 = 1 << 1;
const CODE: u16 = 1 << 3;

/// A stack that is being pushed onto.
struct Stack {
    segment: Segment,
    pointer: u32,
    /// Bytes of one push.
    width: u32,
}

impl Stack {
    const fn mask(&self) -> u32 {
        if self.segment.attributes.0 & BIG != 0 {
            u32::MAX
        } else {
            0xFFFF
        }
    }

    /// Whether a push to `offset` is within the limit, for segments that grow either way.
    const fn admits(&self, offset: u32) -> bool {
        let Some(last) = offset.checked_add(self.width - 1) else {
            return false;
        };
        if self.segment.attributes.0 & (CODE | EXPAND_DOWN) == EXPAND_DOWN {
            offset > self.segment.limit && last <= self.mask()
        } else {
            last <= self.segment.limit
        }
    }

    fn push(
        &mut self,
        cpu: &Frame,
        memory: &mut impl GuestMemory,
        value: u32,
    ) -> Result<(), DeliveryError> {
        let mask = self.mask();
        let offset = self.pointer.wrapping_sub(self.width) & mask;
        if !self.admits(offset) {
            return Err(DeliveryError::DoubleFault);
        }
        let at = self.segment.base.wrapping_add(u64::from(offset)) & 0xFFFF_FFFF;
        let bytes = value.to_le_bytes();
        cpu.write_virtual(memory, at, &bytes[..self.width as usize])?;
        self.pointer = self.pointer & !mask | offset;
        Ok(())
    }
}

impl Frame {
    pub(super) fn deliver_protected(
        &mut self,
        memory: &mut impl GuestMemory,
        vector: u8,
        error: u32,
    ) -> Result<(), DeliveryError> {
        let gate: [u8; 8] = self.table(memory, self.idtr, u64::from(vector) * 8)?;
        let gate = u64::from_le_bytes(gate);
        let kind = (gate >> 40 & 0x1F) as u8;
        if gate >> 47 & 1 == 0 {
            return Err(DeliveryError::DoubleFault);
        }
        let (width, offset_mask) = match kind {
            gate::INTERRUPT | gate::TRAP => (4, 0xFFFF_FFFF),
            gate::INTERRUPT_16 | gate::TRAP_16 => (2, 0xFFFF),
            gate::TASK => return Err(DeliveryError::Unsupported),
            _ => return Err(DeliveryError::DoubleFault),
        };
        let (code, level) = self.handler(memory, (gate >> 16 & 0xFFFF) as u16)?;
        let inner = level < self.cpl();
        let (segment, pointer) = if inner {
            self.inner_stack(memory, level)?
        } else {
            (self.ss, self.rsp as u32)
        };
        let mut stack = Stack {
            segment,
            pointer,
            width,
        };
        if inner {
            stack.push(self, memory, u32::from(self.ss.selector))?;
            stack.push(self, memory, self.rsp as u32)?;
        }
        for value in [
            (self.rflags | rflags::RF) as u32,
            u32::from(self.cs.selector),
            self.rip as u32,
            error,
        ] {
            stack.push(self, memory, value)?;
        }
        self.rsp = u64::from(stack.pointer);
        self.ss = stack.segment;
        self.rip = (gate & 0xFFFF | gate >> 48 << 16) & offset_mask;
        self.cs = code;
        self.enter_flags(matches!(kind, gate::INTERRUPT | gate::INTERRUPT_16));
        Ok(())
    }

    /// The stack that the TSS, of 32 or of 16 bits, has for `level`.
    fn inner_stack(
        &self,
        memory: &impl GuestMemory,
        level: u8,
    ) -> Result<(Segment, u32), DeliveryError> {
        const TSS_32: u16 = 1 << 3;
        let level = u64::from(level);
        let (pointer, selector) = if self.tr.attributes.0 & TSS_32 != 0 {
            let raw = u64::from_le_bytes(self.table(memory, self.tr, 4 + 8 * level)?);
            (raw as u32, (raw >> 32) as u16)
        } else {
            let raw = u32::from_le_bytes(self.table(memory, self.tr, 2 + 4 * level)?);
            (raw & 0xFFFF, (raw >> 16) as u16)
        };
        let segment = self.segment(memory, selector)?;
        let usable = segment.attributes.0 & (CODE | WRITABLE) == WRITABLE
            && u64::from(segment.attributes.dpl()) == level
            && u64::from(selector & 3) == level;
        if usable {
            Ok((segment, pointer))
        } else {
            Err(DeliveryError::DoubleFault)
        }
    }

    pub(super) fn deliver_real(
        &mut self,
        memory: &mut impl GuestMemory,
        vector: u8,
    ) -> Result<(), DeliveryError> {
        let entry: [u8; 4] = self.table(memory, self.idtr, u64::from(vector) * 4)?;
        let entry = u32::from_le_bytes(entry);
        let mut stack = Stack {
            segment: self.ss,
            pointer: self.rsp as u32,
            width: 2,
        };
        for value in [
            self.rflags as u32,
            u32::from(self.cs.selector),
            self.rip as u32,
        ] {
            stack.push(self, memory, value & 0xFFFF)?;
        }
        self.rsp = self.rsp & !0xFFFF_FFFF | u64::from(stack.pointer);
        self.cs.selector = (entry >> 16) as u16;
        self.cs.base = u64::from(entry >> 16) << 4;
        self.rip = u64::from(entry & 0xFFFF);
        self.rflags &= !(rflags::TF | rflags::IF | rflags::RF | rflags::AC);
        Ok(())
    }
}
