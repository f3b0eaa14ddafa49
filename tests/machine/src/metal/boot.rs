//! From the reset vector to Rust.
//!
//! Owns the code in the ROM's last page: 16-bit at the reset vector, 32-bit to find the end of
//! low memory, copy the image there and build the first page tables, 64-bit to enter
//! [`super::start`]. Also the trampoline of the other CPUs.
//!
//! Invariants:
//! * nothing of RAM is touched but the image's own 4 MiB below the end of low memory;
//! * the page tables map the image at [`VBASE`], the first 512 GiB of physical memory at
//!   [`super::memory::DIRECT_MAP`] and, until [`super::memory::init`] drops it, at 0.

#![expect(
    unsafe_code,
    reason = "assembly of the reset path, and the statics it fills"
)]

use alloc::boxed::Box;
use core::arch::global_asm;
use core::ptr;

use super::memory;

/// Where the image is linked and mapped.
pub const VBASE: u64 = 0xFFFF_FFFF_8000_0000;
/// Bytes of RAM mapped at [`VBASE`]; the linker script asserts that the image fits.
pub const IMAGE_SPAN: u64 = 4 << 20;

/// CMOS index of the memory between 16 MiB and 4 GiB, in 64 KiB units (QEMU `pc_cmos_init`).
const CMOS_LOW_64K: u32 = 0x34;

/// Where the other CPUs start: a page of conventional memory, given back before the guest runs.
pub const TRAMPOLINE: u64 = 0x8000;

const BOOT_STACK: usize = 256 << 10;

/// One page-table page, or one page of stack.
#[repr(C, align(4096))]
pub struct Page([u8; 4096]);

impl Page {
    /// A page of zeros.
    pub const fn zeroed() -> Self {
        Page([0; 4096])
    }
}

/// Physical address of the root of the machine's page tables.
pub fn root_table_physical() -> u64 {
    super::cpu::cr3()
}

/// The root of the machine's own address space.
#[unsafe(link_section = ".bss.boot_tables")]
#[unsafe(no_mangle)]
static mut BOOT_PML4: Page = Page::zeroed();
/// The first 512 GiB by 1 GiB pages.
#[unsafe(link_section = ".bss.boot_tables")]
#[unsafe(no_mangle)]
static mut BOOT_PDPT_DIRECT: Page = Page::zeroed();
#[unsafe(link_section = ".bss.boot_tables")]
#[unsafe(no_mangle)]
static mut BOOT_PDPT_IMAGE: Page = Page::zeroed();
#[unsafe(link_section = ".bss.boot_tables")]
#[unsafe(no_mangle)]
static mut BOOT_PD_IMAGE: Page = Page::zeroed();
#[unsafe(link_section = ".bss.boot_tables")]
#[unsafe(no_mangle)]
static mut BOOT_STACK_PAGES: [Page; BOOT_STACK / 4096] =
    [const { Page::zeroed() }; BOOT_STACK / 4096];

/// Runs `action` with the first 512 GiB mapped at 0 as well, for code that turns paging on.
pub fn with_identity_map(action: impl FnOnce()) {
    let root = memory::virt(root_table_physical()).cast::<u64>();
    // SAFETY: entry 256 maps the same memory in the direct map; entry 0 is unused otherwise.
    unsafe { root.write_volatile(root.add(256).read()) };
    action();
    // SAFETY: as above; the other CPUs have left the trampoline.
    unsafe { root.write_volatile(0) };
    x86_64::instructions::tlb::flush_all();
}

/// Copies the trampoline to its page and gives what was there.
pub fn install_trampoline() -> Box<Page> {
    let mut saved = Box::new(Page::zeroed());
    let page = memory::virt(TRAMPOLINE);
    // SAFETY: conventional memory that the guest does not use yet; the blob lies in the image.
    unsafe {
        ptr::copy_nonoverlapping(page, saved.0.as_mut_ptr(), 4096);
        let blob = &raw const trampoline_start;
        let end = &raw const trampoline_end;
        ptr::copy_nonoverlapping(blob, page, end as usize - blob as usize);
    }
    saved
}

/// Puts back what [`install_trampoline`] gave.
pub fn remove_trampoline(saved: &Page) {
    // SAFETY: no CPU is in the trampoline any more.
    unsafe { ptr::copy_nonoverlapping(saved.0.as_ptr(), memory::virt(TRAMPOLINE), 4096) };
}

/// Tells the trampoline what the next CPU needs: the stack's end and the argument of
/// [`super::smp::other_start`].
pub fn arm_trampoline(stack: u64, argument: u64) {
    let values = [root_table_physical(), stack, argument];
    // SAFETY: the three words at the end of the blob, inside the trampoline's page.
    unsafe {
        let offset =
            (&raw const trampoline_values) as usize - (&raw const trampoline_start) as usize;
        memory::virt(TRAMPOLINE)
            .add(offset)
            .cast::<[u64; 3]>()
            .write_volatile(values);
    }
}

unsafe extern "C" {
    static trampoline_start: u8;
    static trampoline_values: u8;
    static trampoline_end: u8;
}

