//! Calls of the core protocol whose arguments are packed into registers.

use super::Protocol;
use crate::addr::PAGE_SIZE;

/// RCX of QUERY_PROTOCOL, in and out (SVSM 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProtocolQuery {
    /// Which protocol.
    pub protocol: Protocol,
    /// Which version is wanted.
    pub version: u32,
}

impl ProtocolQuery {
    /// RCX of the answer "not available".
    pub const UNAVAILABLE: u64 = 0;

    /// RCX of the call.
    #[must_use]
    pub const fn encode(self) -> u64 {
        (self.protocol.0 as u64) << 32 | self.version as u64
    }

    /// Reads RCX of the call.
    #[must_use]
    pub const fn decode(rcx: u64) -> Self {
        Self {
            protocol: Protocol((rcx >> 32) as u32),
            version: rcx as u32,
        }
    }

    /// RCX of the answer if versions `min` to `max` are available: 0 if the wanted one is not
    /// among them.
    #[must_use]
    pub const fn answer(self, min: u32, max: u32) -> u64 {
        if min <= self.version && self.version <= max {
            (max as u64) << 32 | min as u64
        } else {
            Self::UNAVAILABLE
        }
    }
}

/// RCX of CONFIGURE_VTOM (SVSM 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigureVtom {
    /// What is supported? Bit 0 set, all others zero.
    Query,
    /// Configure. Bit 0 clear, bits 11:5 zero.
    Configure {
        /// Bit 1: use a virtual top of memory.
        enable: bool,
        /// Bit 2: load CR3 from RDX.
        set_cr3: bool,
        /// Bit 3: load RIP from R8.
        set_rip: bool,
        /// Bit 4: load RSP from R9.
        set_rsp: bool,
        /// Bits 63:12: the virtual top of memory in bytes.
        vtom: u64,
    },
}

impl ConfigureVtom {
    /// Reads RCX; none if reserved bits are set.
    #[must_use]
    pub const fn decode(rcx: u64) -> Option<Self> {
        if rcx & 1 != 0 {
            return if rcx == 1 { Some(Self::Query) } else { None };
        }
        if rcx & 0xFE0 != 0 {
            return None;
        }
        Some(Self::Configure {
            enable: rcx & 1 << 1 != 0,
            set_cr3: rcx & 1 << 2 != 0,
            set_rip: rcx & 1 << 3 != 0,
            set_rsp: rcx & 1 << 4 != 0,
            vtom: rcx & !(PAGE_SIZE - 1),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_answered_with_a_range_or_zero() {
        let query = ProtocolQuery::decode(1);
        assert_eq!(query.protocol, Protocol::CORE);
        assert_eq!(query.answer(1, 1), 1 << 32 | 1);
        assert_eq!(
            ProtocolQuery {
                version: 2,
                ..query
            }
            .answer(1, 1),
            0
        );
        assert_eq!(
            ProtocolQuery {
                version: 0,
                ..query
            }
            .answer(1, 1),
            0
        );
    }

    #[test]
    fn vtom_with_reserved_bits_is_not_understood() {
        assert_eq!(ConfigureVtom::decode(1), Some(ConfigureVtom::Query));
        assert_eq!(ConfigureVtom::decode(3), None);
        assert_eq!(ConfigureVtom::decode(1 << 5), None);
        let configure = ConfigureVtom::Configure {
            enable: true,
            set_cr3: false,
            set_rip: true,
            set_rsp: false,
            vtom: 1 << 46,
        };
        assert_eq!(ConfigureVtom::decode(1 << 46 | 0b1010), Some(configure));
    }
}
