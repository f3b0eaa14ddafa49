//! Requests and responses that fit into the GHCB MSR (GHCB, MSR protocol).
//!
//! Bits 11:0 say what the value is; the rest is the payload. Encoding and decoding are written
//! once for both sides. Decoding never fails: what is not understood, or has reserved bits
//! set, is [`Request::Unknown`] or [`Response::Unknown`] with the value as it was.

use super::{HypervisorFeatures, PageOperation};
use crate::terminate::{Reason, ReasonSet};

/// Bits 11:0, which say what a value is.
pub const INFO_MASK: u64 = 0xFFF;
/// Frame number in a response that means "none" or "refused".
pub const NO_FRAME: u64 = (1 << 52) - 1;

open_enum! {
    /// Bits 11:0 of the MSR (GHCB, MSR protocol).
    pub struct Info(u16) {
        /// The rest is the address of a GHCB page.
        GHCB_GPA = 0x000,
        /// Response: version range and C-bit; also the MSR's reset value.
        SEV_INFO_RESPONSE = 0x001,
        /// Request of version range and C-bit.
        SEV_INFO_REQUEST = 0x002,
        /// Request of one CPUID register.
        CPUID_REQUEST = 0x004,
        /// Response with one CPUID register.
        CPUID_RESPONSE = 0x005,
        /// Request to wait for SIPI.
        AP_RESET_HOLD_REQUEST = 0x006,
        /// Response when SIPI has come.
        AP_RESET_HOLD_RESPONSE = 0x007,
        /// Request of the host's preferred GHCB.
        PREFERRED_GHCB_REQUEST = 0x010,
        /// Response with the preferred GHCB.
        PREFERRED_GHCB_RESPONSE = 0x011,
        /// Request to register a GHCB.
        REGISTER_GHCB_REQUEST = 0x012,
        /// Response to the registration.
        REGISTER_GHCB_RESPONSE = 0x013,
        /// Request to change one page's state.
        PAGE_STATE_REQUEST = 0x014,
        /// Response to the state change.
        PAGE_STATE_RESPONSE = 0x015,
        /// Request to run another VMPL.
        RUN_VMPL_REQUEST = 0x016,
        /// Response to that, seen when the requester runs again.
        RUN_VMPL_RESPONSE = 0x017,
        /// Request of the hypervisor's features.
        FEATURES_REQUEST = 0x080,
        /// Response with the features.
        FEATURES_RESPONSE = 0x081,
        /// Request to terminate.
        TERMINATE_REQUEST = 0x100,
    }
}

impl Info {
    /// What the MSR value is.
    #[must_use]
    pub const fn of(value: u64) -> Self {
        Self((value & INFO_MASK) as u16)
    }

    const fn bits(self) -> u64 {
        self.0 as u64
    }
}

/// A register that CPUID returns; 2 bits on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CpuidRegister {
    /// EAX.
    Eax = 0,
    /// EBX.
    Ebx = 1,
    /// ECX.
    Ecx = 2,
    /// EDX.
    Edx = 3,
}

impl CpuidRegister {
    /// All of them, in wire order.
    pub const ALL: [Self; 4] = [Self::Eax, Self::Ebx, Self::Ecx, Self::Edx];

    const fn from_bits(value: u64) -> Self {
        match value & 3 {
            0 => Self::Eax,
            1 => Self::Ebx,
            2 => Self::Ecx,
            _ => Self::Edx,
        }
    }
}

/// What a guest writes into the MSR before VMGEXIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Use the GHCB page at this address.
    GhcbPage {
        /// GPA, page aligned.
        gpa: u64,
    },
    /// Which protocol versions, where is the C-bit?
    SevInfo,
    /// One register of one CPUID leaf (subleaf 0).
    Cpuid {
        /// EAX of the query.
        function: u32,
        /// Which result is wanted.
        register: CpuidRegister,
    },
    /// Wait for SIPI.
    ApResetHold,
    /// Which GHCB would the host like?
    PreferredGhcb,
    /// Register this frame as the processor's GHCB.
    RegisterGhcb {
        /// 4 KiB frame number.
        frame: u64,
    },
    /// Change the state of one 4 KiB page.
    PageState {
        /// 4 KiB frame number, 40 bits.
        frame: u64,
        /// What to make of it.
        operation: PageOperation,
    },
    /// Run another VMPL of this processor.
    RunVmpl {
        /// Its number as requested; may be a level that does not exist.
        vmpl: u8,
    },
    /// Which features?
    Features,
    /// Terminate the machine.
    Terminate(Reason),
    /// Not understood.
    Unknown(u64),
}

