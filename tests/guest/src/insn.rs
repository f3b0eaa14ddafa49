//! One function per instruction, with exceptions as values (see [`crate::trap`]).
//!
//! Encodings are those of [`protocols::snp::opcode`]. Operands that the hardware documents as
//! reserved are passed through unchanged, because the cases try them.

#![expect(unsafe_code, reason = "privileged and SNP instructions")]

use core::arch::asm;

use protocols::addr::PageSize;
use protocols::snp::opcode;
use x86_64::registers::control::{Cr4, Cr4Flags};

use crate::trap::{self, Trap};

/// The model-specific register with the GHCB address or request (APM 15.35.7).
pub use protocols::snp::msr::GHCB as GHCB_MSR;

/// Assembles `$code` with an entry in the fix-up table and its operands. The entry covers the
/// first instruction of `$code`.
macro_rules! guarded {
    ($code:literal, $($operands:tt)*) => {
        asm!(
            "2:",
            $code,
            "3:",
            ".pushsection .fixups, \"a\"",
            ".balign 8",
            ".quad 2b, 3b",
            ".popsection",
            $($operands)*
        )
    };
}

/// The same for an SNP instruction, given by its bytes.
macro_rules! guarded_opcode {
    ($bytes:expr, $($operands:tt)*) => {
        guarded!(
            ".byte {byte0}, {byte1}, {byte2}, {byte3}",
            byte0 = const $bytes[0],
            byte1 = const $bytes[1],
            byte2 = const $bytes[2],
            byte3 = const $bytes[3],
            $($operands)*
        )
    };
}

/// VMGEXIT with the operands that the caller names.
macro_rules! vmgexit_with {
    ($($operands:tt)*) => {
        core::arch::asm!(
            ".byte {byte0}, {byte1}, {byte2}, {byte3}",
            byte0 = const protocols::snp::opcode::VMGEXIT[0],
            byte1 = const protocols::snp::opcode::VMGEXIT[1],
            byte2 = const protocols::snp::opcode::VMGEXIT[2],
            byte3 = const protocols::snp::opcode::VMGEXIT[3],
            $($operands)*
        )
    };
}
pub(crate) use vmgexit_with;

/// Page size operand of the RMP instructions: 4 KiB.
pub const SIZE_4K: u64 = PageSize::Size4K.encoding() as u64;
/// Page size operand of the RMP instructions: 2 MiB.
pub const SIZE_2M: u64 = PageSize::Size2M.encoding() as u64;

/// What PVALIDATE left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pvalidated {
    /// Return code.
    pub eax: u32,
    /// CF: with code 0, the page had the wanted state already. False for any other code,
    /// because CF means nothing there.
    pub no_change: bool,
}

impl Pvalidated {
    /// Done, state changed.
    pub const DONE: Self = Self {
        eax: 0,
        no_change: false,
    };
    /// Done, nothing to change (CF=1).
    pub const NO_CHANGE: Self = Self {
        eax: 0,
        no_change: true,
    };

    /// Failed with a return code.
    #[must_use]
    pub const fn failed(eax: u32) -> Self {
        Self {
            eax,
            no_change: false,
        }
    }
}

/// PVALIDATE with RAX=`address`, ECX=`size`, EDX=`action`.
///
/// # Errors
///
/// The exception it raised.
pub fn pvalidate(address: u64, size: u64, action: u64) -> Result<Pvalidated, Trap> {
    let mut rax = address;
    let carry: u8;
    // SAFETY: changes the acceptance of a page the caller names; the cases only name pages
    // that hold no Rust object, and a fault is fixed up.
    unsafe {
        asm!(
            // An instruction that faults sets nothing: start with a known CF.
            "clc",
            "2:",
            ".byte {byte0}, {byte1}, {byte2}, {byte3}",
            "3:",
            "setc {carry}",
            ".pushsection .fixups, \"a\"",
            ".balign 8",
            ".quad 2b, 3b",
            ".popsection",
            byte0 = const opcode::PVALIDATE[0],
            byte1 = const opcode::PVALIDATE[1],
            byte2 = const opcode::PVALIDATE[2],
            byte3 = const opcode::PVALIDATE[3],
            carry = out(reg_byte) carry,
            inout("rax") rax,
            in("rcx") size,
            in("rdx") action,
        );
    }
    let eax = rax as u32;
    trap::result(Pvalidated {
        eax,
        no_change: eax == 0 && carry != 0,
    })
}

