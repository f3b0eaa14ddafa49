//! Memory operands of an instruction: the addresses its data accesses may have used.
//!
//! On hardware #VC 0x404 comes with the address in CR2. TCG reports the guest-physical address
//! only, so the machine computes the candidates and lets the page tables say which one it was.
//! The operands, implicit ones included, are those that a full decoder knows. VEX and later
//! encodings are left out: they need XSAVE, which no guest is offered.

use alloc::vec::Vec;

use iced_x86::{
    Code, Decoder, DecoderOptions, Instruction, InstructionInfoFactory, MemorySize, OpAccess,
    OpKind, Register, UsedMemory,
};

/// How code is decoded and addressed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CodeSize {
    /// Real mode, or a 16-bit code segment.
    Bits16,
    /// A 32-bit code segment.
    Bits32,
    /// 64-bit mode.
    Bits64,
}

impl CodeSize {
    const fn bits(self) -> u32 {
        match self {
            Self::Bits16 => 16,
            Self::Bits32 => 32,
            Self::Bits64 => 64,
        }
    }
}

/// The instruction and the registers that its operands are made of.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// Bytes from RIP on, fewer than an instruction may have at the end of mapped memory.
    pub bytes: &'a [u8],
    /// How they are meant.
    pub size: CodeSize,
    /// RIP.
    pub rip: u64,
    /// RAX to R15, in the order of their numbers.
    pub registers: &'a [u64; 16],
    /// Bases of ES, CS, SS, DS, FS and GS.
    pub segments: [u64; 6],
}

/// First and last byte of every operand in memory that the instruction may access. Of a repeated
/// string instruction this is the element that RSI, RDI and RCX stand at.
pub fn addresses(context: &Context<'_>) -> Vec<u64> {
    let mut decoder = Decoder::with_ip(
        context.size.bits(),
        context.bytes,
        context.rip,
        DecoderOptions::NONE,
    );
    let instruction = decoder.decode();
    if instruction.is_invalid() {
        return Vec::new();
    }
    let mut factory = InstructionInfoFactory::new();
    let mut found = Vec::new();
    for memory in factory.info(&instruction).used_memory() {
        if matches!(memory.access(), OpAccess::None | OpAccess::NoMemAccess) {
            continue;
        }
        let Some(address) = memory.virtual_address(0, |register, _, _| context.value(register))
        else {
            continue;
        };
        let address = address.wrapping_add(context.bit_offset(&instruction));
        let last = address.wrapping_add(bytes_of(memory, &instruction) - 1);
        found.extend([address, last].map(|address| context.linear(address)));
    }
    found
}

/// Bytes of an operand. How much a repeated instruction accesses is unknown: one element counts.
fn bytes_of(memory: &UsedMemory, instruction: &Instruction) -> u64 {
    let size = match memory.memory_size() {
        MemorySize::Unknown => instruction.memory_size(),
        size => size,
    };
    size.size().max(1) as u64
}