// Runs at TRAMPOLINE (CS = TRAMPOLINE >> 4, IP = 0); every address in it is computed from there.
global_asm!(
    r#"
    .pushsection .rodata.trampoline, "a", @progbits
    .balign 16
    .globl trampoline_start
trampoline_start:
    .code16
    cli
    cld
    movw %cs, %ax
    movw %ax, %ds
    lgdtl trampoline_gdtr - trampoline_start
    movl %cr0, %eax
    andl $0x9FFFFFFF, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $0x08, $({base} + 2f - trampoline_start)
    .code32
2:  movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %ss
    movl {base} + trampoline_values - trampoline_start, %eax
    movl %eax, %cr3
    movl $0x6A0, %eax
    movl %eax, %cr4
    movl $0xC0000080, %ecx
    rdmsr
    orl $0x900, %eax
    wrmsr
    movl $0x80010033, %eax
    movl %eax, %cr0
    ljmpl $0x18, $({base} + 3f - trampoline_start)
    .code64
3:  xorl %eax, %eax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw %ax, %fs
    movw %ax, %gs
    movq {base} + trampoline_values - trampoline_start + 8, %rsp
    movq {base} + trampoline_values - trampoline_start + 16, %rdi
    movabsq ${start}, %rax
    pushq $0
    jmpq *%rax
    .balign 8
4:  .quad 0
    .quad 0x00CF9B000000FFFF
    .quad 0x00CF93000000FFFF
    .quad 0x00AF9B000000FFFF
trampoline_gdtr:
    .word 31
    .long {base} + 4b - trampoline_start
    .balign 8
trampoline_values:
    .quad 0, 0, 0
trampoline_end:
    .code64
    .popsection
    "#,
    base = const TRAMPOLINE,
    start = sym super::smp::other_start,
    options(att_syntax),
);

// Everything below runs from the ROM's last page, where offset 0 is 0xFFFF_F000 and the reset
// vector is offset 0xFF0. Real-mode code sees the page at F000:F000.
global_asm!(
    r#"
    .pushsection .reset, "ax", @progbits
    .globl reset_start
reset_start:
    .code16
reset16:
    cli
    cld
    lgdtl %cs:(0xF000 + reset_gdtr - reset_start)
    movl %cr0, %eax
    andl $0x9FFFFFFF, %eax          # caches on (CD, NW off)
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $0x08, $reset32

    .code32
reset32:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss

    # ebp = physical address of the image: the last 4 MiB of low memory, 2 MiB aligned.
    movb ${cmos_high}, %al
    outb %al, $0x70
    inb $0x71, %al
    movzbl %al, %ebx
    shll $8, %ebx
    movb ${cmos_low}, %al
    outb %al, $0x70
    inb $0x71, %al
    movb %al, %bl
    shll $16, %ebx
    addl $0x01000000, %ebx
    movl %ebx, %ebp
    subl $__image_span, %ebp
    andl $0xFFE00000, %ebp

    movl $__rom_base, %esi
    movl %ebp, %edi
    movl $__load_size, %ecx
    rep movsb
    movl $__image_size, %ecx
    subl $__load_size, %ecx
    xorl %eax, %eax
    rep stosb

    # The direct map: 512 pages of 1 GiB, present, writable, global, no execute... but the
    # same table also serves as the identity map of this code, so execute is allowed here and
    # taken away when the identity map is dropped.
    leal BOOT_PDPT_DIRECT - 0xFFFFFFFF80000000(%ebp), %edi
    xorl %ecx, %ecx
1:  movl %ecx, %eax
    andl $3, %eax
    shll $30, %eax
    orl $0x83, %eax
    movl %eax, (%edi, %ecx, 8)
    movl %ecx, %eax
    shrl $2, %eax
    movl %eax, 4(%edi, %ecx, 8)
    incl %ecx
    cmpl $512, %ecx
    jne 1b

    leal BOOT_PD_IMAGE - 0xFFFFFFFF80000000(%ebp), %edi
    leal 0x83(%ebp), %eax
    movl %eax, (%edi)
    addl $0x200000, %eax
    movl %eax, 8(%edi)
    leal BOOT_PDPT_IMAGE - 0xFFFFFFFF80000000(%ebp), %esi
    leal 3(%edi), %eax
    movl %eax, 510*8(%esi)
    leal BOOT_PML4 - 0xFFFFFFFF80000000(%ebp), %edi
    leal 3(%esi), %eax
    movl %eax, 511*8(%edi)
    leal BOOT_PDPT_DIRECT - 0xFFFFFFFF80000000(%ebp), %esi
    leal 3(%esi), %eax
    movl %eax, (%edi)
    movl %eax, 256*8(%edi)

    movl %edi, %cr3
    movl $0x6A0, %eax               # PAE, PGE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $0xC0000080, %ecx
    rdmsr
    orl $0x900, %eax                # LME, NXE
    wrmsr
    movl $0x80010033, %eax          # PG, WP, NE, ET, MP, PE
    movl %eax, %cr0
    ljmpl $0x18, $reset64

    .code64
reset64:
    xorl %eax, %eax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw %ax, %fs
    movw %ax, %gs
    movabsq $(BOOT_STACK_PAGES + {stack}), %rsp
    xorl %edi, %edi
    movl %ebp, %edi                 # image
    movl %ebx, %esi                 # end of low memory
    movabsq ${start}, %rax
    pushq $0                        # no return address; keeps the stack aligned as after a call
    jmpq *%rax

    .balign 8
reset_gdt:
    .quad 0
    .quad 0x00CF9B000000FFFF        # 08: 32-bit code
    .quad 0x00CF93000000FFFF        # 10: data
    .quad 0x00AF9B000000FFFF        # 18: 64-bit code
reset_gdtr:
    .word 31
    .long reset_gdt

    .org 0xFF0
    .code16
    jmp reset16
    .org 0x1000
    .code64
    .popsection
    "#,
    cmos_high = const CMOS_LOW_64K + 1,
    cmos_low = const CMOS_LOW_64K,
    stack = const BOOT_STACK,
    start = sym super::start,
    options(att_syntax),
);
