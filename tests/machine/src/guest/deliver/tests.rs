//! A first 2 MiB of memory with tables, and every way to a handler and not to one.

use std::format;

use super::*;
use crate::guest::testing::Pages;

const IDT: u64 = 0x10_0000;
const GDT: u64 = 0x10_1000;
const TSS: u64 = 0x10_2000;
const STACK: u64 = 0x10_4000;
const RSP0: u64 = 0x10_6000;
const IST1: u64 = 0x10_8000;
const HANDLER: u64 = 0xFFFF_8000_1234_5678;
const CODE_64: u64 = 0x00AF_9B00_0000_FFFF;
const CODE_32: u64 = 0x00CF_9B00_0000_FFFF;

/// The first 2 MiB, private, and tables for a 64-bit or 32-bit handler.
fn memory(ist: u64) -> Pages {
    let mut memory = Pages::default();
    memory.put(0x1000, 0x2007);
    memory.put(0x2000, 0x3007);
    memory.put(0x3000, 0x87 | 1 << crate::vcpu::C_BIT);
    let gate = IDT + 29 * 16;
    memory.put(
        gate,
        HANDLER & 0xFFFF | 0x18 << 16 | ist << 32 | 0x8E << 40 | (HANDLER >> 16 & 0xFFFF) << 48,
    );
    memory.put(gate + 8, HANDLER >> 32);
    memory.put(
        IDT + 29 * 8,
        0x4321 | 0x08 << 16 | 0x8F << 40 | 0x8765 << 48,
    );
    memory.put(GDT + 8, CODE_32);
    memory.put(GDT + 0x18, CODE_64);
    // The TSS keeps its stack pointers on odd multiples of 4.
    memory.put(TSS, RSP0 << 32);
    memory.put(TSS + 0x20, IST1 << 32);
    for top in [STACK, RSP0, IST1] {
        memory.put(top - 8, 0);
    }
    memory
}

fn table(base: u64) -> Segment {
    Segment {
        base,
        limit: 0xFFF,
        ..Segment::default()
    }
}

fn frame(cpl: u16) -> Frame {
    Frame {
        paging: Paging {
            cr0: 1 << 31 | 1,
            cr3: 0x1000,
            cr4: 1 << 5,
            efer: 0x500,
        },
        cs: Segment {
            selector: 0x33,
            attributes: SegmentAttributes::CODE64,
            ..table(0)
        },
        ss: Segment {
            selector: 0x2B,
            attributes: SegmentAttributes(0x93 | cpl << 5),
            ..table(0)
        },
        idtr: table(IDT),
        gdtr: table(GDT),
        tr: table(TSS),
        rflags: 0x302,
        rip: 0x1111,
        rsp: STACK - 0x18,
    }
}

fn pushed(memory: &Pages, rsp: u64) -> [u64; 6] {
    core::array::from_fn(|n| memory.get(rsp + 8 * n as u64))
}

#[test]
fn same_level_pushes_onto_the_aligned_stack() {
    let mut memory = memory(0);
    let mut cpu = frame(0);
    cpu.deliver(&mut memory, VECTOR_VC, 0x72).unwrap();
    assert_eq!(cpu.rsp, STACK - 0x20 - 48);
    assert_eq!(
        pushed(&memory, cpu.rsp),
        [0x72, 0x1111, 0x33, 0x302 | rflags::RF, STACK - 0x18, 0x2B]
    );
    assert_eq!(
        (cpu.rip, cpu.cs.selector, cpu.ss.selector),
        (HANDLER, 0x18, 0x2B)
    );
    // An interrupt gate: IF and TF are cleared.
    assert_eq!(cpu.rflags, 2);
}

#[test]
fn an_inner_level_gets_its_stack_from_the_tss() {
    let mut memory = memory(0);
    let mut cpu = frame(3);
    cpu.deliver(&mut memory, VECTOR_VC, 0x7B).unwrap();
    assert_eq!(cpu.rsp, RSP0 - 48);
    assert_eq!((cpu.ss.selector, cpu.ss.attributes.dpl()), (0, 0));
    assert_eq!(pushed(&memory, cpu.rsp)[5], 0x2B);
}

#[test]
fn an_ist_is_taken_at_any_level() {
    for cpl in [0, 3] {
        let mut memory = memory(1);
        let mut cpu = frame(cpl);
        cpu.deliver(&mut memory, VECTOR_VC, 0x404).unwrap();
        assert_eq!(cpu.rsp, IST1 - 48, "CPL {cpl}");
    }
}