impl Context<'_> {
    fn value(&self, register: Register) -> Option<u64> {
        if register.is_segment_register() {
            return self.segments.get(register.number()).copied();
        }
        if !register.is_gpr() {
            return None;
        }
        let value = *self.registers.get(register.full_register().number())?;
        Some(match register.size() {
            1 => value & 0xFF,
            2 => value & 0xFFFF,
            4 => value & 0xFFFF_FFFF,
            _ => value,
        })
    }

    /// Outside 64-bit mode linear addresses have 32 bits.
    const fn linear(&self, address: u64) -> u64 {
        match self.size {
            CodeSize::Bits64 => address,
            CodeSize::Bits16 | CodeSize::Bits32 => address & 0xFFFF_FFFF,
        }
    }

    /// Bytes from the operand of a bit test to the one that its register operand selects, a
    /// signed number of bits of any size (APM volume 3, BT).
    fn bit_offset(&self, instruction: &Instruction) -> u64 {
        use Code::{
            Bt_rm16_r16, Bt_rm32_r32, Bt_rm64_r64, Btc_rm16_r16, Btc_rm32_r32, Btc_rm64_r64,
            Btr_rm16_r16, Btr_rm32_r32, Btr_rm64_r64, Bts_rm16_r16, Bts_rm32_r32, Bts_rm64_r64,
        };
        let bits = match instruction.code() {
            Bt_rm16_r16 | Bts_rm16_r16 | Btr_rm16_r16 | Btc_rm16_r16 => 16_i64,
            Bt_rm32_r32 | Bts_rm32_r32 | Btr_rm32_r32 | Btc_rm32_r32 => 32,
            Bt_rm64_r64 | Bts_rm64_r64 | Btr_rm64_r64 | Btc_rm64_r64 => 64,
            _ => return 0,
        };
        if instruction.op0_kind() != OpKind::Memory {
            return 0;
        }
        let selected = self
            .value(instruction.op1_register())
            .unwrap_or(0)
            .cast_signed();
        let selected = match bits {
            16 => i64::from(selected as i16),
            32 => i64::from(selected as i32),
            _ => selected,
        };
        (selected.div_euclid(bits) * (bits / 8)).cast_unsigned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RIP: u64 = 0x40_0000;
    const SEGMENTS: [u64; 6] = [0, 0, 0, 0, 0xF000_0000, 0x6000_0000];

    /// Operands with RAX = 0x1000, RCX = 0x2000, and so on.
    fn operands(size: CodeSize, bytes: &[u8]) -> Vec<u64> {
        let registers = core::array::from_fn(|n| 0x1000 * (n as u64 + 1));
        addresses(&Context {
            bytes,
            size,
            rip: RIP,
            registers: &registers,
            segments: SEGMENTS,
        })
    }

    fn first(bytes: &[u8]) -> Option<u64> {
        operands(CodeSize::Bits64, bytes).first().copied()
    }

    #[test]
    fn every_form_of_address_is_computed() {
        // mov [rdi], al
        assert_eq!(first(&[0x88, 0x07]), Some(0x8000));
        // mov rax, [rbx + rcx*8 + 0x10]
        let scaled = [0x48, 0x8B, 0x44, 0xCB, 0x10];
        assert_eq!(first(&scaled), Some(0x4000 + 0x2000 * 8 + 0x10));
        // mov eax, [r12]
        assert_eq!(first(&[0x41, 0x8B, 0x04, 0x24]), Some(0xD000));
        // mov eax, [rbp - 4]
        assert_eq!(first(&[0x8B, 0x45, 0xFC]), Some(0x6000 - 4));
        // mov rax, gs:[0x28]
        let absolute = [0x65, 0x48, 0x8B, 0x04, 0x25, 0x28, 0, 0, 0];
        assert_eq!(first(&absolute), Some(0x6000_0028));
        // movabs al, [0x1122334455667788]
        let far = [0xA0, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11];
        assert_eq!(first(&far), Some(0x1122_3344_5566_7788));
        // mov eax, [ebx]: 32-bit addressing in 64-bit mode
        assert_eq!(first(&[0x67, 0x8B, 0x03]), Some(0x4000));
        // movzx eax, byte [rsi]
        assert_eq!(first(&[0x0F, 0xB6, 0x06]), Some(0x7000));
        // crc32 eax, byte [rsi]; movbe eax, [rsi]: three-byte opcodes
        assert_eq!(first(&[0xF2, 0x0F, 0x38, 0xF0, 0x06]), Some(0x7000));
        assert_eq!(first(&[0x0F, 0x38, 0xF0, 0x06]), Some(0x7000));
        // pinsrb xmm0, [rsi], 1; fld tbyte [rsi]
        assert_eq!(first(&[0x66, 0x0F, 0x3A, 0x20, 0x06, 1]), Some(0x7000));
        assert_eq!(first(&[0xDB, 0x2E]), Some(0x7000));
        // xlatb: RBX + AL
        assert_eq!(first(&[0xD7]), Some(0x4000));
    }

    #[test]
    fn rip_relative_counts_from_the_end_of_the_instruction() {
        // mov dword [rip + 0x100], 1: ten bytes
        let store = [0xC7, 0x05, 0, 1, 0, 0, 1, 0, 0, 0];
        assert_eq!(first(&store), Some(RIP + 10 + 0x100));
        // cmp byte [rip + 0x100], 0: seven bytes
        assert_eq!(first(&[0x80, 0x3D, 0, 1, 0, 0, 0]), Some(RIP + 7 + 0x100));
        // pinsrb xmm0, [rip + 0x100], 1: ten bytes
        let vector = [0x66, 0x0F, 0x3A, 0x20, 0x05, 0, 1, 0, 0, 1];
        assert_eq!(first(&vector), Some(RIP + 10 + 0x100));
    }

    #[test]
    fn implicit_operands_are_found() {
        let long = |bytes: &[u8]| operands(CodeSize::Bits64, bytes);
        // rep movsq reads at RSI and writes at RDI.
        let moved = long(&[0xF3, 0x48, 0xA5]);
        assert!(moved.contains(&0x7000) && moved.contains(&0x8007));
        // push rax writes below RSP, pop [rax] reads at RSP and writes at RAX.
        assert!(long(&[0x50]).contains(&(0x5000 - 8)));
        let popped = long(&[0x8F, 0x00]);
        assert!(popped.contains(&0x5000) && popped.contains(&0x1000));
        // ret, and call with its target in memory.
        assert!(long(&[0xC3]).contains(&0x5000));
        let call = long(&[0xFF, 0x10]);
        assert!(call.contains(&0x1000) && call.contains(&(0x5000 - 8)));
    }

    #[test]
    fn the_last_byte_is_named_too() {
        // fxsave64 [rsi]
        let area = operands(CodeSize::Bits64, &[0x48, 0x0F, 0xAE, 0x06]);
        assert_eq!(area, [0x7000, 0x71FF]);
        // cmpxchg16b [rsi]
        let pair = operands(CodeSize::Bits64, &[0x48, 0x0F, 0xC7, 0x0E]);
        assert!(pair.contains(&0x7000) && pair.contains(&0x700F));
    }

    #[test]
    fn a_bit_test_reaches_beyond_its_operand() {
        // bts [rbx], rcx with RCX = 0x2000 bits = 0x400 bytes
        assert_eq!(first(&[0x48, 0x0F, 0xAB, 0x0B]), Some(0x4000 + 0x400));
        // bts dword [rbx], ecx with a negative offset
        let mut registers = [0; 16];
        registers[3] = 0x4000;
        registers[1] = (-1_i32) as u32 as u64;
        let found = addresses(&Context {
            bytes: &[0x0F, 0xAB, 0x0B],
            size: CodeSize::Bits64,
            rip: RIP,
            registers: &registers,
            segments: SEGMENTS,
        });
        assert_eq!(found[0], 0x4000 - 4);
        // bts qword [rbx], 5: an immediate stays inside.
        assert_eq!(first(&[0x48, 0x0F, 0xBA, 0x2B, 5]), Some(0x4000));
    }

    #[test]
    fn smaller_modes_have_their_own_addressing() {
        // mov al, [bx + si] and fs: the same
        assert_eq!(
            operands(CodeSize::Bits16, &[0x8A, 0x00])[0],
            0x4000 + 0x7000
        );
        let with_base = operands(CodeSize::Bits16, &[0x64, 0x8A, 0x00]);
        assert_eq!(with_base[0], 0xF000_0000 + 0x4000 + 0x7000);
        // mov al, [eax]; push eax
        assert_eq!(operands(CodeSize::Bits32, &[0x8A, 0x00])[0], 0x1000);
        assert_eq!(operands(CodeSize::Bits32, &[0x50])[0], 0x5000 - 4);
    }

    #[test]
    fn registers_and_cut_off_bytes_are_no_operand() {
        for bytes in [&[0x48, 0x89, 0xC3][..], &[0x48, 0x8B, 0x44], &[], &[0x90]] {
            assert_eq!(first(bytes), None, "{bytes:x?}");
        }
        // lea rax, [rbx] and a prefetch access nothing.
        assert_eq!(first(&[0x48, 0x8D, 0x03]), None);
    }
}
