//! Memory operands of an instruction: the addresses a data access may have used.
//!
//! On hardware #VC 0x404 comes with the address in CR2. TCG reports the guest-physical address
//! only, so the machine computes the candidates and lets the page tables say which one it was.
//! 64-bit code with one- and two-byte opcodes is covered (compilers of paravisors and kernels
//! emit no others in code that runs before memory is accepted); anything else has no operand.

use alloc::vec::Vec;

const RSP: usize = 4;
const RBP: usize = 5;
const RSI: usize = 6;
const RDI: usize = 7;

/// First and last byte of every operand of up to 16 bytes that the instruction in `bytes` at
/// `rip` may access: the ModRM operand, string and stack operands. `registers` are RAX to R15,
/// `segments` the bases of FS and GS.
pub fn addresses(bytes: &[u8], rip: u64, registers: &[u64; 16], segments: [u64; 2]) -> Vec<u64> {
    let mut found = Vec::new();
    let mut add = |address: u64| found.extend([address, address.wrapping_add(15)]);
    // Stack and string operands need no decoding: they are tried last and do no harm.
    if let Some(address) = modrm_operand(bytes, rip, registers, segments) {
        add(address);
    }
    for register in [RDI, RSI] {
        add(registers[register]);
    }
    add(registers[RSP].wrapping_sub(16));
    add(registers[RSP]);
    found
}

/// The effective address of the ModRM operand, if the instruction has one in memory.
fn modrm_operand(bytes: &[u8], rip: u64, registers: &[u64; 16], segments: [u64; 2]) -> Option<u64> {
    let mut rest = bytes.iter().copied().enumerate();
    let mut base = 0;
    let mut operand_16 = false;
    let mut rex = 0;
    let (mut at, mut opcode) = rest.next()?;
    loop {
        match opcode {
            0x64 => base = segments[0],
            0x65 => base = segments[1],
            0x66 => operand_16 = true,
            0x26 | 0x2E | 0x36 | 0x3E | 0xF0 | 0xF2 | 0xF3 => {}
            _ => break,
        }
        (at, opcode) = rest.next()?;
    }
    if opcode & 0xF0 == 0x40 {
        rex = opcode;
        (at, opcode) = rest.next()?;
    }
    let two_byte = opcode == 0x0F;
    if two_byte {
        (at, opcode) = rest.next()?;
    }
    if !has_modrm(opcode, two_byte) {
        return None;
    }
    let modrm = *bytes.get(at + 1)?;
    let mut next = at + 2;
    let (mode, reg, rm) = (modrm >> 6, modrm >> 3 & 7, usize::from(modrm & 7));
    if mode == 3 {
        return None;
    }
    let rex_b = usize::from(rex & 1) << 3;
    let rex_x = usize::from(rex >> 1 & 1) << 3;
    let mut address = base;
    let mut relative = false;
    let mut wide_displacement = mode == 2;
    if rm == RSP {
        let sib = *bytes.get(next)?;
        next += 1;
        let index = usize::from(sib >> 3 & 7) | rex_x;
        if index != RSP {
            address = address.wrapping_add(registers[index] << (sib >> 6));
        }
        let sib_base = usize::from(sib & 7);
        if sib_base == RBP && mode == 0 {
            wide_displacement = true;
        } else {
            address = address.wrapping_add(registers[sib_base | rex_b]);
        }
    } else if rm == RBP && mode == 0 {
        relative = true;
        wide_displacement = true;
    } else {
        address = address.wrapping_add(registers[rm | rex_b]);
    }
    if wide_displacement {
        let raw = bytes.get(next..next + 4)?;
        next += 4;
        let value = i32::from_le_bytes(raw.try_into().ok()?);
        address = address.wrapping_add_signed(i64::from(value));
    } else if mode == 1 {
        address = address.wrapping_add_signed(i64::from(*bytes.get(next)? as i8));
        next += 1;
    }
    if relative {
        let length = next as u64 + immediate_bytes(opcode, two_byte, reg, operand_16);
        address = address.wrapping_add(rip).wrapping_add(length);
    }
    Some(address)
}

