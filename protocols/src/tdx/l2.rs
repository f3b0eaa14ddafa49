//! TD partitioning: how L1 enters an L2 VM, and what it gets back (`tdx.md` §7).
//!
//! TDG.VP.ENTER takes the registers that the L2 VM goes on with from a structure in private memory,
//! [`EnterState`], and puts those it stopped with there. Why it stopped is in L1's registers,
//! [`Exit`].

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::vmcall::register::{
    COUNT, R8, R9, R10, R11, R12, R13, R14, R15, RAX, RBX, RCX, RDI, RDX, RSI,
};
use super::{L2Vm, Status};
use crate::tdx::ve::ExitReason;

/// L2_ENTER_GUEST_STATE, in private memory on a boundary of [`EnterState::ALIGNMENT`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct EnterState {
    /// RAX to R15 by their numbers.
    pub gprs: [u64; COUNT],
    /// RFLAGS.
    pub rflags: u64,
    /// RIP.
    pub rip: u64,
    /// Shadow stack pointer.
    pub ssp: u64,
    /// Guest interrupt status: the highest vector that waits (7:0), and that is in service (15:8).
    pub interrupt_status: u16,
    /// The module neither reads nor writes it.
    pub padding: [u8; 6],
}

impl EnterState {
    /// Bytes of a boundary that it has to begin at.
    pub const ALIGNMENT: u64 = 256;
    /// Bytes that the module reads and writes.
    pub const USED: usize = 0x9A;
}

const _: () = {
    use core::mem::offset_of;
    assert!(offset_of!(EnterState, rflags) == 0x80);
    assert!(offset_of!(EnterState, rip) == 0x88);
    assert!(offset_of!(EnterState, ssp) == 0x90);
    assert!(offset_of!(EnterState, interrupt_status) == 0x98);
    assert!(offset_of!(EnterState, padding) == EnterState::USED);
};

/// Which translations of the L2 VM an entry drops before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// None.
    None = 0,
    /// All, from guest-physical addresses on.
    Ept = 1,
    /// Those of linear addresses.
    Linear = 2,
    /// Those of linear addresses, but for global ones.
    LinearKeepGlobals = 3,
}

/// RCX of TDG.VP.ENTER.
#[must_use]
pub const fn enter_operand(vm: L2Vm, flush: Flush) -> u64 {
    (vm as u64) << VM_SHIFT | flush as u64
}

/// RCX of TDG.VP.ENTER, read; `None` if a reserved bit is set or there is no such VM.
#[must_use]
pub const fn decode_enter_operand(rcx: u64) -> Option<(L2Vm, Flush)> {
    if rcx & !(3 << VM_SHIFT | 3) != 0 {
        return None;
    }
    let flush = match rcx & 3 {
        0 => Flush::None,
        1 => Flush::Ept,
        2 => Flush::Linear,
        _ => Flush::LinearKeepGlobals,
    };
    match L2Vm::from_number(rcx >> VM_SHIFT & 3) {
        Some(vm) => Some((vm, flush)),
        None => None,
    }
}

/// Bits 53:52 of operands that name a VM.
const VM_SHIFT: u32 = 52;

open_enum! {
    /// Bits 3:0 of the extended exit qualification.
    pub struct ExtendedType(u64) {
        /// Nothing to add.
        NONE = 0,
        /// An operand of TDG.MEM.PAGE.ACCEPT.
        ACCEPT = 1,
        /// An operand whose secure EPT the host has to complete.
        GPA_DETAILS = 2,
        /// TDG.MEM.PAGE.ATTR.WR needs a smaller leaf.
        ATTR_WR = 5,
        /// The page is there but not accepted.
        PENDING_EPT_VIOLATION = 6,
    }
}

/// What an L2 VM stopped for, as L1's registers have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// RAX, upper half: how it came to L1.
    pub status: Status,
    /// RAX, lower half: why; bit 31 says that the entry failed.
    pub reason: ExitReason,
    /// RCX.
    pub qualification: u64,
    /// RDX: linear address.
    pub gla: u64,
    /// RSI: selector, access rights, limit of CS.
    pub cs: u64,
    /// RDI.
    pub cs_base: u64,
    /// R8: guest-physical address, with the shared bit.
    pub gpa: u64,
    /// R9: interruption information, and its error code in the upper half.
    pub interruption: u64,
    /// R10: the event whose delivery was interrupted, and its error code in the upper half.
    pub idt_vectoring: u64,
    /// R11: instruction information, and the length in bytes in the upper half.
    pub instruction: u64,
    /// R12: privilege level.
    pub cpl: u64,
    /// R13: see [`ExtendedType`].
    pub extended: u64,
}

impl Exit {
    /// An exit about which there is nothing but the reason.
    #[must_use]
    pub const fn new(reason: ExitReason) -> Self {
        Self {
            status: Status::SUCCESS,
            reason,
            qualification: 0,
            gla: 0,
            cs: 0,
            cs_base: 0,
            gpa: 0,
            interruption: 0,
            idt_vectoring: 0,
            instruction: 0,
            cpl: 0,
            extended: 0,
        }
    }

