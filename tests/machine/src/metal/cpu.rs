//! Thin wrappers over single instructions and the machine's own descriptor tables.
//!
//! Safe functions here have no effect on the machine's memory safety: port and MSR accesses
//! go to devices and to registers that the machine itself does not depend on, except where a
//! function says otherwise.

#![expect(unsafe_code, reason = "single privileged instructions")]

use core::arch::asm;

use x86_64::instructions::port::Port;
use x86_64::registers::control::Cr4;
use x86_64::registers::model_specific::Msr;

/// MSR numbers used by the machine (AMD APM volume 2, appendix A).
pub mod msr {
    /// x2APIC and APIC enable, and the BSP flag.
    pub const APIC_BASE: u32 = 0x1B;
    /// x2APIC interrupt command register.
    pub const X2APIC_ICR: u32 = 0x830;
    /// x2APIC identifier.
    pub const X2APIC_ID: u32 = 0x802;
    /// Extended feature enables.
    pub const EFER: u32 = 0xC000_0080;
    /// Page attribute table.
    pub const PAT: u32 = 0x277;
    /// The value RDTSCP gives in ECX.
    pub const TSC_AUX: u32 = 0xC000_0103;
    /// SVM control; bit 4 disables SVM.
    pub const VM_CR: u32 = 0xC001_0114;
    /// Where VMRUN saves the host's state.
    pub const VM_HSAVE_PA: u32 = 0xC001_0117;
    pub use protocols::snp::msr::{GHCB, SEV_STATUS};
    pub use protocols::svsm::CAA_MSR as SVSM_CAA;
}

/// Physical address of the root of the page tables in use.
pub fn cr3() -> u64 {
    x86_64::registers::control::Cr3::read()
        .0
        .start_address()
        .as_u64()
}

/// Bits of CR4 whose change makes TCG flush all translations, and that the machine can do with
/// or without: PSE, PGE, SMEP, SMAP.
const CR4_INDIFFERENT: u64 = 1 << 4 | 1 << 7 | 1 << 20 | 1 << 21;

/// Gives the machine's CR4 the guest's choice of the bits that do not matter to the machine.
///
/// TCG compares old and new CR4 at VMRUN and at the exit; where they agree it saves a flush of
/// its caches each time, which is a good part of the cost of an exit.
pub fn match_cr4(guest: u64) {
    let own = Cr4::read_raw();
    let wanted = own & !CR4_INDIFFERENT | guest & CR4_INDIFFERENT;
    if own != wanted {
        // SAFETY: the machine maps no user pages (SMEP, SMAP), uses no 4 MiB pages (PSE) and
        // no global ones (PGE).
        unsafe { Cr4::write_raw(wanted) };
    }
}

/// Reads the time stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: RDTSC reads a counter and nothing else.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// A random number. RDRAND may run dry; the time stamp counter, mixed, then has to do: the keys
/// it feeds protect nothing in an emulated machine.
pub fn random() -> u64 {
    let mut value = 0;
    // SAFETY: every CPU model the machine runs on has RDRAND (`-cpu EPYC-Milan`).
    if unsafe { random_step(&mut value) } {
        value
    } else {
        tsc().wrapping_mul(0x9E37_79B9_7F4A_7C15)
    }
}

#[target_feature(enable = "rdrand")]
fn random_step(value: &mut u64) -> bool {
    core::arch::x86_64::_rdrand64_step(value) == 1
}

/// Reads a model-specific register.
pub fn rdmsr(number: u32) -> u64 {
    // SAFETY: reads only; TCG never faults on an unknown MSR (facts: RDMSR gives 0).
    unsafe { Msr::new(number).read() }
}

/// Writes a model-specific register on behalf of a guest, or one named in [`msr`].
///
/// The caller keeps its hands off EFER, LSTAR and the like, which the machine's own code
/// would notice; those live in the VMCB.
pub fn wrmsr(number: u32, value: u64) {
    // SAFETY: the registers the machine depends on (EFER, VM_HSAVE_PA) are written only by
    // `svm::enable`; all others are the guest's.
    unsafe { Msr::new(number).write(value) }
}

/// Whether writing `value` to an MSR would take from the machine what it runs on: SVM itself,
/// the page VMRUN saves the host in, or the APIC in x2APIC mode, which carries the NMIs between
/// CPUs.
pub fn is_forbidden_write(number: u32, value: u64) -> bool {
    match number {
        msr::EFER | msr::VM_CR | msr::VM_HSAVE_PA => true,
        msr::APIC_BASE => value & APIC_ENABLED != APIC_ENABLED,
        _ => false,
    }
}

/// APIC_BASE: enabled, and in x2APIC mode.
pub const APIC_ENABLED: u64 = 1 << 11 | 1 << 10;

/// CPUID as the physical (QEMU) processor answers it.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let r = core::arch::x86_64::__cpuid_count(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// Reads a port; `size` is 1, 2 or 4 bytes.
pub fn port_in(port: u16, size: u8) -> u32 {
    // SAFETY: a port read affects devices only.
    unsafe {
        match size {
            1 => u32::from(Port::<u8>::new(port).read()),
            2 => u32::from(Port::<u16>::new(port).read()),
            _ => Port::<u32>::new(port).read(),
        }
    }
}

/// Writes a port; `size` is 1, 2 or 4 bytes.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the size says how much is meant"
)]
pub fn port_out(port: u16, size: u8, value: u32) {
    // SAFETY: a port write affects devices only. A device told to DMA over the machine's own
    // memory is the one exception: no IOMMU stands in between (facts: tcg-svm.md §9).
    unsafe {
        match size {
            1 => Port::<u8>::new(port).write(value as u8),
            2 => Port::<u16>::new(port).write(value as u16),
            _ => Port::<u32>::new(port).write(value),
        }
    }
}

/// Waiting for another CPU, one turn at a time.
///
/// PAUSE takes QEMU's big lock (facts: tcg-svm.md §7), so it is not what a short wait is made
/// of. A long one means that the host of this machine runs something else in the place of the
/// CPU that is waited for; then PAUSE lets it have the processor.
#[derive(Default)]
pub struct Wait {
    turns: u32,
}

impl Wait {
    /// Turns between two PAUSEs; some tens of microseconds.
    const SPIN: u32 = 1 << 13;

    /// Lets a moment pass.
    pub fn turn(&mut self) {
        self.turns = self.turns.wrapping_add(1);
        if self.turns.is_multiple_of(Self::SPIN) {
            core::hint::spin_loop();
        } else {
            core::hint::black_box(());
        }
    }
}

/// Sets the class of interrupts that are held off, 0 to 15 (CR8).
pub fn set_task_priority(class: u64) {
    // SAFETY: interrupts are off in the machine whatever their class is; the guest has the register.
    unsafe { asm!("mov cr8, {}", in(reg) class, options(nomem, nostack, preserves_flags)) };
}

/// Stops this CPU for good.
pub fn stop() -> ! {
    loop {
        // SAFETY: interrupts are off and nothing is left to do.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}

/// Raises #UD in the machine itself.
pub fn undefined_instruction() -> ! {
    // SAFETY: the handler of the exception ends the run.
    unsafe { asm!("ud2", options(noreturn)) }
}
