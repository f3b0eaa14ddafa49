//! The VMCS of an L2 VM as TDG.VP.RD and TDG.VP.WR name its fields (SDM volume 3, appendix B).
//!
//! The field identifier has the VMCS encoding as its code; the class says which VM.

use super::L2Vm;
use super::metadata::FieldId;

open_enum! {
    /// A field, by its VMCS encoding.
    pub struct Field(u32) {
        /// Selector of ES; those of CS, SS, DS, FS, GS, LDTR and TR follow in steps of 2.
        ES_SELECTOR = 0x0800,
        /// Selector of CS.
        CS_SELECTOR = 0x0802,
        /// Selector of TR, the last.
        TR_SELECTOR = 0x080E,
        /// Added to the time stamp counter.
        TSC_OFFSET = 0x2010,
        /// Guest-physical address of the virtual-APIC page.
        VIRTUAL_APIC = 0x2012,
        /// Vectors 0 to 63 whose end of interrupt exits; those of the others follow in steps of 2.
        EOI_EXIT_0 = 0x201C,
        /// Vectors 192 to 255.
        EOI_EXIT_3 = 0x2022,
        /// IA32_DEBUGCTL.
        DEBUGCTL = 0x2802,
        /// IA32_PAT.
        PAT = 0x2804,
        /// IA32_EFER.
        EFER = 0x2806,
        /// See [`PrimaryControls`].
        PRIMARY_CONTROLS = 0x4002,
        /// Exceptions that exit, by vector.
        EXCEPTION_BITMAP = 0x4004,
        /// Bits of a page fault's error code that are compared.
        PAGE_FAULT_MASK = 0x4006,
        /// What they are compared with.
        PAGE_FAULT_MATCH = 0x4008,
        /// See [`EntryControls`].
        ENTRY_CONTROLS = 0x4012,
        /// The event to be delivered at the next entry: see [`interruption`].
        ENTRY_INTERRUPTION = 0x4016,
        /// Its error code.
        ENTRY_ERROR_CODE = 0x4018,
        /// Length of the instruction that it is an event of.
        ENTRY_INSTRUCTION_LENGTH = 0x401A,
        /// Task priorities below exit, in bits 3:0.
        TPR_THRESHOLD = 0x401C,
        /// See [`SecondaryControls`].
        SECONDARY_CONTROLS = 0x401E,
        /// Limit of ES; those of CS, SS, DS, FS, GS, LDTR, TR, GDTR and IDTR follow in steps of 2.
        ES_LIMIT = 0x4800,
        /// Limit of CS.
        CS_LIMIT = 0x4802,
        /// Limit of GDTR.
        GDTR_LIMIT = 0x4810,
        /// Limit of IDTR, the last.
        IDTR_LIMIT = 0x4812,
        /// Access rights of ES; those of CS, SS, DS, FS, GS, LDTR and TR follow in steps of 2.
        ES_RIGHTS = 0x4814,
        /// Access rights of CS.
        CS_RIGHTS = 0x4816,
        /// Access rights of TR, the last.
        TR_RIGHTS = 0x4822,
        /// See [`Interruptibility`].
        INTERRUPTIBILITY = 0x4824,
        /// 0 active, 1 halted.
        ACTIVITY = 0x4826,
        /// IA32_SYSENTER_CS.
        SYSENTER_CS = 0x482A,
        /// Bits of CR0 that are L1's.
        CR0_MASK = 0x6000,
        /// Bits of CR4 that are L1's.
        CR4_MASK = 0x6002,
        /// What the L2 VM reads in L1's bits of CR0.
        CR0_SHADOW = 0x6004,
        /// What the L2 VM reads in L1's bits of CR4.
        CR4_SHADOW = 0x6006,
        /// CR0.
        CR0 = 0x6800,
        /// CR3.
        CR3 = 0x6802,
        /// CR4.
        CR4 = 0x6804,
        /// Base of ES; those of CS, SS, DS, FS, GS, LDTR, TR, GDTR and IDTR follow in steps of 2.
        ES_BASE = 0x6806,
        /// Base of CS.
        CS_BASE = 0x6808,
        /// Base of TR.
        TR_BASE = 0x6814,
        /// Base of GDTR.
        GDTR_BASE = 0x6816,
        /// Base of IDTR, the last.
        IDTR_BASE = 0x6818,
        /// DR7.
        DR7 = 0x681A,
        /// RSP.
        RSP = 0x681C,
        /// RIP.
        RIP = 0x681E,
        /// RFLAGS.
        RFLAGS = 0x6820,
        /// IA32_SYSENTER_ESP.
        SYSENTER_ESP = 0x6824,
        /// IA32_SYSENTER_EIP.
        SYSENTER_EIP = 0x6826,
    }
}

