//! The virtual APIC of an L2 VM: the page that L1 keeps, and what the processor does with it
//! (SDM volume 3, chapter 31).

use protocols::tdx::vmcs::apic;

use crate::memory::PhysicalMemory;
use crate::types::Spa;

/// The page, with the guest interrupt status: RVI in bits 7:0, SVI in bits 15:8.
pub struct VirtualApic<'a, P> {
    memory: &'a P,
    page: Spa,
    /// Guest interrupt status.
    pub status: u16,
}

/// Priority class of a vector or priority.
const fn class(value: u8) -> u8 {
    value >> 4
}

impl<'a, P: PhysicalMemory> VirtualApic<'a, P> {
    /// The page at `page`.
    pub const fn new(memory: &'a P, page: Spa, status: u16) -> Self {
        Self {
            memory,
            page,
            status,
        }
    }

    const fn rvi(&self) -> u8 {
        self.status as u8
    }

    const fn svi(&self) -> u8 {
        (self.status >> 8) as u8
    }

    fn word(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.memory.read(self.page.plus(offset), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn set_word(&self, offset: u64, value: u32) {
        self.memory
            .write(self.page.plus(offset), &value.to_le_bytes());
    }

    /// RDMSR of an x2APIC register: 64 bits of the page.
    pub fn read(&self, number: u32) -> u64 {
        let offset = u64::from(number & 0xFF) << 4;
        u64::from(self.word(offset + 4)) << 32 | u64::from(self.word(offset))
    }

    /// Task priority.
    pub fn tpr(&self) -> u8 {
        self.word(apic::TPR) as u8
    }

    fn ppr(&self) -> u8 {
        self.word(apic::PPR) as u8
    }

    /// The highest vector that is set in ISR or IRR; 0 if none is.
    fn highest(&self, base: u64) -> u8 {
        (0..8_u8)
            .rev()
            .find_map(|index| {
                let word = self.word(base + u64::from(index) * 16);
                word.checked_ilog2().map(|bit| index * 32 + bit as u8)
            })
            .unwrap_or(0)
    }

    fn change(&self, base: u64, vector: u8, set: bool) {
        let (offset, bit) = apic::bit(vector);
        let word = self.word(base + offset);
        let mask = 1 << bit;
        self.set_word(base + offset, if set { word | mask } else { word & !mask });
    }

    /// PPR virtualization.
    pub fn update_ppr(&self) {
        let (tpr, svi) = (self.tpr(), self.svi());
        let ppr = if class(tpr) >= class(svi) {
            tpr
        } else {
            svi & 0xF0
        };
        self.set_word(apic::PPR, ppr.into());
    }

    /// The vector that waits and may be delivered.
    pub fn pending(&self) -> Option<u8> {
        (class(self.rvi()) > class(self.ppr())).then_some(self.rvi())
    }

    /// Virtual-interrupt delivery of what [`Self::pending`] says.
    pub fn deliver(&mut self, vector: u8) {
        self.change(apic::ISR, vector, true);
        self.set_word(apic::PPR, u32::from(vector & 0xF0));
        self.change(apic::IRR, vector, false);
        self.status = u16::from(vector) << 8 | u16::from(self.highest(apic::IRR));
    }

    /// Writes the task priority.
    pub fn set_tpr(&self, value: u8) {
        self.set_word(apic::TPR, value.into());
    }

    /// EOI virtualization; the vector whose service ended.
    pub fn end_of_interrupt(&mut self) -> u8 {
        let vector = self.svi();
        self.change(apic::ISR, vector, false);
        self.status = u16::from(self.highest(apic::ISR)) << 8 | u16::from(self.rvi());
        self.update_ppr();
        vector
    }

    /// Self-IPI virtualization.
    pub fn request(&mut self, vector: u8) {
        self.change(apic::IRR, vector, true);
        self.status = self.status & 0xFF00 | u16::from(self.rvi().max(vector));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Sparse;

    const PAGE: Spa = Spa::new(0x9000);

    fn apic(memory: &Sparse) -> VirtualApic<'_, Sparse> {
        VirtualApic::new(memory, PAGE, 0)
    }

    #[test]
    fn interrupts_are_delivered_by_priority_and_ended() {
        let memory = Sparse::default();
        let mut apic = apic(&memory);
        assert_eq!(apic.pending(), None);
        for vector in [0x31, 0x52, 0x55] {
            apic.request(vector);
        }
        assert_eq!(apic.pending(), Some(0x55));
        apic.deliver(0x55);
        // 0x52 is of the same class as what is in service.
        assert_eq!((apic.pending(), apic.status), (None, 0x5552));
        assert_eq!(apic.read(0x80A), 0x50);
        assert_eq!(apic.end_of_interrupt(), 0x55);
        assert_eq!((apic.pending(), apic.status), (Some(0x52), 0x52));
        apic.deliver(0x52);
        assert_eq!(apic.read(0x812), 1 << 18);
        assert_eq!(apic.read(0x821), 1 << 17);
        apic.end_of_interrupt();
        assert_eq!(apic.pending(), Some(0x31));
    }

    #[test]
    fn the_task_priority_holds_interrupts_back() {
        let memory = Sparse::default();
        let mut apic = apic(&memory);
        apic.request(0x31);
        apic.set_tpr(0x30);
        apic.update_ppr();
        assert_eq!(apic.pending(), None);
        apic.set_tpr(0x2F);
        apic.update_ppr();
        assert_eq!(apic.pending(), Some(0x31));
    }

    #[test]
    fn interrupts_nest() {
        let memory = Sparse::default();
        let mut apic = apic(&memory);
        apic.request(0x31);
        apic.deliver(0x31);
        apic.request(0x61);
        assert_eq!(apic.pending(), Some(0x61));
        apic.deliver(0x61);
        assert_eq!(apic.end_of_interrupt(), 0x61);
        assert_eq!(apic.status, 0x3100);
        assert_eq!(apic.read(0x80A), 0x30);
        assert_eq!(apic.end_of_interrupt(), 0x31);
        assert_eq!(apic.status, 0);
    }
}
