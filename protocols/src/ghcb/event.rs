//! What the exit information of single events means (GHCB, the event's own section).

use crate::addr::Vmpl;
use crate::terminate::{Reason, ReasonSet};

open_enum! {
    /// What an AP creation event asks for; bits 15:0 of SW_EXITINFO1 (GHCB, SNP AP creation).
    pub struct ApRequest(u16) {
        /// Use the VMSA at the processor's next INIT.
        CREATE_ON_INIT = 0,
        /// Run the VMSA now.
        CREATE = 1,
        /// Stop using the VMSA.
        DESTROY = 2,
    }
}

/// SW_EXITINFO1 of AP creation: request 15:0, VMPL 19:16, reserved 31:20, APIC ID 63:32.
///
/// SW_EXITINFO2 is the VMSA's GPA, RAX its SEV features (not for [`ApRequest::DESTROY`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApCreation {
    /// What is asked.
    pub request: ApRequest,
    /// The VMSA's level.
    pub vmpl: Vmpl,
    /// Which processor.
    pub apic_id: u32,
}

impl ApCreation {
    /// SW_EXITINFO1.
    #[must_use]
    pub const fn encode(self) -> u64 {
        (self.apic_id as u64) << 32 | (self.vmpl.number() as u64) << 16 | self.request.0 as u64
    }

    /// Reads SW_EXITINFO1; none if reserved bits are set or the level does not exist.
    #[must_use]
    pub const fn decode(info_1: u64) -> Option<Self> {
        if info_1 & 0xFFF0_0000 != 0 {
            return None;
        }
        let Some(vmpl) = Vmpl::try_new(info_1 >> 16 & 0xF) else {
            return None;
        };
        Some(Self {
            request: ApRequest(info_1 as u16),
            vmpl,
            apic_id: (info_1 >> 32) as u32,
        })
    }
}

/// SW_EXITINFO1 of the event that terminates the machine: set 3:0, code 11:4.
#[must_use]
pub const fn encode_terminate(reason: Reason) -> u64 {
    reason.set.0 as u64 & 0xF | (reason.code as u64) << 4
}

/// Reads SW_EXITINFO1 of the event that terminates the machine.
#[must_use]
pub const fn decode_terminate(info_1: u64) -> Reason {
    Reason {
        set: ReasonSet((info_1 & 0xF) as u8),
        code: (info_1 >> 4) as u8,
    }
}

/// SW_EXITINFO1 of an MSR event that reads.
pub const MSR_READ: u64 = 0;
/// SW_EXITINFO1 of an MSR event that writes.
pub const MSR_WRITE: u64 = 1;

/// Bytes moved by one port access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IoWidth {
    /// One byte.
    Byte = 1,
    /// Two bytes.
    Word = 2,
    /// Four bytes.
    Dword = 4,
}

/// Direction of a port access, as the processor sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IoDirection {
    /// OUT.
    Out,
    /// IN.
    In,
}

/// SW_EXITINFO1 of a port access: in 0, string 2, repeat 3, width 6:4, address size 9:7,
/// segment 12:10, port 31:16 (APM 15.10.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoInfo(pub u64);

impl IoInfo {
    /// A single access that is no string instruction, with 64-bit addresses.
    #[must_use]
    pub const fn single(port: u16, direction: IoDirection, width: IoWidth) -> Self {
        let direction = match direction {
            IoDirection::Out => 0,
            IoDirection::In => 1,
        };
        Self((port as u64) << 16 | 1 << 9 | (width as u64) << 4 | direction)
    }

    /// The port.
    #[must_use]
    pub const fn port(self) -> u16 {
        (self.0 >> 16) as u16
    }

    /// The direction.
    #[must_use]
    pub const fn direction(self) -> IoDirection {
        if self.0 & 1 == 0 {
            IoDirection::Out
        } else {
            IoDirection::In
        }
    }

