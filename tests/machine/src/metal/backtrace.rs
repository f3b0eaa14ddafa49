//! Where the machine broke, as a chain of calls ([`protocols::stack_trace`]).
//!
//! Everything is compiled with frame pointers: at each lie the caller's frame pointer and the
//! address it is returned to. Only memory that can hold a stack of the machine is read.

#![expect(unsafe_code, reason = "reads the frame pointer and the stack")]

use core::arch::asm;
use core::fmt;

use protocols::stack_trace::{MAX_SITES, Site, TITLE};

use super::boot::{IMAGE_SPAN, VBASE};
use super::memory;

unsafe extern "C" {
    #[link_name = "__text_start"]
    static TEXT_START: u8;
    #[link_name = "__text_end"]
    static TEXT_END: u8;
}

/// The frame pointer of the function this becomes a part of.
#[inline(always)]
pub fn frame_pointer() -> u64 {
    let frame;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, rbp", out(reg) frame, options(nomem, nostack, preserves_flags)) };
    frame
}

/// A chain of calls, shown as the list of its addresses.
pub struct StackTrace {
    /// The instruction that did not succeed, if that is what began it.
    pub first: Option<u64>,
    /// The innermost frame pointer.
    pub frame: u64,
}

impl fmt::Display for StackTrace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(TITLE)?;
        if let Some(first) = self.first {
            write!(f, " {}", Site::At(first))?;
        }
        let mut frame = self.frame;
        for _ in 1..MAX_SITES {
            let Some([caller, back]) = read(frame).filter(|&[_, back]| is_code(back)) else {
                break;
            };
            write!(f, " {}", Site::From(back))?;
            if caller <= frame {
                break;
            }
            frame = caller;
        }
        Ok(())
    }
}

/// Whether `address` is one of the machine's instructions.
fn is_code(address: u64) -> bool {
    (&raw const TEXT_START as u64..&raw const TEXT_END as u64).contains(&address)
}

/// The two words at `frame`, if a stack can be there: the first CPU's is in the image, the others
/// have theirs from the heap.
fn read(frame: u64) -> Option<[u64; 2]> {
    let words = size_of::<[u64; 2]>() as u64;
    let within = |start: u64, end: u64| frame >= start && frame <= end - words;
    let in_heap = memory::try_layout().is_some_and(|layout| {
        let at = |physical| memory::virt(physical) as u64;
        within(at(layout.heap.start), at(layout.heap.end))
    });
    let readable = in_heap || within(VBASE, VBASE + IMAGE_SPAN);
    // SAFETY: the machine's own memory, mapped for ever, read as plain words at any alignment.
    readable.then(|| unsafe { (frame as *const [u64; 2]).read_unaligned() })
}
