//! Long mode: 16-byte gates, one stack frame for every case (APM 8.9).

use protocols::vmsa::{Segment, SegmentAttributes};

use crate::guest::GuestMemory;

use super::{DeliveryError, Frame, gate, rflags};

/// Where RSP0 and IST1 are in a 64-bit TSS (APM figure 12-8).
const RSP0: u64 = 4;
const IST1: u64 = 0x24;

impl Frame {
    pub(super) fn deliver_long(
        &mut self,
        memory: &mut impl GuestMemory,
        vector: u8,
        error: u32,
    ) -> Result<(), DeliveryError> {
        let gate: [u8; 16] = self.table(memory, self.idtr, u64::from(vector) * 16)?;
        let gate = u128::from_le_bytes(gate);
        let kind = (gate >> 40 & 0x1F) as u8;
        let present = gate >> 47 & 1 == 1;
        if !present || !matches!(kind, gate::INTERRUPT | gate::TRAP) {
            return Err(DeliveryError::DoubleFault);
        }
        let target =
            (gate & 0xFFFF) | (gate >> 48 & 0xFFFF) << 16 | (gate >> 64 & 0xFFFF_FFFF) << 32;
        let ist = (gate >> 32 & 7) as u64;
        let (code, level) = self.handler(memory, (gate >> 16 & 0xFFFF) as u16)?;
        if !code.attributes.is_long() {
            return Err(DeliveryError::DoubleFault);
        }
        let inner = level < self.cpl();
        let stack = match ist {
            0 if !inner => self.rsp,
            0 => self.stack_of_tss(memory, RSP0 + 8 * u64::from(level))?,
            n => self.stack_of_tss(memory, IST1 + 8 * (n - 1))?,
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
        if !is_canonical(bottom) {
            return Err(DeliveryError::DoubleFault);
        }
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
        self.enter_flags(kind == gate::INTERRUPT);
        Ok(())
    }

    fn stack_of_tss(&self, memory: &impl GuestMemory, offset: u64) -> Result<u64, DeliveryError> {
        self.table(memory, self.tr, offset).map(u64::from_le_bytes)
    }
}

/// Whether bits 63 to 47 are equal. No guest is offered five levels of tables.
const fn is_canonical(address: u64) -> bool {
    (address.cast_signed() << 16 >> 16).cast_unsigned() == address
}
