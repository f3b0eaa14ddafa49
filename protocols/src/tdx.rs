//! Intel TDX as a guest of the module sees it: TDCALL leaves, completion status, page operands.
//!
//! Sources: Intel TDX Module 1.5 ABI Reference Specification (348551), sections on TDG.MEM.PAGE.*;
//! the values are those of `sept` entries and interface functions of module 1.5.
//!
//! | module | holds |
//! |---|---|
//! | [`vmcall`] | what a trust domain asks of the host: TDG.VP.VMCALL |
//! | [`ve`] | the virtualization exception |
//! | [`metadata`] | identifiers of the fields that TDG.VM.RD and its like read |
//! | [`report`] | the report a trust domain gets about itself |
//! | [`l2`] | TD partitioning: entry and exit of an L2 VM |
//! | [`vmcs`] | the fields of an L2 VM that L1 sets |

use crate::addr::{Gpa, PAGE_SIZE, PageSize};

pub mod l2;
pub mod metadata;
pub mod report;
pub mod ve;
pub mod vmcall;
pub mod vmcs;

/// The instruction: 66 0F 01 CC.
pub const TDCALL: [u8; 4] = [0x66, 0x0F, 0x01, 0xCC];

/// The bit of a guest-physical address that makes it shared, for a guest whose addresses have
/// `width` bits: the highest.
#[must_use]
pub const fn shared_bit(width: u32) -> u64 {
    1 << (width - 1)
}

bitflags::bitflags! {
    /// ATTRIBUTES of a trust domain, as far as guests look at them.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct TdAttributes: u64 {
        /// The host may debug it.
        const DEBUG = 1 << 0;
        /// An access to a page that is not accepted goes to the host instead of raising #VE.
        const SEPT_VE_DISABLE = 1 << 28;
        /// It may be migrated.
        const MIGRATABLE = 1 << 29;
    }
}

open_enum! {
    /// A leaf of TDCALL: the low 16 bits of RAX.
    pub struct Leaf(u16) {
        /// TDG.VP.VMCALL.
        VP_VMCALL = 0,
        /// TDG.VP.INFO.
        VP_INFO = 1,
        /// TDG.MR.RTMR.EXTEND.
        MR_RTMR_EXTEND = 2,
        /// TDG.VP.VEINFO.GET.
        VP_VEINFO_GET = 3,
        /// TDG.MR.REPORT.
        MR_REPORT = 4,
        /// TDG.VP.CPUIDVE.SET.
        VP_CPUIDVE_SET = 5,
        /// TDG.MEM.PAGE.ACCEPT.
        MEM_PAGE_ACCEPT = 6,
        /// TDG.VM.RD.
        VM_RD = 7,
        /// TDG.VM.WR.
        VM_WR = 8,
        /// TDG.VP.RD.
        VP_RD = 9,
        /// TDG.VP.WR.
        VP_WR = 10,
        /// TDG.SYS.RD.
        SYS_RD = 11,
        /// TDG.MEM.PAGE.ATTR.RD.
        MEM_PAGE_ATTR_RD = 23,
        /// TDG.MEM.PAGE.ATTR.WR.
        MEM_PAGE_ATTR_WR = 24,
        /// TDG.VP.ENTER.
        VP_ENTER = 25,
        /// TDG.VP.INVEPT.
        VP_INVEPT = 26,
        /// TDG.VP.INVGLA.
        VP_INVGLA = 27,
    }
}

open_enum! {
    /// The upper half of the completion status in RAX. The lower half carries details and is not
    /// part of the code.
    pub struct Status(u32) {
        /// Done.
        SUCCESS = 0,
        /// The page is accepted already; details: the level of the mapping. Not an error class.
        PAGE_ALREADY_ACCEPTED = 0x0000_0B0A,
        /// The memory is held as smaller pages than asked for; details: the level.
        PAGE_SIZE_MISMATCH = 0xC000_0B0B,
        /// No secure EPT of the L2 VM down to the page.
        L2_SEPT_WALK_FAILED = 0xC000_0B0F,
        /// An illegal combination of page attributes.
        PAGE_ATTR_INVALID = 0xC000_0B11,
        /// An operand is wrong; details: which.
        OPERAND_INVALID = 0xC000_0100,
        /// There is no #VE whose information could be read.
        NO_VALID_VE_INFO = 0xC000_0704,
        /// What an L2 VM is to run with is something that no processor can have.
        TD_VMCS_FIELD_ERROR = 0xC000_0731,
        /// There is no such field, or the identifier is not that of a single element.
        METADATA_FIELD_ID_INCORRECT = 0xC000_0C00,
        /// The field cannot be written by who asked.
        METADATA_FIELD_NOT_WRITABLE = 0xC000_0C01,
        /// The field cannot take this value.
        METADATA_FIELD_VALUE_NOT_VALID = 0xC000_0C03,
        /// Not an error: the first field's identifier was asked for.
        METADATA_FIRST_FIELD_ID_IN_CONTEXT = 0x0000_0C0B,
        /// An L2 VM stopped for something that the host has passed on to L1.
        L2_EXIT_HOST_ROUTED_ASYNC = 0x0000_1100,
        /// A TDG.VP.VMCALL of an L2 VM that the host has passed on to L1.
        L2_EXIT_HOST_ROUTED_TDVMCALL = 0x0000_1101,
        /// An L2 VM stopped because an interrupt waits for L1.
        L2_EXIT_PENDING_INTERRUPT = 0x0000_1102,
        /// No L2 VM was entered because an interrupt waits for L1.
        PENDING_INTERRUPT = 0x0000_1120,
        /// Another party holds what the call needs: to be repeated.
        OPERAND_BUSY = 0x8000_0200,
        /// As [`Status::OPERAND_BUSY`], the host having the right of way.
        OPERAND_BUSY_HOST_PRIORITY = 0x8000_0204,
    }
}

