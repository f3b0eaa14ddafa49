//! Exit codes: one number space with three users.
//!
//! The same numbers appear as EXITCODE of the VMCB and GUEST_EXITCODE of the VMSA, as error
//! code of #VC, and as SW_EXITCODE in the GHCB; software extends them from 0x8000_0000.

open_enum! {
    /// An exit code (APM appendix C and table 15-33; from 0x8000_0000: GHCB, list of non-automatic events).
    pub struct ExitCode(u64) {
        /// Read of DR7.
        READ_DR7 = 0x27,
        /// Write of DR7.
        WRITE_DR7 = 0x37,
        /// Exception #DB.
        EXCEPTION_DB = 0x41,
        /// Exception #UD.
        EXCEPTION_UD = 0x46,
        /// Exception #AC.
        EXCEPTION_AC = 0x51,
        /// Exception #MC.
        EXCEPTION_MC = 0x52,
        /// Physical interrupt.
        INTR = 0x60,
        /// NMI.
        NMI = 0x61,
        /// INIT.
        INIT = 0x63,
        /// Virtual interrupt window.
        VINTR = 0x64,
        /// RDTSC.
        RDTSC = 0x6E,
        /// RDPMC.
        RDPMC = 0x6F,
        /// CPUID.
        CPUID = 0x72,
        /// IRET.
        IRET = 0x74,
        /// INVD.
        INVD = 0x76,
        /// PAUSE.
        PAUSE = 0x77,
        /// HLT.
        HLT = 0x78,
        /// Port input or output.
        IOIO = 0x7B,
        /// RDMSR or WRMSR.
        MSR = 0x7C,
        /// Triple fault.
        SHUTDOWN = 0x7F,
        /// VMRUN.
        VMRUN = 0x80,
        /// VMMCALL without the prefix of VMGEXIT.
        VMMCALL = 0x81,
        /// RDTSCP.
        RDTSCP = 0x87,
        /// WBINVD.
        WBINVD = 0x89,
        /// MONITOR.
        MONITOR = 0x8A,
        /// MWAIT.
        MWAIT = 0x8B,
        /// XSETBV.
        XSETBV = 0x8D,
        /// RDPRU.
        RDPRU = 0x8E,
        /// EFER was written (trap).
        EFER_WRITE_TRAP = 0x8F,
        /// Nested page fault; as #VC only with the reserved bit: MMIO.
        NPF = 0x400,
        /// VMGEXIT.
        VMGEXIT = 0x403,
        /// Access to a page that is not validated; only as #VC, address in CR2.
        PAGE_NOT_VALIDATED = 0x404,
        /// Event that cannot be restarted.
        NOT_RESTARTABLE = 0x406,

        /// MMIO read.
        MMIO_READ = 0x8000_0001,
        /// MMIO write.
        MMIO_WRITE = 0x8000_0002,
        /// NMI handling is complete.
        NMI_COMPLETE = 0x8000_0003,
        /// Wait for SIPI.
        AP_RESET_HOLD = 0x8000_0004,
        /// AP jump table.
        AP_JUMP_TABLE = 0x8000_0005,
        /// Page state change by a list.
        PAGE_STATE_CHANGE = 0x8000_0010,
        /// Message to the security processor.
        GUEST_REQUEST = 0x8000_0011,
        /// The same with a certificate buffer.
        EXTENDED_GUEST_REQUEST = 0x8000_0012,
        /// Create or destroy a virtual processor.
        AP_CREATION = 0x8000_0013,
        /// #HV doorbell page.
        HV_DOORBELL = 0x8000_0014,
        /// IPI under restricted injection.
        HV_IPI = 0x8000_0015,
        /// Timer under restricted injection.
        HV_TIMER = 0x8000_0016,
        /// List of APIC IDs.
        GET_APIC_IDS = 0x8000_0017,
        /// Run another VMPL.
        RUN_VMPL = 0x8000_0018,
        /// Query hypervisor features.
        HYPERVISOR_FEATURES = 0x8000_FFFD,
        /// Terminate.
        TERMINATE = 0x8000_FFFE,
        /// An event the guest does not support.
        UNSUPPORTED_EVENT = 0x8000_FFFF,

        /// VMRUN found the state invalid.
        INVALID = u64::MAX,
        /// VMRUN found the VMSA busy.
        BUSY = u64::MAX - 1,
    }
}