impl Request {
    /// The MSR value. Numbers too large for their field lose their upper bits.
    #[must_use]
    pub const fn encode(self) -> u64 {
        match self {
            Self::GhcbPage { gpa } => gpa & !INFO_MASK,
            Self::SevInfo => Info::SEV_INFO_REQUEST.bits(),
            Self::Cpuid { function, register } => {
                (function as u64) << 32 | (register as u64) << 30 | Info::CPUID_REQUEST.bits()
            }
            Self::ApResetHold => Info::AP_RESET_HOLD_REQUEST.bits(),
            Self::PreferredGhcb => Info::PREFERRED_GHCB_REQUEST.bits(),
            Self::RegisterGhcb { frame } => frame << 12 | Info::REGISTER_GHCB_REQUEST.bits(),
            Self::PageState { frame, operation } => {
                (operation.0 as u64 & 0xF) << 52
                    | (frame & 0xFF_FFFF_FFFF) << 12
                    | Info::PAGE_STATE_REQUEST.bits()
            }
            Self::RunVmpl { vmpl } => (vmpl as u64) << 32 | Info::RUN_VMPL_REQUEST.bits(),
            Self::Features => Info::FEATURES_REQUEST.bits(),
            Self::Terminate(reason) => {
                (reason.code as u64) << 16
                    | (reason.set.0 as u64 & 0xF) << 12
                    | Info::TERMINATE_REQUEST.bits()
            }
            Self::Unknown(value) => value,
        }
    }

    /// Reads an MSR value.
    #[must_use]
    pub const fn decode(value: u64) -> Self {
        let payload = value & !INFO_MASK;
        match Info::of(value) {
            Info::GHCB_GPA => Self::GhcbPage { gpa: value },
            Info::SEV_INFO_REQUEST if payload == 0 => Self::SevInfo,
            Info::CPUID_REQUEST if value & 0x3FFF_F000 == 0 => Self::Cpuid {
                function: (value >> 32) as u32,
                register: CpuidRegister::from_bits(value >> 30),
            },
            Info::AP_RESET_HOLD_REQUEST if payload == 0 => Self::ApResetHold,
            Info::PREFERRED_GHCB_REQUEST if payload == 0 => Self::PreferredGhcb,
            Info::REGISTER_GHCB_REQUEST => Self::RegisterGhcb { frame: value >> 12 },
            Info::PAGE_STATE_REQUEST if value >> 56 == 0 => Self::PageState {
                frame: value >> 12 & 0xFF_FFFF_FFFF,
                operation: PageOperation((value >> 52 & 0xF) as u8),
            },
            Info::RUN_VMPL_REQUEST if value & 0xFFFF_FF00_FFFF_F000 == 0 => Self::RunVmpl {
                vmpl: (value >> 32) as u8,
            },
            Info::FEATURES_REQUEST if payload == 0 => Self::Features,
            Info::TERMINATE_REQUEST => Self::Terminate(Reason {
                set: ReasonSet((value >> 12 & 0xF) as u8),
                code: (value >> 16) as u8,
            }),
            _ => Self::Unknown(value),
        }
    }
}

/// What the guest finds in the MSR after VMGEXIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Response {
    /// Versions and C-bit.
    SevInfo {
        /// Lowest version.
        min_version: u16,
        /// Highest version.
        max_version: u16,
        /// Position of the C-bit.
        c_bit: u8,
    },
    /// A CPUID register.
    Cpuid {
        /// Its value.
        value: u32,
        /// Which one it is.
        register: CpuidRegister,
    },
    /// SIPI has come.
    ApResetHold {
        /// Whether the wait is over.
        released: bool,
    },
    /// The preferred GHCB.
    PreferredGhcb {
        /// 4 KiB frame number; [`NO_FRAME`] if there is none.
        frame: u64,
    },
    /// The registered GHCB.
    RegisterGhcb {
        /// The frame that was registered; [`NO_FRAME`] if it was refused.
        frame: u64,
    },
    /// The state change.
    PageState {
        /// 0 if it was done.
        error: u32,
    },
    /// The VMPL has run and returned.
    RunVmpl {
        /// 0 if it was run.
        error: u32,
    },
    /// The features.
    Features(HypervisorFeatures),
    /// Not understood.
    Unknown(u64),
}

impl Response {
    /// The MSR value. Frame numbers too large for their field lose their upper bits.
    #[must_use]
    pub const fn encode(self) -> u64 {
        match self {
            Self::SevInfo {
                min_version,
                max_version,
                c_bit,
            } => {
                (max_version as u64) << 48
                    | (min_version as u64) << 32
                    | (c_bit as u64) << 24
                    | Info::SEV_INFO_RESPONSE.bits()
            }
            Self::Cpuid { value, register } => {
                (value as u64) << 32 | (register as u64) << 30 | Info::CPUID_RESPONSE.bits()
            }
            Self::ApResetHold { released } => {
                (released as u64) << 12 | Info::AP_RESET_HOLD_RESPONSE.bits()
            }
            Self::PreferredGhcb { frame } => frame << 12 | Info::PREFERRED_GHCB_RESPONSE.bits(),
            Self::RegisterGhcb { frame } => frame << 12 | Info::REGISTER_GHCB_RESPONSE.bits(),
            Self::PageState { error } => (error as u64) << 32 | Info::PAGE_STATE_RESPONSE.bits(),
            Self::RunVmpl { error } => (error as u64) << 32 | Info::RUN_VMPL_RESPONSE.bits(),
            Self::Features(features) => features.bits() << 12 | Info::FEATURES_RESPONSE.bits(),
            Self::Unknown(value) => value,
        }
    }

