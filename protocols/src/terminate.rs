//! Why a guest ended itself: reason sets and codes of the GHCB termination request.
//!
//! A request carries a set (4 bits) and a code (8 bits) through the GHCB MSR (GHCB,
//! code 0x100) or through the exit code 0x8000_FFFE. Sets 0 and 1 are those of the GHCB
//! document and of Linux; set 5 is this project's. [`Reason`] prints any of them in one line
//! for humans.

use core::fmt;

open_enum! {
    /// Who defined the meaning of a termination code.
    pub struct ReasonSet(u8) {
        /// The GHCB document (GHCB, termination request).
        GENERIC = 0,
        /// Linux (`arch/x86/include/asm/sev-common.h`).
        LINUX = 1,
        /// This project.
        TURNSTILE = 5,
    }
}

/// Defines the codes of one set together with the sentence that explains each.
macro_rules! reasons {
    ($(#[$meta:meta])* $name:ident { $( $constant:ident = $value:literal, $text:literal; )+ }) => {
        open_enum! {
            $(#[$meta])*
            pub struct $name(u8) {
                $( #[doc = $text] $constant = $value, )+
            }
        }

        impl $name {
            /// One line for humans; none for an unknown code.
            #[must_use]
            pub const fn text(self) -> Option<&'static str> {
                match self {
                    $( Self::$constant => Some($text), )+
                    _ => None,
                }
            }
        }
    };
}

reasons! {
    /// Codes of [`ReasonSet::GENERIC`] (GHCB, termination request).
    GenericReason {
        GENERAL = 0, "the guest asked for termination without a reason";
        PROTOCOL_VERSION = 1, "the host's range of GHCB versions is not supported";
        SNP_FEATURES = 2, "the host lacks an SEV-SNP feature, or enabled one the guest cannot use";
    }
}

reasons! {
    /// Codes of [`ReasonSet::LINUX`] (Linux 7.2, `asm/sev-common.h`, GHCB_TERM_*).
    LinuxReason {
        REGISTER = 0, "registering the GHCB failed";
        PAGE_STATE_CHANGE = 1, "a page state change failed";
        PVALIDATE = 2, "PVALIDATE failed, or the page was already validated";
        NOT_VMPL0 = 3, "the kernel needs VMPL0 or a host with several VMPLs";
        CPUID = 4, "the CPUID table has no usable entry";
        CPUID_HV = 5, "a CPUID value the host has to supply is missing";
        SECRETS_PAGE = 6, "the secrets page is missing or unusable";
        NO_SVSM = 7, "not at VMPL0, but the secrets page names no SVSM";
        SVSM_VMPL0 = 8, "an SVSM is named, but for VMPL0";
        SVSM_CAA = 9, "the calling area is not page aligned";
        SECURE_TSC = 10, "setting up the secure TSC failed";
        SVSM_CA_REMAP_FAIL = 11, "the SVSM refused to remap the calling area";
        SECURE_AVIC = 12, "setting up Secure AVIC failed";
    }
}

reasons! {
    /// Codes of [`ReasonSet::TURNSTILE`]: why the paravisor ended the machine.
    TurnstileReason {
        INTERNAL = 0, "an error inside the paravisor (its panic message is in the log)";
        LAUNCH_PARAMS = 1, "the launch parameter page has a wrong magic, version or content";
        C_BIT = 2, "CPUID's C-bit position is not the one the image was built for";
        SEV_STATUS = 3, "SEV_STATUS lacks SNP or has features the paravisor does not support";
        CPUID_PAGE = 4, "the CPUID page has too many entries or reserved bits set";
        VP_COUNT = 5, "the host's number of virtual processors is zero or too large";
        MAP_EMPTY = 6, "the host's memory map has no memory";
        MAP_UNSORTED = 7, "the host's memory map is not sorted";
        MAP_OVERLAP = 8, "entries of the host's memory map overlap";
        MAP_WRAP = 9, "an entry of the host's memory map wraps or reaches the C-bit";
        MAP_TOO_MANY = 10, "the host's memory map has more entries than supported, or no end";
        MAP_OWN_MISSING = 11, "the paravisor's own range is not memory in the host's memory map";
        FIRMWARE = 12, "the firmware or one of its areas lies outside the guest's memory";
        OUT_OF_MEMORY = 13, "no memory for the paravisor's own tables";
        GHCB_VERSION = 14, "the host does not offer GHCB protocol version 2";
        GHCB_FEATURES = 15, "the host lacks SNP, AP creation or the VMPL feature";
        GHCB_REGISTER = 16, "the host did not confirm the registered GHCB address";
        GHCB_PAGE_STATE = 17, "the host refused or garbled a page state change";
        GHCB_REPLY = 18, "the host answered a request with an unknown or wrong code";
        GHCB_MALFORMED = 19, "the host called a request malformed or asked for an exception";
        RUN_VMPL = 20, "the host refused to run the guest's VMPL";
        AP_CREATION = 21, "the host refused to create or start a virtual processor";
        PVALIDATE = 22, "PVALIDATE failed on a page the paravisor needs";
        RMPADJUST = 23, "RMPADJUST failed on a page the paravisor needs";
        ALREADY_VALID = 24, "a page never validated before was already valid: the host lied";
        NOT_VALIDATED = 25, "a page on record as valid was not: the host took or replaced it";
        EXCEPTION = 26, "an exception the paravisor does not handle";
        VC_UNEXPECTED = 27, "a #VC with an exit code the paravisor does not handle";
        GUEST_VMSA = 28, "the guest's VMSA has state the paravisor does not accept";
        GUEST_LOST = 29, "the guest's VMSA cannot be stopped or restarted";
        APIC_IDS = 30, "the host's list of APIC ids does not fit its virtual processors";
        NATIVE_CHECK = 40, "a check of the native platform failed (the log says which)";
        NATIVE_PROCESSOR = 41, "the native platform's processor lacks FSGSBASE, SMEP or SMAP";
        NATIVE_ONLY = 42, "the native platform has no privilege levels to run or to start";
        TD_ONLY = 50, "a trust domain has no privilege levels to run or to start";
        TD_INFO = 51, "the trust domain's address width or number of processors is not supported";
        TD_PARTITIONING = 52, "the trust domain has no L2 VM for the guest";
        TD_ACCEPT = 53, "TDG.MEM.PAGE.ACCEPT failed on a page the paravisor needs";
        TD_ATTRIBUTES = 54, "TDG.MEM.PAGE.ATTR.WR failed on a page the guest needs";
        TD_FIELD = 55, "the module refused a field of the guest's L2 VM";
        TD_ENTER = 56, "the module refused to enter the guest's L2 VM";
        TD_VMCALL = 57, "the module or the host refused a request of the paravisor's";
        TD_MAP_GPA = 58, "the host refused to convert pages, or made no progress";
        TD_PROCESSORS = 59, "a processor of the trust domain did not leave the reset vector";
        VE_UNEXPECTED = 60, "a #VE the paravisor does not handle";
        L2_SHUTDOWN = 61, "the guest shut a processor of its down (triple fault)";
        L2_EXIT = 62, "the guest stopped for something the paravisor does not handle";
        L2_MEMORY = 63, "the guest used memory that it has not accepted, and asked not to be told";
    }
}

/// Where the paravisor ends a machine that has no termination request, the native one: QEMU's
/// `isa-debug-exit` at this port.
pub const NATIVE_EXIT_PORT: u16 = 0xF4;
/// What it writes there: as the emulated machine does when it was asked to end
/// (`report::Outcome::Terminated`).
pub const NATIVE_EXIT_VALUE: u32 = 0x13;

/// A set and a code, as they are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Reason {
    /// The set; only 4 bits fit on the wire.
    pub set: ReasonSet,
    /// The code within the set.
    pub code: u8,
}

impl Reason {
    /// A reason of the paravisor's own set.
    #[must_use]
    pub const fn turnstile(reason: TurnstileReason) -> Self {
        Self {
            set: ReasonSet::TURNSTILE,
            code: reason.0,
        }
    }

    /// One line for humans without the numbers; none if set or code is unknown.
    #[must_use]
    pub const fn text(self) -> Option<&'static str> {
        match self.set {
            ReasonSet::GENERIC => GenericReason(self.code).text(),
            ReasonSet::LINUX => LinuxReason(self.code).text(),
            ReasonSet::TURNSTILE => TurnstileReason(self.code).text(),
            _ => None,
        }
    }

    /// The constant's name; none if set or code is unknown.
    #[must_use]
    pub const fn name(self) -> Option<&'static str> {
        match self.set {
            ReasonSet::GENERIC => GenericReason(self.code).name(),
            ReasonSet::LINUX => LinuxReason(self.code).name(),
            ReasonSet::TURNSTILE => TurnstileReason(self.code).name(),
            _ => None,
        }
    }
}