impl Status {
    /// The code of a value of RAX.
    #[must_use]
    pub const fn of(rax: u64) -> Self {
        Self((rax >> 32) as u32)
    }

    /// The value of RAX with this code and `details`.
    #[must_use]
    pub const fn with(self, details: u32) -> u64 {
        (self.0 as u64) << 32 | details as u64
    }

    /// Whether the call is to be repeated, with its operands loaded anew.
    #[must_use]
    pub const fn is_busy(self) -> bool {
        self.0 == Self::OPERAND_BUSY.0 || self.0 == Self::OPERAND_BUSY_HOST_PRIORITY.0
    }
}

open_enum! {
    /// Which operand [`Status::OPERAND_INVALID`] and its like blame.
    pub struct Operand(u32) {
        /// RAX: leaf or version.
        RAX = 0,
        /// RCX.
        RCX = 1,
        /// RDX.
        RDX = 2,
        /// R8.
        R8 = 8,
        /// R9.
        R9 = 9,
        /// The virtual-APIC page of an L2 VM.
        L2_VAPIC_GPA = 0xAA,
    }
}

impl Operand {
    /// The value of RAX that says that this operand is wrong.
    #[must_use]
    pub const fn invalid(self) -> u64 {
        Status::OPERAND_INVALID.with(self.0)
    }
}

/// The operand of the page leaves: level in bits 2:0, address in bits 51:12.
#[must_use]
pub const fn page_operand(gpa: Gpa, size: PageSize) -> u64 {
    let level = match size {
        PageSize::Size4K => 0,
        PageSize::Size2M => 1,
    };
    (gpa.get() & ADDRESS) | level
}

/// Bits 51:12: the address in an operand or a mapping.
const ADDRESS: u64 = (1 << 52) - PAGE_SIZE;

/// Bit 62 of a mapping read back: the page is not accepted.
pub const MAPPING_PENDING: u64 = 1 << 62;

bitflags::bitflags! {
    /// What one VM may do with a page: one of the four 16-bit fields of GPA_ATTR.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct PageAttributes: u16 {
        /// Read.
        const READ = 1 << 0;
        /// Write.
        const WRITE = 1 << 1;
        /// Execute in supervisor mode.
        const EXECUTE_SUPERVISOR = 1 << 2;
        /// Execute in user mode.
        const EXECUTE_USER = 1 << 3;
        /// The field means something. In a mask: drop the VM's translations afterwards.
        const VALID = 1 << 15;
        /// All that a page of ordinary memory needs.
        const ALL_ACCESS = Self::READ.bits()
            | Self::WRITE.bits()
            | Self::EXECUTE_SUPERVISOR.bits()
            | Self::EXECUTE_USER.bits();
    }
}

/// A virtual machine inside the trust domain. L1 is number 0; its field must be 0 in a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2Vm {
    /// VM 1.
    Vm1 = 1,
    /// VM 2.
    Vm2 = 2,
    /// VM 3.
    Vm3 = 3,
}

impl L2Vm {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Vm1, Self::Vm2, Self::Vm3];

    /// The VM with a number; `None` for L1's and what is above.
    #[must_use]
    pub const fn from_number(number: u64) -> Option<Self> {
        match number {
            1 => Some(Self::Vm1),
            2 => Some(Self::Vm2),
            3 => Some(Self::Vm3),
            _ => None,
        }
    }

    /// Its place among [`Self::ALL`].
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize - 1
    }

    /// The VM's field of GPA_ATTR, or of its mask.
    #[must_use]
    pub const fn field(self, attributes: PageAttributes) -> u64 {
        (attributes.bits() as u64) << (16 * self as u32)
    }

    /// The VM's attributes in a GPA_ATTR.
    #[must_use]
    pub const fn attributes(self, gpa_attr: u64) -> PageAttributes {
        PageAttributes::from_bits_retain((gpa_attr >> (16 * self as u32)) as u16)
    }

    /// The VM's bit in the operand of TDG.VP.INVEPT.
    #[must_use]
    pub const fn invept_bit(self) -> u64 {
        1 << self as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_the_upper_half() {
        assert_eq!(
            Status::of(0x0000_0B0A_0000_0001),
            Status::PAGE_ALREADY_ACCEPTED
        );
        assert_eq!(Status::of(7), Status::SUCCESS);
        assert!(Status::of(0x8000_0200_0000_0001).is_busy());
        assert!(Status::of(0x8000_0204_0000_0000).is_busy());
        assert!(!Status::of(0xC000_0100_0000_0001).is_busy());
    }

    #[test]
    fn an_operand_has_level_and_address() {
        let gpa = Gpa::new(0x1234_5600_0000);
        assert_eq!(page_operand(gpa, PageSize::Size4K), 0x1234_5600_0000);
        assert_eq!(page_operand(gpa, PageSize::Size2M), 0x1234_5600_0001);
    }

    #[test]
    fn fields_of_the_vms_lie_side_by_side() {
        let all = PageAttributes::ALL_ACCESS | PageAttributes::VALID;
        assert_eq!(L2Vm::Vm1.field(all), 0x800f_0000);
        assert_eq!(L2Vm::Vm3.field(all), 0x800f_0000_0000_0000);
        assert_eq!(L2Vm::Vm2.attributes(L2Vm::Vm2.field(all)), all);
        assert_eq!(L2Vm::Vm2.invept_bit(), 4);
    }
}
