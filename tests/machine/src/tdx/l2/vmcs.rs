//! The fields of an L2 VM's VMCS: what L1 may put there.
//!
//! What the L2 VM's registers are lies in its state page, in the form the machine keeps registers in;
//! the controls lie here. A field takes a value that the module would not run with never: the error
//! comes from TDG.VP.WR, not later from the entry.

use protocols::tdx::vmcs::{
    EntryControls, Field, Interruptibility, PrimaryControls, SecondaryControls, UNUSABLE,
};
use protocols::vmsa::{Efer, Segment, SegmentAttributes, Vmsa};

use super::super::page::is_private;
use crate::types::PAGE_SIZE;

/// CR0.NE: the module keeps it set.
const CR0_NE: u64 = 1 << 5;
/// CR0.CD and NW: the module keeps them clear.
const CR0_OFF: u64 = 3 << 29;
/// CR4.VMXE: the module keeps it set.
const CR4_VMXE: u64 = 1 << 13;
/// CR4.SMXE: the module keeps it clear.
const CR4_OFF: u64 = 1 << 14;
const EFER_KNOWN: u64 = Efer::SCE.0 | Efer::LME.0 | Efer::LMA.0 | Efer::NXE.0;

/// Primary controls that L1 decides about.
const PRIMARY_OPEN: PrimaryControls = PrimaryControls::INTERRUPT_WINDOW
    .union(PrimaryControls::RDTSC)
    .union(PrimaryControls::RDPMC)
    .union(PrimaryControls::MOV_DR);
/// Secondary controls that L1 decides about.
const SECONDARY_OPEN: SecondaryControls = SecondaryControls::VIRTUALIZE_X2APIC
    .union(SecondaryControls::APIC_REGISTERS)
    .union(SecondaryControls::VIRTUAL_INTERRUPTS);

/// Why a field does not take a value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// There is no such field.
    Unknown,
    /// It cannot have this value.
    Value,
}

/// The controls of one L2 VM on one processor.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Controls {
    /// Primary processor-based controls.
    pub primary: PrimaryControls,
    /// Secondary processor-based controls.
    pub secondary: SecondaryControls,
    /// The IA-32e mode guest bit of the entry controls.
    pub ia32e: bool,
    /// Exceptions that exit.
    pub exceptions: u32,
    /// Mask and match of page faults' error codes.
    pub page_fault: [u32; 2],
    /// Event of the next entry, its error code, its instruction's length.
    pub entry_event: [u32; 3],
    /// TPR threshold.
    pub tpr_threshold: u8,
    /// Guest/host masks of CR0 and CR4.
    pub masks: [u64; 2],
    /// Read shadows of CR0 and CR4.
    pub shadows: [u64; 2],
    /// The virtual-APIC page, once L1 has said.
    pub virtual_apic: Option<u64>,
    /// EOI-exit bitmap.
    pub eoi_exit: [u64; 4],
    /// Interruptibility state.
    pub interruptibility: Interruptibility,
}

impl Default for Controls {
    fn default() -> Self {
        Self {
            primary: PrimaryControls::all().difference(PRIMARY_OPEN),
            secondary: SecondaryControls::all().difference(SECONDARY_OPEN),
            ia32e: false,
            exceptions: 0,
            page_fault: [0; 2],
            entry_event: [0; 3],
            tpr_threshold: 0,
            masks: [u64::MAX; 2],
            shadows: [0; 2],
            virtual_apic: None,
            eoi_exit: [0; 4],
            interruptibility: Interruptibility::empty(),
        }
    }
}

