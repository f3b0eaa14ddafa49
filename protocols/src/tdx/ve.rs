//! #VE, the virtualization exception: why it was raised, as TDG.VP.VEINFO.GET tells.

/// Vector of #VE. It has no error code.
pub const VECTOR: u8 = 20;

open_enum! {
    /// Basic exit reasons of Intel's virtualization (SDM volume 3, appendix C), as far as they reach
    /// a trust domain.
    pub struct ExitReason(u32) {
        /// An exception or an NMI.
        EXCEPTION_OR_NMI = 0,
        /// An interrupt.
        EXTERNAL_INTERRUPT = 1,
        /// The processor shut down.
        TRIPLE_FAULT = 2,
        /// An interrupt can be taken.
        INTERRUPT_WINDOW = 7,
        /// An NMI can be taken.
        NMI_WINDOW = 8,
        /// A switch to another task.
        TASK_SWITCH = 9,
        /// CPUID.
        CPUID = 10,
        /// GETSEC.
        GETSEC = 11,
        /// HLT.
        HLT = 12,
        /// INVD.
        INVD = 13,
        /// RDPMC.
        RDPMC = 15,
        /// RDTSC.
        RDTSC = 16,
        /// RSM.
        RSM = 17,
        /// VMCALL.
        VMCALL = 18,
        /// VMCLEAR, the first of the VMX instructions without VMCALL and those that came later.
        VMCLEAR = 19,
        /// VMXON, the last of these.
        VMXON = 27,
        /// A control register.
        CR_ACCESS = 28,
        /// A debug register.
        DR_ACCESS = 29,
        /// IN, OUT and their string forms.
        IO = 30,
        /// RDMSR.
        RDMSR = 31,
        /// WRMSR.
        WRMSR = 32,
        /// The entry failed: the state is none that a processor can have. With bit 31.
        ENTRY_FAILED_STATE = 1 << 31 | 33,
        /// MWAIT.
        MWAIT = 36,
        /// MONITOR.
        MONITOR = 39,
        /// The task priority is below its threshold.
        TPR_BELOW_THRESHOLD = 43,
        /// The service of an interrupt has ended that L1 wants to hear of.
        VIRTUALIZED_EOI = 45,
        /// An access that the extended page tables do not allow.
        EPT_VIOLATION = 48,
        /// INVEPT.
        INVEPT = 50,
        /// RDTSCP.
        RDTSCP = 51,
        /// INVVPID.
        INVVPID = 53,
        /// WBINVD.
        WBINVD = 54,
        /// XSETBV.
        XSETBV = 55,
        /// ENCLS.
        ENCLS = 60,
        /// PCONFIG.
        PCONFIG = 65,
        /// ENCLV.
        ENCLV = 70,
        /// SEAMCALL.
        SEAMCALL = 76,
        /// TDCALL.
        TDCALL = 77,
    }
}

bitflags::bitflags! {
    /// Exit qualification of [`ExitReason::EPT_VIOLATION`] (SDM volume 3, table 29-7).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct EptViolation: u64 {
        /// A data read.
        const READ = 1 << 0;
        /// A data write.
        const WRITE = 1 << 1;
        /// An instruction fetch.
        const FETCH = 1 << 2;
        /// The linear address is told.
        const LINEAR_ADDRESS = 1 << 7;
        /// The access was to what the linear address leads to, not to a table on the way.
        const FINAL = 1 << 8;
    }
}

/// Exit qualification of [`ExitReason::IO`] (SDM volume 3, table 29-5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortAccess {
    /// 1, 2 or 4.
    pub bytes: u8,
    /// IN or INS.
    pub input: bool,
    /// INS or OUTS.
    pub string: bool,
    /// With REP.
    pub repeated: bool,
    /// The port is part of the instruction.
    pub immediate: bool,
    /// Which port.
    pub port: u16,
}

impl PortAccess {
    /// The qualification.
    #[must_use]
    pub const fn encode(self) -> u64 {
        (self.bytes as u64).wrapping_sub(1) & 7
            | (self.input as u64) << 3
            | (self.string as u64) << 4
            | (self.repeated as u64) << 5
            | (self.immediate as u64) << 6
            | (self.port as u64) << 16
    }
}

/// What TDG.VP.VEINFO.GET returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VeInfo {
    /// RCX: why.
    pub reason: ExitReason,
    /// RDX: more about it.
    pub qualification: u64,
    /// R8: guest-linear address of an EPT violation.
    pub gla: u64,
    /// R9: guest-physical address of an EPT violation, with the shared bit.
    pub gpa: u64,
    /// R10, lower half: bytes of the instruction; 0 for EPT violations.
    pub instruction_length: u32,
    /// R10, upper half.
    pub instruction_info: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_access_is_encoded_as_in_the_table() {
        let out = PortAccess {
            bytes: 1,
            input: false,
            string: false,
            repeated: false,
            immediate: false,
            port: 0x3F8,
        };
        assert_eq!(out.encode(), 0x3F8_0000);
        let rep_insd = PortAccess {
            bytes: 4,
            input: true,
            string: true,
            repeated: true,
            ..out
        };
        assert_eq!(rep_insd.encode(), 0x3F8_0000 | 0x3B);
    }
}
