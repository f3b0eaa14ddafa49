//! The permission maps for ports and MSRs: what a guest may use without an exit.
//!
//! Two of each: a direct level may use all but what the machine has to see, a strict one gets
//! #VC for everything that hardware reflects.

#![expect(unsafe_code, reason = "bitmaps the CPU reads")]

use machine::tdx::ve::{MsrClass, msr_class};

use super::cpu::msr;
use super::memory::OwnPages;
use super::ports;

const IOPM_PAGES: usize = 3;
const MSRPM_PAGES: usize = 2;

/// MSRs whose state a VMSA holds: hardware never reflects them (APM 15.35.3).
const SWITCHED: [u32; 14] = [
    0x10,  // TSC
    0x174, // SYSENTER_CS
    0x175, // SYSENTER_ESP
    0x176, // SYSENTER_EIP
    msr::PAT,
    0xC000_0081, // STAR
    0xC000_0082, // LSTAR
    0xC000_0083, // CSTAR
    0xC000_0084, // SFMASK
    0xC000_0100, // FS_BASE
    0xC000_0101, // GS_BASE
    0xC000_0102, // KERNEL_GS_BASE
    msr::TSC_AUX,
    0x48, // SPEC_CTRL
];

/// MSRs that the machine answers itself at every level.
const ANSWERED: [u32; 3] = [msr::EFER, msr::GHCB, msr::SEV_STATUS];

/// Physical addresses of the maps, shared by all CPUs.
#[derive(Clone, Copy, Debug)]
pub struct Permissions {
    ports: [u64; 2],
    msrs: [u64; 2],
    td_msrs: u64,
}

impl Permissions {
    /// Builds the maps.
    pub fn new() -> Self {
        let direct_ports = Bitmap::new(IOPM_PAGES, false);
        for port in ports::watched() {
            direct_ports.intercept(usize::from(port));
        }
        let strict_ports = Bitmap::new(IOPM_PAGES, true);

        let direct_msrs = Bitmap::new(MSRPM_PAGES, false);
        for number in ANSWERED {
            direct_msrs.intercept_msr(number, true, true);
        }
        // What interrupt commands do, and what the machine itself runs on, is not the guest's.
        for number in [msr::X2APIC_ICR, msr::APIC_BASE, msr::VM_CR] {
            direct_msrs.intercept_msr(number, false, true);
        }
        direct_msrs.intercept_msr(msr::VM_HSAVE_PA, true, true);
        let strict_msrs = Bitmap::new(MSRPM_PAGES, true);
        for number in SWITCHED {
            strict_msrs.allow_msr(number);
        }
        let td_msrs = Bitmap::new(MSRPM_PAGES, true);
        for number in Bitmap::all_msrs().filter(|&number| number != msr::EFER) {
            let caught = |write| msr_class(number, write) != MsrClass::Native;
            td_msrs.intercept_msr(number, caught(false), caught(true));
        }
        Permissions {
            ports: [direct_ports.physical(), strict_ports.physical()],
            msrs: [direct_msrs.physical(), strict_msrs.physical()],
            td_msrs: td_msrs.physical(),
        }
    }

    /// The port map of a level.
    pub fn ports(&self, strict: bool) -> u64 {
        self.ports[usize::from(strict)]
    }

    /// The MSR map of a trust domain's L1.
    pub fn td_msrs(&self) -> u64 {
        self.td_msrs
    }

    /// The MSR map of a level.
    pub fn msrs(&self, strict: bool) -> u64 {
        self.msrs[usize::from(strict)]
    }
}

/// The MSR map of one CPU's L2 VM.
pub struct L2Msrs(Bitmap);

impl L2Msrs {
    /// A map that catches all.
    pub fn new() -> Self {
        Self(Bitmap::new(MSRPM_PAGES, true))
    }

    /// Lets the VM use what `catches` (by number, and whether it is written) does not want and the
    /// processor switches. The CPU must not be in the guest.
    pub fn set(&mut self, catches: impl Fn(u32, bool) -> bool) {
        for number in SWITCHED {
            self.0
                .intercept_msr(number, catches(number, false), catches(number, true));
        }
    }

    /// Its physical address.
    pub fn physical(&self) -> u64 {
        self.0.physical()
    }
}

struct Bitmap(OwnPages);

impl Bitmap {
    fn new(pages: usize, all: bool) -> Self {
        let bitmap = Bitmap(OwnPages::new(pages));
        // SAFETY: the pages were just allocated for this.
        unsafe {
            bitmap
                .0
                .pointer::<u8>()
                .write_bytes(if all { 0xFF } else { 0 }, pages * 4096)
        };
        bitmap
    }

    fn physical(&self) -> u64 {
        self.0.physical()
    }

    fn set(&self, bit: usize, value: bool) {
        // SAFETY: callers pass bits inside the map's pages; no CPU is in a guest with it.
        unsafe {
            let byte = self.0.pointer::<u8>().add(bit / 8);
            let mask = 1 << (bit % 8);
            *byte = if value { *byte | mask } else { *byte & !mask };
        }
    }

    fn intercept(&self, bit: usize) {
        self.set(bit, true);
    }

    /// All that the map can name.
    fn all_msrs() -> impl Iterator<Item = u32> {
        let ranges = [0, 0xC000_0000, 0xC001_0000];
        ranges.into_iter().flat_map(|first| first..first + 0x2000)
    }

    /// First of an MSR's two bits (read, write), if one of the map's three ranges has it
    /// (APM 15.11).
    fn msr_bit(number: u32) -> Option<usize> {
        let (range, index) = match number {
            0..=0x1FFF => (0, number),
            0xC000_0000..=0xC000_1FFF => (1, number - 0xC000_0000),
            0xC001_0000..=0xC001_1FFF => (2, number - 0xC001_0000),
            _ => return None,
        };
        Some(range * 0x800 * 8 + index as usize * 2)
    }

    fn intercept_msr(&self, number: u32, read: bool, write: bool) {
        if let Some(bit) = Self::msr_bit(number) {
            self.set(bit, read);
            self.set(bit + 1, write);
        }
    }

    fn allow_msr(&self, number: u32) {
        self.intercept_msr(number, false, false);
    }
}