#[test]
fn firmware_without_paging_gets_a_32_bit_frame() {
    let mut memory = memory(0);
    let mut cpu = protected(0);
    cpu.deliver(&mut memory, VECTOR_VC, 0x72).unwrap();
    assert_eq!(cpu.rsp, STACK - 16);
    assert_eq!(memory.get(cpu.rsp), 0x72 | 0x1111 << 32);
    assert_eq!(memory.get(cpu.rsp + 8), 0x33 | (0x302 | rflags::RF) << 32);
    assert_eq!((cpu.rip, cpu.cs.selector), (0x8765_4321, 0x08));
    // A trap gate: IF stays.
    assert_eq!(cpu.rflags, 0x202);
}

#[test]
fn what_cannot_be_delivered_is_a_double_fault() {
    let mut short = frame(0);
    short.idtr.limit = 29 * 16 + 14;
    let mut no_handler = frame(0);
    no_handler.idtr.base = TSS;
    let mut not_canonical = frame(0);
    not_canonical.rsp = 1 << 47 | 0x100;
    for mut cpu in [short, no_handler, not_canonical] {
        let before = format!("{cpu:?}");
        let error = cpu.deliver(&mut memory(0), VECTOR_VC, 0).unwrap_err();
        assert_eq!(error, DeliveryError::DoubleFault);
        assert_eq!(format!("{cpu:?}"), before);
    }
}

#[test]
fn an_unmapped_stack_or_table_is_a_page_fault() {
    let mut stackless = frame(0);
    stackless.rsp = 0x20_0000_0000;
    let address = 0x20_0000_0000 - 48;
    let error = stackless.deliver(&mut memory(0), VECTOR_VC, 0).unwrap_err();
    assert_eq!(error, DeliveryError::PageFault { address, code: 2 });
    let mut no_table = frame(0);
    no_table.idtr.base = 0x40_0000_0000;
    let address = 0x40_0000_0000 + 29 * 16;
    let error = no_table.deliver(&mut memory(0), VECTOR_VC, 0).unwrap_err();
    assert_eq!(error, DeliveryError::PageFault { address, code: 0 });
}

#[test]
fn a_stack_in_shared_memory_is_a_double_fault() {
    let mut memory = memory(0);
    memory.put(0x3000, 0x87);
    let error = frame(0).deliver(&mut memory, VECTOR_VC, 0).unwrap_err();
    assert_eq!(error, DeliveryError::DoubleFault);
}

#[test]
fn a_conforming_handler_keeps_the_level() {
    let mut memory = memory(0);
    memory.put(GDT + 0x18, CODE_64 | 1 << 42);
    let mut cpu = frame(3);
    cpu.deliver(&mut memory, VECTOR_VC, 0x72).unwrap();
    assert_eq!(cpu.rsp, STACK - 0x20 - 48);
    assert_eq!((cpu.cs.selector & 3, cpu.ss.selector), (3, 0x2B));
}

/// Protected mode without paging; level 3 has its own segments.
fn protected(cpl: u16) -> Frame {
    let mut cpu = frame(cpl);
    cpu.paging = Paging {
        cr0: 1,
        cr3: 0,
        cr4: 0,
        efer: 0,
    };
    cpu.ss.attributes = SegmentAttributes(0xC93 | cpl << 5);
    cpu.ss.limit = u32::MAX;
    cpu.rsp = STACK;
    cpu.tr.attributes = SegmentAttributes::TSS_BUSY;
    cpu
}

const DATA_32: u64 = 0x00CF_9300_0000_FFFF;

#[test]
fn an_inner_level_in_protected_mode_has_two_more_words() {
    let mut memory = memory(0);
    memory.put(GDT + 0x10, DATA_32);
    memory.put(TSS, RSP0 << 32);
    memory.put(TSS + 8, 0x10);
    let mut cpu = protected(3);
    cpu.deliver(&mut memory, VECTOR_VC, 0x7B).unwrap();
    assert_eq!(cpu.rsp, RSP0 - 24);
    assert_eq!(memory.get(cpu.rsp), 0x7B | 0x1111 << 32);
    assert_eq!(memory.get(cpu.rsp + 8), 0x33 | (0x302 | rflags::RF) << 32);
    assert_eq!(memory.get(cpu.rsp + 16), STACK | 0x2B << 32);
    assert_eq!((cpu.ss.selector, cpu.ss.attributes.dpl()), (0x10, 0));
    assert_eq!(cpu.cs.selector, 0x08);
}