    /// Puts it into L1's registers. RBP is not L1's afterwards, but what the L2 VM had there; RSP
    /// stays.
    pub const fn store(&self, gprs: &mut [u64; COUNT]) {
        gprs[RAX] = self.status.with(self.reason.0);
        gprs[RBX] = 0;
        gprs[RCX] = self.qualification;
        gprs[RDX] = self.gla;
        gprs[RSI] = self.cs;
        gprs[RDI] = self.cs_base;
        gprs[R8] = self.gpa;
        gprs[R9] = self.interruption;
        gprs[R10] = self.idt_vectoring;
        gprs[R11] = self.instruction;
        gprs[R12] = self.cpl;
        gprs[R13] = self.extended;
        gprs[R14] = 0;
        gprs[R15] = 0;
    }

    /// Reads it from L1's registers.
    #[must_use]
    pub const fn load(gprs: &[u64; COUNT]) -> Self {
        Self {
            status: Status::of(gprs[RAX]),
            reason: ExitReason(gprs[RAX] as u32),
            qualification: gprs[RCX],
            gla: gprs[RDX],
            cs: gprs[RSI],
            cs_base: gprs[RDI],
            gpa: gprs[R8],
            interruption: gprs[R9],
            idt_vectoring: gprs[R10],
            instruction: gprs[R11],
            cpl: gprs[R12],
            extended: gprs[R13],
        }
    }

    /// The length of the instruction that caused the exit.
    #[must_use]
    pub const fn instruction_length(&self) -> u32 {
        (self.instruction >> 32) as u32
    }

    /// Why there is an extended qualification.
    #[must_use]
    pub const fn extended_type(&self) -> ExtendedType {
        ExtendedType(self.extended & 0xF)
    }
}

/// A base address and the number of the last page after it, as TDG.VP.INVGLA has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GlaEntry(pub u64);

/// RCX of TDG.VP.INVGLA: one entry in RDX, or a list that RDX describes.
#[must_use]
pub const fn invgla_operand(vm: L2Vm, list: bool) -> u64 {
    (vm as u64) << VM_SHIFT | list as u64
}

/// RCX of TDG.VP.INVGLA, read.
#[must_use]
pub const fn decode_invgla_operand(rcx: u64) -> Option<(L2Vm, bool)> {
    if rcx & !(3 << VM_SHIFT | 1) != 0 {
        return None;
    }
    match L2Vm::from_number(rcx >> VM_SHIFT & 3) {
        Some(vm) => Some((vm, rcx & 1 != 0)),
        None => None,
    }
}

/// RDX of TDG.VP.INVGLA for a list: the entries `first..first + count` of the page at `gpa`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GlaList {
    /// The page with the list.
    pub gpa: u64,
    /// First entry to be done.
    pub first: u64,
    /// How many.
    pub count: u64,
}

impl GlaList {
    /// Entries of a page.
    pub const ENTRIES: u64 = 512;

    /// Reads it; `None` if it leaves the page.
    #[must_use]
    pub const fn decode(rdx: u64) -> Option<Self> {
        let list = Self {
            gpa: rdx & 0x000F_FFFF_FFFF_F000,
            first: rdx & 0x1FF,
            count: rdx >> 52 & 0x3FF,
        };
        let reserved = rdx & (7 << 9 | 3 << 62);
        if reserved == 0 && list.first + list.count <= Self::ENTRIES {
            Some(list)
        } else {
            None
        }
    }

    /// The register.
    #[must_use]
    pub const fn encode(self) -> u64 {
        self.gpa | self.first & 0x1FF | self.count << 52
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_names_vm_and_flush() {
        let rcx = enter_operand(L2Vm::Vm2, Flush::Linear);
        assert_eq!(rcx, 2 << 52 | 2);
        assert_eq!(decode_enter_operand(rcx), Some((L2Vm::Vm2, Flush::Linear)));
        for bad in [0, 3, 1 << 52 | 4, 1 << 52 | 1 << 54, 1 << 63 | 1 << 52] {
            assert_eq!(decode_enter_operand(bad), None, "{bad:#x}");
        }
    }

    #[test]
    fn an_exit_goes_through_the_registers() {
        let exit = Exit {
            status: Status::L2_EXIT_PENDING_INTERRUPT,
            reason: ExitReason::EPT_VIOLATION,
            qualification: 1,
            gla: 2,
            cs: 3,
            cs_base: 4,
            gpa: 5,
            interruption: 6,
            idt_vectoring: 7,
            instruction: 3 << 32 | 9,
            cpl: 3,
            extended: 6,
        };
        let mut gprs = [!0; COUNT];
        exit.store(&mut gprs);
        assert_eq!(gprs[RAX], 0x0000_1102_0000_0030);
        assert_eq!((gprs[RBX], gprs[R14], gprs[R15]), (0, 0, 0));
        assert_eq!(Exit::load(&gprs), exit);
        assert_eq!(exit.instruction_length(), 3);
        assert_eq!(exit.extended_type(), ExtendedType::PENDING_EPT_VIOLATION);
    }

    #[test]
    fn a_list_stays_in_its_page() {
        let list = GlaList {
            gpa: 0x1234_5000,
            first: 510,
            count: 2,
        };
        assert_eq!(GlaList::decode(list.encode()), Some(list));
        assert_eq!(GlaList::decode(list.encode() + 1), None);
        assert_eq!(GlaList::decode(1 << 9), None);
        assert_eq!(
            decode_invgla_operand(invgla_operand(L2Vm::Vm3, true)),
            Some((L2Vm::Vm3, true))
        );
        assert_eq!(decode_invgla_operand(2 | 1 << 52), None);
        assert_eq!(decode_invgla_operand(1), None);
    }
}