/// `turnstile 8 (MAP_OVERLAP): entries of the host's memory map overlap`, for any set and code.
impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.set {
            ReasonSet::GENERIC => write!(f, "generic {}", self.code)?,
            ReasonSet::LINUX => write!(f, "linux {}", self.code)?,
            ReasonSet::TURNSTILE => write!(f, "turnstile {}", self.code)?,
            ReasonSet(set) => write!(f, "set {set} code {}", self.code)?,
        }
        match (self.name(), self.text()) {
            (Some(name), Some(text)) => write!(f, " ({name}): {text}"),
            _ => f.write_str(": unknown reason"),
        }
    }
}

/// Explains a set and a code in one line; what `xtask` and the machine print.
#[must_use]
pub const fn explain(set: u8, code: u8) -> Reason {
    Reason {
        set: ReasonSet(set),
        code,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    #[test]
    fn every_set_explains_itself() {
        assert_eq!(
            explain(5, 8).to_string(),
            "turnstile 8 (MAP_OVERLAP): entries of the host's memory map overlap"
        );
        assert!(
            explain(1, 2)
                .to_string()
                .starts_with("linux 2 (PVALIDATE): ")
        );
        assert!(
            explain(0, 1)
                .to_string()
                .starts_with("generic 1 (PROTOCOL_VERSION): ")
        );
    }

    #[test]
    fn unknown_reasons_are_printed_as_numbers() {
        assert_eq!(explain(5, 200).to_string(), "turnstile 200: unknown reason");
        assert_eq!(explain(9, 3).to_string(), "set 9 code 3: unknown reason");
    }

    #[test]
    fn a_reason_of_ours_is_in_our_set() {
        let reason = Reason::turnstile(TurnstileReason::GHCB_REGISTER);
        assert_eq!(reason, explain(5, 16));
        assert_eq!(reason.name(), Some("GHCB_REGISTER"));
    }
}