/// RMPADJUST with RAX=`address`, RCX=`size`, RDX=`attributes`; returns EAX.
///
/// # Errors
///
/// The exception it raised.
pub fn rmpadjust(address: u64, size: u64, attributes: u64) -> Result<u32, Trap> {
    let mut rax = address;
    // SAFETY: changes permissions of other VMPLs on a page the caller names; a fault is fixed
    // up.
    unsafe {
        guarded_opcode!(opcode::RMPADJUST,
            inout("rax") rax, in("rcx") size, in("rdx") attributes);
    }
    trap::result(rax as u32)
}

/// What RMPQUERY left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queried {
    /// Return code.
    pub eax: u32,
    /// RDX: bits 15:8 permissions, bit 16 VMSA.
    pub attributes: u64,
    /// RCX: page size.
    pub size: u64,
}

/// RMPQUERY with RAX=`address`, RDX=`vmpl`.
///
/// # Errors
///
/// The exception it raised.
pub fn rmpquery(address: u64, vmpl: u64) -> Result<Queried, Trap> {
    let (mut rax, mut rcx, mut rdx) = (address, 0_u64, vmpl);
    // SAFETY: reads the RMP entry of a page; a fault is fixed up.
    unsafe {
        guarded_opcode!(opcode::RMPQUERY, inout("rax") rax, inout("rcx") rcx,
            inout("rdx") rdx);
    }
    trap::result(Queried {
        eax: rax as u32,
        attributes: rdx,
        size: rcx,
    })
}

/// Attribute operand of RMPADJUST.
#[must_use]
pub const fn attributes(vmpl: u64, permissions: u64, vmsa: bool) -> u64 {
    vmpl | permissions << 8 | (vmsa as u64) << 16
}

/// Reads eight bytes at a virtual address.
///
/// # Errors
///
/// The exception the access raised.
pub fn load(address: u64) -> Result<u64, Trap> {
    let mut value = 0_u64;
    // SAFETY: a read of memory; a fault is fixed up. Devices are not named by the cases.
    unsafe {
        guarded!("mov {value}, qword ptr [{address}]",
            value = inout(reg) value, address = in(reg) address, options(nostack));
    }
    trap::result(value)
}

/// Writes eight bytes at a virtual address.
///
/// # Errors
///
/// The exception the access raised.
pub fn store(address: u64, value: u64) -> Result<(), Trap> {
    // SAFETY: the cases name pages that hold no Rust object; a fault is fixed up.
    unsafe {
        guarded!("mov qword ptr [{address}], {value}",
            value = in(reg) value, address = in(reg) address, options(nostack));
    }
    trap::result(())
}

/// Calls a subroutine at a virtual address and returns its RAX.
///
/// # Errors
///
/// The exception of the first fetch, if it fails.
///
/// # Safety
///
/// 1. If the fetch succeeds, a subroutine of the C calling convention stands there.
pub unsafe fn call(address: u64) -> Result<u64, Trap> {
    let value: u64;
    trap::watch_fetch(Some(address));
    // SAFETY: by point 1 the subroutine returns and keeps the calling convention; if its first
    // byte cannot be fetched the handler returns to behind the call.
    unsafe {
        asm!("call {address}", address = in(reg) address, lateout("rax") value,
            clobber_abi("C"));
    }
    trap::watch_fetch(None);
    trap::result(value)
}