    /// Reads an MSR value.
    #[must_use]
    pub const fn decode(value: u64) -> Self {
        // Bits 31:12 of the two responses that carry an error must be zero.
        let clean_error = value & 0xFFFF_F000 == 0;
        match Info::of(value) {
            Info::SEV_INFO_RESPONSE => Self::SevInfo {
                min_version: (value >> 32) as u16,
                max_version: (value >> 48) as u16,
                c_bit: (value >> 24) as u8,
            },
            Info::CPUID_RESPONSE => Self::Cpuid {
                value: (value >> 32) as u32,
                register: CpuidRegister::from_bits(value >> 30),
            },
            Info::AP_RESET_HOLD_RESPONSE => Self::ApResetHold {
                released: value >> 12 != 0,
            },
            Info::PREFERRED_GHCB_RESPONSE => Self::PreferredGhcb { frame: value >> 12 },
            Info::REGISTER_GHCB_RESPONSE => Self::RegisterGhcb { frame: value >> 12 },
            Info::PAGE_STATE_RESPONSE if clean_error => Self::PageState {
                error: (value >> 32) as u32,
            },
            Info::RUN_VMPL_RESPONSE if clean_error => Self::RunVmpl {
                error: (value >> 32) as u32,
            },
            Info::FEATURES_RESPONSE => {
                Self::Features(HypervisorFeatures::from_bits_retain(value >> 12))
            }
            _ => Self::Unknown(value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn requests_have_the_documented_bits() {
        let vectors = [
            (Request::SevInfo, 0x002),
            (
                Request::Cpuid {
                    function: 0x8000_001F,
                    register: CpuidRegister::Ebx,
                },
                0x8000_001F_4000_0004,
            ),
            (Request::RegisterGhcb { frame: 0x8123 }, 0x812_3012),
            (
                Request::PageState {
                    frame: 0x12345,
                    operation: PageOperation::SHARED,
                },
                0x0020_0000_1234_5014,
            ),
            (Request::RunVmpl { vmpl: 1 }, 0x1_0000_0016),
            (Request::Features, 0x080),
            (
                Request::Terminate(crate::terminate::explain(5, 8)),
                0x08_5100,
            ),
            (Request::GhcbPage { gpa: 0x80_9000 }, 0x80_9000),
        ];
        for (request, value) in vectors {
            assert_eq!(request.encode(), value, "{request:?}");
            assert_eq!(Request::decode(value), request);
        }
    }

    #[test]
    fn responses_have_the_documented_bits() {
        let vectors = [
            (
                Response::SevInfo {
                    min_version: 1,
                    max_version: 2,
                    c_bit: 51,
                },
                0x0002_0001_3300_0001,
            ),
            (
                Response::RegisterGhcb { frame: NO_FRAME },
                0xFFFF_FFFF_FFFF_F013,
            ),
            (Response::PageState { error: 1 }, 0x1_0000_0015),
            (Response::RunVmpl { error: 0 }, 0x017),
            (
                Response::Features(HypervisorFeatures::NEEDED_BY_PARAVISOR),
                0x2_3081,
            ),
        ];
        for (response, value) in vectors {
            assert_eq!(response.encode(), value, "{response:?}");
            assert_eq!(Response::decode(value), response);
        }
    }

    #[test]
    fn reserved_bits_make_a_value_unknown() {
        for value in [
            0x1002,
            0x1004,
            0x1016,
            1 << 40 | 0x016,
            1 << 56 | 0x014,
            0xEEE,
        ] {
            assert_eq!(Request::decode(value), Request::Unknown(value));
        }
        for value in [0x1015, 0x1017, 0x002, 0xEEE] {
            assert_eq!(Response::decode(value), Response::Unknown(value));
        }
    }

    proptest! {
        #[test]
        fn decoding_what_was_encoded_changes_nothing(value: u64, info in 0u64..0x101) {
            let value = value & !INFO_MASK | info;
            let request = Request::decode(value);
            prop_assert_eq!(Request::decode(request.encode()), request);
            let response = Response::decode(value);
            prop_assert_eq!(Response::decode(response.encode()), response);
        }
    }
}