impl Field {
    /// Its identifier for a VM.
    #[must_use]
    pub const fn id(self, vm: L2Vm) -> FieldId {
        // Bits 14:13 of an encoding: 16 bits, 64 bits, 32 bits, the width of an address.
        let element = match self.0 >> 13 & 3 {
            0 => 1,
            2 => 2,
            _ => 3,
        };
        FieldId(class_of(vm, CLASS_VMCS) << 56 | VCPU_CONTEXT | element << 32 | self.0 as u64)
    }

    /// The field that an identifier names, and the VM; `None` if it is of another class.
    #[must_use]
    pub const fn of(id: FieldId) -> Option<(L2Vm, Self)> {
        match vm_of(id, CLASS_VMCS) {
            Some(vm) => Some((vm, Self(id.code()))),
            None => None,
        }
    }
}

/// Context of fields of a processor.
const VCPU_CONTEXT: u64 = 2 << 52;
/// Class of VM 1's VMCS; those of the others follow in steps of 8.
const CLASS_VMCS: u64 = 36;
/// Class of VM 1's MSR bitmaps; those of the others follow in steps of 8.
const CLASS_MSR_BITMAPS: u64 = 37;

const fn class_of(vm: L2Vm, first: u64) -> u64 {
    first + 8 * (vm as u64 - 1)
}

const fn vm_of(id: FieldId, first: u64) -> Option<L2Vm> {
    let class = id.class();
    if class < first || !(class - first).is_multiple_of(8) {
        return None;
    }
    L2Vm::from_number((class - first) / 8 + 1)
}

/// The MSR bitmaps: which MSRs of an L2 VM exit to L1. All do at first.
pub mod msr_bitmaps {
    use super::{CLASS_MSR_BITMAPS, FieldId, L2Vm, VCPU_CONTEXT, class_of, vm_of};

    /// Words of 64 bits of one VM.
    pub const WORDS: usize = 512;
    /// Words of one of the four maps: reads of low numbers, reads of high ones, writes of low
    /// numbers, writes of high ones.
    const MAP: usize = WORDS / 4;
    /// The first high number.
    const HIGH: u32 = 0xC000_0000;
    /// Numbers in a map.
    const NUMBERS: u32 = 0x2000;

    /// The identifier of a word.
    #[must_use]
    pub const fn id(vm: L2Vm, word: usize) -> FieldId {
        let code = (word % WORDS) as u64;
        FieldId(class_of(vm, CLASS_MSR_BITMAPS) << 56 | VCPU_CONTEXT | 3 << 32 | code)
    }

    /// The word that an identifier names, and the VM.
    #[must_use]
    pub const fn of(id: FieldId) -> Option<(L2Vm, usize)> {
        match vm_of(id, CLASS_MSR_BITMAPS) {
            Some(vm) if (id.code() as usize) < WORDS => Some((vm, id.code() as usize)),
            _ => None,
        }
    }