/// RDTSC.
#[must_use]
pub fn time_stamp() -> u64 {
    // SAFETY: every processor here has it, and it changes nothing but its two registers.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Takes interrupts for a moment.
pub fn open_interrupts() {
    // SAFETY: the handlers are installed; interrupts are off before and after.
    unsafe { asm!("sti", "nop", "nop", "cli") };
}

/// Takes interrupts while `more` says so.
pub fn open_interrupts_while(mut more: impl FnMut() -> bool) {
    // SAFETY: the handlers are installed; interrupts are off before and after.
    unsafe { asm!("sti") };
    while more() {
        core::hint::spin_loop();
    }
    // SAFETY: as above.
    unsafe { asm!("cli") };
}

/// STI and, in its shadow, TDG.VP.INFO; the address behind that instruction.
pub fn tdcall_behind_sti() -> u64 {
    let behind: u64;
    // SAFETY: the handlers are installed, interrupts are off before and after; the leaf changes the
    // registers that are named and no memory.
    unsafe {
        asm!(
            "sti",
            ".byte 0x66, 0x0F, 0x01, 0xCC",
            "2: nop",
            "cli",
            "lea rax, [rip + 2b]",
            inout("rax") 1_u64 => behind, out("rcx") _, out("rdx") _,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    behind
}

/// STI and, in its shadow, HLT that raises an exception.
///
/// # Errors
///
/// The exception it raised.
pub fn halt_behind_sti() -> Result<(), Trap> {
    // SAFETY: the handlers are installed, interrupts are off before and after; HLT is reflected.
    unsafe {
        asm!(
            "sti",
            "2: hlt",
            "3: cli",
            ".pushsection .fixups, \"a\"",
            ".balign 8",
            ".quad 2b, 3b",
            ".popsection",
        );
    }
    trap::result(())
}

/// NOP with interrupts on where one waits, which may raise an exception on its way.
///
/// # Errors
///
/// The exception it raised.
pub fn open_interrupts_guarded() -> Result<(), Trap> {
    // SAFETY: the handlers are installed; interrupts are off before and after.
    unsafe {
        asm!(
            "sti",
            "nop",
            "2: nop",
            "3: cli",
            ".pushsection .fixups, \"a\"",
            ".balign 8",
            ".quad 2b, 3b",
            ".popsection",
        );
    }
    trap::result(())
}

/// The four registers CPUID answers in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidResult {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// CPUID.
///
/// # Errors
///
/// The exception it raised (#VC where the platform reflects it).
pub fn cpuid(leaf: u32, subleaf: u32) -> Result<CpuidResult, Trap> {
    let (mut eax, mut ecx, mut edx) = (leaf, subleaf, 0_u32);
    let mut rbx = 0_u64;
    // SAFETY: CPUID changes registers only; RBX is kept because the compiler may use it.
    unsafe {
        asm!(
            "xchg rbx, {rbx}",
            "2:",
            "cpuid",
            "3:",
            "xchg rbx, {rbx}",
            ".pushsection .fixups, \"a\"",
            ".balign 8",
            ".quad 2b, 3b",
            ".popsection",
            rbx = inout(reg) rbx,
            inout("eax") eax,
            inout("ecx") ecx,
            inout("edx") edx,
        );
    }
    trap::result(CpuidResult {
        eax,
        ebx: rbx as u32,
        ecx,
        edx,
    })
}

/// RDMSR.
///
/// # Errors
///
/// The exception it raised.
pub fn rdmsr(register: u32) -> Result<u64, Trap> {
    let (mut low, mut high) = (0_u32, 0_u32);
    // SAFETY: the registers the cases read have no side effect on reading.
    unsafe {
        guarded!("rdmsr", in("ecx") register, inout("eax") low, inout("edx") high,
            options(nomem, nostack));
    }
    trap::result(u64::from(high) << 32 | u64::from(low))
}

/// WRMSR.
///
/// # Errors
///
/// The exception it raised.
pub fn wrmsr(register: u32, value: u64) -> Result<(), Trap> {
    // SAFETY: the cases write the GHCB register and registers that must be refused.
    unsafe {
        guarded!("wrmsr", in("ecx") register, in("eax") value as u32,
            in("edx") (value >> 32) as u32, options(nostack));
    }
    trap::result(())
}

/// OUT of one byte.
///
/// # Errors
///
/// The exception it raised.
pub fn out8(port: u16, value: u8) -> Result<(), Trap> {
    // SAFETY: the ports used are the second serial port's.
    unsafe {
        guarded!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack));
    }
    trap::result(())
}

/// OUT of four bytes.
///
/// # Errors
///
/// The exception it raised.
pub fn out32(port: u16, value: u32) -> Result<(), Trap> {
    // SAFETY: the port used is the debug exit.
    unsafe {
        guarded!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack));
    }
    trap::result(())
}

/// HLT, where it raises an exception.
///
/// # Errors
///
/// The exception it raised.
pub fn halt_once() -> Result<(), Trap> {
    // SAFETY: the cases execute it where it is reflected.
    unsafe { guarded!("hlt", options(nomem, nostack)) };
    trap::result(())
}

/// WBINVD.
///
/// # Errors
///
/// The exception it raised.
pub fn wbinvd() -> Result<(), Trap> {
    // SAFETY: changes caches only.
    unsafe { guarded!("wbinvd", options(nostack)) };
    trap::result(())
}

/// INVD.
///
/// # Errors
///
/// The exception it raised.
pub fn invd() -> Result<(), Trap> {
    // SAFETY: the cases execute it where it is reflected, so no cache is dropped.
    unsafe { guarded!("invd", options(nostack)) };
    trap::result(())
}

/// MONITOR of its own code.
///
/// # Errors
///
/// The exception it raised.
pub fn monitor() -> Result<(), Trap> {
    // SAFETY: as for `mwait`; the address is one that can be read.
    unsafe {
        guarded!("monitor", in("rax") monitor as fn() -> _ as usize, in("ecx") 0, in("edx") 0, options(nostack));
    }
    trap::result(())
}