/// A register in a state page.
enum Slot<'a> {
    U64(&'a mut u64),
    U32(&'a mut u32),
    U16(&'a mut u16),
    Rights(&'a mut SegmentAttributes),
}

/// Number of a field in a row of fields that begins at `first`.
const fn index(field: Field, first: Field) -> Option<usize> {
    if field.0 < first.0 || !(field.0 - first.0).is_multiple_of(2) {
        return None;
    }
    Some((field.0 - first.0) as usize / 2)
}

/// A segment register by its number in the VMCS: ES, CS, SS, DS, FS, GS, LDTR, TR, and where there
/// are more, GDTR, IDTR.
fn segment(state: &mut Vmsa, number: usize) -> Option<&mut Segment> {
    Some(match number {
        0 => &mut state.es,
        1 => &mut state.cs,
        2 => &mut state.ss,
        3 => &mut state.ds,
        4 => &mut state.fs,
        5 => &mut state.gs,
        6 => &mut state.ldtr,
        7 => &mut state.tr,
        8 => &mut state.gdtr,
        9 => &mut state.idtr,
        _ => return None,
    })
}

fn slot(state: &mut Vmsa, field: Field) -> Option<Slot<'_>> {
    let number = |first, last: Field| index(field, first).filter(|_| field.0 <= last.0);
    if let Some(number) = number(Field::ES_SELECTOR, Field::TR_SELECTOR) {
        return segment(state, number).map(|s| Slot::U16(&mut s.selector));
    }
    if let Some(number) = number(Field::ES_LIMIT, Field::IDTR_LIMIT) {
        return segment(state, number).map(|s| Slot::U32(&mut s.limit));
    }
    if let Some(number) = number(Field::ES_RIGHTS, Field::TR_RIGHTS) {
        return segment(state, number).map(|s| Slot::Rights(&mut s.attributes));
    }
    if let Some(number) = number(Field::ES_BASE, Field::IDTR_BASE) {
        return segment(state, number).map(|s| Slot::U64(&mut s.base));
    }
    Some(Slot::U64(match field {
        Field::CR0 => &mut state.cr0,
        Field::CR3 => &mut state.cr3,
        Field::CR4 => &mut state.cr4,
        Field::DR7 => &mut state.dr7,
        Field::RSP => &mut state.rsp,
        Field::RIP => &mut state.rip,
        Field::RFLAGS => &mut state.rflags,
        Field::EFER => &mut state.efer.0,
        Field::PAT => &mut state.g_pat,
        Field::DEBUGCTL => &mut state.dbgctl,
        Field::SYSENTER_CS => &mut state.sysenter_cs,
        Field::SYSENTER_ESP => &mut state.sysenter_esp,
        Field::SYSENTER_EIP => &mut state.sysenter_eip,
        _ => return None,
    }))
}

/// Access rights as the VMCS has them: bits 3:0 type, 4 S, 6:5 DPL, 7 P, 12 AVL, 13 L, 14 D/B, 15 G,
/// 16 unusable.
const fn rights_of(attributes: SegmentAttributes) -> u64 {
    let SegmentAttributes(bits) = attributes;
    let unusable = if bits & 0x80 == 0 { UNUSABLE } else { 0 };
    (bits & 0xFF) as u64 | (bits as u64 & 0xF00) << 4 | unusable as u64
}

/// The reverse; a segment that cannot be used is not present.
const fn attributes_of(rights: u64) -> SegmentAttributes {
    let present = if rights & UNUSABLE as u64 != 0 {
        !0x80
    } else {
        !0
    };
    SegmentAttributes(((rights & 0xFF) as u16 | (rights >> 4 & 0xF00) as u16) & present)
}

const RIGHTS_KNOWN: u64 = 0xF0FF | UNUSABLE as u64;

/// A field's value.
pub fn read(controls: &Controls, state: &mut Vmsa, field: Field) -> Option<u64> {
    if let Some(slot) = slot(state, field) {
        let value = match slot {
            Slot::U64(value) => *value,
            Slot::U32(value) => u64::from(*value),
            Slot::U16(value) => u64::from(*value),
            Slot::Rights(attributes) => rights_of(*attributes),
        };
        return Some(match field {
            Field::EFER => value & EFER_KNOWN,
            Field::CR4 => value | CR4_VMXE,
            _ => value,
        });
    }
    if let Some(word) = index(field, Field::EOI_EXIT_0).and_then(|n| controls.eoi_exit.get(n)) {
        return Some(*word);
    }
    Some(match field {
        Field::PRIMARY_CONTROLS => controls.primary.bits().into(),
        Field::SECONDARY_CONTROLS => controls.secondary.bits().into(),
        Field::ENTRY_CONTROLS => {
            let mut bits = EntryControls::LOAD_PAT | EntryControls::LOAD_EFER;
            bits.set(EntryControls::IA32E, controls.ia32e);
            bits.bits().into()
        }
        Field::EXCEPTION_BITMAP => controls.exceptions.into(),
        Field::PAGE_FAULT_MASK => controls.page_fault[0].into(),
        Field::PAGE_FAULT_MATCH => controls.page_fault[1].into(),
        Field::ENTRY_INTERRUPTION => controls.entry_event[0].into(),
        Field::ENTRY_ERROR_CODE => controls.entry_event[1].into(),
        Field::ENTRY_INSTRUCTION_LENGTH => controls.entry_event[2].into(),
        Field::TPR_THRESHOLD => controls.tpr_threshold.into(),
        Field::CR0_MASK => controls.masks[0],
        Field::CR4_MASK => controls.masks[1],
        Field::CR0_SHADOW => controls.shadows[0],
        Field::CR4_SHADOW => controls.shadows[1],
        Field::VIRTUAL_APIC => controls.virtual_apic.unwrap_or(u64::MAX),
        Field::INTERRUPTIBILITY => controls.interruptibility.bits().into(),
        Field::ACTIVITY => 0,
        _ => return None,
    })
}

/// Sets a field.
pub fn write(
    controls: &mut Controls,
    state: &mut Vmsa,
    field: Field,
    value: u64,
) -> Result<(), Refusal> {
    if let Some(slot) = slot(state, field) {
        if !state_takes(field, value) {
            return Err(Refusal::Value);
        }
        match slot {
            Slot::U64(to) => *to = value,
            Slot::U32(to) => *to = narrow(value)?,
            Slot::U16(to) => *to = u16::try_from(value).map_err(|_| Refusal::Value)?,
            Slot::Rights(_) if value & !RIGHTS_KNOWN != 0 => return Err(Refusal::Value),
            Slot::Rights(to) => *to = attributes_of(value),
        }
        // What the machine keeps of CR4 is what the processor below runs with.
        state.cr4 &= !CR4_VMXE;
        return Ok(());
    }
    if let Some(word) = index(field, Field::EOI_EXIT_0).and_then(|n| controls.eoi_exit.get_mut(n)) {
        *word = value;
        return Ok(());
    }
    match field {
        Field::PRIMARY_CONTROLS => {
            let new = PrimaryControls::from_bits(narrow(value)?).ok_or(Refusal::Value)?;
            if !(new ^ controls.primary).difference(PRIMARY_OPEN).is_empty() {
                return Err(Refusal::Value);
            }
            controls.primary = new;
        }
        Field::SECONDARY_CONTROLS => {
            let new = SecondaryControls::from_bits(narrow(value)?).ok_or(Refusal::Value)?;
            if !(new ^ controls.secondary)
                .difference(SECONDARY_OPEN)
                .is_empty()
            {
                return Err(Refusal::Value);
            }
            controls.secondary = new;
        }
        Field::ENTRY_CONTROLS => {
            let new = EntryControls::from_bits(narrow(value)?).ok_or(Refusal::Value)?;
            if !new.contains(EntryControls::LOAD_PAT | EntryControls::LOAD_EFER) {
                return Err(Refusal::Value);
            }
            controls.ia32e = new.contains(EntryControls::IA32E);
        }
        Field::EXCEPTION_BITMAP => controls.exceptions = narrow(value)?,
        Field::PAGE_FAULT_MASK => controls.page_fault[0] = narrow(value)?,
        Field::PAGE_FAULT_MATCH => controls.page_fault[1] = narrow(value)?,
        Field::ENTRY_INTERRUPTION => controls.entry_event[0] = narrow(value)?,
        Field::ENTRY_ERROR_CODE => controls.entry_event[1] = narrow(value)?,
        Field::ENTRY_INSTRUCTION_LENGTH if value <= 15 => controls.entry_event[2] = narrow(value)?,
        Field::TPR_THRESHOLD if value <= 15 => controls.tpr_threshold = value as u8,
        Field::CR0_MASK if value & CR0_NE != 0 => controls.masks[0] = value,
        Field::CR4_MASK if value & CR4_VMXE != 0 => controls.masks[1] = value,
        Field::CR0_SHADOW => controls.shadows[0] = value,
        Field::CR4_SHADOW => controls.shadows[1] = value,
        Field::VIRTUAL_APIC if is_private(value) && value.is_multiple_of(PAGE_SIZE) => {
            controls.virtual_apic = Some(value);
        }
        Field::INTERRUPTIBILITY => {
            controls.interruptibility =
                Interruptibility::from_bits(narrow(value)?).ok_or(Refusal::Value)?;
        }
        // A VM that halts exits, so L1 has nothing to put to sleep.
        Field::ACTIVITY if value == 0 => {}
        Field::ENTRY_INSTRUCTION_LENGTH
        | Field::TPR_THRESHOLD
        | Field::CR0_MASK
        | Field::CR4_MASK
        | Field::VIRTUAL_APIC
        | Field::ACTIVITY => return Err(Refusal::Value),
        _ => return Err(Refusal::Unknown),
    }
    Ok(())
}

/// What a register of the guest's can be.
const fn state_takes(field: Field, value: u64) -> bool {
    match field {
        Field::CR0 => value & CR0_NE != 0 && value & CR0_OFF == 0 && value >> 32 == 0,
        Field::CR4 => value & CR4_VMXE != 0 && value & CR4_OFF == 0 && value >> 32 == 0,
        Field::EFER => value & !EFER_KNOWN == 0,
        Field::RFLAGS => value >> 32 == 0 && value & 2 != 0,
        Field::DR7 => value >> 32 == 0,
        // There are no branch records in this processor.
        Field::DEBUGCTL => value == 0,
        Field::SYSENTER_CS => value >> 32 == 0,
        _ => true,
    }
}

fn narrow(value: u64) -> Result<u32, Refusal> {
    u32::try_from(value).map_err(|_| Refusal::Value)
}