/// Whether an opcode of the one- or two-byte map has a ModRM byte (APM volume 3, appendix A).
const fn has_modrm(opcode: u8, two_byte: bool) -> bool {
    if two_byte {
        return !matches!(opcode,
            0x05..=0x0C | 0x0E | 0x30..=0x3F | 0x77 | 0x80..=0x8F | 0xA0..=0xA2
            | 0xA8..=0xAA | 0xC8..=0xCF);
    }
    match opcode {
        0x00..=0x3F => opcode & 7 < 4,
        0x63 | 0x69 | 0x6B | 0x80..=0x8F | 0xC0 | 0xC1 | 0xC6 | 0xC7 | 0xD0..=0xD3 => true,
        0xD8..=0xDF | 0xF6 | 0xF7 | 0xFE | 0xFF => true,
        _ => false,
    }
}

/// Bytes of the immediate behind a ModRM operand.
const fn immediate_bytes(opcode: u8, two_byte: bool, reg: u8, operand_16: bool) -> u64 {
    let wide = if operand_16 { 2 } else { 4 };
    match (two_byte, opcode) {
        (true, 0x70..=0x73 | 0xA4 | 0xAC | 0xBA | 0xC2 | 0xC4..=0xC6) => 1,
        (false, 0x6B | 0x80 | 0x82 | 0x83 | 0xC0 | 0xC1 | 0xC6) => 1,
        (false, 0x69 | 0x81 | 0xC7) => wide,
        // TEST is the only one of its group with an immediate.
        (false, 0xF6) if reg < 2 => 1,
        (false, 0xF7) if reg < 2 => wide,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RIP: u64 = 0x40_0000;

    fn operand(bytes: &[u8]) -> Option<u64> {
        let registers = core::array::from_fn(|n| 0x1000 * (n as u64 + 1));
        modrm_operand(bytes, RIP, &registers, [0xF000_0000, 0x6000_0000])
    }

    #[test]
    fn every_form_of_address_is_computed() {
        // mov [rdi], al
        assert_eq!(operand(&[0x88, 0x07]), Some(0x8000));
        // mov rax, [rbx + rcx*8 + 0x10]
        assert_eq!(
            operand(&[0x48, 0x8B, 0x44, 0xCB, 0x10]),
            Some(0x4000 + 0x2000 * 8 + 0x10)
        );
        // mov eax, [r12]
        assert_eq!(operand(&[0x41, 0x8B, 0x04, 0x24]), Some(0xD000));
        // mov eax, [rbp - 4]
        assert_eq!(operand(&[0x8B, 0x45, 0xFC]), Some(0x6000 - 4));
        // mov rax, gs:[0x28]
        let absolute = [0x65, 0x48, 0x8B, 0x04, 0x25, 0x28, 0, 0, 0];
        assert_eq!(operand(&absolute), Some(0x6000_0028));
        // movzx eax, byte [rsi]
        assert_eq!(operand(&[0x0F, 0xB6, 0x06]), Some(0x7000));
    }

    #[test]
    fn rip_relative_counts_from_the_end_of_the_instruction() {
        // mov dword [rip + 0x100], 1: ten bytes
        let store = [0xC7, 0x05, 0, 1, 0, 0, 1, 0, 0, 0];
        assert_eq!(operand(&store), Some(RIP + 10 + 0x100));
        // cmp byte [rip + 0x100], 0: seven bytes
        assert_eq!(operand(&[0x80, 0x3D, 0, 1, 0, 0, 0]), Some(RIP + 7 + 0x100));
        // mov al, [rip + 0x100]: six bytes
        assert_eq!(operand(&[0x8A, 0x05, 0, 1, 0, 0]), Some(RIP + 6 + 0x100));
    }

    #[test]
    fn registers_and_cut_off_bytes_are_no_operand() {
        assert_eq!(operand(&[0x48, 0x89, 0xC3]), None);
        assert_eq!(operand(&[0x48, 0x8B, 0x44]), None);
        assert_eq!(operand(&[]), None);
        assert_eq!(operand(&[0xC3]), None);
    }

    #[test]
    fn string_and_stack_operands_are_candidates() {
        let registers = core::array::from_fn(|n| 0x1000 * (n as u64 + 1));
        // rep stosq
        let found = addresses(&[0xF3, 0x48, 0xAB], RIP, &registers, [0; 2]);
        assert!(found.contains(&0x8000));
        assert!(found.contains(&(0x5000 - 16)));
    }
}
