//! Bugs of ours: what is told about them before the end.
//!
//! A panic or an exception that nothing handles writes two lines to the log: what happened, and
//! the chain of calls that led there as addresses ([`protocols::stack_trace`]), which `xtask`
//! turns into names. Everything is compiled with frame pointers, so the chain is on the stack:
//! at each frame pointer lie the caller's frame pointer and the address it is returned to.
//!
//! The stack may be damaged and the log is the host's to read, so:
//!
//! * a word is read by an instruction that may fault, and then the chain ends;
//! * a word is written only if it is an address of the paravisor's code, which the host knows:
//!   nothing of the stack's contents leaves the machine;
//! * frames go up in memory, close to each other, and are counted.

use core::fmt;
use core::ops::Range;

use protocols::stack_trace::{MAX_SITES, Site, TITLE};

/// Frames further apart than this belong to no chain of ours: the size of the largest stack.
const LARGEST_FRAME: u64 = 32 * 1024;

/// A chain of calls.
struct Chain<L> {
    /// The instruction that did not succeed, if that is what began it.
    first: Option<u64>,
    /// The innermost frame pointer.
    frame: u64,
    /// Where code is.
    code: Range<u64>,
    /// Reads a word of the stack.
    load: L,
}

impl<L: Fn(u64) -> Option<u64>> Chain<L> {
    /// The entries, innermost first.
    fn sites(&self) -> impl Iterator<Item = Site> + '_ {
        let first = self.first.filter(|at| self.code.contains(at)).map(Site::At);
        let mut frame = self.frame;
        let callers = core::iter::from_fn(move || {
            let word = size_of::<u64>() as u64;
            if frame == 0 || !frame.is_multiple_of(word) {
                return None;
            }
            let caller = (self.load)(frame)?;
            let back = (self.load)(frame.checked_add(word)?)?;
            let upwards = caller > frame && caller - frame <= LARGEST_FRAME;
            frame = if upwards { caller } else { 0 };
            self.code.contains(&back).then_some(Site::From(back))
        });
        first.into_iter().chain(callers).take(MAX_SITES)
    }
}

impl<L: Fn(u64) -> Option<u64>> fmt::Display for Chain<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(TITLE)?;
        self.sites().try_for_each(|site| write!(f, " {site}"))
    }
}

#[cfg(target_os = "none")]
pub use bare::report_exception;

/// The half that needs the processor.
#[cfg(target_os = "none")]
mod bare {
    #![expect(unsafe_code, reason = "reads the frame pointer; linker symbols")]

    use core::arch::asm;
    use core::fmt;
    use core::hint::spin_loop;
    use core::panic::PanicInfo;
    use core::sync::atomic::{AtomicUsize, Ordering};

    use log::error;
    use protocols::terminate::TurnstileReason;

    use super::Chain;
    use crate::memory::access;
    use crate::percpu;
    use crate::terminate::terminate;

    unsafe extern "C" {
        #[link_name = "__text_start"]
        static TEXT_START: u8;
        #[link_name = "__text_end"]
        static TEXT_END: u8;
    }

    /// Nobody reports.
    const NOBODY: usize = usize::MAX;
    /// The processor that reports.
    static REPORTING: AtomicUsize = AtomicUsize::new(NOBODY);
    /// How long a second processor that breaks leaves the first one to finish its report.
    const PATIENCE: u32 = 1 << 22;

    /// Writes what happened and the chain that begins at `frame`, once for the machine.
    ///
    /// A bug often hits several processors. The first one tells; the others give it some time,
    /// because their end is the machine's. A bug in here ends at once.
    fn report(what: fmt::Arguments<'_>, first: Option<u64>, frame: u64) {
        let index = percpu::current().map_or(0, percpu::PerCpu::index);
        match REPORTING.compare_exchange(NOBODY, index, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => {
                let chain = Chain {
                    first,
                    frame,
                    code: (&raw const TEXT_START) as u64..(&raw const TEXT_END) as u64,
                    load: |address| access::load_u64(address).ok(),
                };
                error!("{what}");
                error!("{chain}");
            }
            Err(reporter) if reporter == index => {}
            Err(_) => (0..PATIENCE).for_each(|_| spin_loop()),
        }
    }

    /// Tells about an exception that nothing handles, met at `rip` with `rbp`.
    pub fn report_exception(what: fmt::Arguments<'_>, rip: u64, rbp: u64) {
        report(what, Some(rip), rbp);
    }

    #[panic_handler]
    fn panic(info: &PanicInfo<'_>) -> ! {
        let frame: u64;
        // SAFETY: reads a register.
        unsafe { asm!("mov {}, rbp", out(reg) frame, options(nomem, nostack, preserves_flags)) };
        report(format_args!("{info}"), None, frame);
        terminate(TurnstileReason::INTERNAL)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::string::String;

    use super::*;

    const CODE: Range<u64> = 0x1000..0x2000;

    fn shown(first: Option<u64>, frame: u64, stack: &[(u64, u64)]) -> String {
        let words: BTreeMap<u64, u64> = stack.iter().copied().collect();
        let load = |address| words.get(&address).copied();
        let chain = Chain {
            first,
            frame,
            code: CODE,
            load,
        };
        std::format!("{chain}")
    }

    #[test]
    fn a_chain_is_followed_to_its_end() {
        let stack = [
            (0x100, 0x140),
            (0x108, 0x1111),
            (0x140, 0x180),
            (0x148, 0x1222),
            (0x180, 0),
            (0x188, 0x1333),
        ];
        assert_eq!(
            shown(Some(0x1010), 0x100, &stack),
            "stack trace: at 0x1010 from 0x1111 from 0x1222 from 0x1333"
        );
        assert_eq!(
            shown(None, 0x140, &stack),
            "stack trace: from 0x1222 from 0x1333"
        );
    }

    #[test]
    fn only_addresses_of_code_are_shown() {
        let secret = 0x5EC2_E7AB;
        assert_eq!(shown(Some(secret), 0, &[]), "stack trace:");
        let stack = [(0x100, 0x140), (0x108, secret), (0x148, 0x1222)];
        assert_eq!(shown(None, 0x100, &stack), "stack trace:");
        // The ends of the code are not code either.
        assert_eq!(
            shown(None, 0x100, &[(0x100, 0), (0x108, CODE.end)]),
            "stack trace:"
        );
    }

    #[test]
    fn a_damaged_stack_ends_the_chain() {
        // A circle, a step down, one too far up, one not aligned, one that cannot be read.
        for next in [0x100, 0xF0, 0x100 + LARGEST_FRAME + 8, 0x141, 0x140] {
            let stack = [(0x100, next), (0x108, 0x1111), (0xF0, 0), (0xF8, 0x1222)];
            assert_eq!(
                shown(None, 0x100, &stack),
                "stack trace: from 0x1111",
                "{next:#x}"
            );
        }
        assert_eq!(
            shown(None, u64::MAX - 7, &[(u64::MAX - 7, 0)]),
            "stack trace:"
        );
    }

    #[test]
    fn a_chain_has_a_longest_length() {
        let stack: Vec<_> = (0..99)
            .flat_map(|n| [(0x100 + 16 * n, 0x110 + 16 * n), (0x108 + 16 * n, 0x1111)])
            .collect();
        let shown = shown(None, 0x100, &stack);
        assert_eq!(shown.matches("from").count(), MAX_SITES);
    }
}
