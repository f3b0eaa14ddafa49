//! TDG.VP.VMCALL: what a trust domain asks of the host (Guest-Hypervisor Communication Interface).
//!
//! R10 is 0 and R11 the sub-function; R10 of the answer is the status. RCX names the registers that
//! the host gets to see and may write; the others stay the guest's.

open_enum! {
    /// R11: what is asked for.
    pub struct SubFunction(u64) {
        /// CPUID of the leaf in R12 and the subleaf in R13; the answer is in R12 to R15.
        CPUID = 0x0A,
        /// HLT; R12 is 1 if interrupts are off.
        HLT = 0x0C,
        /// Port access: R12 bytes, R13 [`Direction`], R14 port, R15 data; the answer is in R11.
        IO = 0x1E,
        /// RDMSR of the number in R12; the answer is in R11.
        RDMSR = 0x1F,
        /// WRMSR of R13 to the number in R12.
        WRMSR = 0x20,
        /// Access to a device's memory: R12 bytes, R13 [`Direction`], R14 shared address, R15 data;
        /// the answer is in R11.
        MMIO = 0x30,
        /// Which of the optional ones there are.
        GET_TD_VMCALL_INFO = 0x1_0000,
        /// Makes the R13 bytes from R12 shared if R12 has the shared bit, else private.
        MAP_GPA = 0x1_0001,
        /// A quote for the report in the shared buffer at R12, R13 bytes long.
        GET_QUOTE = 0x1_0002,
        /// The guest cannot go on: R12 the code, and text in R14, R15, RBX, RDI, RSI, R8, R9, RDX.
        REPORT_FATAL_ERROR = 0x1_0003,
    }
}

open_enum! {
    /// R10 of the answer.
    pub struct Status(u64) {
        /// Done.
        SUCCESS = 0,
        /// Partly done: to be called again from the address in R11 on.
        RETRY = 1,
        /// An operand is wrong.
        INVALID_OPERAND = 1 << 63,
        /// The page is used otherwise.
        GPA_IN_USE = 1 << 63 | 1,
        /// An address or size is not whole pages.
        ALIGN_ERROR = 1 << 63 | 2,
        /// There is no such sub-function.
        SUBFUNCTION_UNSUPPORTED = 1 << 63 | 3,
    }
}

open_enum! {
    /// R13 of [`SubFunction::IO`] and [`SubFunction::MMIO`].
    pub struct Direction(u64) {
        /// From the device.
        READ = 0,
        /// To the device.
        WRITE = 1,
    }
}

/// Numbers of the general registers: their bits in RCX, their places in a register file.
pub mod register {
    /// How many there are.
    pub const COUNT: usize = 16;
    /// RAX.
    pub const RAX: usize = 0;
    /// RCX.
    pub const RCX: usize = 1;
    /// RDX.
    pub const RDX: usize = 2;
    /// RBX.
    pub const RBX: usize = 3;
    /// RSP.
    pub const RSP: usize = 4;
    /// RBP.
    pub const RBP: usize = 5;
    /// RSI.
    pub const RSI: usize = 6;
    /// RDI.
    pub const RDI: usize = 7;
    /// R8.
    pub const R8: usize = 8;
    /// R9.
    pub const R9: usize = 9;
    /// R10.
    pub const R10: usize = 10;
    /// R11.
    pub const R11: usize = 11;
    /// R12.
    pub const R12: usize = 12;
    /// R13.
    pub const R13: usize = 13;
    /// R14.
    pub const R14: usize = 14;
    /// R15.
    pub const R15: usize = 15;
}

/// What RCX may not have: RAX, RCX and RSP are never passed.
pub const NEVER_PASSED: u64 = 1 << register::RAX | 1 << register::RCX | 1 << register::RSP;

/// What RCX may have at all: sixteen general registers and sixteen XMM registers.
pub const PASSABLE: u64 = 0xFFFF_FFFF & !NEVER_PASSED;

/// The registers that carry the text of [`SubFunction::REPORT_FATAL_ERROR`], in the order of the
/// text.
pub const FATAL_ERROR_TEXT: [usize; 8] = [
    register::R14,
    register::R15,
    register::RBX,
    register::RDI,
    register::RSI,
    register::R8,
    register::R9,
    register::RDX,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_registers_linux_passes_may_be_passed() {
        // RDX, RBX, RSI, RDI, R8 to R15.
        assert_eq!(0xFFCC & !PASSABLE, 0);
        for number in [register::RAX, register::RCX, register::RSP] {
            assert_ne!(1 << number & !PASSABLE, 0);
        }
    }
}