/// MWAIT.
///
/// # Errors
///
/// The exception it raised.
pub fn mwait() -> Result<(), Trap> {
    // SAFETY: the cases execute it where it is reflected.
    unsafe { guarded!("mwait", in("eax") 0, in("ecx") 0, options(nostack)) };
    trap::result(())
}

/// VMCALL, Intel's call to a hypervisor.
///
/// # Errors
///
/// The exception it raised.
pub fn vmcall() -> Result<(), Trap> {
    // SAFETY: the cases execute it where it is reflected.
    unsafe { guarded!(".byte 0x0F, 0x01, 0xC1", options(nostack)) };
    trap::result(())
}

/// 0F 01 CC: TDCALL without its prefix.
///
/// # Errors
///
/// The exception it raised.
pub fn tdcall_without_prefix() -> Result<(), Trap> {
    // SAFETY: an undefined instruction.
    unsafe { guarded!(".byte 0x0F, 0x01, 0xCC", options(nostack)) };
    trap::result(())
}

/// IN of one byte from a port named in the instruction (0x71, CMOS data).
///
/// # Errors
///
/// The exception it raised.
pub fn in8_cmos() -> Result<(), Trap> {
    // SAFETY: the cases execute it where it is reflected.
    unsafe { guarded!("in al, 0x71", out("al") _, options(nomem, nostack)) };
    trap::result(())
}

/// UD2.
///
/// # Errors
///
/// #UD, always.
pub fn undefined() -> Result<(), Trap> {
    // SAFETY: raises #UD, which is fixed up.
    unsafe { guarded!("ud2", options(nomem, nostack)) };
    trap::result(())
}

/// The 16 XMM registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(16))]
pub struct Xmm(pub [[u64; 2]; 16]);

/// Enables the XMM registers. Compiled code does not use them.
pub fn enable_xmm() {
    // SAFETY: changes nothing but that instructions exist.
    unsafe { Cr4::update(|flags| flags.insert(Cr4Flags::OSFXSR)) };
}

/// Loads all XMM registers.
pub fn load_xmm(values: &Xmm) {
    // SAFETY: reads the 256 bytes; compiled code keeps nothing in these registers.
    unsafe {
        asm!(
            ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
            "movaps xmm\\n, [{values} + \\n * 16]",
            ".endr",
            values = in(reg) values,
            options(nostack, readonly),
        );
    }
}

/// Reads all XMM registers.
#[must_use]
pub fn read_xmm() -> Xmm {
    let mut values = Xmm([[0; 2]; 16]);
    // SAFETY: writes the 256 bytes.
    unsafe {
        asm!(
            ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
            "movaps [{values} + \\n * 16], xmm\\n",
            ".endr",
            values = in(reg) &mut values,
            options(nostack),
        );
    }
    values
}

/// VMGEXIT without touching the GHCB register.
pub fn vmgexit() {
    // SAFETY: a request the caller has prepared; all guest registers are kept by the
    // protocol (GHCB 2.1).
    unsafe { vmgexit_with!(options(nostack)) };
}

/// VMGEXIT with RAX=`rax`; returns RAX, which whoever serves the request may have changed.
pub fn vmgexit_with_rax(rax: u64) -> u64 {
    let mut value = rax;
    // SAFETY: as for `vmgexit`.
    unsafe { vmgexit_with!(inout("rax") value, options(nostack)) };
    value
}

/// VMMCALL (no prefix) with RAX, RCX, RDX; returns RAX and RDX.
///
/// # Errors
///
/// The exception it raised.
pub fn vmmcall(rax: u64, rcx: u64, rdx: u64) -> Result<(u64, u64), Trap> {
    let (mut rax, mut rdx) = (rax, rdx);
    // SAFETY: an oracle call (see `oracle`): it reads state or acts on pages that hold no
    // Rust object.
    unsafe {
        guarded!(".byte {byte0}, {byte1}, {byte2}",
            byte0 = const opcode::VMMCALL[0],
            byte1 = const opcode::VMMCALL[1],
            byte2 = const opcode::VMMCALL[2], inout("rax") rax, in("rcx") rcx, inout("rdx") rdx,
            options(nostack));
    }
    trap::result((rax, rdx))
}

/// HLT with interrupts off, which ends the run ("halted") where nothing else has.
pub fn halt() {
    // SAFETY: no interrupt handler exists; the guest is done.
    unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
}
