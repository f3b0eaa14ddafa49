//! The way out: from 64-bit mode to what a processor is after reset.
//!
//! A far jump in real mode cannot make a code segment with base 0xFFFF_0000, which is where the reset
//! vector is (APM volume 2, 14.1.5). Protected mode can: its descriptor gives the base, and the base
//! stays when protection is turned off. So the last instructions run in a 16-bit segment with that base,
//! at an offset so large that base plus offset wraps to where they lie below 4 GiB; the jump to
//! 0xFFF0 then is a near one. The segment's selector is 0xF000, as after reset, which takes a
//! descriptor table of 60 KiB, nearly all of it never looked at.
//!
//! What differs from a reset: limit of CS (4 GiB), RBX (the target), arithmetic flags, GS base and
//! other MSRs without meaning in real mode.
#![expect(unsafe_code, reason = "leaves 64-bit mode for good")]

use core::arch::naked_asm;

use protocols::addr::Gpa;
use protocols::terminate::TurnstileReason;

use crate::memory::pool::Pool;

/// Base of CS after reset.
const CS_BASE: u32 = 0xFFFF_0000;
/// Selector of CS after reset.
const CS_SELECTOR: u16 = 0xF000;
/// Bytes of the descriptor table.
const TABLE_BYTES: u64 = CS_SELECTOR as u64 + 8;
/// CR0 after reset: CD, NW, ET.
const CR0_RESET: u32 = 0x6000_0010;
/// CR0 without paging, else as after reset, and protected.
const CR0_PROTECTED: u32 = CR0_RESET | 1;

/// Selectors of the way down.
const CODE32: u16 = 0x08;
const DATA32: u16 = 0x10;
const DATA16: u16 = 0x18;

/// Flat 32-bit code and data; data as after reset (base 0, 64 KiB).
const DESCRIPTORS: [(u16, u64); 4] = [
    (CODE32, 0x00CF_9B00_0000_FFFF),
    (DATA32, 0x00CF_9300_0000_FFFF),
    (DATA16, 0x0000_9300_0000_FFFF),
    // 16-bit code, base 0xFFFF_0000, 4 GiB.
    (CS_SELECTOR, 0xFF8F_9BFF_0000_FFFF),
];

/// A descriptor table and what it leads to.
#[derive(Debug)]
pub struct Reset {
    table: Gpa,
    /// Offset in CS of the first instruction.
    ip: u16,
    /// EDX after reset: family, model, stepping.
    signature: u32,
}

impl Reset {
    /// Prepares a start at the linear address `vector`, in the last 64 KiB below 4 GiB.
    ///
    /// # Errors
    /// [`TurnstileReason::FIRMWARE`] if it is elsewhere, [`TurnstileReason::OUT_OF_MEMORY`].
    pub fn prepare(vector: u32, pool: &mut Pool) -> Result<Self, TurnstileReason> {
        let ip = vector
            .checked_sub(CS_BASE)
            .and_then(|offset| u16::try_from(offset).ok())
            .ok_or(TurnstileReason::FIRMWARE)?;
        let table = pool.bytes(TABLE_BYTES)?;
        for (selector, descriptor) in DESCRIPTORS {
            let entry = pool.address(table) + u64::from(selector);
            // SAFETY: inside the memory that was just taken, and a multiple of 8.
            unsafe { (entry as *mut u64).write(descriptor) };
        }
        Ok(Self {
            table,
            ip,
            signature: core::arch::x86_64::__cpuid(1).eax,
        })
    }

    /// Leaves.
    pub fn start(self) -> ! {
        // The region is mapped one to one and lies below 4 GiB, so the address is the linear one with
        // and without paging.
        let pointer = Pointer {
            limit: (TABLE_BYTES - 1) as u16,
            base: self.table.get(),
        };
        // SAFETY: the table is as the function wants it, and nothing of the paravisor is to run any
        // more: no lock is held, no device was told to write to memory.
        unsafe { leave(&pointer, u32::from(self.ip), self.signature) }
    }
}

/// Operand of LGDT.
#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: u64,
}

/// Goes down to real mode and to `ip` in the segment of the reset vector.
///
/// # Safety
/// 1. `table` describes a table with [`DESCRIPTORS`], at the same address with and without paging;
/// 2. so does this code's page lie; 3. nothing runs afterwards but what is at the reset vector.
#[unsafe(naked)]
unsafe extern "sysv64" fn leave(table: &Pointer, ip: u32, signature: u32) -> ! {
    naked_asm!(
        "cli",
        "cld",
        "mov ebp, edx",
        "mov ebx, esi",
        "lgdt [rdi]",
        "lidt [rip + 5f]",
        // Compatibility mode; the stack is in the region as well.
        "push {code32}",
        "lea rax, [rip + 2f]",
        "push rax",
        "retfq",
        ".code32",
        "2:",
        "mov eax, {data32}",
        "mov ds, eax",
        "mov es, eax",
        "mov ss, eax",
        "mov fs, eax",
        "mov gs, eax",
        // Paging off: out of long mode.
        "mov eax, {cr0_protected}",
        "mov cr0, eax",
        "xor eax, eax",
        "xor edx, edx",
        "mov ecx, 0xC0000080",
        "wrmsr",
        // After EFER: a #VMEXIT out of a guest with LME but without PAE and paging loses the host's CR0
        // in QEMU's TCG (cpu_x86_update_cr0).
        "mov cr3, eax",
        "mov cr4, eax",
        "mov eax, {data16}",
        "mov ds, eax",
        "mov es, eax",
        "mov ss, eax",
        "mov fs, eax",
        "mov gs, eax",
        // Far jump, 32-bit offset: to the next line as seen from a segment with base 0xFFFF0000.
        ".byte 0xEA",
        ".long 3f + 0x10000",
        ".word {cs_selector}",
        ".code16",
        "3:",
        "mov eax, {cr0_reset}",
        "mov cr0, eax",
        // Real mode. Selectors of 0; limits stay.
        "xor eax, eax",
        "mov ds, ax",
        "mov es, ax",
        "mov ss, ax",
        "mov fs, ax",
        "mov gs, ax",
        "xor ecx, ecx",
        "xor esi, esi",
        "xor edi, edi",
        "xor esp, esp",
        "mov edx, ebp",
        "xor ebp, ebp",
        "jmp bx",
        ".code64",
        // IDTR after reset.
        "5:",
        ".word 0xFFFF",
        ".quad 0",
        code32 = const CODE32,
        data32 = const DATA32,
        data16 = const DATA16,
        cr0_protected = const CR0_PROTECTED,
        cr0_reset = const CR0_RESET,
        cs_selector = const CS_SELECTOR,
    )
}