#[test]
fn the_stack_of_an_inner_level_must_fit_it() {
    for (selector, descriptor) in [
        (0x13, DATA_32),              // RPL 3
        (0x10, DATA_32 | 3 << 45),    // DPL 3
        (0x10, CODE_32),              // no data
        (0x10, DATA_32 & !(1 << 41)), // read-only
        (0x10, DATA_32 & !(1 << 47)), // not present
        (0, DATA_32),                 // null
    ] {
        let mut memory = memory(0);
        memory.put(GDT + 0x10, descriptor);
        memory.put(TSS + 8, selector);
        let error = protected(3).deliver(&mut memory, VECTOR_VC, 0).unwrap_err();
        assert_eq!(
            error,
            DeliveryError::DoubleFault,
            "{selector:#x} {descriptor:#x}"
        );
    }
}

#[test]
fn a_16_bit_gate_and_stack_push_words() {
    let mut memory = memory(0);
    memory.put(
        IDT + 29 * 8,
        0x4321 | 0x08 << 16 | 0x86 << 40 | 0x8765 << 48,
    );
    let mut cpu = protected(0);
    cpu.ss.attributes = SegmentAttributes::DATA16;
    cpu.ss.limit = 0xFFFF;
    cpu.ss.base = STACK - 0x100;
    cpu.rsp = 0xABCD_0100;
    cpu.deliver(&mut memory, VECTOR_VC, 0x72).unwrap();
    // The upper half of ESP is not the stack's.
    assert_eq!(cpu.rsp, 0xABCD_00F8);
    assert_eq!(
        memory.get(STACK - 8),
        0x72 | 0x1111 << 16 | 0x33 << 32 | 0x302 << 48
    );
    assert_eq!((cpu.rip, cpu.rflags), (0x4321, 2));
}

#[test]
fn a_push_beyond_the_limit_is_a_double_fault() {
    let mut small = protected(0);
    small.ss.limit = STACK as u32 - 8;
    let mut down = protected(0);
    down.ss.attributes.0 |= 1 << 2;
    down.ss.limit = STACK as u32 - 8;
    for mut cpu in [small, down] {
        let error = cpu.deliver(&mut memory(0), VECTOR_VC, 0).unwrap_err();
        assert_eq!(error, DeliveryError::DoubleFault);
    }
    // The other way round there is room.
    let mut room = protected(0);
    room.ss.attributes.0 |= 1 << 2;
    room.ss.limit = STACK as u32 - 0x100;
    assert_eq!(room.deliver(&mut memory(0), VECTOR_VC, 0), Ok(()));
}

#[test]
fn real_mode_has_a_table_of_far_pointers_and_no_error_code() {
    let mut memory = memory(0);
    memory.put(IDT + 29 * 4 - 4, 0x1234_5678 << 32);
    let mut cpu = frame(0);
    cpu.paging.cr0 = 0x10;
    cpu.ss.attributes = SegmentAttributes::DATA16;
    cpu.ss.limit = 0xFFFF;
    cpu.ss.base = STACK - 0x100;
    cpu.rsp = 0x100;
    cpu.cs.selector = 0x900;
    cpu.deliver(&mut memory, VECTOR_VC, 0x72).unwrap();
    assert_eq!(cpu.rsp, 0xFA);
    assert_eq!(
        memory.get(STACK - 8) >> 16,
        0x1111 | 0x900 << 16 | 0x302 << 32
    );
    assert_eq!(
        (cpu.cs.selector, cpu.cs.base, cpu.rip),
        (0x1234, 0x1_2340, 0x5678)
    );
    assert_eq!(cpu.rflags, 2);
    let mut short = frame(0);
    short.paging.cr0 = 0x10;
    short.idtr.limit = 29 * 4 + 2;
    let error = short.deliver(&mut memory, VECTOR_VC, 0).unwrap_err();
    assert_eq!(error, DeliveryError::DoubleFault);
}

#[test]
fn task_gates_and_virtual_8086_mode_are_not_carried_out() {
    let mut memory = memory(0);
    memory.put(IDT + 29 * 8, 0x10 << 16 | 0x85 << 40);
    let task = protected(0).deliver(&mut memory, VECTOR_VC, 0);
    assert_eq!(task, Err(DeliveryError::Unsupported));
    let mut old = protected(3);
    old.rflags |= rflags::VM;
    let old = old.deliver(&mut memory, VECTOR_VC, 0);
    assert_eq!(old, Err(DeliveryError::Unsupported));
}
