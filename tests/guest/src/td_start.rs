//! Pieces of the first instructions of a guest that starts as a trust domain does (`tdx.md` §8): 32-bit
//! protected mode without paging, all processors at once, ESI the number of each.
//!
//! Each macro is text for `global_asm!` with `options(att_syntax)`; what it wants of operands stands
//! beside it, the values are the constants here.

/// The shared bit, as a bit of the upper half of a page-table entry.
pub const SHARED_HIGH: u32 = 1 << (47 - 32);
/// Bytes of a processor's stack.
pub const STACK_SIZE: usize = 64 << 10;
/// CR0.PG.
pub const CR0_PAGING: u32 = 1 << 31;
/// CR4.PAE.
pub const CR4_PAE: u32 = 1 << 5;
/// Number of the MSR.
pub const EFER: u32 = 0xC000_0080;
/// Present, writable, accessed: an entry that points to a table.
pub const TABLE: u32 = 0x23;
/// Present, writable, accessed, dirty, large.
pub const LARGE: u32 = 0xE3;
/// Selector in the table `low_gdt`, as [`crate::trap`] has it.
pub const CODE64: u16 = 0x08;
/// The same for data.
pub const DATA: u16 = 0x10;

/// What the first processor found at its first instruction.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstState {
    /// EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI.
    pub gprs: [u32; 8],
    /// CR0, CR4, EFER.
    pub control: [u32; 3],
    pad: u32,
}

/// 32-bit: keeps the registers of the first instruction in `first_state`, laid out as
/// [`FirstState`](crate::td_start::FirstState). Wants `efer`.
#[macro_export]
macro_rules! td_keep_first_state {
    () => {
        concat!(
            "movl %eax, first_state\n",
            "movl %ecx, first_state + 4\n",
            "movl %edx, first_state + 8\n",
            "movl %ebx, first_state + 12\n",
            "movl %esp, first_state + 16\n",
            "movl %ebp, first_state + 20\n",
            "movl %esi, first_state + 24\n",
            "movl %edi, first_state + 28\n",
            "movl %cr0, %eax\n",
            "movl %eax, first_state + 32\n",
            "movl %cr4, %eax\n",
            "movl %eax, first_state + 36\n",
            "movl ${efer}, %ecx\n",
            "rdmsr\n",
            "movl %eax, first_state + 40\n",
        )
    };
}

/// 32-bit: the page tables at `boot_pml4`, `boot_private` and `boot_shared`. Wants `table`, `large`,
/// `shared_high`.
#[macro_export]
macro_rules! td_make_tables {
    () => {
        concat!(
            // Two entries of the top table: the private and the shared mapping.
            "movl $boot_private + {table}, boot_pml4\n",
            "movl $boot_shared + {table}, boot_pml4 + 8\n",
            // 512 x 1 GiB each.
            "xorl %ecx, %ecx\n",
            "1:\n",
            "movl %ecx, %eax\n",
            "shll $30, %eax\n",
            "orl ${large}, %eax\n",
            "movl %ecx, %edx\n",
            "shrl $2, %edx\n",
            "movl %eax, boot_private(,%ecx,8)\n",
            "movl %edx, boot_private + 4(,%ecx,8)\n",
            "orl ${shared_high}, %edx\n",
            "movl %eax, boot_shared(,%ecx,8)\n",
            "movl %edx, boot_shared + 4(,%ecx,8)\n",
            "incl %ecx\n",
            "cmpl $512, %ecx\n",
            "jb 1b\n",
        )
    };
}

/// 32-bit: tells the other processors that the tables are made, or waits for them (label 2), and goes to
/// `low_64`. Wants `data`, `cr4_pae`, `cr0_pg`, `code64`.
#[macro_export]
macro_rules! td_enter_long_mode {
    () => {
        concat!(
            "movl $1, boot_ready\n",
            // The others wait for the tables.
            "2:\n",
            "pause\n",
            "cmpl $0, boot_ready\n",
            "je 2b\n",
            "lgdtl low_gdt_pointer\n",
            "cld\n",
            "movw ${data}, %ax\n",
            "movw %ax, %ds\n",
            "movw %ax, %es\n",
            "movw %ax, %ss\n",
            "movl $boot_pml4, %eax\n",
            "movl %eax, %cr3\n",
            "movl %cr4, %eax\n",
            "orl ${cr4_pae}, %eax\n",
            "movl %eax, %cr4\n",
            // Long mode is enabled from the start.
            "movl %cr0, %eax\n",
            "orl ${cr0_pg}, %eax\n",
            "movl %eax, %cr0\n",
            "ljmpl ${code64}, $low_64\n",
        )
    };
}

/// 64-bit: calls `main` on the first processor's stack, `second` on the second's (label 3), and lays out
/// `low_gdt`. Wants `main`, `second`.
#[macro_export]
macro_rules! td_call_main {
    () => {
        concat!(
            "leaq boot_stack_top, %rsp\n",
            // Too far for a relative call.
            "movl ${main}, %eax\n",
            "callq *%rax\n",
            "ud2\n",
            "3:\n",
            // There is a stack for one more.
            "cmpl $1, %esi\n",
            "jne 3b\n",
            "leaq second_stack_top, %rsp\n",
            "movl ${second}, %eax\n",
            "callq *%rax\n",
            "ud2\n",
            ".balign 8\n",
            "low_gdt:\n",
            ".quad 0\n",
            ".quad 0x00AF9B000000FFFF\n",
            ".quad 0x00CF93000000FFFF\n",
            "low_gdt_pointer:\n",
            ".word low_gdt_pointer - low_gdt - 1\n",
            ".long low_gdt\n",
        )
    };
}

/// The end of the page `.low`: the reset vector, which jumps to `low_32`.
#[macro_export]
macro_rules! td_reset_vector {
    () => {
        concat!(
            ".org 0xFF0\n",
            ".code32\n",
            ".globl reset_vector\n",
            "reset_vector:\n",
            "jmp low_32\n",
            ".org 0x1000\n",
            ".code64\n",
            ".text\n",
        )
    };
}
