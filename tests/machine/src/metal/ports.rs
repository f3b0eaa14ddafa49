//! I/O ports that mean something to the machine, whoever uses them: the guest directly, or the
//! host on its behalf for a GHCB request.
//!
//! * the machine's console and exit ports: no guest can forge a report;
//! * the ways to switch off or reset: they end the run, with a report;
//! * fw_cfg: what it says about memory is filtered.
//!
//! Every other port goes through to QEMU's devices.

use machine::fwcfg_filter::{
    Dma, Filter, PORT_DATA, PORT_DMA_HIGH, PORT_DMA_LOW, PORT_SELECTOR, patch_e820,
};
use machine::memory::PhysicalMemory;
use machine::platform::End;
use machine::power::{self, Power};
use machine::types::{Gpa, Spa};

use super::finish::EXIT_PORT;
use super::memory::{DirectMap, Layout, Range};
use super::{console, cpu, fwcfg};

/// First and last port of fw_cfg: selector, data, and the DMA address register.
pub const FW_CFG: core::ops::RangeInclusive<u16> = 0x510..=0x51B;

/// Ports whose accesses the machine has to see even if the guest may use ports directly.
pub fn watched() -> impl Iterator<Item = u16> {
    FW_CFG
        .chain([
            console::PORT,
            EXIT_PORT,
            EXIT_PORT + 1,
            EXIT_PORT + 2,
            EXIT_PORT + 3,
        ])
        .chain(power::WATCHED)
}

/// The state behind the ports.
pub struct Ports {
    /// Knows what the guest reads from fw_cfg.
    filter: Filter,
    /// Knows what ends the run.
    power: Power,
    /// The upper half of the DMA address, in the byte order of the device.
    dma_high: u32,
    /// What no device may be told to read or write.
    reserved: Range,
}

impl Ports {
    /// The ports of a machine with this memory; a guest that asks finds none from `low_end` to 4 GiB.
    pub fn new(layout: &Layout, low_end: Option<Gpa>) -> Self {
        Ports {
            filter: e820_filter(layout.reserved, low_end),
            power: Power::default(),
            dma_high: 0,
            reserved: layout.reserved,
        }
    }

    /// A guest reads a port.
    pub fn input(&mut self, port: u16, bytes: u8) -> u32 {
        match port {
            console::PORT | EXIT_PORT => u32::MAX,
            PORT_DATA => u32::from(self.filter.read(cpu::port_in(port, 1) as u8)),
            _ => cpu::port_in(port, bytes),
        }
    }

    /// A guest writes a port; some writes end the run.
    pub fn output(&mut self, port: u16, bytes: u8, value: u32) -> Option<End> {
        if let Some(end) = self.power.write(port, bytes, value) {
            return Some(end);
        }
        match port {
            console::PORT => return None,
            EXIT_PORT => return Some(End::GuestExit(u64::from(value))),
            PORT_SELECTOR => self.filter.select(value as u16),
            PORT_DMA_HIGH => {
                self.dma_high = value;
                return None;
            }
            PORT_DMA_LOW => {
                self.transfer(value);
                return None;
            }
            _ => {}
        }
        cpu::port_out(port, bytes, value);
        None
    }

    /// A DMA request of the guest: forwarded unless it points at the machine, then corrected.
    fn transfer(&mut self, low: u32) {
        let at = u64::from(u32::from_be(self.dma_high)) << 32 | u64::from(u32::from_be(low));
        let mut raw = [0; Dma::SIZE];
        DirectMap.read(Spa::new(at), &mut raw);
        let request = Dma::from_bytes(&raw);
        let buffer = request.buffer();
        if self.touches_machine(at, Dma::SIZE as u64) || self.touches_machine(buffer.0, buffer.1) {
            return;
        }
        cpu::port_out(PORT_DMA_HIGH, 4, self.dma_high);
        cpu::port_out(PORT_DMA_LOW, 4, low);
        if let Some(patch) = self.filter.complete(request) {
            DirectMap.write(Spa::new(patch.gpa.get()), patch.bytes);
        }
    }

    fn touches_machine(&self, start: u64, bytes: u64) -> bool {
        start < self.reserved.end && start.saturating_add(bytes) > self.reserved.start
    }
}

/// The filter that shortens QEMU's own memory map by the machine's memory, and by all from `low_end`
/// on, if that is less.
fn e820_filter(reserved: Range, low_end: Option<Gpa>) -> Filter {
    const FILE: &str = "etc/e820";
    let selector = fwcfg::selector(FILE);
    let start = low_end.map_or(reserved.start, |end| end.get().min(reserved.start));
    let patched =
        fwcfg::file(FILE).and_then(|table| patch_e820(&table, start, reserved.end - start));
    match (selector, patched) {
        (Some(selector), Some(patched)) => Filter::new(selector, patched),
        // Without the file there is nothing to hide.
        _ => Filter::default(),
    }
}
