//! The machine's own descriptor tables: an NMI is acknowledged, and an exception, which means
//! that the machine itself is broken, ends it with vector, address and stack trace instead of a
//! silent reset.

#![expect(unsafe_code, reason = "exception entry points and table registers")]

use core::arch::naked_asm;

use spin::Once;
use x86_64::VirtAddr;
use x86_64::registers::control::Cr2;
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable};
use x86_64::structures::idt::InterruptDescriptorTable;

use super::finish;

struct Tables {
    gdt: GlobalDescriptorTable,
    idt: InterruptDescriptorTable,
}

static TABLES: Once<Tables> = Once::new();

/// What the CPU pushes, below an error code or a zero in its place.
#[repr(C)]
struct Frame {
    vector: u64,
    error: u64,
    rip: u64,
}

extern "sysv64" fn report(frame: &Frame, rbp: u64) -> ! {
    let cr2 = Cr2::read_raw();
    let Frame { vector, error, rip } = frame;
    let what = format_args!("exception {vector} at {rip:#x}, error {error:#x}, CR2 {cr2:#x}");
    finish::broken(what, Some(*rip), rbp)
}

/// An entry point for one vector; `push 0` stands in for an error code the CPU does not push.
macro_rules! entry {
    ($name:ident, $vector:literal, $($error:literal)?) => {
        #[unsafe(naked)]
        extern "sysv64" fn $name() {
            naked_asm!(
                $($error,)?
                concat!("push ", $vector),
                "mov rdi, rsp",
                "mov rsi, rbp",
                "and rsp, -16",
                "call {report}",
                report = sym report,
            )
        }
    };
}

entry!(divide_error, "0", "push 0");
entry!(invalid_opcode, "6", "push 0");
entry!(double_fault, "8",);
entry!(stack_fault, "12",);
entry!(general_protection, "13",);
entry!(page_fault, "14",);

/// An NMI that ended a guest is still pending; it is taken here, and that is all.
#[unsafe(naked)]
extern "sysv64" fn nmi() {
    naked_asm!("iretq")
}

fn address(handler: extern "sysv64" fn()) -> VirtAddr {
    VirtAddr::new(handler as usize as u64)
}

/// Loads the tables on this CPU. The code segment keeps the selector of the reset code's table.
pub fn load() {
    let tables = TABLES.call_once(|| {
        let mut gdt = GlobalDescriptorTable::new();
        // Fill up to the selector 0x18 that CS holds since the reset code.
        gdt.append(Descriptor::kernel_data_segment());
        gdt.append(Descriptor::kernel_data_segment());
        gdt.append(Descriptor::kernel_code_segment());
        let mut idt = InterruptDescriptorTable::new();
        // SAFETY: each entry point leaves the frame of its vector to `report` and never returns,
        // or returns at once with nothing changed.
        unsafe {
            idt.divide_error.set_handler_addr(address(divide_error));
            idt.non_maskable_interrupt.set_handler_addr(address(nmi));
            idt.invalid_opcode.set_handler_addr(address(invalid_opcode));
            idt.double_fault.set_handler_addr(address(double_fault));
            idt.stack_segment_fault
                .set_handler_addr(address(stack_fault));
            idt.general_protection_fault
                .set_handler_addr(address(general_protection));
            idt.page_fault.set_handler_addr(address(page_fault));
        }
        Tables { gdt, idt }
    });
    tables.gdt.load();
    tables.idt.load();
}