    /// Word and bit of an MSR; `None` for numbers outside the maps, which always exit.
    #[must_use]
    pub const fn place(number: u32, write: bool) -> Option<(usize, u32)> {
        let (map, index) = match number {
            0..NUMBERS => (0, number),
            HIGH..=0xC000_1FFF => (1, number - HIGH),
            _ => return None,
        };
        let map = if write { map + 2 } else { map };
        Some((map * MAP + index as usize / 64, index % 64))
    }
}

bitflags::bitflags! {
    /// Primary processor-based controls (SDM volume 3, table 26-6), those that mean something here.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct PrimaryControls: u32 {
        /// Exit as soon as an interrupt can be taken.
        const INTERRUPT_WINDOW = 1 << 2;
        /// HLT exits.
        const HLT = 1 << 7;
        /// MWAIT exits.
        const MWAIT = 1 << 10;
        /// RDPMC exits.
        const RDPMC = 1 << 11;
        /// RDTSC and RDTSCP exit.
        const RDTSC = 1 << 12;
        /// The task priority is that of the virtual-APIC page.
        const TPR_SHADOW = 1 << 21;
        /// Exit as soon as an NMI can be taken.
        const NMI_WINDOW = 1 << 22;
        /// Accesses to debug registers exit.
        const MOV_DR = 1 << 23;
        /// IN, OUT and their string forms exit.
        const IO = 1 << 24;
        /// The MSR bitmaps count.
        const MSR_BITMAPS = 1 << 28;
        /// MONITOR exits.
        const MONITOR = 1 << 29;
        /// The secondary controls count.
        const SECONDARY = 1 << 31;
    }

    /// Secondary processor-based controls (SDM volume 3, table 26-7), those that mean something here.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct SecondaryControls: u32 {
        /// Extended page tables.
        const EPT = 1 << 1;
        /// The task priority MSR of x2APIC is that of the virtual-APIC page.
        const VIRTUALIZE_X2APIC = 1 << 4;
        /// Translations are tagged.
        const VPID = 1 << 5;
        /// WBINVD exits.
        const WBINVD = 1 << 6;
        /// Real mode and paging off.
        const UNRESTRICTED = 1 << 7;
        /// Reads of the x2APIC's registers are those of the virtual-APIC page.
        const APIC_REGISTERS = 1 << 8;
        /// The processor delivers the interrupts of the virtual-APIC page.
        const VIRTUAL_INTERRUPTS = 1 << 9;
    }

    /// VM-entry controls (SDM volume 3, table 26-15), those that mean something here.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct EntryControls: u32 {
        /// The VM is in IA-32e mode: EFER.LMA.
        const IA32E = 1 << 9;
        /// PAT is loaded.
        const LOAD_PAT = 1 << 14;
        /// EFER is loaded.
        const LOAD_EFER = 1 << 15;
    }

    /// Guest interruptibility state (SDM volume 3, table 26-3).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Interruptibility: u32 {
        /// Behind STI.
        const STI = 1 << 0;
        /// Behind a load of SS.
        const MOV_SS = 1 << 1;
        /// NMIs are blocked.
        const NMI = 1 << 3;
    }
}

/// Interruption information: the one of an entry, of an exit, and of IDT vectoring.
pub mod interruption {
    /// There is an event.
    pub const VALID: u32 = 1 << 31;
    /// It has an error code.
    pub const ERROR_CODE: u32 = 1 << 11;

    open_enum! {
        /// Bits 10:8: what kind of event.
        pub struct Kind(u32) {
            /// External interrupt.
            EXTERNAL = 0,
            /// NMI.
            NMI = 2,
            /// Exception of the processor.
            EXCEPTION = 3,
            /// INT n.
            SOFTWARE_INTERRUPT = 4,
            /// INT1.
            PRIVILEGED_SOFTWARE = 5,
            /// INT3, INTO.
            SOFTWARE_EXCEPTION = 6,
        }
    }

