//! Instructions that are allowed to fault, and where they land.
//!
//! An assembly statement that touches memory somebody else controls registers a pair
//! (instruction, landing pad) with [`fixup!`]. When an exception hits exactly that
//! instruction, the handler puts what happened into RAX and continues at the landing pad.
//! Nothing else in the paravisor may fault.
//!
//! The table is in read-only memory, between two symbols of the linker script.
#![expect(unsafe_code, reason = "reads the table between linker symbols")]

use crate::platform::AccessFault;

/// One pair of addresses.
#[repr(C)]
struct Entry {
    instruction: u64,
    landing: u64,
}

unsafe extern "C" {
    #[link_name = "__fixups_start"]
    static START: Entry;
    #[link_name = "__fixups_end"]
    static END: Entry;
}

/// A line of assembly that registers the instruction at the first label with the landing pad at
/// the second.
macro_rules! fixup {
    ($instruction:literal, $landing:literal) => {
        concat!(
            ".pushsection .fixups, \"a\", @progbits\n",
            ".quad ",
            $instruction,
            "\n",
            ".quad ",
            $landing,
            "\n",
            ".popsection"
        )
    };
}
pub(crate) use fixup;

/// One instruction with AC set and a landing pad: evaluates to the new RAX, or to the fault. More
/// lines behind the instruction are skipped by a fault. If one of these may fault as well, it stands
/// at a label of its own, followed by a [`fixup!`] from there to `3f`.
///
/// RAX may be an operand; on a fault its value is replaced by what happened. The code around
/// the macro answers for what the instruction does, the macro for where a fault lands.
macro_rules! guarded {
    ($($line:expr),+; rax = $rax:expr, $($operands:tt)*) => {{
        let mut rax: u64 = $rax;
        let faulted: u64;
        // SAFETY: a fault of the instruction continues at label 3, and AC is clear afterwards
        // either way; what the instruction does to its operands is what the function around
        // this macro is for, and says.
        unsafe {
            core::arch::asm!(
                "stac",
                "xor {faulted:e}, {faulted:e}",
                "2:",
                $($line,)+
                "jmp 4f",
                "3:",
                "inc {faulted}",
                "4:",
                "clac",
                $crate::exceptions::fixup::fixup!("2b", "3b"),
                faulted = out(reg) faulted,
                inout("rax") rax,
                $($operands)*
            );
        }
        if faulted == 0 {
            Ok(rax)
        } else {
            Err($crate::exceptions::fixup::decode(rax))
        }
    }};
}
pub(crate) use guarded;

/// Where to continue when the instruction at `rip` faulted, if it may.
pub fn landing_for(rip: u64) -> Option<u64> {
    let start = &raw const START;
    let end = &raw const END;
    // SAFETY: the linker script puts both symbols around the `.fixups` input sections, which
    // hold nothing but pairs of quad words.
    let entries = unsafe { core::slice::from_raw_parts(start, end.offset_from_unsigned(start)) };
    entries
        .iter()
        .find(|entry| entry.instruction == rip)
        .map(|entry| entry.landing)
}

/// What the handler leaves in RAX: error code in the low half, vector above.
#[must_use]
pub const fn encode(fault: AccessFault) -> u64 {
    (fault.vector as u64) << 32 | fault.code as u64
}

/// Reads [`encode`].
#[must_use]
pub const fn decode(rax: u64) -> AccessFault {
    AccessFault {
        vector: (rax >> 32) as u8,
        code: rax as u32,
    }
}