    /// Whether it is INS or OUTS.
    #[must_use]
    pub const fn is_string(self) -> bool {
        self.0 & 1 << 2 != 0
    }

    /// Whether it has a repeat prefix.
    #[must_use]
    pub const fn is_repeated(self) -> bool {
        self.0 & 1 << 3 != 0
    }

    /// The width; none unless exactly one width bit is set.
    #[must_use]
    pub const fn width(self) -> Option<IoWidth> {
        match self.0 >> 4 & 7 {
            1 => Some(IoWidth::Byte),
            2 => Some(IoWidth::Word),
            4 => Some(IoWidth::Dword),
            _ => None,
        }
    }
}

/// An event to inject, as in EVENTINJ of VMCB and VMSA and in SW_EXITINFO2 after
/// [`super::page::Response::EXCEPTION`]: vector 7:0, type 10:8, error code valid 11, valid 31,
/// error code 63:32 (APM 15.20).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventInjection(pub u64);

impl EventInjection {
    /// Type of an exception.
    pub const KIND_EXCEPTION: u8 = 3;

    /// An exception with or without error code.
    #[must_use]
    pub const fn exception(vector: u8, error_code: Option<u32>) -> Self {
        let base = vector as u64 | (Self::KIND_EXCEPTION as u64) << 8 | 1 << 31;
        Self(match error_code {
            Some(code) => base | 1 << 11 | (code as u64) << 32,
            None => base,
        })
    }

    /// Whether there is an event at all.
    #[must_use]
    pub const fn is_valid(self) -> bool {
        self.0 & 1 << 31 != 0
    }

    /// Vector.
    #[must_use]
    pub const fn vector(self) -> u8 {
        self.0 as u8
    }

    /// Type: 0 interrupt, 2 NMI, 3 exception, 4 software interrupt.
    #[must_use]
    pub const fn kind(self) -> u8 {
        (self.0 >> 8 & 7) as u8
    }

    /// Error code, if it has one.
    #[must_use]
    pub const fn error_code(self) -> Option<u32> {
        if self.0 & 1 << 11 != 0 {
            Some((self.0 >> 32) as u32)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ap_creation_has_the_documented_bits() {
        let creation = ApCreation {
            request: ApRequest::CREATE,
            vmpl: Vmpl::VMPL1,
            apic_id: 0x1234_5678,
        };
        assert_eq!(creation.encode(), 0x1234_5678_0001_0001);
        assert_eq!(ApCreation::decode(creation.encode()), Some(creation));
        assert_eq!(ApCreation::decode(1 << 20), None);
        assert_eq!(ApCreation::decode(4 << 16), None);
    }

    #[test]
    fn termination_has_the_documented_bits() {
        let reason = crate::terminate::explain(1, 0x12);
        assert_eq!(encode_terminate(reason), 0x121);
        assert_eq!(decode_terminate(0x121), reason);
    }

    #[test]
    fn port_access_has_the_documented_bits() {
        let info = IoInfo::single(0x3F8, IoDirection::In, IoWidth::Byte);
        assert_eq!(info.0, 0x03F8_0211);
        assert_eq!(info.port(), 0x3F8);
        assert_eq!(info.direction(), IoDirection::In);
        assert_eq!(info.width(), Some(IoWidth::Byte));
        assert!(!info.is_string() && !info.is_repeated());
        assert_eq!(IoInfo(0x30).width(), None);
    }

    #[test]
    fn injection_has_the_documented_bits() {
        let fault = EventInjection::exception(13, Some(0));
        assert_eq!(fault.0, 0x8000_0B0D);
        assert_eq!(fault.error_code(), Some(0));
        let undefined = EventInjection::exception(6, None);
        assert_eq!(
            (undefined.vector(), undefined.kind()),
            (6, EventInjection::KIND_EXCEPTION)
        );
        assert_eq!(undefined.error_code(), None);
        assert!(!EventInjection(6).is_valid());
    }
}