    /// An event.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Event {
        /// What kind.
        pub kind: Kind,
        /// Vector.
        pub vector: u8,
        /// Whether an error code is pushed.
        pub has_error: bool,
    }

    impl Event {
        /// The field.
        #[must_use]
        pub const fn encode(self) -> u32 {
            let error = if self.has_error { ERROR_CODE } else { 0 };
            VALID | self.kind.0 << 8 | error | self.vector as u32
        }

        /// Reads the field; `None` if there is no event.
        #[must_use]
        pub const fn decode(field: u32) -> Option<Self> {
            if field & VALID == 0 {
                return None;
            }
            Some(Self {
                kind: Kind(field >> 8 & 7),
                vector: field as u8,
                has_error: field & ERROR_CODE != 0,
            })
        }
    }
}

/// Access rights of a segment that cannot be used.
pub const UNUSABLE: u32 = 1 << 16;

/// Offsets in the virtual-APIC page: the register of MSR 0x800 + n at 16 × n.
pub mod apic {
    /// Task priority.
    pub const TPR: u64 = 0x80;
    /// Processor priority.
    pub const PPR: u64 = 0xA0;
    /// In service: eight words, 16 bytes apart.
    pub const ISR: u64 = 0x100;
    /// Requested: eight words, 16 bytes apart.
    pub const IRR: u64 = 0x200;

    /// Where the bit of a vector is in ISR or IRR: offset of the word of 32 bits, and the bit.
    #[must_use]
    pub const fn bit(vector: u8) -> (u64, u32) {
        (vector as u64 / 32 * 16, vector as u32 % 32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_tell_vm_and_field() {
        assert_eq!(Field::CR0.id(L2Vm::Vm1), FieldId(0x2420_0003_0000_6800));
        assert_eq!(
            Field::TR_RIGHTS.id(L2Vm::Vm2),
            FieldId(0x2C20_0002_0000_4822)
        );
        assert_eq!(
            Field::CS_SELECTOR.id(L2Vm::Vm3),
            FieldId(0x3420_0001_0000_0802)
        );
        for vm in L2Vm::ALL {
            for field in [Field::CR3, Field::VIRTUAL_APIC, Field::ES_LIMIT] {
                assert_eq!(Field::of(field.id(vm)), Some((vm, field)));
                assert_eq!(msr_bitmaps::of(field.id(vm)), None);
            }
            assert_eq!(msr_bitmaps::of(msr_bitmaps::id(vm, 511)), Some((vm, 511)));
            assert_eq!(Field::of(msr_bitmaps::id(vm, 1)), None);
            assert_eq!(Field::of(FieldId::l2_ctls(vm)), None);
        }
    }

    #[test]
    fn msrs_have_a_bit_for_reads_and_one_for_writes() {
        assert_eq!(msr_bitmaps::place(0x10, false), Some((0, 16)));
        assert_eq!(msr_bitmaps::place(0xC000_0080, false), Some((130, 0)));
        assert_eq!(msr_bitmaps::place(0x80B, true), Some((256 + 32, 11)));
        assert_eq!(msr_bitmaps::place(0xC000_1FFF, true), Some((511, 63)));
        assert_eq!(msr_bitmaps::place(0x2000, false), None);
        assert_eq!(msr_bitmaps::place(0x4000_0000, true), None);
    }

    #[test]
    fn events_go_through_the_field() {
        let ve = interruption::Event {
            kind: interruption::Kind::EXCEPTION,
            vector: 20,
            has_error: false,
        };
        assert_eq!(ve.encode(), 0x8000_0314);
        assert_eq!(interruption::Event::decode(0x8000_0314), Some(ve));
        assert_eq!(interruption::Event::decode(0x314), None);
    }

    #[test]
    fn vectors_have_their_bits() {
        assert_eq!(apic::bit(0x31), (0x10, 17));
        assert_eq!(apic::bit(255), (0x70, 31));
    }
}
